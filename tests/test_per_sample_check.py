"""Networks that look at more than one image, or at more than images, are found out."""

import pytest
import torch
from torch import nn

from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.per_sample_check import NotPerSampleError, check_per_sample

SIDE = 16


class Embed(nn.Module):
    """Pixels → unit vectors, with one layer of one's own between."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.layer = layer
        self.head = nn.Linear(8, 6)
        torch.manual_seed(0)
        for module in (self.stem, self.head):
            nn.init.normal_(module.weight)
        self.eval()

    def forward(self, images):
        rows = self.layer(self.stem(images.float() / 255)).mean(dim=(2, 3))
        return nn.functional.normalize(self.head(rows), dim=1)


class Calls(nn.Module):
    """A layer that does what a function says."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Counting(nn.Module):
    """What it gives depends on how often it was called."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x + 0.1 * self.calls


@pytest.mark.parametrize(
    "layer",
    [
        nn.Identity(),
        nn.BatchNorm2d(8),
        nn.GroupNorm(2, 8),
        nn.InstanceNorm2d(8),  # without running statistics, but those of one image
        nn.Dropout(0.5),
    ],
)
def test_networks_that_see_one_image_at_a_time_pass(layer):
    check_per_sample(Embed(layer), SIDE)


@pytest.mark.parametrize(
    ("name", "size"), [("mobilenetv3_small_050", 32), ("test_efficientnet", 48), ("test_vit", 160)]
)
@pytest.mark.parametrize("features", ["final", "grid"])
def test_encoders_pass(name, size, features):
    check_per_sample(Encoder(EncoderSpec(name, "random", size, features)), size)


def broken_batch_norm():
    norm = nn.BatchNorm2d(8)
    norm.running_mean = None
    norm.running_var = None
    return norm


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: nn.BatchNorm2d(8, track_running_stats=False), "statistics of its batch"),
        (broken_batch_norm, "statistics of its batch"),
        (lambda: Calls(lambda x: x - x.mean(dim=0)), "changes when"),
        (lambda: Calls(lambda x: x / x.abs().max()), "changes when"),
        (lambda: Calls(lambda x: x + x.roll(1, 0)), "changes when"),
        (lambda: Calls(lambda x: x + torch.arange(len(x)).view(-1, 1, 1, 1)), "order of its batch"),
        (lambda: Calls(lambda x: x * len(x) + 1), "others join its batch"),
        (lambda: Calls(lambda x: x + torch.rand_like(x)), "embedded again"),
        (Counting, "embedded again"),
        (lambda: Calls(lambda x: x / 0), "not finite"),
        (lambda: Calls(lambda x: x[:1]), "missing"),
    ],
)
def test_others_are_refused_in_one_line(layer, words):
    with pytest.raises(NotPerSampleError, match=words) as caught:
        check_per_sample(Embed(layer()), SIDE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8), nn.Dropout(0.5)])
def test_a_layer_left_in_training_mode_is_refused(layer):
    network = Embed(layer)
    network.layer.train()
    with pytest.raises(NotPerSampleError, match="in training mode"):
        check_per_sample(network, SIDE)


def test_batch_statistics_would_be_found_without_looking_at_layers(monkeypatch):
    monkeypatch.setattr("ecos_pl.per_sample_check._check_layers", lambda network: None)
    with pytest.raises(NotPerSampleError, match="changes when"):
        check_per_sample(Embed(nn.BatchNorm2d(8, track_running_stats=False)), SIDE)


def test_it_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    check_per_sample(Embed(nn.Identity()), SIDE)
    torch.manual_seed(3)
    assert torch.equal(before, torch.get_rng_state())
