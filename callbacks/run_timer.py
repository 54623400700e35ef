"""How long the run took."""

from __future__ import annotations

from collections import deque
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from callbacks.logging_to import log_scalars

_NUM_WARM_UP = 3  # first steps of a fit that do not count
_NUM_KEPT = 1000  # newest steps that the median is taken over


class RunTimer(Callback):
    """Measures fit, test and training steps in wall time; logs ``time/…`` at the end of each.

    A step lasts from the end of one batch to the end of the next, loading included; the
    first few, and the first of each epoch and after each validation, do not count. Nothing waits
    for the device: where no other part does either, steps that fit into its queue appear too short.

    What other callbacks draw before and after the training does not count if they come first.
    """

    def __init__(self) -> None:
        self._fit_seconds = 0.0
        self._fit_start: float | None = None
        self._test_seconds = 0.0
        self._test_start: float | None = None
        self._steps: deque[tuple[float, int]] = deque(maxlen=_NUM_KEPT)  # seconds, images
        self._last_end: float | None = None
        self._num_steps = 0

    @property
    def fit_seconds(self) -> float:
        """Seconds in fit so far, those before a resume included; without setup and probe."""
        running = 0.0 if self._fit_start is None else perf_counter() - self._fit_start
        return self._fit_seconds + running

    @property
    def test_seconds(self) -> float:
        """Seconds of the last test."""
        return self._test_seconds

    @property
    def seconds_per_step(self) -> float | None:
        """Median seconds of a training step; None before enough of them were seen."""
        return median(seconds for seconds, _ in self._steps) if self._steps else None

    @property
    def images_per_second(self) -> float | None:
        """Training images, views counted once, of all ranks; None before enough steps."""
        seconds = sum(seconds for seconds, _ in self._steps)
        return sum(images for _, images in self._steps) / seconds if seconds else None

    # --- fit -----------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._fit_start, self._num_steps = perf_counter(), 0
        self._last_end = None

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_end = None

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_end = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = perf_counter()
        if self._last_end is not None and self._num_steps >= _NUM_WARM_UP:
            images = num_images(batch) * trainer.world_size
            self._steps.append((now - self._last_end, images))
        self._last_end = now
        self._num_steps += 1

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_fit()

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_fit()
        found = {
            "time/fit_seconds": self.fit_seconds,
            "time/seconds_per_step": self.seconds_per_step,
            "time/images_per_second": self.images_per_second,
        }
        _log(trainer, {name: value for name, value in found.items() if value is not None})

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop_fit()

    def _stop_fit(self) -> None:
        self._fit_seconds, self._fit_start = self.fit_seconds, None

    # --- test ----------------------------------------------------------------------------------

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._test_start = perf_counter()

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._test_start is not None:
            self._test_seconds = perf_counter() - self._test_start
            _log(trainer, {"time/test_seconds": self._test_seconds})

    # --- resume --------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"fit_seconds": self.fit_seconds, "steps": [list(step) for step in self._steps]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Testing the best checkpoint after fit brings its shorter past: this one stays.
        if not self.fit_seconds:
            self._fit_seconds = state_dict["fit_seconds"]
            self._steps.extend((seconds, images) for seconds, images in state_dict["steps"])


def num_images(batch: Any) -> int:
    """Images in a batch: the length of its first tensor, summed over a mapping's parts."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 0
    if isinstance(batch, dict):
        return sum(num_images(part) for part in batch.values())
    if isinstance(batch, (list, tuple)):
        return next((found for part in islice(batch, 8) if (found := num_images(part))), 0)
    return 0


def _log(trainer: Trainer, metrics: dict[str, float]) -> None:
    if trainer.is_global_zero:
        log_scalars(trainer, metrics)
