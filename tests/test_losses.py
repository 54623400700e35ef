import math

import pytest
import torch
from torch.nn import functional as F

from ecos_pl.losses import (
    consistency,
    distillation,
    feature_distillation,
    logit_adjusted,
    soft_cross_entropy,
)


def test_one_hot_targets_give_torch_cross_entropy():
    logits, labels = torch.randn(7, 5), torch.randint(0, 5, (7,))
    targets = F.one_hot(labels, 5).float()
    for smoothing in (0.0, 0.1):
        ours = soft_cross_entropy(logits, targets, torch.ones(7), label_smoothing=smoothing)
        theirs = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_soft_targets_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]])  # probabilities 1/4, 3/4
    loss = soft_cross_entropy(logits, torch.tensor([[0.5, 0.5]]), torch.ones(1))
    assert float(loss) == pytest.approx(-0.5 * math.log(0.25) - 0.5 * math.log(0.75))


def test_weights_leave_images_out_and_all_zero_gives_zero():
    logits = torch.randn(4, 3, requires_grad=True)
    targets = torch.eye(3)[[0, 1, 2, 0]]
    some = soft_cross_entropy(logits, targets, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert torch.allclose(some, soft_cross_entropy(logits[::2], targets[::2], torch.ones(2)))
    nothing = soft_cross_entropy(logits, torch.zeros(4, 3), torch.zeros(4))
    (2.0**16 * nothing).backward()  # as a half-precision scaler has it
    assert float(nothing.detach()) == 0
    assert not logits.grad.any()


def test_consistency_mask_and_mean_by_hand():
    weak = torch.tensor([[10.0, 0.0], [0.1, 0.0], [0.0, 10.0]])  # sure of 0, unsure, sure of 1
    strong = torch.tensor([[0.0, 0.0], [5.0, 0.0], [2.0, 0.0]])
    expected = (math.log(2) + (2 + math.log1p(math.exp(-2)))) / 3
    assert float(consistency(weak.softmax(1), strong, threshold=0.95)) == pytest.approx(
        expected, rel=1e-5
    )


def test_consistency_takes_the_threshold_of_the_predicted_class():
    weak = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.0, 0.9]])
    strong = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0], [5.0, 0.0, 0.0]])
    thresholds = [0.6, 0.8, 0.9]
    expected = 0.0
    for row in range(3):
        best = max(range(3), key=lambda k: float(weak[row, k]))
        if float(weak[row, best]) >= thresholds[best] - 1e-7:
            expected -= math.log(math.exp(strong[row, best]) / sum(strong[row].exp().tolist()))
    ours = consistency(weak, strong, threshold=torch.tensor(thresholds))
    assert float(ours) == pytest.approx(expected / 3, rel=1e-5)


def test_consistency_sends_no_gradient_into_the_weak_view():
    weak = torch.tensor([[10.0, 0.0]], requires_grad=True)
    strong = torch.zeros(1, 2, requires_grad=True)
    consistency(weak.softmax(1), strong, threshold=0.5).backward()
    assert weak.grad is None
    assert strong.grad.abs().sum() > 0


def test_logit_adjustment_learns_the_balanced_posterior():
    """Fitted to skewed labels of one input, plain logits give its shares, adjusted ones uniform."""
    shares = torch.tensor([0.7, 0.2, 0.1])
    found = []
    for strength in (0.0, 0.5, 1.0):
        logits = torch.zeros(1, 3, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-9)

        def loss():
            optimizer.zero_grad()  # noqa: B023
            adjusted = logit_adjusted(logits, shares, strength)  # noqa: B023
            value = soft_cross_entropy(adjusted, shares[None], torch.ones(1))
            value.backward()
            return value

        optimizer.step(loss)
        found.append(logits.detach().softmax(1)[0])
    assert torch.allclose(found[0], shares, atol=1e-3)
    assert torch.allclose(found[1], shares.sqrt() / shares.sqrt().sum(), atol=1e-3)
    assert torch.allclose(found[2], torch.full((3,), 1 / 3), atol=1e-3)


