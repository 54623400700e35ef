"""A delivered ONNX file gives the scores of the network it was made of."""

import json
import sys

import pytest
import torch

from ecos_pl.backbone import create_backbone
from ecos_pl.classifier import Classifier
from ecos_pl.client_models import load_delivered
from ecos_pl.client_report import evaluation_lines
from ecos_pl.images import scan_folder
from ecos_pl.onnx_file import load_onnx

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CLASSES = ["a", "œuf", "c"]


class Portable(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        net = self.model.net
        return net((images.float() - self.model.mean) / self.model.std)


def make(path, *, header=None, inputs=("images",), outputs=("scores",), num_classes=3):
    """Export a small classifier by the contract, or with one thing wrong."""
    net = create_backbone("test_efficientnet", "random", image_size=32, num_classes=num_classes)
    model = Classifier(net.eval(), "test_efficientnet", 32, CLASSES)
    model.net.to(memory_format=torch.contiguous_format)
    torch.onnx.export(
        Portable(model).eval(),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8),),
        str(path),
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_axes={inputs[0]: {0: "batch"}, outputs[0]: {0: "batch"}},
        dynamo=False,
    )
    graph = onnx.load(path)
    good = {"format": "ecos_pl model 1", "backbone": "test_efficientnet", "image_size": 32}
    entry = graph.metadata_props.add()
    entry.key, entry.value = "ecos_pl", json.dumps({**good, "classes": CLASSES, **(header or {})})
    onnx.save(graph, path)
    return model


@pytest.mark.filterwarnings("ignore")
def test_scores_are_those_of_the_network(tmp_path):
    model = make(tmp_path / "m.onnx")
    loaded = load_onnx(tmp_path / "m.onnx")
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(images)
    assert torch.allclose(loaded(images), expected, atol=1e-4)
    assert loaded(images[:1]).dtype == torch.float32
    assert (loaded.classes, loaded.image_size, loaded.backbone) == (
        CLASSES,
        32,
        "test_efficientnet",
    )


@pytest.mark.filterwarnings("ignore")
def test_it_is_tried_on_images_like_any_delivered_model(tmp_path, image_tree):
    model = make(tmp_path / "m.onnx", header={"classes": ["vertical", "horizontal", "c"]})
    model.classes = ["vertical", "horizontal", "c"]
    source = scan_folder(image_tree / "client" / "test")
    with torch.no_grad():
        expected = list(evaluation_lines(model, source))
    assert list(evaluation_lines(load_delivered(tmp_path / "m.onnx"), source)) == expected
    assert expected[0].endswith("on 30 images")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"header": {"format": "another 1"}}, "its format is 'another 1'"),
        ({"header": {"image_size": "32"}}, "its image_size is '32'"),
        ({"header": {"image_size": 10**9}}, "its image_size is 1000000000"),
        ({"header": {"classes": []}}, "its classes are not named"),
        ({"header": {"classes": [1, 2, 3]}}, "its classes are not named"),
        ({"inputs": ("pixels",)}, "not one tensor"),
        ({"outputs": ("logits",)}, "not one tensor named scores"),
        ({"num_classes": 4}, "scores of shape"),
    ],
)
def test_other_models_are_refused_in_one_line(tmp_path, changes, words):
    make(tmp_path / "m.onnx", **changes)
    with pytest.raises(ValueError, match=words) as caught:
        load_onnx(tmp_path / "m.onnx")
    assert "cannot be read as a delivered model" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\x07"])
def test_other_files_are_refused_in_one_line(tmp_path, content, capfd):
    (tmp_path / "m.onnx").write_bytes(content)
    for path in (tmp_path / "m.onnx", tmp_path / "none.onnx"):
        with pytest.raises(ValueError, match="cannot be read as a delivered model") as caught:
            load_onnx(path)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_without_onnxruntime_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="pip install onnxruntime"):
        load_onnx(tmp_path / "m.onnx")
