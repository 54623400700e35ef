"""From a config to the data: scenario, teacher, datamodule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from lightning import Trainer

from datamodules.local import LocalDataModule
from datamodules.pool_spec import embeddings_of
from datamodules.proxy import ProxySamplingDataModule, TrainingView
from datamodules.public_teacher import TeacherPlan, public_teacher
from datamodules.scenario import Scenario
from datamodules.scenarios import open_scenario
from ecos_pl.client_mailbox import open_mailbox
from ecos_pl.compression_from_config import compression_model
from ecos_pl.config import (
    CompressionOptions,
    Config,
    DistillationOptions,
    FolderOptions,
    MailboxOptions,
    SelfLabelingOptions,
)
from ecos_pl.encoder import EncoderSpec
from ecos_pl.labels_from_config import labeler_of, relabeler_of
from ecos_pl.modules.from_config import method_of
from ecos_pl.overrides import ConfigError
from ecos_pl.probe import ProbePlan
from ecos_pl.teacher import FrozenTeacher, delivered_teacher, timm_teacher


def scenario_of(config: Config) -> Scenario:
    """Open the pool and the client.

    Raises:
        ValueError: One line: see `open_scenario`.
    """
    return open_scenario(config.data, config.client, cache_dir=_cache_dir(config))


def teacher_of(
    config: Config, scenario: Scenario, make_trainer: Callable[[Path], Trainer]
) -> FrozenTeacher | None:
    """Whom the student follows, trained first if need be; None for other tasks.

    Args:
        config: Of the run.
        scenario: Whose pool a public teacher learns.
        make_trainer: Trains it, in the folder that it is given.

    Raises:
        ValueError: One line: a teacher that cannot be read, or of other classes.
    """
    task = config.task
    if not isinstance(task, DistillationOptions):
        return None
    if task.teacher == "timm":
        return timm_teacher(
            task.teacher_backbone, task.teacher_weights, task.teacher_image_size, scenario.classes
        )
    if task.teacher != "public":
        return delivered_teacher(Path(task.teacher).expanduser(), scenario.classes)
    plan = TeacherPlan(
        backbone=task.teacher_backbone,
        weights=task.teacher_weights,
        image_size=task.teacher_image_size,
        num_steps=task.teacher_steps,
        batch_size=task.teacher_batch_size,
        learning_rate=task.teacher_learning_rate,
        augment=task.augment,  # type: ignore[arg-type]  # the config allows the same names
        precision=config.trainer.precision,
    )
    return public_teacher(
        scenario.pool,
        scenario.classes,
        plan,
        _cache_dir(config),
        make_trainer,
        num_workers=task.num_workers,
    )


def datamodule_of(
    config: Config, scenario: Scenario, folder: Path, teacher: FrozenTeacher | None = None
) -> ProxySamplingDataModule | LocalDataModule:
    """What training reads: the proxy set, or the client's own images with ``train_on=client``.

    Args:
        config: Of the run.
        scenario: The pool and the client.
        folder: Of the run.
        teacher: Whose answers on the images are wanted, if anyone's.

    Raises:
        ConfigError: Parts of the config do not go together.
    """
    if config.train_on == "client":
        return LocalDataModule(scenario, training_view(config), seed=config.seed, teacher=teacher)
    is_remote = isinstance(config.client, MailboxOptions)
    plan = ProbePlan(
        encoder=EncoderSpec(config.encoder.name, config.encoder.weights, config.encoder.image_size),
        num_clusters=config.probe.num_clusters,
        num_dims=config.probe.num_dims,
        num_iters=config.probe.num_iters,
        num_restarts=config.probe.num_restarts,
        strategy=config.selection.strategy,
        oracle_domain=_oracle_domain(config, scenario),
        size=config.selection.size,
        candidates_per_pick=config.selection.candidates_per_pick,
        duplicate_distance=config.selection.duplicate_distance,
        seed=config.seed,
        attempt=config.probe.attempt,
        **asdict(config.privacy),
    )
    return ProxySamplingDataModule(
        scenario,
        plan,
        labeler_of(config, scenario.classes, folder),
        training_view(config),
        relabeler=relabeler_of(config, scenario.pool, folder),
        run_root=Path(config.run_root),
        mailbox=open_mailbox(config.client) if is_remote else None,
        cache_dir=_cache_dir(config),
        given_embeddings=_given_embeddings(config),
        embed_batch_size=config.encoder.batch_size,
        embed_workers=config.encoder.num_workers,
        seed=config.seed,
        teacher=teacher,
        ask_teacher_once=not getattr(config.task, "feature_weight", 0),
    )


def training_view(config: Config) -> TrainingView:
    """How training sees the images."""
    task = config.task
    if isinstance(task, CompressionOptions):
        return _compression_view(task)
    assert isinstance(task, (SelfLabelingOptions, DistillationOptions))
    labels_itself = isinstance(task, SelfLabelingOptions) and method_of(config) != "supervised"
    return TrainingView(
        image_size=task.image_size,
        batch_size=task.batch_size,
        augment=task.augment,  # type: ignore[arg-type]  # the config allows the same names
        unlabeled_ratio=task.unlabeled_ratio if labels_itself else 0,
        val_fraction=task.val_fraction,
        num_workers=task.num_workers,
        num_views=task.num_views if isinstance(task, DistillationOptions) else None,
    )


def _compression_view(task: CompressionOptions) -> TrainingView:
    return TrainingView(
        image_size=compression_model(task, "teacher").image_size,
        batch_size=task.batch_size,
        augment=task.augment,  # type: ignore[arg-type]  # the config allows the same names
        val_fraction=task.val_fraction,
        num_workers=task.num_workers,
    )


def _given_embeddings(config: Config) -> Mapping[str, Path] | Path | None:
    """Embeddings made elsewhere: of the pool, or of pools by name in a pool file."""
    if not isinstance(config.data, FolderOptions):
        return None
    listed = embeddings_of(config.data.pool)
    if config.data.embeddings is None:
        return listed
    if listed:
        raise ConfigError(f"data.embeddings: {config.data.pool} names embeddings already")
    return Path(config.data.embeddings)


def _cache_dir(config: Config) -> Path:
    return Path(config.probe.cache_dir or Path(config.run_root) / "cache")


def _oracle_domain(config: Config, scenario: Scenario) -> str | None:
    if config.selection.strategy != "oracle":
        return None
    if scenario.client_domain is None:
        raise ConfigError(
            "selection.strategy=oracle needs the name of the client's domain in the pool: "
            "data.client_domain=NAME"
        )
    return scenario.client_domain
