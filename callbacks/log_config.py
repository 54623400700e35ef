"""The resolved config, to every logger, once the loggers are live."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override


class LogConfig(Callback):
    """Logs the config as plain data when fitting begins.

    Not before: ahead of ``fit`` a process of a multi-node job may take itself for rank 0.

    Args:
        config: Plain dicts, lists and values.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit":
            for logger in trainer.loggers:
                logger.log_hyperparams(self._config)
