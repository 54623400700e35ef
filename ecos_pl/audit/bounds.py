"""Lower bounds on ε from canaries: samples whose presence is guessed from what was released.

Canary i is put into the data by a fair coin; its score is what the release shows of it, 1 more on
average if it was there. Many canaries fit into one release when each moves integers of its own
(one-run auditing: Steinke, Nasr and Jagielski 2023, arXiv 2305.08846). The bounds take the guesses
as independent, which they are where the noise of different integers is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

_CONTINUOUS_STD = 50.0  # from here on, the Gaussian's ε is the discrete Gaussian's to 5 digits


def clopper_pearson(hits: int, total: int, alpha: float, *, upper: bool) -> float:
    """Bound a probability from `hits` of `total` trials, wrong with probability `alpha` at most.

    Exact and one-sided (Clopper and Pearson 1934).

    >>> round(clopper_pearson(0, 100, 0.05, upper=True), 4)  # 1 - 0.05^(1/100)
    0.0295
    """
    if not 0 <= hits <= total or not 0 < alpha < 1:
        raise ValueError("clopper_pearson needs 0 <= hits <= total and alpha in (0, 1)")
    if upper:
        return 1.0 if hits == total else float(stats.beta.isf(alpha, hits + 1, total - hits))
    return 0.0 if hits == 0 else float(stats.beta.ppf(alpha, hits, total - hits + 1))


def epsilon_any_shape(
    coins: npt.NDArray[np.bool_],
    scores: npt.NDArray[np.float64],
    thresholds: Sequence[float],
    *,
    delta: float,
    alpha: float,
) -> float:
    """Bound ε from below, whatever the shape of the noise.

    Under (ε, δ) every guess keeps true positives ≤ e^ε · false positives + δ (Kairouz, Oh and
    Viswanath 2015, theorem 2.1). The best of several thresholds is taken, each with its share of
    `alpha`, so the thresholds must not depend on the scores.

    Args:
        coins: `[N]`, whether each canary was in the data.
        scores: `[N]`, what the release shows of each.
        thresholds: A canary is guessed present where its score reaches the threshold.
        delta: The δ of the bound.
        alpha: Probability that the bound is wrong.
    """
    share = alpha / (2 * len(thresholds))
    best = 0.0
    for threshold in thresholds:
        guess = scores >= threshold
        true = clopper_pearson(int(guess[coins].sum()), int(coins.sum()), share, upper=False)
        false = clopper_pearson(int(guess[~coins].sum()), int((~coins).sum()), share, upper=True)
        if true > delta:
            best = max(best, math.log((true - delta) / false))
    return best


def noise_at_most(
    right: int, total: int, *, sample_rate: float, one_coordinate: bool, alpha: float
) -> float:
    """Bound the noise multiplier from above by how many canaries were guessed right.

    A canary is guessed present where its score reaches one half. With noise multiplier s this is
    right with probability 1/2 + sample_rate · (A - 1/2), where A is Φ(1/2s) for Gaussian noise (the
    trade-off curve of Gaussian differential privacy: Dong, Roth and Su 2019, arXiv 1905.02383) and
    (1 + p(0))/2 for discrete Gaussian noise on an integer, with p(0) ≤ 1/(s√2π).

    Returns:
        The bound: infinite if nothing was learned, zero if no noise explains the guesses.
    """
    accuracy = clopper_pearson(right, total, alpha, upper=False)
    advantage = (accuracy - 0.5) / sample_rate  # A - 1/2
    if advantage <= 0:
        return math.inf
    if advantage >= 0.5:
        return 0.0
    if one_coordinate:
        return 1 / (2 * advantage * math.sqrt(2 * math.pi))
    return 1 / (2 * float(stats.norm.ppf(0.5 + advantage)))


def gaussian_epsilon(
    noise_multiplier: float, *, sample_rate: float, one_coordinate: bool, delta: float
) -> float:
    """Return ε of one Gaussian release in closed form, apart from the accountant's numerics.

    The ε of Balle and Wang 2018 (arXiv 1805.06530, theorem 8), or of the discrete Gaussian where a
    sample moves one integer by one, amplified by Poisson sampling (Balle, Barthe and Gaboardi 2018,
    arXiv 1807.01647, theorem 8).

    >>> round(gaussian_epsilon(5, sample_rate=0.1, one_coordinate=False, delta=1e-5), 4)
    0.0793
    """
    if noise_multiplier == 0:
        return math.inf
    if math.isinf(noise_multiplier) or delta >= sample_rate:
        return 0.0
    if one_coordinate and noise_multiplier < _CONTINUOUS_STD:
        plain = _discrete_gaussian_epsilon(noise_multiplier, delta / sample_rate)
    else:
        # Seconds to import; the checks without canaries do not need it.
        from dp_accounting import get_epsilon_gaussian

        plain = float(get_epsilon_gaussian(noise_multiplier, delta / sample_rate))
    # log(1 + q(e^ε - 1)), written so that a large ε does not overflow.
    if plain > 50:
        return plain + math.log(sample_rate)
    return math.log1p(sample_rate * math.expm1(plain))


def discrete_tail(start: int, scale: float) -> float:
    """Return P(Z ≥ start) of discrete Gaussian noise Z.

    >>> discrete_tail(0, 0.5) + discrete_tail(1, 0.5)  # by symmetry
    1.0
    """
    reach = math.ceil(40 * scale) + abs(start)
    integers = np.arange(-reach, reach + 1)
    weight = np.exp(-(integers**2) / (2 * scale**2))
    return float(weight[integers >= start].sum() / weight.sum())


def _discrete_gaussian_epsilon(scale: float, delta: float) -> float:
    """Return ε where P(Z ≥ t - 1) - e^ε P(Z ≥ t) is `delta` (CKS20, theorem 7).

    t is the least integer with P(Z = t - 1) > e^ε P(Z = t), which is t > ε·scale² + 1/2.
    """

    def divergence(epsilon: float) -> float:
        start = math.floor(epsilon * scale**2 + 0.5) + 1
        return discrete_tail(start - 1, scale) - math.exp(epsilon) * discrete_tail(start, scale)

    low, high = 0.0, 1.0
    while divergence(high) > delta:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) > delta else (low, middle)
    return low
