import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier

from ecos_pl.accounting import epsilon_of
from ecos_pl.neighbor_votes import VotePlan, neighbor_votes, release_votes
from ecos_pl.privacy import PrivacyUnits, Release

ALPHA = 1e-6  # false alarms
Z = stats.norm.isf(ALPHA / 2)
NO_NOISE = 1e-4


def table(rows, dims, seed):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed)).double()


def classes(rows, num_classes, seed):
    return torch.randint(num_classes, (rows,), generator=torch.Generator().manual_seed(seed))


def plan(num_queries, *, k=5, noise=NO_NOISE, rate=1.0, m=1):
    return VotePlan(num_queries, num_queries, k, rate, noise, max_samples=m)


def votes(embeddings, labels, queries, k, units=None):
    units = units or PrivacyUnits()
    asked = plan(len(queries), k=k, m=units.max_samples)
    return neighbor_votes(embeddings, labels, queries, 4, asked, units)[1]


def change_of(fewer, more):
    change = more - fewer
    return np.sqrt((change**2).sum(1)), np.abs(more.max(1) - fewer.max(1))


grid = st.integers(-3, 3)  # coarse: equal distances are common


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.tuples(grid, grid, st.integers(0, 3)), min_size=1, max_size=14),
    where=st.integers(0, 13),
    k=st.integers(1, 6),
)
def test_one_sample_moves_votes_by_root_two_and_the_largest_by_one(rows, where, k):
    where %= len(rows)
    embeddings = torch.tensor([row[:2] for row in rows], dtype=torch.float64)
    labels = torch.tensor([row[2] for row in rows])
    rest = torch.arange(len(rows)) != where
    queries = torch.tensor([[0.0, 0.0], [1.5, -2.0], [-3.0, 3.0]], dtype=torch.float64)
    norm, largest = change_of(
        votes(embeddings[rest], labels[rest], queries, k), votes(embeddings, labels, queries, k)
    )
    for length in norm:
        assert min(abs(length - np.array([0, 1, math.sqrt(2)]))) < 1e-12
    if len(rows) <= k:
        assert norm.tolist() == [1, 1, 1]
    assert largest.max() <= 1


def test_all_three_changes_occur():
    """√2 is reached: taking the sensitivity for 1 would understate ε."""
    embeddings, labels = table(300, 2, 0), classes(300, 4, 1)
    queries, seen = table(20, 2, 2), set()
    whole = votes(embeddings, labels, queries, 15)
    for where in range(300):
        rest = torch.arange(300) != where
        norm, largest = change_of(votes(embeddings[rest], labels[rest], queries, 15), whole)
        seen |= set(norm.round(6).tolist())
        assert largest.max() <= 1
    few = votes(embeddings[:9], labels[:9], queries, 15)
    seen |= set(change_of(votes(embeddings[:8], labels[:8], queries, 15), few)[0].tolist())
    assert seen == {0.0, 1.0, round(math.sqrt(2), 6)}


@pytest.mark.parametrize("max_samples", [1, 3, 8])
def test_a_person_moves_votes_within_the_sensitivity(max_samples):
    owners = np.arange(200) % 40
    embeddings = table(200, 2, 0) + torch.from_numpy(owners)[:, None] % 5  # people differ
    labels, queries = classes(200, 4, 1), table(20, 2, 2) + 2
    whole = votes(embeddings, labels, queries, 15, PrivacyUnits(owners, max_samples))
    for person in range(40):
        rest = torch.from_numpy(owners) != person
        units = PrivacyUnits(owners[rest.numpy()], max_samples)
        norm, largest = change_of(votes(embeddings[rest], labels[rest], queries, 15, units), whole)
        assert norm.max() <= math.sqrt(2) * max_samples + 1e-12
        assert largest.max() <= max_samples


def test_the_bound_for_persons_is_reached():
    """All of a person's samples push out others of one class."""
    embeddings = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])[:, None]
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    owners = np.array([9, 9, 9, 1, 2, 3])
    query = torch.zeros(1, 1)
    norm, largest = change_of(
        votes(embeddings[3:], labels[3:], query, 3, PrivacyUnits(owners[3:], 3)),
        votes(embeddings, labels, query, 3, PrivacyUnits(owners, 3)),
    )
    assert norm[0] == pytest.approx(math.sqrt(2) * 3)
    assert largest[0] == 0


