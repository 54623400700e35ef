"""From noisy coverage counts to the rows of the pool that make the proxy set.

Shapes: N pool rows, R clusters, d embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.count_smoothing import smooth_counts
from ecos_pl.densest_rows import densest_rows, densities, next_densest
from ecos_pl.diverse_picks import diverse_picks
from ecos_pl.k_center import KCenter
from ecos_pl.model_aware_k_center import ModelAwareKCenter
from ecos_pl.near_duplicates import DUPLICATE_DISTANCE, DistinctRows
from ecos_pl.nearest_to_client import NearestInTurn
from ecos_pl.row_blocks import Rows

STRATEGIES = (
    *("ecos", "random", "all", "oracle"),
    *("cluster_uniform", "k_center", "mak", "nearest"),
)

NOT_PRIVATE = ("mak", "nearest")
"""Strategies that read the client's embeddings: only a simulated client can be asked for them."""

CORE_SHARE = 0.75
"""Share of the client's images that the core of its density holds; the rest is spread thinly."""

COUNTED_ROWS = 2**20
"""Rows counted, or looked at in the order of the pool, at once."""

Indices = npt.NDArray[np.int64]


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
        num_duplicates: Rows that would have been taken, but are near-duplicates of ones that were.

    A row is relevant if it belongs to the densest ones that hold all of the client's images (see
    ``densest_rows``).
    """

    indices: Tensor
    quotas: Tensor
    kept: Tensor
    threshold: float
    num_filled_up: int
    num_duplicates: int


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


def select(
    noisy_counts: Tensor | None,
    assignments: Tensor | npt.NDArray[np.integer],
    embeddings: Rows,
    centroids: Tensor,
    *,
    size: int,
    strategy: str,
    noise_std: float,
    generator: torch.Generator,
    full_embeddings: Rows | None = None,
    candidates_per_pick: float | None = None,
    duplicate_distance: float = DUPLICATE_DISTANCE,
    among: Indices | None = None,
    client: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Selection:
    """Choose the proxy set.

    ``ecos`` smooths the counts into a density over the pool's embeddings (``smooth_counts``) and
    finds the core of it, the densest rows with ``CORE_SHARE`` of the client's images. Each cluster
    gets a quota in proportion to the density of its core rows (``water_fill``), filled by diverse
    ones of them. A core with fewer rows than asked for is taken whole, and the next densest rows
    fill up: the size is always reached. Of many more rows than are needed the diverse ones are the
    odd ones, and kinds of images that vary little come too short; ``candidates_per_pick`` bounds
    how many there are to choose from.

    The others are baselines and need no counts. ``all`` and ``random`` look at nothing;
    ``cluster_uniform`` takes equally many from each cluster, at random, and what a small cluster
    lacks from all others; ``k_center`` takes rows that lie far apart (`KCenter`). Upper lines for
    simulations: ``oracle`` is random among rows that somebody knows to be of the client's domain;
    ``nearest`` (`NearestInTurn`) and ``mak`` (`ModelAwareKCenter`) read the client's embeddings.

    Of near-duplicates among the chosen rows the one chosen first stays (for ``all``: the first of
    the pool), and the next rows take the others' places: larger quotas, then the next densest
    rows; more of the strategy's order; none for ``all``.

    Takes about 16 bytes of memory a row, up to 24 for ``random``, 48 for ``cluster_uniform``, as
    much for each row of the core with ``candidates_per_pick``, and chunks; besides, what `KCenter`
    and `NearestInTurn` say.

    Args:
        noisy_counts: [R], the client's answer; None for the baselines.
        assignments: [N] integers, cluster of each row; -1: an unreadable image, never chosen.
        embeddings: [N, d], for the diversity inside a cluster; NaN rows of unreadable images.
        centroids: [R, d].
        size: Rows wanted; all distinct rows if the pool holds fewer.
        strategy: One of ``STRATEGIES``.
        noise_std: Of the counts, in images.
        generator: For the strategies that draw: all baselines but ``all`` and ``mak``, and ``ecos``
            with ``candidates_per_pick``.
        full_embeddings: [N, D] unit rows of which ``embeddings`` are an orthogonal projection:
            near-duplicates are told by them. None: by ``embeddings``.
        candidates_per_pick: Rows of a cluster's core, drawn at random, for each of its quota; the
            rest of the core comes after them. None: all of the core, for ``ecos``.
        duplicate_distance: Images this near or nearer are near-duplicates; 0: none are.
        among: Rows of the client's domain, for ``oracle``.
        client: [n, d], the client's embeddings in the space of ``embeddings``, for ``NOT_PRIVATE``.
        device: Where densities and distances are computed.

    Raises:
        ValueError: An unknown strategy, one without what it needs, or a negative distance.
    """
    assignments = torch.as_tensor(assignments)
    num_clusters = len(centroids)
    sizes = _cluster_sizes(assignments, num_clusters)
    num_rows = int(sizes.sum())
    distinct = DistinctRows(embeddings, full_embeddings, duplicate_distance, device=device)
    kept, threshold, relevant = torch.ones(num_clusters, dtype=torch.bool), 0.0, None
    if strategy == "ecos":
        if noisy_counts is None:
            raise ValueError("the strategy ecos needs the client's noisy counts")
        density = smooth_counts(noisy_counts, centroids, sizes, noise_std)
        row_densities = densities(density, embeddings, device=device)
        row_densities[assignments < 0] = -torch.inf
        relevant, core = densest_rows(
            row_densities, noisy_counts, noise_std, shares=(1.0, CORE_SHARE)
        )
        shares = _sums_by_cluster(row_densities, core, assignments, num_clusters)
        parts = [core]
        if candidates_per_pick is not None:
            room = _cluster_sizes(assignments[core], num_clusters)
            quotas = water_fill(shares, room, min(size, int(room.sum())))
            wanted = (candidates_per_pick * quotas.double()).ceil()
            parts.insert(0, _drawn(core, assignments, wanted, generator))
        best = _CoreFirst(row_densities, shares, parts, assignments, embeddings, centroids, device)
        chosen, num_duplicates = _take(best, size, distinct)
        num_relevant = _cluster_sizes(assignments[relevant], num_clusters)
        kept = (num_relevant > 0) & (2 * num_relevant >= sizes)
        edge = row_densities[relevant].min() if relevant.any() else row_densities.max()
        threshold = float(edge) * num_rows / num_clusters
    elif strategy in _BASELINES:
        rows = _readable(assignments, num_rows)
        pool = _Pool(rows, assignments, embeddings, size, generator, among, client, device)
        preference = _BASELINES[strategy](pool)
        chosen, num_duplicates = _take(preference, None if strategy == "all" else size, distinct)
    else:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
    indices = torch.from_numpy(np.sort(chosen))
    quotas = _cluster_sizes(assignments[indices], num_clusters)
    num_filled_up = 0 if relevant is None else int((~relevant[indices]).sum())
    return Selection(indices, quotas, kept, threshold, num_filled_up, num_duplicates)


def _cluster_sizes(assignments: Tensor, num_clusters: int) -> Tensor:
    """Rows [R] of each cluster, without those of none."""
    sizes = torch.zeros(num_clusters + 1, dtype=torch.int64)
    for part in torch.split(assignments, COUNTED_ROWS):
        sizes += torch.bincount(part + 1, minlength=num_clusters + 1)
    return sizes[1:]


def _readable(assignments: Tensor, num_rows: int) -> Indices:
    if num_rows == len(assignments):
        return np.arange(num_rows)
    return np.flatnonzero(assignments.numpy() >= 0)


class _Preference(Protocol):
    """Rows of the pool from the best to the worst."""

    def more(self, number: int) -> Indices:
        """About so many further rows; none if there are no more."""


class _Listed:
    """An order of preference that is at hand."""

    def __init__(self, rows: Indices) -> None:
        self._rows = rows

    def more(self, number: int) -> Indices:
        given, self._rows = self._rows[:number], self._rows[number:]
        return given


def _sums_by_cluster(
    values: Tensor, marked: Tensor, assignments: Tensor, num_clusters: int
) -> Tensor:
    """Sum [R] float64 of the values of each cluster's marked rows."""
    sums = torch.zeros(num_clusters, dtype=torch.float64)
    sums.index_add_(0, assignments[marked].long(), values[marked].double())
    return sums


