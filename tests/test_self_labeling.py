"""The methods of task=self_labeling: what each trains on, where each goes on after a stop."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

import train
from ecos_pl.classifier import Classifier
from ecos_pl.modules.self_labeling import SelfLabelingModule
from ecos_pl.run_folder import newest_checkpoint

SMALL = [
    "encoder.name=test_efficientnet",
    "encoder.weights=random",
    "encoder.image_size=32",
    "encoder.num_workers=0",
    "probe.num_clusters=8",
    "probe.num_dims=8",
    "privacy.noise_std=2",
    "privacy.max_epsilon=6",
    "selection.size=60",
    "selection.duplicate_distance=0",
    "task.backbone=test_efficientnet",
    "task.weights=random",
    "task.image_size=32",
    "task.batch_size=8",
    "task.num_workers=0",
    "task.learning_rate=3e-3",
    "task.unlabeled_ratio=3",
    "task.consistency_threshold=0.6",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "logger=none",
]
LABELS = ["labels.num_dims=6", "labels.num_views=1"]
FLEXMATCH = ["task.method=flexmatch", "task.distribution_alignment=true", "task.class_balance=0.5"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """All runs here share one probe."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def job(image_tree, cache, tmp_path, monkeypatch, capsys):
    """Run train.main in this process, stopped at some training step; (status, stderr)."""
    data = ["data=folder", f"data.pool={image_tree}/pool", f"data.client={image_tree}/client"]
    count = torch.get_num_threads()
    torch.set_num_threads(1)

    def call(run_id, *overrides, stop_at=-1):
        seen = []
        step = SelfLabelingModule.training_step

        def watched(module, batch, batch_idx):
            if len(seen) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(batch_idx)
            return step(module, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(SelfLabelingModule, "training_step", watched)
            labels = [] if "labels=public" in overrides else LABELS
            argv = [*SMALL, *labels, *data, f"run_root={tmp_path}", f"run_id={run_id}"]
            argv += [f"probe.cache_dir={cache}", *overrides]
            status = train.main(argv)
        return status, capsys.readouterr().err

    yield call
    torch.set_num_threads(count)


def newest(folder):
    return torch.load(newest_checkpoint(folder), weights_only=True)


@pytest.mark.parametrize(
    "overrides",
    [["task.method=supervised"], ["task.method=fixmatch"], FLEXMATCH],
    ids=["supervised", "fixmatch", "flexmatch"],
)
def test_a_stopped_run_ends_as_an_undisturbed_one(job, tmp_path, overrides):
    assert job("whole", *overrides) == (0, "")
    for stop in (4, 3):  # in the middle of the first and of the second epoch
        status, err = job("stopped", *overrides, stop_at=stop)
        assert status == 143, err
    assert job("stopped", *overrides) == (0, "")
    folders = [tmp_path / name for name in ("whole", "stopped")]
    models = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert models[0] == models[1]
    whole, stopped = (newest(folder) for folder in folders)
    assert whole["global_step"] == stopped["global_step"]
    if overrides is FLEXMATCH:
        assert set(whole["pseudo_labels"]) == {"record", "means"}
        for name, tensor in whole["pseudo_labels"].items():
            assert torch.equal(tensor, stopped["pseudo_labels"][name]), name
        assert len(whole["pseudo_labels"]["means"]) == whole["global_step"]
        assert (whole["pseudo_labels"]["record"] >= 0).any()
    results = [json.loads((f / "summary.json").read_text())["simulation"] for f in folders]
    assert results[0] == results[1]


def test_what_is_remembered_matters(job, tmp_path):
    """The test above could not fail if a forgotten memory trained the same model."""
    job("whole", *FLEXMATCH)
    job("stopped", *FLEXMATCH, stop_at=7)
    path = tmp_path / "stopped/checkpoints/stopped.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["pseudo_labels"]
    torch.save(checkpoint, path)
    job("stopped", *FLEXMATCH)
    models = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "stopped")]
    assert models[0] != models[1]


@pytest.mark.parametrize(
    "overrides",
    [
        [
            "task.method=flexmatch",
            "task.distribution_alignment=true",
            "trainer.precision=bf16-mixed",
        ],
        ["task.freeze_backbone=true", "trainer.precision=bf16-mixed"],
        ["task.method=fixmatch", "task.ema_decay=null", "labels=public"],
        ["task.method=flexmatch", "trainer.fast_dev_run=true"],
    ],
)
def test_it_runs(job, overrides):
    assert job("run", *overrides, "trainer.max_epochs=1") == (0, "")


