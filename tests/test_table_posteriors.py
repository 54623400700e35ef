import math

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel

from ecos_pl.kmeans import kmeans
from ecos_pl.nearest import assign
from ecos_pl.table_posteriors import _densities, discriminant_posteriors, table_posteriors

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], dtype=torch.float64)


def mixture(num, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=generator)
    noise = torch.randn(num, 2, generator=generator, dtype=torch.float64)
    return (MEANS[labels] + noise).float(), labels


def bayes(features):
    """The mixture's true class probabilities."""
    return (-0.5 * torch.cdist(features.double(), MEANS).square()).softmax(1)


def table_of(features, labels, centroids, num_classes=3):
    flat = assign(features, centroids) * num_classes + labels
    return torch.bincount(flat, minlength=len(centroids) * num_classes).view(-1, num_classes)


@pytest.fixture(scope="module")
def scene():
    """Proxies, their clusters, and the exact table of 1,000 client samples."""
    features, labels = mixture(1500, 0)
    clusters = kmeans(features, 50, seed=0)
    table = table_of(*mixture(1000, 1), clusters.centroids)
    return features, labels, clusters.centroids, clusters.assignments, table


def noisy(table, noise_std, generator):
    return (table + noise_std * torch.randn(table.shape, generator=generator)).round().long()


@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("noise_std", [0.5, 5.0, 1e4])
def test_rows_are_probabilities(scene, noise_std, num_steps):
    features, _, centroids, assignments, table = scene
    released = noisy(table, noise_std, torch.Generator().manual_seed(0))
    posteriors = table_posteriors(
        features, centroids, assignments, released, noise_std=noise_std, num_steps=num_steps
    )
    assert posteriors.shape == (1500, 3)
    assert posteriors.dtype == torch.float32
    assert torch.allclose(posteriors.sum(1), torch.ones(1500), atol=1e-5)
    assert bool((posteriors >= 0).all())


@pytest.mark.parametrize("num_steps", [0, 1])
def test_without_noise_it_follows_bayes_rule(scene, num_steps):
    features, _, centroids, assignments, _ = scene
    table = table_of(*mixture(100_000, 1), centroids)
    posteriors = table_posteriors(
        features, centroids, assignments, table, noise_std=1.0, num_steps=num_steps
    )
    truth = bayes(features)
    assert (posteriors - truth).abs().mean() < 0.08
    clear = truth.max(1).values > 0.8
    assert bool((posteriors.argmax(1) == truth.argmax(1))[clear].double().mean() > 0.99)


def test_less_noise_is_better_and_smoothing_beats_the_raw_table(scene):
    features, labels, centroids, assignments, table = scene
    generator = torch.Generator().manual_seed(0)
    accuracy, raw, confidence = [], [], []
    for noise_std in (1.0, 8.0, 30.0, 1000.0):
        right, right_raw, sure = 0.0, 0.0, 0.0
        for _ in range(3):
            released = noisy(table, noise_std, generator)
            posteriors = table_posteriors(
                features, centroids, assignments, released, noise_std=noise_std
            )
            right += float((posteriors.argmax(1) == labels).double().mean()) / 3
            right_raw += float((released.argmax(1)[assignments] == labels).double().mean()) / 3
            sure += float(posteriors.max(1).values.mean()) / 3
        accuracy.append(right)
        raw.append(right_raw)
        confidence.append(sure)
    assert sorted(accuracy, reverse=True) == accuracy
    best = float((bayes(features).argmax(1) == labels).double().mean())
    assert accuracy[0] > best - 0.03
    assert accuracy[1] > raw[1] + 0.1
    assert accuracy[2] > raw[2] + 0.1
    assert confidence[0] > 0.7
    assert confidence[-1] < 0.5  # nothing was learned, and that is what it says


