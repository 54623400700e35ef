"""The public, frozen encoder: images to embeddings, with a fingerprint both parties can compare."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecos_pl.backbone import create_backbone, pixel_statistics, weights_hash

_PIPELINE_VERSION = 1  # raise when the pixels-to-embedding arithmetic below changes


@dataclass(frozen=True)
class EncoderSpec:
    """What names an encoder: timm architecture, weight source, and input side in pixels."""

    name: str = "tf_efficientnet_lite0"
    weights: str = "auto"
    image_size: int = 48

    def fingerprint(self) -> str:
        """SHA-256 over architecture, weight hash and preprocessing; the weight *path* is left out.

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
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = create_backbone(spec.name, spec.weights, image_size=spec.image_size)
        mean, std = pixel_statistics(spec.name)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, 3, 1, 1))
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
            features = self.backbone(pixels)
        return nn.functional.normalize(features.float(), dim=1, eps=1e-6)

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode whatever the caller's mode is."""
        return super().train(False)


def public_name(spec: EncoderSpec) -> dict[str, str | int]:
    """What a query tells of the encoder beside its fingerprint; no path of this machine."""
    return {"name": spec.name, "image_size": spec.image_size}


def describe(spec: EncoderSpec) -> str:
    """One line for logs and messages, ``tf_efficientnet_lite0 (auto) at 48 px`` say."""
    return f"{spec.name} ({spec.weights}) at {spec.image_size} px"
