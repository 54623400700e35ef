"""k-means in torch: out of core, on any device, the same bits on any number of ranks.

Rows are float16 as a rule; sums of them in float64 are exact, and so are the same in any order.

Shapes: N rows, d dimensions, R clusters, B rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ecos_pl.exact_float32 import exact_float32
from ecos_pl.kmeans_start import first_centroids, sample_rows
from ecos_pl.nearest import NearestCentroid, block_rows
from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.row_blocks import RowBlocks, Rows, read_rows

_SAMPLES = ((256, 8, 1e-3), (1024, 8, 5e-4))
"""Rows a cluster, iterations at most and tolerance of the samples on which centroids are found
before all rows are read: an iteration on them costs little, and gains nearly as much. Fewer rows a
cluster than 256 would fit their noise, and end 0.1% higher."""

_RELAXATION = 1.7
"""Centroids go so many times as far as their cluster's mean. Up to 2 the inertia cannot rise, as it
is quadratic in the centroid; above 1 fewer iterations are needed, since means lag behind."""

_MOMENTUM = 0.5
"""Share of the last step that is added to the next: a quarter fewer iterations."""


@dataclass(frozen=True)
class Clustering:
    """The result of k-means.

    Attributes:
        centroids: [R, d] float32.
        assignments: [N] int64, the nearest centroid of each row; -1 for NaN rows.
        inertia: Sum over rows of the squared distance to the nearest centroid.
        num_iters: Iterations over all rows that were run.
    """

    centroids: Tensor
    assignments: Tensor
    inertia: float
    num_iters: int


@exact_float32()
def kmeans(
    rows: Rows,
    num_clusters: int,
    *,
    num_iters: int = 25,
    seed: int = 0,
    tolerance: float = 5e-5,
    num_restarts: int = 1,
    start: Tensor | None = None,
    centroid_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    on_iteration: Callable[[int], None] = lambda num_done: None,
) -> Clustering:
    """Lloyd's k-means, begun on samples of the rows.

    A greedy k-means++ start (Arthur & Vassilvitskii 2007) is improved by iterations on growing
    samples (nested mini-batches: Newling & Fleuret, NeurIPS 2016), then by iterations over all
    rows. A cluster that runs empty is moved to the row that lies farthest from its centroid.

    The result depends on the rows, their order and the seed alone, not on the number of ranks.

    Args:
        rows: [N, d]. NaN rows (unreadable images) belong to no cluster.
        num_clusters: Number of clusters ``R``.
        num_iters: Iterations over all rows at most.
        seed: Of the samples and the start.
        tolerance: Stop once an iteration lowers the inertia by less than this share.
        num_restarts: Starts to choose the best of, by the inertia of a sample.
        start: Centroids [R, d] to begin from, in place of samples and k-means++.
        centroid_dtype: float16 rounds the centroids as they travel between parties, and drops
            those that have become equal; assignments are to the rounded ones.
        device: Where distances are computed; rows are brought there block by block.
        ranks: Each reads its share of the rows.
        on_iteration: Called with 1 after each iteration over all rows.

    Raises:
        ValueError: Fewer rows than clusters, or a row that is infinite.
    """
    num_rows = len(rows)
    if not 1 <= num_clusters <= num_rows:
        raise ValueError(f"cannot make {num_clusters} clusters of {num_rows} embeddings")
    centroids = start
    if centroids is None:
        starts = [
            _from_samples(rows, num_clusters, seed + 7919 * i, ranks, device, num_restarts > 1)
            for i in range(num_restarts)
        ]
        centroids = min(starts, key=lambda found: found[1])[0]
    blocks = RowBlocks(rows, block_rows(num_clusters, device), device=device, ranks=ranks)
    centroids, _, done = _lloyd(
        blocks,
        centroids.to(device).float(),
        num_iters=num_iters,
        tolerance=tolerance,
        accelerate=start is None,
        on_iteration=on_iteration,
    )
    if centroid_dtype != torch.float32:
        centroids = torch.unique(centroids.to(centroid_dtype).float(), dim=0)
        blocks = RowBlocks(rows, block_rows(len(centroids), device), device=device, ranks=ranks)
    final = _Clusters(blocks, len(centroids))
    inertia = final.assign(centroids, keep_sums=False)
    assignments = ranks.concat(final.assignments.cpu()).long()
    return Clustering(centroids.cpu(), assignments, inertia, done)


def _from_samples(
    rows: Rows, num_clusters: int, seed: int, ranks: Ranks, device: torch.device | str, judge: bool
) -> tuple[Tensor, float]:
    """Centroids [R, d] found on samples, and their inertia a row in the last, if asked to judge."""
    first = None
    if ranks.is_first:  # a sum that another machine rounds otherwise could draw other rows
        chosen = sample_rows(len(rows), min(len(rows), max(16 * num_clusters, 8192)), seed)
        sample = read_rows(rows, chosen).to(device).float()
        sample = sample[~sample.isnan().any(dim=1)]
        first = first_centroids(sample, num_clusters, seed).cpu()
    centroids, mean = ranks.broadcast(first).to(device), math.inf
    stages: list[tuple[float, int, float]]
    stages = [stage for stage in _SAMPLES if stage[0] * num_clusters <= 0.6 * len(rows)]
    if judge and not stages:
        stages = [(len(rows) / num_clusters, 25, 1e-4)]
    for rows_a_cluster, num_iters, tolerance in stages:
        chosen = sample_rows(len(rows), round(rows_a_cluster * num_clusters), seed)
        blocks = RowBlocks(
            rows, block_rows(num_clusters, device), device=device, ranks=ranks, chosen=chosen
        )
        centroids, inertia, _ = _lloyd(
            blocks, centroids, num_iters=num_iters, tolerance=tolerance, accelerate=True
        )
        mean = inertia / len(chosen)
    return centroids, mean


def _lloyd(
    blocks: RowBlocks,
    centroids: Tensor,
    *,
    num_iters: int,
    tolerance: float,
    accelerate: bool,
    on_iteration: Callable[[int], None] = lambda num_done: None,
) -> tuple[Tensor, float, int]:
    """Centroids [R, d] after some iterations, the inertia before the last, and their number."""
    clusters = _Clusters(blocks, len(centroids))
    inertia, done = math.inf, 0
    step = torch.zeros_like(centroids)
    for done in range(1, num_iters + 1):
        new_inertia = clusters.assign(centroids)
        means, empty = clusters.means()
        on_iteration(1)
        gain, inertia = inertia - new_inertia, new_inertia
        if done == num_iters or (not len(empty) and gain <= tolerance * inertia):
            return means, inertia, done
        if not accelerate or done == 1:  # the first means are far from the start
            centroids = means
            continue
        step = (_MOMENTUM * step).add_(means - centroids, alpha=_RELAXATION)
        step[empty] = means[empty] - centroids[empty]
        centroids = centroids + step
        step[empty] = 0
    return centroids, inertia, done


class _Clusters:
    """Who belongs where, and the sums of each cluster.

    The sums are kept from one iteration to the next, and changed by the rows that changed cluster:
    exact for float16 rows, so that they are what a sum over all rows would be.
    """

    def __init__(self, blocks: RowBlocks, num_clusters: int) -> None:
        self._blocks, self._device = blocks, blocks.device
        # Slot 0 takes NaN rows, and is never read.
        self._slots = torch.zeros(len(blocks), dtype=torch.int32, device=self._device)
        self._norms = torch.zeros(len(blocks), device=self._device)
        self._distances = torch.zeros(len(blocks), device=self._device)
        self._sums = torch.zeros(
            num_clusters + 1, blocks.num_dims, dtype=torch.float64, device=self._device
        )
        self._counts = torch.zeros(num_clusters + 1, dtype=torch.int64, device=self._device)
        self._is_new = True

    @property
    def assignments(self) -> Tensor:
        """Cluster [n] int32 of this rank's rows; -1 for NaN rows."""
        return self._slots - 1

    def assign(self, centroids: Tensor, *, keep_sums: bool = True) -> float:
        """Bring each row to its nearest centroid [R, d]; returns the inertia of all rows.

        Raises:
            ValueError: A row is infinite.
        """
        nearest = NearestCentroid(centroids)
        inertias = self._blocks.zeros_by_block()
        for number, (place, block) in enumerate(self._blocks):
            if self._is_new:
                self._norms[place] = block.square().sum(dim=1)
            index, distances = nearest(block, self._norms[place])
            inertias[number] = distances.sum(dtype=torch.float64)
            self._distances[place] = distances
            slots = index.add_(1).int()
            if keep_sums:
                self._move(block, self._slots[place], slots)
            self._slots[place] = slots
        self._is_new = False
        inertia = float(self._blocks.ranks.concat(inertias).sum())  # of blocks: in one order
        if not math.isfinite(inertia):
            raise ValueError("an embedding is not finite")
        return inertia

    def _move(self, block: Tensor, before: Tensor, after: Tensor) -> None:
        if (
            not self._is_new and block.device.type == "cpu"
        ):  # elsewhere it would wait for the device
            moved = torch.nonzero(before != after).flatten()
            block, before, after = block[moved], before[moved], after[moved]
        exact, ones = block.double(), torch.ones_like(after, dtype=torch.int64)
        if not self._is_new:
            self._sums.index_add_(0, before, exact, alpha=-1)
            self._counts.index_add_(0, before, ones, alpha=-1)
        self._sums.index_add_(0, after, exact)
        self._counts.index_add_(0, after, ones)

    def means(self) -> tuple[Tensor, Tensor]:
        """The clusters' means [R, d] float32, and which were empty, so that a row stands in.

        Raises:
            ValueError: There are fewer rows, NaN rows aside, than clusters.
        """
        ranks = self._blocks.ranks
        sums, counts = ranks.sum(self._sums)[1:], ranks.sum(self._counts)[1:]
        num_known = int(counts.sum())
        if num_known < len(counts) and not self._blocks.is_sample:
            raise ValueError(f"cannot make {len(counts)} clusters of {num_known} embeddings")
        means = (sums / counts.clamp_min(1)[:, None]).float()
        empty = torch.nonzero(counts == 0).flatten()
        if len(empty):
            rows = self._blocks.read(self._farthest(len(empty)))
            means[empty[: len(rows)]] = rows
        return means, empty

    def _farthest(self, number: int) -> Tensor:
        """Numbers of the rows that lie farthest from their centroids, of all ranks.

        Farthest first; the first row among those equally far.
        """
        values = self._distances
        if number < len(values):
            last = values.topk(number).values[-1]
            above, equal = torch.nonzero(values > last), torch.nonzero(values == last)
            places = torch.cat([above, equal[: number - len(above)]]).flatten()
        else:
            places = torch.arange(len(values), device=values.device)
        ranks, known = self._blocks.ranks, self._slots[places] > 0
        places = places[known]
        numbers = ranks.concat((places + self._blocks.first).cpu())
        distances = ranks.concat(values[places].cpu())
        order = np.lexsort((numbers.numpy(), -distances.numpy()))[:number]
        return numbers[torch.from_numpy(order)]