def _drawn(
    marked: Tensor, assignments: Tensor, numbers: Tensor, generator: torch.Generator
) -> Tensor:
    """So many of each cluster's marked rows [N] as the numbers [R] say, or all, at random."""
    places = torch.nonzero(marked).flatten()
    places = places[torch.randperm(len(places), generator=generator)]
    clusters, order = assignments[places].long().sort(stable=True)
    sizes = torch.bincount(clusters, minlength=len(numbers))
    firsts = sizes.cumsum(0) - sizes
    before = torch.arange(len(places)) - firsts[clusters]  # of the same cluster
    kept = torch.zeros_like(marked)
    kept[places[order[before < numbers[clusters]]]] = True
    return kept


class _CoreFirst:
    """Diverse rows of the core by ever larger quotas until it is used up; then the next densest.

    Of its parts, each in the next one, the first is used up before the second.
    """

    def __init__(
        self,
        row_densities: Tensor,
        shares: Tensor,
        parts: Sequence[Tensor],
        assignments: Tensor,
        embeddings: Rows,
        centroids: Tensor,
        device: torch.device | str,
    ) -> None:
        self._densities, self._shares, self._parts = row_densities, shares, list(parts)
        self._table, self._device = (embeddings, assignments, centroids), device
        self._given = np.empty(0, np.int64)
        self._begin()

    def _begin(self) -> None:
        """Begin the next part, from as many rows of each cluster as have been given."""
        _, assignments, centroids = self._table
        self._room = _cluster_sizes(assignments[self._parts[0]], len(centroids))
        self._quotas = _cluster_sizes(assignments[torch.from_numpy(self._given)], len(centroids))
        self._total = len(self._given)

    def more(self, number: int) -> Indices:
        while self._total < int(self._room.sum()) or self._next_part():
            self._total = min(self._total + number, int(self._room.sum()))
            quotas = water_fill(self._shares, self._room, self._total)
            # A cluster whose quota has not grown has nothing new to give.
            asked = torch.where(quotas > self._quotas, quotas, 0)
            picks = diverse_picks(
                *self._table, asked, candidates=self._parts[0], device=self._device
            ).numpy()
            self._quotas = quotas.maximum(self._quotas)
            rows = picks[~np.isin(picks, self._given)]
            if len(rows):
                break
        else:
            rows = next_densest(self._densities, number, self._given)
        self._given = np.concatenate([self._given, rows])
        return rows

    def _next_part(self) -> bool:
        if len(self._parts) == 1:
            return False
        del self._parts[0]
        self._begin()
        return self._total < int(self._room.sum())


