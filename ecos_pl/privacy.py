"""Noise, and what a release is; what several cost together is in `accounting.py`.

One release is an integer vector plus discrete Gaussian noise (Canonne, Kamath and Steinke 2020,
arXiv 2004.00010, "CKS20"), optionally on a Poisson sample of the client's units. A unit is one
sample, or one person with all of theirs (`PrivacyUnits`); everywhere here neighbouring datasets
differ by adding or removing one unit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

MIN_NOISE_STD = 0.5
MAX_NOISE_STD = 1e12
MIN_DELTA = 1e-10
"""Below this, rounding errors in the accountant's Fourier transforms would start to show."""
MIN_GRID_NOISE_STD = 4096.0
"""Least noise, in grid steps, of a release that moves several coordinates: see `epsilon_of`."""
MAX_REPEATS = 100_000
MAX_COORDINATES = 1_000_000
"""Most integers in a vector release, which the accountant assumes."""


@dataclass(frozen=True)
class Release:
    """One answer as the accountant sees it: the event that the ledger stores.

    Attributes:
        kind: What was released, such as ``"coverage_counts"``.
        noise_std: Scale of the discrete Gaussian noise, in units of the released integers.
        sensitivity: Largest L2 change of the released integers when one unit (a sample, or a
            person with all of theirs) is added or removed.
        sample_rate: Probability with which each unit took part (Poisson sampling).
        one_coordinate: A unit changes one integer, by at most one: a count of a histogram, or a
            single number such as the largest of some votes. Otherwise it moves a vector on a fine
            grid, and `noise_std` must be at least `MIN_GRID_NOISE_STD`.
        repeats: Number of such releases, each with a fresh sample and fresh noise.

    Raises:
        ValueError: If a number is not finite and positive, or no accounting formula is valid.
    """

    kind: str
    noise_std: float
    sensitivity: float
    sample_rate: float = 1.0
    one_coordinate: bool = False
    repeats: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not 0 < len(self.kind) <= 100:
            raise ValueError("release: kind must be a text of 1 to 100 characters")
        if not isinstance(self.one_coordinate, bool):
            raise ValueError("release: one_coordinate must be true or false")
        for name in ("noise_std", "sensitivity", "sample_rate"):
            # Plain floats only: equal releases then compare, hash and print alike.
            object.__setattr__(self, name, positive(getattr(self, name), f"release: {name}"))
        repeats = self.repeats
        if isinstance(repeats, bool) or not isinstance(repeats, (int, np.integer)):
            raise ValueError("release: repeats must be a whole number")
        if not 1 <= repeats <= MAX_REPEATS:
            raise ValueError(f"release: repeats must lie in [1, {MAX_REPEATS}], not {repeats}")
        object.__setattr__(self, "repeats", int(repeats))
        check_sample_rate(self.sample_rate)
        check_noise_std(self.noise_std)
        if self.one_coordinate and self.sensitivity != 1:
            raise ValueError("release: one_coordinate means sensitivity 1")
        if not self.one_coordinate and self.noise_std < MIN_GRID_NOISE_STD:
            raise ValueError(
                f"release: noise_std is {self.noise_std:g} grid steps, a vector release needs "
                f"{MIN_GRID_NOISE_STD:g} or more; multiply the integers (and the noise) by a "
                "public constant"
            )

    @property
    def noise_multiplier(self) -> float:
        """Noise scale divided by sensitivity."""
        return self.noise_std / self.sensitivity

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Release:
        """Rebuild a release; a missing, unknown or ill-typed field raises ValueError."""
        expected = set(cls.__dataclass_fields__)
        if not isinstance(fields, Mapping) or set(fields) != expected:
            raise ValueError(f"release: the fields must be exactly {', '.join(sorted(expected))}")
        return cls(**fields)


