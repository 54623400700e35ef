"""From a config to the Trainer: logger, callbacks, strategy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import loggers
from callbacks.choose import choose_callbacks, switchable
from callbacks.label_rounds import LabelRounds
from callbacks.run_timer import RunTimer
from callbacks.stop_and_resume import StopAndResume
from ecos_pl.config import (
    ClientPrototypesOptions,
    Config,
    DistillationOptions,
    MailboxOptions,
    TensorboardOptions,
    WandbOptions,
)
from ecos_pl.config_files import to_dict
from ecos_pl.overrides import ConfigError, nearest
from ecos_pl.printable_url import printable_url


def trainer_of(
    config: Config, folder: Path, logger: Any, more: Sequence[Callback] = ()
) -> tuple[Trainer, RunTimer]:
    """The Trainer of a run, and the timer among its callbacks.

    Args:
        config: Of the run.
        folder: Of the run.
        logger: Lightning's, or False.
        more: Further callbacks, ahead of the others.

    Raises:
        ConfigError: One line: options of the Trainer that do not go together, or not with this
            machine.
    """
    options = asdict(config.trainer)
    options["enable_progress_bar"] &= sys.stdout.isatty()
    timeout_minutes = options.pop("timeout_minutes")
    switches = asdict(config.callbacks)
    ema_decay, timer = getattr(config.task, "ema_decay", None), RunTimer()
    callbacks = choose_callbacks(
        switchable(
            shown(config),
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
        trainer = Trainer(
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


def teacher_trainer(config: Config, folder: Path) -> Trainer:
    """One device trains the teacher, whatever launched this process."""
    task = config.task
    assert isinstance(task, DistillationOptions)
    callbacks: list[Callback] = []
    if not config.trainer.fast_dev_run:
        checkpoints = folder / "checkpoints"
        callbacks.append(ModelCheckpoint(checkpoints, save_last=True, save_on_train_epoch_end=True))
        callbacks.append(StopAndResume(checkpoints / "stopped.ckpt"))
    progress = config.trainer.enable_progress_bar and sys.stdout.isatty()
    if progress:
        callbacks.append(RichProgressBar(leave=True))
    return Trainer(
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


def label_rounds_of(config: Config, folder: Path) -> LabelRounds | None:
    """What asks for further rounds of labels; None where none are wanted."""
    options = config.labels
    if not isinstance(options, ClientPrototypesOptions) or not options.rounds:
        return None
    return LabelRounds(options.rounds, folder / "rounds")


def logger_of(config: Config, folder: Path) -> Any:
    """Lightning's logger, or False for none."""
    if config.trainer.fast_dev_run or config.logger.name == "none":
        return False
    if isinstance(config.logger, WandbOptions):
        options = asdict(config.logger)
        options.pop("name")
        return loggers.wandb_logger(folder, job_type=config.task.name, **options)
    if isinstance(config.logger, TensorboardOptions):
        return loggers.tensorboard_logger(folder)
    return loggers.csv_logger(folder)


def _check_strategy(name: str, averages: bool, rounds: Sequence[int]) -> None:
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


def shown(config: Config) -> dict[str, Any]:
    """The config for a logger: a mailbox's address without the password it may hold."""
    plain = to_dict(config)
    if isinstance(config.client, MailboxOptions):
        plain["client"]["url"] = printable_url(config.client.url)
    return plain


def _models_to_start_from(config: Config) -> dict[str, Path]:
    """Files of models that training starts from or follows, by option."""
    given = {key: getattr(config.task, key, None) for key in ("teacher", "weights")}
    files = {f"task.{key}": Path(name).expanduser() for key, name in given.items() if name}
    return {key: file for key, file in files.items() if file.is_file()}
