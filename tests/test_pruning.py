import copy
import importlib

import pytest
import torch
from torch import nn

from ecos_pl import pruning_plan
from ecos_pl.classifier import Classifier
from ecos_pl.extras import require
from ecos_pl.model_size import macs, parameter_count
from ecos_pl.onnx_run import scores_of
from ecos_pl.pruning import (
    PruningError,
    channel_groups,
    narrowed,
    prune,
    pruned_copy,
    round_channels,
    typical_gradients,
)
from ecos_pl.pruning_plan import Target, plan_pruning

pytest.importorskip("torch_pruning")
SIZE = 32
IMAGES = torch.randint(
    0, 256, (8, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)


@pytest.fixture
def model():
    made = Classifier.create(
        ["a", "b", "c"], backbone="resnet10t", weights="random", image_size=SIZE
    )
    torch.nn.init.normal_(made.net.get_classifier().weight)
    return made.eval()


@pytest.mark.parametrize("backbone", ["resnet10t", "test_efficientnet", "mobilenetv3_small_050"])
@pytest.mark.parametrize("keep", [0.75, 0.3, 0.01])
def test_pruned_networks_run_and_have_the_planned_widths(backbone, keep):
    model = Classifier.create(["a", "b", "c"], backbone=backbone, weights="random", image_size=SIZE)
    full = channel_groups(model)
    pruned = pruned_copy(model, keep)
    assert channel_groups(pruned) == narrowed(full, keep)
    assert pruned(IMAGES).shape == (8, 3)
    assert parameter_count(pruned.net) < parameter_count(model.net)
    assert channel_groups(model) == full  # a copy was pruned


def test_widths_are_multiples_of_eight_between_eight_and_all():
    for channels in (6, 8, 20, 64, 96, 1280):
        kept = [round_channels(channels, share / 20) for share in range(1, 21)]
        assert kept == sorted(kept)
        assert kept[-1] == channels
        assert all(k % 8 == 0 or k == channels for k in kept)


def test_removing_channels_that_give_nothing_changes_nothing(model):
    """Channels whose weights are zero are the least important ones, and nothing misses them."""
    inside = "layer4.0.conv1"  # no other layer shares its channels
    widths = channel_groups(model)
    layer, norm = model.net.get_submodule(inside), model.net.get_submodule("layer4.0.bn1")
    gone = torch.randperm(layer.out_channels, generator=torch.Generator().manual_seed(1))
    gone = gone[: layer.out_channels // 2]
    with torch.no_grad():
        for tensor in (layer.weight, norm.weight, norm.bias, norm.running_mean):
            tensor[gone] = 0
        before = model(IMAGES)
        prune(model, {**widths, inside: layer.out_channels - len(gone)}, {})
        after = model(IMAGES)
    assert model.net.get_submodule(inside).out_channels == widths[inside] - len(gone)
    assert torch.allclose(after, before, atol=1e-4)


def test_taylor_importance_spares_what_the_loss_depends_on(model):
    """Large weights without a gradient go, small ones with a gradient stay."""
    inside = "layer4.0.conv1"
    layer = model.net.get_submodule(inside)
    channels, half = layer.out_channels, layer.out_channels // 2
    gradients = {name: torch.zeros_like(p) for name, p in model.net.named_parameters()}
    gradients[f"{inside}.weight"][:half] = 1
    with torch.no_grad():
        layer.weight[:half] = 0.01 + 0 * layer.weight[:half]
        layer.weight[half:] = 5
    prune(model, {**channel_groups(model), inside: half}, gradients)
    assert model.net.get_submodule(inside).weight.unique().tolist() == [pytest.approx(0.01)]
    assert channels == 2 * half
    assert all(parameter.grad is None for parameter in model.parameters())


def test_typical_gradients_are_the_root_mean_square_over_losses(model):
    def losses():
        for sign in (1.0, -3.0):
            yield sign * model.net.get_classifier().weight.sum()

    found = typical_gradients(model, losses())
    assert torch.allclose(found["fc.weight"], torch.tensor(5.0).sqrt().expand(3, 512))
    assert set(found) == {"fc.weight"}


@pytest.mark.parametrize("share", [0.7, 0.4, 0.1])
@pytest.mark.parametrize("name", ["macs", "sparsity"])
def test_a_plan_meets_its_target_and_no_wider_one_would(model, name, share):
    def cost(keep):
        if name == "macs":
            return macs(pruned_copy(model, keep).net, SIZE)
        return 1 - parameter_count(pruned_copy(model, keep)) / parameter_count(model)

    target = Target(name, share * cost(1.0) if name == "macs" else 1 - share)
    plan = plan_pruning(model, target)
    sign = 1 if name == "macs" else -1
    assert plan.expected == cost(plan.keep)
    assert sign * cost(plan.keep) <= sign * target.value < sign * cost(plan.keep + 1 / 64)


def test_a_target_met_already_prunes_nothing(model):
    assert plan_pruning(model, Target("macs", 1e12)).keep == 1
    assert plan_pruning(model, Target("sparsity", 0)).keep == 1


def test_a_target_out_of_reach_is_one_line_that_says_what_is_within(model):
    with pytest.raises(PruningError, match=r"task.target.macs=1 is out of reach of resnet10t") as e:
        plan_pruning(model, Target("macs", 1))
    assert "\n" not in str(e.value)
    least = macs(pruned_copy(model, 1 / 64).net, SIZE)
    assert f"comes to {least:.3g} multiply-adds" in str(e.value)


@pytest.mark.slow
def test_the_size_of_the_int8_file_is_a_target(model):
    plan = plan_pruning(model, Target("size_mb", 0.5))
    assert 0.4 < plan.expected <= 0.5


@pytest.mark.slow
def test_latency_is_that_of_the_int8_file_beside_both_float_ones(model, monkeypatch):
    """As the delivered file is timed: alone, it would find its weights in the processor's cache."""
    seen = []

    def timed(sessions, image_size):
        seen.append([scores_of(session, IMAGES) for session in sessions])
        return [3.0, 2.0, 1.0]

    monkeypatch.setattr(pruning_plan, "latencies_ms", timed)
    plan = plan_pruning(model, Target("latency_ms", 1.06))
    assert (plan.keep, plan.expected) == (1.0, 1.0)
    ((unpruned, plain, int8),) = seen
    assert torch.allclose(unpruned, plain, atol=1e-4)  # as nothing was pruned
    assert not torch.allclose(int8, plain, atol=1e-4)
    with pytest.raises(PruningError, match="out of reach"):
        plan_pruning(model, Target("latency_ms", 1.04))  # within what times vary by


def test_a_network_that_cannot_be_followed_is_refused_in_one_line(model):
    class Odd(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            raise RuntimeError("no\nway")

        def get_classifier(self):
            return self.net.get_classifier()

    odd = copy.copy(model)
    odd.net = Odd(model.net)
    with pytest.raises(PruningError, match="cannot be pruned: no way") as caught:
        channel_groups(odd)
    assert "\n" not in str(caught.value)


def test_a_network_that_does_not_run_with_fewer_channels_is_refused_before_training():
    model = Classifier.create(
        ["a", "b"], backbone="ghostnet_050", weights="random", image_size=SIZE
    )
    with pytest.raises(PruningError, match="ghostnet_050 does not run with fewer channels") as e:
        plan_pruning(model, Target("sparsity", 0.5))
    assert "\n" not in str(e.value)


def test_a_missing_package_is_one_line(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'torch-pruning: pip install -e "\.\[compress\]"'):
        require("compress")
