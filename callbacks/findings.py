"""What the callbacks of a run have found, for those who put its results together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer

from callbacks.artifacts import Artifacts
from callbacks.confusion_matrix import ConfusionMatrix
from callbacks.proxy_quality import ProxyQuality, read_quality

_Kind = TypeVar("_Kind", bound=Callback)


def findings(trainer: Trainer, datamodule: Any) -> dict[str, Any]:
    """``quality`` and ``class_accuracy`` as ``summarise`` takes them; empty where nobody looked.

    The quality lies on disk, since it may have been measured in a process that has ended.
    """
    measures = _of(trainer, ProxyQuality) and not getattr(trainer, "fast_dev_run", False)
    tests = _of(trainer, ConfusionMatrix)
    return {
        "quality": read_quality(datamodule) if measures else {},
        "class_accuracy": tests[0].class_accuracy if tests else {},
    }


def log_model(
    trainer: Trainer, file: Path, summary: Mapping[str, Any], classes: Sequence[str]
) -> None:
    """Log the delivered model where artifacts are logged. Rank zero only."""
    for callback in _of(trainer, Artifacts):
        callback.log_model(trainer, file, summary, list(classes))


def _of(trainer: Trainer, kind: type[_Kind]) -> list[_Kind]:
    # A trainer of another process, as tests have one, may know no callbacks.
    return [one for one in getattr(trainer, "callbacks", ()) if isinstance(one, kind)]
