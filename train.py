"""Probe a public pool for a client, train on the proxy set, report: python train.py key=value …

This is the only file that knows all parts: argv → config → objects → fit → test → summary.
Whatever is heavy is imported late, so that --help and mistakes are quick.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecos_pl.config import (
    ClientKnnOptions,
    ClientPrototypesOptions,
    ClientTableOptions,
    CompressionOptions,
    Config,
    DistillationOptions,
    FolderOptions,
    HumanLabelsOptions,
    MailboxOptions,
    NoLabelsOptions,
    PublicLabelsOptions,
    SelfLabelingOptions,
    TensorboardOptions,
    WandbOptions,
)
from ecos_pl.config_files import (
    load_config,
    to_dict,
    to_yaml,
)
from ecos_pl.config_help import help_text
from ecos_pl.labels_awaited import LabelsAwaited
from ecos_pl.overrides import (
    ConfigError,
    nearest,
    parse_command_line,
)
from ecos_pl.run_folder import newest_checkpoint, run_folder
from ecos_pl.stopping import (
    REQUESTS,
    STATUS,
    Stopped,
    is_first_process,
    is_lightnings_child,
    requeue,
    slurm_job,
)

if TYPE_CHECKING:
    import lightning as L

    from callbacks.label_rounds import LabelRounds
    from datamodules.local import LocalDataModule
    from datamodules.proxy import ProxySamplingDataModule, TrainingView
    from datamodules.scenario import Scenario
    from ecos_pl.classifier import Classifier
    from ecos_pl.labeling import Labeler, RoundPlan
    from ecos_pl.mailbox import Mailbox
    from ecos_pl.modules.self_labeling import Method
    from ecos_pl.pruning_plan import Target
    from ecos_pl.relabeling import Relabeler
    from ecos_pl.remote_mailbox import RemoteMailbox
    from ecos_pl.teacher import FrozenTeacher

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
CONFIG_DIR = HERE / "configs"


def main(argv: Sequence[str]) -> int:
    """Run from the command line.

    The exit status: 0 done, or people are to label the proxy set now; 1 another process of the run
    was lost, 2 a mistake of the user, 130 Ctrl-C, 143 stopped by SIGTERM or SIGUSR1.
    """
    with REQUESTS.heard():
        return _main(argv)


def _main(argv: Sequence[str]) -> int:
    try:
        command_line = parse_command_line(argv)
        if command_line.help:
            print(help_text(CONFIG_DIR), end="")
            return 0
        config = load_config(argv, config_dir=CONFIG_DIR)
        if command_line.print_config:
            print(to_yaml(config), end="")
            return 0
        train(config)
    except LabelsAwaited as awaited:
        if is_first_process():
            print(awaited)
    except Stopped as stop:
        return _stopped(stop)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if lost := _lost_process(error):
            if REQUESTS.by is not None:
                return _stopped(Stopped(REQUESTS.by))
            print(
                f"train.py{_which()}: {lost}; the same command goes on from here", file=sys.stderr
            )
            return 1
        if not _is_users_mistake(error):
            raise
        if is_first_process() or not isinstance(error, ConfigError):  # all processes find those
            print(f"train.py{_which()}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _stopped(stop: Stopped) -> int:
    """Say so once, and let SLURM run the job again if its signal asked for that."""
    REQUESTS.end()
    if is_first_process():
        note = ""
        if stop.by.name == "SIGUSR1" and (job := slurm_job()):
            note = f" ({requeue(job)})"
        print(
            f"stopped by {stop.by.name}; the same command goes on from here{note}", file=sys.stderr
        )
    return 0 if is_lightnings_child() else STATUS


def _which() -> str:
    """Which process speaks; nothing for the first, which usually is the only one."""
    rank = next((os.environ[name] for name in ("RANK", "LOCAL_RANK") if name in os.environ), "0")
    return "" if is_first_process() else f" [rank {rank}]"


def train(config: Config) -> dict[str, Any]:
    """Do one run and return its summary, which is also in ``summary.json``.

    Called again with the same config it reads the probe from disk and resumes the training.

    Raises:
        LabelsAwaited: With ``labels=human``, until there are labels.
    """
    start = time.perf_counter()
    import lightning as L

    from callbacks.loggers import closing

    _quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    folder = run_folder(config)
    with closing(_logger(config, folder)) as logger:
        return _train(config, folder, logger, start)


def _train(config: Config, folder: Path, logger: Any, start: float) -> dict[str, Any]:
    from callbacks.findings import findings, log_model
    from ecos_pl.environment import environment_facts
    from ecos_pl.model_file import save_model
    from ecos_pl.report import write_report
    from ecos_pl.storage import write_json
    from ecos_pl.summary import print_summary, summarise

    _check_labels(config)
    _check_selection(config)
    scenario = _scenario(config)
    teacher = _teacher(config, scenario)
    datamodule = _datamodule(config, scenario, folder, teacher)
    module = _module(config, scenario, folder, datamodule, teacher)
    rounds = _label_rounds(config, folder)
    trainer, timer = _trainer(config, folder, logger, [rounds] if rounds else [])
    if isinstance(config.task, CompressionOptions):
        if trainer.world_size > 1:
            raise ConfigError("task=compression trains on one device: add trainer.devices=1")
        if rounds:
            raise ConfigError("labels.rounds: task=compression prunes the backbone; leave them out")
    metrics = []
    with _children_end_too(trainer):
        _probe_here_if_workers_cannot_tell(trainer, datamodule)
        trainer.fit(module, datamodule, ckpt_path=newest_checkpoint(folder), weights_only=True)
        if not config.trainer.fast_dev_run:
            module = _delivered(config, scenario, folder, datamodule, teacher, timer, trainer)
            if rounds:
                rounds.catch_up(datamodule)
        if scenario.client_test is not None:
            metrics = trainer.test(module, datamodule, verbose=False)
    summary = summarise(
        run_id=folder.name,
        seed=config.seed,
        probe=datamodule.probe_result,
        rounds=datamodule.rounds,
        simulation={
            **datamodule.simulation,
            "test_accuracy": metrics[0].get("simulation/test_accuracy") if metrics else None,
        },
        seconds={
            "probe": getattr(datamodule, "probe_seconds", 0.0),
            "fit": timer.fit_seconds,
            "test": timer.test_seconds,
            "per_step": timer.seconds_per_step,
            "total": time.perf_counter() - start,
        },
        pool=scenario.pool,
        client=datamodule.client_facts,
        environment=environment_facts(trainer.strategy.root_device, trainer.world_size),
        **findings(trainer, datamodule),
        **_sizes(module, teacher, scenario, trainer),
    )
    if isinstance(config.task, CompressionOptions):
        summary["compression"] = _compressed(config, config.task, folder, module, datamodule)
        if not config.trainer.fast_dev_run:
            _write_card(config, config.task, scenario, folder, summary)
    if trainer.is_global_zero and not config.trainer.fast_dev_run:
        save_model(folder / "model.safetensors", module.model)  # for `ecos-client evaluate`
        write_json(folder / "summary.json", summary)
        if datamodule.probe_result is not None:
            datamodule.probe_result.proxy_set.save(folder)
        if _deliver(config, folder, summary):
            write_json(folder / "summary.json", summary)
        log_model(trainer, folder / "model.safetensors", summary, scenario.classes)
        if config.callbacks.report:
            write_report(folder)
    if trainer.is_global_zero:
        print_summary(summary, folder)
    return summary


# --- config → objects ----------------------------------------------------------------------------


def _scenario(config: Config) -> Scenario:
    from datamodules.scenarios import open_scenario

    return open_scenario(config.data, config.client, cache_dir=_cache_dir(config))


def _given_embeddings(config: Config) -> Mapping[str, Path] | Path | None:
    """Embeddings made elsewhere: of the pool, or of pools by name in a pool file."""
    if not isinstance(config.data, FolderOptions):
        return None
    from datamodules.pool_spec import embeddings_of

    listed = embeddings_of(config.data.pool)
    if config.data.embeddings is None:
        return listed
    if listed:
        raise ConfigError(f"data.embeddings: {config.data.pool} names embeddings already")
    return Path(config.data.embeddings)


def _cache_dir(config: Config) -> Path:
    return Path(config.probe.cache_dir or Path(config.run_root) / "cache")


def _view(config: Config) -> TrainingView:
    from datamodules.proxy import TrainingView

    task = config.task
    if isinstance(task, CompressionOptions):
        return _compression_view(task)
    assert isinstance(task, (SelfLabelingOptions, DistillationOptions))
    labels_itself = isinstance(task, SelfLabelingOptions) and _method(config) != "supervised"
    return TrainingView(
        image_size=task.image_size,
        batch_size=task.batch_size,
        augment=task.augment,  # type: ignore[arg-type]  # the config allows the same names
        unlabeled_ratio=task.unlabeled_ratio if labels_itself else 0,
        val_fraction=task.val_fraction,
        num_workers=task.num_workers,
        num_views=task.num_views if isinstance(task, DistillationOptions) else None,
    )


def _labeler(config: Config, scenario: Scenario, folder: Path) -> Labeler:
    from ecos_pl.labeling import NoLabels, PublicLabeler
    from ecos_pl.prototype_labeler import PrototypeLabeler
    from ecos_pl.table_labeler import TableLabeler
    from ecos_pl.vote_labeler import VoteLabeler

    if isinstance(config.labels, ClientPrototypesOptions):
        return PrototypeLabeler(
            scenario.classes,
            num_dims=config.labels.num_dims,
            num_views=config.labels.num_views,
            noise_multiplier=config.labels.noise_multiplier,
            features=config.labels.features,
            rounds=_rounds(config, folder),
        )
    if isinstance(config.labels, ClientTableOptions):
        return TableLabeler(
            scenario.classes,
            num_clusters=config.labels.num_clusters,
            num_dims=config.labels.num_dims,
            num_views=config.labels.num_views,
            noise_std=config.labels.noise_std,
            features=config.labels.features,
        )
    if isinstance(config.labels, ClientKnnOptions):
        return VoteLabeler(
            scenario.classes,
            num_queries=config.labels.num_queries,
            max_answers=config.labels.max_answers,
            num_neighbors=config.labels.num_neighbors,
            num_dims=config.labels.num_dims,
            num_views=config.labels.num_views,
            features=config.labels.features,
        )
    if isinstance(config.labels, (HumanLabelsOptions, NoLabelsOptions)):
        return NoLabels(scenario.classes, name=config.labels.name)
    assert isinstance(config.labels, PublicLabelsOptions)
    return PublicLabeler(scenario.classes)


def _relabeler(config: Config, scenario: Scenario, folder: Path) -> Relabeler | None:
    """What lays labels over the proxy set after the probe."""
    from ecos_pl.annotation_job import JobTerms
    from ecos_pl.outsourced_labels import OutsourcedLabels
    from ecos_pl.relabeling import FirstLabels

    labels = config.labels
    if isinstance(labels, PublicLabelsOptions) and labels.num_images is not None:
        return FirstLabels(labels.num_images, seed=config.seed)
    if not isinstance(labels, HumanLabelsOptions):
        return None
    return OutsourcedLabels(
        scenario.pool,
        folder,
        JobTerms(
            labels.num_images,
            labels.batch_size,
            labels.annotators,
            labels.price_per_label,
            labels.image_size,
        ),
        seed=config.seed,
        returned=Path(labels.returned) if labels.returned else None,
        training_began=newest_checkpoint(folder) is not None,
        is_trial=config.trainer.fast_dev_run,
    )


def _rounds(config: Config, folder: Path) -> RoundPlan | None:
    """Further rounds of labels; the run's name makes them its own."""
    from ecos_pl.labeling import RoundPlan

    options, task = config.labels, config.task
    assert isinstance(options, ClientPrototypesOptions)
    if not options.rounds:
        return None
    if not isinstance(task, SelfLabelingOptions):
        raise ConfigError("labels.rounds goes with task=self_labeling on the proxy set")
    if task.backbone != config.encoder.name:
        raise ConfigError(
            f"labels.rounds: the client trusts the architecture of encoder.name="
            f"{config.encoder.name} alone, so task.backbone must be it, not {task.backbone}"
        )
    if 0 <= config.trainer.max_epochs <= options.rounds[-1]:
        raise ConfigError(
            f"labels.rounds={options.rounds} is not over before the training is "
            f"(trainer.max_epochs={config.trainer.max_epochs})"
        )
    return RoundPlan(
        tuple(options.rounds), options.round_num_dims, options.round_features, run=folder.name
    )


