"""Noisy counts per cluster → an estimate of the client's density at any point, by public geometry.

Where the client has images, it has some in the neighbouring clusters too. A Gaussian process over
the centroids knows that: it lets the counts of neighbours confirm each other, so that images can
be found whose own cluster's count drowns in the noise. All of it is post-processing of one
release with its noise level public, so it costs no privacy.

Shapes: R clusters, d dimensions, M inducing centroids, B rows of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MAX_INDUCING = 1024
"""Centroids that carry the process at most: its cost is cubic in them."""

LENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Length scales tried, in median distances between neighbouring centroids."""

SIGNALS = tuple(4.0**step for step in range(-3, 10))
"""Signal variances tried, in noise variances of a count (means over the clusters)."""

ROUNDING_VARIANCE = 1 / 12
"""Least noise variance of a count: it is a whole number."""

CHUNK_ROWS = 4096
"""Clusters whose covariances are in memory at once."""

_JITTER = 1e-8


@dataclass(frozen=True)
class ClientDensity:
    """Estimated client images per pool image, as a function of the place: the posterior mean.

    Attributes:
        points: [M, d], inducing centroids.
        coefficients: [M], of the kernels around them.
        length_scale: Of the kernel, in units of the embedding.
        signal_variance: Prior variance of the density.
        log_evidence: Log marginal likelihood of the noisy counts under these two.
    """

    points: Tensor
    coefficients: Tensor
    length_scale: float
    signal_variance: float
    log_evidence: float

    def __call__(self, rows: Tensor) -> Tensor:
        """Density [B] at rows [B, d]; around zero, on either side, far from the client.

        In the precision and on the device of ``points``: float64 on the CPU as estimated. Takes
        ``3 · B · M`` numbers of memory: large tables come in chunks (``densest_rows.densities``).
        """
        distances = _distances(rows.to(self.points), self.points)
        return matern(distances, self.length_scale) @ self.coefficients

    def to(self, device: torch.device | str, dtype: torch.dtype) -> ClientDensity:
        """The same density, computed elsewhere or in another precision."""
        return replace(
            self,
            points=self.points.to(device, dtype),
            coefficients=self.coefficients.to(device, dtype),
        )


def matern(distances: Tensor, length_scale: float) -> Tensor:
    """Matérn kernel with ν = 3/2 (Rasmussen and Williams 2006, eq. 4.17), 1 at distance zero."""
    scaled = distances * (math.sqrt(3) / length_scale)
    decay = torch.exp(-scaled)
    return scaled.add_(1).mul_(decay)


