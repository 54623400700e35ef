import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecos_pl.accounting import epsilon_of
from ecos_pl.privacy import PrivacyUnits
from ecos_pl.prototypes import (
    GRID,
    _sample_steps,
    class_totals,
    prototype_release,
    release_prototypes,
    sensitivity_in_steps,
)

SETTINGS = {"clip_norm": 2.0, "count_weight": 0.5, "noise_multiplier": 3.0, "sample_rate": 1.0}


def table(rows, dims, seed):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def totals(features, labels, num_classes, clip_norm, weight_steps):
    steps = _sample_steps(torch.as_tensor(features), clip_norm)
    return class_totals(steps, np.asarray(labels), num_classes, weight_steps)


extreme = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 5e-324, -1e-310, 1.0, -1.0, 1.7e308, 1e-160, 0.6, 0.8]),
)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(extreme, min_size=4, max_size=4), min_size=1, max_size=8),
    where=st.integers(0, 7),
    clip_norm=st.sampled_from([GRID, 0.3, 1.0, 1 / 3, 1000.0, 65536.0]),
    weight_steps=st.integers(1, 2**32),
)
def test_one_sample_moves_the_vector_within_its_sensitivity(rows, where, clip_norm, weight_steps):
    where %= len(rows)
    labels = [index % 3 for index in range(len(rows))]
    more = totals(np.array(rows, float), labels, 3, clip_norm, weight_steps)
    fewer_rows = np.array(rows[:where] + rows[where + 1 :], float).reshape(-1, 4)
    fewer = totals(fewer_rows, labels[:where] + labels[where + 1 :], 3, clip_norm, weight_steps)
    change = more - fewer
    # Exact in integers: the feature part never exceeds 2^16 steps.
    assert sum(int(v) ** 2 for v in change[:, :-1].ravel()) <= 2**32
    assert change[:, -1].tolist().count(weight_steps) == 1
    squared = sum(int(v) ** 2 for v in change.ravel())
    assert squared <= sensitivity_in_steps(weight_steps) ** 2 * (1 + 1e-15)


def test_unit_vectors_are_not_lengthened():
    directions = table(20_000, 7, 0).double()
    directions /= directions.norm(dim=1, keepdim=True)
    for scale in (1.0, 1 + 1e-15, 1e6):
        steps = _sample_steps(directions * scale, 1.0)
        assert (steps**2).sum(1).max() <= 2**32
    assert _sample_steps(torch.eye(5), 1.0).tolist() == (np.eye(5, dtype=int) * 2**16).tolist()


def test_a_row_depends_on_itself_alone():
    features = table(300, 9, 0)
    together = _sample_steps(features, 0.7)
    alone = np.concatenate([_sample_steps(row[None], 0.7) for row in features])
    assert (together == alone).all()


def test_truncation_and_clipping_by_hand():
    features = torch.tensor([[3.0, 4.0], [0.1, -0.1], [0.0, -0.0]])
    steps = _sample_steps(features, 1.0)
    assert steps.tolist() == [[39321, 52428], [6553, -6553], [0, 0]]  # 65536·(0.6, 0.8), 6553.6


def test_class_sums_are_unbiased_up_to_the_grid():
    """With noise far below the signal, sums and counts come back, within one step per sample."""
    features, labels = table(4000, 5, 0) * 0.3, torch.arange(4000) % 4
    noisy, release = release_prototypes(
        features, labels, 4, **{**SETTINGS, "noise_multiplier": 0.07}
    )
    clipped = features.double()
    clipped *= (2.0 / clipped.norm(dim=1, keepdim=True)).clamp(max=1)
    sums = torch.stack([clipped[labels == k].sum(0) for k in range(4)])
    tolerance = 1000 * GRID * 2.0 + 6 * noisy.sum_noise_std
    assert (noisy.class_sums() - sums).abs().max() < tolerance
    assert (noisy.class_counts() - 1000).abs().max() < 6 * noisy.count_noise_std
    assert release.noise_multiplier == pytest.approx(0.07)


