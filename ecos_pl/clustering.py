"""PCA, k-means and nearest-centroid assignment in torch: chunked, on any device.

Shapes: N rows, D input dimensions, d kept dimensions, R clusters, B rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Rows = Tensor | npt.NDArray[np.floating]
"""Embeddings [N, d]: a tensor, an array or a memory map; read a chunk at a time."""

CHUNK_ROWS = 16_384

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that share the rows; the identity where there is one."""


@dataclass(frozen=True)
class Projection:
    """An affine map to fewer dimensions: ``(x - mean) @ components.T``.

    Attributes:
        mean: [D] float32.
        components: [d, D] float32; orthonormal rows for PCA, scaled ones for whitening.
        variances: [d] float32, the variance of each projected dimension, descending.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Project [B, D] to [B, d] float32."""
        return (embeddings.float() - self.mean) @ self.components.T

    def rounded(self) -> Projection:
        """The map as it travels in float16, so that both parties apply the same one."""
        return Projection(self.mean.half().float(), self.components.half().float(), self.variances)

    def whitened(self, floor: float = 1e-3) -> Projection:
        """The same map with every dimension scaled to variance one.

        Args:
            floor: Dimensions with less than this share of the largest variance are scaled by the
                floor instead: they hold rounding, not signal.
        """
        scale = self.variances.clamp_min(floor * float(self.variances[0])).rsqrt()
        return Projection(self.mean, self.components * scale[:, None], self.variances * scale**2)


@dataclass(frozen=True)
class Clustering:
    """The result of k-means.

    Attributes:
        centroids: [R, d] float32.
        assignments: [N] int64, the nearest centroid of each row.
        inertia: Sum over rows of the squared distance to the nearest centroid.
        num_iters: Lloyd iterations that were run.
    """

    centroids: Tensor
    assignments: Tensor
    inertia: float
    num_iters: int


def fit_pca(chunks: Iterable[Rows], num_dims: int, *, reduce: Reduce = lambda x: x) -> Projection:
    """Principal components of rows that stream by in chunks [B, D].

    Products are summed in float32 inside a chunk and in float64 between chunks. Component signs
    are fixed (the entry of largest magnitude is positive).

    Args:
        chunks: The rows; NaN rows (unreadable images) are left out.
        num_dims: Dimensions kept, at most min(N, D).
        reduce: Adds up the sums of several processes.

    Raises:
        ValueError: There is no row.
    """
    moments: Tensor | None = None  # [D + 1, D + 1]: count, sums and products in one matrix
    for chunk in chunks:
        rows = _as_tensor(chunk).float()
        rows = rows[~rows.isnan().any(dim=1)]
        rows = torch.nn.functional.pad(rows, (1, 0), value=1.0)
        products = (rows.T @ rows).double()
        moments = products if moments is None else moments.add_(products)
    if moments is None:
        raise ValueError("no embeddings to find principal components of")
    moments = reduce(moments)
    count = float(moments[0, 0])
    if count < 1:
        raise ValueError("no embeddings to find principal components of")
    mean = moments[0, 1:] / count
    covariance = moments[1:, 1:] / count - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)
    num_dims = min(num_dims, len(values), max(1, int(count)))
    components = vectors.flip(1)[:, :num_dims].T
    signs = components.gather(1, components.abs().argmax(dim=1, keepdim=True)).sign()
    variances = values.flip(0)[:num_dims].clamp_min(0)
    return Projection(mean.float(), (components * signs).float(), variances.float())


def assign(embeddings: Rows, centroids: Tensor, *, device: torch.device | str = "cpu") -> Tensor:
    """Index [N] int64 of the nearest centroid (Euclidean; ties go to the lowest index)."""
    centroids = centroids.to(device).float()
    parts = [_nearest(chunk, centroids)[0].cpu() for chunk in _chunks(embeddings, device)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def kmeans(
    embeddings: Rows,
    num_clusters: int,
    *,
    num_iters: int = 25,
    seed: int = 0,
    tolerance: float = 1e-4,
    start: Tensor | None = None,
    device: torch.device | str = "cpu",
    on_iteration: Callable[[int], None] = lambda num_done: None,
) -> Clustering:
    """Lloyd's k-means from a greedy k-means++ start (Arthur & Vassilvitskii 2007).

    The start is drawn from the *values* of the rows and the seed, not from their positions, so
    the order of the pool does not matter. A cluster that runs empty is moved to the row that lies
    farthest from its centroid.

    Args:
        embeddings: [N, d].
        num_clusters: Number of clusters ``R``.
        num_iters: Iterations at most.
        seed: Of the start.
        tolerance: Stop once an iteration lowers the inertia by less than this share.
        start: Centroids [R, d] to begin from, in place of k-means++.
        device: Where distances are computed; rows are brought there chunk by chunk.
        on_iteration: Called with 1 after each iteration.

    Raises:
        ValueError: Fewer rows than clusters, or a row that is not finite.
    """
    num_rows = len(embeddings)
    if not 1 <= num_clusters <= num_rows:
        raise ValueError(f"cannot make {num_clusters} clusters of {num_rows} embeddings")
    centroids = start if start is not None else _plus_plus(embeddings, num_clusters, seed, device)
    centroids = centroids.to(device).float()
    inertia, done = math.inf, 0
    for done in range(1, num_iters + 1):  # noqa: B007
        sums, counts, new_inertia, far = _statistics(embeddings, centroids, device)
        if not math.isfinite(new_inertia):
            raise ValueError("an embedding is not finite")
        means = sums / counts.clamp_min(1)[:, None]
        empty = torch.nonzero(counts == 0).flatten()
        means[empty] = far[: len(empty)].to(means)
        centroids = means.float()
        on_iteration(1)
        if not len(empty) and inertia - new_inertia <= tolerance * new_inertia:
            break
        inertia = new_inertia
    assignments, final = [], torch.zeros((), dtype=torch.float64, device=device)
    for chunk in _chunks(embeddings, device):
        nearest, distances = _nearest(chunk, centroids)
        assignments.append(nearest.cpu())
        final += distances.double().sum()
    return Clustering(centroids.cpu(), torch.cat(assignments), float(final), done)


def _chunks(embeddings: Rows, device: torch.device | str) -> Iterator[Tensor]:
    for first in range(0, len(embeddings), CHUNK_ROWS):
        chunk = embeddings[first : first + CHUNK_ROWS]
        yield _as_tensor(chunk).to(device).float()


def _as_tensor(rows: Rows) -> Tensor:
    # A copy: a memory map may be read-only, which tensors cannot be.
    return rows.detach() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))


