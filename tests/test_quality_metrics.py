"""Each metric against a closed form, an independent library, plain loops, and itself in parts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn.functional import normalize

from ecos_pl.near_duplicates import DistinctRows
from ecos_pl.quality import distances
from ecos_pl.quality.composition import ClassCoverage, NormalizedEntropy, Share
from ecos_pl.quality.distances import distance_blocks, nearest_distances
from ecos_pl.quality.kernel_distance import KernelDistance, squared_mmd
from ecos_pl.quality.manifold import Manifold, neighbor_distances
from ecos_pl.quality.near_duplicate_rate import NearDuplicateRate
from ecos_pl.quality.objective import NearestDistance
from tests.rank_processes import run_ranks


def rows(number: int, seed: int, num_dims: int = 12, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(number, num_dims, generator=generator) + shift)


@pytest.fixture(params=[2**22, 64])
def _block_values(request, monkeypatch):
    """All at once, and in blocks of a point or two."""
    monkeypatch.setattr(distances, "BLOCK_VALUES", request.param)


# --- composition -----------------------------------------------------------------------------


def test_class_entropy_is_that_of_scipy():
    numbers = torch.tensor([0, 0, 0, 1, 1, 4, -1, -1])
    metric = NormalizedEntropy(5)
    for part in numbers.split(3):
        metric.update(part)
    assert float(metric.compute()) == pytest.approx(entropy([3, 2, 0, 0, 1]) / math.log(5))


@pytest.mark.parametrize(
    ("numbers", "expected"), [([0, 1, 2, 3], 1.0), ([2, 2, 2], 0.0), ([-1], math.nan)]
)
def test_class_entropy_at_its_ends(numbers, expected):
    metric = NormalizedEntropy(4)
    metric.update(torch.tensor(numbers))
    assert float(metric.compute()) == pytest.approx(expected, nan_ok=True)


def test_one_class_is_as_even_as_it_can_be():
    metric = NormalizedEntropy(1)
    metric.update(torch.tensor([0, 0]))
    assert float(metric.compute()) == 1


@pytest.mark.parametrize(("min_images", "expected"), [(1, 0.75), (2, 0.5), (3, 0.25), (4, 0.0)])
def test_classes_are_covered_from_so_many_images_on(min_images, expected):
    metric = ClassCoverage(4, min_images)
    for part in (torch.tensor([0, 1, 3, -1]), torch.tensor([3, 3, 1])):
        metric.update(part)
    assert float(metric.compute()) == expected


def test_the_share_of_no_images_is_not_a_number():
    share = Share()
    share.update(torch.zeros(0, dtype=torch.bool))
    assert math.isnan(share.compute())


@pytest.mark.parametrize("kind", [ClassCoverage, NormalizedEntropy])
def test_no_classes_are_refused(kind):
    with pytest.raises(ValueError, match="at least 1"):
        kind(0)


# --- distances and the objective -------------------------------------------------------------


@pytest.mark.usefixtures("_block_values")
def test_nearest_distances_are_those_of_scipy():
    points, centers = rows(40, 1), rows(30, 2)
    expected = cdist(points.double(), centers.double())
    found = torch.cat([block for _, block in distance_blocks(points, centers)])
    assert torch.allclose(found.double(), torch.from_numpy(expected), atol=1e-6)
    nearest = nearest_distances(points, centers)
    assert torch.allclose(nearest.double(), torch.from_numpy(expected.min(axis=1)), atol=1e-6)


def test_a_center_is_at_distance_zero_of_itself():
    points = rows(50, 3, num_dims=1280)
    assert nearest_distances(points, points.flip(0)).max() == 0
    others = nearest_distances(
        points, points, point_ids=torch.arange(50), center_ids=torch.arange(50)
    )
    assert others.min() > 1


def test_no_center_is_infinitely_far():
    assert nearest_distances(rows(2, 1), rows(2, 1)[:0]).tolist() == [math.inf, math.inf]


def test_proximity_and_radius_follow_from_their_definition():
    """Δ and H of the paper's Eq. 1, by loops."""
    chosen, client, pool = rows(20, 1), rows(15, 2), rows(60, 3)

    def gap(one: Tensor, many: Tensor) -> float:
        return min(math.dist(one.tolist(), other.tolist()) for other in many)

    proximity, radius = NearestDistance(client), NearestDistance(pool)
    for part in chosen.split(7):
        proximity.update(part)
        radius.update(part)
    delta = sum(gap(one, chosen) for one in client) / len(client)
    assert float(proximity.compute()["mean"]) == pytest.approx(delta, abs=1e-6)
    alone = max(gap(one, chosen) for one in pool)
    assert float(radius.compute()["max"]) == pytest.approx(alone, abs=1e-6)
    radius.update(client)
    joint = max(gap(one, torch.cat([chosen, client])) for one in pool)
    assert float(radius.compute()["max"]) == pytest.approx(joint, abs=1e-6)
    assert joint <= alone


