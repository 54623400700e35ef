"""What the callbacks have in common that show a probe: once in a run, on one rank."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from callbacks.probed import Probed, probed


class ShowsProbe(Callback):
    """Shows each probe once, also when training is resumed.

    What was shown is kept in the checkpoint: a run that goes on from one does not show it again; a
    run that was killed before its first one begins anew, and so does this. That is known once the
    checkpoint is loaded, hence not in ``setup``.
    """

    def __init__(self) -> None:
        self._shown: list[str] = []

    def show(self, trainer: Trainer, found: Probed) -> None:
        """Draw and log it; rank zero alone is asked."""
        raise NotImplementedError

    def key(self, found: Probed) -> str:
        """What is shown once."""
        return found.result.fingerprint

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show_once(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show_once(trainer)

    def show_once(self, trainer: Trainer) -> None:
        """Show the datamodule's probe unless that was done."""
        found = probed(trainer)
        if found is None or self.key(found) in self._shown:
            return
        self._shown.append(self.key(found))
        if trainer.is_global_zero:
            self.show(trainer, found)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"shown": list(self._shown)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._shown += [key for key in state_dict["shown"] if key not in self._shown]
