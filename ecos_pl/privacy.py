"""Noise, accounting and calibration of the client's releases.

One release is an integer vector plus discrete Gaussian noise (Canonne, Kamath and Steinke 2020,
arXiv 2004.00010, "CKS20"), optionally on a Poisson sample of the client's samples. Everywhere
here: one unit of privacy is one sample, and neighbouring datasets differ by adding or removing
one sample.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

MIN_NOISE_STD = 0.5
MAX_NOISE_STD = 1e12
MIN_DELTA = 1e-10
"""Below this, rounding errors in the accountant's Fourier transforms would start to show."""
MIN_GRID_NOISE_STD = 4096.0
"""Least noise, in grid steps, of a release that moves several coordinates: see `epsilon_of`."""

# Bounds behind the continuous formula, derived in `epsilon_of`.
_CONTINUOUS_COUNT_STD = 50.0
_ROUNDED_STD = 1 - 2e-5
_RATIO_SLACK = 2e-6


@dataclass(frozen=True)
class Release:
    """One answer as the accountant sees it: the event that the ledger stores.

    Attributes:
        kind: What was released, such as ``"coverage_counts"``.
        noise_std: Scale of the discrete Gaussian noise, in units of the released integers.
        sensitivity: L2 change of the released integers when one sample is added or removed.
        sample_rate: Probability with which each sample took part (Poisson sampling).
        one_coordinate: A sample changes one integer, by exactly one (a histogram). Otherwise it
            moves a vector on a fine grid, and `noise_std` must be at least `MIN_GRID_NOISE_STD`.

    Raises:
        ValueError: If a number is not finite and positive, or no accounting formula is valid.
    """

    kind: str
    noise_std: float
    sensitivity: float
    sample_rate: float = 1.0
    one_coordinate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or not 0 < len(self.kind) <= 100:
            raise ValueError("release: kind must be a text of 1 to 100 characters")
        if not isinstance(self.one_coordinate, bool):
            raise ValueError("release: one_coordinate must be true or false")
        for name in ("noise_std", "sensitivity", "sample_rate"):
            # Plain floats only: equal releases then compare, hash and print alike.
            object.__setattr__(self, name, _positive(getattr(self, name), f"release: {name}"))
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


@dataclass(frozen=True)
class PrivacyStatement:
    """What a printed ε means.

    >>> print(PrivacyStatement(1.9755, 1e-5))
    ε = 1.98 at δ = 1e-05, per sample, add/remove, PLD accountant
    """

    epsilon: float
    delta: float
    relation: str = "add/remove"
    unit: str = "sample"
    accountant: str = "PLD"

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if not self.epsilon >= 0:
            raise ValueError("privacy statement: epsilon must be zero or more")

    def __str__(self) -> str:
        return (
            f"ε = {_round_up(self.epsilon)} at δ = {self.delta:g}, per {self.unit}, "
            f"{self.relation}, {self.accountant} accountant"
        )


def check_delta(delta: float) -> float:
    """Return `delta`, or raise ValueError unless it lies in [1e-10, 1)."""
    if not MIN_DELTA <= _positive(delta, "delta") < 1:
        raise ValueError(f"delta must lie in [{MIN_DELTA:g}, 1), not {delta:g}")
    return float(delta)


def check_sample_rate(sample_rate: float) -> float:
    """Return `sample_rate`, or raise ValueError unless it lies in (0, 1]."""
    if not 0 < _positive(sample_rate, "sample_rate") <= 1:
        raise ValueError(f"sample_rate must lie in (0, 1], not {sample_rate:g}")
    return float(sample_rate)


def check_noise_std(noise_std: float) -> float:
    """Return `noise_std`, or raise ValueError unless it is a usable discrete Gaussian scale."""
    if not MIN_NOISE_STD <= _positive(noise_std, "noise_std") <= MAX_NOISE_STD:
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