def test_what_covers_the_pool_has_radius_zero():
    pool = rows(60, 3)
    radius = NearestDistance(pool)
    radius.update(pool)
    assert {name: float(value) for name, value in radius.compute().items()} == {"mean": 0, "max": 0}
    radius.reset()
    assert radius.distances.min() == math.inf


# --- kernel distance -------------------------------------------------------------------------


def by_definition(left: Tensor, right: Tensor) -> float:
    """Gretton et al. 2012, Eq. 3, with the kernel of scikit-learn."""
    x, y = left.double().numpy(), right.double().numpy()
    kernel = {"degree": 3, "gamma": 1, "coef0": 1}
    kxx, kyy = polynomial_kernel(x, x, **kernel), polynomial_kernel(y, y, **kernel)
    n, m = len(x), len(y)
    within = (kxx.sum() - np.trace(kxx)) / (n * (n - 1)) + (kyy.sum() - np.trace(kyy)) / (
        m * (m - 1)
    )
    return float(within - 2 * polynomial_kernel(x, y, **kernel).mean())


@pytest.mark.usefixtures("_block_values")
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_kernel_distance_follows_from_its_definition(shift):
    chosen, client = rows(30, 1, shift=shift), rows(21, 2)
    metric = KernelDistance()
    for part in chosen.split(8):
        metric.update(part, client=False)
    metric.update(client, client=True)
    assert float(metric.compute()) == pytest.approx(by_definition(chosen, client), abs=1e-5)
    assert float(squared_mmd(client, chosen)) == pytest.approx(float(metric.compute()), abs=1e-6)


def test_it_is_the_kernel_inception_distance_of_vectors_of_length_root_d():
    kid = pytest.importorskip("torchmetrics.image.kid")
    left, right = rows(25, 1, shift=0.2), rows(25, 2)
    scale = math.sqrt(left.shape[1])
    expected = float(kid.poly_mmd(scale * left, scale * right))
    assert float(squared_mmd(left, right)) == pytest.approx(expected, abs=1e-5)


def test_alike_sets_are_at_distance_zero_on_average():
    """Unbiased also in parts; the sets come sorted, which shuffling must undo."""
    estimates = []
    for seed in range(40):
        metric = KernelDistance(block_images=20, seed=seed)
        for client in (False, True):
            some = rows(60 + 30 * client, 2 * seed + client)
            metric.update(some[some[:, 0].argsort(descending=client)], client=client)
        estimates.append(float(metric.compute()))
    mean, error = np.mean(estimates), np.std(estimates) / math.sqrt(len(estimates))
    assert abs(mean) < 4 * error
    assert min(estimates) < 0


def test_parts_give_about_what_the_whole_gives():
    chosen, client = rows(300, 1, shift=0.3), rows(200, 2)
    metric = KernelDistance(block_images=100)
    metric.update(chosen, client=False)
    metric.update(client, client=True)
    found = []
    for metric.seed in range(20):
        metric._computed = None  # torchmetrics keeps what it has computed
        found.append(float(metric.compute()))
    assert len(set(found)) == 20
    assert np.mean(found) == pytest.approx(by_definition(chosen, client), rel=0.05)


def test_a_lone_image_has_no_kernel_distance():
    metric = KernelDistance()
    metric.update(rows(1, 1), client=False)
    metric.update(rows(9, 1), client=True)
    with pytest.raises(ValueError, match="two images"):
        metric.compute()


# --- manifold --------------------------------------------------------------------------------


def manifold_by_loops(chosen: Tensor, client: Tensor, k: int) -> dict[str, float]:
    def radii(some: Tensor) -> list[float]:
        found, _ = NearestNeighbors(n_neighbors=k + 1).fit(some).kneighbors(some)
        return list(found[:, k])

    between = cdist(client, chosen)
    of_client, of_chosen = radii(client), radii(chosen)
    n, m = between.shape
    inside = [[between[i][j] <= of_client[i] for j in range(m)] for i in range(n)]
    return {
        "precision": sum(any(inside[i][j] for i in range(n)) for j in range(m)) / m,
        "recall": sum(any(between[i][j] <= of_chosen[j] for j in range(m)) for i in range(n)) / n,
        "density": sum(map(sum, inside)) / (k * m),
        "coverage": sum(map(any, inside)) / n,
    }


