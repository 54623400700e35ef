from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecos_pl.annotation_order import annotation_order, proportional_turns

SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=25)


def turns_of(sizes, seed=0):
    phases = np.random.default_rng(seed).random(len(sizes))
    return proportional_turns(np.array(sizes), phases)


@settings(max_examples=200, deadline=None)
@given(SIZES, st.integers(0, 2**31))
def test_every_beginning_is_in_proportion_within_one(sizes, seed):
    turns = turns_of(sizes, seed)
    assert Counter(turns) == dict(enumerate(sizes))
    had, num = [0] * len(sizes), sum(sizes)
    for place, cluster in enumerate(turns, 1):
        had[cluster] += 1
        for count, size in zip(had, sizes, strict=True):
            assert place * size // num <= count <= -(-place * size // num)


@settings(max_examples=100, deadline=None)
@given(SIZES, st.integers(1, 40), st.integers(0, 2**31))
def test_batches_are_grouped_and_all_rows_come_once(sizes, batch_size, seed):
    clusters = torch.arange(len(sizes)).mul(3).repeat_interleave(torch.tensor(sizes))
    clusters = clusters[torch.randperm(len(clusters))]
    order = annotation_order(clusters, batch_size=batch_size, seed=seed)
    assert sorted(order.tolist()) == list(range(len(clusters)))
    for batch in clusters[order].split(batch_size):
        assert batch.tolist() == sorted(batch.tolist())
    share = torch.bincount(clusters, minlength=75) / len(clusters)
    for end in range(batch_size, len(order), batch_size):
        counts = torch.bincount(clusters[order[:end]], minlength=75)
        assert bool(((counts - end * share).abs() < 1).all())


def test_more_images_begin_with_the_same_ones_whatever_the_batches():
    clusters = torch.randint(0, 9, (500,), generator=torch.Generator().manual_seed(0))
    chosen = [
        set(annotation_order(clusters, num_images=n, batch_size=b, seed=3).tolist())
        for n, b in ((70, 7), (70, 50), (200, 50), (None, 13), (900, 13))
    ]
    assert chosen[0] == chosen[1] < chosen[2] < chosen[3] == chosen[4]
    assert [len(rows) for rows in chosen] == [70, 70, 200, 500, 500]


def test_the_order_is_the_seeds_alone():
    clusters = torch.arange(90) % 4
    first, again, other = (annotation_order(clusters, seed=seed).tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_within_a_cluster_any_image_may_come_first():
    """The first of 10 equal ones is each with chance 1/10: χ² with 9 degrees of freedom."""
    clusters = torch.zeros(10, dtype=torch.int64)
    firsts = torch.tensor([int(annotation_order(clusters, seed=s)[0]) for s in range(1000)])
    counts = torch.bincount(firsts, minlength=10).float()
    assert float(((counts - 100) ** 2 / 100).sum()) < 27.9  # exceeded once in a thousand


def test_small_clusters_do_not_wait_for_the_end():
    """30 of 60 images lie in clusters of one: of the first ten, five do in the mean."""
    sizes = [30, *[1] * 30]
    small = [sum(k > 0 for k in turns_of(sizes, seed)[:10]) for seed in range(200)]
    assert all(4 <= count <= 6 for count in small)
    firsts = Counter(k for seed in range(1000) for k in turns_of(sizes, seed)[:10] if k > 0)
    expected = sum(firsts.values()) / 30
    chi_squared = sum((firsts[k] - expected) ** 2 / expected for k in range(1, 31))
    assert chi_squared < 58.3  # 29 degrees of freedom: exceeded once in a thousand


def test_one_cluster_needs_no_sharing():
    assert turns_of([7]) == [0] * 7
