import json

import pytest
import torch
from safetensors.torch import save_file

from ecos_pl.backbone import create_backbone
from ecos_pl.classifier import Classifier
from ecos_pl.model_file import load_model, save_model
from ecos_pl.modules.self_labeling import SelfLabelingModule

NAME = "mobilenetv3_small_050"


@pytest.fixture(scope="module")
def model():
    net = create_backbone(NAME, "random", image_size=32, num_classes=3, seed=5).eval()
    return Classifier(net, NAME, 32, ["a", "œuf", "c"])


def test_round_trip_gives_the_same_scores(model, tmp_path):
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    save_model(tmp_path / "model.safetensors", model)
    back = load_model(tmp_path / "model.safetensors")
    assert torch.equal(back(images), model(images))
    assert (back.backbone, back.image_size, back.classes) == (NAME, 32, ["a", "œuf", "c"])
    assert not back.net.training


def test_scores_are_those_of_the_module_that_was_trained(tmp_path):
    model = Classifier.create(["a", "b"], backbone=NAME, weights="random", image_size=32)
    module = SelfLabelingModule(model).eval()
    torch.nn.init.normal_(model.net.get_classifier().weight)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    save_model(tmp_path / "m", model)
    with torch.inference_mode():
        expected = module(images)
    assert torch.allclose(load_model(tmp_path / "m")(images), expected, atol=1e-5)


def test_damaged_and_foreign_files_are_refused_in_one_line(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, model)
    whole = path.read_bytes()
    for content in (b"", b"x" * 100, whole[:-10], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a delivered model") as caught:
            load_model(path)
        assert "\n" not in str(caught.value)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(tmp_path / "none")


def test_weights_of_another_architecture_are_refused(model, tmp_path):
    header = {"format": "ecos_pl model 1", "backbone": "resnet18", "image_size": 32}
    header["classes"] = ["a", "b", "c"]
    path = tmp_path / "m"
    state = {name: tensor.contiguous() for name, tensor in model.net.state_dict().items()}
    save_file(state, path, {"ecos_pl": json.dumps(header)})
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(path)
