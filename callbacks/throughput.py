"""How many images a second training sees as it goes on, and how much GPU memory it takes."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks.logging_to import log_scalars
from callbacks.run_timer import num_images


class Throughput(Callback):
    """Logs ``throughput/…`` with every logged interval of training steps.

    ``images_per_second`` counts the images of all ranks, views once, loading included; validation
    does not count. ``gpu_memory_gb`` is the most that tensors have taken so far on the first rank's
    device, ``gpu_memory_reserved_gb`` what torch holds for them. On a CPU there is only the first.

    Lightning's monitors do not serve here: ``ThroughputMonitor`` waits for the device after every
    batch, and ``DeviceStatsMonitor`` writes about a hundred series twice a step.
    """

    def __init__(self) -> None:
        self._images, self._seconds = 0, 0.0
        self._last_end: float | None = None
        self._last_step = 0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_end = None  # what lies between epochs is not a step

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_end = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images, self._seconds, self._last_step = 0, 0.0, trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = perf_counter()
        if self._last_end is not None:
            self._seconds += now - self._last_end
            self._images += num_images(batch) * trainer.world_size
        self._last_end = now
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step % every or step == self._last_step:
            return
        self._last_step = step
        if self._seconds and trainer.is_global_zero:
            rate = {"throughput/images_per_second": self._images / self._seconds}
            log_scalars(trainer, rate | _gpu_memory(pl_module.device))
        self._images, self._seconds = 0, 0.0


def _gpu_memory(device: torch.device) -> dict[str, float]:
    """Of torch's own books, which nothing waits for."""
    if device.type != "cuda":
        return {}
    return {
        "throughput/gpu_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9,
        "throughput/gpu_memory_reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
    }
