"""From noisy coverage counts to the rows of the pool that make the proxy set.

Shapes: N pool rows, R clusters, d embedding dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ecos_pl.clustering import Rows
from ecos_pl.count_smoothing import ClientDensity, smooth_counts

STRATEGIES = ("ecos", "random", "all")

CORE_SHARE = 0.75
"""Share of the client's images that the core of its density holds; the rest is spread thinly."""

CHUNK_ROWS = 4096
"""Rows whose densities are computed at once."""


@dataclass(frozen=True)
class Selection:
    """Which rows were chosen, and how.

    Attributes:
        indices: [size] int64, chosen rows, ascending and unique.
        quotas: [R] int64, rows taken from each cluster.
        kept: [R] bool, clusters of which at least half the rows are relevant.
        threshold: Density from which on a row is relevant, in client images per cluster of
            average size (0 where no count was asked for).
        num_filled_up: Rows taken that are not relevant, to reach the size.

    A row is relevant if it belongs to the densest ones that hold all of the client's images (see
    ``densest_rows``).
    """

    indices: Tensor
    quotas: Tensor
    kept: Tensor
    threshold: float
    num_filled_up: int


def default_num_clusters(pool_size: int, noise_std: float) -> int:
    """Number of clusters R to ask about, when the user gives none.

    More clusters separate domains better, but spread the client's images thinner while the noise
    on each count stays the same; smoothing makes up for a part of that. Two bounds, the smaller
    one rules: 50 pool images a cluster, so that there is something to choose from, and
    ``500 / noise_std``, so that a client of a few hundred images whose distribution fills an
    eighth of the clusters leaves a few noise standard deviations in each of them. Nothing private
    enters. Between 2 and 1,000.

    >>> default_num_clusters(14_000, 5.0), default_num_clusters(300, 5.0)
    (100, 6)
    """
    return max(2, min(round(pool_size / 50), round(500 / noise_std), 1000))


def densities(density: ClientDensity, embeddings: Rows) -> Tensor:
    """The client's density [N] at each row of the pool, a chunk at a time."""
    parts = []
    for first in range(0, len(embeddings), CHUNK_ROWS):
        chunk = embeddings[first : first + CHUNK_ROWS]
        # A copy: a memory map may be read-only, which tensors cannot be.
        rows = chunk if isinstance(chunk, Tensor) else torch.from_numpy(np.array(chunk))
        parts.append(density(rows))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def densest_rows(
    row_densities: Tensor, noisy_counts: Tensor, noise_std: float, *, share: float
) -> Tensor:
    """Mark the fewest rows [N] bool that hold a share of the client's images.

    A highest density region (Hyndman 1996). How many images the client has is known but for the
    noise on R counts, so one standard deviation of their sum, ``noise_std · √R``, is taken off
    first: the less is certain, the fewer rows are marked; none where the sum drowns.

    Args:
        row_densities: [N], estimated client images at each row; the negative ones count, too:
            in the sum they make up for what noise alone put elsewhere.
        noisy_counts: [R].
        noise_std: Of the counts, in images.
        share: Above 0, at most 1.
    """
    order = row_densities.argsort(descending=True, stable=True)
    held = row_densities[order].cumsum(0)
    marked = torch.zeros(len(order), dtype=torch.bool)
    total, doubt = float(noisy_counts.sum()), noise_std * math.sqrt(len(noisy_counts))
    if len(order) and total > doubt:
        wanted = share * (1 - doubt / total) * float(held[-1])
        before = held - row_densities[order]
        marked[order[before.cummax(0).values < wanted]] = True
    return marked & (row_densities > 0)


def water_fill(weights: Tensor, capacities: Tensor, total: int) -> Tensor:
    """Integers proportional to weights, none above its capacity, that sum to ``total``.

    What a full cluster cannot take spills over to the others in proportion to their weights;
    fractions go to the largest remainders.

    Args:
        weights: [R], not negative; a weight of zero takes nothing.
        capacities: [R] int64.
        total: Wanted sum; less is given out only if the capacities with a weight hold less.
    """
    weights = weights.double().clamp_min(0)
    capacities = torch.where(weights > 0, capacities, 0)
    total = min(total, int(capacities.sum()))
    if total == 0:
        return torch.zeros_like(capacities)
    # At water level t, cluster r takes min(capacity, t * weight); the level at which the m
    # clusters that fill up first are full leaves (total - their capacity) for the rest.
    levels = torch.where(weights > 0, capacities / weights, torch.inf)
    order = levels.argsort(stable=True)
    full = capacities[order].cumsum(0).double()
    # Summed from the end: in a difference of large sums a small rest drowns.
    rest = torch.nn.functional.pad(weights[order].flip(0).cumsum(0).flip(0)[1:], (0, 1))
    taken = torch.where(weights[order] > 0, full + rest * levels[order], torch.inf)
    num_full = int((taken <= total).sum())
    spent = float(full[num_full - 1]) if num_full else 0.0
    share = float(rest[num_full - 1]) if num_full else float(weights.sum())
    exact = (weights * ((total - spent) / share if share > 0 else 0.0)).minimum(capacities.double())
    exact[order[:num_full]] = capacities[order[:num_full]].double()
    quotas = exact.floor().long()
    room = capacities > quotas
    remainders = torch.where(room, exact - quotas, -1.0)
    missing = total - int(quotas.sum())
    quotas[remainders.argsort(descending=True, stable=True)[:missing]] += 1
    return quotas


