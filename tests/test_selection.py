import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ecos_pl import densest_rows, diverse_picks, near_duplicates, selection
from ecos_pl.config import SelectionOptions
from ecos_pl.count_smoothing import smooth_counts
from ecos_pl.near_duplicates import DistinctRows
from ecos_pl.selection import (
    CORE_SHARE,
    NOT_PRIVATE,
    STRATEGIES,
    default_num_clusters,
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


# --- select --------------------------------------------------------------------------------------


def pool(num_rows=300, num_clusters=10, seed=0):
    centroids = 10 * table(num_clusters, 4, seed)
    assignments = torch.randint(num_clusters, (num_rows,), generator=generator(seed))
    return assignments, centroids[assignments] + table(num_rows, 4, seed + 1), centroids


def chosen(counts, assignments, embeddings, centroids, **changes):
    """Without a look at near-duplicates unless a distance is given."""
    options = {
        "size": 60,
        "strategy": "ecos",
        "noise_std": 5.0,
        "generator": generator(),
        "duplicate_distance": 0.0,
        "among": np.arange(len(assignments)),  # for the oracle: all, unless a test says otherwise
        "client": centroids[: len(centroids) // 2].float(),
    }
    return select(counts, assignments, embeddings, centroids, **{**options, **changes})


def steps(counts, assignments, embeddings, centroids, noise_std=5.0):
    """Densities of the rows, relevant rows and core, as `select` should see them."""
    sizes = torch.bincount(assignments, minlength=len(centroids))
    held = densest_rows.densities(smooth_counts(counts, centroids, sizes, noise_std), embeddings)
    return held, *densest_rows.densest_rows(held, counts, noise_std, shares=(1.0, CORE_SHARE))


def test_quotas_are_proportional_to_the_density_of_the_core():
    arguments = pool(1000)
    counts = torch.tensor([60, 50, 1, -1, 0, 50, 1, 0, -1, 0])
    found = chosen(counts, *arguments, noise_std=1.0)
    held, _, core = steps(counts, *arguments, noise_std=1.0)
    assert core[found.indices].all()
    shares = torch.zeros(10).index_add(0, arguments[0][core], held[core])
    assert (found.quotas - 60 * shares / shares.sum()).abs().max() < 1
    assert set(torch.nonzero(found.quotas).flatten().tolist()) == {0, 1, 5}
    expected = diverse_picks.diverse_picks(
        arguments[1], arguments[0], arguments[2], found.quotas, candidates=core
    )
    assert found.indices.tolist() == sorted(expected.tolist())
    assert found.num_filled_up == 0


def test_candidates_bound_what_is_diverse():
    arguments = pool(1000)
    counts = torch.tensor([60, 50, 1, -1, 0, 50, 1, 0, -1, 0])
    options = {"noise_std": 1.0, "size": 40}
    all_of_it = chosen(counts, *arguments, **options)
    enough = chosen(counts, *arguments, **options, candidates_per_pick=1000)
    assert torch.equal(enough.indices, all_of_it.indices)
    few = chosen(counts, *arguments, **options, candidates_per_pick=2)
    assert torch.equal(few.quotas, all_of_it.quotas)
    assert not torch.equal(few.indices, all_of_it.indices)
    # The diverse ones of twice as many: those that plain greedy takes of what was drawn.
    _, _, core = steps(counts, *arguments, noise_std=1.0)
    assert core[few.indices].all()
    drawn = selection._drawn(core, arguments[0], 2 * all_of_it.quotas, generator())
    assert torch.equal(torch.bincount(arguments[0][drawn], minlength=10), 2 * all_of_it.quotas)
    expected = diverse_picks.diverse_picks(
        arguments[1], arguments[0], arguments[2], few.quotas, candidates=drawn
    )
    assert few.indices.tolist() == sorted(expected.tolist())


def test_one_candidate_a_pick_is_a_uniform_draw_from_each_cluster():
    arguments = pool(300)
    counts = torch.tensor([60, 50, 1, -1, 0, 50, 1, 0, -1, 0])
    _, _, core = steps(counts, *arguments, noise_std=1.0)
    options = {"noise_std": 1.0, "size": int(core.sum()) // 3, "candidates_per_pick": 1}
    hits = torch.zeros(300)
    for seed in range(300):
        found = chosen(counts, *arguments, **options, generator=generator(seed))
        hits[found.indices] += 1
    room = torch.bincount(arguments[0][core], minlength=10)
    chance = (found.quotas / room.clamp_min(1))[arguments[0]] * core
    assert (hits - 300 * chance).abs().max() < 6 * math.sqrt(300 * 0.25)


def test_where_the_candidates_are_copies_the_rest_of_the_core_follows():
    assignments, embeddings, centroids = pool(300)
    for cluster in (0, 1, 5):  # of each, every second row is the same picture
        rows = torch.nonzero(assignments == cluster).flatten()[::2]
        embeddings[rows] = embeddings[rows[0]].clone()
    counts = torch.tensor([60, 50, 1, -1, 0, 50, 1, 0, -1, 0])
    arguments = (counts, assignments, embeddings, centroids)
    _, _, core = steps(*arguments, noise_std=1.0)
    size = len(torch.unique(embeddings[core], dim=0))  # all there is
    options = {"noise_std": 1.0, "size": size, "duplicate_distance": 1e-4}
    found = chosen(*arguments, **options, candidates_per_pick=1)
    assert core[found.indices].all()
    assert len(torch.unique(embeddings[found.indices], dim=0)) == len(found.indices) == size
    assert found.num_duplicates > 0


FIRST_HALF = np.arange(150)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(-20, 80), min_size=10, max_size=10),
    size=st.integers(0, 350),
    strategy=st.sampled_from(STRATEGIES),
)
def test_size_is_reached_and_rows_are_unique_and_sorted(counts, size, strategy):
    assignments, embeddings, centroids = pool()
    counts = torch.tensor(counts)
    found = chosen(
        counts, assignments, embeddings, centroids, size=size, strategy=strategy, among=FIRST_HALF
    )
    there = 150 if strategy == "oracle" else 300
    assert len(found.indices) == (300 if strategy == "all" else min(size, there))
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


def test_the_oracle_draws_from_the_clients_domain_alone():
    arguments = pool()
    rows = np.arange(40, 140)
    found = chosen(None, *arguments, strategy="oracle", among=rows)
    assert len(found.indices) == 60
    assert set(found.indices.tolist()) <= set(rows.tolist())
    with pytest.raises(ValueError, match="needs the rows of the client's domain"):
        chosen(None, *arguments, strategy="oracle", among=None)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(0, 320))
