"""Parameters, bytes, multiply-adds and time, against closed forms."""

import pytest
import timm
import torch
from torch import nn

from ecos_pl.classifier import Classifier
from ecos_pl.model_size import latency_ms, macs, parameter_count, size_mb


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def test_parameters_and_bytes_by_hand():
    net = small_net()
    weights = 8 * 3 * 9 + 2 * 8 + (8 * 2 * 9 + 8) + (8 * 10 + 10)
    assert parameter_count(net) == weights
    # The running mean and variance are saved too, and an int64 that counts batches.
    assert size_mb(net) == pytest.approx((4 * (weights + 16) + 8) / 1e6)
    assert size_mb(net.half()) == pytest.approx((2 * (weights + 16) + 8) / 1e6)


def test_shared_weights_count_once():
    tied = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    tied[1].weight = tied[0].weight
    assert parameter_count(tied) == 25


@pytest.mark.parametrize("side", [16, 17])
def test_multiply_adds_of_convolutions_and_linear_layers_by_hand(side):
    out = (side + 1) // 2
    expected = out * out * 8 * 3 * 9 + out * out * 8 * 2 * 9 + 8 * 10
    assert macs(small_net(), side) == expected


def test_multiply_adds_of_attention_by_hand():
    depth, width, tokens = 2, 192, (32 // 16) ** 2 + 1
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=depth, num_classes=7, dynamic_img_size=False
    )
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    expected = (tokens - 1) * 3 * 16 * 16 * width + depth * block + 7 * width
    assert macs(net, 32) == expected


def test_measuring_leaves_a_model_as_it_was():
    model = Classifier.create(
        ["a", "b"], backbone="test_efficientnet", weights="random", image_size=32
    )
    model.train()
    model.net.conv_stem.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    threads = torch.get_num_threads()
    assert macs(model, 32) == macs(model.net, 32) > 0
    assert latency_ms(model, 32, "cpu") > 0
    assert torch.get_num_threads() == threads
    assert model.training
    assert model.net.bn1.training
    assert not model.net.conv_stem.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_latency_takes_any_function_on_one_thread():
    seen = []

    def function(images):
        seen.append((tuple(images.shape), images.dtype, torch.get_num_threads()))

    assert latency_ms(function, 24, "cpu", batch_size=3, dtype=torch.uint8) >= 0
    assert set(seen) == {((3, 3, 24, 24), torch.uint8, 1)}
    assert len(seen) > 30
