"""What the dialogue asked, cost and chose, as numbers and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from callbacks.probed import Probed, probed
from ecos_pl.probe_result import ProbeResult


class SamplingStatistics(Callback):
    """Logs ``probe/…`` (public, or noisy answers) and ``simulation/…`` (the benchmark's truth).

    Any logger gets the scalars; W&B also a table of the clusters, a histogram of the quotas, and
    the domains and true classes of the chosen images where the pool knows them.
    """

    def __init__(self) -> None:
        self._done: set[str] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        found = probed(trainer)
        if found is None or found.result.fingerprint in self._done:
            return
        self._done.add(found.result.fingerprint)
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        scalars = _scalars(found)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)
            if isinstance(logger, WandbLogger):
                _log_tables(logger, found, step)


def _scalars(found: Probed) -> dict[str, float]:
    result, selection = found.result, found.result.selection
    scalars: dict[str, float] = {
        "probe/proxy_size": len(result.proxy_set),
        "probe/num_clusters": len(result.cluster_sizes),
        "probe/kept_clusters": int(selection.kept.sum()),
        "probe/threshold": selection.threshold,
        "probe/num_filled_up": selection.num_filled_up,
        "probe/num_duplicates": selection.num_duplicates,
        "probe/num_unreadable": result.num_unreadable,
        "probe/delta": result.privacy["delta"],
        **{f"probe/{name}": value for name, value in result.communication.items()},
        **{f"probe/seconds/{name}": value for name, value in _cloud_seconds(result).items()},
    }
    if result.privacy["epsilon"] is not None:
        scalars["probe/epsilon"] = result.privacy["epsilon"]
    known = {f"simulation/{k}": v for k, v in found.simulation.items() if v is not None}
    return {name: float(value) for name, value in {**scalars, **known}.items()}


def _cloud_seconds(result: ProbeResult) -> dict[str, float]:
    """Seconds of the cloud's own steps: how long the client took is the client's."""
    asked_for_counts = result.noisy_counts is not None
    asked_for_labels = result.communication["round_trips"] > int(asked_for_counts)
    withheld = {"ask", "label"} if asked_for_labels else {"ask"}
    return {name: value for name, value in result.seconds.items() if name not in withheld}


def _log_tables(logger: WandbLogger, found: Probed, step: int) -> None:
    import wandb

    result = found.result
    logger.log_table("probe/clusters", *_cluster_table(result), step=step)
    quotas: Any = wandb.Histogram(result.selection.quotas.tolist())
    logger.log_metrics({"probe/quotas": quotas}, step=step)
    indices, pool = result.indices.tolist(), found.scenario.pool
    for what, key, names in (
        ("domain", "simulation/chosen_domains", pool.domains),
        ("class", "simulation/chosen_classes", pool.labels),
    ):
        if any(name is not None for name in names):
            logger.log_table(key, *_composition_table(what, names, indices), step=step)


def _cluster_table(result: ProbeResult) -> tuple[list[str], list[list[Any]]]:
    columns: dict[str, list[Any]] = {
        "cluster": list(range(len(result.cluster_sizes))),
        "size": result.cluster_sizes.tolist(),
        "quota": result.selection.quotas.tolist(),
        "kept": result.selection.kept.tolist(),
    }
    if result.noisy_counts is not None:
        columns["noisy count"] = result.noisy_counts.tolist()
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _composition_table(
    what: str, names: Sequence[str | None], indices: list[int]
) -> tuple[list[str], list[list[Any]]]:
    in_pool = Counter(name or "(unknown)" for name in names)
    chosen = Counter(names[index] or "(unknown)" for index in indices)
    rows = [[name, chosen[name], in_pool[name]] for name in sorted(in_pool)]
    return [what, "chosen images", "pool images"], rows
