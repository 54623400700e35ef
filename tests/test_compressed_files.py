import json
import math
from pathlib import Path

import pytest
import torch

from ecos_pl import compressed_files
from ecos_pl.classifier import Classifier
from ecos_pl.compressed_files import FILES, INT8, ONNX, PT2, SAFETENSORS, write_files
from ecos_pl.export import exported, write_onnx
from ecos_pl.model_card import card_text
from ecos_pl.model_file import header_of
from ecos_pl.onnx_run import accuracy_of, open_session, scores_of
from ecos_pl.pruning import pruned_copy
from ecos_pl.quantization import METHODS, Recipe, best_quantised, quantise

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("torch_pruning")
SIZE = 32


def images(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def teacher():
    made = Classifier.create(
        ["a", "œuf", "c"], backbone="resnet10t", weights="random", image_size=SIZE
    )
    torch.nn.init.normal_(made.net.get_classifier().weight)
    return made.eval()


@pytest.fixture(scope="module")
def written(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    student = pruned_copy(teacher, 0.5)
    targets = torch.nn.functional.one_hot(student(images(8, 2)).argmax(dim=1), 3)
    weights = torch.tensor([1.0, 1, 1, 1, 0, 1, 1, 1])
    report = write_files(
        folder,
        student,
        teacher,
        calibration=images(16),
        held_out=images(12, 1),
        methods=["minmax"],
        tolerance=1.0,
        test_batches=lambda: [(images(8, 2), targets, weights)],
    )
    return folder, student, report


def test_every_file_is_there_and_nothing_else(written):
    folder, _, report = written
    assert {path.name for path in folder.iterdir()} == set(FILES) == set(report["files"])


def test_float_files_give_the_scores_for_any_number_of_images(written):
    folder, student, _ = written
    session, program = open_session(folder / ONNX), torch.export.load(folder / PT2).module()
    for number in (1, 2, 7):
        with torch.no_grad():
            wanted = student(images(number, 3))
            assert torch.allclose(program(images(number, 3)), wanted, atol=1e-4)
        assert torch.allclose(scores_of(session, images(number, 3)), wanted, atol=1e-4)


def test_int8_is_close_and_small(written):
    folder, student, report = written
    session = open_session(folder / INT8)
    with torch.no_grad():
        wanted = student(images(12, 1))
    found = scores_of(session, images(12, 1))
    assert (found - wanted).abs().max() < 0.2 * wanted.abs().max()
    assert report["files"][INT8]["max_deviation"] == pytest.approx(
        float((found - wanted).abs().max())
    )
    assert (folder / INT8).stat().st_size < 0.35 * (folder / ONNX).stat().st_size
    weights = [t for t in onnx.load(folder / INT8).graph.initializer if len(t.dims) == 4]
    assert {t.data_type for t in weights if math.prod(t.dims) > 3} == {onnx.TensorProto.INT8}


def test_files_say_whose_they_are(written):
    folder, student, _ = written
    wanted = header_of(student)
    for file in (ONNX, INT8):
        meta = open_session(folder / file).get_modelmeta().custom_metadata_map
        assert json.loads(meta["ecos_pl"]) == wanted
    extra = {"ecos_pl": ""}
    torch.export.load(folder / PT2, extra_files=extra)
    assert json.loads(extra["ecos_pl"]) == wanted
    session = open_session(folder / INT8)
    assert [(i.name, i.type) for i in session.get_inputs()] == [("images", "tensor(uint8)")]
    assert [(o.name, o.type) for o in session.get_outputs()] == [("scores", "tensor(float)")]


def test_the_report_is_plain_data_and_its_ratios_are_teacher_over_result(written):
    _, student, report = written
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    before, after = report["teacher"], report["student"]
    assert report["size_ratio"] == before["size_mb"] / after["size_mb"] > 4
    assert report["latency_ratio"] == before["latency_ms"] / after["latency_ms"]
    assert report["accuracy_drop"] == before["accuracy"] - after["accuracy"]
    assert after["float_accuracy"] == 1  # the labels are the student's own
    assert report["files"][SAFETENSORS]["max_deviation"] == 0
    assert after["parameters"] == sum(p.numel() for p in student.parameters())


def test_images_without_weight_do_not_count(written):
    folder, student, _ = written
    with torch.no_grad():
        classes = student(images(8, 2)).argmax(dim=1)
    targets = torch.nn.functional.one_hot((classes + 1) % 3, 3)
    targets[0, :] = torch.nn.functional.one_hot(classes[0], 3)
    session = open_session(folder / ONNX)
    weights = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0])
    assert accuracy_of(session, [(images(8, 2), targets, weights)]) == 0.5
    assert accuracy_of(session, [(images(8, 2), targets, 0 * weights)]) is None


