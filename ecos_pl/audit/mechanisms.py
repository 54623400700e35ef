"""The mechanisms as built, in the form in which `checks` takes them.

With `max_samples` m above 1, the unit is a person: each entry of a dataset is one with m samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ecos_pl.audit.checks import Integers, Mechanism
from ecos_pl.class_table import release_class_table
from ecos_pl.coverage import nearest_centroids, release_coverage
from ecos_pl.privacy import PER_SAMPLE, PrivacyUnits, Release

# The totals before noise, as `release_prototypes` makes them.
from ecos_pl.prototypes import GRID, _sample_steps, class_totals, release_prototypes

Triple = tuple[Integers, Integers, Integers]

_SIZES = (0, 1, 255, 256, 257, 300)  # around the chunks in which samples are assigned
_ALL_BUT_LAST, _LAST = slice(None, -1), slice(-1, None)
_NUM_CLASSES = 5


def coverage(noise_std: float, max_samples: int = 1) -> Mechanism:
    """Coverage counts: row i is a centroid at i, its canary a sample lying there."""

    def release(rows: Integers, num_rows: int, sample_rate: float) -> tuple[Integers, Release]:
        noisy, declared = release_coverage(
            _column(rows.repeat(max_samples)),
            _column(np.arange(num_rows)),
            noise_std=noise_std,
            sample_rate=sample_rate,
            units=_units(len(rows), max_samples),
        )
        return noisy.numpy()[:, None], declared

    return _histogram("coverage counts", release, nearest_centroids, max_samples)


def class_table(noise_std: float, max_samples: int = 1) -> Mechanism:
    """Class-by-cluster table: row i is an entry, its canary a sample of that class lying there."""

    def release(rows: Integers, num_rows: int, sample_rate: float) -> tuple[Integers, Release]:
        classes = _NUM_CLASSES if num_rows % _NUM_CLASSES == 0 else 1
        samples = rows.repeat(max_samples)
        noisy, declared = release_class_table(
            _column(samples // classes),
            torch.from_numpy(samples % classes),
            _column(np.arange(num_rows // classes)),
            classes,
            noise_std=noise_std,
            sample_rate=sample_rate,
            units=_units(len(rows), max_samples),
        )
        return noisy.numpy().reshape(-1, 1), declared

    def bins(points: Tensor, centers: Tensor) -> Integers:
        # Any label will do that depends on the sample alone.
        labels: Integers = (points[:, 0] > 0).to(torch.int64).numpy()
        return nearest_centroids(points, centers) * 2 + labels

    return _histogram("class table", release, bins, max_samples)


def _histogram(
    name: str,
    release: Callable[[Integers, int, float], tuple[Integers, Release]],
    bins: Callable[[Tensor, Tensor], Integers],
    max_samples: int,
) -> Mechanism:
    def totals(rows: Integers, num_rows: int) -> Integers:
        found = nearest_centroids(_column(rows.repeat(max_samples)), _column(np.arange(num_rows)))
        return _counts(found, num_rows)[:, None]

    def neighbours(rng: np.random.Generator) -> Iterator[Triple]:
        for size in _SIZES:
            centers, points = ties(rng, size + 1)
            yield triple(functools.partial(_count, bins, centers), points)

    canary = np.array([max_samples], dtype=np.int64)
    return Mechanism(name, canary, totals, release, neighbours, rounded=max_samples > 1)


def prototypes(noise_multiplier: float, max_samples: int = 1) -> Mechanism:
    """Per-class feature sums and counts: row i is a class, its canary a feature far too long.

    Clipped, such a feature moves the sums as far as any can, and the count on top.
    """
    clip_norm, count_weight, dims = 2.0, 0.5, 2
    weight_steps = round(count_weight / GRID)
    canary = max_samples * np.array([0, -round(1 / GRID), weight_steps])

    def features(rows: Integers) -> tuple[Tensor, Tensor]:
        labels = torch.from_numpy(rows.repeat(max_samples))
        table = torch.zeros(len(labels), dims)
        table[:, 1] = -1000 * clip_norm
        return table, labels

    def exact(table: Tensor, labels: Tensor, num_classes: int) -> Integers:
        steps = _sample_steps(table, clip_norm)
        return class_totals(steps, labels.numpy(), num_classes, weight_steps)

    def release(rows: Integers, num_rows: int, sample_rate: float) -> tuple[Integers, Release]:
        noisy, declared = release_prototypes(
            *features(rows),
            num_rows,
            clip_norm=clip_norm,
            count_weight=count_weight,
            noise_multiplier=noise_multiplier,
            sample_rate=sample_rate,
            units=_units(len(rows), max_samples),
        )
        return torch.cat([noisy.sums, noisy.counts[:, None]], 1).numpy(), declared

    def neighbours(rng: np.random.Generator) -> Iterator[Triple]:
        for table, labels in any_length(rng, clip_norm):
            yield triple(functools.partial(exact, num_classes=_NUM_CLASSES), table, labels)

    return Mechanism(
        "class prototypes",
        canary,
        lambda rows, num_rows: exact(*features(rows), num_rows),
        release,
        neighbours,
    )


def triple(exact: Callable[..., Integers], *tables: Tensor) -> Triple:
    """Return the totals without the last sample, with it, and of it alone."""
    without, alone = ([table[part] for table in tables] for part in (_ALL_BUT_LAST, _LAST))
    return exact(*without), exact(*tables), exact(*alone)


def any_length(rng: np.random.Generator, clip_norm: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features `[n, 49]`, half just as long as allowed, half of any length, and labels.

    The last one, by which the neighbours differ, is far too long in every other dataset.
    """
    for number, size in enumerate((1, 1, 2, 2, 8, 8, 50, 50) * 5):
        table = torch.from_numpy(rng.normal(size=(size, 49)))
        table *= clip_norm / table.norm(dim=1, keepdim=True)
        length = np.where(rng.random(size) < 0.5, 1.0, 10.0 ** rng.uniform(-200, 200, size))
        length[-1] = 10.0 ** rng.uniform(1, 200) if number % 2 else 1.0
        table *= torch.from_numpy(length)[:, None]
        yield table, torch.from_numpy(rng.integers(0, _NUM_CLASSES, size))


def ties(rng: np.random.Generator, num_samples: int) -> tuple[Tensor, Tensor]:
    """Return centroids `[40, 8]`, equal and nearly equal ones among them, and samples between."""
    centers = rng.normal(size=(40, 8))
    centers[20:] = centers[:20] + np.resize([0.0, 1e-12, 1e-6], (20, 1))
    left, right = rng.integers(0, 40, (2, num_samples))
    points = (centers[left] + centers[right]) / 2
    return torch.from_numpy(centers), torch.from_numpy(points)


def _count(bins: Callable[[Tensor, Tensor], Integers], centers: Tensor, points: Tensor) -> Integers:
    return _counts(bins(points, centers), 80)


def _counts(bins: Integers, num_bins: int) -> Integers:
    counts: Integers = np.bincount(bins, minlength=num_bins).astype(np.int64)
    return counts


def _column(values: Integers) -> Tensor:
    return torch.from_numpy(values.astype(np.float64))[:, None]


def _units(num_units: int, max_samples: int) -> PrivacyUnits:
    """Persons with `max_samples` samples each, in a row."""
    if max_samples == 1:
        return PER_SAMPLE
    return PrivacyUnits(np.arange(num_units).repeat(max_samples), max_samples)
