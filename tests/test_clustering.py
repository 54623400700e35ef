import itertools
import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from ecos_pl import clustering
from ecos_pl.clustering import assign, fit_pca, kmeans
from ecos_pl.coverage import coverage_counts


def table(rows, dims, seed=0):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def blobs(rows=600, dims=5, centers=8, seed=0):
    points, labels = make_blobs(rows, dims, centers=centers, cluster_std=1.0, random_state=seed)
    return torch.from_numpy(points).float(), labels


def nearest_by_brute_force(rows, centroids):
    distances = torch.cdist(
        rows.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return distances.argmin(1)


# --- PCA -----------------------------------------------------------------------------------------


def skewed(rows=500, dims=12, seed=0):
    """Rows with clearly different variances in turned directions, away from the origin."""
    turn = torch.linalg.qr(table(dims, dims, seed + 1)).Q
    return table(rows, dims, seed) * torch.linspace(3, 0.2, dims) @ turn + 2


@pytest.mark.parametrize("num_dims", [1, 5, 12])
def test_pca_agrees_with_scikit_learn(num_dims):
    rows = skewed()
    found = fit_pca([rows], num_dims)
    expected = PCA(num_dims, svd_solver="full").fit(rows.double().numpy())
    variances = expected.explained_variance_ * (len(rows) - 1) / len(rows)  # ours divides by N
    assert torch.allclose(found.variances.double(), torch.from_numpy(variances), rtol=1e-4)
    assert torch.allclose(found.mean.double(), torch.from_numpy(expected.mean_), atol=1e-5)
    cosines = (found.components.double() * torch.from_numpy(expected.components_)).sum(1)
    assert torch.allclose(cosines.abs(), torch.ones(num_dims, dtype=torch.float64), atol=1e-5)
    largest = found.components.gather(1, found.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    scores = np.abs(expected.transform(rows.double().numpy()))
    assert np.allclose(found(rows).abs().numpy(), scores, atol=1e-3)


def test_pca_does_not_depend_on_chunks_or_their_type():
    rows = skewed()
    whole = fit_pca([rows], 4)
    for chunks in (rows.split(7), [rows[:0], rows[:1], rows[1:]], [rows.numpy()[::1]]):
        parts = fit_pca(chunks, 4)
        assert torch.allclose(parts.components, whole.components, atol=1e-4)
        assert torch.allclose(parts.variances, whole.variances, rtol=1e-4)
        assert torch.allclose(parts.mean, whole.mean, atol=1e-5)


def test_pca_leaves_out_rows_of_unreadable_images():
    rows = skewed(200)
    with_gaps = torch.cat([rows[:50], torch.full((3, 12), torch.nan), rows[50:]])
    with_gaps[120, 3:] = torch.nan  # a row that is NaN in part
    rows = torch.cat([rows[:117], rows[118:]])
    found, expected = fit_pca(with_gaps.split(64), 3), fit_pca([rows], 3)
    assert torch.allclose(found.components, expected.components, atol=1e-4)
    assert torch.allclose(found.variances, expected.variances, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[], [torch.empty(0, 3)], [torch.full((4, 3), torch.nan)]])
def test_pca_of_no_row_is_refused(chunks):
    with pytest.raises(ValueError, match="no embeddings"):
        fit_pca(chunks, 2)


def test_pca_keeps_at_most_as_many_dimensions_as_there_are():
    assert fit_pca([table(50, 3)], 64).components.shape == (3, 3)
    assert fit_pca([table(4, 10)], 64).components.shape == (4, 10)


def test_pca_shared_by_processes():
    """Two processes that hold half the rows each find what one finds."""
    rows = skewed()
    sums = []
    fit_pca([rows[200:]], 3, reduce=lambda x: sums.append(x.clone()) or x)
    shared = fit_pca([rows[:200]], 3, reduce=lambda x: x + sums[0])
    assert torch.allclose(shared.components, fit_pca([rows], 3).components, atol=1e-4)


def test_whitening_brings_every_dimension_to_variance_one():
    rows = skewed(2000)
    white = fit_pca([rows], 6).whitened()
    covariance = white(rows).T.cov(correction=0)
    assert torch.allclose(covariance, torch.eye(6), atol=1e-3)
    assert torch.allclose(white.variances, torch.ones(6), atol=1e-5)


def test_whitening_does_not_blow_up_a_dimension_without_signal():
    rows = torch.cat([table(300, 2), torch.zeros(300, 1)], 1)
    white = fit_pca([rows], 3).whitened(floor=1e-3)
    assert white.components.isfinite().all()
    assert white.components[2].norm() <= 1e-3**-0.5 * 1.2


def test_a_rounded_projection_survives_float16():
    rounded = fit_pca([skewed()], 4).rounded()
    assert torch.equal(rounded.components.half().float(), rounded.components)
    assert torch.equal(rounded.mean.half().float(), rounded.mean)


# --- k-means -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_agrees_with_scikit_learn_from_the_same_start(seed):
    rows, _ = blobs(seed=seed)
    start = rows[torch.randperm(600, generator=torch.Generator().manual_seed(seed))[:8]]
    found = kmeans(rows, 8, start=start, num_iters=300, tolerance=0)
    expected = KMeans(8, init=start.numpy(), n_init=1, algorithm="lloyd", max_iter=300, tol=0)
    expected.fit(rows.numpy())
    assert found.inertia == pytest.approx(expected.inertia_, rel=1e-5)
    assert np.allclose(found.centroids.numpy(), expected.cluster_centers_, atol=1e-3)
    assert found.assignments.tolist() == expected.labels_.tolist()


def test_one_iteration_by_hand():
    rows = torch.tensor([[0.0], [1.0], [9.0], [11.0]])
    found = kmeans(rows, 2, start=torch.tensor([[0.0], [8.0]]), num_iters=1)
    assert found.centroids.flatten().tolist() == [0.5, 10.0]
    assert found.assignments.tolist() == [0, 0, 1, 1]
    assert found.inertia == pytest.approx(0.25 * 2 + 2)
    assert found.num_iters == 1


def test_results_describe_each_other():
    rows, _ = blobs()
    found = kmeans(rows, 10)
    assert found.centroids.dtype == torch.float32
    assert found.assignments.dtype == torch.int64
    assert torch.equal(found.assignments, nearest_by_brute_force(rows, found.centroids))
    inertia = (rows - found.centroids[found.assignments]).double().square().sum()
    assert found.inertia == pytest.approx(float(inertia), rel=1e-4)


def test_order_of_the_rows_does_not_matter(monkeypatch):
    rows, _ = blobs(3000, centers=12)
    order = torch.randperm(3000, generator=torch.Generator().manual_seed(5))
    one, other = kmeans(rows, 12, seed=3), kmeans(rows[order], 12, seed=3)
    assert other.inertia == pytest.approx(one.inertia, rel=1e-6)
    assert adjusted_rand_score(one.assignments[order], other.assignments) == 1
    assert torch.allclose(one.centroids, other.centroids, atol=1e-4)  # in the same order, too
    monkeypatch.setattr(clustering, "CHUNK_ROWS", 130)
    chunked = kmeans(rows, 12, seed=3)
    assert torch.equal(chunked.assignments, one.assignments)


def test_order_does_not_matter_where_the_start_is_drawn_from_a_sample():
    rows = table(6000, 3)  # more than the 4,096 rows that k-means++ looks at
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(1))
    one, other = kmeans(rows, 5, num_iters=2), kmeans(rows[order], 5, num_iters=2)
    assert torch.allclose(one.centroids, other.centroids, atol=1e-4)


