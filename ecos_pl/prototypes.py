"""The client's label release: per-class feature sums and class counts in one noisy vector."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.privacy import PER_SAMPLE, PrivacyUnits, Release, add_discrete_gaussian

GRID = 2.0**-16
"""Step of the public fixed-point grid on which samples are rounded."""


@dataclass(frozen=True)
class NoisyPrototypes:
    """Noisy per-class sums as they were released: integers, in grid steps.

    Attributes:
        sums: `[K, d]` int64; one step is `grid * clip_norm` feature units.
        counts: `[K]` int64; one step is `grid / count_weight` samples.
        grid: Grid step.
        clip_norm: Largest feature norm; longer ones were shortened to it.
        count_weight: Length of a sample's count entry beside a feature part of length one,
            rounded to the grid.
        noise_std: Scale of the noise on each integer.
    """

    sums: Tensor
    counts: Tensor
    grid: float
    clip_norm: float
    count_weight: float
    noise_std: float

    @property
    def sum_noise_std(self) -> float:
        """Noise on each entry of `class_sums`."""
        return self.noise_std * self.grid * self.clip_norm

    @property
    def count_noise_std(self) -> float:
        """Noise on each entry of `class_counts`."""
        return self.noise_std * self.grid / self.count_weight

    def class_sums(self) -> Tensor:
        """Return the noisy sum of clipped features per class, `[K, d]` float64."""
        return self.sums.to(torch.float64) * (self.grid * self.clip_norm)

    def class_counts(self) -> Tensor:
        """Return the noisy number of samples per class, `[K]` float64, possibly negative."""
        return self.counts.to(torch.float64) * (self.grid / self.count_weight)


def release_prototypes(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    clip_norm: float,
    count_weight: float,
    noise_multiplier: float,
    sample_rate: float,
    units: PrivacyUnits = PER_SAMPLE,
) -> tuple[NoisyPrototypes, Release]:
    """Release per-class feature sums and class counts of a fresh Poisson sample.

    One joint vector of K·(d + 1) integers with one sensitivity costs less than two releases. Each
    sample adds its clipped feature, of length at most one after division by `clip_norm`, to its
    class's sum and `count_weight` to its class's count.

    Args:
        features: `[n, d]`, the client's embeddings after a public projection. Each row must depend
            on its own sample alone.
        labels: `[n]` int64 in [0, num_classes).
        num_classes: K.
        clip_norm: Largest norm a feature keeps, in feature units; public.
        count_weight: Share of the counts in the vector, at least 2^-16.
        noise_multiplier: Noise scale divided by sensitivity.
        sample_rate: Probability with which each unit takes part.
        units: Who counts as one in the guarantee.

    Raises:
        ValueError: If an argument is out of range or a feature is not finite.
    """
    _check_share("clip_norm", clip_norm)
    release = prototype_release(count_weight, noise_multiplier, sample_rate, units.max_samples)
    weight_steps = round(count_weight / GRID)
    steps = _sample_steps(features, clip_norm)
    classes = checked_labels(labels, num_classes, num_samples=len(steps))
    keep = units.mask(len(steps), release.sample_rate)
    exact = class_totals(steps[keep], classes[keep], num_classes, weight_steps)
    noisy = torch.from_numpy(add_discrete_gaussian(exact, release.noise_std))  # [K, d + 1]
    prototypes = NoisyPrototypes(
        sums=noisy[:, :-1].contiguous(),
        counts=noisy[:, -1].contiguous(),
        grid=GRID,
        clip_norm=float(clip_norm),
        count_weight=weight_steps * GRID,
        noise_std=release.noise_std,
    )
    return prototypes, release


def prototype_release(
    count_weight: float, noise_multiplier: float, sample_rate: float, max_samples: int = 1
) -> Release:
    """Return what `release_prototypes` costs, before anything is drawn.

    A person moves the vector by at most `max_samples` times the norm of what one sample adds.
    """
    _check_share("count_weight", count_weight)
    sensitivity = max_samples * sensitivity_in_steps(round(count_weight / GRID))
    return Release("prototypes", noise_multiplier * sensitivity, sensitivity, sample_rate)


def _check_share(name: str, value: float) -> None:
    if not (math.isfinite(value) and GRID <= value <= 1 / GRID):
        raise ValueError(f"{name} must lie in [2^-16, 2^16], not {value:g}")


def sensitivity_in_steps(weight_steps: int) -> float:
    """Return the L2 norm bound, in grid steps, of what one sample adds to the vector."""
    return math.sqrt(2**32 + weight_steps**2)


def class_totals(
    steps: npt.NDArray[np.int64],
    classes: npt.NDArray[np.int64],
    num_classes: int,
    weight_steps: int,
) -> npt.NDArray[np.int64]:
    """Sum samples `[n, d]` per class, with their count entry last: `[K, d + 1]`, exact."""
    totals = np.zeros((num_classes, steps.shape[1] + 1), dtype=np.int64)
    for label in range(num_classes):
        members = steps[classes == label]
        totals[label, :-1] = members.sum(0)
        totals[label, -1] = len(members) * weight_steps
    return totals


def _sample_steps(features: Tensor, clip_norm: float) -> npt.NDArray[np.int64]:
    """Clip every row to norm `clip_norm`, scale it to norm one, truncate it to the grid.

    Rows do not influence one another: only elementwise IEEE operations, no reduction whose order
    could depend on the batch. The result's norm is at most 2^16 steps exactly: rounding may leave
    a row's squared norm above 2^32 by far less than one, truncation toward zero does not raise it,
    and a sum of squared integers below 2^32 + 1 is at most 2^32.
    """
    if features.ndim != 2 or not 0 < features.shape[1] <= 2**16:
        raise ValueError("features must be a table [n, d] with 1 to 2^16 dimensions")
    rows = features.detach().cpu().to(torch.float64).numpy()
    if not np.isfinite(rows).all():
        raise ValueError("features contain values that are NaN or infinite")
    # Dividing by the largest entry first keeps squares away from overflow and underflow.
    peak = np.full(len(rows), clip_norm, dtype=np.float64)
    for column in rows.T:
        peak = np.maximum(peak, np.abs(column))
    rows = rows / peak[:, None]
    square = np.zeros(len(rows))
    for column in rows.T:
        square += column * column
    norm = np.maximum(np.sqrt(square), clip_norm / peak)
    return np.trunc(rows / norm[:, None] / GRID).astype(np.int64)


def checked_labels(labels: Tensor, num_classes: int, *, num_samples: int) -> npt.NDArray[np.int64]:
    """Return labels `[n]` as numpy integers; ValueError unless they are int64 in [0, K)."""
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError("labels must be a list [n] of int64")
    if len(labels) != num_samples:
        raise ValueError("samples and labels differ in length")
    if num_classes < 1:
        raise ValueError("num_classes must be above zero")
    classes: npt.NDArray[np.int64] = labels.detach().cpu().numpy()
    if ((classes < 0) | (classes >= num_classes)).any():
        raise ValueError(f"labels must lie in [0, {num_classes})")
    return classes
