import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern

from ecos_pl import count_smoothing
from ecos_pl.count_smoothing import LENGTHS, matern, smooth_counts


def scene(num_clusters=40, dims=3, seed=0):
    """Noisy counts of a client on one side of the plane, centroids, sizes."""
    g = torch.Generator().manual_seed(seed)
    centroids = torch.randn(num_clusters, dims, generator=g)
    sizes = torch.randint(1, 60, (num_clusters,), generator=g)
    counts = torch.where(centroids[:, 0] > 0, 0.5 * sizes, 0).round()
    noise = (4 * torch.randn(num_clusters, generator=g)).round()
    return (counts + noise).long(), centroids, sizes


def spacing(centroids):
    distances = torch.cdist(centroids.double(), centroids.double()).fill_diagonal_(torch.inf)
    return float(distances.min(1).values.median())


def reference(counts, centroids, sizes, noise_std, length_scale, signal_variance):
    """The same regression by scikit-learn: densities at the centroids, each with its own noise."""
    sizes = sizes.double().numpy()
    regressor = GaussianProcessRegressor(
        ConstantKernel(signal_variance) * Matern(length_scale, nu=1.5),
        alpha=(noise_std / sizes) ** 2,
        optimizer=None,
    ).fit(centroids.double().numpy(), counts.double().numpy() / sizes)
    # The counts are the densities times the sizes: their likelihood has the Jacobian's factor.
    return regressor, regressor.log_marginal_likelihood_value_ - np.log(sizes).sum()


@pytest.mark.parametrize("length", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("signal", [0.05, 1.0, 100.0])
def test_posterior_mean_and_evidence_equal_scikit_learn(length, signal):
    counts, centroids, sizes = scene()
    density = smooth_counts(counts, centroids, sizes, 4.0, lengths=(length,), signals=(signal,))
    assert density.length_scale == pytest.approx(length * spacing(centroids))
    regressor, evidence = reference(
        counts, centroids, sizes, 4.0, density.length_scale, density.signal_variance
    )
    elsewhere = torch.randn(50, 3, generator=torch.Generator().manual_seed(5))
    for rows in (centroids, elsewhere):
        expected = regressor.predict(rows.double().numpy())
        assert np.allclose(density(rows).numpy(), expected, atol=1e-6)
    assert density.log_evidence == pytest.approx(evidence, abs=1e-5)


def test_signals_are_in_noise_variances_of_a_count():
    counts, centroids, sizes = scene()
    density = smooth_counts(counts, centroids, sizes, 4.0, signals=(9.0,))
    mean_variance = density.signal_variance * float(sizes.double().square().mean())
    assert mean_variance == pytest.approx(9 * 16, rel=1e-6)


def test_the_grid_point_of_the_largest_evidence_wins():
    counts, centroids, sizes = scene()
    signals = (0.01, 1.0, 10.0)
    found = smooth_counts(counts, centroids, sizes, 4.0, signals=signals)
    tried = [
        smooth_counts(counts, centroids, sizes, 4.0, lengths=(length,), signals=(signal,))
        for length in LENGTHS
        for signal in signals
    ]
    best = max(tried, key=lambda density: density.log_evidence)
    assert found.log_evidence == pytest.approx(best.log_evidence)
    assert found.length_scale == best.length_scale
    assert found.signal_variance == pytest.approx(best.signal_variance)


def test_counts_without_noise_come_back():
    _, centroids, sizes = scene()
    counts = torch.arange(40) * 3
    found = smooth_counts(counts, centroids, sizes, 0.0)(centroids) * sizes
    assert (found - counts).abs().max() < 0.5  # whole numbers: what rounding may hide


def test_a_constant_field_is_kept():
    """Long length scales only: a process of mean zero then still reaches the level."""
    _, centroids, sizes = scene(200)
    found = smooth_counts(3 * sizes, centroids, sizes, 5.0)(centroids)
    assert float(((found - 3) * sizes).abs().max()) < 5  # the noise of one count
    assert float((found * sizes).sum()) == pytest.approx(float(3 * sizes.sum()), rel=0.02)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_order_of_the_clusters_does_not_matter(seed):
    counts, centroids, sizes = scene(seed=seed)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    one = smooth_counts(counts, centroids, sizes, 4.0)
    other = smooth_counts(counts[order], centroids[order], sizes[order], 4.0)
    assert torch.allclose(one(centroids), other(centroids), atol=1e-7)


@settings(max_examples=10, deadline=None)
@given(factor=st.floats(0.5, 1000), seed=st.integers(0, 1000))
def test_counts_and_noise_in_another_unit(factor, seed):
    counts, centroids, sizes = scene(seed=seed)
    one = smooth_counts(counts, centroids, sizes, 4.0)(centroids)
    other = smooth_counts(counts * factor, centroids, sizes, 4.0 * factor)(centroids)
    assert torch.allclose(other, one * factor, rtol=1e-6, atol=1e-6 * factor)


def test_moved_turned_and_stretched_embeddings():
    counts, centroids, sizes = scene()
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator)).Q
    moved = 7 * centroids.double() @ turn + 2
    one = smooth_counts(counts, centroids, sizes, 4.0)(centroids)
    assert torch.allclose(smooth_counts(counts, moved, sizes, 4.0)(moved), one, atol=1e-6)