def test_the_seed_matters_and_repeats():
    rows = table(400, 6)
    one, again, other = kmeans(rows, 20, seed=1), kmeans(rows, 20, seed=1), kmeans(rows, 20, seed=2)
    assert torch.equal(one.centroids, again.centroids)
    assert not torch.equal(one.centroids, other.centroids)


def test_the_global_generators_are_left_alone():
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    kmeans(table(300, 4), 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002
    one = kmeans(table(300, 4), 6).centroids
    torch.manual_seed(8)
    assert torch.equal(kmeans(table(300, 4), 6).centroids, one)


def test_an_empty_cluster_is_moved_to_the_farthest_row():
    rows = torch.cat([table(100, 2) * 0.1, torch.tensor([[50.0, 50.0]])])
    start = torch.tensor([[0.0, 0.0], [-1000.0, -1000.0]])  # nobody is near the second one
    found = kmeans(rows, 2, start=start)
    assert found.assignments.tolist() == [0] * 100 + [1]
    assert found.centroids[1].tolist() == pytest.approx([50, 50])


def test_several_empty_clusters_are_refilled():
    rows, _ = blobs(400, 3, centers=4, seed=1)
    start = torch.cat([rows[:1], torch.full((3, 3), 1e4) + torch.arange(3)[:, None]])
    found = kmeans(rows, 4, start=start, num_iters=100)
    assert torch.bincount(found.assignments, minlength=4).min() > 0
    assert found.inertia < 0.8 * kmeans(rows, 1).inertia


def test_empty_clusters_are_refilled_from_any_chunk(monkeypatch):
    monkeypatch.setattr(clustering, "CHUNK_ROWS", 7)
    rows = torch.cat([torch.tensor([[90.0]]), torch.zeros(40, 1), torch.tensor([[-70.0]])])
    found = kmeans(rows, 3, start=torch.tensor([[0.0], [1e6], [2e6]]))
    assert sorted(found.centroids.flatten().tolist()) == [-70.0, 0.0, 90.0]
    assert found.inertia == 0
    once = kmeans(rows, 3, start=torch.tensor([[0.0], [1e6], [2e6]]), num_iters=1)
    assert once.centroids.flatten().tolist() == pytest.approx([20 / 42, 90, -70])


def test_identical_rows_do_not_hang():
    found = kmeans(torch.ones(300, 4), 7)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert found.assignments.tolist() == [0] * 300
    assert found.centroids.isfinite().all()


def test_fewer_different_rows_than_clusters():
    rows = torch.tensor([[0.0, 0.0], [5.0, 5.0], [9.0, 0.0]]).repeat(50, 1)
    found = kmeans(rows, 6)
    assert found.inertia == pytest.approx(0, abs=1e-6)
    assert len(found.assignments.unique()) == 3


def test_as_many_clusters_as_rows():
    rows = table(40, 3)
    found = kmeans(rows, 40)
    assert found.inertia == pytest.approx(0, abs=1e-4)
    assert sorted(found.assignments.tolist()) == list(range(40))


def test_one_cluster_is_the_mean():
    rows = table(500, 3) + 4
    found = kmeans(rows, 1)
    assert torch.allclose(found.centroids[0], rows.mean(0), atol=1e-5)
    assert found.inertia == pytest.approx(float((rows - rows.mean(0)).square().sum()), rel=1e-4)


@pytest.mark.parametrize("num_clusters", [0, -1, 11])
def test_impossible_numbers_of_clusters_are_refused(num_clusters):
    with pytest.raises(ValueError, match=f"cannot make {num_clusters} clusters of 10 embeddings"):
        kmeans(table(10, 2), num_clusters)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("with_start", [True, False])
def test_rows_that_are_not_finite_are_refused(bad, with_start):
    rows = table(50, 3)
    start = rows[:4].clone() if with_start else None
    rows[17, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        kmeans(rows, 4, start=start)


def test_stops_early_and_reports_each_iteration():
    rows, _ = blobs()
    steps = []
    found = kmeans(rows, 8, num_iters=100, on_iteration=steps.append)
    assert found.num_iters < 30
    assert steps == [1] * found.num_iters
    assert kmeans(rows, 8, num_iters=3, tolerance=-1).num_iters == 3


def test_more_iterations_never_raise_the_inertia():
    rows = table(800, 4)
    start = rows[:20].clone()
    inertias = [
        kmeans(rows, 20, start=start, num_iters=n, tolerance=-1).inertia for n in range(1, 9)
    ]
    assert all(later <= earlier + 1e-3 for earlier, later in itertools.pairwise(inertias))
    assert inertias[-1] < inertias[0]


def test_memory_maps_arrays_and_tensors_are_alike(tmp_path):
    rows = table(300, 4).half()
    np.save(tmp_path / "rows.npy", rows.numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    expected = kmeans(rows.float(), 6)
    kinds = (
        mapped,
        rows,
        rows.numpy(),
        rows.double(),
        rows.double().numpy(),
        np.asfortranarray(rows),
    )
    for kind in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = kmeans(kind, 6)
            chosen = assign(kind, expected.centroids)
        assert torch.equal(found.centroids, expected.centroids)
        assert torch.equal(found.assignments, expected.assignments)
        assert torch.equal(chosen, expected.assignments)
    assert kmeans(rows.bfloat16(), 6).centroids.isfinite().all()


def test_read_only_maps_do_not_warn():
    rows = np.ones((5, 2), np.float16)
    rows.setflags(write=False)
    torch.set_warn_always(True)  # PyTorch gives this warning once per process otherwise
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit_pca([rows], 1)
            assign(rows, torch.ones(2, 2))
            kmeans(rows, 2)
    finally:
        torch.set_warn_always(False)


def test_inputs_are_not_changed():
    rows = table(200, 3)
    start, before = rows[:5].clone(), rows.clone()
    kmeans(rows, 5, start=start)
    assert torch.equal(rows, before)
    assert torch.equal(start, before[:5])


def test_start_is_not_worse_than_that_of_scikit_learn():
    ours, theirs = [], []
    for seed in range(6):
        rows, _ = blobs(800, 4, centers=25, seed=seed)
        ours.append(kmeans(rows, 25, seed=seed).inertia)
        reference = KMeans(25, n_init=1, algorithm="lloyd", max_iter=25, random_state=seed)
        theirs.append(reference.fit(rows.numpy()).inertia_)
    assert np.mean(ours) <= 1.05 * np.mean(theirs)


def test_start_finds_well_separated_groups_without_a_single_iteration():
    """Every group gets one of the first centroids; with a random start hardly ever."""
    groups = torch.arange(20).repeat_interleave(30)
    rows = table(600, 2) * 0.01 + groups[:, None] * torch.tensor([10.0, 0.0])
    for seed in range(5):
        found = kmeans(rows, 20, seed=seed, num_iters=1)
        assert adjusted_rand_score(groups, found.assignments) == 1


# --- assignment ----------------------------------------------------------------------------------


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


@pytest.mark.parametrize("chunk_rows", [1, 7, 100, 999])
def test_assign_does_not_depend_on_chunks(monkeypatch, chunk_rows):
    rows, centroids = table(500, 16, 1), table(20, 16, 2)
    whole = assign(rows, centroids)
    monkeypatch.setattr(clustering, "CHUNK_ROWS", chunk_rows)
    assert torch.equal(assign(rows, centroids), whole)


def test_assign_nothing():
    assert assign(torch.empty(0, 3), table(4, 3)).tolist() == []
