import math

import dp_accounting as dpa
import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian
from dp_accounting.pld import PLDAccountant
from scipy import stats

from ecos_pl.accounting import (
    PrivacyStatement,
    _loss_distribution,
    calibrate_noise_multiplier,
    epsilon_of,
)
from ecos_pl.privacy import (
    MIN_GRID_NOISE_STD,
    Release,
)

DELTA = 1e-5
ALPHA = 1e-6  # false alarms
Z = stats.norm.isf(ALPHA / 2)


def counts(noise_std, sample_rate=1.0, repeats=1):
    return Release("coverage_counts", noise_std, 1.0, sample_rate, True, repeats)


def vector(noise_multiplier, sample_rate=1.0, sensitivity=2.0**20, repeats=1):
    noise_std = noise_multiplier * sensitivity
    return Release("prototypes", noise_std, sensitivity, sample_rate, repeats=repeats)


def normal_cdf(x):
    return 0.5 * math.erfc(-x / math.sqrt(2))


def gaussian_delta(epsilon, noise_multiplier):
    """Balle and Wang 2018, theorem 8."""
    half = 1 / (2 * noise_multiplier)
    shift = epsilon * noise_multiplier
    return normal_cdf(half - shift) - math.exp(epsilon) * normal_cdf(-half - shift)


def balle_wang(noise_multiplier, sample_rate=1.0, delta=DELTA):
    """Closed-form ε of one Gaussian release, amplified by Poisson sampling."""
    low, high = 0.0, 300.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        if gaussian_delta(middle, noise_multiplier) > delta / sample_rate:
            low = middle
        else:
            high = middle
    return math.log1p(sample_rate * math.expm1(high))


def discrete_epsilon(noise_std, sample_rate=1.0):
    """ε of one sampled count by summing over the outcomes, add and remove, without PLDs."""
    support = np.arange(-int(40 * noise_std) - 2, int(40 * noise_std) + 3)
    without = np.exp(-(support**2) / (2 * noise_std**2))
    without /= without.sum()
    shifted = np.exp(-((support - 1) ** 2) / (2 * noise_std**2))
    shifted /= shifted.sum()
    with_one = (1 - sample_rate) * without + sample_rate * shifted

    def delta(epsilon):
        add = np.maximum(with_one - np.exp(epsilon) * without, 0).sum()
        return max(add, np.maximum(without - np.exp(epsilon) * with_one, 0).sum())

    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > DELTA else (low, middle)
    return high


@pytest.mark.parametrize(
    ("noise", "sample_rate", "gaussian", "discrete"),
    [
        (1, 1.0, 4.3772, 4.4302),
        (1, 0.5, 3.5340, 3.6668),
        (1, 0.1, 1.6845, 1.4354),
        (2, 1.0, 1.9931, 2.0113),
        (2, 0.5, 1.3536, 1.3217),
        (2, 0.1, 0.3690, 0.3676),
        (5, 1.0, 0.7255, 0.7266),
        (5, 0.5, 0.4034, 0.4038),
        (5, 0.1, 0.0793, 0.0795),
        (10, 1.0, 0.3407, 0.3408),
        (10, 0.5, 0.1740, 0.1741),
        (10, 0.1, 0.0313, 0.0313),
        (25, 1.0, 0.1254, 0.1254),
        (25, 0.5, 0.0605, 0.0605),
        (25, 0.1, 0.0102, 0.0102),
    ],
)
def test_one_release_matches_closed_forms(noise, sample_rate, gaussian, discrete):
    assert epsilon_of([vector(noise, sample_rate)], DELTA) == pytest.approx(gaussian, abs=5e-4)
    assert epsilon_of([counts(noise, sample_rate)], DELTA) == pytest.approx(discrete, abs=5e-4)
    closed_form = balle_wang(noise, sample_rate)
    overstated = epsilon_of([vector(noise, sample_rate)], DELTA) - closed_form
    assert 0 <= overstated <= 0.002 * closed_form
    by_sums = discrete_epsilon(noise, sample_rate)
    overstated = epsilon_of([counts(noise, sample_rate)], DELTA) - by_sums
    assert -1e-9 <= overstated <= 0.002 * by_sums


def test_sampled_compositions():
    for num_releases, expected in ((1, 0.0793), (3, 0.1292), (10, 0.2312)):
        epsilon = epsilon_of([vector(5, 0.1)] * num_releases, DELTA)
        assert epsilon == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("num_releases", [2, 5, 30])
