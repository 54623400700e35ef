"""The proxy set and the model as W&B artifacts that name each other."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from callbacks.probed import Probed, probed
from callbacks.shows_probe import ShowsProbe
from ecos_pl.storage import read_json

log = logging.getLogger(__name__)


class Artifacts(ShowsProbe):
    """Logs ``proxy_set-<run id>`` (type dataset) and ``model-<run id>`` (type model) to W&B.

    The proxy set when it is there, and again with new labels; it is written into the run folder
    for that. The model when ``log_model`` is called. Both are outputs of the run, and the model's
    metadata names the proxy set by artifact and fingerprint, and the models that training started
    from. Those are marked as inputs of the run where W&B is online and knows them. Other loggers
    get nothing.

    Args:
        starts_from: Files that training starts from, such as ``task.teacher``, by option.
    """

    def __init__(self, starts_from: Mapping[str, Path] | None = None) -> None:
        super().__init__()
        self.starts_from = dict(starts_from or {})

    @override
    def key(self, found: Probed) -> str:
        num_labelled = int((found.result.proxy_set.weights > 0).sum())
        return f"{found.result.fingerprint}/{len(found.result.releases)}/{num_labelled}"

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.show_once(trainer)

    @override
    def show(self, trainer: Trainer, found: Probed) -> None:
        for logger in _of_wandb(trainer):
            import wandb

            folder = Path(trainer.default_root_dir)
            found.result.proxy_set.save(folder)
            artifact = wandb.Artifact(
                _name("proxy_set", logger),
                type="dataset",
                description="pool images chosen for the client, with labels",
                metadata=_about_proxy_set(found),
            )
            for file in ("proxy_set.csv", "proxy_set.json"):
                artifact.add_file(str(folder / file))
            logger.experiment.log_artifact(artifact, aliases=["latest", _digest(found)])

    def log_model(
        self, trainer: Trainer, file: Path, summary: Mapping[str, Any], classes: list[str]
    ) -> None:
        """Log the delivered model. Rank zero only.

        Args:
            trainer: Of the run.
            file: ``model.safetensors``.
            summary: Of the run: what the model cost and what is known of it.
            classes: Their names.
        """
        for logger in _of_wandb(trainer):
            import wandb

            metadata: dict[str, Any] = {
                "run_id": summary["run_id"],
                "classes": classes,
                **{key: summary[key] for key in ("model", "privacy")},
                "simulation": {  # single numbers: no tables, nothing of who the client is
                    name: value
                    for name, value in summary["simulation"].items()
                    if not isinstance(value, Mapping)
                },
            }
            if (found := probed(trainer)) is not None:
                metadata["proxy_set"] = {
                    "artifact": f"{_name('proxy_set', logger)}:{_digest(found)}",
                    "fingerprint": found.result.fingerprint,
                }
            if self.starts_from:
                metadata["starts_from"] = {
                    option: _known_model(path) for option, path in self.starts_from.items()
                }
                _mark_as_inputs(logger, metadata["starts_from"].values())
            artifact = wandb.Artifact(
                _name("model", logger),
                type="model",
                description="trained on the proxy set; read by ecos_pl.model_file.load_model",
                metadata=metadata,
            )
            artifact.add_file(str(file))
            logger.experiment.log_artifact(artifact, aliases=["latest", "delivered"])


def _of_wandb(trainer: Trainer) -> list[WandbLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]


def _name(what: str, logger: WandbLogger) -> str:
    return f"{what}-{logger.experiment.id}"


def _digest(found: Probed) -> str:
    """An alias for these images with these labels."""
    labels = hashlib.sha256(found.result.proxy_set.targets.numpy().tobytes()).hexdigest()
    return f"probe-{found.result.fingerprint[:12]}-{labels[:8]}"


def _about_proxy_set(found: Probed) -> dict[str, Any]:
    proxy_set = found.result.proxy_set
    return {
        "fingerprint": found.result.fingerprint,
        "size": len(proxy_set),
        "classes": list(proxy_set.classes),
        "label_source": proxy_set.label_source,
        **proxy_set.provenance,
        "privacy": found.result.privacy,  # rounds of labels included
    }


def _known_model(file: Path) -> dict[str, Any]:
    """What is known of a model's file: content, and the run it comes from, if it is a run's."""
    facts: dict[str, Any] = {"file": "/".join(file.parts[-2:])}  # no path of this machine
    facts["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    summary = file.parent / "summary.json"
    if file.name == "model.safetensors" and summary.is_file():
        facts["run_id"] = read_json(summary)["run_id"]
        facts["artifact"] = f"model-{facts['run_id']}:latest"
    return facts


def _mark_as_inputs(logger: WandbLogger, models: Any) -> None:
    """Draw the arrow from an earlier run's model to this run, where W&B can know that model."""
    import wandb

    run = logger.experiment
    if getattr(run, "offline", True) or getattr(run, "disabled", False):
        return
    for facts in models:
        if "artifact" in facts:
            try:
                run.use_artifact(facts["artifact"], type="model")
            except (wandb.errors.CommError, ValueError) as error:
                reason = " ".join(str(error).split())[:200]
                log.warning("W&B does not know %s: %s", facts["artifact"], reason)
