"""Exponential moving average of the weights, with a warm-up, on Lightning's WeightAveraging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
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
        super().__init__(multi_avg_fn=_warmup_average(decay))


def _warmup_average(decay: float) -> Callable[..., None]:
    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], num_updates: Any) -> None:
        steps = float(num_updates)
        share = 1 - min(decay, (1 + steps) / (10 + steps))
        for average, value in zip(averaged, current, strict=True):
            if average.is_floating_point():
                average.lerp_(value, share)
            else:  # batch norm's counter
                average.copy_(value)

    return update
