"""Which callbacks a run has: those that it needs, and those that are switched on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar

from callbacks.artifacts import Artifacts
from callbacks.calibration import Calibration
from callbacks.chosen_images import ChosenImages
from callbacks.communication import Communication
from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.coverage_figure import CoverageFigure
from callbacks.embedding_map import EmbeddingMap, Method
from callbacks.log_config import LogConfig
from callbacks.privacy_ledger import PrivacyLedger
from callbacks.proxy_quality import ProxyQuality
from callbacks.rejected_images import RejectedImages
from callbacks.run_timer import RunTimer
from callbacks.sampling_statistics import SamplingStatistics
from callbacks.shows_probe import ShowsProbe
from callbacks.stop_and_resume import StopAndResume
from callbacks.throughput import Throughput
from callbacks.training_curves import TrainingCurves
from callbacks.weight_averaging import WarmupWeightAveraging


def switchable(
    config: Mapping[str, Any],
    *,
    max_epsilon: float,
    map_method: Method = "pca",
    starts_from: Mapping[str, Path] | None = None,
) -> dict[str, Callable[[], Callback]]:
    """What tells of a run and changes nothing in it, by the names of the files.

    Args:
        config: Of the run, as plain data to be logged.
        max_epsilon: See `PrivacyLedger`.
        map_method: See `EmbeddingMap`.
        starts_from: See `Artifacts`.
    """
    return {
        "log_config": lambda: LogConfig(dict(config)),
        "sampling_statistics": SamplingStatistics,
        "proxy_quality": ProxyQuality,
        "coverage_figure": CoverageFigure,
        "chosen_images": ChosenImages,
        "rejected_images": RejectedImages,
        "embedding_map": lambda: EmbeddingMap(map_method),
        "privacy_ledger": lambda: PrivacyLedger(max_epsilon),
        "communication": Communication,
        "throughput": Throughput,
        "training_curves": TrainingCurves,
        "confusion_matrix": ConfusionMatrix,
        "calibration": Calibration,
        "artifacts": lambda: Artifacts(starts_from),
    }


def choose_callbacks(
    available: Mapping[str, Callable[[], Callback]],
    switches: Mapping[str, bool],
    *,
    timer: RunTimer,
    first: Sequence[Callback] = (),
    checkpoints: Path | None,
    ema_decay: float | None,
    logs: bool,
    shows_progress: bool,
) -> list[Callback]:
    """All callbacks of a run, in an order that suits them.

    Args:
        available: What can be switched: `switchable`.
        switches: Whether each of them is on.
        timer: Comes after them, so that it does not count what they draw.
        first: Ahead of them, since they see what these have done: what changes labels.
        checkpoints: Folder of the checkpoints; None on a dry run, which keeps none.
        ema_decay: Of averaged weights; None for none.
        logs: Whether there is a logger.
        shows_progress: Whether there is a progress bar.
    """
    callbacks = [*first, *(make() for name, make in available.items() if switches[name]), timer]
    if checkpoints is not None:
        callbacks.append(ModelCheckpoint(checkpoints, save_last=True, save_on_train_epoch_end=True))
    if ema_decay is not None:
        callbacks.append(WarmupWeightAveraging(ema_decay))
    if checkpoints is not None:
        callbacks.append(StopAndResume(checkpoints / "stopped.ckpt"))  # sees what the others did
    if logs:
        callbacks.append(LearningRateMonitor("step"))
    if shows_progress:
        callbacks.append(RichProgressBar(leave=True))
    return callbacks


def remember(trainer: Trainer, states: Mapping[str, Any]) -> None:
    """Tell the callbacks here what those knew that trained in other processes.

    Args:
        trainer: Which has not trained.
        states: Of the checkpoint, by key.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        tells = isinstance(callback, (RunTimer, TrainingCurves, ShowsProbe))
        if tells and callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])
