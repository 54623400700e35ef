"""The optimizer and its schedule, the same for all methods."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler


def decayed_weights(module: torch.nn.Module) -> set[str]:
    """Names of the weight matrices and kernels, which alone are decayed.

    By name, not by shape, which a strategy that shards the weights changes later.
    """
    return {name for name, weight in module.named_parameters() if weight.ndim > 1}


def adamw_one_cycle(
    module: L.LightningModule, decayed: set[str], *, learning_rate: float, weight_decay: float
) -> OptimizerLRScheduler:
    """AdamW under a one-cycle learning rate (Smith & Topin 2018) over the planned steps.

    A tenth of the steps up, the rest down to nothing along a cosine.

    Args:
        module: Its trainable weights are optimised.
        decayed: Names of the weights that are decayed.
        learning_rate: At the peak of the cycle.
        weight_decay: Decoupled.
    """
    weights = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in weights if name in decayed]},
        {"params": [p for name, p in weights if name not in decayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=weight_decay)
    steps = max(2, int(module.trainer.estimated_stepping_batches))
    # Not OneCycleLR: its checkpoint fixes the number of steps, so no run could be prolonged.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(one_cycle, steps))
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": schedule, "interval": "step"},
    }


def one_cycle(num_steps: int, step: int) -> float:
    """Share of the highest learning rate: up within a tenth of the steps, then down to zero.

    >>> [round(one_cycle(100, step), 3) for step in (0, 5, 10, 55, 100, 120)]
    [0.04, 0.52, 1.0, 0.5, 0.0, 0.0]
    """
    peak = max(1.0, 0.1 * num_steps)
    if step < peak:
        return 0.04 + 0.96 * step / peak
    done = min(1.0, (step - peak) / max(1.0, num_steps - peak))
    return 0.5 * (1 + math.cos(math.pi * done))