def _check_labels(config: Config) -> None:
    """Say what the labels are good for where that may surprise."""
    if config.train_on == "client":
        return
    none, task = isinstance(config.labels, NoLabelsOptions), config.task
    if not isinstance(task, DistillationOptions):
        if none:
            raise ConfigError(
                f"labels=none leaves task={task.name} nothing to learn: choose other labels, or "
                "task=distillation"
            )
    elif none and task.label_weight and is_first_process():
        log.warning("task.label_weight=%g adds nothing with labels=none", task.label_weight)
    elif not task.label_weight and config.labels.name.startswith("client") and is_first_process():
        log.warning(
            "labels=%s spends privacy on labels that task.label_weight=0 does not use; labels=none "
            "asks for none",
            config.labels.name,
        )


def _check_selection(config: Config) -> None:
    """Refuse to read a real client's images, and say so where a simulated one's are read."""
    from ecos_pl.selection import NOT_PRIVATE

    strategy = config.selection.strategy
    if config.train_on == "client" or strategy not in NOT_PRIVATE:
        return
    if isinstance(config.client, MailboxOptions):
        raise ConfigError(
            f"selection.strategy={strategy} is not private: it reads the client's images, which a "
            "client behind a mailbox never shows; it is for client=simulated"
        )
    if is_first_process():
        log.warning("not private: selection.strategy=%s reads the client's images", strategy)


