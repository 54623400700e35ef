import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ecos_pl.coverage import coverage_counts, coverage_release, release_coverage
from ecos_pl.privacy import PrivacyUnits, Release

ALPHA = 1e-6  # false alarms
Z = stats.norm.isf(ALPHA / 2)


def table(rows, dims, seed):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "num_centroids", "dims"), [(1000, 37, 16), (300, 1, 3), (5, 600, 2)])
def test_matches_brute_force(n, num_centroids, dims):
    embeddings, centroids = table(n, dims, 0), table(num_centroids, dims, 1)
    expected = np.zeros(num_centroids, dtype=np.int64)
    for row in embeddings.double().numpy():
        expected[((row - centroids.double().numpy()) ** 2).sum(1).argmin()] += 1
    counts = coverage_counts(embeddings, centroids)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected.tolist()


def test_ties_go_to_the_lowest_index():
    centroids = torch.tensor([[5.0], [2.0], [0.0], [2.0]])
    assert coverage_counts(torch.tensor([[1.0], [2.0]]), centroids).tolist() == [0, 2, 0, 0]
    same = table(1, 8, 0).expand(300, 8)
    assert coverage_counts(table(50, 8, 1), same).tolist() == [50] + [0] * 299


def test_no_samples():
    assert coverage_counts(torch.zeros(0, 3), table(4, 3, 0)).tolist() == [0, 0, 0, 0]


def test_order_does_not_matter():
    embeddings, centroids = table(700, 8, 0), table(20, 8, 1)
    shuffled = embeddings[torch.randperm(700, generator=torch.Generator().manual_seed(2))]
    assert torch.equal(coverage_counts(embeddings, centroids), coverage_counts(shuffled, centroids))


floats = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(floats, min_size=3, max_size=3), min_size=1, max_size=12),
    centroids=st.lists(st.lists(floats, min_size=3, max_size=3), min_size=1, max_size=6),
    where=st.integers(0, 12),
)
def test_one_sample_changes_one_count_by_one(rows, centroids, where):
    more, centers = torch.tensor(rows), torch.tensor(centroids)
    where %= len(rows)
    fewer = torch.cat([more[:where], more[where + 1 :]])
    change = coverage_counts(more, centers) - coverage_counts(fewer, centers)
    assert sorted(change.tolist()) == [0] * (len(centers) - 1) + [1]


@pytest.mark.parametrize("gap", [0.0, 1e-16, 1e-12, 1e-7])
def test_a_bin_depends_on_its_sample_alone(gap):
    """Near-equal centroids, where the rounding of a matrix product would decide."""
    base = table(20, 64, 0).double()
    centroids = torch.cat([base + gap * table(20, 64, seed).double() for seed in range(1, 6)])
    embeddings = table(600, 64, 9).double()
    alone = sum(coverage_counts(row[None], centroids) for row in embeddings)
    for batch in (embeddings, embeddings.flip(0), embeddings[torch.arange(600) * 7 % 600]):
        assert torch.equal(coverage_counts(batch, centroids), alone)
    in_parts = sum(coverage_counts(part, centroids) for part in embeddings.split(31))
    assert torch.equal(in_parts, alone)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e101])
def test_non_finite_values_refused_without_telling_where(bad):
    embeddings, centroids = table(9, 2, 0).double(), table(4, 2, 1).double()
    embeddings[7, 1] = bad
    with pytest.raises(ValueError, match=r"^embeddings contain .* NaN, infinite or beyond 1e100$"):
        coverage_counts(embeddings, centroids)
    with pytest.raises(ValueError, match="centroids contain"):
        coverage_counts(centroids, embeddings)


def test_wrong_shapes_refused():
    for embeddings, centroids in (
        (torch.zeros(3), torch.zeros(2, 3)),
        (torch.zeros(3, 2), torch.zeros(2, 3)),
        (torch.zeros(3, 2), torch.zeros(0, 2)),
    ):
        with pytest.raises(ValueError, match="centroids"):
            coverage_counts(embeddings, centroids)


def test_release():
    noisy, release = release_coverage(
        torch.zeros(0, 2), table(2000, 2, 0), noise_std=5.0, sample_rate=0.5
    )
    assert release == Release("coverage_counts", 5.0, 1.0, 0.5, one_coordinate=True)
    assert noisy.dtype == torch.int64
    assert noisy.shape == (2000,)
    assert 0 < (noisy < 0).sum() < 2000  # noise everywhere, unclipped, without any sample
    for bad in ({"noise_std": 0.0}, {"noise_std": float("nan")}, {"sample_rate": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            release_coverage(
                torch.zeros(1, 2),
                torch.zeros(1, 2),
                **{"noise_std": 5.0, "sample_rate": 1.0, **bad},
            )


OWNERS = np.repeat(np.arange(60), 5)
PERSONS = PrivacyUnits(OWNERS, 3)


def test_persons_cost_what_samples_cost():
    assert coverage_release(5.0, 0.5) == Release("coverage_counts", 5.0, 1.0, 0.5, True)
    persons = coverage_release(5.0, 0.5, max_samples=3)
    assert persons == Release("coverage_counts", 15.0 * 512, 3.0 * 512, 0.5)
    assert persons.noise_multiplier == coverage_release(5.0, 0.5).noise_multiplier
    one_each = PrivacyUnits(OWNERS, 1)
    arguments = {"noise_std": 5.0, "sample_rate": 0.5}
    for units in (one_each, PERSONS):
        _, release = release_coverage(table(300, 2, 0), table(4, 2, 1), **arguments, units=units)
        assert release == coverage_release(5.0, 0.5, units.max_samples)


def test_a_person_moves_the_counts_by_at_most_max_samples():
    embeddings, centroids = table(300, 2, 0), table(20, 2, 1)
    used = torch.from_numpy(PERSONS.used(300))
    for person in range(60):
        others = torch.from_numpy(OWNERS) != person
        fewer = PrivacyUnits(OWNERS[others.numpy()], 3).used(295)
        change = coverage_counts(embeddings[used], centroids) - coverage_counts(
            embeddings[others][torch.from_numpy(fewer)], centroids
        )
        assert change.min() >= 0
        assert change.sum() == 3


@pytest.mark.parametrize(("max_samples", "used"), [(1, 60), (3, 180), (9, 300)])
def test_noise_of_persons_is_as_declared(max_samples, used):
    units = PrivacyUnits(OWNERS, max_samples)
    centroids = torch.arange(20_000.0)[:, None]
    noisy, _ = release_coverage(
        torch.full((300, 1), 7.0), centroids, noise_std=5.0, sample_rate=1.0, units=units
    )
    noisy[7] -= used
    variance = (5.0 * max_samples) ** 2 + (1 / 12 if max_samples > 1 else 0)
    n, residual = len(noisy), noisy.double().numpy()
    assert abs(residual[7]) < 6 * math.sqrt(variance)
    assert abs(residual.mean()) < Z * math.sqrt(variance / n)
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], n - 1) / (n - 1)
    assert low < residual.var(ddof=1) / variance < high


def test_persons_are_sampled_whole():
    """One bin, many persons: between them the counts vary by whole persons."""
    owners = np.repeat(np.arange(10_000), 4)
    noisy, _ = release_coverage(
        torch.zeros(40_000, 1),
        torch.zeros(1, 1),
        noise_std=1.0,
        sample_rate=0.5,
        units=PrivacyUnits(owners, 4),
    )
    spread = math.sqrt(4**2 * 10_000 / 4 + 4**2)
    assert abs(noisy.item() - 20_000) < Z * spread
