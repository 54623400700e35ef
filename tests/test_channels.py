import copy

import pytest
import torch

from ecos_pl.channels import fit_shapes
from ecos_pl.classifier import Classifier
from ecos_pl.model_file import load_model, save_model
from ecos_pl.pruning import pruned_copy

pytest.importorskip("torch_pruning")
SIZE = 32


def classifier(backbone):
    model = Classifier.create(["a", "b", "c"], backbone=backbone, weights="random", image_size=SIZE)
    torch.nn.init.normal_(model.net.get_classifier().weight)
    return model.eval()


@pytest.mark.parametrize(
    "backbone",
    ["resnet10t", "test_efficientnet", "mobilenetv3_small_050", "test_convnext", "test_vit"],
)
def test_a_pruned_network_comes_back_from_its_file_with_the_same_scores(backbone, tmp_path):
    pruned = pruned_copy(classifier(backbone), 0.5)
    save_model(tmp_path / "m", pruned)
    back = load_model(tmp_path / "m")
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(back(images), pruned(images))


def test_what_layers_say_of_their_channels_follows_the_weights():
    model = classifier("mobilenetv3_small_050")
    pruned = pruned_copy(model, 0.5)
    fit_shapes(model.net, pruned.net.state_dict())
    for module, other in zip(model.net.modules(), pruned.net.modules(), strict=True):
        for name in ("in_channels", "out_channels", "groups", "num_features", "in_features"):
            if not isinstance(module, type(model.net)):  # timm's own notes on the whole
                assert getattr(module, name, None) == getattr(other, name, None)


def test_weights_keep_being_trainable_and_frozen_ones_frozen():
    model = classifier("resnet10t")
    state = pruned_copy(model, 0.5).net.state_dict()
    model.requires_grad_(False)
    model.net.get_classifier().requires_grad_(True)
    fit_shapes(model.net, state)
    trainable = {name for name, weight in model.net.named_parameters() if weight.requires_grad}
    assert trainable == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("fc.bias"), "fc.bias is missing"),
        (lambda state: state.update(more=torch.zeros(1)), "more is unexpected"),
        (lambda state: state.update({"fc.bias": torch.zeros(4)}), "at most"),
        (lambda state: state.update({"fc.bias": torch.zeros(3, 1)}), "at most"),
    ],
)
def test_other_networks_are_refused(change, words):
    model = classifier("resnet10t")
    state = copy.copy(model.net.state_dict())
    change(state)
    with pytest.raises(ValueError, match=words):
        fit_shapes(model.net, state)
