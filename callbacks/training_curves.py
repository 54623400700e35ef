"""Loss and accuracy over the steps, in one picture that survives a resumed run."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from callbacks.figures import BLUE, DARK, GREEN, ORANGE, new_figure, plain_axes, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_TRAIN = ("train/loss", "train/learning_rate")
_VALIDATION = ("val/loss", "val/accuracy")
_TEST = "simulation/test_accuracy"

_AXES = {"loss": "loss (nats)", "accuracy": "accuracy (%)", "learning rate": "learning rate"}

Curves = dict[str, list[list[float]]]  # name → [step, value] pairs


class TrainingCurves(Callback):
    """Writes ``figures/training.png`` when training ends, however it ends.

    Losses are read every ``log_every_n_steps`` steps, so no other step waits for the device. The
    test accuracy joins in when a test knows it.
    """

    def __init__(self) -> None:
        self._curves: Curves = {}
        self._per_epoch: set[str] = set()
        self._epoch_start = 0

    # --- collect: on all ranks, since reading an epoch's metric is a collective operation -------

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What a run interrupted in this process saw after the checkpoint comes again.
        self._curves = {
            name: [point for point in points if point[0] <= trainer.global_step]
            for name, points in self._curves.items()
        }

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_start = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            self._collect(trainer, [name for name in _TRAIN if name not in self._per_epoch])

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Epochs shorter than the interval, and what is logged once an epoch only.
        silent = {name for name in _TRAIN if self._last_step(name) <= self._epoch_start}
        self._per_epoch |= silent & set(trainer.callback_metrics)
        self._collect(trainer, sorted(silent))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._collect(trainer, _VALIDATION)

    def _collect(self, trainer: Trainer, names: Sequence[str]) -> None:
        step, metrics = trainer.global_step, trainer.callback_metrics
        for name in names:
            if name in metrics and self._last_step(name) < step:
                self._curves.setdefault(name, []).append([step, float(metrics[name])])

    def _last_step(self, name: str) -> float:
        points = self._curves.get(name)
        return points[-1][0] if points else -1

    # --- draw ----------------------------------------------------------------------------------

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        try:
            self._save(trainer)
        except Exception as error:  # must not hide what went wrong before
            log.warning("figures/training.png could not be written: %s", error)

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = trainer.callback_metrics.get(_TEST)
        if accuracy is not None:
            self._save(trainer, float(accuracy))

    def _save(self, trainer: Trainer, test_accuracy: float | None = None) -> None:
        if trainer.is_global_zero and self._curves and not getattr(trainer, "fast_dev_run", False):
            save_figure(trainer, draw_training(self._curves, test_accuracy), "training")

    # --- resume --------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {name: [list(point) for point in points] for name, points in self._curves.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Testing the best checkpoint after fit brings its shorter past: this one stays.
        if not self._curves:
            self._curves = {name: list(points) for name, points in state_dict.items()}


def draw_training(curves: Curves, test_accuracy: float | None = None) -> Figure:
    """Panels for what there is: loss, accuracy, learning rate."""
    with_accuracy = "val/accuracy" in curves or test_accuracy is not None
    panels = ["loss"] if {"train/loss", "val/loss"} & set(curves) else []
    panels += ["accuracy"] if with_accuracy else []
    panels += ["learning rate"] if "train/learning_rate" in curves else []
    figure = new_figure(1200 if len(panels) < 3 else 1600, 570)
    row = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=False):
        axes.set_xlabel("training step", fontsize=9)
        axes.set_ylabel(_AXES[panel], fontsize=9)
        axes.grid(axis="y", color="#e4e7ea", linewidth=0.7)
        axes.set_axisbelow(True)
        plain_axes(axes)
        if panel == "loss":
            _line(axes, curves, "train/loss", "training", BLUE)
            _line(axes, curves, "val/loss", "validation", ORANGE, dots=True)
        elif panel == "accuracy":
            _line(axes, curves, "val/accuracy", "validation", ORANGE, True, 100)
            if test_accuracy is not None:
                name = f"simulation: test {100 * test_accuracy:.1f} %"
                axes.axhline(
                    100 * test_accuracy, color=GREEN, linestyle="--", linewidth=1.3, label=name
                )
        else:
            _line(axes, curves, "train/learning_rate", "learning rate", DARK)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        axes.set_xlim(left=0)
        if panel != "learning rate":
            axes.legend(fontsize=8, frameon=False)
    return figure


def _line(
    axes: Axes,
    curves: Curves,
    name: str,
    label: str,
    colour: str,
    dots: bool = False,
    scale: float = 1.0,
) -> None:
    points = [(step, scale * value) for step, value in curves.get(name, ()) if math.isfinite(value)]
    if points:
        steps, values = zip(*points, strict=True)
        marker = "o" if dots or len(points) == 1 else ""
        axes.plot(
            steps, values, color=colour, label=label, linewidth=1.5, marker=marker, markersize=4
        )
