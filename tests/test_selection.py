import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ecos_pl.selection import (
    FALSE_CLUSTERS,
    STRATEGIES,
    count_threshold,
    default_num_clusters,
    diverse_picks,
    select,
    water_fill,
)


def table(rows, dims, seed=0):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- water_fill ----------------------------------------------------------------------------------

weights_and_capacities = st.lists(
    st.tuples(
        st.one_of(st.just(0.0), st.floats(1e-6, 1e9), st.integers(1, 50).map(float)),
        st.integers(0, 60),
    ),
    min_size=1,
    max_size=12,
)


def filled(pairs, total):
    weights = torch.tensor([w for w, _ in pairs], dtype=torch.float64)
    capacities = torch.tensor([c for _, c in pairs])
    return weights, capacities, water_fill(weights, capacities, total)


def real_quotas(weights, capacities, total):
    """The exact shares min(capacity, level * weight), the level found by bisection."""
    low, high = (
        0.0,
        max((c / w for w, c in zip(weights, capacities, strict=False) if w > 0), default=0.0),
    )
    for _ in range(400):
        level = (low + high) / 2
        given_out = math.fsum(min(c, level * w) for w, c in zip(weights, capacities, strict=False))
        low, high = (level, high) if given_out < total else (low, level)
    return [min(c, high * w) for w, c in zip(weights, capacities, strict=False)]


@settings(max_examples=150, deadline=None)
@given(pairs=weights_and_capacities, total=st.integers(0, 400))
def test_water_fill_against_bisection(pairs, total):
    weights, capacities, quotas = filled(pairs, total)
    assert quotas.dtype == torch.int64
    room = int(capacities[weights > 0].sum())
    assert int(quotas.sum()) == min(total, room)
    assert ((quotas >= 0) & (quotas <= capacities)).all()
    assert (quotas[weights == 0] == 0).all()
    exact = real_quotas(weights.tolist(), capacities.tolist(), min(total, room))
    assert all(abs(q - e) < 1 + 1e-6 for q, e in zip(quotas.tolist(), exact, strict=False))


@settings(max_examples=80, deadline=None)
@given(pairs=weights_and_capacities, total=st.integers(0, 400))
def test_fractions_go_to_the_largest_remainders(pairs, total):
    weights, capacities, quotas = filled(pairs, total)
    room = int(capacities[weights > 0].sum())
    exact = torch.tensor(real_quotas(weights.tolist(), capacities.tolist(), min(total, room)))
    remainders = exact - exact.floor()
    assume(((remainders > 1e-4) & (remainders < 1 - 1e-4) | (exact == exact.round())).all())
    up, down = quotas > exact.floor(), (quotas == exact.floor()) & (quotas < capacities)
    if up.any() and down.any():
        assert remainders[up].min() >= remainders[down].max() - 1e-4


@settings(max_examples=80, deadline=None)
@given(pairs=weights_and_capacities, total=st.integers(0, 400), factor=st.sampled_from([2.0, 0.25]))
def test_only_the_ratio_of_weights_counts(pairs, total, factor):
    _, _, quotas = filled(pairs, total)
    _, _, scaled = filled([(w * factor, c) for w, c in pairs], total)
    assert torch.equal(quotas, scaled)


@settings(max_examples=80, deadline=None)
@given(pairs=weights_and_capacities, total=st.integers(0, 400))
def test_with_the_same_capacity_a_larger_weight_gets_no_less(pairs, total):
    weights, _, quotas = filled([(w, 30) for w, _ in pairs], total)
    order = weights.argsort()
    for i, j in zip(order.tolist(), order[1:].tolist(), strict=False):
        if weights[i] < weights[j]:
            assert quotas[i] <= quotas[j]


@settings(max_examples=80, deadline=None)
@given(pairs=weights_and_capacities, total=st.integers(0, 400))
def test_more_to_give_out_takes_at_most_one_away(pairs, total):
    """Largest remainders may move one unit (the Alabama paradox), shares never shrink."""
    _, _, fewer = filled(pairs, total)
    _, _, more = filled(pairs, total + 1)
    assert (more >= fewer - 1).all()


def test_water_fill_by_hand():
    w, c = torch.tensor([6, 3, 1]), torch.tensor([100, 100, 100])
    assert water_fill(w, c, 20).tolist() == [12, 6, 2]
    assert water_fill(w, torch.tensor([5, 100, 100]), 21).tolist() == [
        5,
        12,
        4,
    ]  # 11 spill over 3:1
    assert water_fill(w, torch.tensor([5, 4, 2]), 50).tolist() == [5, 4, 2]
    assert water_fill(torch.tensor([1, 1, 1]), c, 2).tolist() == [1, 1, 0]
    assert water_fill(torch.tensor([-4, 0, 2]), c, 7).tolist() == [0, 0, 7]
    assert water_fill(torch.zeros(3), c, 7).tolist() == [0, 0, 0]


