"""Audit of the coverage release as built, and of broken versions that the audit must catch.

Every check has a false-alarm probability of 1e-6 and uses fresh entropy: no seed makes it pass.
It bounds mistakes from below; it proves no privacy.
"""

import functools
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from ecos_pl.coverage import coverage_counts, release_coverage
from ecos_pl.privacy import add_discrete_gaussian, poisson_mask
from ecos_pl.prototypes import release_prototypes

ALPHA = 1e-6
NUM_BINS = 5_000
Z = stats.norm.isf(ALPHA / 2)


def place(ids, num_bins):
    """One-dimensional samples and centroids with these nearest centroids."""
    return torch.tensor(ids, dtype=torch.float64)[:, None], torch.arange(num_bins)[:, None].double()


def count(ids, num_bins):
    return coverage_counts(*place(ids, num_bins)).numpy()


def built(ids, num_bins, noise_std, sample_rate):
    noisy, _ = release_coverage(*place(ids, num_bins), noise_std=noise_std, sample_rate=sample_rate)
    return noisy.numpy()


def check_neighbours(count_bins):
    """1: before noise, one more sample changes its own bin by one and nothing else."""
    rng = np.random.default_rng()
    for _ in range(10):
        ids = rng.integers(0, 50, 300)
        before = count_bins(ids, 50)
        for extra in (0, 49, int(rng.integers(50))):
            expected = before.copy()
            expected[extra] += 1
            assert (count_bins(np.append(ids, extra), 50) == expected).all(), "neighbours"


def check_residuals(release, noise_std):
    """2: mean, variance and neighbour correlation of the noise, on occupied and empty bins."""
    counts = np.repeat([3, 0], NUM_BINS // 2)
    ids = np.repeat(np.arange(NUM_BINS), counts)
    residual = release(ids, NUM_BINS, noise_std, 1.0) - counts
    for name, part in (("occupied", residual[counts > 0]), ("empty", residual[counts == 0])):
        n = len(part)
        assert abs(part.mean()) < Z * noise_std / math.sqrt(n), f"mean, {name}"
        low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], n - 1) / (n - 1)
        assert low < part.var(ddof=1) / noise_std**2 < high, f"variance, {name}"
    assert_uncorrelated(residual[:-1], residual[1:], noise_std, "neighbour bins")


def assert_uncorrelated(first, second, noise_std, name):
    product = (first * second).mean() / noise_std**2
    assert abs(product) < Z / math.sqrt(len(first)), name


def check_releases_differ(release, noise_std):
    """3: two releases under the same seeds are uncorrelated."""
    noise = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        noise.append(release(np.zeros(0, dtype=np.int64), NUM_BINS, noise_std, 1.0))
    assert_uncorrelated(*noise, noise_std, "two releases")


def check_canaries(release, noise_std):
    """4: one run, a coin per bin; the audited Gaussian privacy parameter is at most 1/noise."""
    coins = poisson_mask(NUM_BINS, 0.5)
    guess = release(np.flatnonzero(coins), NUM_BINS, noise_std, 1.0) >= 1

    def bound(hits, total, upper):  # Clopper and Pearson
        if upper:
            return 1.0 if hits == total else stats.beta.isf(ALPHA / 2, hits + 1, total - hits)
        return 0.0 if hits == 0 else stats.beta.ppf(ALPHA / 2, hits, total - hits + 1)

    true_positive = bound(guess[coins].sum(), coins.sum(), upper=False)
    false_positive = bound(guess[~coins].sum(), (~coins).sum(), upper=True)
    audited = stats.norm.ppf(true_positive) - stats.norm.ppf(false_positive)
    assert audited <= 1 / noise_std, "canaries"


def check_sampling(release, noise_std, repeats=800, n=400, sample_rate=0.5):
    """5: one bin, many releases: the variance is that of Poisson sampling plus the noise."""
    ids = np.zeros(n, dtype=np.int64)
    totals = np.array([release(ids, 1, noise_std, sample_rate)[0] for _ in range(repeats)])
    variance = n * sample_rate * (1 - sample_rate) + noise_std**2
    standard_error = math.sqrt(variance / repeats)
    assert abs(totals.mean() - n * sample_rate) < Z * standard_error, "sampling, mean"
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], repeats - 1) / (repeats - 1)
    assert low < totals.var(ddof=1) / variance < high, "sampling, variance"


def check_integers(release, noise_std):
    """6: released values are integers of an integer type."""
    assert release(np.arange(3), 5, noise_std, 1.0).dtype == np.int64, "type"


def audit(release, count_bins, noise_std):
    check_integers(release, noise_std)
    check_neighbours(count_bins)
    check_residuals(release, noise_std)
    check_releases_differ(release, noise_std)
    check_canaries(release, noise_std)
    check_sampling(release, noise_std)


@pytest.mark.parametrize("noise_std", [1.7, 5.0])
def test_release_as_built_passes(noise_std):
    audit(built, count, noise_std)


def exact(ids, num_bins, sample_rate):
    keep = poisson_mask(len(ids), sample_rate)
    return np.bincount(ids[keep], minlength=num_bins).astype(np.int64)


def mutant_none(ids, bins, std, rate):
    return exact(ids, bins, rate)


def mutant_double_noise(ids, bins, std, rate):
    return add_discrete_gaussian(exact(ids, bins, rate), 2 * std)


def mutant_less_noise(ids, bins, std, rate):
    return add_discrete_gaussian(exact(ids, bins, rate), std / math.sqrt(2))


