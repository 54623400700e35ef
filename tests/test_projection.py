import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from ecos_pl.projection import fit_pca, fit_pca_of_chunks


def table(rows, dims, seed=0):
    return torch.randn(rows, dims, generator=torch.Generator().manual_seed(seed))


def skewed(rows=500, dims=12, seed=0):
    """Rows with clearly different variances in turned directions, away from the origin."""
    turn = torch.linalg.qr(table(dims, dims, seed + 1)).Q
    return table(rows, dims, seed) * torch.linspace(3, 0.2, dims) @ turn + 2


@pytest.mark.parametrize("num_dims", [1, 5, 12])
def test_pca_agrees_with_scikit_learn(num_dims):
    rows = skewed()
    found = fit_pca(rows, num_dims)
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
    whole = fit_pca(rows, 4)
    for chunks in (rows.split(7), [rows[:0], rows[:1], rows[1:]], [rows.numpy()[::1]]):
        parts = fit_pca_of_chunks(chunks, 4)
        assert torch.allclose(parts.components, whole.components, atol=1e-4)
        assert torch.allclose(parts.variances, whole.variances, rtol=1e-4)
        assert torch.allclose(parts.mean, whole.mean, atol=1e-5)


def test_pca_leaves_out_rows_of_unreadable_images():
    rows = skewed(200)
    with_gaps = torch.cat([rows[:50], torch.full((3, 12), torch.nan), rows[50:]])
    with_gaps[120, 3:] = torch.nan  # a row that is NaN in part
    rows = torch.cat([rows[:117], rows[118:]])
    found, expected = fit_pca_of_chunks(with_gaps.split(64), 3), fit_pca(rows, 3)
    assert torch.allclose(found.components, expected.components, atol=1e-4)
    assert torch.allclose(found.variances, expected.variances, rtol=1e-4)


@pytest.mark.parametrize("chunks", [[], [torch.empty(0, 3)], [torch.full((4, 3), torch.nan)]])
def test_pca_of_no_row_is_refused(chunks):
    with pytest.raises(ValueError, match="no embeddings"):
        fit_pca_of_chunks(chunks, 2)


def test_pca_keeps_at_most_as_many_dimensions_as_there_are():
    assert fit_pca(table(50, 3), 64).components.shape == (3, 3)
    assert fit_pca(table(4, 10), 64).components.shape == (4, 10)


def test_pca_is_the_same_in_any_order_of_blocks():
    """Sums are of integers: the same bits, so that ranks may add them as they come."""
    parts = [skewed(200, seed=seed) for seed in range(5)]
    found = fit_pca_of_chunks(parts, 3)
    other = fit_pca_of_chunks([parts[0], *parts[:0:-1]], 3)
    assert torch.equal(found.components, other.components)
    assert torch.equal(found.mean, other.mean)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e4])
def test_pca_of_rows_of_any_length(scale):
    rows = skewed(300)
    found, expected = fit_pca(rows * scale, 4), fit_pca(rows, 4)
    assert torch.allclose(found.components, expected.components, atol=1e-4)
    assert torch.allclose(found.variances / scale**2, expected.variances, rtol=1e-3)


def test_pca_refuses_what_it_cannot_add_up():
    with pytest.raises(ValueError, match="very different lengths"):
        fit_pca_of_chunks([table(50, 3), 1e9 * table(50, 3)], 2)
    rows = table(50, 3)
    rows[4, 1] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        fit_pca(rows, 2)


def test_whitening_brings_every_dimension_to_variance_one():
    rows = skewed(2000)
    white = fit_pca(rows, 6).whitened()
    covariance = white(rows).T.cov(correction=0)
    assert torch.allclose(covariance, torch.eye(6), atol=1e-3)
    assert torch.allclose(white.variances, torch.ones(6), atol=1e-5)


def test_whitening_does_not_blow_up_a_dimension_without_signal():
    rows = torch.cat([table(300, 2), torch.zeros(300, 1)], 1)
    white = fit_pca(rows, 3).whitened(floor=1e-3)
    assert white.components.isfinite().all()
    assert white.components[2].norm() <= 1e-3**-0.5 * 1.2


def test_a_rounded_projection_survives_float16():
    rounded = fit_pca(skewed(), 4).rounded()
    assert torch.equal(rounded.components.half().float(), rounded.components)
    assert torch.equal(rounded.mean.half().float(), rounded.mean)
