"""Probe a public pool for a client, train on the proxy set, report: python train.py key=value …

This is the only file that knows all parts: argv → config → objects → fit → test → summary.
Whatever is heavy is imported late, so that --help and mistakes are quick.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecos_pl.config import (
    ClientKnnOptions,
    ClientPrototypesOptions,
    ClientTableOptions,
    Config,
    ConfigError,
    FolderOptions,
    MailboxOptions,
    PublicLabelsOptions,
    SelfLabelingOptions,
    WandbOptions,
    load_config,
    parse_command_line,
    to_dict,
    to_yaml,
)
from ecos_pl.config_help import help_text

if TYPE_CHECKING:
    import lightning as L

    from datamodules.local import LocalDataModule
    from datamodules.proxy import ProxySamplingDataModule, TrainingView
    from datamodules.scenario import Scenario
    from ecos_pl.labeling import Labeler
    from ecos_pl.mailbox import Mailbox

HERE = Path(__file__).resolve().parent
CONFIG_DIR = HERE / "configs"


def main(argv: Sequence[str]) -> int:
    """Run from the command line; the exit status: 0 done, 2 a mistake of the user, 130 Ctrl-C."""
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
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_users_mistake(error):
            raise
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


def train(config: Config) -> dict[str, Any]:
    """Do one run and return its summary, which is also in ``summary.json``.

    Called again with the same config it reads the probe from disk and resumes the training.
    """
    start = time.perf_counter()
    import lightning as L

    from ecos_pl.storage import write_json
    from ecos_pl.summary import print_summary, summarise

    _quiet()
    L.seed_everything(config.seed, workers=True, verbose=False)
    folder = _run_folder(config)
    scenario = _scenario(config)
    datamodule = _datamodule(config, scenario)
    module = _module(config, scenario)
    trainer, timer = _trainer(config, folder)
    try:
        trainer.fit(module, datamodule, ckpt_path=_checkpoint(folder), weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None
    if not config.trainer.fast_dev_run:
        _take_averaged_weights(module, folder)
    metrics = []
    if scenario.client_test is not None:
        metrics = trainer.test(module, datamodule, verbose=False)
    summary = summarise(
        run_id=folder.name,
        seed=config.seed,
        probe=datamodule.probe_result,
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
    )
    if trainer.is_global_zero and not config.trainer.fast_dev_run:
        _save_model(module, config, folder)
        write_json(folder / "summary.json", summary)
        if datamodule.probe_result is not None:
            datamodule.probe_result.proxy_set.save(folder)
    if trainer.is_global_zero:
        print_summary(summary, folder)
    return summary


# --- config → objects ----------------------------------------------------------------------------


def _scenario(config: Config) -> Scenario:
    if isinstance(config.data, FolderOptions):
        from datamodules.folder import folder_data, remote_client_data

        pool, domain = Path(config.data.pool), config.data.client_domain
        if isinstance(config.client, MailboxOptions):
            return remote_client_data(pool, config.data.classes, domain)
        if config.data.client is None:
            raise ConfigError("no value for data.client: write data.client=CLIENT")
        if config.data.classes:
            raise ConfigError("data.classes: the class folders of data.client name the classes")
        return folder_data(pool, Path(config.data.client), domain)
    from datamodules.mixed_digits import mixed_digits

    return mixed_digits()


def _view(config: Config) -> TrainingView:
    from datamodules.proxy import TrainingView, default_workers

    task = config.task
    assert isinstance(task, SelfLabelingOptions)
    return TrainingView(
        image_size=task.image_size,
        batch_size=task.batch_size,
        augment=task.augment,  # type: ignore[arg-type]  # the config allows the same names
        unlabeled_ratio=task.unlabeled_ratio if task.consistency_weight else 0,
        val_fraction=task.val_fraction,
        num_workers=default_workers(task.num_workers),
    )


def _labeler(config: Config, scenario: Scenario) -> Labeler:
    from ecos_pl.labeling import PublicLabeler
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
    assert isinstance(config.labels, PublicLabelsOptions)
    return PublicLabeler(scenario.classes)


def _datamodule(config: Config, scenario: Scenario) -> ProxySamplingDataModule | LocalDataModule:
    from datamodules.local import LocalDataModule
    from datamodules.proxy import ProxySamplingDataModule
    from ecos_pl.encoder import EncoderSpec
    from ecos_pl.probe import ProbePlan

    if config.train_on == "client":
        return LocalDataModule(scenario, _view(config), seed=config.seed)
    plan = ProbePlan(
        encoder=EncoderSpec(config.encoder.name, config.encoder.weights, config.encoder.image_size),
        num_clusters=config.probe.num_clusters,
        num_dims=config.probe.num_dims,
        num_iters=config.probe.num_iters,
        strategy=config.selection.strategy,
        size=config.selection.size,
        seed=config.seed,
        attempt=config.probe.attempt,
        **asdict(config.privacy),
    )
    cache_dir = config.probe.cache_dir
    return ProxySamplingDataModule(
        scenario,
        plan,
        _labeler(config, scenario),
        _view(config),
        run_root=Path(config.run_root),
        mailbox=_mailbox(config),
        cache_dir=Path(cache_dir) if cache_dir else None,
        embed_batch_size=config.encoder.batch_size,
        embed_workers=config.encoder.num_workers,
        seed=config.seed,
    )


def _mailbox(config: Config) -> Mailbox | None:
    options = config.client
    if not isinstance(options, MailboxOptions):
        return None
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


def _module(config: Config, scenario: Scenario) -> L.LightningModule:
    from ecos_pl.modules.self_labeling import SelfLabelingModule

    task = config.task
    assert isinstance(task, SelfLabelingOptions)
    return SelfLabelingModule(
        scenario.classes,
        backbone=task.backbone,
        weights=task.weights,
        image_size=task.image_size,
        learning_rate=task.learning_rate,
        weight_decay=task.weight_decay,
        label_smoothing=task.label_smoothing,
        consistency_weight=task.consistency_weight,
        consistency_threshold=task.consistency_threshold,
        seed=config.seed,
    )


def _trainer(config: Config, folder: Path) -> tuple[L.Trainer, Any]:
    import lightning as L
    from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichProgressBar

    from callbacks.chosen_images import ChosenImages
    from callbacks.coverage_figure import CoverageFigure
    from callbacks.log_config import LogConfig
    from callbacks.run_timer import RunTimer
    from callbacks.sampling_statistics import SamplingStatistics
    from callbacks.training_curves import TrainingCurves
    from callbacks.weight_averaging import WarmupWeightAveraging

    options = asdict(config.trainer)
    timer = RunTimer()
    callbacks: list[L.Callback] = [
        timer,
        LogConfig(_shown(config)),
        SamplingStatistics(),
        CoverageFigure(),
        ChosenImages(),
        TrainingCurves(),
    ]
    if not config.trainer.fast_dev_run:
        callbacks.append(ModelCheckpoint(folder / "checkpoints", save_last=True))
    if isinstance(config.task, SelfLabelingOptions) and config.task.ema_decay is not None:
        callbacks.append(WarmupWeightAveraging(config.task.ema_decay))
    logger = _logger(config, folder)
    if logger:
        callbacks.append(LearningRateMonitor("step"))
    options["enable_progress_bar"] &= sys.stdout.isatty()
    if options["enable_progress_bar"]:
        callbacks.append(RichProgressBar(leave=True))
    trainer = L.Trainer(
        default_root_dir=folder,
        logger=logger,
        callbacks=callbacks,
        enable_model_summary=False,
        **options,
    )
    return trainer, timer


def _shown(config: Config) -> dict[str, Any]:
    """The config for a logger: a mailbox's address without the password it may hold."""
    shown = to_dict(config)
    if isinstance(config.client, MailboxOptions):
        from ecos_pl.printable_url import printable_url

        shown["client"]["url"] = printable_url(config.client.url)
    return shown