def diverse_picks(
    embeddings: Rows,
    assignments: Tensor,
    centroids: Tensor,
    quotas: Tensor,
    *,
    candidates: Tensor | None = None,
) -> Tensor:
    """Rows [sum(quotas)] that cover each cluster: the most central one, then farthest first.

    Gonzalez' greedy k-center, in all clusters at once: a round adds one row to every cluster
    that still has room, and only distances to that newest row are computed.

    Args:
        embeddings: [N, d], finite.
        assignments: [N] int64 in [0, R).
        centroids: [R, d].
        quotas: [R] int64, none above its cluster's number of candidates.
        candidates: [N] bool, rows that may be taken; None for all.
    """
    quotas = quotas.clone()
    wanted = quotas[assignments] > 0
    active = torch.nonzero(wanted if candidates is None else wanted & candidates).flatten()
    chosen = []
    closest: Tensor | None = None  # squared distance of each active row to its cluster's picks
    while len(active):
        rows = torch.as_tensor(embeddings[active.numpy()]).float()
        clusters = assignments[active]
        if closest is None:
            priority = -(rows - centroids[clusters].float()).square().sum(dim=1)
        else:
            priority = closest
        best = torch.full((len(quotas),), -torch.inf).scatter_reduce(
            0, clusters, priority, reduce="amax"
        )
        tied = torch.nonzero(priority == best[clusters]).flatten()
        # Of equally far rows the first one.
        pick = torch.full((len(quotas),), len(active)).scatter_reduce(
            0, clusters[tied], tied, reduce="amin"
        )
        picked = pick[pick < len(active)]
        chosen.append(active[picked])
        distances = (rows - rows[pick[clusters]]).square().sum(dim=1)
        closest = distances if closest is None else closest.minimum(distances)
        quotas[clusters[picked]] -= 1
        left = quotas[clusters] > 0
        left[picked] = False
        active, closest = active[left], closest[left]
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)


def select(
    noisy_counts: Tensor | None,
    assignments: Tensor,
    embeddings: Rows,
    centroids: Tensor,
    *,
    size: int,
    strategy: str,
    noise_std: float,
    generator: torch.Generator,
) -> Selection:
    """Choose the proxy set.

    ``ecos`` smooths the counts into a density over the pool's embeddings (``smooth_counts``) and
    finds the core of it, the densest rows with ``CORE_SHARE`` of the client's images. Each cluster
    gets a quota in proportion to the density of its core rows (``water_fill``), filled by diverse
    ones of them. A core with fewer rows than asked for is taken whole, and the next densest rows
    fill up: the size is always reached.
    ``random`` and ``all`` are the baselines; they need no counts.

    Args:
        noisy_counts: [R], the client's answer; None for the baselines.
        assignments: [N] int64, cluster of each row.
        embeddings: [N, d], for the diversity inside a cluster.
        centroids: [R, d].
        size: Rows wanted; all rows if the pool holds fewer.
        strategy: One of ``STRATEGIES``.
        noise_std: Of the counts, in images.
        generator: For ``random``.

    Raises:
        ValueError: An unknown strategy, or ``ecos`` without counts.
    """
    num_rows, num_clusters = len(assignments), len(centroids)
    sizes = torch.bincount(assignments, minlength=num_clusters)
    kept, threshold, num_filled_up = torch.ones(num_clusters, dtype=torch.bool), 0.0, 0
    if strategy == "all":
        indices = torch.arange(num_rows)
    elif strategy == "random":
        indices = torch.randperm(num_rows, generator=generator)[:size]
    elif strategy == "ecos":
        if noisy_counts is None:
            raise ValueError("the strategy ecos needs the client's noisy counts")
        density = smooth_counts(noisy_counts, centroids, sizes, noise_std)
        row_densities = densities(density, embeddings)
        relevant = densest_rows(row_densities, noisy_counts, noise_std, share=1.0)
        core = densest_rows(row_densities, noisy_counts, noise_std, share=CORE_SHARE)
        indices = _from_the_core(row_densities, core, assignments, embeddings, centroids, size)
        num_filled_up = int((~relevant[indices]).sum())
        num_relevant = torch.bincount(assignments[relevant], minlength=num_clusters)
        kept = (num_relevant > 0) & (2 * num_relevant >= sizes)
        edge = row_densities[relevant].min() if relevant.any() else row_densities.max()
        threshold = float(edge) * num_rows / num_clusters
    else:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
    indices = indices.sort().values
    quotas = torch.bincount(assignments[indices], minlength=num_clusters)
    return Selection(indices, quotas, kept, threshold, num_filled_up)


def _from_the_core(
    row_densities: Tensor,
    core: Tensor,
    assignments: Tensor,
    embeddings: Rows,
    centroids: Tensor,
    size: int,
) -> Tensor:
    """Rows [size]: diverse ones of the core, then the next densest."""
    room = torch.bincount(assignments[core], minlength=len(centroids))
    shares = torch.zeros(len(centroids), dtype=torch.float64)
    shares.index_add_(0, assignments[core], row_densities[core])
    quotas = water_fill(shares, room, size)
    picks = diverse_picks(embeddings, assignments, centroids, quotas, candidates=core)
    rest = row_densities.index_fill(0, picks, -torch.inf).argsort(descending=True, stable=True)
    num_missing = min(size, len(rest)) - len(picks)
    return torch.cat([picks, rest[:num_missing]])
