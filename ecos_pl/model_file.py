"""A trained classifier in one file that the client can run: safetensors with a JSON header.

No pickle: a client can evaluate what it is sent without running the sender's code. The pixel
statistics and the class names travel with the weights. The weights' shapes alone say which channels
a compressed model still has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ecos_pl.backbone import create_backbone
from ecos_pl.channels import fit_shapes
from ecos_pl.classifier import Classifier
from ecos_pl.storage import write_bytes

FORMAT = "ecos_pl model 1"


def header_of(model: Classifier) -> dict[str, Any]:
    """What a file says of its model beside the weights; plain data."""
    return {
        "format": FORMAT,
        "backbone": model.backbone,
        "image_size": model.image_size,
        "classes": list(model.classes),
    }


def save_model(path: Path, model: Classifier) -> None:
    """Write a model, atomically."""
    header = header_of(model)
    state = {k: v.detach().cpu().contiguous() for k, v in model.net.state_dict().items()}
    write_bytes(path, save(state, {"ecos_pl": json.dumps(header, ensure_ascii=False)}))


def load_model(path: Path) -> Classifier:
    """Read a model; it is in eval mode.

    Raises:
        ValueError: The file is missing, damaged, or holds something else; the text is one line.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["ecos_pl"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, expected {FORMAT!r}")
        model = _rebuilt(header)
        fit_shapes(model.net, state)  # of a compressed model, which has fewer channels
        model.net.load_state_dict(state)
        model.net.to(memory_format=torch.channels_last)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as a delivered model: {reason}") from error
    return model.eval()


def is_model_file(path: Path) -> bool:
    """Whether a file says of itself that it is one of these, rather than bare weights."""
    try:
        with safe_open(path, framework="pt") as file:
            return "ecos_pl" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _rebuilt(header: dict[str, Any]) -> Classifier:
    backbone, size = str(header["backbone"]), int(header["image_size"])
    classes = [str(name) for name in header["classes"]]
    net = create_backbone(backbone, "random", image_size=size, num_classes=len(classes))
    return Classifier(net, backbone, size, classes)
