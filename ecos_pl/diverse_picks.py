"""Greedy k-center inside every cluster: each candidate row is read once, many clusters at a time.

Shapes: N pool rows, R clusters, d embedding dimensions, C candidates, G clusters of a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.row_blocks import Rows
from ecos_pl.row_reading import read_scattered

HELD_VALUES = 2**26
"""Numbers of candidate rows in memory at once (128 MiB in float16): 1M rows of 64 dimensions."""

GROUP_VALUES = 2**20
"""Numbers of a group of small clusters that are treated together (4 MiB in float32)."""

Indices = npt.NDArray[np.int64]


def diverse_picks(
    embeddings: Rows,
    assignments: Tensor,
    centroids: Tensor,
    quotas: Tensor,
    *,
    candidates: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Rows [sum(quotas)] that cover each cluster: the most central one, then farthest first.

    Gonzalez' greedy k-center (1985), of equally far rows the first: the picks leave no candidate
    farther from its cluster's picks than twice what the best ones could. A larger quota
    continues a smaller one. First come the first picks of all clusters, then the second ones, …;
    where a cluster gives all its candidates, they come in the order of the pool.

    Costs ``sum(quota · candidates) · d`` multiplications over the clusters, and
    ``HELD_VALUES`` numbers of memory beside 16 bytes a candidate. A cluster too large to be held
    is read anew for every pick.

    Args:
        embeddings: [N, d], finite where there are candidates.
        assignments: [N] integers below R; rows of negative ones are no candidates.
        centroids: [R, d].
        quotas: [R] int64, none above its cluster's number of candidates.
        candidates: [N] bool, rows that may be taken; None for all.
        device: Where distances are computed.
    """
    num_dims = int(embeddings.shape[1])
    wanted = quotas.numpy()
    rows, bounds = _by_cluster(assignments, wanted, candidates)
    numbers = np.diff(bounds)
    picked: list[tuple[Indices, Indices, Indices]] = []  # row, round, cluster

    def take(places: Indices, rounds: Indices, clusters: Indices) -> None:
        picked.append((rows[places], rounds, clusters))

    whole = np.flatnonzero((wanted > 0) & (wanted >= numbers))
    for cluster in whole:
        places = np.arange(bounds[cluster], bounds[cluster + 1])
        take(places, places - bounds[cluster], np.full(len(places), cluster))

    partly = np.flatnonzero((wanted > 0) & (wanted < numbers))
    limit = max(1, HELD_VALUES // num_dims)
    for cluster in partly[numbers[partly] > limit]:
        members = rows[bounds[cluster] : bounds[cluster + 1]]
        places = _streamed(embeddings, members, centroids[cluster], int(wanted[cluster]), device)
        take(places + bounds[cluster], np.arange(len(places)), np.full(len(places), cluster))
    for held in _runs(partly[numbers[partly] <= limit], numbers, limit):
        places = np.concatenate([np.arange(bounds[c], bounds[c + 1]) for c in held])
        table = read_scattered(embeddings, rows[places])
        starts = np.concatenate([[0], numbers[held].cumsum()])
        # Clusters of about one size and quota waste little when they are padded to the largest.
        alike = np.lexsort((wanted[held], numbers[held]))
        for group in _runs(alike, numbers[held], max(1, GROUP_VALUES // num_dims), padded=True):
            own = held[group]
            found = _together(
                [table[starts[g] : starts[g + 1]] for g in group],
                centroids[torch.from_numpy(own)],
                wanted[own],
                device,
            )
            valid = np.arange(found.shape[1]) < wanted[own, None]
            where, rounds = np.nonzero(valid)
            take(found[valid] + bounds[own[where]], rounds, own[where])
    if not picked:
        return torch.empty(0, dtype=torch.int64)
    chosen, rounds, clusters = (np.concatenate(parts) for parts in zip(*picked, strict=True))
    return torch.from_numpy(chosen[np.lexsort((clusters, rounds))])


def _by_cluster(
    assignments: Tensor, wanted: Indices, candidates: Tensor | None
) -> tuple[Indices, Indices]:
    """Candidates [C] of the clusters with a quota, by cluster and place, and bounds [R + 1]."""
    labels = assignments.numpy()
    open_ = np.append(wanted > 0, False)[labels]  # -1 finds the last one
    if candidates is not None:
        open_ &= candidates.numpy()
    rows = np.flatnonzero(open_)
    # NumPy sorts 16-bit integers in linear time.
    narrow = labels[rows].astype(np.uint16 if len(wanted) <= 2**16 else np.int64)
    bounds = np.zeros(len(wanted) + 1, np.int64)
    np.cumsum(np.bincount(narrow, minlength=len(wanted)), out=bounds[1:])
    return rows[np.argsort(narrow, kind="stable")], bounds


def _runs(
    clusters: Indices, numbers: Indices, limit: int, *, padded: bool = False
) -> Iterator[Indices]:
    """Cut a list of clusters into runs of at most ``limit`` rows, or of one cluster.

    Padded, each cluster of a run counts as many rows as its last one, the largest.
    """
    first, total = 0, 0
    for place, cluster in enumerate(clusters.tolist()):
        number = int(numbers[cluster])
        total = (place + 1 - first) * number if padded else total + number
        if total > limit and place > first:
            yield clusters[first:place]
            first, total = place, number
    if len(clusters):
        yield clusters[first:]


def _together(
    tables: list[Tensor], centroids: Tensor, quotas: Indices, device: torch.device | str
) -> Indices:
    """Picks [G, largest quota] in clusters [n_g, d] of about one size, by place in each."""
    sizes = torch.tensor([len(table) for table in tables], device=device)
    rows = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True).to(device).float()  # (G, n, d)
    every = torch.arange(len(tables), device=device)
    closest = -_squared_distances(rows, centroids.to(rows))  # (G, n); first the most central
    closest.masked_fill_(torch.arange(rows.shape[1], device=device) >= sizes[:, None], -torch.inf)
    picks = []
    for round_ in range(int(quotas.max())):
        pick = closest.argmax(dim=1)  # of equal ones the first
        picks.append(pick)
        distances = _squared_distances(rows, rows[every, pick])
        if round_ == 0:
            closest = distances.masked_fill_(closest == -torch.inf, -torch.inf)
        else:
            closest = torch.minimum(closest, distances, out=closest)
        closest[every, pick] = -torch.inf
    return torch.stack(picks, dim=1).cpu().numpy()


def _squared_distances(rows: Tensor, points: Tensor) -> Tensor:
    """From rows [G, n, d] to one point each [G, d]: [G, n]."""
    return (rows - points[:, None]).square_().sum(dim=2)


def _streamed(
    embeddings: Rows, members: Indices, centroid: Tensor, quota: int, device: torch.device | str
) -> Indices:
    """Picks [quota] in one cluster that does not fit into memory, by place in it."""
    block = max(1, HELD_VALUES // int(embeddings.shape[1]))
    closest = torch.full((len(members),), torch.inf)
    point, taken = centroid.to(device).float(), np.empty(quota, np.int64)
    for round_ in range(quota):
        for first in range(0, len(members), block):
            rows = read_scattered(embeddings, members[first : first + block]).to(device).float()
            distances = (rows - point).square_().sum(dim=1).cpu()
            part = closest[first : first + block]
            torch.minimum(part, distances, out=part)
        if round_ == 0:
            taken[0] = int(closest.argmin())
            closest.fill_(torch.inf)
        else:
            closest[taken[:round_]] = -torch.inf
            taken[round_] = int(closest.argmax())
        point = (
            read_scattered(embeddings, members[taken[round_ : round_ + 1]])[0].to(device).float()
        )
    return taken
