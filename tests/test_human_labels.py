"""labels=human end to end through train.main: job, labels, training, resume, later labels."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from job_processes import nursery_in
from test_train import SMALL

import train
from datamodules.from_config import training_view
from ecos_pl.modules.from_config import method_of
from ecos_pl.proxy_set import ProxySet
from ecos_pl.run_folder import run_folder


@pytest.fixture
def run(image_tree, tmp_path, capsys, caplog):
    """Call train.main with labels=human on the small tree."""

    def call(*overrides, run_id="run"):
        data = ["data=folder", f"data.pool={image_tree}/pool", f"data.client={image_tree}/client"]
        argv = [*SMALL, *data, "data.client_domain=bars", f"run_root={tmp_path}", "labels=human"]
        argv += [f"run_id={run_id}", "labels.batch_size=8", "task.unlabeled_ratio=1", "logger=none"]
        caplog.clear()
        argv += ["trainer.limit_train_batches=2", "trainer.max_epochs=1"]
        status = train.main([*argv, *overrides])
        out, err = capsys.readouterr()
        summary = tmp_path / run_id / "summary.json"
        return SimpleNamespace(
            status=status,
            out=out,
            err=err,
            said=[record.getMessage() for record in caplog.records],
            summary=json.loads(summary.read_text()) if summary.exists() else None,
            folder=tmp_path / run_id,
            job=tmp_path / run_id / "annotation",
        )

    return call


def fill(job, num):
    """Label the first images of the job's table as an attentive annotator would."""
    with (job / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows[:num]:
        name = row["image_id"].split("/")[1]
        row["label"] = name if name in ("vertical", "horizontal") else "other"
    with (job / "labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows[:num]


def epoch_of(run):
    return torch.load(run.folder / "checkpoints/last.ckpt", weights_only=True)["epoch"]


@pytest.mark.slow
def test_from_job_to_labels_to_training_to_resume(run, tmp_path):
    first = run("labels.annotators=2", "labels.price_per_label=0.1")
    assert (first.status, first.summary, first.err) == (0, None, "")
    assert "60 images in 8 batches" in first.out
    assert "60 images × 2 annotators × 0.1 = 12.00" in first.out
    assert "ε = " in first.out
    assert str(first.job) in first.out
    assert max(len(line) for line in first.out.splitlines() if str(tmp_path) not in line) <= 80
    assert not list(first.folder.glob("checkpoints/*"))
    before = {path: path.read_bytes() for path in first.job.rglob("*") if path.is_file()}
    assert run().status == 0  # nothing new, nothing touched, though the price may be another
    assert before == {path: path.read_bytes() for path in first.job.rglob("*") if path.is_file()}

    rows = fill(first.job, 41)
    clients = sorted((tmp_path / "clients").rglob("*"))
    trained = run()
    assert trained.status == 0, trained.err
    labelled = {row["image_id"] for row in rows if row["label"] != "other"}
    line = f"labels: {len(labelled)} of 60 images, 1.0 annotator each, {41 - len(labelled)} 'other'"
    assert any(text.startswith(line) for text in trained.said)
    assert sorted((tmp_path / "clients").rglob("*")) == clients  # nobody was asked again
    assert trained.summary["proxy"]["from_disk"]
    assert trained.summary["proxy"]["num_labelled"] == len(labelled)
    assert trained.summary["simulation"]["label_accuracy"] == 1
    proxy_set = ProxySet.load(trained.folder)
    weights = zip(proxy_set.ids, proxy_set.weights.tolist(), strict=True)
    assert {name for name, weight in weights if weight} == labelled
    assert proxy_set.label_source == "human"
    assert proxy_set.provenance["labels"]["num_answers"] == 41
    assert epoch_of(trained) == 0
    resumed = run("trainer.max_epochs=2")
    assert resumed.status == 0, resumed.err
    assert epoch_of(resumed) == 1


@pytest.mark.slow
def test_later_labels_are_another_training_of_the_same_proxy_set(run):
    job = run().job
    fill(job, 24)
    first = run()
    kept = (first.folder / "model.safetensors").read_bytes()
    fill(job, 48)
    refused = run()
    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert "holds a training with other labels" in refused.err
    assert f"labels.returned={job}" in refused.err
    assert (first.folder / "model.safetensors").read_bytes() == kept
    other = run(f"labels.returned={job}", run_id="more")
    assert other.status == 0, other.err
    assert not other.job.exists()
    assert other.summary["proxy"]["fingerprint"] == first.summary["proxy"]["fingerprint"]
    assert other.summary["proxy"]["num_labelled"] > first.summary["proxy"]["num_labelled"]
    for checkpoint in first.folder.glob("checkpoints/*"):
        checkpoint.unlink()
    anew = run()
    assert anew.status == 0, anew.err
    assert anew.summary["proxy"]["num_labelled"] == other.summary["proxy"]["num_labelled"]


@pytest.mark.slow
def test_fast_dev_run_writes_no_job_but_tries_labels(run, tmp_path):
    trial = run("trainer.fast_dev_run=true", run_id="trial")
    assert trial.status == 2
    assert "fast_dev_run writes no annotation job" in trial.err
    fill(run().job, 30)
    returned = f"labels.returned={tmp_path}/run/annotation/labels.csv"
    trial = run("trainer.fast_dev_run=true", returned, run_id="trial")
    assert trial.status == 0, trial.err
    assert not list(trial.folder.glob("*"))


def test_unlabelled_images_are_learned_from_with_people_unless_told_otherwise():
    for argv, method, ratio in (
        (["labels=human"], "fixmatch", 2),
        (["labels=human", "task.method=supervised"], "supervised", 0),
        (["labels=public", "task.method=flexmatch", "task.unlabeled_ratio=1"], "flexmatch", 1),
        ([], "supervised", 0),
    ):
        config = train.load_config(argv, config_dir=train.CONFIG_DIR)
        assert method_of(config) == method
        assert training_view(config).unlabeled_ratio == ratio


def test_what_is_about_the_job_alone_leaves_the_run_its_name(tmp_path):
    def name(*overrides):
        argv = ["labels=human", f"run_root={tmp_path}", *overrides]
        return run_folder(train.load_config(argv, config_dir=train.CONFIG_DIR)).name

    assert name() == name(
        "labels.returned=x.csv", "labels.annotators=3", "labels.price_per_label=1"
    )
    assert name() != name("labels.num_images=100")


@pytest.mark.slow
def test_two_processes_wait_and_go_on_together(image_tree, tmp_path):
    data = ["data=folder", f"data.pool={image_tree}/pool", f"data.client={image_tree}/client"]
    argv = [*SMALL, *data, "labels=human", f"run_root={tmp_path}", "run_id=run", "logger=none"]
    argv += ["task.unlabeled_ratio=1", "task.batch_size=8", "trainer.max_epochs=1"]
    argv += ["trainer.devices=2", "trainer.strategy=ddp", "trainer.enable_progress_bar=false"]
    with nursery_in(tmp_path) as nursery:
        jobs = nursery.ranks(argv, 2)
        assert [one.wait() for one in jobs] == [0, 0], [one.text() for one in jobs]
        said = [one.text() for one in jobs]
        assert ["awaits its labels" in text for text in said] == [True, False]
        assert "Traceback" not in "".join(said)
        fill(tmp_path / "run/annotation", 40)
        jobs = nursery.ranks(argv, 2)
        assert [one.wait() for one in jobs] == [0, 0], [one.text() for one in jobs]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 < summary["proxy"]["num_labelled"] <= 40
