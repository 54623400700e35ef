"""Exponential moving average of the weights, with a warm-up, on Lightning's WeightAveraging."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class WarmupWeightAveraging(WeightAveraging):
    """Validates, tests and saves averaged weights.

    The decay is ``min(decay, (1 + t) / (10 + t))`` after t updates (as in TensorFlow's
    ``ExponentialMovingAverage``): a fixed one would keep a share of the freshly initialised head
    through a short training.

    Args:
        decay: Of the average, per step.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of averaged weights must lie in [0, 1), not {decay}")
        super().__init__(multi_avg_fn=partial(_update, decay))


@torch.no_grad()
def _update(
    decay: float, averaged: Sequence[Tensor], current: Sequence[Tensor], num_updates: Any
) -> None:
    steps = float(num_updates)
    share = 1 - min(decay, (1 + steps) / (10 + steps))
    if averaged[0].is_floating_point():  # all of one call are of one type
        torch._foreach_lerp_(list(averaged), list(current), share)
    else:  # batch norm's counters
        torch._foreach_copy_(list(averaged), list(current))


def averaged(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """The module with averaged weights where this callback keeps one, else the module itself."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WarmupWeightAveraging) and callback._average_model is not None:
            found = callback._average_model.module
            assert isinstance(found, LightningModule)
            return found
    return pl_module