def _teacher(config: Config, scenario: Scenario) -> FrozenTeacher | None:
    """Whom the student follows, trained first if need be; None for other methods."""
    task = config.task
    if not isinstance(task, DistillationOptions):
        return None
    from ecos_pl.teacher import delivered_teacher, timm_teacher

    if task.teacher == "timm":
        return timm_teacher(
            task.teacher_backbone, task.teacher_weights, task.teacher_image_size, scenario.classes
        )
    if task.teacher != "public":
        return delivered_teacher(Path(task.teacher).expanduser(), scenario.classes)
    from datamodules.public_teacher import TeacherPlan, public_teacher

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
        lambda folder: _teacher_trainer(config, task, folder),
        num_workers=task.num_workers,
    )


def _datamodule(
    config: Config, scenario: Scenario, folder: Path, teacher: FrozenTeacher | None = None
) -> ProxySamplingDataModule | LocalDataModule:
    from datamodules.local import LocalDataModule
    from datamodules.proxy import ProxySamplingDataModule
    from ecos_pl.encoder import EncoderSpec
    from ecos_pl.probe import ProbePlan

    if config.train_on == "client":
        return LocalDataModule(scenario, _view(config), seed=config.seed, teacher=teacher)
    plan = ProbePlan(
        encoder=EncoderSpec(config.encoder.name, config.encoder.weights, config.encoder.image_size),
        num_clusters=config.probe.num_clusters,
        num_dims=config.probe.num_dims,
        num_iters=config.probe.num_iters,
        num_restarts=config.probe.num_restarts,
        strategy=config.selection.strategy,
        oracle_domain=_oracle_domain(config, scenario),
        size=config.selection.size,
        duplicate_distance=config.selection.duplicate_distance,
        seed=config.seed,
        attempt=config.probe.attempt,
        **asdict(config.privacy),
    )
    return ProxySamplingDataModule(
        scenario,
        plan,
        _labeler(config, scenario, folder),
        _view(config),
        relabeler=_relabeler(config, scenario, folder),
        run_root=Path(config.run_root),
        mailbox=_mailbox(config),
        cache_dir=_cache_dir(config),
        given_embeddings=_given_embeddings(config),
        embed_batch_size=config.encoder.batch_size,
        embed_workers=config.encoder.num_workers,
        seed=config.seed,
        teacher=teacher,
        ask_teacher_once=not getattr(config.task, "feature_weight", 0),
    )


