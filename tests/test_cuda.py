"""On a CUDA device: the same results as on the CPU, and no step that waits for the device.

Skipped where there is none; `python -m pytest tests/test_cuda.py` on a machine that has one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_compression import classifier
from test_distillation import SMALL as DISTILLATION
from test_self_labeling import SMALL as SELF_LABELING

import train
from ecos_pl.densest_rows import densities
from ecos_pl.diverse_picks import diverse_picks
from ecos_pl.embedding_bank import build_bank
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.k_center import KCenter
from ecos_pl.kmeans import kmeans
from ecos_pl.model_file import load_model, save_model
from ecos_pl.modules.compression import CompressionModule
from ecos_pl.modules.distillation import DistillationModule
from ecos_pl.modules.self_labeling import SelfLabelingModule
from ecos_pl.near_duplicates import DistinctRows
from ecos_pl.nearest import assign
from ecos_pl.nearest_to_client import NearestInTurn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

LABELS = ["labels.num_dims=6", "labels.num_views=1"]


def whole_numbers(num_rows, num_dims, seed=0):
    """Rows whose distances are exact in any precision, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-6, 7, (num_rows, num_dims), generator=generator).float()


def on_both(compute):
    return [compute(device) for device in ("cpu", "cuda")]


# --- the probe -----------------------------------------------------------------------------------


def test_rows_go_to_the_same_centroids():
    rows, centroids = whole_numbers(5000, 8), whole_numbers(60, 8, seed=1)
    here, there = on_both(lambda device: assign(rows, centroids, device=device))
    assert torch.equal(here, there)


def test_clusters_are_as_tight():
    """Another order of sums may end in another optimum, which is no worse."""
    blobs = whole_numbers(40, 16, seed=1)[torch.arange(20_000) % 40]
    rows = blobs + 0.2 * torch.randn(blobs.shape, generator=torch.Generator().manual_seed(2))
    here, there = on_both(lambda device: kmeans(rows, 40, device=device))
    assert there.inertia == pytest.approx(here.inertia, rel=0.02)
    assert there.centroids.device.type == there.assignments.device.type == "cpu"
    assert torch.equal(there.assignments, assign(rows, there.centroids))


