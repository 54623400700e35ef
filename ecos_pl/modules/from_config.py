"""From a config to the LightningModule of its task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from ecos_pl.compression_from_config import (
    compression_file,
    compression_model,
    compression_target,
)
from ecos_pl.compression_run import kept_plan
from ecos_pl.config import CompressionOptions, Config, DistillationOptions, SelfLabelingOptions
from ecos_pl.extras import require
from ecos_pl.modules.compression import Batch, CompressionModule
from ecos_pl.modules.distillation import DistillationModule
from ecos_pl.modules.self_labeling import Method, SelfLabelingModule
from ecos_pl.overrides import ConfigError
from ecos_pl.teacher import FrozenTeacher
from ecos_pl.warm_start import new_classifier


def module_of(
    config: Config,
    classes: Sequence[str],
    folder: Path,
    *,
    teacher: FrozenTeacher | None,
    measured_on: Callable[[int], Iterator[Batch]],
) -> SelfLabelingModule | DistillationModule | CompressionModule:
    """What is trained, as it is before training.

    Args:
        config: Of the run.
        classes: The client's, in its order.
        folder: Of the run; a compression keeps there how much it prunes.
        teacher: Whom a distilled student follows.
        measured_on: Batches of so many proxy images, which tell a compression what matters.

    Raises:
        ConfigError: Options that do not go together, or a model of other classes.
        ValueError: One line: weights that cannot be read, a target that cannot be reached.
    """
    task = config.task
    if isinstance(task, CompressionOptions):
        return _compression_module(config, task, classes, folder, measured_on)
    assert isinstance(task, (SelfLabelingOptions, DistillationOptions))
    model = new_classifier(
        classes,
        backbone=task.backbone,
        weights=task.weights,
        image_size=task.image_size,
        seed=config.seed,
    )
    if isinstance(task, DistillationOptions):
        assert teacher is not None
        return DistillationModule(
            model,
            teacher,
            temperature=task.temperature,
            distillation_weight=task.distillation_weight,
            label_weight=task.label_weight,
            feature_weight=task.feature_weight,
            learning_rate=task.learning_rate,
            weight_decay=task.weight_decay,
            compiled=task.compile,
        )
    if task.pseudo_labels_from == "average" and task.ema_decay is None:
        raise ConfigError("task.pseudo_labels_from=average needs averaged weights: task.ema_decay")
    return SelfLabelingModule(
        model,
        learning_rate=task.learning_rate,
        weight_decay=task.weight_decay,
        label_smoothing=task.label_smoothing,
        method=method_of(config),
        class_balance=task.class_balance,
        consistency_weight=task.consistency_weight,
        consistency_threshold=task.consistency_threshold,
        least_threshold=task.least_threshold,
        align=task.distribution_alignment,
        pseudo_labels_from=task.pseudo_labels_from,  # type: ignore[arg-type]  # the same names
        freeze_backbone=task.freeze_backbone,
        compiled=task.compile,
    )


def method_of(config: Config) -> Method:
    """How the labelled and the unlabelled images are learned from."""
    task = config.task
    assert isinstance(task, SelfLabelingOptions)
    if config.train_on == "client":
        if task.method not in (None, "supervised"):
            raise ConfigError(
                f"task.method={task.method} needs unlabelled images, and train_on=client has none"
            )
        return "supervised"
    default = "fixmatch" if config.labels.name == "human" else "supervised"
    return task.method or default  # type: ignore[return-value]  # the config allows the same names


def _compression_module(
    config: Config,
    task: CompressionOptions,
    classes: Sequence[str],
    folder: Path,
    measured_on: Callable[[int], Iterator[Batch]],
) -> CompressionModule:
    require("compress")
    teacher, student = (compression_model(task, key) for key in ("teacher", "weights"))
    for key, model in (("teacher", teacher), ("weights", student)):
        if list(model.classes) != list(classes):
            raise ConfigError(
                f"task.{key}: that model tells {_listed(model.classes)} apart, the client "
                f"{_listed(classes)}"
            )
    if student.image_size != teacher.image_size:
        raise ConfigError(
            f"task.weights: that model sees {student.image_size} px, the teacher "
            f"{teacher.image_size}"
        )
    files = {key: compression_file(task, key) for key in ("teacher", "weights")}
    plan = kept_plan(
        None if config.trainer.fast_dev_run else folder, student, compression_target(task), files
    )
    last = (task.num_prunings - 1) * task.epochs_between if plan.keep < 1 else -1
    if not config.trainer.fast_dev_run and -1 < config.trainer.max_epochs <= last:
        raise ConfigError(
            f"trainer.max_epochs={config.trainer.max_epochs} ends before the last pruning: write "
            f"trainer.max_epochs={last + task.epochs_between}, or a smaller task.num_prunings"
        )
    return CompressionModule(
        student,
        teacher,
        keep=plan.keep,
        num_prunings=task.num_prunings,
        epochs_between=task.epochs_between,
        measured_on=partial(measured_on, task.num_importance_images),
        temperature=task.temperature,
        label_weight=task.label_weight,
        learning_rate=task.learning_rate,
        weight_decay=task.weight_decay,
        compiled=task.compile,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