def test_logit_adjustment_goes_with_soft_targets_and_weights():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(2, 5, 3, generator=generator)
    targets, weights = targets.softmax(1), torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])
    shares = torch.tensor([0.5, 0.5, 0.0])  # the last has no label at all
    total = 0.0
    for row in range(5):
        scores = [float(logits[row, k]) + math.log(max(float(shares[k]), 1e-3)) for k in range(3)]
        norm = math.log(sum(map(math.exp, scores)))
        total -= float(weights[row]) * sum(
            float(targets[row, k]) * (scores[k] - norm) for k in range(3)
        )
    ours = soft_cross_entropy(logit_adjusted(logits, shares), targets, weights)
    assert float(ours) == pytest.approx(total / 4.5, rel=1e-5)


# --- distillation --------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 30.0])
def test_a_student_that_agrees_has_no_loss_and_no_gradient(temperature):
    teacher = 5 * torch.randn(6, 4)
    student = (teacher + torch.randn(6, 1)).requires_grad_()  # a shift of all scores says nothing
    loss = distillation(student, teacher, torch.ones(6), temperature=temperature)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4)
    assert student.grad.abs().max() < 1e-5 * temperature


def test_distillation_by_hand():
    # At temperature 2, teacher probabilities 3/4, 1/4 and student probabilities 1/2, 1/2.
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])
    loss = distillation(torch.zeros(1, 2), teacher, torch.ones(1), temperature=2.0)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_torchs_divergence_with_its_mean_over_images(temperature):
    student, teacher = torch.randn(9, 5), torch.randn(9, 5)
    ours = distillation(student, teacher, torch.ones(9), temperature=temperature)
    theirs = temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.softmax(teacher / temperature, dim=1),
        reduction="batchmean",
    )
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_gradient_by_a_logit_in_closed_form_and_its_limit_at_high_temperature():
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(3, 4, generator=generator, dtype=torch.float64).float().requires_grad_()
    teacher = torch.randn(3, 4, generator=generator)

    def gradient(temperature):
        loss = distillation(student, teacher, torch.ones(3), temperature=temperature)
        return torch.autograd.grad(loss, student)[0]

    for temperature in (1.0, 4.0):
        soft = [F.softmax(z / temperature, dim=1) for z in (student.detach(), teacher)]
        expected = temperature * (soft[0] - soft[1]) / 3
        assert torch.allclose(gradient(temperature), expected, atol=1e-6)
    difference = student.detach() - teacher
    limit = (difference - difference.mean(dim=1, keepdim=True)) / 4 / 3
    for temperature in (100.0, 300.0):  # the same at both: its size does not depend on it
        assert torch.allclose(gradient(temperature), limit, rtol=0.03, atol=1e-3)


def test_weights_leave_images_out_of_distillation():
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    some = distillation(student, teacher, torch.tensor([1.0, 0.0, 1.0, 0.0]), temperature=2.0)
    alone = distillation(student[::2], teacher[::2], torch.ones(2), temperature=2.0)
    assert torch.allclose(some, alone)
    nothing = distillation(student, teacher, torch.zeros(4), temperature=2.0)
    (2.0**16 * nothing).backward()  # as a half-precision scaler has it
    assert float(nothing.detach()) == 0
    assert not student.grad.any()


def test_no_gradient_flows_into_the_teacher():
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    distillation(student, teacher, torch.ones(2), temperature=2.0).backward()
    feature_distillation(student, teacher, torch.ones(2)).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_feature_distillation_is_two_minus_two_cosines_whatever_the_scale():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
    ours = feature_distillation(3 * student, 0.1 * teacher, weights)
    cosines = F.cosine_similarity(student, teacher)
    assert torch.allclose(ours, (weights * (2 - 2 * cosines)).sum() / weights.sum(), atol=1e-6)
    assert float(feature_distillation(teacher, 9 * teacher, weights)) == pytest.approx(0, abs=1e-6)
    assert float(feature_distillation(-teacher, teacher, weights)) == pytest.approx(4)