@dataclass(frozen=True, eq=False)
class PrivacyUnits:
    """Who counts as one in the guarantee: every sample, or every person.

    With persons, one of them moves a sum over samples by at most `max_samples` (m) times what one
    sample does: sensitivity and noise are both taken m times, so ε stays and holds per person.

    Attributes:
        owners: `[n]` int64, a number for the person whom each sample belongs to. None: each sample
            stands for itself.
        max_samples: Most samples of one person that are used, m; the first in the given order.

    Raises:
        ValueError: If `owners` is not a list of int64, or `max_samples` is not 1 or more.
    """

    owners: npt.NDArray[np.int64] | None = None
    max_samples: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.max_samples, bool) or not isinstance(self.max_samples, int):
            raise ValueError("max_samples must be a whole number")
        if self.max_samples < 1:
            raise ValueError(f"max_samples must be 1 or more, not {self.max_samples}")
        if self.owners is None and self.max_samples != 1:
            raise ValueError("max_samples above 1 needs to know whom each sample belongs to")
        if self.owners is not None and (self.owners.ndim != 1 or self.owners.dtype != np.int64):
            raise ValueError("owners must be a list [n] of int64")

    @property
    def name(self) -> str:
        """The unit of `PrivacyStatement`."""
        return "sample" if self.owners is None else "person"

    def used(self, num_samples: int) -> npt.NDArray[np.bool_]:
        """Return `[n]`: is this among its person's first `max_samples` samples?

        Whether a sample is used depends on its own person's samples alone.
        """
        if self.owners is None:
            return np.ones(num_samples, dtype=np.bool_)
        if len(self.owners) != num_samples:
            raise ValueError("owners and samples differ in length")
        return self._used

    def mask(self, num_samples: int, sample_rate: float) -> npt.NDArray[np.bool_]:
        """Return `[n]`: the used samples of a fresh Poisson sample of the units.

        A person takes part whole or not at all. See `poisson_mask`: the mask is secret, and serves
        one release.
        """
        used = self.used(num_samples)
        if self.owners is None:
            return poisson_mask(num_samples, sample_rate)
        num_persons, person = self._persons
        kept: npt.NDArray[np.bool_] = used & poisson_mask(num_persons, sample_rate)[person]
        return kept

    def take(self, rows: npt.NDArray[np.int64]) -> PrivacyUnits:
        """Return the units of a part of the samples, chosen for each by itself (its class, say)."""
        if self.owners is None:
            return self
        return PrivacyUnits(self.owners[rows], self.max_samples)

    @cached_property
    def _persons(self) -> tuple[int, npt.NDArray[np.int64]]:
        assert self.owners is not None
        persons, person = np.unique(self.owners, return_inverse=True)
        return len(persons), person

    @cached_property
    def _used(self) -> npt.NDArray[np.bool_]:
        _, person = self._persons
        order = np.argsort(person, kind="stable")
        first = np.searchsorted(person[order], person[order])  # where its person's samples begin
        used = np.empty(len(person), dtype=np.bool_)
        used[order] = np.arange(len(person)) - first < self.max_samples
        return used


PER_SAMPLE = PrivacyUnits()


def check_delta(delta: float) -> float:
    """Return `delta`, or raise ValueError unless it lies in [1e-10, 1)."""
    if not MIN_DELTA <= positive(delta, "delta") < 1:
        raise ValueError(f"delta must lie in [{MIN_DELTA:g}, 1), not {delta:g}")
    return float(delta)


def check_sample_rate(sample_rate: float) -> float:
    """Return `sample_rate`, or raise ValueError unless it lies in (0, 1]."""
    if not 0 < positive(sample_rate, "sample_rate") <= 1:
        raise ValueError(f"sample_rate must lie in (0, 1], not {sample_rate:g}")
    return float(sample_rate)


def check_noise_std(noise_std: float) -> float:
    """Return `noise_std`, or raise ValueError unless it is a usable discrete Gaussian scale."""
    if not MIN_NOISE_STD <= positive(noise_std, "noise_std") <= MAX_NOISE_STD:
        raise ValueError(
            f"noise_std must lie in [{MIN_NOISE_STD:g}, {MAX_NOISE_STD:g}], not {noise_std:g}"
        )
    return float(noise_std)


def poisson_mask(num_samples: int, sample_rate: float) -> npt.NDArray[np.bool_]:
    """Keep each sample independently with probability `sample_rate`, fresh at every call.

    The bits come from the operating system, so no seed and no fork repeats a mask. Amplification
    by sampling holds only while the mask stays secret and serves one release.
    """
    check_sample_rate(sample_rate)
    if sample_rate == 1:
        return np.ones(num_samples, dtype=np.bool_)
    # floor(): the true rate is at most 2^-64 below the stated one, never above.
    threshold = np.uint64(math.floor(sample_rate * 2**64))
    draws = np.frombuffer(os.urandom(8 * num_samples), dtype=np.uint64)
    mask: npt.NDArray[np.bool_] = draws < threshold
    return mask


def load_sampler() -> Any:
    """Load the library that draws noise (opendp).

    It takes a second the first time. Whoever answers does it before anything is charged: what is
    interrupted between the charge and the answer is lost.
    """
    import opendp.prelude as dp

    dp.enable_features("contrib")
    return dp