def test_cluster_uniform_gives_all_clusters_the_same(seed, size):
    centroids = 10 * table(6, 4, seed)
    assignments = torch.multinomial(
        torch.tensor([60.0, 20, 10, 5, 4, 1]), 300, replacement=True, generator=generator(seed)
    )
    embeddings = centroids[assignments]
    sizes = torch.bincount(assignments, minlength=6)
    found = chosen(None, assignments, embeddings, centroids, size=size, strategy="cluster_uniform")
    assert torch.equal(found.quotas, water_fill(torch.ones(6), sizes, size))


def test_cluster_uniform_draws_uniformly_inside_a_cluster():
    assignments = torch.arange(60) % 3
    arguments = (None, assignments, table(60, 4), table(3, 4))
    hits = torch.zeros(60)
    for seed in range(400):
        found = chosen(*arguments, size=15, strategy="cluster_uniform", generator=generator(seed))
        hits[found.indices] += 1
    assert (hits - 100).abs().max() < 6 * math.sqrt(400 * 0.25 * 0.75)


@pytest.mark.parametrize("strategy", NOT_PRIVATE)
def test_what_is_not_private_needs_the_client_and_chooses_near_it(strategy):
    assignments, embeddings, centroids = pool()
    with pytest.raises(ValueError, match="need the client's embeddings"):
        chosen(None, assignments, embeddings, centroids, strategy=strategy, client=None)
    client = centroids[[2, 5]] + 0.1 * table(2, 4)
    options = {"strategy": strategy, "size": 20, "client": client}
    found = chosen(None, assignments, embeddings, centroids, **options)
    assert set(torch.nonzero(found.quotas).flatten().tolist()) == {2, 5}


