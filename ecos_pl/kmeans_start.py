"""First centroids for k-means: greedy k-means++ on a sample of the rows.

Shapes: n rows of the sample, d dimensions, R centroids.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_MOST_TRIALS = 6

_MANY = 2048
"""Above so many centroids, the rows are drawn at random: k-means++ would take R passes."""


def sample_rows(num_rows: int, size: int, seed: int) -> npt.NDArray[np.int64]:
    """``size`` different row numbers, ascending: a random one of each of as many equal parts."""
    edges = np.arange(size + 1) * num_rows // size
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def first_centroids(sample: Tensor, num_centroids: int, seed: int) -> Tensor:
    """Centroids [R, d] among the rows of a sample [n, d], some twice if n < R.

    Raises:
        ValueError: The sample is empty.
    """
    if not len(sample):
        raise ValueError("no embeddings to cluster")
    if num_centroids <= _MANY:
        return _plus_plus(sample, num_centroids, seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(sample), generator=generator)
    return sample[order.repeat(-(-num_centroids // len(sample)))[:num_centroids]]


def _plus_plus(sample: Tensor, num_centroids: int, seed: int) -> Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007).

    Each step draws candidates with probability proportional to the squared distance and keeps the
    one that lowers the inertia most, as scikit-learn does.
    """
    generator = torch.Generator().manual_seed(seed)
    num_trials = min(_MOST_TRIALS, 2 + int(math.log(num_centroids)))
    chosen = torch.empty(num_centroids, dtype=torch.int64, device=sample.device)
    chosen[0] = torch.randint(len(sample), (), generator=generator)
    norms = sample.square().sum(dim=1)
    closest = _distances(sample, norms, chosen[:1])[0]
    for index in range(1, num_centroids):
        cumulative = closest.double().cumsum(0)
        draws = torch.rand(num_trials, generator=generator, dtype=torch.float64)
        wanted = draws.to(sample.device) * cumulative[-1]
        picks = torch.searchsorted(cumulative, wanted).clamp_max(len(sample) - 1)
        distances = _distances(sample, norms, picks).minimum(closest)  # (trials, n)
        best = distances.sum(dim=1, dtype=torch.float64).argmin()
        closest = distances[best]
        chosen[index] = picks[best]
    return sample[chosen]


def _distances(sample: Tensor, norms: Tensor, picks: Tensor) -> Tensor:
    """Squared distances [p, n] of the rows picked [p] to all rows."""
    products = sample[picks] @ sample.T
    return (norms[picks, None] + norms - 2 * products).clamp_min_(0)
