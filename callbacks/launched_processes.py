"""The processes that Lightning starts for a run: what this one does before them, and their end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from ecos_pl.stopping import Stopped


@contextlib.contextmanager
def children_end_too(trainer: Trainer) -> Iterator[None]:
    """End the processes that Lightning started when this one ends early."""
    try:
        yield
    except Stopped:
        _end_children(trainer)
        raise
    except SystemExit:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from None


def _end_children(trainer: Trainer, wait_s: float = 120) -> None:
    launcher = trainer.strategy.launcher
    if launcher is None:
        return
    launcher.kill(signal.SIGTERM)
    for process in getattr(launcher, "procs", ()):
        try:
            process.wait(wait_s) if hasattr(process, "wait") else process.join(wait_s)
        except subprocess.TimeoutExpired:
            process.kill()


def probe_here_if_workers_cannot_tell(trainer: Trainer, datamodule: Any) -> None:
    """With ``ddp_spawn`` and its like, probe before there are workers: they return no results."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        if launcher._start_method == "spawn":  # others must not touch a GPU before they fork
            datamodule.trainer = trainer
        datamodule.prepare_data()
        datamodule.setup("fit")
