"""Asks the client for labels once more, in the space of the backbone as training has made it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from callbacks.weight_averaging import averaged
from ecos_pl.backbone_file import backbone_bytes
from ecos_pl.classifier import Classifier
from ecos_pl.label_rounds import LabelRound
from ecos_pl.ranks import Ranks
from ecos_pl.stopping import REQUESTS
from ecos_pl.storage import write_bytes


class Relabelled(Protocol):
    """The datamodule whose labels change: a ``ProxySamplingDataModule``."""

    def ask_again(self, number: int, backbone: Path, image_size: int, ranks: Ranks) -> LabelRound:
        """Ask the client; all ranks call this."""

    def relabel(self, found: LabelRound, epoch: int) -> None:
        """Train on these labels from now on."""


class LabelRounds(Callback):
    """Before planned epochs, hands the adapted backbone to the client and relabels the proxy set.

    The averaged weights are handed over, where there are any. A round lies in ``round<k>/`` of
    its folder: ``backbone.safetensors`` before the client is asked, ``labels.safetensors`` once it
    has answered. Whatever happens in between, the next start finds the backbone, asks the same
    question, and the client gives the same answer: nothing is spent twice.

    Args:
        epochs: Before which epochs, ascending; the labels' plan has as many further releases.
        folder: Of the rounds; on a disk that all ranks see.
    """

    def __init__(self, epochs: Sequence[int], folder: Path) -> None:
        self.epochs, self.folder = list(epochs), folder
        self._num_done = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed training loads its first batch before its epoch starts.
        self._do_what_is_due(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._do_what_is_due(trainer, pl_module)

    def catch_up(self, datamodule: Relabelled) -> None:
        """Lay the labels of finished rounds over a datamodule that has not seen them.

        Where the training was over before this process began, or went on in other processes.
        """
        for number in range(self._num_done + 1, len(self.epochs) + 1):
            if not (path := self._labels(number)).is_file():
                return
            datamodule.relabel(LabelRound.load(path), self.epochs[number - 1])
            self._num_done = number

    def _do_what_is_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while self._num_done < len(self.epochs):
            epoch = self.epochs[self._num_done]
            if epoch > trainer.current_epoch:
                return
            with isolate_rng(), _stoppable():
                found = self._round(trainer, pl_module, self._num_done + 1)
            datamodule: Relabelled = trainer.datamodule  # type: ignore[attr-defined]
            datamodule.relabel(found, epoch)
            self._num_done += 1

    def _round(self, trainer: Trainer, pl_module: LightningModule, number: int) -> LabelRound:
        labels, backbone = self._labels(number), self._folder(number) / "backbone.safetensors"
        model = averaged(trainer, pl_module).model
        assert isinstance(model, Classifier)
        with Ranks.of_processes() as ranks:
            with ranks.first() as is_first:
                if is_first and not backbone.is_file():
                    write_bytes(backbone, backbone_bytes(model.net, model.backbone))
            if not ranks.broadcast(labels.is_file()):
                datamodule: Relabelled = trainer.datamodule  # type: ignore[attr-defined]
                found = datamodule.ask_again(number, backbone, model.image_size, ranks)
                with ranks.first() as is_first:
                    if is_first:
                        found.save(labels)
                return found
        return LabelRound.load(labels)

    def _folder(self, number: int) -> Path:
        return self.folder / f"round{number}"

    def _labels(self, number: int) -> Path:
        return self._folder(number) / "labels.safetensors"


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let a signal end the run at once: a client may take days, and nothing here is lost."""
    postponed, REQUESTS.postponed = REQUESTS.postponed, False
    try:
        REQUESTS.check()
        yield
    finally:
        REQUESTS.postponed = postponed
