import pytest
import torch

from ecos_pl import centroid_search, nearest
from ecos_pl.centroid_search import ExactSearch, GroupedSearch
from ecos_pl.coverage import coverage_counts
from ecos_pl.kmeans import kmeans
from ecos_pl.nearest import assign


def table(rows, dims, seed=0):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def nearest_by_brute_force(rows, centroids):
    distances = torch.cdist(
        rows.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distances.argmin(1)


@pytest.mark.parametrize(("n", "r", "d"), [(1000, 37, 16), (300, 1, 3), (5, 600, 2), (700, 50, 64)])
def test_assign_agrees_with_brute_force_and_with_the_client(n, r, d):
    rows, centroids = table(n, d, 1), table(r, d, 2)
    found = assign(rows, centroids)
    assert found.dtype == torch.int64
    assert torch.equal(found, nearest_by_brute_force(rows, centroids))
    assert torch.equal(torch.bincount(found, minlength=r), coverage_counts(rows, centroids))


def test_centroids_as_they_travel():
    """float16 centroids and unit vectors, as in the dialogue: both parties count alike."""
    rows = torch.nn.functional.normalize(table(2000, 32, 1), dim=1)
    centroids = kmeans(rows, 30, num_iters=3).centroids.half()
    found = torch.bincount(assign(rows, centroids.float()), minlength=30)
    assert torch.equal(found, coverage_counts(rows, centroids.float()))


def test_ties_go_to_the_lowest_index():
    centroids = torch.tensor([[5.0], [2.0], [0.0], [2.0]])
    assert assign(torch.tensor([[1.0], [2.0], [3.5]]), centroids).tolist() == [1, 1, 0]
    same = table(1, 8).expand(300, 8)
    assert assign(table(50, 8, 1), same).tolist() == [0] * 50


@pytest.mark.parametrize("num_rows", [1, 7, 100, 999])
def test_assign_does_not_depend_on_blocks(monkeypatch, num_rows):
    rows, centroids = table(500, 16, 1), table(20, 16, 2)
    whole = assign(rows, centroids)
    monkeypatch.setattr(nearest, "block_rows", lambda num_clusters, device: num_rows)
    assert torch.equal(assign(rows, centroids), whole)


def test_nan_rows_are_nowhere_and_infinite_ones_refused():
    rows, centroids = table(9, 3, 1), table(4, 3)
    rows[2] = torch.nan
    rows[5, 1] = torch.nan
    found = assign(rows, centroids)
    assert torch.nonzero(found == -1).flatten().tolist() == [2, 5]
    rows[7, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        assign(rows, centroids)


def test_precision_is_that_of_float32_whatever_is_set():
    rows, centroids = table(3000, 64, 1), table(300, 64, 2) * 0.1
    expected = assign(rows, centroids)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(assign(rows, centroids), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- very many centroids -------------------------------------------------------------------------


def unit_rows(number, dims, seed):
    rows = table(number, dims, seed) / (1 + torch.arange(dims)).sqrt()
    return torch.nn.functional.normalize(rows, dim=1)


def test_grouped_search_finds_nearly_always_the_nearest():
    centroids, rows = unit_rows(4000, 32, 1), unit_rows(1000, 32, 2)
    index, score = GroupedSearch(centroids)(rows)
    exact = ExactSearch(centroids)
    expected, lowest = exact(rows)
    assert (index == expected).float().mean() > 0.98
    norms = rows.square().sum(1)
    assert (norms + 2 * score).sum() < 1.001 * (norms + 2 * lowest).sum()
    true = norms / 2 + score - 0.5 * (rows - centroids[index]).square().sum(1)
    assert true.abs().max() < 1e-5  # the score is that of the centroid named


def test_grouped_search_is_exact_when_all_groups_are_searched(monkeypatch):
    monkeypatch.setattr(centroid_search, "NUM_SEARCHED", 1000)
    centroids, rows = table(500, 8, 1), table(300, 8, 2)
    centroids[400:] = centroids[:100]  # ties go to the lowest index
    assert torch.equal(GroupedSearch(centroids)(rows)[0], nearest_by_brute_force(rows, centroids))


def test_kmeans_and_assign_agree_where_search_is_grouped(monkeypatch):
    monkeypatch.setattr(nearest, "GROUPED_ABOVE", 50)
    rows = unit_rows(1500, 16, 1).half()
    found = kmeans(rows, 200, num_iters=3)
    assert torch.equal(assign(rows, found.centroids), found.assignments)
    monkeypatch.setattr(nearest, "GROUPED_ABOVE", 1000)
    exact = kmeans(rows, 200, num_iters=3)
    assert found.inertia < 1.01 * exact.inertia


def test_assign_nothing():
    assert assign(torch.empty(0, 3), table(4, 3)).tolist() == []