@pytest.mark.usefixtures("_block_values")
@pytest.mark.parametrize(("k", "shift"), [(1, 0.1), (3, 0.0), (5, 0.4)])
def test_manifold_follows_from_its_definition(k, shift):
    chosen, client = rows(45, 1, 4, shift), rows(33, 2, 4)
    metric = Manifold(k)
    for part in chosen.split(20):
        metric.update(part, client=False)
    metric.update(client, client=True)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(manifold_by_loops(chosen, client, k), abs=1e-6)


def test_a_set_lies_in_its_own_manifold():
    """Precision, recall and coverage 1; density (k + 1) / k on average: each ball, its center."""
    some = rows(40, 1, 5)
    metric = Manifold(4)
    metric.update(some, client=False)
    metric.update(some, client=True)
    found = metric.compute()
    assert [float(found[name]) for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert float(found["density"]) == pytest.approx(5 / 4, abs=0.13)


def test_sets_far_apart_have_nothing_in_common():
    metric = Manifold(3)
    metric.update(rows(20, 1) + 10, client=False)
    metric.update(rows(20, 2), client=True)
    assert {float(value) for value in metric.compute().values()} == {0}


def test_neighbors_of_too_few_images():
    with pytest.raises(ValueError, match="5 images do not have 5 neighbours"):
        neighbor_distances(rows(5, 1), 5)
    with pytest.raises(ValueError, match="num_neighbors"):
        Manifold(0)


# --- near-duplicates -------------------------------------------------------------------------


def near_copies() -> Tensor:
    """40 images, of which 6 come again a little changed, one of them twice."""
    some = rows(40, 1, 64)
    changed = normalize(some[[0, 1, 2, 3, 4, 5, 5]] + 0.005 * rows(7, 2, 64))
    return torch.cat([some, changed])


def rate_of(some: Tensor, distance: float, asked: Tensor | None = None) -> float:
    ids = torch.arange(len(some))
    asked = ids if asked is None else asked
    metric = NearDuplicateRate(some[asked], asked, distance)
    for part in ids.split(10):
        metric.update(some[part], part)
    return float(metric.compute())


def test_near_duplicates_are_counted_on_both_sides():
    assert rate_of(near_copies(), 0.12) == pytest.approx(13 / 47)
    expected = cdist(near_copies(), near_copies())
    np.fill_diagonal(expected, np.inf)
    for distance in (0.004, 1.0, 1.3):
        rate = (expected.min(axis=1) <= distance).mean()
        assert rate_of(near_copies(), distance) == pytest.approx(rate)


def test_of_some_images_the_share_among_all():
    assert rate_of(near_copies(), 0.12, torch.arange(0, 10)) == pytest.approx(0.6)


def test_what_selection_leaves_has_none():
    some = near_copies()
    kept = DistinctRows(some, None, 0.12)(np.arange(len(some)))
    assert kept.sum() == 40
    assert rate_of(some[torch.from_numpy(kept)], 0.12) == 0


def test_exact_copies_count_at_any_distance():
    some = rows(4, 1)
    assert rate_of(torch.cat([some, some[:1]]), 1e-9) == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="must be positive"):
        NearDuplicateRate(some, torch.arange(4), 0)


# --- several processes -----------------------------------------------------------------------

SHARED = """
from ecos_pl.quality.composition import ClassCoverage, NormalizedEntropy, Share
from ecos_pl.quality.kernel_distance import KernelDistance
from ecos_pl.quality.manifold import Manifold
from ecos_pl.quality.near_duplicate_rate import NearDuplicateRate
from ecos_pl.quality.objective import NearestDistance
generator = torch.Generator().manual_seed(0)
chosen = torch.randn(24, 6, generator=generator)
client = torch.randn(20, 6, generator=generator)
numbers, ids = torch.arange(24) % 3, torch.arange(24)
metrics = [Share(), ClassCoverage(4, 7), NormalizedEntropy(4), NearestDistance(client)]
metrics += [NearDuplicateRate(chosen, ids, 0.9), KernelDistance(), Manifold(3)]
mine = slice(rank, None, world_size)
metrics[0].update(numbers[mine] == 1)
metrics[1].update(numbers[mine])
metrics[2].update(numbers[mine])
metrics[3].update(chosen[mine])
metrics[4].update(chosen[mine], ids[mine])
for metric in metrics[5:]:
    metric.update(chosen[mine], client=False)
    metric.update(client[mine], client=True)
for metric in metrics:
    found = metric.compute()
    values = found.values() if isinstance(found, dict) else [found]
    print(" ".join(f"{float(value):.5f}" for value in values))
"""


@pytest.mark.slow
def test_processes_together_find_what_one_finds(tmp_path: Path):
    [alone] = run_ranks(SHARED, 1, tmp_path)
    assert run_ranks(SHARED, 2, tmp_path) == [alone, alone]
    assert len(alone.splitlines()) == 7
