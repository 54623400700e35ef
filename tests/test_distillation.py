"""Distillation end to end: what is learned, kept, resumed and refused."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from job_processes import nursery_in

import train
from datamodules.folder import folder_data
from datamodules.proxy import ProxySamplingDataModule, TrainingView
from ecos_pl.classifier import Classifier
from ecos_pl.encoder import EncoderSpec
from ecos_pl.labeling import NoLabels
from ecos_pl.losses import distillation, soft_cross_entropy
from ecos_pl.model_file import load_model, save_model
from ecos_pl.modules.distillation import DistillationModule
from ecos_pl.modules.self_labeling import SelfLabelingModule
from ecos_pl.probe import ProbePlan
from ecos_pl.teacher import FrozenTeacher, resized

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
    "labels=none",
    "task=distillation",
    "task.backbone=test_efficientnet",
    "task.image_size=24",
    "task.batch_size=16",
    "task.num_workers=0",
    "task.ema_decay=0.9",
    "task.teacher_backbone=test_efficientnet",
    "task.teacher_weights=random",
    "task.teacher_image_size=32",
    "task.teacher_batch_size=16",
    "task.teacher_steps=9",  # 6 an epoch
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "logger=none",
]
NUM_BATCHES = 3  # 54 of the 60 images train


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(image_tree, tmp_path, cache, capsys, caplog, monkeypatch):
    """Call train.main, signalled at some steps; (status, summary, stderr). The probe is shared."""

    def call(*overrides, stop_at=(), of=DistillationModule, cache=cache):
        steps = []
        step = of.training_step

        def watched(module, batch, batch_idx):
            if len(steps) in stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            steps.append(batch_idx)
            return step(module, batch, batch_idx)

        data = ["data=folder", f"data.pool={image_tree}/pool", f"data.client={image_tree}/client"]
        argv = [*SMALL, *data, "data.client_domain=bars", f"probe.cache_dir={cache}"]
        argv += [f"run_root={tmp_path}", "run_id=run", *overrides]
        with monkeypatch.context() as patch:
            patch.setattr(of, "training_step", watched)
            status = train.main(argv)
        run_id = dict(text.split("=", 1) for text in argv)["run_id"]
        path = tmp_path / run_id / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else None
        err = capsys.readouterr().err + caplog.text
        caplog.clear()
        return status, summary, err

    return call


def test_a_student_of_a_public_teacher_costs_the_counts_alone(run, tmp_path):
    cache = tmp_path / "cache"
    status, summary, err = run(cache=cache)
    assert status == 0, err
    assert "training the teacher" in err
    assert summary["privacy"]["epsilon"] == pytest.approx(2.02, abs=0.01)  # of noise 2
    assert summary["communication"]["round_trips"] == 1
    assert summary["simulation"]["label_accuracy"] is None
    student, teacher = summary["model"], summary["teacher"]
    assert (student["image_size"], teacher["image_size"]) == (24, 32)
    assert student["parameters"] == teacher["parameters"] > 0
    assert 0 < student["macs"] < teacher["macs"]
    assert student["latency_ms"] > 0
    assert student["size_mb"] > 0
    assert 0 <= teacher["test_accuracy"] <= 1
    delivered = load_model(tmp_path / "run/model.safetensors")
    assert delivered.classes == ["horizontal", "vertical"]
    # Trained once: the next run of whatever seed finds it.
    (kept,) = cache.glob("teachers/*/model.safetensors")
    assert not (kept.parent / "checkpoints").exists()
    before = kept.stat().st_mtime_ns
    status, _, err = run("run_id=other", "seed=2", "trainer.max_epochs=1", cache=cache)
    assert status == 0
    assert "training the teacher" not in err
    assert kept.stat().st_mtime_ns == before


def test_the_teacher_is_in_no_checkpoint_and_in_no_average(run, tmp_path):
    status, _, err = run("task.feature_weight=0.5", "trainer.max_epochs=1")
    assert status == 0, err
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    net = load_model(tmp_path / "run/model.safetensors").net.state_dict()
    student = {f"model.net.{name}" for name in net}
    projector = {"projector.weight", "projector.bias"}
    for state in (last["state_dict"], last["current_model_state"]):
        assert {name for name in state if not name.startswith("scores.")} == student | projector
    num_trained = sum(len(group["params"]) for group in last["optimizer_states"][0]["param_groups"])
    weights = load_model(tmp_path / "run/model.safetensors").net.parameters()
    assert num_trained == len(list(weights)) + 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["trainer.precision=bf16-mixed", "task.num_views=2"],
        ["labels=public", "task.label_weight=0.5", "task.augment=none"],
        ["train_on=client"],
        ["selection.strategy=random", "task.ema_decay=null", "task.val_fraction=0"],
    ],
)
def test_the_other_ways_to_distil(run, overrides):
    status, summary, err = run(*overrides, "trainer.max_epochs=1")
    assert status == 0, err
    assert summary["simulation"]["test_accuracy"] is not None


@pytest.mark.slow
def test_compiled(run):
    status, summary, err = run("task.compile=true", "task.feature_weight=1", "trainer.max_epochs=1")
    assert status == 0, err
    assert summary["simulation"]["test_accuracy"] is not None


def test_a_dry_run_trains_a_teacher_too_and_leaves_nothing(run, tmp_path):
    status, summary, err = run("trainer.fast_dev_run=true", cache=tmp_path / "cache")
    assert status == 0, err
    assert summary is None
    assert not list((tmp_path / "run").glob("*"))
    assert not list(tmp_path.glob("cache/teachers/*/*"))


def test_a_stopped_distillation_goes_on_with_the_next_batch(run, tmp_path):
    """With averaged weights and fixed views."""
    how = ["task.num_views=2"]
    status, whole, err = run("run_id=whole", *how)
    assert status == 0, err
    for stop in (1, 3):
        status, _, err = run("run_id=stopped", *how, stop_at=[stop])
        assert status == 143
    status, stopped, _ = run("run_id=stopped", *how)
    assert status == 0
    assert stopped["simulation"] == whole["simulation"]
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_stopped_teacher_goes_on_too(run, tmp_path):
    trees = [tmp_path / "one", tmp_path / "two"]
    status, _, err = run("run_id=one", "trainer.max_epochs=1", cache=trees[0])
    assert status == 0, err
    for stop in (2, 5):
        status, _, err = run(
            "run_id=two", "trainer.max_epochs=1", cache=trees[1], stop_at=[stop],
            of=SelfLabelingModule,
        )  # fmt: skip
        assert status == 143
        assert "stopped by SIGTERM; the same command goes on from here\n" in err
        assert list(trees[1].glob("teachers/*/checkpoints/stopped.ckpt"))
    status, _, err = run("run_id=two", "trainer.max_epochs=1", cache=trees[1])
    assert status == 0, err
    files = [next(tree.glob("teachers/*/model.safetensors")) for tree in trees]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_two_processes_share_one_teacher_and_its_answers(image_tree, tmp_path):
    data = ["data=folder", f"data.pool={image_tree}/pool", f"data.client={image_tree}/client"]
    argv = [*SMALL, *data, f"run_root={tmp_path}", "run_id=run", "task.batch_size=8"]
    argv += ["trainer.strategy=ddp", "trainer.devices=2", "task.num_views=2"]
    with nursery_in(tmp_path) as nursery:
        jobs = nursery.ranks([*argv, "trainer.enable_progress_bar=false"])
        assert [job.wait() for job in jobs] == [0, 0], [job.text() for job in jobs]
        said = "".join(job.text() for job in jobs)
    assert said.count("training the teacher") == 1
    assert len(list(tmp_path.glob("cache/teachers/*/model.safetensors"))) == 1
    assert len(list(tmp_path.glob("cache/teacher_logits/*/view-*.safetensors"))) == 2
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["teacher"]["test_accuracy"] is not None


# --- what is refused -----------------------------------------------------------------------------


def test_a_teacher_of_other_classes_is_one_line_and_nothing_is_lost(run, tmp_path):
    assert run("trainer.max_epochs=1")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = Classifier.create(
        ["cat", "dog"], backbone="test_efficientnet", weights="random", image_size=32
    )
    save_model(tmp_path / "other.safetensors", other)
    for run_id in ("run", "new"):
        where = [f"run_id={run_id}", f"task.teacher={tmp_path}/other.safetensors"]
        status, _, err = run(*where, "trainer.max_epochs=1")
        assert status == 2
        assert err.count("\n") == 1
    assert "2: cat, dog" in err
    assert "2: horizontal, vertical" in err
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["task.teacher=/nowhere.safetensors"], "task.teacher: /nowhere.safetensors"),
        (["task.teacher=timm"], "a random teacher knows nothing"),
        (["task=self_labeling", "labels=none"], "labels=none leaves task=self_labeling nothing"),
        (["task.temperature=0"], "task.temperature"),
    ],
)
def test_a_mistake_is_one_line(image_tree, tmp_path, capsys, overrides, words):
    data = ["data=folder", f"data.pool={image_tree}/pool", f"data.client={image_tree}/client"]
    if "task=self_labeling" not in overrides:
        overrides = ["task=distillation", "task.teacher_weights=random", "labels=none", *overrides]
    assert train.main([*data, f"run_root={tmp_path}", *overrides]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_pool_that_does_not_label_a_class_has_no_public_teacher(run, image_tree, tmp_path):
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/vertical").symlink_to(image_tree / "pool/bars/vertical")
    status, _, err = run(f"data.pool={tmp_path}/pool", "data.client_domain=null")
    assert status == 2
    assert "labels no image as horizontal (it labels: vertical)" in err
    assert err.count("\n") == 1


def test_labels_that_nobody_uses_are_pointed_out(run):
    _, _, err = run("labels=client_prototypes", "labels.num_dims=6", "labels.num_views=1",
                    "trainer.max_epochs=1")  # fmt: skip
    assert "labels=client_prototypes spends privacy on labels that task.label_weight=0" in err
    _, _, err = run("task.label_weight=1", "run_id=none", "trainer.max_epochs=1")
    assert "task.label_weight=1 adds nothing with labels=none" in err


# --- the module ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    return FrozenTeacher(network(32, 1))


def network(image_size, seed):
    model = Classifier.create(
        ["a", "b", "c"],
        backbone="test_efficientnet",
        weights="random",
        image_size=image_size,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(model.net.get_classifier().weight, generator=generator)
    return model


def batch_of(teacher=None, label_weights=(0.0, 1.0, 0.5)):
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator)
    logits = teacher(images)[0] if teacher else torch.empty(3, 0)
    return images, torch.eye(3), torch.tensor(label_weights), torch.tensor([1.0, 1.0, 0.0]), logits


def loss_of(module, batch):
    module.log = lambda *args, **options: None
    module.eval()  # batch statistics would be updated
    return module.training_step(batch, 0)


def test_the_loss_is_the_weighted_sum_of_its_parts(teacher):
    student = network(24, 2)
    module = DistillationModule(
        student, teacher, temperature=3.0, distillation_weight=0.7, label_weight=0.4
    )
    batch = images, targets, label_weights, weights, _ = batch_of()
    logits = student.eval()(resized(images, 24))
    kd = distillation(logits, teacher(images)[0], weights, temperature=3.0)
    labelled = soft_cross_entropy(logits, targets, label_weights)
    assert torch.allclose(loss_of(module, batch), 0.7 * kd + 0.4 * labelled)


def test_kept_answers_give_the_same_loss_as_the_teacher(teacher):
    module = DistillationModule(network(24, 2), teacher)
    losses = [loss_of(module, batch_of(kept)) for kept in (None, teacher)]
    assert torch.allclose(*losses)


@pytest.mark.parametrize("label_weight", [0.0, 1.0])
def test_without_labels_the_distillation_loss_is_what_it_was(teacher, label_weight):
    module = DistillationModule(network(24, 2), teacher, temperature=4.0, label_weight=label_weight)
    alone = DistillationModule(network(24, 2), teacher, temperature=4.0)
    unlabelled = batch_of(label_weights=(0.0, 0.0, 0.0))
    assert torch.allclose(loss_of(module, unlabelled), loss_of(alone, unlabelled))
    assert float(loss_of(alone, unlabelled).detach()) > 0


# --- the datamodule ------------------------------------------------------------------------------


def test_unlabelled_images_train_and_fixed_views_bring_the_teachers_answers(
    image_tree, tmp_path, monkeypatch
):
    scenario = folder_data(image_tree / "pool", image_tree / "client", client_domain="bars")
    plan = ProbePlan(
        encoder=EncoderSpec("test_efficientnet", "random", 32),
        num_clusters=8,
        num_dims=8,
        size=60,
        duplicate_distance=0.0,
        noise_std=1.0,
        max_epsilon=9.0,
    )
    model = network(32, 1)
    teacher = FrozenTeacher(model)

    def made(**view):
        datamodule = ProxySamplingDataModule(
            scenario,
            plan,
            NoLabels(scenario.classes),
            TrainingView(image_size=24, batch_size=9, **view),
            run_root=tmp_path,
            embed_workers=0,
            teacher=teacher,
        )
        datamodule.setup("fit")
        return datamodule

    for view, cached in (({"augment": "none"}, True), ({"num_views": 2}, True), ({}, False)):
        loader = made(**view).train_dataloader()
        batches = list(loader)
        assert sum(len(batch[0]) for batch in batches) == 54
        for images, _, label_weights, weights, logits in batches:
            assert images.shape[1:] == (3, 32, 32)  # the larger of both sizes
            assert not label_weights.any()
            assert weights.all()
            assert logits.shape == (9, 3 if cached else 0)
            if cached:
                assert torch.allclose(teacher(images)[0], logits, atol=1e-3)
    held_out = made(augment="none").val_dataloader()
    assert sum(len(batch[0]) for batch in held_out) == 6
