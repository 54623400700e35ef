"""A trained classifier in one file that the client can run: safetensors with a JSON header.

No pickle: a client can evaluate what it is sent without running the sender's code. The pixel
statistics and the class names travel with the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ecos_pl.backbone import create_backbone, pixel_statistics
from ecos_pl.storage import write_bytes

FORMAT = "ecos_pl model 1"


@dataclass(frozen=True)
class TrainedModel:
    """A classifier ready to use.

    Attributes:
        net: timm network, in eval mode.
        backbone: Its timm architecture.
        image_size: Input side in pixels.
        classes: Names of the K classes.
    """

    net: nn.Module
    backbone: str
    image_size: int
    classes: Sequence[str]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Class scores [B, K] of images [B, 3, S, S] uint8."""
        mean, std = pixel_statistics(self.backbone)
        shift = 255 * torch.tensor(mean).view(1, 3, 1, 1)
        scale = 255 * torch.tensor(std).view(1, 3, 1, 1)
        scores: Tensor = self.net((images.float() - shift) / scale)
        return scores


def save_model(path: Path, model: TrainedModel) -> None:
    """Write a model, atomically."""
    header = {
        "format": FORMAT,
        "backbone": model.backbone,
        "image_size": model.image_size,
        "classes": list(model.classes),
    }
    state = {k: v.detach().cpu().contiguous() for k, v in model.net.state_dict().items()}
    write_bytes(path, save(state, {"ecos_pl": json.dumps(header, ensure_ascii=False)}))


def load_model(path: Path) -> TrainedModel:
    """Read a model.

    Raises:
        ValueError: The file is missing, damaged, or holds something else; the text is one line.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["ecos_pl"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, expected {FORMAT!r}")
        backbone, size = str(header["backbone"]), int(header["image_size"])
        classes = [str(name) for name in header["classes"]]
        net = create_backbone(backbone, "random", image_size=size, num_classes=len(classes))
        net.load_state_dict(state)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as a delivered model: {reason}") from error
    return TrainedModel(net.eval(), backbone, size, classes)
