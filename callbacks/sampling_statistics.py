"""What the dialogue asked, cost and chose, as numbers and tables."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from callbacks.logging_to import log_histogram, log_scalars, log_table
from callbacks.probed import Probed
from callbacks.shows_probe import ShowsProbe
from ecos_pl.composition import composition
from ecos_pl.probe_result import ProbeResult


class SamplingStatistics(ShowsProbe):
    """Logs ``probe/…`` (public, or noisy answers) and ``simulation/…`` (the benchmark's truth).

    Scalars; a table of the clusters; histograms of the quotas, of the noisy counts, and of how far
    chosen and other images lie from their cluster's centroid; and the domains and true classes of
    the chosen images where the pool knows them.
    """

    @override
    def show(self, trainer: Trainer, found: Probed) -> None:
        distances = _distances(found.result)
        means = {f"probe/distance/{name}": float(one.mean()) for name, one in distances.items()}
        log_scalars(trainer, {**_scalars(found), **means})
        _log_tables(trainer, found)
        for name, one in distances.items():
            log_histogram(trainer, f"probe/distance_of_{name}", one.tolist())


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


def _distances(result: ProbeResult) -> dict[str, Tensor]:
    """Distances from the cluster's centroid, of chosen and of other images in the pool's sample."""
    sample = result.pool_sample
    if sample is None:
        return {}
    chosen = torch.isin(sample.rows, result.indices)
    parts = {"chosen": sample.distances[chosen], "others": sample.distances[~chosen]}
    return {name: part for name, part in parts.items() if len(part)}


def _log_tables(trainer: Trainer, found: Probed) -> None:
    result = found.result
    log_table(trainer, "probe/clusters", *_cluster_table(result))
    log_histogram(trainer, "probe/quotas", result.selection.quotas.tolist())
    if result.noisy_counts is not None:
        log_histogram(trainer, "probe/noisy_counts", result.noisy_counts.tolist())
    indices, pool = result.indices.tolist(), found.scenario.pool
    for what, key, names in (
        ("domain", "simulation/chosen_domains", pool.domains),
        ("class", "simulation/chosen_classes", pool.labels),
    ):
        if (found := composition(names, indices)) is not None:
            rows = [[name, one["chosen"], one["pool"]] for name, one in found.items()]
            log_table(trainer, key, [what, "chosen images", "pool images"], rows)


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