@pytest.mark.parametrize("strategy", STRATEGIES[4:])
def test_baselines_draw_from_their_generator_alone(strategy):
    arguments = (None, *pool())

    def draw(seed):
        return chosen(*arguments, strategy=strategy, generator=generator(seed)).indices.tolist()

    torch.manual_seed(0)
    state = torch.get_rng_state()
    one = draw(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert one == draw(1)
    # With more images in turn than are wanted, or with none left out, the order does not matter.
    assert (one != draw(2)) == (strategy in ("cluster_uniform", "k_center"))


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


# --- against the same method written plainly ------------------------------------------------------


def plain_picks(embeddings, assignments, centroids, quotas, candidates):
    """Gonzalez' greedy k-center in all clusters at once, reading all rows in every round."""
    quotas, chosen, closest = quotas.clone(), [], None
    active = torch.nonzero((quotas[assignments] > 0) & candidates).flatten()
    while len(active):
        rows, clusters = embeddings[active].float(), assignments[active]
        priority = -(rows - centroids[clusters]).square().sum(1) if closest is None else closest
        best = torch.full((len(quotas),), -torch.inf)
        best = best.scatter_reduce(0, clusters, priority, "amax")
        tied = torch.nonzero(priority == best[clusters]).flatten()
        pick = torch.full((len(quotas),), len(active))
        pick = pick.scatter_reduce(0, clusters[tied], tied, "amin")
        picked = pick[pick < len(active)]
        chosen.append(active[picked])
        distances = (rows - rows[pick[clusters]]).square().sum(1)
        closest = distances if closest is None else closest.minimum(distances)
        quotas[clusters[picked]] -= 1
        left = quotas[clusters] > 0
        left[picked] = False
        active, closest = active[left], closest[left]
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)


def plain_choice(counts, assignments, embeddings, centroids, size, noise_std):
    """Rows chosen in float64 with all densities sorted, and the number outside the region."""
    sizes = torch.bincount(assignments, minlength=len(centroids))
    held = smooth_counts(counts, centroids, sizes, noise_std)(embeddings.double())
    order = held.argsort(descending=True, stable=True)
    sums = held[order].cumsum(0)
    total, doubt = float(counts.sum()), noise_std * math.sqrt(len(counts))
    regions = []
    for share in (1.0, CORE_SHARE):
        marked = torch.zeros(len(held), dtype=torch.bool)
        if total > doubt:
            before = (sums - held[order]).cummax(0).values
            marked[order[before < share * (1 - doubt / total) * float(sums[-1])]] = True
        regions.append(marked & (held > 0))
    relevant, core = regions
    room = torch.bincount(assignments[core], minlength=len(centroids))
    shares = torch.zeros(len(centroids)).double().index_add(0, assignments[core], held[core])
    quotas = water_fill(shares, room, size)
    picks = plain_picks(embeddings, assignments, centroids, quotas, core)
    rest = held.index_fill(0, picks, -torch.inf).argsort(descending=True, stable=True)
    indices = torch.cat([picks, rest[: min(size, len(rest)) - len(picks)]]).sort().values
    return indices, int((~relevant[indices]).sum())