def _logger(config: Config, folder: Path) -> Any:
    name = config.logger.name
    if config.trainer.fast_dev_run or name == "none":
        return False
    if isinstance(config.logger, WandbOptions):
        from lightning.pytorch.loggers import WandbLogger

        options = config.logger
        return WandbLogger(
            name=folder.name,
            id=folder.name,
            resume="allow",
            save_dir=folder,
            project=options.project,
            entity=options.entity,
            group=options.group,
            tags=options.tags or None,
            job_type=config.task.name,
            mode=options.mode,
        )
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger(folder, name="metrics")


# --- the run folder ------------------------------------------------------------------------------


def _run_folder(config: Config) -> Path:
    """Make the run's folder and write its config, or check that the one there is the same."""
    from ecos_pl.storage import fingerprint_of, write_bytes

    same_run = {k: v for k, v in to_dict(config).items() if k not in _NOT_THE_RUN}
    what = config.selection.strategy if config.train_on == "proxy_set" else "local"
    name = f"{config.data.name}-{what}-seed{config.seed}-{fingerprint_of(same_run)[:8]}"
    folder = Path(config.run_root) / (config.run_id or name)
    text = to_yaml(config)
    path = folder / "config.yaml"
    if path.is_file() and _differs(path.read_text(), text):
        raise ConfigError(
            f"{folder} holds a run with another config ({_differs(path.read_text(), text)}); "
            "choose another run_id, or remove that folder"
        )
    if not config.trainer.fast_dev_run:
        write_bytes(path, text.encode())
    return folder