def add_discrete_gaussian(values: npt.NDArray[np.int64], noise_std: float) -> npt.NDArray[np.int64]:
    """Add independent discrete Gaussian noise N_Z(0, noise_std²) to every integer (CKS20).

    The sampler is exact and draws from the operating system's entropy: float noise would leave
    outputs that are possible under one dataset and impossible under its neighbour (Mironov 2012).
    `noise_std` is the scale; from 1 up it equals the standard deviation to 7 digits.

    Raises:
        ValueError: If `noise_std` is not in [0.5, 1e12] or `values` are not int64 below 2^62.
    """
    noise_std = check_noise_std(noise_std)
    if values.dtype != np.int64 or ((values <= -(2**62)) | (values >= 2**62)).any():
        raise ValueError("values to be released must be int64, below 2^62 in size")

    dp = load_sampler()
    measurement: Any = dp.m.make_gaussian(
        dp.vector_domain(dp.atom_domain(T="i64")),  # T=int would mean 32 bits
        dp.l2_distance(T="f64"),
        scale=noise_std,
    )
    rho = 1 / (2 * noise_std**2)  # zCDP at distance 1, CKS20 theorem 4; opendp rounds up
    assert math.isclose(measurement.map(1.0), rho, rel_tol=1e-9), "opendp: unexpected noise"
    noisy = np.asarray(measurement(values.ravel()), dtype=np.int64)
    assert noisy.shape == (values.size,)
    return noisy.reshape(values.shape)


def grid_scale(noise_std: float) -> int:
    """Return the smallest power of two that brings `noise_std` to `MIN_GRID_NOISE_STD` or more.

    >>> grid_scale(5.0), grid_scale(4096.0)
    (1024, 1)
    """
    if 2**40 * positive(noise_std, "noise_std") < MIN_GRID_NOISE_STD:
        raise ValueError(f"noise_std must be above 1e-8, not {noise_std:g}")
    scale = 1
    while scale * noise_std < MIN_GRID_NOISE_STD:
        scale *= 2
    return scale


def integer_release(
    kind: str,
    *,
    noise_std: float,
    sensitivity: float,
    sample_rate: float = 1.0,
    one_coordinate: bool = False,
    repeats: int = 1,
) -> Release:
    """Return the release that `noisy_integers` makes: what to charge before anything is drawn.

    Args:
        kind: See `Release`, as for the other arguments.
        noise_std: In units of the integers.
        sensitivity: In units of the integers.
        sample_rate: Of the Poisson sample that the integers were computed on.
        one_coordinate: A unit changes one integer, by at most `sensitivity`.
        repeats: Number of such releases.
    """
    if one_coordinate and sensitivity == 1:
        return Release(kind, noise_std, 1.0, sample_rate, one_coordinate=True, repeats=repeats)
    scale = grid_scale(noise_std)
    sensitivity = positive(sensitivity, "sensitivity")
    return Release(kind, scale * noise_std, scale * sensitivity, sample_rate, repeats=repeats)


def noisy_integers(
    values: npt.NDArray[np.int64],
    *,
    kind: str,
    noise_std: float,
    sensitivity: float,
    sample_rate: float,
    one_coordinate: bool,
) -> tuple[npt.NDArray[np.int64], Release]:
    """Release integers with discrete Gaussian noise of any sensitivity.

    A histogram of samples gets its noise as it is. Other integers are multiplied by a public power
    of two, `grid_scale`, so that the noise is fine enough for the accountant (see `Release`), and
    the sum is divided again and rounded, which is post-processing.

    Args:
        values: Exact integers, any shape, computed on a fresh Poisson sample.
        kind: As in `integer_release`, as for the other arguments.
        noise_std: Noise on each integer returned.
        sensitivity: L2 change of `values` by one unit.
        sample_rate: Of the Poisson sample.
        one_coordinate: A unit changes one integer.

    Returns:
        Noisy integers, in the units of `values`, and the release, in the units of its grid.

    Raises:
        ValueError: If an argument is out of range, a value is 2^52 grid steps or more, or there
            are more than `MAX_COORDINATES` of them.
    """
    release = integer_release(
        kind,
        noise_std=noise_std,
        sensitivity=sensitivity,
        sample_rate=sample_rate,
        one_coordinate=one_coordinate,
    )
    if release.one_coordinate:
        return add_discrete_gaussian(values, release.noise_std), release
    scale = grid_scale(noise_std)
    limit = 2**52 // scale
    if values.dtype != np.int64 or ((values <= -limit) | (values >= limit)).any():
        raise ValueError(f"values to be released must be int64, below {limit} in size")
    if values.size > MAX_COORDINATES:
        raise ValueError(f"at most {MAX_COORDINATES:,} integers can be released together")
    noisy = add_discrete_gaussian(scale * values, release.noise_std)
    # Exact: below 2^53, divided by a power of two. Halves go to the even side, without bias.
    return np.rint(noisy / scale).astype(np.int64), release


def positive(number: float, name: str) -> float:
    """Return `number` as a float; NaN, inf, zero, negatives, booleans and text are refused.

    An accountant given NaN or inf would report ε = 0.
    """
    # np.float64 is a float, np.integer is not an int.
    if isinstance(number, bool) or not isinstance(number, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name} must be a number")
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and above zero, not {number:g}")
    return float(number)
