"""``torch.compile`` where it works, and a warning where it does not."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn


def compile_in_place(model: nn.Module, device: torch.device) -> None:
    """Compile what calls of the model run, if the device can; its weights keep their names.

    Args:
        model: Is called as before, and slow the first time for each shape of images.
        device: Where it will run.
    """
    if can_compile(device):
        model.compile()


def can_compile(device: torch.device) -> bool:
    """Whether ``torch.compile`` works here; if not, a warning says so.

    Whether a compiler is there shows only when something is compiled, so something small is,
    first: a run must not die in its first step for want of one.
    """
    try:
        torch.compile(_small)(torch.zeros(8, device=device))
    except Exception as error:  # of whatever kind: each backend has its own
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"task.compile: nothing is compiled on this {device.type}: {reason}", stacklevel=3
        )
        return False
    return True


def _small(values: Tensor) -> Tensor:
    return values.sin() + 1
