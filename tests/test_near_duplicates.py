import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecos_pl import near_duplicates
from ecos_pl.near_duplicates import DistinctRows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def unit_rows(num_rows, dims, seed=0, *, groups=0):
    """Unit rows; with groups, rows scattered closely around so many of them."""
    rows = torch.randn(num_rows, dims, generator=generator(seed))
    if groups:
        rows = rows[torch.randint(groups, (num_rows,), generator=generator(seed + 1))]
        rows = rows + 0.06 * torch.randn(num_rows, dims, generator=generator(seed + 2))
    return torch.nn.functional.normalize(rows, dim=1).half()


def projected(rows, dims, seed=0):
    """What the probe stores beside: an orthogonal projection in float16."""
    basis = torch.linalg.qr(torch.randn(rows.shape[1], dims, generator=generator(seed))).Q
    return (rows.float() @ basis.half().float()).half()


def one_by_one(rows, order, distance):
    """The definition, by plain loops: a row is kept if no kept one before it is near."""
    rows, kept, marks = rows.double().numpy(), [], []
    for row in order:
        marks.append(bool((np.linalg.norm(rows[row] - rows[kept], axis=1) > distance).all()))
        if marks[-1]:
            kept.append(row)
    return marks


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    dims=st.integers(1, 12),
    distance=st.sampled_from([0.05, 0.2, 0.5, 1.2]),
    cuts=st.lists(st.integers(0, 80), max_size=3),
)
def test_rows_equal_the_definition(seed, dims, distance, cuts):
    full = unit_rows(80, 12, seed, groups=25)
    order = torch.randperm(80, generator=generator(seed)).numpy()
    distinct = DistinctRows(projected(full, dims, seed), full, distance)
    given_rows = np.split(order, sorted(cuts))
    marks = np.concatenate([distinct(rows) for rows in given_rows])
    assert marks.tolist() == one_by_one(full, order, distance)


@pytest.mark.parametrize("sizes", [(9, 5, 3), (64, 300, 1000)])
def test_nothing_depends_on_the_sizes_of_blocks(monkeypatch, sizes):
    full = unit_rows(200, 32, groups=75)
    rows = np.arange(200)
    expected = DistinctRows(projected(full, 8), full, 0.4)(rows)
    assert 50 < expected.sum() < 150
    for name, size in zip(("BLOCK_ROWS", "KEPT_ROWS", "PAIR_ROWS"), sizes, strict=True):
        monkeypatch.setattr(near_duplicates, name, size)
    assert DistinctRows(projected(full, 8), full, 0.4)(rows).tolist() == expected.tolist()


def test_kept_rows_are_apart_and_the_others_near_a_kept_one():
    full = unit_rows(600, 16, groups=200)
    marks = DistinctRows(projected(full, 6), full, 0.3)(np.arange(600))
    distances = torch.cdist(full.double(), full[marks].double())
    assert distances[marks].fill_diagonal_(9).min() > 0.3
    assert distances[~marks].min(1).values.max() <= 0.3


def test_a_chain_of_neighbours_is_thinned_not_swallowed():
    """Frames of a film: each near the one before, the last far from the first."""
    angles = 0.08 * torch.arange(30)
    full = torch.stack([angles.cos(), angles.sin()], dim=1)
    marks = DistinctRows(full, full, 0.1)(np.arange(30))
    assert marks.tolist() == [True, False] * 15
    marks = DistinctRows(full, full, 0.1)(np.arange(30)[::-1].copy())
    assert marks.tolist() == [True, False] * 15


def test_equal_rows_leave_one_and_quickly():
    """Blank images by the thousand: the pairs among them are never all written down."""
    full = torch.zeros(20_000, 8).half()
    full[7] = unit_rows(1, 8)[0]
    marks = DistinctRows(full, None, 0.1)(np.arange(20_000))
    assert np.flatnonzero(marks).tolist() == [0, 7]


def test_without_full_embeddings_the_given_ones_are_compared():
    full = unit_rows(100, 8, groups=30)
    few = projected(full, 3)
    marks = DistinctRows(few, None, 0.2)(np.arange(100))
    assert marks.tolist() == one_by_one(few, range(100), 0.2)


@pytest.mark.parametrize("kind", ["tensor", "array", "map"])
def test_any_container(kind, tmp_path):
    full = unit_rows(100, 8, groups=30)
    few = projected(full, 3)
    expected = DistinctRows(few, full, 0.2)(np.arange(100))
    if kind == "map":
        np.save(tmp_path / "full.npy", full.numpy())
        np.save(tmp_path / "few.npy", few.numpy())
        full, few = (np.load(tmp_path / f"{n}.npy", mmap_mode="r") for n in ("full", "few"))
    elif kind == "array":
        full, few = full.numpy(), few.numpy()
    assert DistinctRows(few, full, 0.2)(np.arange(100)).tolist() == expected.tolist()


def test_zero_keeps_all_and_reads_nothing():
    distinct = DistinctRows(torch.empty(0, 4), None, 0.0)
    assert distinct(np.array([5, 9, 2])).tolist() == [True, True, True]
    assert DistinctRows(torch.empty(0, 4), None, 0.1)(np.empty(0, np.int64)).tolist() == []


@pytest.mark.parametrize("distance", [-0.1, float("nan")])
def test_a_negative_distance_is_refused(distance):
    with pytest.raises(ValueError, match="duplicate_distance must not be negative"):
        DistinctRows(torch.zeros(1, 4), None, distance)
