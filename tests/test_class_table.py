import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ecos_pl.class_table import class_table_release, release_class_table
from ecos_pl.coverage import coverage_counts
from ecos_pl.privacy import PrivacyUnits, Release

ALPHA = 1e-6  # false alarms
Z = stats.norm.isf(ALPHA / 2)
SETTINGS = {"noise_std": 5.0, "sample_rate": 1.0}


def table(rows, dims, seed):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def without_noise(monkeypatch):
    """The counts that the noise is added to."""
    monkeypatch.setattr("ecos_pl.privacy.add_discrete_gaussian", lambda values, noise_std: values)


def test_classes_are_counted_apart(without_noise):
    embeddings, centroids = table(500, 4, 0), table(9, 4, 1)
    labels = torch.arange(500) % 3
    counts, _ = release_class_table(embeddings, labels, centroids, 3, **SETTINGS)
    assert counts.dtype == torch.int64
    for label in range(3):
        expected = coverage_counts(embeddings[labels == label], centroids)
        assert torch.equal(counts[:, label], expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 2)), min_size=1, max_size=12),
    where=st.integers(0, 11),
)
def test_one_sample_changes_one_entry_by_one(rows, where):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ecos_pl.privacy.add_discrete_gaussian", lambda values, noise_std: values)

        def counts(rows):
            values = torch.tensor([row[0] for row in rows], dtype=torch.float64)[:, None]
            labels = torch.tensor([row[1] for row in rows], dtype=torch.int64)
            centroids = torch.tensor([[-4.0], [0.0], [0.0], [3.0]])
            return release_class_table(values, labels, centroids, 3, **SETTINGS)[0]

        where %= len(rows)
        change = counts(rows) - counts(rows[:where] + rows[where + 1 :])
    assert sorted(change.flatten().tolist()) == [0] * 11 + [1]


@pytest.mark.parametrize(("max_samples", "used"), [(1, 60), (3, 180), (9, 300)])
def test_noise_is_as_declared_on_occupied_and_empty_entries(max_samples, used):
    units = PrivacyUnits(np.repeat(np.arange(60), 5), max_samples)
    noise = []
    for _ in range(2):
        torch.manual_seed(0)
        noisy, release = release_class_table(
            torch.full((300, 1), 7.0),
            torch.full((300,), 2),
            torch.arange(3_000.0)[:, None],
            5,
            **SETTINGS,
            units=units,
        )
        assert release == class_table_release(5.0, 1.0, max_samples)
        assert noisy.shape == (3_000, 5)
        noisy[7, 2] -= used
        noise.append(noisy.flatten().double().numpy())
    variance = (5.0 * max_samples) ** 2 + (1 / 12 if max_samples > 1 else 0)
    for residual in noise:
        n = len(residual)
        assert abs(residual[7 * 5 + 2]) < 6 * math.sqrt(variance)
        assert abs(residual.mean()) < Z * math.sqrt(variance / n)
        low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], n - 1) / (n - 1)
        assert low < residual.var(ddof=1) / variance < high
    assert abs((noise[0] * noise[1]).mean()) / variance < Z / math.sqrt(n)


def test_cost():
    assert class_table_release(5.0, 0.5) == Release("class_table", 5.0, 1.0, 0.5, True)
    persons = class_table_release(5.0, 0.5, max_samples=3)
    assert persons == Release("class_table", 15.0 * 512, 3.0 * 512, 0.5)


def test_no_samples_still_give_noise():
    noisy, _ = release_class_table(
        torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), table(500, 2, 0), 4, **SETTINGS
    )
    assert (noisy < 0).any()
    assert (noisy > 0).any()


def test_sampling_thins_the_counts():
    noisy, _ = release_class_table(
        torch.zeros(40_000, 1),
        torch.arange(40_000) % 2,
        torch.zeros(1, 1),
        2,
        noise_std=5.0,
        sample_rate=0.25,
    )
    spread = math.sqrt(20_000 * 0.25 * 0.75 + 25)
    assert (abs(noisy - 5_000) < Z * spread).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 2])}, r"^labels must lie in \[0, 2\)$"),
        ({"labels": torch.tensor([0.0, 1.0])}, "int64"),
        ({"labels": torch.tensor([0])}, r"^samples and labels differ in length$"),
        ({"embeddings": torch.full((2, 3), torch.nan)}, "NaN"),
        ({"centroids": torch.zeros(0, 3)}, "centroids"),
        ({"num_classes": 0}, "num_classes"),
        ({"noise_std": 0.0}, "noise_std"),
        ({"noise_std": math.nan}, "noise_std"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"units": PrivacyUnits(np.zeros(3, np.int64))}, "owners and samples"),
    ],
)
def test_bad_arguments_refused(changes, message):
    arguments = {
        "embeddings": torch.zeros(2, 3),
        "labels": torch.tensor([0, 1]),
        "centroids": torch.zeros(4, 3),
        "num_classes": 2,
        **SETTINGS,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        release_class_table(**arguments)