def test_smoothing_beats_the_raw_counts():
    """Mean squared error in 5 draws of the noise, against the truth."""
    generator = torch.Generator().manual_seed(0)
    centroids = torch.rand(200, 2, generator=generator)
    sizes = torch.full((200,), 50)
    truth = 6 * torch.exp(-10 * (centroids - 0.3).square().sum(1)).double()
    errors = []
    for _ in range(5):
        noisy = truth + 4 * torch.randn(200, generator=generator)
        found = smooth_counts(noisy, centroids, sizes, 4.0)(centroids) * sizes
        errors.append(float((found - truth).square().mean()))
    # Raw counts: 16. A bump of so many clusters leaves room for far less.
    assert max(errors) < 4


def test_more_clusters_than_inducing_points(monkeypatch):
    counts, centroids, sizes = scene()
    monkeypatch.setattr(count_smoothing, "MAX_INDUCING", 15)
    density = smooth_counts(counts, centroids, sizes, 4.0, lengths=(2.0,), signals=(1.0,))
    assert density.points.shape == (15, 3)
    assert len(density.points.unique(dim=0)) == 15

    def kernel(a, b):
        return matern(torch.cdist(a, b), density.length_scale)

    # Subset of regressors (Rasmussen and Williams 2006, eq. 8.14), written out.
    centers, points = centroids.double(), density.points
    wide = sizes[:, None] * kernel(centers, points)
    inner = wide.T @ wide + 16 / density.signal_variance * kernel(points, points)
    expected = kernel(centers, points) @ torch.linalg.solve(inner, wide.T @ counts.double())
    assert torch.allclose(density(centroids), expected, atol=1e-5)
    covariance = density.signal_variance * wide @ torch.linalg.solve(kernel(points, points), wide.T)
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(40).double(), covariance + 16 * torch.eye(40)
    )
    assert density.log_evidence == pytest.approx(float(normal.log_prob(counts.double())), abs=1e-4)


def test_inducing_points_are_spread_out(monkeypatch):
    """Farthest first: none of the 15 may lie nearer to another than any centroid to all 15."""
    counts, centroids, sizes = scene(300)
    monkeypatch.setattr(count_smoothing, "MAX_INDUCING", 15)
    points = smooth_counts(counts, centroids, sizes, 4.0).points
    uncovered = torch.cdist(centroids.double(), points).min(1).values.max()
    assert spacing(points) >= uncovered
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    again = smooth_counts(counts[order], centroids[order], sizes[order], 4.0).points
    assert torch.equal(points, again)


@pytest.mark.parametrize(
    ("counts", "centroids", "sizes"),
    [
        (torch.tensor([7]), torch.zeros(1, 2), torch.tensor([30])),
        (torch.tensor([7, 3, -2]), torch.zeros(3, 2), torch.tensor([30, 1, 1])),  # duplicates
        (torch.zeros(40), scene()[1], scene()[2]),
        (torch.full((40,), -9), scene()[1], scene()[2]),
        (scene()[0], scene()[1], torch.tensor([0] * 39 + [5])),  # clusters without an image
    ],
    ids=["one", "duplicates", "zeros", "negative", "empty"],
)
@pytest.mark.parametrize("noise_std", [0.0, 5.0, 1e6])
def test_degenerate_input_gives_finite_densities(counts, centroids, sizes, noise_std):
    density = smooth_counts(counts, centroids, sizes, noise_std)
    assert density(centroids).isfinite().all()
    far = density(torch.full((1, centroids.shape[1]), 1e3))
    assert abs(float(far)) < 1e-6


@pytest.mark.parametrize("max_inducing", [1024, 15])
def test_the_number_of_clusters_in_memory_does_not_matter(monkeypatch, max_inducing):
    monkeypatch.setattr(count_smoothing, "MAX_INDUCING", max_inducing)
    counts, centroids, sizes = scene(100)
    expected = smooth_counts(counts, centroids, sizes, 4.0)
    monkeypatch.setattr(count_smoothing, "CHUNK_ROWS", 7)
    found = smooth_counts(counts, centroids, sizes, 4.0)
    assert found.log_evidence == pytest.approx(expected.log_evidence)
    assert torch.allclose(found(centroids), expected(centroids), atol=1e-8)


def test_single_precision_is_near_enough():
    """Far from the origin, too."""
    counts, centroids, sizes = scene(200)
    centroids = centroids + 30
    density = smooth_counts(counts, centroids, sizes, 4.0)
    rows = centroids + 0.3 * torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    expected, found = density(rows), density.to("cpu", torch.float32)(rows)
    assert (expected.dtype, found.dtype) == (torch.float64, torch.float32)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_arguments_are_not_changed_and_the_result_repeats():
    arguments = scene()
    copies = [a.clone() for a in arguments]
    one = smooth_counts(*arguments, 4.0)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))
    assert torch.equal(one.coefficients, smooth_counts(*copies, 4.0).coefficients)


def test_mistakes_are_refused():
    counts, centroids, sizes = scene()
    with pytest.raises(ValueError, match="one row per cluster"):
        smooth_counts(counts[1:], centroids, sizes, 4.0)
    with pytest.raises(ValueError, match="no cluster holds a pool image"):
        smooth_counts(counts, centroids, torch.zeros(40), 4.0)
