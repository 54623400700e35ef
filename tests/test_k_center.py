import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from ecos_pl import k_center
from ecos_pl.k_center import FarthestFirst, KCenter


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def whole_numbers(rows, dims, seed):
    """Embeddings whose distances are exact in any precision, with many ties and copies."""
    return torch.randint(-5, 6, (rows, dims), generator=generator(seed)).float()


def farthest_first(rows, candidates, centers=()):
    """Gonzalez' rule by plain loops over lists; the first candidate begins without centers."""

    def distance(i, center):
        return sum((a - b) ** 2 for a, b in zip(rows[i], center, strict=True))

    centers, left, picks = list(centers), list(candidates), []
    while left:
        best = left[0]
        for i in left if centers else []:
            if min(distance(i, c) for c in centers) > min(distance(best, c) for c in centers):
                best = i
        left.remove(best)
        picks.append(best)
        centers.append(rows[best])
    return picks


def taken(preference, *numbers):
    return np.concatenate([preference.more(number) for number in numbers]).tolist()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    dims=st.integers(1, 3),
    block=st.sampled_from([1, 20, 2**19]),
    numbers=st.lists(st.integers(0, 20), max_size=4),
)
def test_the_order_equals_plain_greedy(seed, dims, block, numbers):
    """However many are asked for at a time, and rows subtracted at a time."""
    embeddings = whole_numbers(30, dims, seed)
    rows = np.arange(3, 28)
    order = rows[torch.randperm(25, generator=generator(seed)).numpy()]
    expected = farthest_first(embeddings.tolist(), order.tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k_center, "BLOCK_VALUES", block)
        patch.setattr(k_center, "_CHECKED_PICKS", 4)
        found = taken(KCenter(embeddings.half(), rows, generator(seed)), *numbers, 25, 3)
    assert found == expected


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 5))
def test_no_row_is_farther_than_twice_the_optimum(seed, size):
    embeddings = torch.randn(11, 2, generator=generator(seed)).half()
    apart = cdist(embeddings.float(), embeddings.float())

    def radius(centers):
        return apart[:, list(centers)].min(axis=1).max()

    best = min(radius(centers) for centers in itertools.combinations(range(11), size))
    found = KCenter(embeddings, np.arange(11), generator(seed)).more(size)
    assert radius(found) <= 2 * best + 1e-6


def test_against_distances_of_scipy():
    embeddings = torch.randn(9000, 8, generator=generator()).half()
    found = KCenter(embeddings, np.arange(9000), generator(1)).more(40)
    apart = cdist(embeddings.double(), embeddings[found].double())
    for k in range(1, 40):
        closest = apart[:, :k].min(axis=1)
        assert closest[found[k]] == pytest.approx(closest.max(), rel=1e-5)


def test_the_seed_draws_the_first_row():
    embeddings = whole_numbers(50, 2, 0)
    firsts = {int(KCenter(embeddings, np.arange(50), generator(s)).more(1)[0]) for s in range(30)}
    assert len(firsts) > 10


def test_a_large_pool_is_sampled_and_comes_whole_in_the_end(monkeypatch):
    monkeypatch.setattr(k_center, "HELD_VALUES", 2 * 12)
    embeddings = whole_numbers(40, 2, 1)
    order = torch.randperm(40, generator=generator(5)).tolist()
    expected = [
        pick
        for first in range(0, 40, 12)
        for pick in farthest_first(embeddings.tolist(), order[first : first + 12])
    ]
    preference = KCenter(embeddings, np.arange(40), generator(5))
    assert preference.more(20).tolist() == expected[:12]
    assert taken(preference, 5, 30, 30, 30) == expected[12:]
    assert not len(preference.more(3))


def test_copies_come_last_and_cost_nothing(monkeypatch):
    embeddings = torch.eye(3).repeat(400, 1)
    calls = []
    plain = FarthestFirst._take_farthest
    monkeypatch.setattr(
        FarthestFirst, "_take_farthest", lambda self: (calls.append(1), plain(self))[1]
    )
    found = FarthestFirst(embeddings, np.arange(1200)).more(1100)
    assert found[:3].tolist() == [0, 1, 2]
    assert found[3:].tolist() == list(range(3, 1100))
    assert len(calls) == k_center._CHECKED_PICKS


def test_nothing_is_changed_that_was_given():
    embeddings, closest = whole_numbers(20, 2, 0), torch.ones(20)
    before = embeddings.clone()
    FarthestFirst(embeddings, np.arange(20), closest).more(5)
    assert torch.equal(embeddings, before)
    assert torch.equal(closest, torch.ones(20))
