"""The resolved config, to every logger, once the loggers are live."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from typing_extensions import override

from callbacks.logging_to import log_text

_MEASURED = ("val/accuracy", "simulation/test_accuracy", "simulation/purity", "privacy/epsilon")
"""What TensorBoard sets beside the options when runs are compared."""


class LogConfig(Callback):
    """Logs the config as plain data when fitting begins.

    Not before: ahead of ``fit`` a process of a multi-node job may take itself for rank 0.
    TensorBoard also gets it as text, and as what its tab HPARAMS compares, once in a run.

    Args:
        config: Plain dicts, lists and values.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._in_tensorboard = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_hyperparams(self._config)
                if isinstance(logger, TensorBoardLogger) and not self._in_tensorboard:
                    _to_tensorboard(logger, self._config)
        self._in_tensorboard = True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"in_tensorboard": self._in_tensorboard}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._in_tensorboard = state_dict["in_tensorboard"]


def _to_tensorboard(logger: TensorBoardLogger, config: Mapping[str, Any]) -> None:
    from torch.utils.tensorboard.summary import hparams

    text = json.dumps(config, indent=2, ensure_ascii=False)
    log_text(logger, "config", "".join(f"\t{line}\n" for line in text.splitlines()))
    # Not through log_hyperparams, which would log a value of every metric named.
    options = {key: "null" if value is None else value for key, value in _flat(config)}
    writer = logger.experiment._get_file_writer()
    for summary in hparams(options, dict.fromkeys(_MEASURED, 0.0)):
        writer.add_summary(summary)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value) if isinstance(value, (list, tuple)) else value