def add_discrete_gaussian(values: npt.NDArray[np.int64], noise_std: float) -> npt.NDArray[np.int64]:
    """Add independent discrete Gaussian noise N_Z(0, noise_std²) to every integer (CKS20).

    The sampler is exact and draws from the operating system's entropy: float noise would leave
    outputs that are possible under one dataset and impossible under its neighbour (Mironov 2012).
    `noise_std` is the scale; from 1 up it equals the standard deviation to 7 digits.

    Raises:
        ValueError: If `noise_std` is not in [0.5, 1e12] or `values` are not int64 below 2^62.
    """
    noise_std = check_noise_std(noise_std)
    if values.dtype != np.int64 or (np.abs(values) >= 2**62).any():
        raise ValueError("values to be released must be int64, below 2^62 in size")

    import opendp.prelude as dp

    dp.enable_features("contrib")
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


def epsilon_of(releases: Sequence[Release], delta: float) -> float:
    """Return ε at `delta` of all `releases` together, add/remove one sample, never understated.

    One privacy loss distribution (PLD; Koskela et al. 2020, Doroshenko et al. 2022,
    arXiv 2207.04380) is composed over all releases, rounded pessimistically. Against closed forms
    the overstatement stays below 0.2% (1.5% at sample rates of 0.001).

    Which formula. A histogram below noise 50 is accounted as the discrete Gaussian it is: there
    the Gaussian formula understates (4.377 instead of 4.430 at noise 1). Everything else uses the
    continuous Gaussian, with a correction that makes it an upper bound:

    * Rounding a Gaussian vector of standard deviation s to integers is post-processing, and the
      query is integer, so rounded Gaussian noise has exactly the Gaussian mechanism's ε, in any
      number of coordinates and for any direction of the difference.
    * With s² = σ² - 1/12 (Sheppard), the discrete Gaussian's and the rounded Gaussian's
      probabilities differ by at most a factor e^±η per coordinate, η = (t⁴/2880 + t²/100 + 1)/σ⁴
      for |noise| ≤ tσ (expand the log of the average of the density over a step; a test measures
      it). At t = 10, beyond which there is less than 2e-23 of the noise, η is 9e-7 for σ = 50 and
      one coordinate, and 2e-8 for σ = 4096 and a million coordinates. Hence 2e-6 is added to ε per
      release, and σ is taken 2e-5 smaller than it is (s/σ ≥ 1 - 1.7e-5). Coarser vector releases
      are refused by `Release`; CKS20's ρ = Δ²/2σ², exact for integer vectors, is the cross-check.

    Unsampled continuous releases are merged first: Gaussians compose to a Gaussian.

    >>> round(epsilon_of([Release("coverage_counts", 5.0, 1.0, one_coordinate=True)], 1e-5), 4)
    0.7266
    """
    return _epsilon(tuple(sorted(map(_mechanism, releases))), check_delta(delta))


def calibrate_noise_multiplier(
    max_epsilon: float,
    delta: float,
    *,
    sample_rate: float = 1.0,
    spent: Sequence[Release] = (),
    one_coordinate: bool = False,
) -> float:
    """Return the smallest noise multiplier, to 0.1%, that one more release may use.

    Args:
        max_epsilon: Limit on ε of `spent` and the new release together.
        delta: The δ at which ε is stated.
        sample_rate: Sample rate of the new release.
        spent: What the client has released already.
        one_coordinate: The new release is a histogram (see `Release`); then the multiplier is its
            `noise_std`, at least 0.5. Otherwise it is a vector on a fine grid, at least 0.05.

    Returns:
        A multiplier m with ``epsilon_of([*spent, new], delta) <= max_epsilon``.

    Raises:
        ValueError: If no noise is large enough, in particular if `spent` exceeds `max_epsilon`.
    """
    max_epsilon = _positive(max_epsilon, "max_epsilon")
    already = epsilon_of(spent, delta)
    if already > max_epsilon:
        raise ValueError(f"ε = {_round_up(already)} is spent already, over {max_epsilon:g}")

    def fits(multiplier: float) -> bool:
        new = _new_release(multiplier, sample_rate, one_coordinate)
        return epsilon_of([*spent, new], delta) <= max_epsilon

    low = MIN_NOISE_STD if one_coordinate else 0.05
    if fits(low):
        return low
    # Close for a single unsampled Gaussian, a starting point for the others.
    high = min(max(2 * low, math.sqrt(2 * math.log(1.25 / delta)) / max_epsilon), 1e6)
    while not fits(high):
        low, high = high, 2 * high
        if high > 1e6:
            raise ValueError(
                f"no noise is large enough: ε = {_round_up(already)} of {max_epsilon:g} is spent"
            )
    while (half := high / 2) > low and fits(half):
        high = half
    low = max(low, high / 2)
    while high > low * 1.0003:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    # A short decimal, so that noise_std / sensitivity gives back the same multiplier.
    multiplier = float(_round_up(high, digits=5))
    while not fits(multiplier):  # the accountant's grid may shift by a hair
        multiplier = float(_round_up(multiplier * 1.0001, digits=5))
    return multiplier