_NOT_THE_RUN = ("run_id", "run_root", "experiment")  # where and whence, not what
_MAY_CHANGE = (*_NOT_THE_RUN, "max_epochs", "enable_progress_bar", "num_workers", "devices")


def _differs(old: str, new: str) -> str:
    """First line in which two config files differ; empty if a run may go on with the new one."""
    for old_line, new_line in zip(old.splitlines(), new.splitlines(), strict=False):
        key = new_line.strip().partition(":")[0]
        if old_line != new_line and key not in _MAY_CHANGE:
            return f"{old_line.strip()} there, {new_line.strip()} here"
    return ""


def _checkpoint(folder: Path) -> str | None:
    """The newest checkpoint to resume from: our own, or one that a requeued job left."""
    found = [*folder.glob("hpc_ckpt_*.ckpt"), *(folder / "checkpoints").glob("last*.ckpt")]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None


def _take_averaged_weights(module: L.LightningModule, folder: Path) -> None:
    """Give the module the weights that its last checkpoint averaged: tested is what is delivered.

    Not through ``trainer.test(ckpt_path=…)``: after a fit, Lightning's weight averaging would give
    back the weights of the last step instead.
    """
    import torch

    if (last := _checkpoint(folder)) is not None:
        module.load_state_dict(
            torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
        )


def _save_model(module: L.LightningModule, config: Config, folder: Path) -> None:
    """Write ``model.safetensors``, for `ecos-client evaluate`."""
    from ecos_pl.model_file import TrainedModel, save_model
    from ecos_pl.modules.self_labeling import SelfLabelingModule

    task = config.task
    assert isinstance(module, SelfLabelingModule)
    assert isinstance(task, SelfLabelingOptions)
    model = TrainedModel(module.net, task.backbone, task.image_size, module.classes)
    save_model(folder / "model.safetensors", model)


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
        ".*using the WeightAveraging callback, but loading.*outside the 'fit' stage.*",
        ".*srun.*command is available.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)


def _is_users_mistake(error: Exception) -> bool:
    """Our own code raises ValueError for mistakes of users; from anywhere else it is a bug."""
    from ecos_pl.ledger import LedgerError

    if isinstance(error, (ConfigError, LedgerError)):
        return True
    if not isinstance(error, (ValueError, FileNotFoundError)):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    file = Path(frame.f_code.co_filename).resolve()
    ours = (HERE / "ecos_pl", HERE / "datamodules", HERE / "callbacks", HERE / "train.py")
    return any(file.is_relative_to(place) for place in ours)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
