import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecos_pl import diverse_picks as diverse_picks_file
from ecos_pl.diverse_picks import diverse_picks


def table(rows, dims, seed=0):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def greedy(embeddings, members, centroid, quota):
    """Gonzalez' greedy k-center in one cluster, by plain loops."""
    rows = embeddings.tolist()

    def distance(i, j):
        return sum((a - b) ** 2 for a, b in zip(rows[i], j, strict=False))

    picks = [min(members, key=lambda i: (distance(i, centroid), i))][:quota]
    while len(picks) < quota:
        rest = [i for i in members if i not in picks]
        picks.append(max(rest, key=lambda i: (min(distance(i, rows[p]) for p in picks), -i)))
    return picks


def whole_numbers(rows, dims, seed):
    """Embeddings whose distances are exact in any precision, with many ties."""
    return torch.randint(-6, 7, (rows, dims), generator=generator(seed)).float()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_clusters=st.integers(1, 5),
    dims=st.integers(1, 3),
    held=st.sampled_from([1, 25, 2**26]),  # all clusters streamed, some of them, none
    grouped=st.sampled_from([1, 60, 2**20]),
)
def test_picks_equal_plain_greedy(seed, num_clusters, dims, held, grouped):
    """However few rows are held or treated at a time."""
    embeddings = whole_numbers(40, dims, seed)
    assignments = torch.randint(num_clusters, (40,), generator=generator(seed + 1))
    centroids = whole_numbers(num_clusters, dims, seed + 2)
    sizes = torch.bincount(assignments, minlength=num_clusters)
    quotas = (sizes * torch.rand(num_clusters, generator=generator(seed + 3)) + 0.5).long()
    quotas = quotas.minimum(sizes)
    before = quotas.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diverse_picks_file, "HELD_VALUES", held)
        patch.setattr(diverse_picks_file, "GROUP_VALUES", grouped)
        picks = diverse_picks(embeddings, assignments, centroids, quotas)
    assert torch.equal(quotas, before)
    for cluster in range(num_clusters):
        members = torch.nonzero(assignments == cluster).flatten().tolist()
        quota = int(quotas[cluster])
        expected = greedy(embeddings, members, centroids[cluster].tolist(), quota)
        if quota == len(members):
            expected = members  # all of them, in the order of the pool
        assert [i for i in picks.tolist() if assignments[i] == cluster] == expected
    assert len(picks.unique()) == len(picks) == int(quotas.sum())


def test_duplicates_are_taken_last_and_once():
    embeddings = torch.tensor([[0.0], [0.0], [0.0], [4.0], [4.0], [-1.0]])
    zeros = torch.zeros(6, dtype=torch.int64)
    picks = [diverse_picks(embeddings, zeros, torch.zeros(1, 1), torch.tensor([n])) for n in (3, 6)]
    assert picks[0].tolist() == [0, 3, 5]
    assert picks[1].tolist() == [0, 1, 2, 3, 4, 5]