def test_water_fill_keeps_small_weights_beside_huge_ones():
    assert water_fill(torch.tensor([1e17, 1.0]).double(), torch.tensor([5, 5]), 8).tolist() == [
        5,
        3,
    ]


# --- threshold, number of clusters ---------------------------------------------------------------


@pytest.mark.parametrize(("num_clusters", "noise_std"), [(20, 5.0), (200, 5.0), (1000, 40.0)])
def test_one_false_cluster_is_expected(num_clusters, noise_std):
    """Empty clusters under the discrete Gaussian noise that the client draws, summed exactly."""
    integers = np.arange(-20 * int(noise_std), 20 * int(noise_std) + 1)
    mass = np.exp(-(integers**2) / (2 * noise_std**2))
    passing = mass[integers >= count_threshold(num_clusters, noise_std)].sum() / mass.sum()
    # Whole numbers: the threshold may lie up to half a step off the continuous one.
    step = math.exp(0.5 / noise_std * 3.5)
    assert 1 / step < num_clusters * passing / FALSE_CLUSTERS < step


def test_one_false_cluster_is_seen():
    noise = 5 * torch.randn(4000, 50, generator=generator())
    false = (noise >= count_threshold(50, 5.0)).double().sum(1).mean()
    assert float(false) == pytest.approx(FALSE_CLUSTERS, abs=5 / math.sqrt(4000))


def test_threshold_grows_with_noise_and_clusters():
    thresholds = [count_threshold(r, 5.0) for r in (2, 10, 100, 1000)]
    assert thresholds == sorted(thresholds)
    assert count_threshold(100, 10.0) == pytest.approx(2 * count_threshold(100, 5.0))
    assert count_threshold(1, 5.0) == 0.5
    assert count_threshold(100, 0.0) == 0.5


@settings(deadline=None)
@given(pool_size=st.integers(0, 10**8), noise_std=st.floats(0.5, 1e6))
def test_default_num_clusters_stays_in_bounds(pool_size, noise_std):
    number = default_num_clusters(pool_size, noise_std)
    assert 2 <= number <= 1000
    assert number <= max(2, pool_size / 50 + 0.5)
    assert number <= max(2, 1000 / noise_std + 0.5)
    assert number <= default_num_clusters(pool_size + 50, noise_std)


# --- diverse picks -------------------------------------------------------------------------------


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


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), num_clusters=st.integers(1, 5), dims=st.integers(1, 3))
def test_picks_equal_plain_greedy(seed, num_clusters, dims):
    embeddings = whole_numbers(40, dims, seed)
    assignments = torch.randint(num_clusters, (40,), generator=generator(seed + 1))
    centroids = whole_numbers(num_clusters, dims, seed + 2)
    sizes = torch.bincount(assignments, minlength=num_clusters)
    quotas = (sizes * torch.rand(num_clusters, generator=generator(seed + 3)) + 0.5).long()
    quotas = quotas.minimum(sizes)
    before = quotas.clone()
    picks = diverse_picks(embeddings, assignments, centroids, quotas)
    assert torch.equal(quotas, before)
    for cluster in range(num_clusters):
        members = torch.nonzero(assignments == cluster).flatten().tolist()
        expected = greedy(embeddings, members, centroids[cluster].tolist(), int(quotas[cluster]))
        assert [i for i in picks.tolist() if assignments[i] == cluster] == expected
    assert len(picks.unique()) == len(picks) == int(quotas.sum())


def test_duplicates_are_taken_last_and_once():
    embeddings = torch.tensor([[0.0], [0.0], [0.0], [4.0], [4.0], [-1.0]])
    zeros = torch.zeros(6, dtype=torch.int64)
    picks = [diverse_picks(embeddings, zeros, torch.zeros(1, 1), torch.tensor([n])) for n in (3, 6)]
    assert picks[0].tolist() == [0, 3, 5]
    assert sorted(picks[1].tolist()) == [0, 1, 2, 3, 4, 5]


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


# --- select --------------------------------------------------------------------------------------