def _new_release(multiplier: float, sample_rate: float, one_coordinate: bool) -> Release:
    """Return a release with this multiplier, of any kind and scale."""
    if one_coordinate:
        return Release("new", multiplier, 1.0, sample_rate, one_coordinate=True)
    return Release("new", 2**17 * multiplier, 2**17, sample_rate)


_Mechanism = tuple[bool, float, float]  # exact discrete formula?, noise multiplier, sample rate


def _mechanism(release: Release) -> _Mechanism:
    exact = release.one_coordinate and release.noise_std < _CONTINUOUS_COUNT_STD
    # Nine digits, well within _ROUNDED_STD: the last bit of a quotient must not change ε.
    multiplier = release.noise_std if exact else float(f"{release.noise_multiplier:.9g}")
    return exact, multiplier, release.sample_rate


@lru_cache(maxsize=256)
def _epsilon(mechanisms: tuple[_Mechanism, ...], delta: float) -> float:
    """Compose sorted mechanisms and read ε off; see `epsilon_of`."""
    if not mechanisms:
        return 0.0
    slack = _RATIO_SLACK * sum(not exact for exact, _, _ in mechanisms)
    merged = sum(z**-2 for exact, z, rate in mechanisms if not exact and rate == 1)
    groups = Counter(m for m in mechanisms if m[0] or m[2] < 1)
    if merged:
        groups[(False, merged**-0.5, 1.0)] = 1
    # About 2e-3 of the largest loss's standard deviation 1/z, finer for rare samples, in powers
    # of two so that distributions can be cached and composed.
    interval = max(2e-3 / z * max(0.1, min(1.0, 50 * rate)) for _, z, rate in groups)
    exponent = math.floor(math.log2(interval))
    total = None
    for mechanism, count in groups.items():
        loss = _loss_distribution(mechanism, exponent)
        loss = loss.self_compose(count) if count > 1 else loss
        total = loss if total is None else total.compose(loss)
    assert total is not None
    return float(total.get_epsilon_for_delta(delta)) + slack


@lru_cache(maxsize=64)
def _loss_distribution(mechanism: _Mechanism, exponent: int) -> Any:
    # Seconds to import; a client that only counts never pays for it.
    from dp_accounting.pld import privacy_loss_distribution as pld

    exact, multiplier, sample_rate = mechanism
    if exact:
        return pld.from_discrete_gaussian_mechanism(
            multiplier,
            1,
            value_discretization_interval=2.0**exponent,
            sampling_prob=sample_rate,
            use_connect_dots=True,
        )
    return pld.from_gaussian_mechanism(
        multiplier * _ROUNDED_STD,
        value_discretization_interval=2.0**exponent,
        sampling_prob=sample_rate,
        use_connect_dots=True,
    )


def _positive(number: float, name: str) -> float:
    """Return `number` as a float; NaN, inf, zero, negatives, booleans and text are refused.

    An accountant given NaN or inf would report ε = 0.
    """
    # np.float64 is a float, np.integer is not an int.
    if isinstance(number, bool) or not isinstance(number, (int, float, np.integer, np.floating)):
        raise ValueError(f"{name} must be a number")
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and above zero, not {number:g}")
    return float(number)


def _round_up(number: float, digits: int = 3) -> str:
    """Print with `digits` significant digits, rounded up: a printed ε must not understate.

    >>> _round_up(0.72553), _round_up(12.0), _round_up(0.0)
    ('0.726', '12.0', '0.00')
    """
    if not math.isfinite(number) or number == 0:
        return f"{number:.{digits - 1}f}"
    exact = Decimal(repr(float(number)))
    step = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{exact.quantize(step, rounding=ROUND_CEILING):f}"
