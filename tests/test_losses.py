import math

import pytest
import torch
from torch.nn import functional as F

from ecos_pl.losses import consistency, soft_cross_entropy


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
    nothing.backward()
    assert float(nothing.detach()) == 0
    assert not logits.grad.any()


def test_consistency_mask_and_mean_by_hand():
    weak = torch.tensor([[10.0, 0.0], [0.1, 0.0], [0.0, 10.0]])  # sure of 0, unsure, sure of 1
    strong = torch.tensor([[0.0, 0.0], [5.0, 0.0], [2.0, 0.0]])
    expected = (math.log(2) + (2 + math.log1p(math.exp(-2)))) / 3
    assert float(consistency(weak, strong, threshold=0.95)) == pytest.approx(expected, rel=1e-5)


def test_consistency_sends_no_gradient_into_the_weak_view():
    weak = torch.tensor([[10.0, 0.0]], requires_grad=True)
    strong = torch.zeros(1, 2, requires_grad=True)
    consistency(weak, strong, threshold=0.5).backward()
    assert weak.grad is None
    assert strong.grad.abs().sum() > 0
