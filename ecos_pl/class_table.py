"""The client's class-by-cluster table: its samples counted by nearest centroid and class.

The simplest release that carries labels: one histogram over R·K bins. A sample falls into one bin,
given by its nearest centroid and its class, so adding or removing one changes one entry by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ecos_pl.coverage import histogram_release, nearest_centroids, release_histogram
from ecos_pl.privacy import PER_SAMPLE, PrivacyUnits, Release
from ecos_pl.prototypes import checked_labels


def release_class_table(
    embeddings: Tensor,
    labels: Tensor,
    centroids: Tensor,
    num_classes: int,
    *,
    noise_std: float,
    sample_rate: float,
    units: PrivacyUnits = PER_SAMPLE,
) -> tuple[Tensor, Release]:
    """Release noisy counts of a fresh Poisson sample per centroid and class.

    Args:
        embeddings: `[n, d]`, the client's samples of the classes asked about; n may be zero.
        labels: `[n]` int64 in [0, num_classes).
        centroids: `[R, d]`; of equally near ones the lowest index wins.
        num_classes: K.
        noise_std: Noise on each entry where one sample is the unit; with persons the entries get
            ``units.max_samples * noise_std``.
        sample_rate: Probability with which each unit takes part.
        units: Who counts as one in the guarantee.

    Returns:
        Noisy counts `[R, K]` int64, negative ones included, and the release to be accounted for,
        `class_table_release`.

    Raises:
        ValueError: If shapes or values do not fit; the text tells nothing about the samples.
    """
    classes = checked_labels(labels, num_classes, num_samples=len(embeddings))
    noisy, release = release_histogram(
        nearest_centroids(embeddings, centroids) * num_classes + classes,
        len(centroids) * num_classes,
        kind="class_table",
        noise_std=noise_std,
        sample_rate=sample_rate,
        units=units,
    )
    return torch.from_numpy(noisy.reshape(len(centroids), num_classes)), release


def class_table_release(noise_std: float, sample_rate: float, max_samples: int = 1) -> Release:
    """Return what `release_class_table` costs, before anything is drawn."""
    return histogram_release("class_table", noise_std, sample_rate, max_samples)