def scattered(num_rows, num_clusters, dims, seed):
    """Rows assigned to their nearest centroid; the client is on one side."""
    g = generator(seed)
    centroids = 2 * torch.randn(num_clusters, dims, generator=g)
    rows = centroids[torch.randint(num_clusters, (num_rows,), generator=g)]
    rows = (rows + torch.randn(num_rows, dims, generator=g)).half()
    noise = 3 * torch.randn(num_clusters, generator=g)
    counts = (torch.where(centroids[:, 0] > 1, 30.0, 0.0) + noise).round().long()
    return counts, torch.cdist(rows.float(), centroids).argmin(1), rows, centroids


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_rows=st.sampled_from([60, 300, 1500]),
    num_clusters=st.sampled_from([2, 10, 40]),
    dims=st.sampled_from([2, 16]),
    share=st.sampled_from([0.01, 0.1, 0.3, 0.7, 1.1]),
    small=st.booleans(),
)
def test_the_choice_equals_the_plain_method(seed, num_rows, num_clusters, dims, share, small):
    counts, assignments, rows, centroids = scattered(num_rows, num_clusters, dims, seed)
    size = int(share * num_rows)
    expected, num_outside = plain_choice(counts, assignments, rows, centroids, size, 3.0)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(diverse_picks, "HELD_VALUES", 30 * dims)
            patch.setattr(diverse_picks, "GROUP_VALUES", 10 * dims)
            patch.setattr(densest_rows, "READ_ROWS", 77)
            patch.setattr(selection, "COUNTED_ROWS", 50)
        found = chosen(counts, assignments, rows, centroids, size=size, noise_std=3.0)
    assert found.indices.tolist() == expected.tolist()
    assert found.num_filled_up == num_outside


# --- unreadable images, containers ----------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("distance", [0.0, 0.8])
def test_unreadable_rows_are_as_if_they_were_not_there(strategy, distance):
    counts, assignments, rows, centroids = scattered(400, 12, 4, 1)
    options = {"strategy": strategy, "size": 90, "duplicate_distance": distance}
    expected = chosen(counts, assignments, rows, centroids, **options)
    places = torch.randperm(500, generator=generator())[:400].sort().values
    wide = torch.full((500, 4), torch.nan).half().index_copy(0, places, rows)
    owners = torch.full((500,), -1).index_copy(0, places, assignments)
    found = chosen(counts, owners, wide, centroids, **options)
    assert found.indices.tolist() == places[expected.indices].tolist()
    assert torch.equal(found.quotas, expected.quotas)
    assert torch.equal(found.kept, expected.kept)
    assert found.threshold == pytest.approx(expected.threshold, rel=1e-4)
    assert found.num_duplicates == expected.num_duplicates


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_container_and_integer(strategy, tmp_path):
    counts, assignments, rows, centroids = scattered(300, 10, 4, 2)
    options = {"strategy": strategy, "duplicate_distance": 0.8}
    expected = chosen(counts, assignments, rows, centroids, **options)
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    for owners in (assignments.numpy().astype(np.int32), assignments.int(), assignments.numpy()):
        for table in (rows.numpy(), mapped, rows):
            found = chosen(counts, owners, table, centroids, full_embeddings=table, **options)
            assert found.indices.tolist() == expected.indices.tolist()
            assert torch.equal(found.quotas, expected.quotas)


def test_a_cluster_with_no_readable_image_gets_nothing():
    counts, assignments, rows, centroids = scattered(300, 10, 4, 3)
    best = int(counts.argmax())
    gone = assignments == best
    rows[gone], assignments[gone] = torch.nan, -1
    found = chosen(counts, assignments, rows, centroids, size=300)
    assert len(found.indices) == 300 - int(gone.sum())
    assert found.quotas[best] == 0
    assert not found.kept[best]


# --- near-duplicates ------------------------------------------------------------------------------


def with_copies(seed=0, num_rows=400, copies=3):
    """Each row several times over, with a tremor; unit rows of 8 dimensions and of 4."""
    g = generator(seed)
    full = torch.nn.functional.normalize(torch.randn(num_rows, 8, generator=g), dim=1)
    full = full.repeat(copies, 1) + 0.003 * torch.randn(copies * num_rows, 8, generator=g)
    full = torch.nn.functional.normalize(full, dim=1)[
        torch.randperm(copies * num_rows, generator=g)
    ]
    rows = (full @ torch.linalg.qr(torch.randn(8, 4, generator=g)).Q).half()
    centroids = rows[:20].float()
    assignments = torch.cdist(rows.float(), centroids).argmin(1)
    counts = torch.where(centroids[:, 0] > 0, 40, 0)
    return counts, assignments, rows, centroids, full.half()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [30, 200, 380, 1000])
