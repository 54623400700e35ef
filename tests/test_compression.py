"""task=compression end to end through train.py, on a few small images."""

from __future__ import annotations

import builtins
import json
import signal
import sys

import pytest
import torch
from test_train import run  # noqa: F401 - a fixture

from ecos_pl import extras
from ecos_pl.classifier import Classifier
from ecos_pl.compressed_files import FILES
from ecos_pl.losses import distillation
from ecos_pl.model_file import load_model, save_model
from ecos_pl.model_size import parameter_count
from ecos_pl.modules.compression import CompressionModule
from ecos_pl.onnx_run import open_session, scores_of
from ecos_pl.pruning import channel_groups, narrowed

pytest.importorskip("torch_pruning")
pytest.importorskip("onnxruntime")
SIZE = 32
_NOT_HERE = ("task.backbone", "task.image_size")  # options of other tasks that the fixture sets


def classifier(classes=("horizontal", "vertical"), seed=3, size=SIZE):
    made = Classifier.create(
        classes, backbone="resnet10t", weights="random", image_size=size, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    head = made.net.get_classifier()
    torch.nn.init.normal_(head.weight, generator=generator)
    return made.eval()


@pytest.fixture
def compress(run, tmp_path, monkeypatch):  # noqa: F811
    """Call train.main on task=compression; returns (status, summary, stdout, stderr)."""
    import test_train

    small = [text for text in test_train.SMALL if text.partition("=")[0] not in _NOT_HERE]
    small.remove("task.weights=random")
    monkeypatch.setattr(test_train, "SMALL", small)
    save_model(tmp_path / "teacher.safetensors", classifier())

    def call(*overrides):
        given = [f"task.teacher={tmp_path}/teacher.safetensors", "task.calibration=minmax"]
        given += ["task.num_prunings=2", "task.epochs_between=1", "labels=public"]
        return run("task=compression", *given, *overrides)

    return call


def weights_in(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_a_run_leaves_files_that_agree_with_its_summary(compress, tmp_path, image_tree):
    status, summary, out, err = compress()
    assert status == 0, err
    folder, found = tmp_path / "run", summary["compression"]
    assert {*FILES, "CARD.md", "summary.json"} <= {path.name for path in folder.iterdir()}
    assert found["target"]["name"] == "sparsity"
    assert 0.75 <= found["target"]["reached"] < 0.8
    assert found["size_ratio"] > 8
    assert found["latency_ratio"] > 0
    assert found["accuracy_drop"] == pytest.approx(
        found["teacher"]["accuracy"] - found["student"]["accuracy"]
    )
    model = load_model(folder / "model.safetensors")
    assert parameter_count(model.net) == found["student"]["parameters"]
    assert found["student"]["float_accuracy"] == pytest.approx(
        summary["simulation"]["test_accuracy"]
    )
    images = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():
        wanted = model(images)
    assert torch.allclose(scores_of(open_session(folder / "model.onnx"), images), wanted, atol=1e-3)
    assert max(map(len, out.splitlines())) <= 80
    assert "smaller (int8 ONNX" in " ".join(out.split())
    assert not any(key.startswith("_teacher") or "teacher" in key for key in weights_in(folder))


def test_the_same_command_again_redoes_nothing(compress, tmp_path):
    _, first, _, _ = compress()
    before = (tmp_path / "run" / "model.int8.onnx").stat().st_mtime_ns
    status, second, _, _ = compress()
    assert status == 0
    assert second["compression"] == first["compression"]
    assert (tmp_path / "run" / "model.int8.onnx").stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("where", ["between epochs", "within an epoch"])
def test_a_run_stopped_after_a_pruning_goes_on_as_if_it_had_not(
    compress, tmp_path, monkeypatch, where
):
    epochs = "trainer.max_epochs=3"
    status, _, _, err = compress(epochs, "run_id=whole")
    assert status == 0, err
    steps = CompressionModule.training_step

    def stop(module, batch, batch_idx):
        if where == "between epochs" and module.current_epoch == 2:
            raise KeyboardInterrupt
        if where == "within an epoch" and (module.current_epoch, batch_idx) == (1, 1):
            signal.raise_signal(signal.SIGTERM)
        return steps(module, batch, batch_idx)

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(CompressionModule, "training_step", stop)
        try:
            status, summary, _, _ = compress(epochs)
        finally:
            signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert status in (130, 143)
    assert summary is None
    status, summary, _, err = compress(epochs)
    assert status == 0, err
    one, other = weights_in(tmp_path / "whole"), weights_in(tmp_path / "run")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.teacher=/nowhere"], "task.teacher: /nowhere cannot be read as a delivered model"),
        (["task.target.macs=10"], "task.target.macs=10 is out of reach of resnet10t"),
        (["task.target.macs=1e6", "task.target.size_mb=1"], "are two targets"),
        (["trainer.max_epochs=1"], "ends before the last pruning"),
        (["trainer.max_steps=1"], "training ended after 1 of 2 prunings"),
        (["trainer.devices=2"], "trains on one device"),
        (["task.target.size_md=1"], "did you mean task.target.size_mb"),
        (["task.ema_decay=0.9"], "is an option of task=self_labeling"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(compress, tmp_path, overrides, words):
    teacher = (tmp_path / "teacher.safetensors").read_bytes()
    status, _, _, err = compress(*overrides)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1, err
    assert (tmp_path / "teacher.safetensors").read_bytes() == teacher


def test_a_teacher_of_other_classes_or_size_is_refused(compress, tmp_path):
    save_model(tmp_path / "teacher.safetensors", classifier(("cat", "dog")))
    status, _, _, err = compress()
    assert (status, err.count("\n")) == (2, 1)
    assert "task.teacher: that model tells cat, dog apart, the client horizontal, vertical" in err
    save_model(tmp_path / "teacher.safetensors", classifier())
    save_model(tmp_path / "other.safetensors", classifier(size=64))
    other = f"task.weights={tmp_path}/other.safetensors"
    status, _, _, err = compress(other, "run_id=other")
    assert (status, err.count("\n")) == (2, 1)
    assert "task.weights: that model sees 64 px, the teacher 32" in err


def test_a_run_does_not_go_on_with_another_teacher(compress, tmp_path):
    assert compress()[0] == 0
    save_model(tmp_path / "teacher.safetensors", classifier(seed=4))
    status, _, _, err = compress()
    assert (status, err.count("\n")) == (2, 1)
    assert "is not the file that" in err


def test_a_missing_package_is_one_line(compress, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "torch_pruning":
            raise ModuleNotFoundError("No module named 'torch_pruning'", name="torch_pruning")
        return real(name, *args, **kwargs)

    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.setattr(builtins, "__import__", without)
    status, _, _, err = compress()
    assert (status, err.count("\n")) == (2, 1)
    assert 'torch-pruning: pip install -e ".[compress]"' in err
    assert "torch_pruning" in extras.MODULES["compress"]


def test_fast_dev_run_tries_everything_and_leaves_no_file(compress, tmp_path):
    status, summary, out, err = compress("trainer.fast_dev_run=true")
    assert status == 0, err
    assert summary is None
    assert "int8 accuracy" in out
    assert not list((tmp_path / "run").glob("*"))


@pytest.mark.slow
def test_compiled_it_is_still_pruned(compress, monkeypatch):
    """Traced anew after every pruning; without code generation, which takes minutes on a CPU."""
    made, real = [], torch.compile

    def traced(function):
        made.append(function)
        return real(function, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    status, summary, _, err = compress("task.compile=true")
    assert status == 0, err
    found = summary["compression"]
    assert found["student"]["parameters"] < 0.5 * found["teacher"]["parameters"]
    assert len(made) == 2  # as many prunings


@pytest.mark.slow
def test_bf16_and_a_compressed_model_as_the_start(compress, tmp_path):
    assert compress("trainer.precision=bf16-mixed")[0] == 0
    first = tmp_path / "run" / "model.safetensors"
    status, summary, _, err = compress(f"task.weights={first}", "run_id=again")
    assert status == 0, err
    found = summary["compression"]
    assert found["student"]["parameters"] < 0.3 * parameter_count(load_model(first).net)
    assert json.loads((tmp_path / "again" / "pruning_plan.json").read_text())["keep"] < 1


# --- the module alone ----------------------------------------------------------------------------


def test_the_teacher_is_no_part_of_the_module():
    teacher = classifier()
    module = CompressionModule(classifier(), teacher, keep=0.5)
    module.train()
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert module.model.training
    names = {name for name, _ in module.named_parameters()}
    assert names == {f"model.{name}" for name, _ in module.model.named_parameters()}


def test_a_loaded_checkpoint_brings_its_channels_before_its_weights():
    module = CompressionModule(classifier(), classifier(), keep=0.5, num_prunings=2)
    full = channel_groups(module.model)
    from ecos_pl.pruning import prune

    prune(module.model, narrowed(full, 0.5**0.5), {})
    module.num_pruned = 1
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other = CompressionModule(classifier(), classifier(), keep=0.5, num_prunings=2)
    other.on_load_checkpoint(checkpoint)
    other.load_state_dict(checkpoint["state_dict"])
    assert other.num_pruned == 1
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(other.eval()(images), module.eval()(images))


def test_a_model_that_is_its_teacher_has_nothing_to_learn_and_channels_to_compare():
    """Its distillation loss has no gradient, so importance comes from labels."""
    module = CompressionModule(classifier(), classifier(), keep=0.5).eval()
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)
    loss = distillation(module(images), module.teacher(images), torch.ones(4), temperature=4)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    gradients = [p.grad.abs().max().item() for p in module.parameters() if p.grad is not None]
    assert max(gradients) < 1e-4