@pytest.mark.parametrize("k", [1, 7, 40])
def test_matches_an_independent_knn(k):
    embeddings, labels, queries = table(500, 6, 0), classes(500, 4, 1), table(80, 6, 2)
    counts = votes(embeddings, labels, queries, k)
    reference = KNeighborsClassifier(n_neighbors=k, algorithm="brute")
    reference.fit(embeddings.numpy(), labels.numpy())
    assert np.allclose(counts / k, reference.predict_proba(queries.numpy()))
    answered = release_votes(embeddings, labels, queries, 4, plan(80, k=k))
    assert answered.dtype == torch.int64
    clear = np.sort(counts, 1)[:, -1] > np.sort(counts, 1)[:, -2]
    assert (answered.numpy() == reference.predict(queries.numpy()))[clear].all()


def test_few_samples_all_vote():
    embeddings, labels = table(3, 2, 0), torch.tensor([1, 1, 3])
    assert votes(embeddings, labels, table(2, 2, 1), 5).tolist() == [[0, 2, 0, 1]] * 2


def test_equal_distances_go_by_order():
    embeddings, labels = torch.ones(6, 2), torch.tensor([3, 2, 1, 0, 0, 0])
    assert votes(embeddings, labels, torch.zeros(1, 2), 2).tolist() == [[0, 0, 1, 1]]


def test_neighbours_do_not_depend_on_the_batch():
    base = table(1, 64, 0)
    embeddings = base + 1e-15 * table(400, 64, 1)  # near-ties everywhere
    labels, queries = classes(400, 4, 2), table(30, 64, 3)
    together = votes(embeddings, labels, queries, 9)
    alone = np.concatenate([votes(embeddings, labels, query[None], 9) for query in queries])
    assert (together == alone).all()
    far = torch.full((50, 64), 1e6, dtype=torch.float64)  # these change nothing
    more = votes(torch.cat([embeddings, far]), torch.cat([labels, labels[:50]]), queries, 9)
    assert (together == more).all()


def test_no_samples_still_give_an_answer():
    answered = release_votes(
        torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), table(400, 2, 0), 4, plan(400)
    )
    assert set(answered.tolist()) == {0, 1, 2, 3}


def test_vote_noise_is_as_declared():
    """Two classes 15 : 5; the lower one wins with the probability of the noise's difference."""
    labels = torch.tensor([0] * 15 + [1] * 5)
    for noise, units in ((6.0, PrivacyUnits()), (2.0, PrivacyUnits(np.arange(20), 3))):
        asked = plan(8_000, k=20, noise=noise, m=units.max_samples)
        answered = release_votes(torch.zeros(20, 1), labels, torch.zeros(8_000, 1), 2, asked, units)
        expected = stats.norm.cdf(-10 / (6.0 * math.sqrt(2)))
        error = math.sqrt(expected * (1 - expected) / 8_000)
        assert abs(answered.double().mean().item() - expected) < Z * error


def test_samples_are_drawn_anew_for_every_screening_and_vote():
    """Of 40 samples of one class half vote; counts are independent between all masks."""
    asked = plan(1500, k=40, rate=0.5)
    pair = neighbor_votes(
        torch.zeros(40, 1), torch.zeros(40, dtype=torch.int64), torch.zeros(1500, 1), 1, asked
    )
    screening, vote = (counts[:, 0] - 20.0 for counts in pair)
    variance = 40 / 4
    for counts in (screening, vote):
        assert abs(counts.mean()) < Z * math.sqrt(variance / 1500)
        low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], 1499) / 1499
        assert 0.99 * low < counts.var(ddof=1) / variance < 1.01 * high
    for first, second in (
        (screening, vote),
        (screening[1:], screening[:-1]),
        (vote[1:], vote[:-1]),
    ):
        assert abs((first * second).mean()) / variance < Z / math.sqrt(len(first))


def test_screening_lets_clear_queries_pass_up_to_the_limit():
    embeddings = torch.tensor([[0.0]] * 20 + [[9.0]] * 20)
    labels = torch.tensor([2] * 20 + [0, 1, 2, 3] * 5)
    queries = torch.tensor([[9.0], [0.0], [0.0], [9.0], [0.0], [0.0]])
    arguments = (embeddings, labels, queries, 4)
    asked = VotePlan(6, 3, 20, 1.0, NO_NOISE, 0.5, 14.5)
    assert release_votes(*arguments, asked).tolist() == [-1, 2, 2, -1, 2, -1]
    everything = VotePlan(6, 6, 20, 1.0, NO_NOISE, 0.5, -100.0)
    assert (release_votes(*arguments, everything) >= 0).all()
    nothing = VotePlan(6, 6, 20, 1.0, NO_NOISE, 0.5, 100.0)
    assert release_votes(*arguments, nothing).tolist() == [-1] * 6


