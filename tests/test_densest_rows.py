import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecos_pl import densest_rows as densest_rows_file
from ecos_pl.count_smoothing import smooth_counts
from ecos_pl.densest_rows import densest_rows, densities, next_densest


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(num_rows=300, num_clusters=10):
    """A density around ten centroids, and rows."""
    centroids = 10 * torch.randn(num_clusters, 4, generator=generator())
    rows = centroids[torch.randint(num_clusters, (num_rows,), generator=generator())]
    rows = rows + torch.randn(num_rows, 4, generator=generator(1))
    sizes = torch.full((num_clusters,), num_rows // num_clusters)
    return smooth_counts(torch.arange(num_clusters) * 7, centroids, sizes, 5.0), rows


def plainly(held, total, doubt, share):
    """The definition by a sort of all rows: the densest ones until they hold the share."""
    order = held.argsort(descending=True, stable=True)
    sums = held[order].cumsum(0)
    marked = torch.zeros(len(held), dtype=torch.bool)
    if total > doubt and len(held):
        wanted = share * (1 - doubt / total) * float(sums[-1])
        marked[order[(sums - held[order]).cummax(0).values < wanted]] = True
    return marked & (held > 0)


def test_densities_are_those_of_all_rows_at_once(monkeypatch, tmp_path):
    density, rows = scene()
    expected = density(rows).float()
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for read, computed in ((16_384, 1024), (70, 33)):
        monkeypatch.setattr(densest_rows_file, "READ_ROWS", read)
        monkeypatch.setattr(densest_rows_file, "CPU_ROWS", computed)
        for table in (rows, mapped):
            found = densities(density, table)
            assert found.dtype == torch.float32
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.max()))
    assert densities(density, rows[:0]).tolist() == []


def test_training_settings_do_not_round_densities():
    density, rows = scene()
    expected = densities(density, rows)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(densities(density, rows), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_unreadable_rows_have_no_density():
    density, rows = scene()
    expected = densities(density, rows)
    rows = rows.half()
    rows[[3, 299]] = torch.nan
    found = densities(density, rows)
    assert (found[[3, 299]] == -torch.inf).all()
    read = found > -torch.inf
    assert read.sum() == 298
    assert torch.allclose(found[read], expected[read], atol=1e-2)


def test_densest_rows_by_hand():
    held = torch.tensor([2.0, 5.0, -1.0, 4.0, 1.0, 3.0])  # 14 in all
    counts = torch.tensor([10, 4])

    def marked(share, noise_std=0.0):
        (found,) = densest_rows(held, counts, noise_std, shares=(share,))
        return torch.nonzero(found).flatten().tolist()

    assert marked(0.1) == [1]
    assert marked(0.5) == [1, 3]  # 5 is less than 7
    assert marked(0.9) == [0, 1, 3, 5]  # 12.6
    assert marked(1.0) == [0, 1, 3, 5]  # 14: what the row of -1 takes away, the row of 1 gave
    # The sum of the counts is 14 ± √2 noise_std.
    assert marked(1.0, 14 / math.sqrt(2) / 2) == [1, 3]  # half of it
    assert marked(1.0, 14 / math.sqrt(2)) == []
    assert marked(1.0, 1000.0) == []


@settings(max_examples=80, deadline=None)
@given(
    held=st.lists(st.integers(-3, 9), max_size=9),
    share=st.floats(0.01, 1),
    noise_std=st.floats(0, 10),
)
def test_densest_rows_are_the_fewest(held, share, noise_std):
    held, counts = torch.tensor(held, dtype=torch.float64), torch.tensor([3, 9, 2, 6])
    (marked,) = densest_rows(held, counts, noise_std, shares=(share,))
    if marked.any() and not marked.all():
        assert held[marked].min() >= held[~marked].max()
    assert (held[marked] > 0).all()
    wanted = share * max(0.0, 1 - noise_std / 10) * float(held.sum())  # 20 images, 4 clusters
    if wanted <= 0:
        assert not marked.any()
    else:
        assert float(held[marked].sum()) >= wanted - 1e-9
        assert float(held[marked].sum() - held[marked].min()) < wanted + 1e-9


def test_every_image_is_relevant_where_the_client_is_everywhere():
    (marked,) = densest_rows(torch.ones(1000), torch.tensor([500, 500]), 0.0, shares=(1.0,))
    assert marked.all()


@settings(max_examples=150, deadline=None)
@given(
    held=st.lists(st.integers(-3, 5), max_size=40),
    share=st.floats(0.01, 1),
    noise_std=st.floats(0, 11),
    at_once=st.sampled_from([1, 3, 1000]),
)
def test_densest_rows_equal_a_full_sort(held, share, noise_std, at_once):
    """Many ties: of equally dense rows the first ones are marked."""
    held, counts = torch.tensor(held, dtype=torch.float64), torch.tensor([3, 9, 2, 6])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(densest_rows_file, "SUM_ROWS", at_once)
        found = densest_rows(held, counts, noise_std, shares=(share, 1.0))
    for mark, part in zip(found, (share, 1.0), strict=True):
        assert torch.equal(mark, plainly(held, 20.0, noise_std * 2, part))


@settings(max_examples=100, deadline=None)
@given(
    held=st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(-math.inf)), max_size=30),
    number=st.integers(0, 35),
    seed=st.integers(0, 100),
)
def test_next_densest_equal_a_full_sort(held, number, seed):
    held = torch.tensor(held)
    taken = np.random.default_rng(seed).permutation(len(held))[: len(held) // 3]
    before = held.clone()
    left = [i for i in range(len(held)) if held[i] > -math.inf and i not in taken]
    expected = sorted(left, key=lambda i: (-float(held[i]), i))[:number]
    assert next_densest(held, number, taken).tolist() == expected
    assert torch.equal(held, before)