def test_of_very_many_equal_rows_the_first_is_taken():
    """Blank images: with several threads, the last to write would win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        zeros = torch.zeros(300_000, dtype=torch.int64)
        rows = torch.zeros(300_000, 1)
        for _ in range(5):
            picks = diverse_picks(rows, zeros, torch.zeros(1, 1), torch.tensor([2]))
            assert picks.tolist() == [0, 1]
    finally:
        torch.set_num_threads(threads)


def test_only_candidates_are_picked():
    embeddings = table(60, 2)
    assignments = torch.arange(60) % 3
    candidates = torch.rand(60, generator=generator()) < 0.5
    quotas = torch.bincount(assignments[candidates], minlength=3) // 2
    arguments = (torch.zeros(3, 2), quotas)
    picks = diverse_picks(embeddings, assignments, *arguments, candidates=candidates)
    rows = torch.nonzero(candidates).flatten()
    expected = rows[diverse_picks(embeddings[rows], assignments[rows], *arguments)]
    assert torch.equal(picks, expected)


def test_picks_from_a_memory_map(tmp_path):
    embeddings, zeros = table(50, 3), torch.zeros(50, dtype=torch.int64)
    np.save(tmp_path / "rows.npy", embeddings.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    arguments = (zeros, torch.zeros(1, 3), torch.tensor([9]))
    expected = diverse_picks(embeddings, *arguments)
    assert torch.equal(diverse_picks(mapped, *arguments), expected)


def test_no_quota_no_picks():
    picks = diverse_picks(table(5, 2), torch.zeros(5).long(), torch.zeros(1, 2), torch.tensor([0]))
    assert picks.tolist() == []
    assert picks.dtype == torch.int64


def test_picks_spread_more_than_random_ones():
    embeddings, zeros = table(500, 2), torch.zeros(500, dtype=torch.int64)
    picks = diverse_picks(embeddings, zeros, torch.zeros(1, 2), torch.tensor([20]))
    radius = torch.cdist(embeddings, embeddings[picks]).min(1).values.max()
    random_radius = torch.cdist(embeddings, embeddings[:20]).min(1).values.max()
    assert radius < 0.7 * random_radius


def test_first_come_the_first_picks_of_all_clusters():
    embeddings, assignments = table(60, 2), torch.arange(60) % 3
    picks = diverse_picks(embeddings, assignments, torch.zeros(3, 2), torch.tensor([2, 20, 4]))
    clusters = assignments[picks].tolist()
    assert clusters[:10] == [0, 1, 2, 0, 1, 2, 1, 2, 1, 2]
    assert set(clusters[10:]) == {1}


def test_a_larger_quota_continues_a_smaller_one():
    embeddings, zeros = table(80, 3), torch.zeros(80, dtype=torch.int64)
    few, many = (
        diverse_picks(embeddings, zeros, torch.zeros(1, 3), torch.tensor([n])) for n in (12, 30)
    )
    assert many[:12].tolist() == few.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_covers_twice_as_well(seed):
    """Gonzalez' bound, against all choices of three out of twelve; per cluster."""
    embeddings, assignments = table(24, 2, seed), torch.arange(24) % 2
    centroids = torch.zeros(2, 2)
    picks = diverse_picks(embeddings, assignments, centroids, torch.tensor([3, 3]))
    for cluster in range(2):
        members = torch.nonzero(assignments == cluster).flatten()
        distances = torch.cdist(embeddings[members], embeddings[members])
        best = min(
            float(distances[:, list(some)].min(1).values.max())
            for some in itertools.combinations(range(12), 3)
        )
        own = embeddings[picks[assignments[picks] == cluster]]
        assert torch.cdist(embeddings[members], own).min(1).values.max() <= 2 * best + 1e-6


def test_unreadable_rows_are_never_picked():
    embeddings, assignments = table(40, 3).half(), torch.arange(40, dtype=torch.int32) % 2
    embeddings[::5], assignments[::5] = torch.nan, -1
    quotas = torch.bincount(assignments[assignments >= 0], minlength=2)
    for quota in (quotas, quotas - 3):
        picks = diverse_picks(embeddings, assignments, torch.zeros(2, 3), quota)
        assert len(picks) == int(quota.sum())
        assert (assignments[picks] >= 0).all()


def test_many_clusters_of_all_sizes():
    """Groups of clusters are padded; none may see another's rows."""
    embeddings, assignments = table(2000, 4), (torch.rand(2000, generator=generator()) ** 3 * 150)
    assignments, centroids = assignments.long(), table(150, 4, 1)
    sizes = torch.bincount(assignments, minlength=150)
    quotas = (sizes * torch.rand(150, generator=generator(2))).long()
    together = diverse_picks(embeddings, assignments, centroids, quotas)
    for cluster in range(150):
        alone = torch.where(torch.arange(150) == cluster, quotas, 0)
        expected = diverse_picks(embeddings, assignments, centroids, alone)
        assert together[assignments[together] == cluster].tolist() == expected.tolist()
