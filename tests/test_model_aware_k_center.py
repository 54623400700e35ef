import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from ecos_pl.model_aware_k_center import CANDIDATE_RATIO, ModelAwareKCenter
from tests.test_k_center import farthest_first, generator, taken, whole_numbers


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    dims=st.integers(1, 3),
    num_images=st.integers(1, 6),
    size=st.integers(0, 30),
)
def test_the_order_equals_the_rule_by_plain_loops(seed, dims, num_images, size):
    embeddings, client = whole_numbers(40, dims, seed), whole_numbers(num_images, dims, seed + 1)
    rows = np.arange(5, 35)
    apart = cdist(embeddings, client, "sqeuclidean").min(axis=1)
    by_distance = sorted(rows.tolist(), key=lambda row: (apart[row], row))
    number = math.ceil(CANDIDATE_RATIO * size)
    expected = farthest_first(embeddings.tolist(), by_distance[:number], client.tolist())
    expected += by_distance[number:]
    preference = ModelAwareKCenter(embeddings.half(), rows, client, size)
    assert taken(preference, size, 10, 30, 30, 30) == expected


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.integers(1, 4))
def test_both_terms_of_the_objective_are_bounded(seed, size):
    """Against all sets of the same size on a tiny pool, by brute force."""
    embeddings = torch.randn(12, 2, generator=generator(seed)).half()
    client = torch.randn(3, 2, generator=generator(seed + 1))
    to_client = cdist(embeddings.float(), client).min(axis=1)
    found = ModelAwareKCenter(embeddings, np.arange(12), client, size).more(size)

    # Proximity: no row is farther from the client than the last of the 1.5 · size nearest.
    number = math.ceil(CANDIDATE_RATIO * size)
    assert to_client[found].max() <= np.sort(to_client)[number - 1]

    # Diversity: the candidates' distance to S ∪ D_p is at most twice the least possible.
    candidates = np.argsort(to_client, kind="stable")[:number]
    apart = cdist(embeddings.float(), embeddings.float())[candidates]

    def radius(chosen):
        return np.minimum(to_client[candidates], apart[:, list(chosen)].min(axis=1)).max()

    best = min(radius(chosen) for chosen in itertools.combinations(candidates, size))
    assert radius(found) <= 2 * best + 1e-6


def test_it_is_more_diverse_than_the_nearest_rows_and_nearer_than_k_center():
    embeddings = torch.randn(2000, 4, generator=generator()).half()
    client = 0.5 + 0.3 * torch.randn(30, 4, generator=generator(1))
    to_client = cdist(embeddings.float(), client).min(axis=1)
    found = ModelAwareKCenter(embeddings, np.arange(2000), client, 100).more(100)
    nearest = np.argsort(to_client)[:100]

    def least_gap(rows):
        apart = cdist(embeddings[rows].float(), embeddings[rows].float())
        return np.sort(apart + 9 * np.eye(100), axis=1)[:, 0].mean()

    assert least_gap(found) > 1.2 * least_gap(nearest)
    assert to_client[found].max() < np.quantile(to_client, 0.08)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_a_small_pool(num_rows):
    preference = ModelAwareKCenter(torch.randn(3, 2), np.arange(num_rows), torch.zeros(1, 2), 10)
    assert sorted(taken(preference, 10, 10, 10)) == list(range(num_rows))
