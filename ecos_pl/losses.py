"""Losses as pure functions.

Shapes: B images, K classes.
"""

from __future__ import annotations

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
    return _weighted_mean(losses, weights)


def consistency(weak_logits: Tensor, strong_logits: Tensor, *, threshold: float) -> Tensor:
    """FixMatch's unlabelled loss (Sohn et al. 2020, eq. 4), in nats.

    The strong view must predict the class that the weak view is sure of; images whose weak
    prediction stays below the threshold count as 0 in the mean. No gradient flows into the weak
    view.

    Args:
        weak_logits: [B, K].
        strong_logits: [B, K].
        threshold: Least probability of the weak prediction.
    """
    confidence, pseudo_labels = weak_logits.detach().float().softmax(dim=1).max(dim=1)
    losses = F.cross_entropy(strong_logits.float(), pseudo_labels, reduction="none")
    return (losses * (confidence >= threshold)).mean()


def distillation(
    student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, *, temperature: float
) -> Tensor:
    """Weighted mean of τ² · KL(teacher ‖ student) at a temperature τ, in nats.

    Hinton et al. 2015, §2: both sides softened by τ, and the factor τ² keeps the size of the
    gradient: for a high τ that by a student's logit goes to its difference from the teacher's, both
    centred, over K. The divergence, not the cross-entropy: it is 0 where the student agrees. No
    gradient flows into the teacher.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K].
        weights: [B], not negative; the loss is 0 if they are all 0.
        temperature: τ, above 0.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=1)
    divergences = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return temperature**2 * _weighted_mean(divergences, weights)


def feature_distillation(
    student_features: Tensor, teacher_features: Tensor, weights: Tensor
) -> Tensor:
    """Weighted mean of the squared distance between features scaled to unit length.

    FitNets' regression of the teacher's features on the student's (Romero et al. 2015, eq. 3), both
    normalised as in BYOL (Grill et al. 2020, eq. 2), since two networks' features differ in scale:
    ``2 - 2 · cosine``, from 0 to 4. No gradient flows into the teacher.

    Args:
        student_features: [B, D], brought to the teacher's dimensions by a projector.
        teacher_features: [B, D].
        weights: [B], not negative; the loss is 0 if they are all 0.
    """
    student = F.normalize(student_features.float(), dim=1)
    teacher = F.normalize(teacher_features.detach().float(), dim=1)
    return _weighted_mean((student - teacher).square().sum(dim=1), weights)


def _weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """Mean of losses [B] by weights [B]; 0, and so its gradient, where no image counts."""
    total = weights.sum()
    # Over 1, not a tiny number: scaled by 4 or by a half-precision scaler, its inverse is infinite.
    return (weights * losses).sum() / total.where(total > 0, 1)
