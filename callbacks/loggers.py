"""The loggers of a run, each made from plain values and nothing asked of the user."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from ecos_pl.extras import require
from ecos_pl.labels_awaited import LabelsAwaited
from ecos_pl.stopping import is_first_process


def csv_logger(folder: Path) -> CSVLogger:
    """Scalars in ``metrics/version_K/metrics.csv``, K counting the calls of a run."""
    return CSVLogger(folder, name="metrics")


def tensorboard_logger(folder: Path) -> TensorBoardLogger:
    """Events in ``tensorboard/``; a resumed run adds a file to them.

    Raises:
        ValueError: The package is missing.
    """
    require("tensorboard", ["tensorboard"])
    return TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)


def wandb_logger(
    folder: Path,
    *,
    project: str,
    entity: str | None,
    group: str | None,
    tags: Sequence[str],
    mode: str,
    job_type: str,
) -> WandbLogger:
    """A W&B run under the name of the run's folder, which a resumed run goes on with.

    Where ``mode`` is online, the variable WANDB_MODE of the environment may say otherwise. What the
    terminal shows is not sent: it tells how long the client took to answer.

    Raises:
        ValueError: It would have to ask for a key.
    """
    import wandb

    if mode == "online":
        mode = {"dryrun": "offline"}.get(given := os.environ.get("WANDB_MODE", mode), given)
    if mode == "online" and is_first_process() and not _has_key():
        raise ValueError(
            "logger=wandb finds no key: write logger.mode=offline (for `wandb sync` later), or run "
            "`wandb login`, or set WANDB_API_KEY"
        )
    logger = WandbLogger(
        name=folder.name,
        id=folder.name,
        resume="allow",
        save_dir=folder,
        project=project,
        entity=entity,
        group=group,
        tags=list(tags) or None,
        job_type=job_type,
        mode=mode,
        settings=wandb.Settings(console="off"),
    )
    logger._wandb_init.pop("anonymous", None)  # W&B would warn that it no longer means anything
    return logger


@contextmanager
def closing(logger: Any) -> Iterator[Any]:
    """End the logger's W&B run with the block, so that another run of this process has its own."""
    try:
        yield logger
    except BaseException as error:
        _finish(logger, exit_code=0 if isinstance(error, LabelsAwaited) else 1)
        raise
    _finish(logger, exit_code=0)


def _finish(logger: Any, exit_code: int) -> None:
    # Of this process: with ddp_spawn, another one may have begun it.
    if isinstance(logger, WandbLogger) and logger._experiment is not None:
        logger._experiment.finish(exit_code=exit_code)


def _has_key() -> bool:
    """Whether W&B would log in without asking."""
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    import wandb

    settings = wandb.setup().settings
    if settings.api_key:
        return True
    host = urlsplit(settings.base_url).hostname
    given = os.environ.get("NETRC")
    files = [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]
    return host is not None and any(_names(file, host) for file in files)


def _names(file: Path, host: str) -> bool:
    try:
        return netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