def _take(preference: _Preference, size: int | None, distinct: DistinctRows) -> tuple[Indices, int]:
    """The first distinct rows, ``size`` of them or all; and how many near-duplicates they pass."""
    taken, num_taken, num_passed = [np.empty(0, np.int64)], 0, 0
    number = COUNTED_ROWS if size is None else size
    while size is None or num_taken < size:
        rows = preference.more(number)
        if not len(rows):
            break
        kept = distinct(rows)
        if size is not None and num_taken + int(kept.sum()) > size:
            # What comes after the last row taken was never chosen.
            end = int(np.searchsorted(kept.cumsum(), size - num_taken)) + 1
            rows, kept = rows[:end], kept[:end]
        taken.append(rows[kept])
        num_taken += int(kept.sum())
        num_passed += int((~kept).sum())
        if size is not None:
            # The more near-duplicates there are, the farther to look at once.
            number = max(1, (size - num_taken) * (num_taken + num_passed) // max(1, num_taken))
    return np.concatenate(taken), num_passed


@dataclass(frozen=True)
class _Pool:
    """What a baseline may look at; `select` says what each is."""

    rows: Indices  # readable ones, ascending
    assignments: Tensor
    embeddings: Rows
    size: int
    generator: torch.Generator
    among: Indices | None
    client: Tensor | None
    device: torch.device | str

    def shuffled(self, rows: Indices) -> Indices:
        order: Indices = torch.randperm(len(rows), generator=self.generator).numpy()
        return rows[order]

    def shown_by_client(self) -> Tensor:
        if self.client is None:
            raise ValueError(
                f"the strategies {', '.join(NOT_PRIVATE)} need the client's embeddings"
            )
        return self.client


def _all(pool: _Pool) -> _Preference:
    return _Listed(pool.rows)


def _random(pool: _Pool) -> _Preference:
    return _Listed(pool.shuffled(pool.rows))


def _oracle(pool: _Pool) -> _Preference:
    if pool.among is None:
        raise ValueError("the strategy oracle needs the rows of the client's domain")
    return _Listed(pool.shuffled(np.intersect1d(pool.rows, pool.among)))


def _cluster_uniform(pool: _Pool) -> _Preference:
    """First one row of every cluster, then a second one, …: `water_fill` with equal weights."""
    order = pool.shuffled(pool.rows)
    clusters = pool.assignments[torch.from_numpy(order)].numpy()
    order = order[np.argsort(clusters, kind="stable")]
    sizes = np.bincount(clusters)
    rounds = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return _Listed(order[np.argsort(rounds, kind="stable")])


def _k_center(pool: _Pool) -> _Preference:
    return KCenter(pool.embeddings, pool.rows, pool.generator, pool.device)


def _mak(pool: _Pool) -> _Preference:
    client = pool.shown_by_client()
    return ModelAwareKCenter(pool.embeddings, pool.rows, client, pool.size, pool.device)


def _nearest(pool: _Pool) -> _Preference:
    client = pool.shown_by_client()
    return NearestInTurn(pool.embeddings, pool.rows, client, pool.generator, pool.device)


_BASELINES: Mapping[str, Callable[[_Pool], _Preference]] = {
    "random": _random,
    "all": _all,
    "oracle": _oracle,
    "cluster_uniform": _cluster_uniform,
    "k_center": _k_center,
    "mak": _mak,
    "nearest": _nearest,
}
