"""Where a training starts: fresh heads, bare weights, delivered models."""

import pytest
import torch

from ecos_pl.backbone import WeightsError
from ecos_pl.classifier import Classifier
from ecos_pl.model_file import save_model
from ecos_pl.warm_start import new_classifier

NAME = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def delivered(tmp_path_factory):
    model = Classifier.create(["a", "b"], backbone=NAME, weights="random", image_size=32, seed=3)
    torch.nn.init.normal_(model.net.get_classifier().weight)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, model)
    return path, model


def new(classes, weights, backbone=NAME):
    return new_classifier(classes, backbone=backbone, weights=str(weights), image_size=32, seed=1)


def test_a_fresh_head_gives_every_class_the_same_score():
    model = new(["a", "b", "c"], "random").eval()
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert not model(images).any()


def test_a_delivered_model_of_the_same_classes_is_taken_whole(delivered):
    path, model = delivered
    again = new(["a", "b"], path)
    assert again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_of_other_classes_it_gives_all_but_the_head(delivered):
    path, model = delivered
    for classes in (["b", "a"], ["a", "b", "c"]):
        other = new(classes, path).net.state_dict()
        assert not other["classifier.weight"].any()
        stem = "conv_stem.weight"
        assert torch.equal(other[stem], model.net.state_dict()[stem])


def test_of_another_architecture_it_is_refused_in_one_line(delivered):
    with pytest.raises(WeightsError, match=f"holds a {NAME}, not a resnet18") as caught:
        new(["a", "b"], delivered[0], backbone="resnet18")
    assert "\n" not in str(caught.value)


def test_a_damaged_one_is_refused_in_one_line(delivered, tmp_path):
    content = delivered[0].read_bytes()
    (tmp_path / "m.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match="not a readable weight file"):
        new(["a", "b"], tmp_path / "m.safetensors")