def _oracle_domain(config: Config, scenario: Scenario) -> str | None:
    if config.selection.strategy != "oracle":
        return None
    if scenario.client_domain is None:
        raise ConfigError(
            "selection.strategy=oracle needs the name of the client's domain in the pool: "
            "data.client_domain=NAME"
        )
    return scenario.client_domain


def _mailbox(config: Config) -> Mailbox | None:
    return _remote_mailbox(config.client) if isinstance(config.client, MailboxOptions) else None


def _remote_mailbox(options: MailboxOptions) -> RemoteMailbox:
    from ecos_pl.envelope import read_key_file
    from ecos_pl.remote_mailbox import RemoteMailbox

    return RemoteMailbox(
        options.url,
        sender=options.sender,
        key=read_key_file(Path(options.key_file)) if options.key_file else None,
        deadline_s=3600 * options.deadline_hours if options.deadline_hours else None,
        poll_s=min(2.0, options.poll_seconds),
        max_poll_s=options.poll_seconds,
    )


def _module(
    config: Config,
    scenario: Scenario,
    folder: Path,
    datamodule: Any,
    teacher: FrozenTeacher | None = None,
) -> L.LightningModule:
    from ecos_pl.modules.distillation import DistillationModule
    from ecos_pl.modules.self_labeling import SelfLabelingModule
    from ecos_pl.warm_start import new_classifier

    task = config.task
    if isinstance(task, CompressionOptions):
        return _compression_module(config, task, scenario, folder, datamodule)
    assert isinstance(task, (SelfLabelingOptions, DistillationOptions))
    model = new_classifier(
        scenario.classes,
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
        method=_method(config),
        class_balance=task.class_balance,
        consistency_weight=task.consistency_weight,
        consistency_threshold=task.consistency_threshold,
        least_threshold=task.least_threshold,
        align=task.distribution_alignment,
        pseudo_labels_from=task.pseudo_labels_from,  # type: ignore[arg-type]  # the same names
        freeze_backbone=task.freeze_backbone,
        compiled=task.compile,
    )