def test_noise_is_as_declared():
    """Residual standard deviations over 20,000 entries, tolerance five standard errors."""
    features, labels = table(100, 999, 0), torch.arange(100) % 20
    noisy, release = release_prototypes(features, labels, 20, **SETTINGS)
    clipped = features.double() * (2.0 / features.double().norm(dim=1, keepdim=True)).clamp(max=1)
    sums = torch.stack([clipped[labels == k].sum(0) for k in range(20)])
    residual = noisy.class_sums() - sums
    assert residual.std().item() == pytest.approx(noisy.sum_noise_std, rel=5 / math.sqrt(2 * 19980))
    assert release.sensitivity == pytest.approx(math.sqrt(1 + 0.5**2) * 2**16, rel=1e-12)
    assert release.noise_std == noisy.noise_std == pytest.approx(3.0 * release.sensitivity)
    assert noisy.sum_noise_std == pytest.approx(3.0 * math.sqrt(1.25) * 2.0)
    assert noisy.count_noise_std == pytest.approx(3.0 * math.sqrt(1.25) / 0.5)
    many, _ = release_prototypes(features[:0, :1], labels[:0], 20_000, **SETTINGS)
    spread = many.class_counts().std().item()
    assert spread == pytest.approx(many.count_noise_std, rel=5 / math.sqrt(2 * 20_000))


def test_sampling_thins_the_counts():
    noisy, release = release_prototypes(
        torch.zeros(40_000, 2),
        torch.zeros(40_000, dtype=torch.int64),
        1,
        **{**SETTINGS, "sample_rate": 0.25},
    )
    assert release.sample_rate == 0.25
    spread = math.hypot(math.sqrt(40_000 * 0.25 * 0.75), noisy.count_noise_std)
    assert abs(noisy.class_counts().item() - 10_000) < 5 * spread


def test_count_weight_is_the_rounded_one():
    noisy, release = release_prototypes(
        table(3, 2, 0), torch.tensor([0, 1, 1]), 2, **{**SETTINGS, "count_weight": 0.1}
    )
    assert noisy.count_weight == 6554 / 65536
    assert release.sensitivity == math.sqrt(2**32 + 6554**2)
    assert noisy.sums.dtype == noisy.counts.dtype == torch.int64
    assert noisy.sums.shape == (2, 2)
    assert noisy.counts.shape == (2,)


def test_persons_cost_what_samples_cost():
    samples = prototype_release(0.5, 3.0, 0.5)
    persons = prototype_release(0.5, 3.0, 0.5, max_samples=4)
    assert persons.sensitivity == 4 * samples.sensitivity
    assert persons.noise_std == 4 * samples.noise_std
    assert epsilon_of([persons], 1e-5) == pytest.approx(epsilon_of([samples], 1e-5), rel=1e-6)


def test_a_persons_samples_move_the_vector_within_its_sensitivity():
    """Four equal, longest samples of one person: the bound is reached, and not exceeded."""
    steps = _sample_steps(torch.eye(3)[[0, 0, 0, 0]] * 9, 1.0)
    moved = class_totals(steps, np.zeros(4, np.int64), 2, 2**15)
    bound = prototype_release(0.5, 3.0, 1.0, max_samples=4).sensitivity
    assert math.sqrt((moved.astype(float) ** 2).sum()) == pytest.approx(bound, rel=1e-15)


def test_only_a_persons_first_samples_are_summed():
    owners = np.repeat(np.arange(1000), 5)
    features, labels = torch.ones(5000, 1), torch.zeros(5000, dtype=torch.int64)
    noisy, release = release_prototypes(
        features, labels, 1, **SETTINGS, units=PrivacyUnits(owners, 3)
    )
    assert release == prototype_release(0.5, 3.0, 1.0, max_samples=3)
    assert noisy.noise_std == release.noise_std
    assert noisy.sum_noise_std == pytest.approx(3 * 3.0 * math.sqrt(1.25) * 2.0)
    assert abs(noisy.class_counts().item() - 3000) < 6 * noisy.count_noise_std
    assert abs(noisy.class_sums().item() - 3000) < 6 * noisy.sum_noise_std


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 2])}, r"^labels must lie in \[0, 2\)$"),
        ({"labels": torch.tensor([-1, 0])}, r"^labels must lie in \[0, 2\)$"),
        ({"labels": torch.tensor([0.0, 1.0])}, "int64"),
        ({"labels": torch.tensor([0])}, "differ in length"),
        ({"features": torch.full((2, 3), torch.nan)}, "NaN or infinite"),
        ({"features": torch.zeros(2, 0)}, "table"),
        ({"num_classes": 0}, "num_classes"),
        ({"clip_norm": math.nan}, "clip_norm"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"count_weight": math.inf}, "count_weight"),
        ({"count_weight": 0.0}, "count_weight"),
        ({"noise_multiplier": 0.0}, "noise_std"),
        ({"noise_multiplier": math.nan}, "noise_std"),
        ({"noise_multiplier": 0.01}, "grid steps"),
        ({"sample_rate": 0.0}, "sample_rate"),
    ],
)
def test_bad_arguments_refused(changes, message):
    arguments = {
        "features": torch.zeros(2, 3),
        "labels": torch.tensor([0, 1]),
        "num_classes": 2,
        **SETTINGS,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        release_prototypes(**arguments)
