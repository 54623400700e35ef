import json
import math
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from ecos_pl.accounting import (
    PrivacyStatement,
    epsilon_of,
)
from ecos_pl.privacy import (
    MAX_REPEATS,
    MIN_GRID_NOISE_STD,
    PER_SAMPLE,
    PrivacyUnits,
    Release,
    add_discrete_gaussian,
    check_delta,
    grid_scale,
    integer_release,
    noisy_integers,
    poisson_mask,
)

DELTA = 1e-5
ALPHA = 1e-6  # false alarms
Z = stats.norm.isf(ALPHA / 2)


def counts(noise_std, sample_rate=1.0, repeats=1):
    return Release("coverage_counts", noise_std, 1.0, sample_rate, True, repeats)


def vector(noise_multiplier, sample_rate=1.0, sensitivity=2.0**20, repeats=1):
    noise_std = noise_multiplier * sensitivity
    return Release("prototypes", noise_std, sensitivity, sample_rate, repeats=repeats)


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
        {"noise_std": 5.0, "one_coordinate": True, "repeats": 0},
        {"noise_std": 5.0, "one_coordinate": True, "repeats": -1},
        {"noise_std": 5.0, "one_coordinate": True, "repeats": 1.0},
        {"noise_std": 5.0, "one_coordinate": True, "repeats": True},
        {"noise_std": 5.0, "one_coordinate": True, "repeats": None},
        {"noise_std": 5.0, "one_coordinate": True, "repeats": MAX_REPEATS + 1},
    ],
)
def test_release_without_valid_formula_refused(fields):
    with pytest.raises(ValueError):  # noqa: PT011
        Release(**{"kind": "x", "sensitivity": 1.0, **fields})


def test_release_round_trip():
    release = counts(5, 0.25, repeats=np.int64(7))
    assert type(release.repeats) is int
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
    for bad in (np.zeros(3), np.zeros(3, np.int32), np.array([2**62]), np.array([-(2**63)])):
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


@pytest.mark.parametrize("noise_std", [1e-3, 0.5, 3.0, 4095.9, 4096.0, 4096.1, 1e6])
def test_grid_scale_is_the_smallest_power_of_two(noise_std):
    scale = grid_scale(noise_std)
    assert scale * noise_std >= MIN_GRID_NOISE_STD
    assert scale == 1 or scale / 2 * noise_std < MIN_GRID_NOISE_STD
    assert scale.bit_count() == 1


@pytest.mark.parametrize("bad", [*BAD_NUMBERS, 1e-9])
def test_grid_scale_refuses(bad):
    with pytest.raises(ValueError, match="noise_std"):
        grid_scale(bad)


def noisy(values, noise_std, sensitivity, one_coordinate=False):
    return noisy_integers(
        values,
        kind="x",
        noise_std=noise_std,
        sensitivity=sensitivity,
        sample_rate=0.5,
        one_coordinate=one_coordinate,
    )


def test_releases_of_integers():
    values = np.arange(6).reshape(2, 3)
    _, release = noisy(values, 5.0, 1, one_coordinate=True)
    assert release == Release("x", 5.0, 1.0, 0.5, one_coordinate=True)
    for sensitivity, one_coordinate in ((1, False), (3, True), (math.sqrt(2), False)):
        released, release = noisy(values, 5.0, sensitivity, one_coordinate)
        assert release == Release("x", 5.0 * 1024, sensitivity * 1024, 0.5)
        assert release.noise_multiplier == pytest.approx(5.0 / sensitivity)
        assert released.dtype == np.int64
        assert released.shape == (2, 3)
    planned = integer_release("x", noise_std=5.0, sensitivity=3, sample_rate=0.5, repeats=9)
    assert planned == Release("x", 5120.0, 3072.0, 0.5, repeats=9)