def test_equal_gaussians_compose_to_one_gaussian(num_releases):
    epsilon = epsilon_of([vector(6.0)] * num_releases, DELTA)
    expected = balle_wang(6.0 / math.sqrt(num_releases))
    assert expected <= epsilon <= 1.002 * expected
    assert expected == pytest.approx(
        get_epsilon_gaussian(6.0 / math.sqrt(num_releases), DELTA), rel=1e-6
    )


@pytest.mark.parametrize("repeats", [2, 30, 1000])
def test_repeats_of_a_gaussian_are_one_gaussian(repeats):
    repeated = epsilon_of([vector(40.0, repeats=repeats)], DELTA)
    closed_form = balle_wang(40.0 / math.sqrt(repeats))
    assert closed_form <= repeated <= 1.002 * closed_form
    assert repeated == pytest.approx(epsilon_of([vector(40.0)] * repeats, DELTA), rel=1e-9)


@pytest.mark.parametrize(
    ("noise", "sample_rate", "repeats"),
    [(5.0, 0.1, 10), (25 / math.sqrt(2), 0.15, 1000), (5.0, 0.05, 2000), (20.0, 0.5, 300)],
)
def test_sampled_repeats_match_an_independent_composition(noise, sample_rate, repeats):
    event = dpa.PoissonSampledDpEvent(sample_rate, dpa.GaussianDpEvent(noise))
    accountant = PLDAccountant(
        neighboring_relation=dpa.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=2e-5,
    )
    accountant.compose(dpa.SelfComposedDpEvent(event, repeats))
    expected = accountant.get_epsilon(DELTA)
    epsilon = epsilon_of([vector(noise, sample_rate, repeats=repeats)], DELTA)
    assert 0.9995 * expected <= epsilon <= 1.005 * expected
    assert epsilon == pytest.approx(
        epsilon_of([vector(noise, sample_rate)] * repeats, DELTA), rel=1e-9
    )


def test_repeated_histograms_compose_as_single_ones():
    three = epsilon_of([counts(2.0, 0.3, repeats=3)], DELTA)
    assert three == epsilon_of([counts(2.0, 0.3)] * 3, DELTA)
    assert three == epsilon_of([counts(2.0, 0.3, repeats=2), counts(2.0, 0.3)], DELTA)
    assert three > epsilon_of([counts(2.0, 0.3)], DELTA)


def test_votes_and_screenings_of_the_literature():
    """1,000 screenings and 600 votes at sample rate 0.15, noise 75 and 25: PLD 0.797."""
    screenings = counts(75.0, 0.15, repeats=1000)
    votes = vector(25 / math.sqrt(2), 0.15, repeats=600)
    assert epsilon_of([screenings, votes], DELTA) == pytest.approx(0.797, abs=1e-3)
    shared = vector(1 / math.sqrt(1 / 75**2 + 2 / 25**2), 0.15, repeats=1000)
    assert epsilon_of([shared], DELTA) == pytest.approx(1.035, abs=1e-3)


def test_a_histogram_and_a_vector_compose():
    epsilon = epsilon_of([counts(5.0), vector(5.0)], DELTA)
    gaussian = balle_wang(5.0 / math.sqrt(2))
    assert gaussian <= epsilon <= 1.003 * gaussian
    assert epsilon == epsilon_of([vector(5.0), counts(5.0)], DELTA)


def test_histogram_formulas_meet():
    exact, continuous = epsilon_of([counts(49.999)], DELTA), epsilon_of([counts(50.001)], DELTA)
    assert exact == pytest.approx(continuous, rel=5e-4)
    assert epsilon_of([counts(60.0)], DELTA) >= discrete_epsilon(60.0)
    assert epsilon_of([counts(60.0, 0.3)], DELTA) >= discrete_epsilon(60.0, 0.3)


@pytest.mark.parametrize("noise_std", [50.0, MIN_GRID_NOISE_STD])
def test_discrete_gaussian_is_nearly_a_rounded_gaussian(noise_std):
    """The bound η per coordinate that `epsilon_of` relies on, by quadrature over each step."""
    rounded_variance = noise_std**2 - 1 / 12
    nodes, weights = np.polynomial.legendre.leggauss(12)
    offset, weights = nodes / 2, weights / 2
    steps = np.linspace(0, 10 * noise_std, 400).round()[:, None]
    exponent = -(2 * steps * offset + offset**2) / (2 * rounded_variance)
    log_step = np.log1p((np.expm1(exponent) * weights).sum(1))
    # Both normalisers are sqrt(2π)·std: for the discrete one up to exp(-2π²σ²).
    log_ratio = (
        log_step
        + 0.5 * np.log(noise_std**2 / rounded_variance)
        - steps[:, 0] ** 2 * (1 / rounded_variance - 1 / noise_std**2) / 2
    )
    t = steps[:, 0] / noise_std
    bound = (t**4 / 2880 + t**2 / 100 + 1) / noise_std**4
    assert (np.abs(log_ratio) <= bound + 1e-14).all()