def smooth_counts(
    noisy_counts: Tensor,
    centroids: Tensor,
    sizes: Tensor,
    noise_std: float,
    *,
    lengths: tuple[float, ...] = LENGTHS,
    signals: tuple[float, ...] = SIGNALS,
) -> ClientDensity:
    """Estimate the client's density, relative to the pool's, from its noisy counts.

    The model: cluster r with s_r pool images holds ``y_r = s_r · w(c_r) + noise`` client images,
    where the noise has the known standard deviation σ and the density ratio w is a priori a
    Gaussian process of mean zero (most of the pool is irrelevant) with Matérn covariance over the
    embedding. Length scale and signal variance are those of a fixed grid under which the noisy
    counts are most likely (empirical Bayes: Rasmussen and Williams 2006, section 5.4.1). With
    more than ``MAX_INDUCING`` centroids, w is spanned by kernels around as many of them, spread
    out (subset of regressors, section 8.3.1).

    Args:
        noisy_counts: [R], negative ones included: clipping them would bias the estimate.
        centroids: [R, d].
        sizes: [R], pool images of each cluster.
        noise_std: Of each count, in images.
        lengths: Length scales tried, see ``LENGTHS``.
        signals: Signal variances tried, see ``SIGNALS``.

    Raises:
        ValueError: The lengths of the three tables differ, or no cluster holds an image.
    """
    counts, centers, sizes = noisy_counts.double(), centroids.double(), sizes.double()
    if not len(counts) == len(centers) == len(sizes):
        raise ValueError("noisy_counts, centroids and sizes must have one row per cluster each")
    if float(sizes.sum()) <= 0:
        raise ValueError("no cluster holds a pool image")
    points = _spread_out(centers, min(len(centers), MAX_INDUCING))
    inner = torch.cdist(points, points)
    noise_variance = max(noise_std**2, ROUNDING_VARIANCE)
    signal = torch.tensor(signals, dtype=torch.float64)
    best: ClientDensity | None = None
    for length in lengths:
        length_scale = length * _typical_spacing(inner)
        kernel = matern(inner, length_scale)
        kernel.diagonal().add_(_JITTER)
        root = torch.linalg.cholesky(kernel)
        gram = torch.zeros_like(kernel)
        seen = torch.zeros(len(points), dtype=torch.float64)
        for some, many, answer in zip(
            *(torch.split(table, CHUNK_ROWS) for table in (centers, sizes, counts)), strict=True
        ):
            # Features [M, B] whose products are the covariances of the counts at unit signal
            # variance.
            between = matern(torch.cdist(points, some), length_scale)
            features = torch.linalg.solve_triangular(root, between, upper=False).mul_(many)
            gram.addmm_(features, features.T)
            seen.addmv_(features, answer)
        values, vectors = torch.linalg.eigh(gram)
        values = values.clamp_min(0)
        projected = vectors.T @ seen  # [M]
        # Signal variances at which a count varies by so many noise variances on average.
        variances = signal * (noise_variance * len(counts) / values.sum())  # [S]
        spectrum = variances[:, None] * values + noise_variance  # [S, M]
        explained = (variances[:, None] * projected.square() / spectrum).sum(dim=1)
        log_evidence = -0.5 * (
            (counts.square().sum() - explained) / noise_variance
            + spectrum.log().sum(dim=1)
            + (len(counts) - len(points)) * math.log(noise_variance)
            + len(counts) * math.log(2 * math.pi)
        )
        place = int(log_evidence.argmax())
        if best is None or float(log_evidence[place]) > best.log_evidence:
            weights = vectors @ (variances[place] * projected / spectrum[place])
            coefficients = torch.linalg.solve_triangular(root.T, weights[:, None], upper=True)
            best = ClientDensity(
                points,
                coefficients.flatten(),
                length_scale,
                float(variances[place]),
                float(log_evidence[place]),
            )
    assert best is not None
    return best


def _typical_spacing(distances: Tensor) -> float:
    """Median distance to the nearest other centroid; 1 for a single centroid."""
    if len(distances) < 2:
        return 1.0
    nearest = distances.clone().fill_diagonal_(torch.inf).min(dim=1).values
    return max(float(nearest.median()), torch.finfo(torch.float32).eps)


def _distances(rows: Tensor, points: Tensor) -> Tensor:
    """Euclidean distances [B, M] by one matrix product.

    Around the points' mean: in float32 the difference of large squares would drown small distances.
    """
    center = points.mean(dim=0)
    rows, points = rows - center, points - center
    squares = torch.addmm(points.square().sum(dim=1), rows, points.T, alpha=-2)
    return squares.add_(rows.square().sum(dim=1, keepdim=True)).clamp_min_(0).sqrt_()


def _spread_out(centers: Tensor, number: int) -> Tensor:
    """All centroids, or so many of them by farthest-first traversal."""
    if number == len(centers):
        return centers
    chosen = [int((centers - centers.mean(dim=0)).square().sum(dim=1).argmax())]
    closest = torch.full((len(centers),), torch.inf, dtype=torch.float64)
    while len(chosen) < number:
        closest = closest.minimum((centers - centers[chosen[-1]]).square().sum(dim=1))
        chosen.append(int(closest.argmax()))
    return centers[chosen]