def _method(config: Config) -> Method:
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


def _teacher_trainer(config: Config, task: DistillationOptions, folder: Path) -> L.Trainer:
    """One device trains the teacher, whatever launched this process."""
    import lightning as L
    from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
    from lightning.pytorch.plugins.environments import LightningEnvironment

    from callbacks.stop_and_resume import StopAndResume

    callbacks: list[L.Callback] = []
    if not config.trainer.fast_dev_run:
        checkpoints = folder / "checkpoints"
        callbacks.append(ModelCheckpoint(checkpoints, save_last=True, save_on_train_epoch_end=True))
        callbacks.append(StopAndResume(checkpoints / "stopped.ckpt"))
    progress = config.trainer.enable_progress_bar and sys.stdout.isatty()
    if progress:
        callbacks.append(RichProgressBar(leave=True))
    return L.Trainer(
        accelerator=config.trainer.accelerator,
        devices=1,
        plugins=[LightningEnvironment()],
        precision=config.trainer.precision,  # type: ignore[arg-type]
        deterministic=config.trainer.deterministic,
        max_epochs=-1,
        max_steps=task.teacher_steps,
        fast_dev_run=config.trainer.fast_dev_run,
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=not config.trainer.fast_dev_run,
        enable_progress_bar=progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


# --- task=compression ----------------------------------------------------------------------------


def _compression_view(task: CompressionOptions) -> TrainingView:
    from datamodules.proxy import TrainingView

    return TrainingView(
        image_size=_compression_model(task, "teacher").image_size,
        batch_size=task.batch_size,
        augment=task.augment,  # type: ignore[arg-type]  # the config allows the same names
        val_fraction=task.val_fraction,
        num_workers=task.num_workers,
    )


def _compression_model(task: CompressionOptions, key: str) -> Classifier:
    """The ``teacher``, or what training starts from: the ``weights``."""
    from ecos_pl.model_file import load_model

    try:
        return load_model(_compression_file(task, key))
    except ValueError as error:
        raise ConfigError(f"task.{key}: {error}") from error


def _compression_file(task: CompressionOptions, key: str) -> Path:
    file = task.weights if key == "weights" and task.weights else task.teacher
    return Path(file).expanduser()


def _compression_module(
    config: Config, task: CompressionOptions, scenario: Scenario, folder: Path, datamodule: Any
) -> L.LightningModule:
    from datamodules.plain_images import plain_batches
    from ecos_pl.compression_run import kept_plan
    from ecos_pl.extras import require
    from ecos_pl.modules.compression import CompressionModule

    require("compress")
    teacher, student = (_compression_model(task, key) for key in ("teacher", "weights"))
    for key, model in (("teacher", teacher), ("weights", student)):
        if list(model.classes) != list(scenario.classes):
            raise ConfigError(
                f"task.{key}: that model tells {_listed(model.classes)} apart, the client "
                f"{_listed(scenario.classes)}"
            )
    if student.image_size != teacher.image_size:
        raise ConfigError(
            f"task.weights: that model sees {student.image_size} px, the teacher "
            f"{teacher.image_size}"
        )
    files = {key: _compression_file(task, key) for key in ("teacher", "weights")}
    plan = kept_plan(
        None if config.trainer.fast_dev_run else folder, student, _compression_target(task), files
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
        measured_on=partial(
            plain_batches, datamodule, task.num_importance_images, seed=config.seed
        ),
        temperature=task.temperature,
        label_weight=task.label_weight,
        learning_rate=task.learning_rate,
        weight_decay=task.weight_decay,
        compiled=task.compile,
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _compression_target(task: CompressionOptions) -> Target:
    from ecos_pl.pruning_plan import Target

    given = {name: value for name, value in asdict(task.target).items() if value is not None}
    if len(given) > 1:
        keys = " and ".join(f"task.target.{name}" for name in given)
        raise ConfigError(f"{keys} are two targets: give one of them")
    return Target(*next(iter(given.items()), ("sparsity", 0.75)))


def _compressed(
    config: Config, task: CompressionOptions, folder: Path, module: Any, datamodule: Any
) -> dict[str, Any]:
    """Write the compressed model's files, unless they are there; on a dry run, forget them."""
    from datamodules.plain_images import calibration_images
    from ecos_pl.compression_run import Calibration, compressed

    if module.num_pruned < module.num_prunings:
        raise ConfigError(
            f"training ended after {module.num_pruned} of {module.num_prunings} prunings, short of "
            "task.target; its checkpoint stays: allow more steps, or fewer task.num_prunings"
        )
    return compressed(
        None if config.trainer.fast_dev_run else folder,
        module.model,
        module.teacher,
        before=_compression_model(task, "weights"),
        target=_compression_target(task),
        how=Calibration(task.calibration, task.num_calibration_images, task.tolerance),
        images=partial(calibration_images, datamodule, seed=config.seed),
        test_batches=datamodule.test_dataloader,
    )


def _write_card(
    config: Config,
    task: CompressionOptions,
    scenario: Scenario,
    folder: Path,
    summary: dict[str, Any],
) -> None:
    from ecos_pl.model_card import card_text
    from ecos_pl.storage import write_bytes

    text = card_text(
        summary,
        teacher="/".join(Path(task.teacher).parts[-2:]),  # the card may travel: no path of here
        target=f"task.target.{_compression_target(task)}",
        strategy=config.selection.strategy,
        classes=scenario.classes,
    )
    write_bytes(folder / "CARD.md", text.encode())


def _label_rounds(config: Config, folder: Path) -> LabelRounds | None:
    from callbacks.label_rounds import LabelRounds

    options = config.labels
    if not isinstance(options, ClientPrototypesOptions) or not options.rounds:
        return None
    if config.train_on == "client":
        raise ConfigError("labels.rounds goes with task=self_labeling on the proxy set")
    return LabelRounds(options.rounds, folder / "rounds")


def _trainer(
    config: Config, folder: Path, logger: Any, more: Sequence[L.Callback] = ()
) -> tuple[L.Trainer, Any]:
    import lightning as L
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    from callbacks.choose import choose_callbacks, switchable
    from callbacks.run_timer import RunTimer

    options = asdict(config.trainer)
    options["enable_progress_bar"] &= sys.stdout.isatty()
    timeout_minutes = options.pop("timeout_minutes")
    switches = asdict(config.callbacks)
    ema_decay, timer = getattr(config.task, "ema_decay", None), RunTimer()
    callbacks = choose_callbacks(
        switchable(
            _shown(config),
            max_epsilon=config.privacy.max_epsilon,
            map_method=switches.pop("map_method"),
            starts_from=_models_to_start_from(config),
        ),
        switches,
        first=more,
        timer=timer,
        checkpoints=None if config.trainer.fast_dev_run else folder / "checkpoints",
        ema_decay=ema_decay,
        logs=bool(logger),
        shows_progress=options["enable_progress_bar"],
    )
    averages, rounds = ema_decay is not None, getattr(config.labels, "rounds", [])
    _check_strategy(config.trainer.strategy, averages, rounds)
    try:
        trainer = L.Trainer(
            default_root_dir=folder,
            logger=logger,
            callbacks=callbacks,
            enable_model_summary=False,
            use_distributed_sampler=False,  # datamodules/loaders.py gives every device its share
            **options,
        )
    except (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error
    if config.trainer.sync_batchnorm and trainer.strategy.root_device.type != "cuda":
        raise ConfigError(
            "trainer.sync_batchnorm=true needs GPUs; this run is on "
            f"{trainer.strategy.root_device.type}"
        )
    if timeout_minutes is not None and hasattr(trainer.strategy, "_timeout"):
        # Every strategy of several processes keeps it there; `strategy=auto` offers no other way.
        trainer.strategy._timeout = timedelta(minutes=timeout_minutes)
    return trainer, timer


def _check_strategy(name: str, averages: bool, rounds: Sequence[int]) -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    there = [one for one in StrategyRegistry.available_strategies() if not _is_for_tpus(one)]
    if name not in (valid := ["auto", *there]):
        listed = "auto, ddp, ddp_spawn, ddp_find_unused_parameters_true, fsdp, …"
        raise ConfigError(
            f"trainer.strategy={name} is no strategy{nearest(name, valid)} (there are: {listed})"
        )
    shares = name.startswith(("fsdp", "deepspeed"))
    if shares and rounds:
        raise ConfigError(
            f"trainer.strategy={name} shares the weights out, so that no process can hand over the "
            "backbone: leave out labels.rounds"
        )
    if shares and averages:
        raise ConfigError(
            f"trainer.strategy={name} shares the weights out, so that no process can average them: "
            "add task.ema_decay=null"
        )


def _is_for_tpus(strategy: str) -> bool:
    return "xla" in strategy or "tpu" in strategy


def _shown(config: Config) -> dict[str, Any]:
    """The config for a logger: a mailbox's address without the password it may hold."""
    shown = to_dict(config)
    if isinstance(config.client, MailboxOptions):
        from ecos_pl.printable_url import printable_url

        shown["client"]["url"] = printable_url(config.client.url)
    return shown


def _models_to_start_from(config: Config) -> dict[str, Path]:
    """Files of models that training starts from or follows, by option."""
    given = {key: getattr(config.task, key, None) for key in ("teacher", "weights")}
    files = {f"task.{key}": Path(name).expanduser() for key, name in given.items() if name}
    return {key: file for key, file in files.items() if file.is_file()}


def _logger(config: Config, folder: Path) -> Any:
    if config.trainer.fast_dev_run or config.logger.name == "none":
        return False
    from callbacks import loggers

    if isinstance(config.logger, WandbOptions):
        options = asdict(config.logger)
        options.pop("name")
        return loggers.wandb_logger(folder, job_type=config.task.name, **options)
    if isinstance(config.logger, TensorboardOptions):
        return loggers.tensorboard_logger(folder)
    return loggers.csv_logger(folder)


def _sizes(
    module: Any, teacher: FrozenTeacher | None, scenario: Scenario, trainer: L.Trainer
) -> dict[str, Any]:
    """For the summary: what is delivered, and the teacher beside it."""
    if not trainer.is_global_zero or getattr(trainer, "fast_dev_run", False):
        return {}
    from datamodules.loaders import image_loader
    from datamodules.proxy import client_images
    from ecos_pl.evaluation import accuracy
    from ecos_pl.model_size import size_facts

    device = trainer.strategy.root_device
    sizes: dict[str, Any] = {"model": size_facts(module.model, device)}
    if teacher is not None:
        sizes["teacher"] = size_facts(teacher.model, device)
        if scenario.client_test is not None:
            images = client_images(scenario, "test", teacher.image_size)
            loader = image_loader(images, 64, num_workers=0, train=False, seed=0)
            sizes["teacher"]["test_accuracy"] = accuracy(teacher.model, loader)
    return sizes


# --- several processes ---------------------------------------------------------------------------


@contextlib.contextmanager
def _children_end_too(trainer: L.Trainer) -> Iterator[None]:
    """End the processes that Lightning started when this one ends early."""
    try:
        yield
    except Stopped:
        _end_children(trainer)
        raise
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None


def _end_children(trainer: L.Trainer, wait_s: float = 120) -> None:
    launcher = trainer.strategy.launcher
    if launcher is None:
        return
    launcher.kill(signal.SIGTERM)
    for process in getattr(launcher, "procs", ()):
        try:
            process.wait(wait_s) if hasattr(process, "wait") else process.join(wait_s)
        except subprocess.TimeoutExpired:
            process.kill()


def _probe_here_if_workers_cannot_tell(trainer: L.Trainer, datamodule: Any) -> None:
    """With ``ddp_spawn`` and its like, probe before there are workers: they return no results."""
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        if launcher._start_method == "spawn":  # others must not touch a GPU before they fork
            datamodule.trainer = trainer
        datamodule.prepare_data()
        datamodule.setup("fit")


def _lost_process(error: Exception) -> str:
    """One line if the error is that another process of this run has gone; else nothing."""
    from ecos_pl.ranks import RankError

    if isinstance(error, RankError):
        return str(error)
    if "torch" not in sys.modules:
        return ""
    from torch.multiprocessing.spawn import ProcessExitedException

    if isinstance(error, ProcessExitedException):
        if error.exit_code == STATUS and REQUESTS.by is None:
            REQUESTS.by = signal.SIGTERM  # a worker got it alone
        return " ".join(str(error).split())
    gone = r"closed by peer|reset by peer|Broken pipe|Socket closed|remote process exited"
    if isinstance(error, RuntimeError) and re.search(gone, str(error)):
        return "another process of this run has ended"
    return ""


# --- what is delivered ---------------------------------------------------------------------------


def _delivered(
    config: Config,
    scenario: Scenario,
    folder: Path,
    datamodule: Any,
    teacher: FrozenTeacher | None,
    timer: Any,
    trainer: L.Trainer,
) -> L.LightningModule:
    """A new module with the weights of the last checkpoint, averaged ones where there are any.

    Tested is what is delivered. Not the trained module itself, whose weights may be spread over
    devices or in other processes; nor ``trainer.test(ckpt_path=…)``: after a fit, Lightning's
    weight averaging would give back the weights of the last step instead.
    """
    import torch

    module = _module(config, scenario, folder, datamodule, teacher)
    if (last := newest_checkpoint(folder)) is not None:
        checkpoint = torch.load(last, map_location="cpu", weights_only=True)
        module.on_load_checkpoint(checkpoint)  # what was pruned has other shapes
        module.load_state_dict(checkpoint["state_dict"])
        if not timer.fit_seconds:  # the fit was in processes that have ended, or in an earlier call
            from callbacks.choose import remember

            remember(trainer, checkpoint["callbacks"])
    return module


def _deliver(config: Config, folder: Path, summary: dict[str, Any]) -> bool:
    """Leave files of the run in the client's mailbox, each once; whether there was any to leave."""
    options = config.client
    if not isinstance(options, MailboxOptions) or not options.deliver:
        return False
    from ecos_pl.envelope import MessageError
    from ecos_pl.message_store import MailboxError
    from ecos_pl.summary import add_delivery

    mailbox, files = _remote_mailbox(options), ["model.safetensors"]
    if isinstance(config.task, CompressionOptions):
        files.append("model.int8.onnx")
    for file in files:
        try:
            content = (folder / file).read_bytes()
            num_bytes = mailbox.deliver(content, file=file, run_id=folder.name)
        except MessageError as error:  # another try would not help; the run itself is whole
            logging.getLogger(__name__).warning("%s stays in %s: %s", file, folder, error)
            continue
        except MailboxError as error:
            raise MailboxError(
                f"{error}; the run is whole in {folder}, and the same command delivers it"
            ) from error
        add_delivery(summary, file, num_bytes)
    return True


# --- what the terminal shows ---------------------------------------------------------------------


def _quiet() -> None:
    """Keep the terminal for what concerns the user."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).propagate = False  # it has a handler of its own
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches.*is smaller than the logging interval.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # some may be off now
        ".*using the WeightAveraging callback, but loading.*outside the 'fit' stage.*",
        ".*You defined a `validation_step` but have no `val_dataloader`.*",  # of a teacher
        ".*srun.*command is available.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ".*module\\(s\\) in eval mode at the start of training.*",  # frozen ones are
        ".*ended before the epoch ended and your dataloader is not resumable.*",  # ours is
    ):
        warnings.filterwarnings("ignore", message)


def _is_users_mistake(error: Exception) -> bool:
    """Our own code raises ValueError for mistakes of users; from anywhere else it is a bug."""
    from ecos_pl.ledger import LedgerError

    if isinstance(error, (ConfigError, LedgerError)):
        return True
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, about trainer options
        return True
    if not isinstance(error, (ValueError, FileNotFoundError)):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    file = Path(frame.f_code.co_filename).resolve()
    ours = (HERE / "ecos_pl", HERE / "datamodules", HERE / "callbacks", HERE / "train.py")
    return any(file.is_relative_to(place) for place in ours)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
