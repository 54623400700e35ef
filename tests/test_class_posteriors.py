import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from ecos_pl.class_posteriors import class_posteriors


def gaussian_classes(num_images=600, num_dims=6, num_classes=3, spread=2.0, seed=0):
    """Whitened features of a mixture with one covariance, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    means = spread * torch.randn(num_classes, num_dims, generator=generator)
    labels = torch.randint(0, num_classes, (num_images,), generator=generator)
    features = means[labels] + torch.randn(num_images, num_dims, generator=generator)
    features = (features - features.mean(0)).double()
    values, vectors = torch.linalg.eigh(features.T @ features / num_images)
    return (features @ vectors / values.sqrt()).float(), labels


def sums_of(features, labels, num_classes=3):
    sums = torch.zeros(num_classes, features.shape[1]).index_add_(0, labels, features)
    return sums, torch.bincount(labels, minlength=num_classes).float()


def accuracy(posteriors, labels):
    return float((posteriors.argmax(1) == labels).float().mean())


def test_rows_are_probabilities():
    features, labels = gaussian_classes()
    sums, counts = sums_of(features, labels)
    posteriors = class_posteriors(features, sums, counts, sum_noise_std=3.0, count_noise_std=3.0)
    assert posteriors.shape == (600, 3)
    assert torch.allclose(posteriors.sum(1), torch.ones(600), atol=1e-5)
    assert bool((posteriors >= 0).all())


def test_without_noise_it_labels_like_scikit_learns_lda():
    features, labels = gaussian_classes(spread=1.0)
    sums, counts = sums_of(features, labels)
    options = {"sum_noise_std": 1e-3, "count_noise_std": 1e-3, "num_steps": 5}
    ours = class_posteriors(features, sums, counts, **options)
    theirs = LinearDiscriminantAnalysis().fit(features, labels).predict(features)
    assert float((ours.argmax(1) == torch.from_numpy(theirs)).float().mean()) > 0.97


def test_public_images_make_up_for_noise():
    features, labels = gaussian_classes(spread=2.5)
    sums, counts = sums_of(features, labels)
    generator = torch.Generator().manual_seed(1)
    gains = []
    for _ in range(5):
        noisy = sums + 120 * torch.randn(sums.shape, generator=generator)
        options = {"sum_noise_std": 120.0, "count_noise_std": 5.0}
        alone = accuracy(class_posteriors(features, noisy, counts, num_steps=0, **options), labels)
        refined = accuracy(class_posteriors(features, noisy, counts, **options), labels)
        gains.append(refined - alone)
    assert sum(gains) / 5 > 0.02


def test_a_second_step_makes_up_for_more_noise():
    features, labels = gaussian_classes(spread=2.5)
    sums, counts = sums_of(features, labels)
    generator = torch.Generator().manual_seed(1)
    gains = []
    for _ in range(20):
        noisy = sums + 100 * torch.randn(sums.shape, generator=generator)
        options = {"sum_noise_std": 100.0, "count_noise_std": 5.0}
        once, twice = (
            accuracy(class_posteriors(features, noisy, counts, num_steps=n, **options), labels)
            for n in (1, 2)
        )
        gains.append(twice - once)
    assert sum(gains) / 20 > 0  # 0.026 on average, 0.004 the mean's standard deviation


def test_classes_drowned_in_noise_stay_finite():
    features, _ = gaussian_classes()
    sums, counts = torch.zeros(3, 6), torch.tensor([-20.0, 0.0, 1.0])
    posteriors = class_posteriors(features, sums, counts, sum_noise_std=9.0, count_noise_std=30.0)
    assert bool(posteriors.isfinite().all())


def test_class_numbers_carry_no_meaning():
    features, labels = gaussian_classes()
    sums, counts = sums_of(features, labels)
    order = torch.tensor([2, 0, 1])
    options = {"sum_noise_std": 2.0, "count_noise_std": 2.0}
    straight = class_posteriors(features, sums, counts, **options)
    permuted = class_posteriors(features, sums[order], counts[order], **options)
    assert torch.allclose(straight[:, order], permuted, atol=1e-5)


def test_views_are_averaged_and_temper_confidence():
    features, labels = gaussian_classes(spread=1.0)
    sums, counts = sums_of(features, labels)
    options = {"sum_noise_std": 2.0, "count_noise_std": 2.0}
    alone = class_posteriors(features, sums, counts, **options)
    same = features[:, None].expand(-1, 3, -1)
    unchanged = class_posteriors(features, sums, counts, views=same, **options)
    assert torch.allclose(alone, unchanged, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    moved = same + 0.5 * torch.randn(same.shape, generator=generator)
    averaged = class_posteriors(features, sums, counts, views=moved, **options)
    assert torch.allclose(averaged.sum(1), torch.ones(600), atol=1e-5)
    assert float(averaged.max(1).values.mean()) < float(alone.max(1).values.mean())