def test_smoothing_is_gaussian_process_regression(scene):
    """Mean and spread at the chosen width and height, against scikit-learn's."""
    features, _, centroids, _, table = scene
    released = noisy(table, 8.0, torch.Generator().manual_seed(0)).double()
    points, centers = features[:40].double(), centroids.double()
    mean, std = _densities(points, centers, torch.ones(50, dtype=torch.float64), released, 8.0)
    own = torch.cdist(centers, centers) + torch.diag(torch.full((50,), torch.inf))
    unit = float(own.min(1).values.median())
    signal = float(released.square().mean()) - 64
    likelihoods, matched = [], []
    for width in (0.5, 0.7, 1.0, 1.4, 2.0, 2.8):
        for power in range(-8, 7):
            kernel = ConstantKernel(signal * 2.0**power) * RBF(width * unit)
            reference = GaussianProcessRegressor(kernel, alpha=64.0, optimizer=None)
            reference.fit(centers.numpy(), released.numpy())
            likelihoods.append(reference.log_marginal_likelihood_value_)
            theirs, spread = reference.predict(points.numpy(), return_std=True)
            matched.append(
                torch.allclose(mean, torch.from_numpy(theirs), rtol=1e-5, atol=1e-5)
                and torch.allclose(std, torch.from_numpy(spread[:, :1]), rtol=1e-4)
            )
    assert matched[likelihoods.index(max(likelihoods))]


def test_negative_tables_and_empty_clusters():
    features, _ = mixture(300, 0)
    far = torch.tensor([[50.0, 50.0], [60.0, 50.0]])  # clusters without any image
    centroids = torch.cat([kmeans(features, 10, seed=0).centroids, far])
    assignments = assign(features, centroids)
    for value in (-1000, 0, 10**6):
        for num_steps in (0, 2):
            posteriors = table_posteriors(
                features,
                centroids,
                assignments,
                torch.full((12, 3), value),
                noise_std=5.0,
                num_steps=num_steps,
            )
            assert torch.allclose(posteriors, torch.full((300, 3), 1 / 3), atol=1e-4)


def test_degenerate_shapes():
    for num_centroids in (1, 2):
        centroids = torch.zeros(num_centroids, 3)  # the same place
        posteriors = table_posteriors(
            torch.zeros(4, 3),
            centroids,
            torch.zeros(4, dtype=torch.int64),
            torch.tensor([[90, 10]] * num_centroids),
            noise_std=1.0,
        )
        assert bool((posteriors[:, 0] > 0.6).all())
        assert not bool(posteriors.isnan().any())


def test_classes_keep_their_columns(scene):
    features, _, centroids, assignments, table = scene
    order = torch.tensor([2, 0, 1])
    arguments = {"noise_std": 3.0}
    plain = table_posteriors(features, centroids, assignments, table, **arguments)
    moved = table_posteriors(features, centroids, assignments, table[:, order], **arguments)
    assert torch.allclose(moved, plain[:, order], atol=1e-5)


def test_discriminant_labels_like_scikit_learns():
    features, labels = mixture(2000, 3)
    hard = torch.nn.functional.one_hot(labels, 3).double()
    ours = discriminant_posteriors(features, hard, num_steps=1)
    theirs = LinearDiscriminantAnalysis().fit(features, labels).predict(features)
    assert float((ours.argmax(1) == torch.from_numpy(theirs)).double().mean()) > 0.98
    assert torch.equal(discriminant_posteriors(features, hard, num_steps=0), hard.float())


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_bad_noise_refused(scene, bad):
    features, _, centroids, assignments, table = scene
    with pytest.raises(ValueError, match="noise_std"):
        table_posteriors(features, centroids, assignments, table, noise_std=bad)


def test_table_of_another_shape_refused(scene):
    features, _, centroids, assignments, table = scene
    for bad in (table[1:], table[:, 0]):
        with pytest.raises(ValueError, match="noisy_table"):
            table_posteriors(features, centroids, assignments, bad, noise_std=1.0)