def test_each_way_to_choose_chooses_the_same():
    rows, full = whole_numbers(600, 4), whole_numbers(600, 4)
    places, sizes = np.arange(600), torch.full((6,), 100)
    groups = torch.arange(600) % 6
    client = whole_numbers(20, 4, seed=3)

    def chosen(device):
        drawn = [torch.Generator().manual_seed(4) for _ in range(2)]
        picks = diverse_picks(rows, groups, rows[:6], sizes // 3, device=device)
        return [
            picks.tolist(),
            KCenter(rows, places, drawn[0], device).more(50).tolist(),
            NearestInTurn(rows, places, client, drawn[1], device).more(50).tolist(),
            DistinctRows(rows, full, 2.0, device=device)(places).tolist(),
        ]

    here, there = on_both(chosen)
    assert here == there


def test_densities_agree():
    from test_densest_rows import scene

    density, rows = scene()
    here, there = on_both(lambda device: densities(density, rows, device=device))
    assert torch.allclose(here, there, rtol=0, atol=2e-5 * float(here.max()))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("features", ["final", "grid"])
def test_embeddings_are_those_of_the_cpu_but_for_bfloat16(tmp_path, features, num_workers):
    """Batches are copied on a stream of their own: a race would show as other rows."""
    from test_embedding_bank import Source

    source = Source(700)
    spec = EncoderSpec("test_efficientnet", "random", 32, features=features)

    def rows(device):
        encoder = Encoder(spec).to(device)
        options = {"image_size": 32, "batch_size": 16, "device": device}
        folder = tmp_path / device
        bank = build_bank(folder, source, encoder, num_workers=num_workers, **options)
        return torch.from_numpy(bank[:].astype(np.float32))

    here, there = on_both(rows)
    assert there.norm(dim=1).sub(1).abs().max() < 1e-3
    assert (here * there).sum(dim=1).min() > 0.99


# --- training ------------------------------------------------------------------------------------

RUNS = {
    "supervised": ([*SELF_LABELING, *LABELS, "task.class_balance=0.5"], SelfLabelingModule),
    "fixmatch": ([*SELF_LABELING, *LABELS, "task.method=fixmatch"], SelfLabelingModule),
    "flexmatch": (
        [
            *SELF_LABELING,
            *LABELS,
            "task.method=flexmatch",
            "task.distribution_alignment=true",
            "task.pseudo_labels_from=average",
        ],
        SelfLabelingModule,
    ),
    "rounds": ([*SELF_LABELING, *LABELS, "labels.rounds=[1]"], SelfLabelingModule),
    "distillation": (DISTILLATION, DistillationModule),
    "cached_distillation": ([*DISTILLATION, "task.num_views=1"], DistillationModule),
    "compression": (
        [
            *(text for text in SELF_LABELING if not text.startswith("task.")),
            "labels=public",
            "task=compression",
            "task.batch_size=8",
            "task.num_workers=0",
            "task.num_prunings=2",
            "task.epochs_between=1",
            "task.calibration=minmax",
        ],
        CompressionModule,
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """All runs here share one probe."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def arguments(image_tree, tmp_path, cache):
    """The arguments of train.py for a run of that name."""

    def of(name, *overrides, run_id="run"):
        settings = [text for text in RUNS[name][0] if not text.startswith("trainer.accelerator")]
        if name == "compression":
            pytest.importorskip("torch_pruning")
            pytest.importorskip("onnxruntime")
            save_model(tmp_path / "teacher.safetensors", classifier())
            settings.append(f"task.teacher={tmp_path}/teacher.safetensors")
        argv = [*settings, "data=folder", f"data.pool={image_tree}/pool", "data.client_domain=bars"]
        argv += [f"data.client={image_tree}/client", f"run_root={tmp_path}", f"run_id={run_id}"]
        return [*argv, f"probe.cache_dir={cache}", "trainer.accelerator=gpu", *overrides]

    return of


@pytest.fixture
def run(arguments, tmp_path, capsys, caplog):
    """Call train.main on the device; (its summary, what was said)."""

    def call(name, *overrides, run_id="run", status=0):
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found = train.main(arguments(name, *overrides, run_id=run_id))
        said = capsys.readouterr().err + caplog.text + "".join(str(w.message) for w in warned)
        assert found == status, said
        if status:
            return None, said
        return json.loads((tmp_path / run_id / "summary.json").read_text()), said

    return call


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", RUNS)
def test_every_task_trains_in_every_precision(run, tmp_path, name, precision):
    summary, _ = run(name, f"trainer.precision={precision}")
    assert summary["environment"]["device"] == torch.cuda.get_device_name()
    assert 0 <= summary["simulation"]["test_accuracy"] <= 1
    delivered = load_model(tmp_path / "run/model.safetensors")
    weights = [w for w in delivered.state_dict().values() if w.is_floating_point()]
    assert all(w.device.type == "cpu" and bool(w.isfinite().all()) for w in weights)
    assert {w.dtype for w in weights} == {torch.float32}


@pytest.mark.parametrize("name", ["supervised", "fixmatch", "distillation", "compression"])
def test_compiled_steps_train(run, name):
    """A ResNet whose last map is one pixel may go on uncompiled, as PyTorch 2.11 made it do."""
    _, said = run(name, "task.compile=true", "trainer.precision=bf16-mixed")
    if name != "compression":
        assert "nothing is compiled" not in said


@pytest.mark.parametrize("name", RUNS)
def test_no_step_waits_for_the_device(run, monkeypatch, name):
    """What reads a value of the device in the middle of a step stops the host from going ahead."""
    module = RUNS[name][1]
    step, seen = module.training_step, []

    def watched(self, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error")
        try:
            seen.append(batch_idx)
            return step(self, batch, batch_idx)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(module, "training_step", watched)
    run(name, "trainer.precision=bf16-mixed")
    assert seen


@pytest.mark.parametrize("name", ["supervised", "flexmatch", "distillation"])
def test_a_stopped_run_ends_as_an_undisturbed_one(run, monkeypatch, tmp_path, name):
    whole, _ = run(name, "trainer.deterministic=true", run_id="whole")
    module = RUNS[name][1]
    step, count = module.training_step, iter(range(10**6))

    def stopped(self, batch, batch_idx):
        if next(count) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(module, "training_step", stopped)
        run(name, "trainer.deterministic=true", status=143)
    again, _ = run(name, "trainer.deterministic=true")
    assert again["simulation"] == whole["simulation"]
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert models[0] == models[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nccl_strategies_train(arguments, tmp_path, strategy):
    """In a process of its own: a process group outlives its training."""
    options = [f"trainer.strategy={strategy}", "task.ema_decay=null"]
    command = [sys.executable, str(Path(train.__file__)), *arguments("supervised", *options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["environment"]["device"] == torch.cuda.get_device_name()


def test_a_model_trained_there_answers_the_same_here(run, tmp_path):
    run("supervised", "trainer.precision=bf16-mixed")
    model = load_model(tmp_path / "run/model.safetensors")
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        here = model(images)
        there = model.cuda()(images.cuda()).cpu()
    # cuDNN may round the operands of convolutions to 10 bits (TF32).
    assert torch.allclose(here, there, atol=5e-3 * float(here.abs().max()))