def test_zcdp_bound_is_above():
    """CKS20's zCDP bound holds for every integer vector; the PLD must stay below its conversion."""
    rho = 1 / (2 * 5.0**2)
    zcdp = rho + 2 * math.sqrt(rho * math.log(1 / DELTA))
    assert epsilon_of([counts(5.0)], DELTA) < zcdp
    assert epsilon_of([vector(5.0)], DELTA) < zcdp


def test_rare_samples_are_not_understated():
    closed_form = balle_wang(1.0, 0.001)
    assert closed_form <= epsilon_of([vector(1.0, 0.001)], DELTA) <= 1.015 * closed_form


def test_no_release_costs_nothing():
    assert epsilon_of([], DELTA) == 0


def test_two_releases_are_accounted_on_a_small_grid():
    """What the time depends on: points of the loss distributions (about 0.1 s of work)."""
    _loss_distribution.cache_clear()
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        whole = _loss_distribution.__wrapped__

        def measured(mechanism, exponent):
            loss = whole(mechanism, exponent)
            sizes.append(loss._pmf_remove.size)
            return loss

        patch.setattr("ecos_pl.accounting._loss_distribution", measured)
        epsilon_of([counts(3.13, 0.5), vector(3.13, 0.5)], DELTA)
    assert len(sizes) == 2
    assert 100 < max(sizes) < 50_000


@pytest.mark.parametrize(
    ("max_epsilon", "sample_rate", "one_coordinate"),
    [(0.5, 1.0, True), (2.0, 0.2, True), (2.0, 1.0, False), (0.5, 0.2, False)],
)
def test_calibration_hits_the_limit(max_epsilon, sample_rate, one_coordinate):
    spent = [counts(8.0)]
    multiplier = calibrate_noise_multiplier(
        max_epsilon, DELTA, sample_rate=sample_rate, spent=spent, one_coordinate=one_coordinate
    )
    make = counts if one_coordinate else vector
    epsilon = epsilon_of([*spent, make(multiplier, sample_rate)], DELTA)
    assert 0.995 * max_epsilon <= epsilon <= max_epsilon
    assert epsilon_of([*spent, make(0.998 * multiplier, sample_rate)], DELTA) > max_epsilon


@pytest.mark.parametrize(
    ("repeats", "sample_rate", "one_coordinate"),
    [(60, 1.0, False), (1000, 0.15, False), (1000, 0.15, True)],
)
def test_calibration_of_repeats_hits_the_limit(repeats, sample_rate, one_coordinate):
    spent = [counts(8.0)]
    multiplier = calibrate_noise_multiplier(
        1.0,
        DELTA,
        sample_rate=sample_rate,
        spent=spent,
        one_coordinate=one_coordinate,
        repeats=repeats,
    )
    make = counts if one_coordinate else vector
    epsilon = epsilon_of([*spent, make(multiplier, sample_rate, repeats=repeats)], DELTA)
    assert 0.995 <= epsilon <= 1.0


def test_calibration_holds_for_any_sensitivity():
    multiplier = calibrate_noise_multiplier(2.0, DELTA)
    for sensitivity in (65536.0, math.sqrt(2**32 + 12345**2), 1e7 / 3):
        assert epsilon_of([vector(multiplier, 1.0, sensitivity)], DELTA) <= 2.0


def test_calibration_without_room():
    spent = [counts(2.0)]
    with pytest.raises(ValueError, match=r"ε = 2\.02 is spent already, over 1"):
        calibrate_noise_multiplier(1.0, DELTA, spent=spent)
    with pytest.raises(ValueError, match="no noise is large enough"):
        calibrate_noise_multiplier(epsilon_of(spent, DELTA), DELTA, spent=spent)
    assert calibrate_noise_multiplier(1e4, DELTA) == 0.05
    assert calibrate_noise_multiplier(1e4, DELTA, one_coordinate=True) == 0.5


def test_statement_never_understates():
    expected = "ε = 1.98 at δ = 1e-05, per sample, add/remove, PLD accountant"
    assert str(PrivacyStatement(1.98, DELTA)) == expected
    assert "ε = 1.99 " in str(PrivacyStatement(1.9801, DELTA))
    assert "ε = inf " in str(PrivacyStatement(math.inf, DELTA))
    with pytest.raises(ValueError, match="epsilon"):
        PrivacyStatement(math.nan, DELTA)
