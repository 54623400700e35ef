import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ecos_pl import selection
from ecos_pl.count_smoothing import smooth_counts
from ecos_pl.selection import (
    CORE_SHARE,
    STRATEGIES,
    default_num_clusters,
    densest_rows,
    densities,
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


# --- number of clusters --------------------------------------------------------------------------


@settings(deadline=None)
@given(pool_size=st.integers(0, 10**8), noise_std=st.floats(0.5, 1e6))
def test_default_num_clusters_stays_in_bounds(pool_size, noise_std):
    number = default_num_clusters(pool_size, noise_std)
    assert 2 <= number <= 1000
    assert number <= max(2, pool_size / 50 + 0.5)
    assert number <= max(2, 500 / noise_std + 0.5)
    assert number <= default_num_clusters(pool_size + 50, noise_std)


# --- densities, densest rows ---------------------------------------------------------------------


def test_densities_are_those_of_all_rows_at_once(monkeypatch, tmp_path):
    assignments, embeddings, centroids = pool()
    counts = torch.arange(10) * 7
    density = smooth_counts(counts, centroids, torch.bincount(assignments), 5.0)
    monkeypatch.setattr(selection, "CHUNK_ROWS", 70)
    np.save(tmp_path / "rows.npy", embeddings.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for rows in (embeddings, mapped):
        assert torch.allclose(densities(density, rows), density(embeddings))
    assert densities(density, embeddings[:0]).tolist() == []


def test_densest_rows_by_hand():
    held = torch.tensor([2.0, 5.0, -1.0, 4.0, 1.0, 3.0])  # 14 in all
    counts = torch.tensor([10, 4])

    def marked(share, noise_std=0.0):
        return torch.nonzero(densest_rows(held, counts, noise_std, share=share)).flatten().tolist()

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
    marked = densest_rows(held, counts, noise_std, share=share)
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
    marked = densest_rows(torch.ones(1000).double(), torch.tensor([500, 500]), 0.0, share=1.0)
    assert marked.all()


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


# --- select --------------------------------------------------------------------------------------


def pool(num_rows=300, num_clusters=10, seed=0):
    centroids = 10 * table(num_clusters, 4, seed)
    assignments = torch.randint(num_clusters, (num_rows,), generator=generator(seed))
    return assignments, centroids[assignments] + table(num_rows, 4, seed + 1), centroids


def chosen(counts, assignments, embeddings, centroids, **changes):
    options = {"size": 60, "strategy": "ecos", "noise_std": 5.0, "generator": generator()}
    return select(counts, assignments, embeddings, centroids, **{**options, **changes})


def steps(counts, assignments, embeddings, centroids, noise_std=5.0):
    """Densities of the rows, relevant rows and core, as `select` should see them."""
    sizes = torch.bincount(assignments, minlength=len(centroids))
    held = smooth_counts(counts, centroids, sizes, noise_std)(embeddings)
    relevant = densest_rows(held, counts, noise_std, share=1.0)
    return held, relevant, densest_rows(held, counts, noise_std, share=CORE_SHARE)


def test_quotas_are_proportional_to_the_density_of_the_core():
    arguments = pool(1000)
    counts = torch.tensor([60, 50, 1, -1, 0, 50, 1, 0, -1, 0])
    found = chosen(counts, *arguments, noise_std=1.0)
    held, _, core = steps(counts, *arguments, noise_std=1.0)
    assert core[found.indices].all()
    shares = torch.zeros(10).double().index_add(0, arguments[0][core], held[core])
    assert (found.quotas - 60 * shares / shares.sum()).abs().max() < 1
    assert set(torch.nonzero(found.quotas).flatten().tolist()) == {0, 1, 5}
    expected = diverse_picks(
        arguments[1], arguments[0], arguments[2], found.quotas, candidates=core
    )
    assert found.indices.tolist() == sorted(expected.tolist())
    assert found.num_filled_up == 0


@settings(max_examples=40, deadline=None)
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
        _, relevant, _ = steps(counts, assignments, embeddings, centroids)
        assert found.num_filled_up == int((~relevant[found.indices]).sum())
        for cluster in range(10):
            members = relevant[assignments == cluster].double()
            assert bool(found.kept[cluster]) == (len(members) > 0 and members.mean() >= 0.5)


def test_a_core_that_is_too_small_is_taken_whole_and_the_next_densest_fill_up():
    arguments = pool(1000)
    counts = torch.tensor([60, 30, 3, -8, 0, 30, 1, 2, -3, 0])
    held, relevant, core = steps(counts, *arguments)
    assert 0 < core.sum() < relevant.sum() < 1000
    for size in (int(core.sum()), int(core.sum()) + 7, int(relevant.sum()), 900):
        found = chosen(counts, *arguments, size=size)
        densest = held.argsort(descending=True, stable=True)[:size]
        assert found.indices.tolist() == sorted(densest.tolist())
        assert found.num_filled_up == max(0, size - int(relevant.sum()))
    assert found.threshold == pytest.approx(float(held[relevant].min()) * 1000 / 10)


@pytest.mark.parametrize("counts", [[-3] * 10, [0] * 10, [5, -5] * 5, [1] * 10])
def test_a_client_that_drowns_still_gives_the_size(counts):
    found = chosen(torch.tensor(counts), *pool())
    assert len(found.indices) == 60
    assert not found.kept.any()
    assert found.num_filled_up == 60
    assert math.isfinite(found.threshold)


def small_client(num_images, *, noise_std, seed):
    """A client in the left quarter of a square of 100 clusters and 2,000 rows."""
    rows = torch.rand(2000, 2, generator=generator(seed))
    centroids = rows[:100]
    assignments = torch.cdist(rows, centroids).argmin(1)
    images = torch.rand(num_images, 2, generator=generator(seed + 1)) * torch.tensor([0.25, 1])
    counts = torch.bincount(torch.cdist(images, centroids).argmin(1), minlength=100)
    noise = noise_std * torch.randn(100, generator=generator(seed + 2))
    return (counts + noise).round().long(), assignments, rows, centroids


def test_neighbours_confirm_each_other():
    """Four client images a cluster under noise of std 4: no single count is beyond doubt."""
    shares, alone = [], []
    for seed in range(5):
        counts, assignments, rows, centroids = small_client(100, noise_std=4.0, seed=10 * seed)
        options = {"size": 300, "noise_std": 4.0}
        found = chosen(counts, assignments, rows, centroids, **options)
        shares.append(float((rows[found.indices, 0] < 0.25).double().mean()))
        best = counts[assignments].argsort(descending=True, stable=True)[:300]
        alone.append(float((rows[best, 0] < 0.25).double().mean()))
    assert np.mean(shares) > 0.8
    assert np.mean(shares) > np.mean(alone) + 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_neither_the_order_of_the_pool_nor_of_the_clusters_matters(seed):
    counts, assignments, rows, centroids = small_client(400, noise_std=4.0, seed=seed)
    options = {"size": 300, "noise_std": 4.0}
    found = chosen(counts, assignments, rows, centroids, **options)
    order = torch.randperm(2000, generator=generator(seed))
    mixed = chosen(counts, assignments[order], rows[order], centroids, **options)
    assert order[mixed.indices].sort().values.tolist() == found.indices.tolist()
    renamed = torch.randperm(100, generator=generator(seed + 1))
    mixed = chosen(
        counts[renamed], renamed.argsort()[assignments], rows, centroids[renamed], **options
    )
    assert mixed.indices.tolist() == found.indices.tolist()
    assert torch.equal(mixed.kept, found.kept[renamed])


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
