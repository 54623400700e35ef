"""Ends a training on request so that nothing is lost, and goes on as if it had not ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.stopping import REQUESTS, Stopped

KEY = "stop_and_resume"
"""Of this callback's part in a checkpoint."""


class StopAndResume(Callback):
    """Saves a checkpoint and raises ``Stopped`` on all ranks after a signal to any of them.

    At the end of a batch that made an optimizer step, or of the epoch once its last batch is
    done: a validation is finished first. The ranks agree on it over a gloo group of their own, so
    that none goes on alone.

    It replaces Lightning's handlers, which broadcast inside the signal handler (it may interrupt
    another collective: Lightning-AI/pytorch-lightning#20825), listen from the first batch on only,
    and requeue a SLURM job from whatever line the signal has interrupted.

    A resumed training goes on with the next batch (``datamodules/loaders.py``) and with each
    rank's random generators as they were.

    Args:
        path: Checkpoint to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ranks = ALONE
        self._open = contextlib.ExitStack()
        self._saved: dict[str, Any] | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if multiprocessing.parent_process() is not None:
            REQUESTS.listen()  # ddp_spawn and its like: here begins what this process has to lose
        connector = trainer._signal_connector
        assert hasattr(connector, "register_signal_handlers"), "Lightning has changed"
        connector.register_signal_handlers = _leave_the_handlers  # type: ignore[method-assign]
        REQUESTS.check()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._ranks is ALONE:
            # Open as long as the process lives: a rank that closed it at the end of its training
            # could cut off another one that has not got the last answer yet.
            self._ranks = self._open.enter_context(Ranks.of_processes())
        REQUESTS.postponed = True
        if self._saved is not None:
            self._resume(trainer, self._saved)
            self._saved = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        between_steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if between_steps and not trainer.is_last_batch and (by := self._asked()):
            trainer.save_checkpoint(self.path)
            raise Stopped(by)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if by := self._asked():
            trainer.save_checkpoint(self.path)
            raise Stopped(by)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        by = self._asked()  # since the last epoch's end, which was saved
        REQUESTS.postponed = False
        if by:
            raise Stopped(by)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        REQUESTS.postponed = False

    def _asked(self) -> signal.Signals | None:
        """The signal that any rank got, the same on all of them."""
        mine = [REQUESTS.by is signal.SIGTERM, REQUESTS.by is signal.SIGUSR1]
        by_term, by_usr1 = self._ranks.sum(torch.tensor(mine, dtype=torch.int64)).tolist()
        return signal.SIGUSR1 if by_usr1 else signal.SIGTERM if by_term else None

    # --- what is kept --------------------------------------------------------------------------

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states = {"cpu": torch.get_rng_state()}
        if pl_module.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(pl_module.device)
        checkpoint[KEY] = {
            "world_size": trainer.world_size,
            "random": {name: self._ranks.concat(state[None]) for name, state in states.items()},
        }

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._saved = checkpoint.get(KEY, {})

    def _resume(self, trainer: Trainer, saved: dict[str, Any]) -> None:
        progress = trainer.fit_loop.epoch_progress.current
        batches = trainer.fit_loop.epoch_loop.batch_progress
        in_an_epoch = progress.ready != progress.processed
        same_world = saved.get("world_size", trainer.world_size) == trainer.world_size
        if in_an_epoch and not same_world:
            raise ValueError(
                f"this training stopped in the middle of an epoch on {saved['world_size']} "
                f"devices; let it go on with as many, not {trainer.world_size}"
            )
        if not in_an_epoch:
            # With max_steps, Lightning would take the finished epoch's batches for the next one's.
            batches.reset_on_run()
        _go_to(trainer, progress.processed, batches.current.ready if in_an_epoch else 0)
        if same_world:
            _set_random_state(saved.get("random", {}), trainer)


def _go_to(trainer: Trainer, epoch: int, batch: int) -> None:
    """Make the training loaders begin there; ``estimated_stepping_batches`` has opened them."""
    loaders = trainer.train_dataloader
    for loader in loaders.values() if isinstance(loaders, dict) else [loaders]:
        go_to = getattr(getattr(loader, "batch_sampler", None), "go_to", None)
        if go_to is not None:
            go_to(epoch, batch)
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    iter(fetcher)


def _set_random_state(states: dict[str, Tensor], trainer: Trainer) -> None:
    # Clones, since torch ends in a segmentation fault on a view.
    if "cpu" in states:
        torch.set_rng_state(states["cpu"][trainer.global_rank].clone())
    if "cuda" in states and trainer.strategy.root_device.type == "cuda":
        state = states["cuda"][trainer.global_rank].clone()
        torch.cuda.set_rng_state(state, trainer.strategy.root_device)


def _leave_the_handlers() -> None:
    """Stand in for Lightning's ``register_signal_handlers``."""
