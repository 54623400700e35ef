"""End to end through train.py, on a few hundred small images."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import train
from ecos_pl.images import read_image, to_tensor
from ecos_pl.model_file import load_model
from ecos_pl.modules.self_labeling import SelfLabelingModule
from ecos_pl.proxy_set import ProxySet

REPOSITORY = Path(train.__file__).parent
SMALL = [
    "encoder.name=mobilenetv3_small_050",
    "encoder.weights=random",
    "encoder.image_size=32",
    "encoder.batch_size=64",
    "encoder.num_workers=0",
    "probe.num_clusters=8",
    "probe.num_dims=8",
    "privacy.noise_std=2",
    "privacy.max_epsilon=6",
    "selection.size=60",
    "selection.duplicate_distance=0",  # untrained, the encoder tells pictures hardly apart
    "task.backbone=mobilenetv3_small_050",
    "task.weights=random",
    "task.image_size=32",
    "task.batch_size=16",
    "task.num_workers=0",
    "task.learning_rate=3e-3",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
]


@pytest.fixture
def run(image_tree, tmp_path, capsys):
    """Call train.main on the small tree; returns (status, summary, stdout, stderr)."""

    def call(*overrides):
        data = ["data=folder", f"data.pool={image_tree}/pool", f"data.client={image_tree}/client"]
        argv = [*SMALL, *data, "data.client_domain=bars", f"run_root={tmp_path}", "run_id=run"]
        if "labels=public" not in overrides:
            argv += ["labels.num_dims=6", "labels.num_views=2"]
        status = train.main([*argv, *overrides])
        run_id = dict(text.split("=") for text in [*argv, *overrides])["run_id"]
        path = tmp_path / run_id / "summary.json"
        out, err = capsys.readouterr()
        return status, json.loads(path.read_text()) if path.exists() else None, out, err

    return call


def test_a_folder_run_leaves_everything_it_should(run, tmp_path):
    status, summary, out, _ = run()
    assert status == 0
    folder = tmp_path / "run"
    assert set(summary) >= {"run_id", "seed", "proxy", "privacy", "communication", "simulation"}
    assert summary["run_id"] == "run"
    assert summary["proxy"]["size"] == 60
    assert summary["proxy"]["num_clusters"] == 8
    assert 0 < summary["proxy"]["kept_clusters"] <= 8
    assert 5.8 < summary["privacy"]["epsilon"] <= 6
    assert summary["privacy"]["relation"] == "add/remove"
    assert summary["communication"]["round_trips"] == 2
    assert summary["communication"]["bytes_down"] > summary["communication"]["bytes_up"] > 0
    assert summary["simulation"]["purity"] > 0.7
    assert 0 <= summary["simulation"]["test_accuracy"] <= 1
    by_class = summary["simulation"]["class_accuracy"]  # as many test images of each
    assert set(by_class) == {"horizontal", "vertical"}
    mean = sum(by_class.values()) / 2
    assert mean == pytest.approx(summary["simulation"]["test_accuracy"], abs=1e-5)
    quality = summary["simulation"]["quality"]
    assert quality["purity"]["proxy_set"] == summary["simulation"]["purity"]
    assert quality["client_distance"]["proxy_set"] < quality["client_distance"]["random"]
    assert set(summary["quality"]["cluster_entropy"]) == {"proxy_set", "random"}
    wanted = {"embed", "cluster", "ask", "select", "label", "fit", "test", "total"}
    assert wanted <= set(summary["seconds"])
    for name in ("coverage", "chosen", "random", "training"):
        assert (folder / "figures" / f"{name}.png").stat().st_size > 5000
    proxy_set = ProxySet.load(folder)
    assert len(proxy_set) == 60
    assert proxy_set.provenance["strategy"] == "ecos"
    assert yaml.safe_load((folder / "config.yaml").read_text())["selection"]["size"] == 60
    with (folder / "metrics/version_0/metrics.csv").open() as file:
        columns = next(csv.reader(file))
    assert {"val/accuracy", "simulation/purity", "probe/epsilon"} <= set(columns)
    assert {"quality/pool_radius", "simulation/quality/random/client_distance"} <= set(columns)
    assert max(map(len, out.splitlines())) <= 80
    assert (folder / "report.html").stat().st_size > 50_000
    assert "report.html" in "".join(out.split())
    assert "ε = 6.00 at δ = 1e-05" in out
    assert "purity" in out
    assert "distance to client*" in out


def test_the_same_command_again_spends_nothing_and_chooses_the_same(run, tmp_path):
    _, first, _, _ = run()
    chosen = (tmp_path / "run" / "proxy_set.csv").read_bytes()
    status, second, out, _ = run()
    assert status == 0
    assert second["privacy"]["spent_by_this_run"] == 0
    assert first["privacy"]["spent_by_this_run"] == first["privacy"]["epsilon"] > 0
    assert second["proxy"]["from_disk"]
    assert not first["proxy"]["from_disk"]
    assert second["seconds"]["embed"] == second["seconds"]["ask"] == 0
    assert (tmp_path / "run" / "proxy_set.csv").read_bytes() == chosen
    assert second["simulation"] == first["simulation"]  # the finished training is not redone
    assert "asked and spent nothing" in " ".join(out.split())


def test_the_report_can_be_switched_off(run, tmp_path):
    run("trainer.max_epochs=1", "callbacks.report=false")
    assert not (tmp_path / "run/report.html").exists()
    run("trainer.max_epochs=1")
    assert (tmp_path / "run/report.html").is_file()


def test_a_run_of_another_name_shares_the_probe(run):
    _, first, _, _ = run()
    _, other, _, _ = run("run_id=other", "trainer.max_epochs=1")
    assert first is not None
    assert other["proxy"]["fingerprint"] == first["proxy"]["fingerprint"]


def test_training_goes_on_where_it_stopped(run, tmp_path):
    run("trainer.max_epochs=1", "task.ema_decay=0.9")
    status, _, _, _ = run("trainer.max_epochs=3", "task.ema_decay=0.9")
    assert status == 0
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 2
    assert "current_model_state" in last  # beside the averaged weights


def test_ctrl_c_is_status_130_and_the_next_call_goes_on(run, tmp_path, monkeypatch):
    def stop(module):
        if module.current_epoch == 1:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(SelfLabelingModule, "on_train_epoch_start", stop)
        try:
            status, summary, _, err = run("trainer.max_epochs=3")
        finally:
            signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert status == 130
    assert summary is None
    assert err.strip().endswith("the same command goes on from here")
    status, summary, _, _ = run("trainer.max_epochs=3")
    assert status == 0
    assert summary["privacy"]["spent_by_this_run"] == 0
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert last["epoch"] == 2


def test_a_run_folder_of_another_config_is_not_mixed_with(run):
    run("trainer.fast_dev_run=false", "selection.strategy=random", "trainer.max_epochs=1")
    status, _, _, err = run("selection.strategy=all", "trainer.max_epochs=1")
    assert status == 2
    assert "holds a run with another config (strategy: random there, strategy: all here)" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["selection.strategy=random", "labels=public"], 60),
        (["selection.strategy=all", "labels=public", "task.augment=none"], 260),
        (["selection.strategy=oracle", "labels=public"], 60),
        (["selection.strategy=cluster_uniform", "labels=public"], 60),
        (["selection.strategy=k_center", "labels=public"], 60),
        (["task.method=fixmatch", "task.consistency_threshold=0.5"], 60),
        (["train_on=client"], 0),
        (["privacy.sample_rate=0.5", "task.ema_decay=null", "task.augment=crop_flip"], 60),
    ],
)
def test_the_other_ways_to_train(run, overrides, size):
    status, summary, _, err = run(*overrides, "trainer.max_epochs=1")
    assert status == 0, err
    assert summary["proxy"]["size"] == size
    assert summary["simulation"]["test_accuracy"] is not None
    assert bool(summary["quality"]) == bool(summary["simulation"]["quality"]) == (size > 0)
    if "train_on=client" in overrides or "labels=public" in overrides:
        assert summary["privacy"]["epsilon"] == 0


@pytest.mark.parametrize("strategy", ["mak", "nearest"])
def test_what_reads_the_clients_images_never_states_an_epsilon(run, tmp_path, strategy):
    words = [f"selection.strategy={strategy}", "trainer.max_epochs=1"]
    status, summary, out, err = run(*words)
    assert status == 0, err
    assert summary["privacy"]["epsilon"] is None
    assert summary["privacy"]["spent_by_this_run"] is None
    assert summary["simulation"]["purity"] > 0.6
    assert "not private: the client's images were read" in " ".join(out.split())
    assert "ε =" not in out
    with (tmp_path / "run" / "metrics/version_0/metrics.csv").open() as file:
        assert "probe/epsilon" not in next(csv.reader(file))
    status, summary, _, _ = run(*words)
    assert status == 0
    assert summary["privacy"]["epsilon"] is None


def test_a_client_behind_a_mailbox_shows_no_images(run, tmp_path):
    mailbox = ["client=mailbox", f"client.url={tmp_path}/box", "data.client=null"]
    status, _, _, err = run("selection.strategy=mak", *mailbox, "data.classes=[a,b]")
    assert status == 2
    assert "selection.strategy=mak is not private" in err
    assert err.count("\n") == 1, err


def test_fast_dev_run_leaves_no_file(run, tmp_path):
    status, summary, _, err = run("trainer.fast_dev_run=true")
    assert status == 0, err
    assert summary is None
    assert not list((tmp_path / "run").glob("*"))


def test_wandb_offline_needs_no_key_and_keeps_figures(run, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    status, _, _, err = run("logger=wandb", "logger.mode=offline", "trainer.max_epochs=1")
    assert status == 0, err
    offline = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(offline) == 1
    assert len(list(offline[0].rglob("*.png"))) >= 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["selection.sise=3"], "selection.size"),
        (["data.pool=/nowhere"], "/nowhere"),
        (["privacy.max_epsilon=0.01"], "max_epsilon=0.01"),
        (["encoder.name=mobilenetv3_smal_050"], "did you mean"),
        (["encoder.weights=/nowhere.pth"], "/nowhere.pth"),
        (["data.client_domain=bar"], "bars"),
        (["selection.strategy=oracle", "data.client_domain=null"], "data.client_domain=NAME"),
        (["probe.num_clusters=1000"], "num_clusters=1000"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, overrides, words):
    status, _, _, err = run(*overrides)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(config):
        return [1, 2, 3].index(9) if json.loads("{") else None

    monkeypatch.setattr(train, "train", broken)
    with pytest.raises(ValueError, match="Expecting property name"):
        train.main([])


def test_help_is_quick_to_import():
    code = (
        "import sys, train; train.main(['--help']); "
        "print([name for name in ('torch', 'lightning', 'timm') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "selection.strategy" in done.stdout


def test_every_experiment_file_is_a_valid_config():
    for path in sorted((REPOSITORY / "configs" / "experiment").glob("*.yaml")):
        extra = ["data.pool=a", "data.client=b"] if "folder" in path.read_text() else []
        extra += ["task.teacher=c"] if "add task.teacher=" in path.read_text() else []
        assert train.main([f"experiment={path.stem}", *extra, "--print-config"]) == 0


def test_what_is_tested_is_what_is_delivered(run, tmp_path, image_tree):
    """The averaged weights; few steps of strong averaging keep them far from the last ones."""
    _, summary, _, _ = run("task.ema_decay=0.99", "trainer.max_epochs=3")
    model = load_model(tmp_path / "run" / "model.safetensors")
    last = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    averaged = {k.removeprefix("model.net."): v for k, v in last["state_dict"].items()}
    delivered = model.net.state_dict()
    assert all(torch.equal(delivered[name], averaged[name]) for name in delivered)
    current = last["current_model_state"]
    assert not all(torch.equal(v, current[f"model.net.{k}"]) for k, v in delivered.items())
    right = [
        model(to_tensor(read_image(path), 32)[None]).argmax() == model.classes.index(label)
        for label in model.classes
        for path in (image_tree / "client" / "test" / label).iterdir()
    ]
    assert summary["simulation"]["test_accuracy"] == pytest.approx(sum(right) / len(right))
