"""The public, frozen encoder: images to embeddings, with a fingerprint both parties can compare."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecos_pl.backbone import create_backbone, pixel_statistics, weights_hash

_PIPELINE_VERSION = 1  # raise when the pixels-to-embedding arithmetic below changes


FEATURES = ("final", "grid")
"""What an encoder can give: its pooled last layer, or the coarse layout of an earlier one."""

GRID_STRIDE = 16
GRID_SIDE = 3
"""The grid: the last map of this stride (as timm counts), averaged to 3 × 3 cells.

The last layer of an ImageNet network has forgotten much of what tells the classes of a small or
unusual picture apart. On mixed_digits, labels from the client's noisy class means are right for
0.96 of the images in these features and for 0.82 in the last layer's, at the same ε = 1.
"""


class FeaturesError(ValueError):
    """This encoder does not give these features; the message is one line."""


@dataclass(frozen=True)
class EncoderSpec:
    """What names an encoder: timm architecture, weight source, input side in pixels, features.

    ``adapted`` says that the cloud has trained the backbone further: ``weights`` is then a file of
    `backbone_file`, and queries name it by its SHA-256.

    Raises:
        FeaturesError: There are no features of that name.
    """

    name: str = "tf_efficientnet_lite0"
    weights: str = "auto"
    image_size: int = 48
    features: str = "final"
    adapted: bool = False

    def __post_init__(self) -> None:
        if self.features not in FEATURES:
            raise FeaturesError(
                f"encoder features {self.features!r}: there are {', '.join(FEATURES)}"
            )

    @property
    def key(self) -> str:
        """Names what these embeddings are, in folder names."""
        return f"{self.fingerprint()[:16]}-{self.features}"

    def fingerprint(self) -> str:
        """SHA-256 over architecture, weight hash and preprocessing; the weight *path* is left out.

        So are the features: who trusts an encoder answers for all that it can give.

        Raises:
            WeightsError: The weights are missing.
        """
        mean, std = pixel_statistics(self.name)
        facts = {
            "name": self.name,
            "weights": weights_hash(self.name, self.weights),
            "image_size": self.image_size,
            "mean": mean,
            "std": std,
            "pipeline": _PIPELINE_VERSION,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Encoder(nn.Module):
    """A frozen timm backbone with its own pixel statistics.

    It stays in eval mode, so each embedding depends on its own image alone: with batch
    statistics one private image would move the embeddings of all others.

    Attributes:
        num_dims: Embedding dimension ``D``, measured by a forward pass (timm's ``num_features``
            is not the output dimension for several families).

    Raises:
        FeaturesError: The architecture does not give the features asked for.
        WeightsError: See ``backbone.create_backbone``.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = create_backbone(spec.name, spec.weights, image_size=spec.image_size)
        mean, std = pixel_statistics(spec.name)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))
        self._grid_index = _grid_index(self.backbone) if spec.features == "grid" else 0
        self.requires_grad_(False)
        self.eval()
        self.to(memory_format=torch.channels_last)
        blank = torch.zeros(1, 3, spec.image_size, spec.image_size, dtype=torch.uint8)
        self.num_dims = int(self(blank).shape[1])

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """Embed images [B, 3, S, S] uint8 as unit vectors [B, D] float32.

        An image whose features are all zero (a blank one, through ReLU6) keeps a zero vector.
        """
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        pixels = (images.to(mean.dtype) - mean) / std
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            features = self._features(pixels)
        return nn.functional.normalize(features.float(), dim=1, eps=1e-6)

    def _features(self, pixels: Tensor) -> Tensor:
        if self.spec.features == "final":
            pooled: Tensor = self.backbone(pixels)
            return pooled
        maps = self.backbone.forward_intermediates(  # type: ignore[operator]
            pixels, indices=[self._grid_index], stop_early=True, intermediates_only=True
        )
        return nn.functional.adaptive_avg_pool2d(maps[0], GRID_SIDE).flatten(1)

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode whatever the caller's mode is."""
        return super().train(False)


def _grid_index(backbone: nn.Module) -> int:
    """Which of timm's intermediate maps is the last one of stride 16 or less."""
    info: Any = getattr(backbone, "feature_info", None)
    strides = [stage["reduction"] for stage in info or []]
    fine = [index for index, stride in enumerate(strides) if stride <= GRID_STRIDE]
    if not fine or not hasattr(backbone, "forward_intermediates"):
        raise FeaturesError(
            f"this encoder gives no map of stride {GRID_STRIDE}: take features=final instead"
        )
    return fine[-1]


def public_name(spec: EncoderSpec) -> dict[str, str | int]:
    """What a query tells of the encoder beside its fingerprint; no path of this machine."""
    told: dict[str, str | int] = {
        "name": spec.name,
        "image_size": spec.image_size,
        "features": spec.features,
    }
    return {**told, "model": weights_hash(spec.name, spec.weights)} if spec.adapted else told


def describe(spec: EncoderSpec) -> str:
    """One line for logs and messages, ``tf_efficientnet_lite0 (auto) at 48 px`` say; no path."""
    weights = "trained further" if spec.adapted else Path(spec.weights).name
    return f"{spec.name} ({weights}) at {spec.image_size} px"