def test_images_that_nobody_has_labelled_are_learned_from(job, tmp_path, monkeypatch):
    """The chosen ones among them, but none that was found to be of no class of the client's."""
    step = SelfLabelingModule.training_step
    seen = set()

    def watched(module, batch, batch_idx):
        assert (batch["labelled"][2] > 0).all()
        seen.update(batch["unlabelled"][2].tolist())
        data = module.trainer.datamodule
        result = data.probe_result
        unlabelled = set(result.unlabeled.tolist())
        assert len(unlabelled & set(result.indices.tolist())) == 20
        assert data.num_unlabeled == len(unlabelled)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(SelfLabelingModule, "training_step", watched)
    overrides = ["labels=public", "labels.num_images=40", "task.method=flexmatch"]
    assert job("run", *overrides, "trainer.max_epochs=2") == (0, "")
    record = newest(tmp_path / "run")["pseudo_labels"]["record"]
    assert seen <= set(range(len(record)))


def test_pseudo_labels_of_the_averaged_weights(job, tmp_path, monkeypatch):
    """They are those of the model that is delivered, not of the one that is trained."""
    found = []
    consistency = SelfLabelingModule._consistency

    def watched(module, weak_logits, strong_logits, rows):
        found.append(weak_logits)
        return consistency(module, weak_logits, strong_logits, rows)

    monkeypatch.setattr(SelfLabelingModule, "_consistency", watched)
    overrides = ["task.method=fixmatch", "trainer.max_epochs=2", "task.ema_decay=0.9"]
    assert job("own", *overrides) == (0, "")
    own, found[:] = found[:], []
    assert job("average", *overrides, "task.pseudo_labels_from=average") == (0, "")
    assert len(own) == len(found)
    assert not found[0].requires_grad
    assert not any(torch.equal(a, b) for a, b in zip(own[1:], found[1:], strict=True))
    keys = newest(tmp_path / "average")["state_dict"].keys()
    assert keys == newest(tmp_path / "own")["state_dict"].keys()  # no teacher in it
    status, err = job("no", *overrides, "task.pseudo_labels_from=average", "task.ema_decay=null")
    assert (status, err.count("\n")) == (2, 1)
    assert "task.ema_decay" in err


def test_a_client_alone_has_no_unlabelled_images(job):
    status, err = job("run", "train_on=client", "task.method=fixmatch")
    assert status == 2
    assert err == (
        "train.py: task.method=fixmatch needs unlabelled images, and train_on=client has none\n"
    )


def test_a_frozen_backbone_stays_what_it_was(job, tmp_path):
    frozen = ["train_on=client", "task.freeze_backbone=true"]
    assert job("run", *frozen) == (0, "")
    model = Classifier.create(
        ["horizontal", "vertical"],
        backbone="test_efficientnet",
        weights="random",
        image_size=32,
        seed=1,
    )
    after = {
        k.removeprefix("model.net."): v for k, v in newest(tmp_path / "run")["state_dict"].items()
    }
    changed = {k for k, v in model.net.state_dict().items() if not torch.equal(v, after[k])}
    assert changed == {"classifier.weight", "classifier.bias"}


def small_classifier():
    return Classifier.create("abc", backbone="test_efficientnet", weights="random", image_size=32)


def test_a_backbone_without_a_linear_head_cannot_be_frozen(monkeypatch):
    model = small_classifier()
    monkeypatch.setattr(model.net, "get_classifier", lambda: torch.nn.Identity())
    with pytest.raises(ValueError, match="test_efficientnet has no linear head"):
        model.freeze_backbone()


@pytest.mark.parametrize("method", ["supervised", "fixmatch"])
def test_the_option_reaches_the_training_pass(job, tmp_path, monkeypatch, method):
    """Compiled or not, the same model comes out; nothing but training steps is compiled."""
    passes = []

    def compiled(function):
        def call(images):
            passes.append(torch.is_grad_enabled())
            return function(images)

        return call

    overrides = [f"task.method={method}", "trainer.max_epochs=1"]
    assert job("plain", *overrides) == (0, "")
    monkeypatch.setattr(torch, "compile", compiled)
    assert job("compiled", *overrides, "task.compile=true") == (0, "")
    steps = newest(tmp_path / "compiled")["global_step"]
    assert passes == [True] * (steps + 1)  # and the trial
    models = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "compiled")
    ]
    assert models[0] == models[1]


def test_flexmatch_without_unlabelled_images_is_supervised(job, tmp_path):
    """Where every image of the pool has a label of its own, there is nothing to add."""
    overrides = ["selection.strategy=all", "trainer.max_epochs=1"]
    for method in ("supervised", "flexmatch"):
        assert job(method, *overrides, f"task.method={method}") == (0, "")
    models = [
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("supervised", "flexmatch")
    ]
    assert models[0] == models[1]
