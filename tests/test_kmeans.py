import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_processes import ROOT, run_ranks
from sklearn.cluster import KMeans
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from ecos_pl import kmeans as kmeans_module
from ecos_pl.coverage import coverage_counts
from ecos_pl.kmeans import kmeans
from ecos_pl.nearest import assign


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


def test_results_do_not_depend_on_blocks(monkeypatch):
    rows, _ = blobs(3000, centers=12)
    whole = kmeans(rows.half(), 12, seed=3)
    monkeypatch.setattr(kmeans_module, "block_rows", lambda num_clusters, device: 130)
    parts = kmeans(rows.half(), 12, seed=3)
    assert torch.equal(parts.assignments, whole.assignments)
    assert torch.equal(parts.centroids, whole.centroids)


def test_samples_lead_to_the_same_quality():
    """Enough rows for two samples; no worse than scikit-learn, which looks at all rows."""
    rows, _ = blobs(20_000, 6, centers=40, seed=2)
    found = kmeans(rows, 9, seed=1)
    expected = KMeans(9, n_init=3, max_iter=25, random_state=0).fit(rows.numpy())
    assert found.inertia <= 1.03 * expected.inertia_
    assert torch.equal(found.assignments, nearest_by_brute_force(rows, found.centroids))


def test_restarts_choose_the_best():
    rows, _ = blobs(900, 3, centers=30, seed=4)
    single = [kmeans(rows, 30, seed=7919 * i).inertia for i in range(4)]
    found = kmeans(rows, 30, num_restarts=4)
    assert found.inertia <= min(single) * 1.001
    assert max(single) > min(single) * 1.01


def test_centroids_as_they_travel():
    """Rounded to float16, equal ones once, and assignments to those."""
    rows = (torch.nn.functional.normalize(table(2000, 8), dim=1) * 0.01).half()
    rows = torch.cat([rows, torch.full((40, 8), 0.5).half()])
    found = kmeans(rows, 30, num_iters=3, centroid_dtype=torch.float16)
    assert torch.equal(found.centroids.half().float(), found.centroids)
    assert torch.equal(found.assignments, assign(rows, found.centroids))
    counts = torch.bincount(found.assignments, minlength=len(found.centroids))
    assert torch.equal(counts, coverage_counts(rows.float(), found.centroids))
    few = kmeans(torch.ones(50, 3).half(), 4, centroid_dtype=torch.float16)
    assert few.centroids.tolist() == [[1.0, 1.0, 1.0]]


def test_nan_rows_take_no_part():
    """The same as without them, from the same start."""
    rows, _ = blobs(500)
    start = rows[:8].clone()
    gaps = torch.cat([rows[:200], torch.full((3, 5), torch.nan), rows[200:]])
    gaps[300, 2:] = torch.nan  # in part
    rows = torch.cat([rows[:297], rows[298:]])
    found, expected = kmeans(gaps.half(), 8, start=start), kmeans(rows.half(), 8, start=start)
    known = ~gaps.isnan().any(1)
    assert torch.equal(found.centroids, expected.centroids)
    assert torch.equal(found.assignments[known], expected.assignments)
    assert found.assignments[~known].tolist() == [-1] * 4
    assert found.inertia == pytest.approx(expected.inertia)
    free = kmeans(gaps, 8)  # without a start
    assert free.centroids.isfinite().all()
    assert (free.assignments[~known] == -1).all()
    assert (free.assignments[known] >= 0).all()


def test_too_few_readable_rows():
    rows = table(10, 2)
    rows[3:] = torch.nan
    with pytest.raises(ValueError, match="cannot make 5 clusters of 3 embeddings"):
        kmeans(rows, 5)
    with pytest.raises(ValueError, match="no embeddings"):
        kmeans(torch.full((10, 2), torch.nan), 5)


SCRIPT = """
import numpy as np
from ecos_pl.kmeans import kmeans
from ecos_pl.nearest import assign
from ecos_pl.projection import fit_pca
from ecos_pl.ranks import Ranks
rows = np.load(folder / "rows.npy", mmap_mode="r")
with Ranks.of_processes() as ranks:
    projection = fit_pca(rows, 6, ranks=ranks)
    few = kmeans(rows, 20, seed=1, ranks=ranks, centroid_dtype=torch.float16)
    many = kmeans(rows, 1500, num_iters=2, ranks=ranks)  # many of them run empty
    far = torch.cat([torch.zeros(1, rows.shape[1]), torch.full((4, rows.shape[1]), 1e3)])
    refilled = kmeans(rows, 5, start=far, num_iters=2, ranks=ranks)
    found = {
        "mean": projection.mean, "components": projection.components,
        "variances": projection.variances, "assigned": assign(rows, few.centroids, ranks=ranks),
    }
    for name, one in {"few": few, "many": many, "refilled": refilled}.items():
        found[name] = one.centroids, one.assignments, one.inertia, one.num_iters
    torch.save(found, folder / f"found-{world_size}-{rank}.pt")
"""


def test_one_two_and_four_processes_find_the_same(tmp_path):
    """To the last bit: principal components, centroids, assignments and inertia."""
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((6_000, 16)) @ np.diag(1 / (1 + np.arange(16)))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)
    rows[2500:2510] = np.nan
    rows[4000:5000] = rows[:1000]  # duplicates
    np.save(tmp_path / "rows.npy", rows)
    for world_size in (1, 2, 4):
        run_ranks(SCRIPT, world_size, tmp_path)
    expected = torch.load(tmp_path / "found-1-0.pt")
    for world_size in (2, 4):
        for rank in range(world_size):
            found = torch.load(tmp_path / f"found-{world_size}-{rank}.pt")
            for name, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(found[name], value), name
                    continue
                assert torch.equal(found[name][0], value[0]), name
                assert torch.equal(found[name][1], value[1]), name
                assert found[name][2:] == value[2:], name


PEAK = """
import sys
import numpy as np
from ecos_pl.kmeans import kmeans
from ecos_pl.row_blocks import read_rows
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024
rows = np.load(sys.argv[1], mmap_mode="r")
kmeans(np.asarray(rows[:20_000]), 20, num_iters=2)
before = peak()
read_rows(rows, np.arange(0, len(rows), 1000))  # each brings the pages around it
kmeans(rows, 20, num_iters=2)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read there")
def test_memory_does_not_grow_with_the_rows(tmp_path):
    """300,000 rows more are 154 MB more in the file, and 307 MB in float32.

    What may grow is some 20 bytes of state a row (6 MB), and assignments.
    """
    path = tmp_path / "rows.npy"
    some = np.random.default_rng(0).standard_normal((20_000, 256), np.float32).astype(np.float16)
    peaks = []
    for num_rows in (100_000, 400_000):
        rows = np.lib.format.open_memmap(path, "w+", dtype=np.float16, shape=(num_rows, 256))
        for first in range(0, num_rows, len(some)):
            rows[first : first + len(some)] = some
        rows.flush()
        found = subprocess.run(
            [sys.executable, "-c", PEAK, str(path)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        peaks.append(float(found.stdout))
    assert peaks[1] - peaks[0] < 45, peaks
    assert peaks[1] < 110, peaks


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


def test_empty_clusters_are_refilled_from_any_block(monkeypatch):
    monkeypatch.setattr(kmeans_module, "block_rows", lambda num_clusters, device: 7)
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


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
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