@pytest.mark.parametrize(("noise_std", "sensitivity"), [(0.7, 2), (8.0, math.sqrt(2)), (5e3, 1)])
@pytest.mark.parametrize("value", [-1_000_000, 0, 999_999])
def test_noise_on_integers_is_as_declared(noise_std, sensitivity, value):
    n = 20_000
    released, _ = noisy(np.full(n, value, dtype=np.int64), noise_std, sensitivity)
    residual = released - value
    variance = noise_std**2 + 1 / 12  # rounding adds Sheppard's twelfth, to 4 digits at 0.7
    assert abs(residual.mean()) < Z * math.sqrt(variance / n)
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], n - 1) / (n - 1)
    assert low < residual.var(ddof=1) / variance < high


def test_integers_that_do_not_fit_the_grid_are_refused():
    largest = 2**52 // grid_scale(0.5) - 1
    assert abs(noisy(np.array([largest]), 0.5, 2)[0] - largest).max() < 10
    for bad in (np.array([largest + 1]), np.array([-(2**63)]), np.zeros(2), np.zeros(2, np.int32)):
        with pytest.raises(ValueError, match="int64"):
            noisy(bad, 0.5, 2)
    with pytest.raises(ValueError, match="1,000,000 integers"):
        noisy(np.zeros(1_000_001, dtype=np.int64), 5.0, 2)


def test_samples_as_units():
    assert PER_SAMPLE.name == "sample"
    assert PER_SAMPLE.used(4).tolist() == [True] * 4
    assert PER_SAMPLE.mask(5, 1.0).all()
    assert PER_SAMPLE.take(np.array([0])) is PER_SAMPLE


def test_a_persons_first_samples_are_used():
    owners = np.array([7, -2, 7, 7, -2, 5])
    assert PrivacyUnits(owners, 1).used(6).tolist() == [True, True, False, False, False, True]
    assert PrivacyUnits(owners, 2).used(6).tolist() == [True, True, True, False, True, True]
    assert PrivacyUnits(owners, 3).used(6).all()
    assert PrivacyUnits(owners, 2).name == "person"
    part = PrivacyUnits(owners, 1).take(np.array([2, 3, 4]))
    assert part.used(3).tolist() == [True, False, True]
    assert PrivacyUnits(owners[:0], 2).mask(0, 0.5).tolist() == []


def test_use_of_a_sample_depends_on_its_person_alone():
    rng = np.random.default_rng()
    owners = rng.integers(0, 30, 200)
    used = PrivacyUnits(owners, 3).used(200)
    assert np.bincount(owners[used]).max() <= 3
    for person in range(30):
        others = owners != person
        assert (PrivacyUnits(owners[others], 3).used(others.sum()) == used[others]).all()


def test_persons_take_part_whole():
    owners = np.repeat(np.arange(40_000), 3)[::-1].copy()
    units = PrivacyUnits(owners, 2)
    mask = units.mask(len(owners), 0.25)
    assert not (mask & ~units.used(len(owners))).any()
    per_person = np.bincount(owners[mask], minlength=40_000)
    assert set(per_person) == {0, 2}
    kept = (per_person > 0).sum()
    assert abs(kept - 10_000) < Z * math.sqrt(40_000 * 0.25 * 0.75)
    both = (mask & units.mask(len(owners), 0.25)).sum() / 2  # fresh: 1/16 are in both
    assert abs(both - 2_500) < Z * math.sqrt(40_000 / 16)


@pytest.mark.parametrize(
    ("owners", "max_samples", "message"),
    [
        (None, 2, "whom"),
        (np.zeros(3, np.int64), 0, "1 or more"),
        (np.zeros(3, np.int64), True, "whole"),
        (np.zeros(3, np.int64), 1.5, "whole"),
        (np.zeros(3), 1, "int64"),
        (np.zeros((3, 1), np.int64), 1, "int64"),
    ],
)
def test_bad_units_refused(owners, max_samples, message):
    with pytest.raises(ValueError, match=message):
        PrivacyUnits(owners, max_samples)


def test_units_of_other_samples_refused():
    with pytest.raises(ValueError, match=r"^owners and samples differ in length$"):
        PrivacyUnits(np.zeros(3, np.int64)).mask(4, 0.5)


def test_import_is_light():
    """Neither torch nor the accountant: a hospital's client starts quickly."""
    code = (
        "import sys, ecos_pl.privacy, ecos_pl.ledger;"
        "print([m for m in ('torch', 'dp_accounting', 'opendp', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