def _nearest(chunk: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest centroid [B] and squared distance [B] to it, by one matrix product."""
    half_norms = 0.5 * centroids.square().sum(dim=1)
    scores, nearest = torch.addmm(half_norms, chunk, centroids.T, alpha=-1).min(dim=1)  # (B, R)
    distances = (chunk.square().sum(dim=1) + 2 * scores).clamp_min(0)
    return nearest, distances


def _statistics(
    embeddings: Rows, centroids: Tensor, device: torch.device | str
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Sums [R, d] float64, counts [R] int64, inertia, and the R farthest rows, farthest first."""
    num_clusters, num_dims = centroids.shape
    sums = torch.zeros(num_clusters, num_dims, dtype=torch.float64, device=device)
    counts = torch.zeros(num_clusters, dtype=torch.int64, device=device)
    far_rows = torch.empty(0, num_dims, device=device)
    far_distances = torch.empty(0, device=device)
    inertia = torch.zeros((), dtype=torch.float64, device=device)  # no sync until all is queued
    for chunk in _chunks(embeddings, device):
        nearest, distances = _nearest(chunk, centroids)
        sums.index_add_(0, nearest, chunk.double())
        counts += torch.bincount(nearest, minlength=num_clusters)
        inertia += distances.double().sum()
        far_distances, order = torch.cat([far_distances, distances]).topk(
            min(num_clusters, len(far_distances) + len(distances))
        )
        far_rows = torch.cat([far_rows, chunk])[order]
    return sums, counts, float(inertia), far_rows


def _plus_plus(
    embeddings: Rows, num_clusters: int, seed: int, device: torch.device | str
) -> Tensor:
    """Greedy k-means++ centroids [R, d] on a sample of the rows.

    Each step draws several candidates with probability proportional to the squared distance and
    keeps the one that lowers the inertia most, as scikit-learn does.
    """
    sample = _sample_by_value(embeddings, max(64 * num_clusters, 4096), seed).to(device)
    generator = torch.Generator().manual_seed(seed)
    num_trials = 2 + int(math.log(num_clusters))
    centroids = torch.empty(num_clusters, sample.shape[1], device=device)
    first = int(torch.randint(len(sample), (1,), generator=generator))
    centroids[0] = sample[first]
    norms = sample.square().sum(dim=1)
    closest = (norms + norms[first] - 2 * (sample @ sample[first])).clamp_min(0)
    for index in range(1, num_clusters):
        cumulative = closest.double().cumsum(0)
        draws = torch.rand(num_trials, generator=generator, dtype=torch.float64).to(device)
        picks = torch.searchsorted(cumulative, draws * cumulative[-1]).clamp_max(len(sample) - 1)
        products = sample[picks] @ sample.T  # (trials, sample)
        distances = (norms[picks, None] + norms - 2 * products).clamp_min(0).minimum(closest)
        best = distances.double().sum(dim=1).argmin()
        closest = distances[best]
        centroids[index] = sample[picks[best]]
    return centroids


def _sample_by_value(embeddings: Rows, size: int, seed: int) -> Tensor:
    """At most ``size`` rows, chosen and ordered by a seeded hash of their values."""
    generator = np.random.default_rng(seed)
    num_dims = embeddings.shape[1]
    multipliers = generator.integers(1, 2**63, num_dims, dtype=np.uint64) | np.uint64(1)
    rows, keys = np.empty((0, num_dims), np.float32), np.empty(0, np.uint64)
    for chunk in _chunks(embeddings, "cpu"):
        values = chunk.numpy() + np.float32(0)  # -0.0 and 0.0 are the same value
        words = values.view(np.uint32).astype(np.uint64)
        hashed = (words * multipliers).sum(axis=1, dtype=np.uint64)
        hashed ^= hashed >> np.uint64(33)
        hashed *= np.uint64(0xFF51AFD7ED558CCD)  # the finaliser of MurmurHash3
        hashed ^= hashed >> np.uint64(33)
        keys, rows = np.concatenate([keys, hashed]), np.concatenate([rows, values])
        smallest = np.argsort(keys, kind="stable")[:size]
        keys, rows = keys[smallest], rows[smallest]
    return torch.from_numpy(rows)
