"""The bounded sample of a pool: what is in it, and that a large pool costs no more."""

import numpy as np
import pytest
import torch

from ecos_pl.pool_sample import PoolSample, sample_pool


def pool(size: int, num_clusters: int = 7) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    rng = np.random.default_rng(0)
    assignments = rng.integers(0, num_clusters, size).astype(np.int32)
    assignments[::10] = -1  # unreadable
    points = rng.standard_normal((size, 3)).astype(np.float16)
    points[::10] = np.nan
    return assignments, points, torch.randn(num_clusters, 3)


@pytest.mark.parametrize(("size", "num_others"), [(300, 40), (5000, 40), (300, 1000)])
def test_a_sample_holds_chosen_and_other_readable_images(size: int, num_others: int) -> None:
    assignments, points, centroids = pool(size)
    chosen = torch.tensor([row for row in range(0, size, 3) if row % 10])
    limits = {"seed": 1, "num_others": num_others, "num_chosen": 30}
    sample = sample_pool(assignments, points, centroids, chosen, **limits)
    assert torch.equal(sample.rows, sample.rows.unique())  # ascending, each once
    shown = torch.isin(sample.rows, chosen)
    assert int(shown.sum()) == 30
    readable = int((assignments >= 0).sum())
    assert int((~shown).sum()) == min(num_others, readable - len(chosen))
    places = sample.rows.numpy()
    assert (sample.clusters.numpy() == assignments[places]).all()
    assert sample.clusters.min() >= 0
    assert np.array_equal(sample.points.numpy(), points[places])
    away = points[places].astype(np.float32) - centroids[sample.clusters].numpy()
    assert np.allclose(sample.distances.numpy(), np.linalg.norm(away, axis=1), atol=1e-5)
    again = sample_pool(assignments, points, centroids, chosen, **limits)
    assert torch.equal(again.rows, sample.rows)


def test_others_are_drawn_uniformly() -> None:
    assignments, points, centroids = pool(4000)
    sample = sample_pool(
        assignments, points, centroids, torch.tensor([1]), seed=3, num_others=400, num_chosen=1
    )
    assert abs(float(sample.rows.float().mean()) / 4000 - 0.5) < 0.05


def test_it_survives_among_other_tensors() -> None:
    assignments, points, centroids = pool(50)
    sample = sample_pool(assignments, points, centroids, torch.tensor([1, 2]), seed=1)
    tensors = {"other": torch.zeros(2), **sample.tensors()}
    found = PoolSample.from_tensors(tensors)
    assert found is not None
    assert all(torch.equal(one, vars(sample)[name]) for name, one in vars(found).items())
    assert PoolSample.from_tensors({"other": torch.zeros(2)}) is None
