"""The client's answer: how many of its samples lie nearest to each centroid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.privacy import Release, add_discrete_gaussian, poisson_mask

_CHUNK_SIZE = 256
_LARGEST = 1e100  # squares stay finite in float64


def coverage_counts(embeddings: Tensor, centroids: Tensor) -> Tensor:
    """Count the samples whose nearest centroid (Euclidean) is each centroid.

    Adding or removing one sample changes one count, by one: its bin depends on that sample alone,
    whatever else is in the batch (see `_nearest`).

    Args:
        embeddings: `[n, d]`, the client's; n may be zero.
        centroids: `[R, d]`; of equally near ones the lowest index wins.

    Returns:
        `[R]` int64, true counts: private, for the client's eyes only.

    Raises:
        ValueError: If shapes do not fit, or a value is NaN, infinite or above 1e100.
    """
    return torch.from_numpy(_histogram(*_checked(embeddings, centroids)))


def release_coverage(
    embeddings: Tensor, centroids: Tensor, *, noise_std: float, sample_rate: float
) -> tuple[Tensor, Release]:
    """Release noisy coverage counts: a fresh Poisson sample, counted, plus discrete Gaussian noise.

    Returns:
        Noisy counts `[R]` int64 (negative ones included, occupied or not), and the release to be
        accounted for. Rounding, clipping and thresholds belong to the cloud: they are free there.
    """
    release = Release("coverage_counts", noise_std, 1.0, sample_rate, one_coordinate=True)
    points, centers = _checked(embeddings, centroids)
    counts = _histogram(points, centers, poisson_mask(len(points), release.sample_rate))
    return torch.from_numpy(add_discrete_gaussian(counts, release.noise_std)), release


def _checked(
    embeddings: Tensor, centroids: Tensor
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if embeddings.ndim != 2 or centroids.ndim != 2 or len(centroids) == 0:
        raise ValueError("embeddings and centroids must be tables [n, d] and [R, d], R above 0")
    if embeddings.shape[1] != centroids.shape[1]:
        raise ValueError("embeddings and centroids differ in their number of dimensions")
    tables = []
    for name, table in (("embeddings", embeddings), ("centroids", centroids)):
        values = table.detach().cpu().to(torch.float64).numpy()
        # A NaN centroid would be nearest to everybody. The text must not tell which row it was.
        if not (np.abs(values) <= _LARGEST).all():
            raise ValueError(f"{name} contain values that are NaN, infinite or beyond 1e100")
        tables.append(values)
    return tables[0], tables[1]


def _histogram(
    points: npt.NDArray[np.float64],
    centers: npt.NDArray[np.float64],
    keep: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.int64]:
    # All samples are assigned, kept or not: the time taken must not tell how many were kept.
    ids = _nearest(points, centers)
    return np.bincount(ids if keep is None else ids[keep], minlength=len(centers)).astype(np.int64)


def _nearest(
    points: npt.NDArray[np.float64], centers: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Return the index `[n]` of the nearest of `centers` for each of `points`.

    A matrix product may round a row differently with its place in the batch, which would let one
    sample move another's bin between near-equal centroids. So the product (float64) only proposes
    every centroid within its error bound, and near-ties are settled by `_squared_distance`, whose
    result depends on the pair alone.
    """
    center_squares = np.square(centers).sum(1)  # [R]
    largest = np.sqrt(center_squares.max())
    # Above the rounding error of a d-term product and of the settling sum, with room to spare.
    relative_error = 16 * (points.shape[1] + 8) * np.finfo(np.float64).eps
    ids = np.empty(len(points), dtype=np.int64)
    for start in range(0, len(points), _CHUNK_SIZE):
        chunk = points[start : start + _CHUNK_SIZE]
        score = center_squares - 2 * chunk @ centers.T  # [B, R]: squared distance minus ‖x‖²
        margin = relative_error * (np.linalg.norm(chunk, axis=1) + largest) ** 2  # [B]
        near = score <= (score.min(1) + margin)[:, None]  # [B, R]
        nearest = near.argmax(1)  # [B]: right where only one centroid is near
        unclear = np.flatnonzero(near.sum(1) > 1)
        if len(unclear):
            rows, columns = np.nonzero(near[unclear])
            distance = np.full((len(unclear), len(centers)), np.inf)
            distance[rows, columns] = _squared_distance(chunk[unclear], centers, rows, columns)
            nearest[unclear] = distance.argmin(1)
        ids[start : start + _CHUNK_SIZE] = nearest
    return ids


def _squared_distance(
    points: npt.NDArray[np.float64],
    centers: npt.NDArray[np.float64],
    rows: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Return the squared distance of each pair, summed in the order of the dimensions.

    One elementwise IEEE operation at a time: no reduction order, no fused multiply-add, hence the
    same bits for the same pair on every machine.
    """
    total = np.zeros(len(rows))
    for dim in range(points.shape[1]):
        difference = points[rows, dim] - centers[columns, dim]
        total += difference * difference
    return total
