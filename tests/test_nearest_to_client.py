import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from ecos_pl import distances_to_client, nearest_to_client
from ecos_pl.distances_to_client import nearest_distances
from ecos_pl.nearest_to_client import NearestInTurn
from tests.test_k_center import generator, taken, whole_numbers


def in_turn(rows, client, candidates):
    """Each client image in turn takes its nearest row that is left, by plain loops."""
    left, taken = list(candidates), []
    while left:
        image = client[len(taken) % len(client)]
        best = min(
            left, key=lambda i: (sum((a - b) ** 2 for a, b in zip(rows[i], image, strict=True)), i)
        )
        left.remove(best)
        taken.append(best)
    return taken


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    dims=st.integers(1, 3),
    num_images=st.integers(1, 9),
    listed=st.sampled_from([1, 3, 32]),
    most=st.sampled_from([1, 2**24]),
    block=st.sampled_from([1, 2**22]),
    numbers=st.lists(st.integers(0, 15), max_size=3),
)
def test_the_order_equals_plain_loops(seed, dims, num_images, listed, most, block, numbers):
    """However many rows are listed, read or asked for at a time."""
    embeddings, client = whole_numbers(300, dims, seed), whole_numbers(num_images, dims, seed + 1)
    rows = np.arange(2, 300, 3) if block > 1 else np.arange(300)  # 256 rows a block at least
    drawn = client[torch.randperm(num_images, generator=generator(seed))]
    expected = in_turn(embeddings.tolist(), drawn.tolist(), rows.tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nearest_to_client, "LISTED_ROWS", listed)
        patch.setattr(nearest_to_client, "LIST_VALUES", most)
        patch.setattr(distances_to_client, "BLOCK_DISTANCES", block)
        found = taken(
            NearestInTurn(embeddings.half(), rows, client, generator(seed)), *numbers, 299, 4
        )
    assert found == expected


def test_every_image_takes_as_many_so_that_rare_kinds_count():
    """Nine images of one kind, one of another: a tenth of the rows are of that other kind."""
    kinds = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
    embeddings = kinds.repeat_interleave(100, dim=0) + 0.1 * torch.randn(
        200, 2, generator=generator()
    )
    client = kinds[[0] * 9 + [1]]
    found = NearestInTurn(embeddings, np.arange(200), client, generator(1)).more(50)
    assert int((found >= 100).sum()) == 5


def test_a_client_of_one_kind_reads_the_pool_a_few_times_only(monkeypatch):
    """All its images are near the same rows."""
    readings = []
    plain = NearestInTurn._list_anew
    monkeypatch.setattr(
        NearestInTurn,
        "_list_anew",
        lambda self, number: (readings.append(number), plain(self, number)),
    )
    embeddings = torch.randn(3000, 2, generator=generator()).half()
    found = NearestInTurn(embeddings, np.arange(3000), torch.zeros(50, 2), generator(1)).more(1000)
    assert set(found) == set(embeddings.float().norm(dim=1).argsort(stable=True)[:1000].tolist())
    assert readings == [80, 160, 320, 640]


def test_with_more_images_than_rows_wanted_those_that_choose_are_drawn():
    embeddings = torch.arange(100.0)[:, None]
    hits = np.zeros(100)
    for seed in range(300):
        hits[NearestInTurn(embeddings, np.arange(100), embeddings, generator(seed)).more(20)] += 1
    assert abs(hits - 60).max() < 6 * (300 * 0.2 * 0.8) ** 0.5


def test_distances_are_those_of_scipy(monkeypatch):
    monkeypatch.setattr(distances_to_client, "BLOCK_DISTANCES", 7 * 300)
    embeddings = torch.randn(1000, 16, generator=generator()).half()
    client = torch.randn(7, 16, generator=generator(1))
    rows = np.arange(0, 1000, 2)
    found = nearest_distances(embeddings, rows, client)
    expected = cdist(embeddings[rows].double(), client.double()).min(axis=1) ** 2
    assert np.allclose(found, expected, rtol=1e-6)


def test_a_copy_of_a_client_image_is_at_distance_zero_or_nearly():
    """Products of long vectors would blur this in float32."""
    client = 100 + torch.randn(5, 64, generator=generator()).half().float()
    found = nearest_distances(client.half(), np.arange(5), client.half().float())
    assert found.max() < 1e-8
