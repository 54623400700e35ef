import numpy as np
import pytest
import torch

from ecos_pl.invariance import fit_invariant_projection, random_view


def planted(num_images=800, num_dims=12, seed=0):
    """Embeddings whose first 2 dimensions differ between images only, the next 3 by view too."""
    rng = np.random.default_rng(seed)
    scale = np.r_[np.full(2, 1.0), np.full(3, 4.0), np.full(num_dims - 5, 0.3)]
    noise = np.r_[np.full(2, 0.05), np.full(3, 3.5), np.full(num_dims - 5, 0.25)]
    images = rng.normal(size=(num_images, num_dims)) * scale
    views = images[:, None] + rng.normal(size=(num_images, 4, num_dims)) * noise
    return images.astype(np.float32), views.astype(np.float32)


def test_it_finds_the_directions_that_views_do_not_change():
    images, views = planted()
    projection = fit_invariant_projection(lambda: [images[:300], images[300:]], [views], 2)
    share = projection.components[:, :2].norm() / projection.components.norm()
    assert float(share) > 0.98
    # Principal components alone would take the three noisy ones.
    assert np.argsort(-images.var(0))[:2].min() >= 2


def test_directions_have_variance_one_and_are_uncorrelated():
    images, views = planted()
    projection = fit_invariant_projection(lambda: [images], [views[:400], views[400:]], 4)
    projected = projection(torch.from_numpy(images))
    covariance = torch.cov(projected.T)
    assert torch.allclose(covariance, torch.eye(4), atol=0.02)
    assert torch.allclose(projected.mean(0), torch.zeros(4), atol=1e-4)


def test_it_is_the_generalised_eigenproblem_of_scipy():
    from scipy.linalg import eigh

    images, views = planted(num_images=300)
    ours = fit_invariant_projection(lambda: [images], [views], 3).components.double().numpy()
    total = np.cov(images.T, bias=True)
    deviations = (views - views.mean(1, keepdims=True)).reshape(-1, 12)
    within = deviations.T @ deviations / (300 * 3)
    within += 0.1 * np.trace(within) / 12 * np.eye(12)
    vectors = eigh(total, within)[1][:, ::-1][:, :3].T
    for one, other in zip(ours, vectors, strict=True):
        cosine = abs(one @ other) / np.linalg.norm(one) / np.linalg.norm(other)
        assert cosine == pytest.approx(1, abs=1e-3)


def test_no_views_is_an_error():
    images, _ = planted(num_images=20)
    with pytest.raises(ValueError, match="no views"):
        fit_invariant_projection(lambda: [images], [], 2)


def test_a_view_is_like_its_image_and_depends_on_its_generator_alone():
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, 10:22, 10:22] = 200
    state = torch.get_rng_state()
    one = random_view(image, torch.Generator().manual_seed(3))
    same = random_view(image, torch.Generator().manual_seed(3))
    other = random_view(image, torch.Generator().manual_seed(4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == image.shape
    assert one.dtype == torch.uint8
    assert torch.equal(state, torch.get_rng_state())
    mass = one.float().sum() / image.float().sum()
    assert 0.5 < float(mass) < 1.6  # 20% of the side is 44% of the area
    assert int(one[:, 0, 0].max()) == 0  # corners take the border's colour