def test_no_near_duplicates_are_left_and_the_size_is_reached(strategy, size):
    *arguments, full = with_copies()
    options = {"size": size, "strategy": strategy, "noise_std": 1.0}
    plain = chosen(*arguments, **options)
    found = chosen(*arguments, **options, full_embeddings=full, duplicate_distance=0.05)
    apart = torch.cdist(full[found.indices].double(), full[found.indices].double())
    assert len(found.indices) < 2 or apart.fill_diagonal_(9).min() > 0.05
    num_distinct = 400 if strategy == "all" else min(size, 400)
    assert len(found.indices) == num_distinct
    assert found.indices.tolist() == sorted(set(found.indices.tolist()))
    assert int(found.quotas.sum()) == num_distinct
    assert plain.num_duplicates == 0
    if strategy == "all" or size == 1000:
        assert found.num_duplicates == 800
    elif size == 200 and strategy not in ("k_center", "mak"):  # what is far apart is distinct
        assert 0 < found.num_duplicates < 800


def test_diverse_rows_take_the_places_of_near_duplicates():
    """While the core has distinct rows, nothing but the core is chosen."""
    *arguments, full = with_copies()
    options = {"full_embeddings": full, "duplicate_distance": 0.05, "noise_std": 1.0}
    _, _, core = steps(*arguments, noise_std=1.0)
    members = torch.nonzero(core).flatten().numpy()
    num_distinct = int(DistinctRows(full, None, 0.05)(members).sum())
    assert num_distinct < len(members)
    for size in (num_distinct // 2, num_distinct, num_distinct + 5):
        found = chosen(*arguments, size=size, **options)
        assert len(found.indices) == size
        assert int(core[found.indices].sum()) == min(size, num_distinct)


def test_a_pool_of_one_image():
    rows = torch.ones(5000, 4).half() / 2
    for strategy in STRATEGIES:
        found = chosen(
            torch.tensor([30, 0]),
            torch.arange(5000) % 2,
            rows,
            torch.eye(2, 4),
            strategy=strategy,
            duplicate_distance=0.01,
        )
        assert len(found.indices) == 1
        assert found.num_duplicates == 4999


def test_distance_zero_removes_nothing():
    *arguments, full = with_copies()
    found = chosen(*arguments, full_embeddings=full, duplicate_distance=0.0, strategy="all")
    assert len(found.indices) == 1200
    assert found.num_duplicates == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_removal_does_not_depend_on_the_sizes_of_blocks(strategy, monkeypatch):
    *arguments, full = with_copies()
    options = {"full_embeddings": full, "duplicate_distance": 0.05, "strategy": strategy}
    expected = chosen(*arguments, size=150, **options)
    monkeypatch.setattr(near_duplicates, "BLOCK_ROWS", 37)
    monkeypatch.setattr(near_duplicates, "KEPT_ROWS", 23)
    monkeypatch.setattr(selection, "COUNTED_ROWS", 100)
    monkeypatch.setattr(diverse_picks, "HELD_VALUES", 200)
    found = chosen(*arguments, size=150, **options)
    assert found.indices.tolist() == expected.indices.tolist()
    assert found.num_duplicates == expected.num_duplicates


def test_random_goes_on_in_its_own_order():
    *arguments, full = with_copies()
    found = chosen(
        *arguments, size=300, strategy="random", full_embeddings=full, duplicate_distance=0.05
    )
    order = torch.randperm(1200, generator=generator())
    kept, passed = [], 0
    for row in order.tolist():
        if len(kept) == 300:
            break
        if kept and (full[kept].double() - full[row].double()).norm(dim=1).min() <= 0.05:
            passed += 1
        else:
            kept.append(row)
    assert found.indices.tolist() == sorted(kept)
    assert found.num_duplicates == passed


def test_the_config_offers_every_strategy():
    assert SelectionOptions.__dataclass_fields__["strategy"].metadata["choices"] == STRATEGIES


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"one of ecos, random, .*, nearest, not 'best'"):
        chosen(None, *pool(), strategy="best")
    with pytest.raises(ValueError, match="ecos needs the client's noisy counts"):
        chosen(None, *pool())
    with pytest.raises(ValueError, match="duplicate_distance must not be negative"):
        chosen(None, *pool(), strategy="random", duplicate_distance=-1.0)
