"""The client's answer: how many of its samples lie nearest to each centroid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.privacy import PER_SAMPLE, PrivacyUnits, Release, integer_release, noisy_integers

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
    bins = nearest_centroids(embeddings, centroids)
    return torch.from_numpy(np.bincount(bins, minlength=len(centroids)).astype(np.int64))


def release_coverage(
    embeddings: Tensor,
    centroids: Tensor,
    *,
    noise_std: float,
    sample_rate: float,
    units: PrivacyUnits = PER_SAMPLE,
) -> tuple[Tensor, Release]:
    """Release noisy coverage counts: a fresh Poisson sample, counted, plus discrete Gaussian noise.

    Args:
        embeddings: `[n, d]`, as in `coverage_counts`.
        centroids: `[R, d]`.
        noise_std: Noise on each count where one sample is the unit. With persons the counts get
            ``units.max_samples * noise_std``, which the cloud must be told.
        sample_rate: Probability with which each unit takes part.
        units: Who counts as one in the guarantee.

    Returns:
        Noisy counts `[R]` int64 (negative ones included, occupied or not), and the release to be
        accounted for, `coverage_release`. Rounding, clipping and thresholds belong to the cloud:
        they are free there.
    """
    bins = nearest_centroids(embeddings, centroids)
    noisy, release = release_histogram(
        bins,
        len(centroids),
        kind="coverage_counts",
        noise_std=noise_std,
        sample_rate=sample_rate,
        units=units,
    )
    return torch.from_numpy(noisy), release


def coverage_release(noise_std: float, sample_rate: float, max_samples: int = 1) -> Release:
    """Return what `release_coverage` costs, before anything is drawn."""
    return histogram_release("coverage_counts", noise_std, sample_rate, max_samples)


def release_histogram(
    bins: npt.NDArray[np.int64],
    num_bins: int,
    *,
    kind: str,
    noise_std: float,
    sample_rate: float,
    units: PrivacyUnits,
) -> tuple[npt.NDArray[np.int64], Release]:
    """Release how many samples of a fresh Poisson sample fall into each bin, plus noise.

    Args:
        bins: `[n]`, each sample's bin. All samples come with one, kept or not: the time taken to
            find it must not tell how many were kept.
        num_bins: Public number of bins.
        kind: Of the release.
        noise_std: See `release_coverage`, as for the other arguments and what is returned.
        sample_rate: Probability with which each unit takes part.
        units: Who counts as one in the guarantee.
    """
    release = histogram_release(kind, noise_std, sample_rate, units.max_samples)
    kept = bins[units.mask(len(bins), sample_rate)]
    noisy, made = noisy_integers(
        np.bincount(kept, minlength=num_bins).astype(np.int64),
        kind=kind,
        noise_std=units.max_samples * noise_std,
        sensitivity=units.max_samples,
        sample_rate=sample_rate,
        one_coordinate=units.max_samples == 1,
    )
    assert made == release, "what is drawn must be what is charged"
    return noisy, release


def histogram_release(kind: str, noise_std: float, sample_rate: float, max_samples: int) -> Release:
    """Return what `release_histogram` costs, before anything is drawn.

    A person's samples may all fall into one bin, or each into another: the counts move by at most
    `max_samples` in L2 norm.
    """
    return integer_release(
        kind,
        noise_std=max_samples * noise_std,
        sensitivity=max_samples,
        sample_rate=sample_rate,
        one_coordinate=max_samples == 1,
    )


def nearest_centroids(embeddings: Tensor, centroids: Tensor) -> npt.NDArray[np.int64]:
    """Return the index `[n]` of the nearest centroid; see `coverage_counts`."""
    if len(centroids) == 0:
        raise ValueError("centroids must be a table [R, d], R above 0")
    return _nearest(*finite_tables(embeddings=embeddings, centroids=centroids))


def finite_tables(**tables: Tensor) -> list[npt.NDArray[np.float64]]:
    """Return tables `[.., d]` of equal width as float64, their squares finite.

    Raises:
        ValueError: If shapes do not fit, or a value is NaN, infinite or above 1e100.
    """
    names = " and ".join(tables)
    if any(table.ndim != 2 for table in tables.values()):
        raise ValueError(f"{names} must be tables [rows, dimensions]")
    if len({table.shape[1] for table in tables.values()}) != 1:
        raise ValueError(f"{names} differ in their number of dimensions")
    checked = []
    for name, table in tables.items():
        values = table.detach().cpu().to(torch.float64).numpy()
        # A NaN centroid would be nearest to everybody. The text must not tell which row it was.
        if not (np.abs(values) <= _LARGEST).all():
            raise ValueError(f"{name} contain values that are NaN, infinite or beyond 1e100")
        checked.append(values)
    return checked


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