def pool(num_rows=300, num_clusters=10, seed=0):
    centroids = 10 * table(num_clusters, 4, seed)
    assignments = torch.randint(num_clusters, (num_rows,), generator=generator(seed))
    return assignments, centroids[assignments] + table(num_rows, 4, seed + 1), centroids


def chosen(counts, assignments, embeddings, centroids, **changes):
    options = {"size": 60, "strategy": "ecos", "noise_std": 5.0, "generator": generator()}
    return select(counts, assignments, embeddings, centroids, **{**options, **changes})


def test_quotas_are_proportional_to_the_counts_of_the_kept_clusters():
    assignments, embeddings, centroids = pool(1000)
    counts = torch.tensor([60, 30, 3, -8, 0, 30, 1, 2, -3, 0])
    found = chosen(counts, assignments, embeddings, centroids)
    assert found.threshold == count_threshold(10, 5.0)
    assert found.kept.tolist() == [c >= found.threshold for c in counts.tolist()]
    assert found.quotas.tolist() == [30, 15, 0, 0, 0, 15, 0, 0, 0, 0]
    assert found.num_filled_up == 0
    expected = diverse_picks(embeddings, assignments, centroids, found.quotas)
    assert found.indices.tolist() == sorted(expected.tolist())


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(-20, 80), min_size=10, max_size=10),
    size=st.integers(0, 350),
    strategy=st.sampled_from(STRATEGIES),
)
def test_size_is_reached_and_rows_are_unique_and_sorted(counts, size, strategy):
    assignments, embeddings, centroids = pool()
    counts = torch.tensor(counts)
    found = chosen(counts, assignments, embeddings, centroids, size=size, strategy=strategy)
    assert len(found.indices) == (300 if strategy == "all" else min(size, 300))
    assert found.indices.dtype == torch.int64
    assert found.indices.tolist() == sorted(set(found.indices.tolist()))
    picked = torch.bincount(assignments[found.indices], minlength=10)
    assert torch.equal(found.quotas, picked)
    if strategy == "ecos":
        assert int(found.quotas[~found.kept].sum()) == found.num_filled_up
        in_kept = int(torch.bincount(assignments, minlength=10)[found.kept].sum())
        assert found.num_filled_up == max(0, min(size, 300) - in_kept)


def test_the_next_best_clusters_fill_up_in_order():
    assignments = torch.arange(6).repeat_interleave(10)
    counts = torch.tensor([40, 3, -9, 4, 4, 0])
    expected = {10: [], 13: [3], 25: [3, 4], 41: [3, 4, 1, 5], 60: [3, 4, 1, 5, 2]}
    for size, clusters in expected.items():
        found = chosen(counts, assignments, table(60, 4), table(6, 4), size=size)
        quotas, left = [10, 0, 0, 0, 0, 0], size - 10
        for cluster in clusters:
            quotas[cluster] = min(10, left)
            left -= quotas[cluster]
        assert found.quotas.tolist() == quotas
        assert found.num_filled_up == size - 10
        assert found.kept.tolist() == [True] + [False] * 5


def test_a_pool_with_no_kept_cluster_still_gives_the_size():
    found = chosen(torch.full((10,), -3), *pool())
    assert len(found.indices) == 60
    assert not found.kept.any()
    assert found.num_filled_up == 60


def test_random_follows_its_generator_and_no_other():
    assignments, embeddings, centroids = pool()

    def draw(seed):
        return chosen(
            None, assignments, embeddings, centroids, strategy="random", generator=generator(seed)
        )

    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(one.indices, draw(1).indices)
    assert not torch.equal(one.indices, draw(2).indices)
    assert one.threshold == 0
    assert one.kept.all()
    # Uniform: 400 draws of 60 of 300 rows; six standard deviations.
    hits = torch.zeros(300)
    for seed in range(400):
        hits[draw(seed).indices] += 1
    assert (hits - 80).abs().max() < 6 * math.sqrt(400 * 0.2 * 0.8)


def test_ecos_draws_nothing():
    arguments = (torch.arange(10) * 7, *pool())
    given_generator = generator()
    before = given_generator.get_state()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = chosen(*arguments, generator=given_generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(given_generator.get_state(), before)
    assert torch.equal(one.indices, chosen(*arguments, generator=generator(9)).indices)


def test_arguments_are_not_changed():
    arguments = (torch.arange(10) * 7, *pool())
    copies = [a.clone() for a in arguments]
    chosen(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=False))


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="one of ecos, random, all, not 'best'"):
        chosen(None, *pool(), strategy="best")
    with pytest.raises(ValueError, match="ecos needs the client's noisy counts"):
        chosen(None, *pool())