def mutant_variance_as_std(ids, bins, std, rate):
    return add_discrete_gaussian(exact(ids, bins, rate), std**2)


def mutant_seeded(ids, bins, std, rate):
    noise = torch.randn(bins, generator=torch.Generator().manual_seed(len(ids))).numpy() * std
    return exact(ids, bins, rate) + noise.round().astype(np.int64)


def mutant_global_generator(ids, bins, std, rate):
    noise = torch.randn(bins).numpy() * std
    return exact(ids, bins, rate) + noise.round().astype(np.int64)


def mutant_shared_noise(ids, bins, std, rate):
    noise = add_discrete_gaussian(np.zeros((bins + 1) // 2, dtype=np.int64), std)
    return exact(ids, bins, rate) + np.repeat(noise, 2)[:bins]


def mutant_double_counted(ids, bins, std, rate):
    return add_discrete_gaussian(2 * exact(ids, bins, rate), std)


def mutant_two_bins(ids, bins, std, rate):
    counts = exact(ids, bins, rate)
    return add_discrete_gaussian(counts + np.roll(counts, 1), std)


def mutant_sparse_only(ids, bins, std, rate):
    counts = exact(ids, bins, rate)
    return np.where(counts > 0, add_discrete_gaussian(counts, std), 0)


def mutant_fixed_size(ids, bins, std, rate):
    kept = np.random.default_rng().choice(ids, int(rate * len(ids)), replace=False)
    return add_discrete_gaussian(np.bincount(kept, minlength=bins).astype(np.int64), std)


def mutant_no_sampling(ids, bins, std, rate):
    return built(ids, bins, std, 1.0)


def mutant_same_mask(ids, bins, std, rate):
    return add_discrete_gaussian(
        np.bincount(ids[_mask(len(ids), rate)], minlength=bins).astype(np.int64), std
    )


@functools.cache
def _mask(num_samples, rate):
    return poisson_mask(num_samples, rate)


def mutant_float(ids, bins, std, rate):
    return exact(ids, bins, rate) + np.random.default_rng().normal(0, std, bins)


def mutant_clipped(ids, bins, std, rate):
    return np.maximum(built(ids, bins, std, rate), 0)


MUTANTS = [value for name, value in list(globals().items()) if name.startswith("mutant_")]


@pytest.mark.parametrize("noise_std", [1.7, 5.0])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_broken_release_is_caught(mutant, noise_std):
    with pytest.raises(AssertionError):
        audit(mutant, count, noise_std)


def count_normalised(ids, num_bins):
    """Normalisation fitted on the client's samples: every sample moves every other's bin."""
    points, centers = place(ids, num_bins)
    scaled = (points - points.mean()) / points.std() * num_bins / 4 + num_bins / 2
    return coverage_counts(scaled, centers).numpy()


def count_twice(ids, num_bins):
    return 2 * count(ids, num_bins)


def count_shares(ids, num_bins):
    return count(ids, num_bins) / len(ids)


@pytest.mark.parametrize("broken", [count_normalised, count_twice, count_shares])
def test_broken_count_is_caught(broken):
    with pytest.raises(AssertionError, match="neighbours"):
        check_neighbours(broken)


def test_seeds_and_forks_do_not_repeat_the_noise():
    """Two processes with equal seeds, each with a forked child: four different releases."""
    code = """
import os, random, numpy as np
from ecos_pl.privacy import add_discrete_gaussian, poisson_mask
random.seed(0); np.random.seed(0)
def show():
    noise = add_discrete_gaussian(np.zeros(64, dtype=np.int64), 1e6)
    print(*noise, *poisson_mask(64, 0.5).astype(int), flush=True)
add_discrete_gaussian(np.zeros(1, dtype=np.int64), 1e6)  # the sampler exists before the fork
child = os.fork()
if child: os.waitpid(child, 0)
show()
if not child: os._exit(0)
"""
    lines = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        lines += [np.array(line.split(), dtype=np.int64) for line in done.stdout.splitlines()]
    assert len(lines) == 4
    for index, first in enumerate(lines):
        for second in lines[:index]:
            assert (first[:64] != second[:64]).mean() > 0.9
            assert (first[64:] != second[64:]).any()


def test_prototypes_as_built():
    """Checks 2 and 3 on the joint vector: noise as declared in every part, never repeated."""
    features, labels = torch.ones(400, 49) / 7, torch.zeros(400, dtype=torch.int64)
    noise = []
    for _ in range(2):
        torch.manual_seed(0)
        noisy, release = release_prototypes(
            features,
            labels,
            40,
            clip_norm=1.0,
            count_weight=0.25,
            noise_multiplier=3.0,
            sample_rate=1.0,
        )
        step = int(2.0**16 * (torch.ones(49).double() / 7)[0])  # every coordinate of every sample
        vector = torch.cat([noisy.sums, noisy.counts[:, None]], 1)
        vector[0, :-1] -= 400 * step
        vector[0, -1] -= 400 * 2**14
        noise.append(vector.double().numpy())
    n = noise[0].size
    for residual in (noise[0], noise[1]):
        assert abs(residual.mean()) < Z * release.noise_std / math.sqrt(n)
        low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], n) / n
        assert low < (residual**2).mean() / release.noise_std**2 < high
        # Class 0 is occupied, the others are empty: noise must be the same there.
        low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], 50) / 50
        assert low < (residual[0] ** 2).mean() / release.noise_std**2 < high
    assert_uncorrelated(noise[0].ravel(), noise[1].ravel(), release.noise_std, "two releases")
