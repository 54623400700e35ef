"""With what a run was done: versions, machine, device. For ``summary.json``."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

_PACKAGES = ("ecos-pl", "torch", "lightning", "torchvision", "timm", "dp-accounting", "opendp")


def environment_facts(device: torch.device, num_processes: int = 1) -> dict[str, Any]:
    """Versions of what decides about results, and what it ran on; no name of the machine.

    Args:
        device: Of the first process.
        num_processes: Of the whole run.
    """
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type.upper(),
        "num_processes": num_processes,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None
