"""From noisy coverage counts to the rows of the pool that make the proxy set.

Shapes: N pool rows, R clusters, d embedding dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from ecos_pl.clustering import Rows

STRATEGIES = ("ecos", "random", "all")

FALSE_CLUSTERS = 1.0
"""Irrelevant clusters that may pass the threshold by noise alone, expected over all R."""


@dataclass(frozen=True)
class Selection:
    """Which rows were chosen, and how.

    Attributes:
        indices: [size] int64, chosen rows, ascending and unique.
        quotas: [R] int64, rows taken from each cluster.
        kept: [R] bool, clusters whose noisy count passed the threshold.
        threshold: Smallest noisy count that is kept, in images (0 where no count was asked for).
        num_filled_up: Rows taken from clusters below the threshold to reach the size.
    """

    indices: Tensor
    quotas: Tensor
    kept: Tensor
    threshold: float
    num_filled_up: int


def default_num_clusters(pool_size: int, noise_std: float) -> int:
    """Number of clusters R to ask about, when the user gives none.

    More clusters separate domains better, but spread the client's images thinner while the noise
    on each count stays the same. Two bounds, the smaller one rules: 50 pool images a cluster, so
    that there is something to choose from, and ``1000 / noise_std``, so that a client of some
    1,000 images whose distribution fills an eighth of the clusters leaves about eight noise
    standard deviations in each of them. Nothing private enters. Between 2 and 1,000.

    >>> default_num_clusters(14_000, 5.0), default_num_clusters(300, 5.0)
    (200, 6)
    """
    return max(2, min(round(pool_size / 50), round(1000 / noise_std), 1000))


def count_threshold(num_clusters: int, noise_std: float) -> float:
    """Noisy count above which a cluster is kept, in images.

    With ``z`` the normal quantile of ``1 - FALSE_CLUSTERS / R``, a cluster that holds no client
    image passes ``z * noise_std`` with probability ``FALSE_CLUSTERS / R``: one false cluster is
    expected in all, however many are asked about. At least half an image.

    >>> round(count_threshold(200, 5.0), 2)
    12.88
    """
    tail = min(0.5, FALSE_CLUSTERS / num_clusters)
    return max(0.5, noise_std * NormalDist().inv_cdf(1 - tail))


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
    embeddings: Rows, assignments: Tensor, centroids: Tensor, quotas: Tensor
) -> Tensor:
    """Rows [sum(quotas)] that cover each cluster: the most central one, then farthest first.

    Gonzalez' greedy k-center, in all clusters at once: a round adds one row to every cluster
    that still has room, and only distances to that newest row are computed.

    Args:
        embeddings: [N, d], finite.
        assignments: [N] int64 in [0, R).
        centroids: [R, d].
        quotas: [R] int64, none above its cluster's size.
    """
    quotas = quotas.clone()
    active = torch.nonzero(quotas[assignments] > 0).flatten()
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

    ``ecos`` keeps the clusters whose noisy count passes ``count_threshold``, gives each a quota
    in proportion to its count (``water_fill``) and takes diverse rows of it. Where the kept
    clusters hold fewer rows than asked for, the next-best clusters fill up. ``random`` and
    ``all`` are the baselines; they need no counts.

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
        threshold = count_threshold(num_clusters, noise_std)
        kept = noisy_counts >= threshold
        quotas = water_fill(torch.where(kept, noisy_counts, 0), sizes, size)
        num_filled_up = min(size, num_rows) - int(quotas.sum())
        best_first = torch.where(kept, -torch.inf, noisy_counts.double()).argsort(
            descending=True, stable=True
        )
        room = torch.where(kept, 0, sizes)[best_first].cumsum(0)
        extra = room.clamp_max(num_filled_up).diff(prepend=torch.zeros(1, dtype=room.dtype))
        quotas[best_first] += extra
        indices = diverse_picks(embeddings, assignments, centroids, quotas)
    else:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
    indices = indices.sort().values
    quotas = torch.bincount(assignments[indices], minlength=num_clusters)
    return Selection(indices, quotas, kept, threshold, num_filled_up)
