"""Losses as pure functions.

Shapes: B images, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """Weighted mean of the cross-entropy against class probabilities, in nats.

    Label smoothing mixes each target with the uniform distribution (Szegedy et al. 2016, §7).

    Args:
        logits: [B, K].
        targets: [B, K], rows summing to one (rows of weight 0 may hold anything finite).
        weights: [B], not negative; the loss is 0 if they are all 0.
        label_smoothing: Share of the uniform distribution, in [0, 1).
    """
    targets = (1 - label_smoothing) * targets + label_smoothing / logits.shape[1]
    losses = -(targets * F.log_softmax(logits.float(), dim=1)).sum(dim=1)
    return (weights * losses).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)


def logit_adjusted(logits: Tensor, class_shares: Tensor, strength: float = 1.0) -> Tensor:
    """Logits to train on so that rare classes are learned as well as frequent ones.

    Menon et al. 2021, eq. 10: with ``strength`` 1 the cross-entropy of ``logits + log shares``
    is consistent for the balanced error of the logits themselves, which is what predicts later.
    It weighs no image, so it goes with soft targets, smoothing and weights as they are.

    Args:
        logits: [B, K].
        class_shares: [K], frequencies of the training labels, summing to one; a class that has
            none counts as a thousandth.
        strength: 0 leaves the logits as they are.
    """
    return logits.float() + strength * class_shares.clamp_min(1e-3).log()


def consistency(
    probabilities: Tensor, strong_logits: Tensor, *, threshold: float | Tensor
) -> Tensor:
    """FixMatch's unlabelled loss (Sohn et al. 2020, eq. 4), in nats.

    The strong view must predict the class that the weak view is sure of; images whose weak
    prediction stays below the threshold count as 0 in the mean. No gradient flows into the weak
    view.

    Args:
        probabilities: [B, K], predictions on the weak views.
        strong_logits: [B, K].
        threshold: Least probability of the weak prediction: one for all classes, or [K].
    """
    confidence, pseudo_labels = probabilities.detach().max(dim=1)
    if isinstance(threshold, Tensor):
        threshold = threshold[pseudo_labels]
    losses = F.cross_entropy(strong_logits.float(), pseudo_labels, reduction="none")
    return (losses * (confidence >= threshold)).mean()
