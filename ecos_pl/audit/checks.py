"""Checks of one release mechanism: exact ones on neighbouring data, statistical ones on its noise.

Every statistical check fails a sound mechanism with a probability of 1e-6 (`ALPHA`), whatever the
seed: all randomness is fresh. What passes is not proven private; what fails is broken.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from ecos_pl.privacy import Release, poisson_mask

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

ALPHA = 1e-6
"""Probability with which a check fails a sound mechanism."""

_NUM_ROWS = 3_000


class AuditFailure(Exception):
    """A check found the mechanism broken; the text says what was seen."""


@dataclass(frozen=True)
class Mechanism:
    """A mechanism that releases noisy totals, as the audit sees it: rows that canaries may fill.

    A dataset is a list `[n]` of row numbers. Each entry is one sample, made so that it moves the
    integers of its row by `canary` and by nothing more, as far as a sample can move them.

    Attributes:
        name: Printed in the table.
        canary: `[w]` int64, what one sample adds to its row before noise.
        totals: (rows, num_rows) → `[num_rows, w]`, without noise.
        release: (rows, num_rows, sample_rate) → `[num_rows, w]` noisy, and what it declares.
        neighbours: Yields, for pairs of hostile datasets that differ by one sample, the totals of
            the smaller one, of the larger one and of that sample alone.
        rounded: The noise is drawn on a finer grid and rounded to the released integers.
    """

    name: str
    canary: Integers
    totals: Callable[[Integers, int], Integers]
    release: Callable[[Integers, int, float], tuple[Integers, Release]]
    neighbours: Callable[[np.random.Generator], Iterable[tuple[Integers, Integers, Integers]]]
    rounded: bool = False

    @property
    def length(self) -> float:
        """L2 norm of the canary."""
        return math.sqrt(float(np.square(self.canary.astype(np.float64)).sum()))

    def noise_std(self, release: Release) -> float:
        """Return the standard deviation that each released integer's noise must have.

        The canary is as long as the sensitivity, so this holds on any grid.
        """
        return math.hypot(release.noise_multiplier * self.length, self.rounded / math.sqrt(12))

    def scores(self, noisy: Integers) -> Floats:
        """Project `[num_rows, w]` on the canary's direction: 1 per sample in the row, plus noise.

        The noise has the standard deviation `noise_std` / `length`.
        """
        projected: Floats = noisy @ self.canary.astype(np.float64) / self.length**2
        return projected


def check_integers(mechanism: Mechanism) -> None:
    """What is released is int64, so no low-order bits tell where the noise was added."""
    noisy, release = mechanism.release(np.arange(3), 5, 1.0)
    require(noisy.dtype == np.int64, "the released values are not int64")
    require(noisy.shape == (5, len(mechanism.canary)), "the released values have another shape")
    require(release.sample_rate == 1, "another sample rate is declared than was asked for")


def check_neighbours(mechanism: Mechanism) -> None:
    """Before noise, one sample changes its own row, by no more than the canary is long.

    And by the same integers whatever other samples there are. That the noise fits this length is
    for `check_residuals` to say.
    """
    rng = np.random.default_rng()
    for _ in range(10):
        rows = rng.integers(0, 50, 300)
        before = mechanism.totals(rows, 50)
        for extra in (0, 49, int(rng.integers(50))):
            expected = before.copy()
            expected[extra] += mechanism.canary
            after = mechanism.totals(np.append(rows, extra), 50)
            require(bool((after == expected).all()), "one more sample changes other integers")
    _, release = mechanism.release(np.zeros(0, dtype=np.int64), 1, 1.0)
    limit = sum(int(value) ** 2 for value in mechanism.canary)
    for fewer, more, alone in mechanism.neighbours(rng):
        change = more - fewer
        require(bool((change == alone).all()), "a sample's part depends on the other samples")
        square = sum(int(value) ** 2 for value in change.ravel())
        require(
            square <= limit, "a sample changes the totals by more than the declared sensitivity"
        )
        if release.one_coordinate:
            entries = np.abs(change[change != 0]).tolist()
            require(entries == [1], "a sample changes more than one count, or by more than one")


def check_residuals(mechanism: Mechanism) -> None:
    """Mean, variance and correlations of the noise are as declared, in full and in empty rows."""
    counts = np.repeat([3, 0], _NUM_ROWS // 2)
    noisy, release = mechanism.release(np.repeat(np.arange(len(counts)), counts), len(counts), 1.0)
    residual = noisy - counts[:, None] * mechanism.canary  # [num_rows, w]
    residual = residual / mechanism.noise_std(release)
    width = len(mechanism.canary)
    alpha = ALPHA / (6 * width)
    for column in range(width):
        for name, rows in (("occupied", counts > 0), ("empty", counts == 0)):
            _require_standard(residual[rows, column], alpha, f"noise of {name} rows")
        values = residual[:, column]
        _require_uncorrelated(values[:-1], values[1:], alpha, "the noise of neighbouring rows")
        other = residual[:, (column + 1) % width]
        if width > 1:
            _require_uncorrelated(values, other, alpha, "the noise of one row's integers")


def check_fresh(mechanism: Mechanism) -> None:
    """Two releases under the same seeds have unrelated noise."""
    noise = []
    for _ in range(2):
        with same_seeds():
            noisy, release = mechanism.release(np.zeros(0, dtype=np.int64), _NUM_ROWS, 1.0)
        noise.append((noisy / mechanism.noise_std(release)).ravel())
    _require_uncorrelated(noise[0], noise[1], ALPHA, "the noise of two releases")


def check_sampling(mechanism: Mechanism, sample_rate: float, repeats: int = 400) -> None:
    """Over many releases, a row's total varies as a Poisson sample and the noise make it.

    Every sample kept independently and anew: n samples at rate q give mean nq and variance
    nq(1 - q) + noise². A sample of fixed size, or one mask used twice, lacks the first term.
    """
    _, release = mechanism.release(np.zeros(0, dtype=np.int64), 1, sample_rate)
    require(release.sample_rate == sample_rate, "another sample rate is declared than was used")
    noise = mechanism.noise_std(release) / mechanism.length
    # Sampling weighs four times as much as the noise, as far as time allows.
    spread = sample_rate * (1 - sample_rate)
    num_samples = min(20_000, math.ceil(4 * max(noise**2, 25) / spread))
    rows = np.zeros(num_samples, dtype=np.int64)
    totals = np.empty(repeats)
    for index in range(repeats):
        noisy, _ = mechanism.release(rows, 1, sample_rate)
        totals[index] = mechanism.scores(noisy)[0]
    deviation = math.sqrt(num_samples * spread + noise**2)
    scaled = (totals - num_samples * sample_rate) / deviation
    _require_standard(scaled, ALPHA / 2, "totals of sampled data")


def canary_scores(
    mechanism: Mechanism, num_canaries: int, sample_rate: float, rows_per_run: int = 500
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Put a canary into each row by a fair coin and release, until `num_canaries` were tried.

    Returns:
        Coins `[N]` and the scores `[N]` of what was released.
    """
    coins, scores = [], []
    for start in range(0, num_canaries, rows_per_run):
        coin = poisson_mask(min(rows_per_run, num_canaries - start), 0.5)
        noisy, _ = mechanism.release(np.flatnonzero(coin), len(coin), sample_rate)
        coins.append(coin)
        scores.append(mechanism.scores(noisy))
    return np.concatenate(coins), np.concatenate(scores)


def require(condition: bool, text: str) -> None:
    """Raise AuditFailure with this text unless the condition holds."""
    if not condition:
        raise AuditFailure(text)


def _require_standard(values: Floats, alpha: float, name: str) -> None:
    """Fail unless mean and variance fit independent values of mean 0 and variance 1."""
    n = len(values)
    limit = float(stats.norm.isf(alpha / 4)) / math.sqrt(n)
    require(abs(float(values.mean())) < limit, f"{name}: the mean is off")
    low, high = stats.chi2.ppf([alpha / 4, 1 - alpha / 4], n - 1) / (n - 1)
    variance = float(values.var(ddof=1))
    require(low < variance < high, f"{name}: variance {variance:.3g} times the declared one")


def _require_uncorrelated(first: Floats, second: Floats, alpha: float, name: str) -> None:
    product = float((first * second).mean())
    limit = float(stats.norm.isf(alpha / 2)) / math.sqrt(len(first))
    require(abs(product) < limit, f"{name}: correlation {product:.2g}")


@contextmanager
def same_seeds() -> Iterator[None]:
    """Seed every global generator equally, and leave them afterwards as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