def test_screening_noise_is_as_declared():
    labels = torch.zeros(20, dtype=torch.int64)
    for noise, units in ((8.0, PrivacyUnits()), (4.0, PrivacyUnits(np.arange(20), 2))):
        # Half way between two integers, so that "above" is well defined.
        asked = VotePlan(10_000, 10_000, 20, 1.0, NO_NOISE, noise, 26.5, units.max_samples)
        answered = release_votes(
            torch.zeros(20, 1), labels, torch.zeros(10_000, 1), 1, asked, units
        )
        expected = stats.norm.sf(6.5 / 8.0)
        error = math.sqrt(expected * (1 - expected) / 10_000)
        passed = (answered >= 0).double().mean().item()
        assert abs(passed - expected) < Z * error + 1e-4  # a discrete Gaussian, not a rounded one


def test_cost():
    votes_only = VotePlan(1000, 1000, 40, 0.15, 25.0).releases()
    assert votes_only == [
        Release("knn_votes", 25.0 * 256, math.sqrt(2) * 256, 0.15, repeats=1000),
    ]
    assert epsilon_of(votes_only, 1e-5) == pytest.approx(1.005, abs=1e-3)
    screened = VotePlan(1000, 600, 40, 0.15, 25.0, 75.0, 30.0).releases()
    assert screened[0] == Release("knn_screening", 75.0, 1.0, 0.15, True, 1000)
    assert screened[1].repeats == 600
    assert epsilon_of(screened, 1e-5) == pytest.approx(0.797, abs=1e-3)
    persons = VotePlan(1000, 600, 40, 0.15, 25.0, 75.0, 30.0, max_samples=5).releases()
    assert [release.noise_multiplier for release in persons] == pytest.approx(
        [release.noise_multiplier for release in screened]
    )
    assert epsilon_of(persons, 1e-5) == pytest.approx(epsilon_of(screened, 1e-5), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_queries": 0}, "num_queries"),
        ({"num_queries": 2.0}, "num_queries"),
        ({"max_answers": 11}, "must not exceed"),
        ({"max_answers": True}, "max_answers"),
        ({"num_neighbors": 0}, "num_neighbors"),
        ({"max_samples": 0}, "max_samples"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": math.nan}, "sample_rate"),
        ({"vote_noise_std": 0.0}, "noise_std"),
        ({"vote_noise_std": math.inf}, "noise_std"),
        ({"screening_noise_std": None}, "belong together"),
        ({"threshold": None}, "belong together"),
        ({"threshold": math.nan}, "threshold"),
        ({"screening_noise_std": 0.1}, "noise_std"),
        ({"screening_noise_std": None, "threshold": None}, "every query is answered"),
    ],
)
def test_bad_plans_refused(changes, message):
    good = {
        "num_queries": 10,
        "max_answers": 6,
        "num_neighbors": 5,
        "sample_rate": 0.5,
        "vote_noise_std": 5.0,
        "screening_noise_std": 9.0,
        "threshold": 3.0,
    }
    VotePlan(**good)
    with pytest.raises(ValueError, match=message):
        VotePlan(**{**good, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 2])}, r"^labels must lie in \[0, 2\)$"),
        ({"labels": torch.tensor([0])}, "differ in length"),
        ({"embeddings": torch.full((2, 3), torch.nan)}, "embeddings contain"),
        ({"queries": torch.full((4, 3), torch.inf)}, "queries contain"),
        ({"queries": torch.zeros(4, 2)}, "dimensions"),
        ({"queries": torch.zeros(5, 3)}, "4 queries, not 5"),
        ({"units": PrivacyUnits(np.zeros(2, np.int64), 2)}, "max_samples"),
        ({"units": PrivacyUnits(np.zeros(3, np.int64))}, "owners and samples"),
    ],
)
def test_bad_arguments_refused(changes, message):
    arguments = {
        "embeddings": torch.zeros(2, 3),
        "labels": torch.tensor([0, 1]),
        "queries": torch.zeros(4, 3),
        "num_classes": 2,
        "plan": plan(4),
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        release_votes(**arguments)