def test_a_file_with_other_scores_stops_it_and_leaves_the_old_files(teacher, tmp_path, monkeypatch):
    (tmp_path / ONNX).write_bytes(b"old")
    write = compressed_files.write_onnx

    def wrong(path, model, program):
        write(path, model, exported(pruned_copy(teacher, 0.25)))

    monkeypatch.setattr(compressed_files, "write_onnx", wrong)
    with pytest.raises(ValueError, match=r"model\.onnx gives other scores") as caught:
        write_files(
            tmp_path,
            pruned_copy(teacher, 0.5),
            teacher,
            calibration=images(8),
            held_out=images(4, 1),
            methods=["minmax"],
            tolerance=1.0,
            test_batches=list,
        )
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [ONNX]
    assert (tmp_path / ONNX).read_bytes() == b"old"


@pytest.mark.slow
def test_the_best_calibration_comes_first_and_float_ends_are_the_last_resort(teacher, tmp_path):
    source = tmp_path / "float.onnx"
    small = pruned_copy(teacher, 0.25)
    write_onnx(source, small, exported(small))
    arguments = (source, tmp_path, small, images(8), images(8, 1))
    path, found = best_quantised(*arguments, methods=METHODS, tolerance=1.0)
    assert {one.recipe.method for one in found} == set(METHODS)
    assert not any(one.recipe.float_ends for one in found)
    assert found[0].agreement == max(one.agreement for one in found)
    assert path.is_file()
    _, found = best_quantised(*arguments, methods=["minmax"], tolerance=-1)
    assert {one.recipe.float_ends for one in found} == {False, True}


@pytest.mark.slow
def test_layers_left_in_float_are_the_first_and_the_last(teacher, tmp_path):
    source, target = tmp_path / "float.onnx", tmp_path / "int8.onnx"
    write_onnx(source, teacher, exported(teacher))
    quantise(source, target, teacher, images(8), Recipe("minmax", float_ends=True))
    graph = onnx.load(target).graph
    fed_by = {name: node.op_type for node in graph.node for name in node.output}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    in_float = [fed_by.get(layer.input[1]) != "DequantizeLinear" for layer in layers]
    assert in_float == [True, *[False] * (len(layers) - 2), True]


def test_the_card_says_what_it_is_and_how_to_run_it(written, monkeypatch):
    folder, student, report = written
    summary = {
        "run_id": "mine",
        "seed": 7,
        "proxy": {
            "size": 1500,
            "fingerprint": "f" * 64,
            "pools": [{"name": "p", "licence": "CC-BY-4.0", "num_chosen": 1500}],
        },
        "privacy": {
            "epsilon": 0.98,
            "delta": 1e-5,
            "relation": "add/remove",
            "unit": "sample",
            "accountant": "PLD",
            "spent_by_this_run": 0.98,
        },
        "compression": report,
    }
    text = card_text(
        summary,
        teacher="t/model.safetensors",
        target="task.target.sparsity=0.7",
        strategy="ecos",
        classes=student.classes,
    )
    for words in ("mine", "1,500 public images", "CC-BY-4.0", "ε = 0.98", "œuf", "sparsity=0.7"):
        assert words in text
    code = text.split("```python\n")[1:]
    assert len(code) == 3
    monkeypatch.chdir(folder)
    with torch.no_grad():
        wanted = student(images(3, 5))
    for number, block in enumerate(part.split("```")[0] for part in code):
        space = {"images": images(3, 5).numpy() if number == 0 else images(3, 5), "Path": Path}
        with torch.no_grad():
            exec(block, space)
        difference = (torch.as_tensor(space["scores"]) - wanted).abs().max()
        assert difference < (0.2 * wanted.abs().max() if number == 0 else 1e-3)
