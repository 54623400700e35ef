"""A backbone that training has changed, as a file that both parties can make an encoder of.

safetensors, no pickle. The classifier's head stays behind; kernels travel as float16, which halves
the download, and both sides compute with the rounded ones. Equal weights give equal bytes, so the
file's SHA-256 names them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ecos_pl.backbone import backbone_names
from ecos_pl.encoder import EncoderSpec
from ecos_pl.storage import write_bytes

FORMAT = "ecos_pl backbone 1"
_HEADER = "ecos_backbone"
_DTYPES = (torch.float16, torch.float32, torch.int64)


def backbone_bytes(net: nn.Module, name: str) -> bytes:
    """The file of a timm network, without its classifier.

    Tensors of two and more dimensions become float16. Vectors (biases, normalisation) stay as they
    are: running variances can leave float16's range, and all vectors together are small.

    Args:
        net: With a head of any size, or none.
        name: Its timm architecture.

    Raises:
        ValueError: It is another architecture, or a weight is not finite (in float16).
    """
    names, state = backbone_names(name), net.state_dict()
    if missing := [key for key in names if key not in state]:
        raise ValueError(f"the network is no {name}: it has no {missing[0]}")
    kept = {key: _compact(state[key]) for key in names}
    for key, tensor in kept.items():
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"the backbone cannot be sent: {key} is not finite in {tensor.dtype}")
    header = json.dumps({"format": FORMAT, "backbone": name}, sort_keys=True)
    return save(kept, {_HEADER: header})


def save_adapted(net: nn.Module, encoder: EncoderSpec, path: Path) -> EncoderSpec:
    """Write a trained network's backbone and return the encoder that it makes: the cloud's side.

    The client gets the file with ``Mailbox.send_model(path.read_bytes())``, before any query.

    Args:
        net: Of the encoder's architecture.
        encoder: Gives architecture, image size and features.
        path: Where to write, ending in ``.safetensors``.

    Raises:
        ValueError: See `backbone_bytes`.
    """
    write_bytes(path, backbone_bytes(net, encoder.name))
    return replace(encoder, weights=str(path), adapted=True)


def read_backbone(content: bytes) -> tuple[str, dict[str, Tensor]]:
    """The architecture that a file names, and its tensors, all of them finite.

    Raises:
        ValueError: It is damaged or something else; the text is one line.
    """
    try:
        state = load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_HEADER])
        found, name = header["format"], header["backbone"]
    except (SafetensorError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError("it is no file of a backbone") from error
    if found != FORMAT or not isinstance(name, str):
        raise ValueError(f"it is no {FORMAT!r}")
    for key, tensor in state.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{_shown(key)} is of type {tensor.dtype}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{_shown(key)} holds a value that is not finite")
    return name, state


def _compact(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.half() if tensor.ndim > 1 else tensor.float()
    return tensor.contiguous()  # a network in channels_last would give other bytes


def _shown(key: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in key)[:60]
