"""Class probabilities of public images from the client's noisy class sums.

Shapes: n images, d dimensions of the whitened space, K classes.

The model is a Gaussian mixture with one covariance for all classes (linear discriminant
analysis), of which two things are observed: the public features, unlabelled, and the noisy class
means. An EM step combines them. Where random views of the images are given, an image's
probabilities are the mean over its views. All this costs no privacy: nothing but the release is
used.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_STEPS = 2
"""EM steps. The release is right about the classes, the mixture is only roughly the truth: with
each step the images' own gaps count for more and the noise for less. On mixed_digits at a noise
multiplier of 4, accuracy rises 0.946 → 0.956 with the second step and 0.959 with the third; where
few of the images are the client's, the third makes it worse (0.916 → 0.900)."""

_COVARIANCE_SHRINKAGE = 0.1  # towards a multiple of the identity: d(d+1)/2 entries from n images


def class_posteriors(
    features: Tensor,
    class_sums: Tensor,
    class_counts: Tensor,
    *,
    sum_noise_std: float,
    count_noise_std: float,
    views: Tensor | None = None,
    num_steps: int = NUM_STEPS,
) -> Tensor:
    """Class probabilities [n, K] float32, rows summing to one.

    Args:
        features: [n, d], whitened on these images (mean 0, covariance I).
        class_sums: [K, d], noisy sums of the client's clipped features.
        class_counts: [K], noisy numbers of the client's images; may be negative.
        sum_noise_std: Noise on each entry of ``class_sums``.
        count_noise_std: Noise on each entry of ``class_counts``.
        views: [n, V, d], features of V random views of each image. Averaged over them,
            probabilities are hardly more often right but no longer overconfident (on mixed_digits
            at a noise multiplier of 4: accuracy 0.957 → 0.959, mean confidence 0.985 → 0.957).
        num_steps: EM steps; 0 gives the discriminant of the shrunken noisy means alone.
    """
    features, sums = features.double(), class_sums.double()
    num_images, num_dims = features.shape
    # A class drowned in its noise keeps a small count: its mean is then shrunk to nothing below.
    counts = class_counts.double().clamp_min(max(2 * count_noise_std, 1.0))
    observed = sums / counts[:, None]
    noise_variance = (sum_noise_std / counts).square()  # [K], of each entry of the mean
    # Empirical Bayes (James-Stein): what the means vary beyond their noise.
    signal = (observed.square().mean() - noise_variance.mean()).clamp_min(1e-3)
    means = observed * (signal / (signal + noise_variance))[:, None]
    released_shares = counts / counts.sum()
    shares = released_shares
    covariance = torch.eye(num_dims, dtype=torch.float64)
    second_moment = features.T @ features
    posteriors = _posteriors(features, means, shares, covariance)
    for _ in range(num_steps):
        sizes = posteriors.sum(dim=0)
        totals = posteriors.T @ features  # (K, d)
        within = covariance.diagonal().mean()
        # Each mean has three sources: the images, the release, and the prior around zero.
        precision = sizes / within + 1 / noise_variance + 1 / signal
        means = (totals / within + observed / noise_variance[:, None]) / precision[:, None]
        shares = (sizes / num_images + released_shares) / 2
        scatter = second_moment - means.T @ totals - totals.T @ means
        scatter = (scatter + (means * sizes[:, None]).T @ means) / num_images
        identity = torch.eye(num_dims, dtype=torch.float64) * scatter.diagonal().mean()
        covariance = (1 - _COVARIANCE_SHRINKAGE) * scatter + _COVARIANCE_SHRINKAGE * identity
        posteriors = _posteriors(features, means, shares, covariance)
    if views is not None:
        flat = views.double().flatten(0, 1)
        of_views = _posteriors(flat, means, shares, covariance).view(*views.shape[:2], -1)
        posteriors = (posteriors + of_views.sum(dim=1)) / (1 + views.shape[1])
    return posteriors.float()


def _posteriors(features: Tensor, means: Tensor, shares: Tensor, covariance: Tensor) -> Tensor:
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    factor = torch.linalg.cholesky(covariance + 1e-3 * eye)
    images = torch.linalg.solve_triangular(factor, features.T, upper=False).T
    centers = torch.linalg.solve_triangular(factor, means.T, upper=False).T
    distances = torch.cdist(images, centers).square()
    return (shares.clamp_min(1e-12).log() - 0.5 * distances).softmax(dim=1)
