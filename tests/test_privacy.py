import json
import math
import subprocess
import sys

import numpy as np
import pytest
from dp_accounting import get_epsilon_gaussian

from ecos_pl.privacy import (
    MIN_GRID_NOISE_STD,
    PrivacyStatement,
    Release,
    _loss_distribution,
    add_discrete_gaussian,
    calibrate_noise_multiplier,
    check_delta,
    epsilon_of,
    poisson_mask,
)

DELTA = 1e-5


def counts(noise_std, sample_rate=1.0):
    return Release("coverage_counts", noise_std, 1.0, sample_rate, one_coordinate=True)


def vector(noise_multiplier, sample_rate=1.0, sensitivity=2.0**20):
    return Release("prototypes", noise_multiplier * sensitivity, sensitivity, sample_rate)


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

        patch.setattr("ecos_pl.privacy._loss_distribution", measured)
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


BAD_NUMBERS = [math.nan, math.inf, -math.inf, 0, 0.0, -1.0, True, None, "5", 1e-400]


@pytest.mark.parametrize("bad", BAD_NUMBERS)
@pytest.mark.parametrize("name", ["noise_std", "sensitivity", "sample_rate"])
def test_bad_release_refused(name, bad):
    good = {"noise_std": 1e6, "sensitivity": 1e5, "sample_rate": 0.5}
    with pytest.raises(ValueError, match="release"):
        Release("x", **{**good, name: bad})


@pytest.mark.parametrize(
    "fields",
    [
        {"noise_std": 0.4, "one_coordinate": True},
        {"noise_std": 1e13, "one_coordinate": True},
        {"noise_std": 5.0, "sensitivity": 2.0, "one_coordinate": True},
        {"noise_std": 5.0},  # a vector on a coarse grid
        {"noise_std": 5.0, "sample_rate": 1.5, "one_coordinate": True},
        {"noise_std": 5.0, "kind": "", "one_coordinate": True},
        {"noise_std": 5.0, "kind": None, "one_coordinate": True},
        {"noise_std": 5.0, "one_coordinate": 1},
    ],
)
def test_release_without_valid_formula_refused(fields):
    with pytest.raises(ValueError):  # noqa: PT011
        Release(**{"kind": "x", "sensitivity": 1.0, **fields})


def test_release_round_trip():
    release = counts(5, 0.25)
    fields = json.loads(json.dumps(release.to_dict()))
    assert Release.from_dict(fields) == release
    assert type(Release("x", np.float32(8), np.int64(1), 1, one_coordinate=True).noise_std) is float
    for broken in (
        {**fields, "extra": 1},
        {k: v for k, v in fields.items() if k != "sample_rate"},
        {**fields, "noise_std": "5"},
        [fields],
        None,
    ):
        with pytest.raises(ValueError, match="release"):
            Release.from_dict(broken)


@pytest.mark.parametrize("bad", [*BAD_NUMBERS, 1.0, 1e-11])
def test_bad_delta_refused(bad):
    for use in (check_delta, lambda d: epsilon_of([counts(5.0)], d)):
        with pytest.raises(ValueError, match="delta"):
            use(bad)
    with pytest.raises(ValueError, match="delta"):
        PrivacyStatement(1.0, bad)


def test_statement_never_understates():
    expected = "ε = 1.98 at δ = 1e-05, per sample, add/remove, PLD accountant"
    assert str(PrivacyStatement(1.98, DELTA)) == expected
    assert "ε = 1.99 " in str(PrivacyStatement(1.9801, DELTA))
    assert "ε = inf " in str(PrivacyStatement(math.inf, DELTA))
    with pytest.raises(ValueError, match="epsilon"):
        PrivacyStatement(math.nan, DELTA)


@pytest.mark.parametrize("bad", [*BAD_NUMBERS, 0.49, 1.1e12])
def test_noise_scale_refused(bad):
    # opendp itself accepts scale 0 and releases the truth.
    with pytest.raises(ValueError, match="noise_std"):
        add_discrete_gaussian(np.zeros(3, dtype=np.int64), bad)


def test_noise_keeps_shape_and_type():
    for shape in ((0,), (3,), (2, 5)):
        noisy = add_discrete_gaussian(np.zeros(shape, dtype=np.int64), 1e6)
        assert noisy.shape == shape
        assert noisy.dtype == np.int64
    for bad in (np.zeros(3), np.zeros(3, np.int32), np.array([2**62])):
        with pytest.raises(ValueError, match="int64"):
            add_discrete_gaussian(bad, 5.0)


def test_mask():
    assert poisson_mask(7, 1.0).all()
    assert len(poisson_mask(0, 0.5)) == 0
    assert not (poisson_mask(1000, 0.5) == poisson_mask(1000, 0.5)).all()
    kept = poisson_mask(1_000_000, 0.1).sum()
    assert abs(kept - 100_000) < 5 * 300  # five standard deviations
    with pytest.raises(ValueError, match="sample_rate"):
        poisson_mask(3, 1.5)


def test_import_is_light():
    """Neither torch nor the accountant: a hospital's client starts quickly."""
    code = (
        "import sys, ecos_pl.privacy, ecos_pl.ledger;"
        "print([m for m in ('torch', 'dp_accounting', 'opendp', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
