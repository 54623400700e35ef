"""Shared fixtures: small real pools and a small encoder, all on disk and offline."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
_wandb_home = tempfile.TemporaryDirectory(prefix="wandb-")
for _folder in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
    os.environ.setdefault(_folder, _wandb_home.name)
if "PYTEST_XDIST_WORKER" in os.environ:  # tests run beside each other: a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
else:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


def draw(kind: int, rng: np.random.Generator, side: int = 24) -> Image.Image:
    """A noisy picture of one of four kinds: two client classes and two kinds of clutter."""
    pixels = rng.integers(0, 40, (side, side, 3))
    at, long = rng.integers(4, side - 6), side - 6
    if kind == 0:  # a bright vertical bar
        pixels[3:long, at : at + 4] = 230
    elif kind == 1:  # a bright horizontal bar
        pixels[at : at + 4, 3:long] = 230
    elif kind == 2:  # a green checkerboard
        pixels[::4, ::4, 1] += 180
    else:  # a red gradient
        pixels[:, :, 0] = np.linspace(60, 250, side)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def image_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``pool/domain/class/x.png`` (bars and clutter, 260) and ``client/{train,test}/class``."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    parts = [
        ("pool/bars/vertical", 0, 50),
        ("pool/bars/horizontal", 1, 50),
        ("pool/clutter/checks", 2, 80),
        ("pool/clutter/shades", 3, 80),
        ("client/train/vertical", 0, 60),
        ("client/train/horizontal", 1, 60),
        ("client/test/vertical", 0, 15),
        ("client/test/horizontal", 1, 15),
    ]
    for folder, kind, count in parts:
        (root / folder).mkdir(parents=True)
        for number in range(count):
            name = f"{'secret-' if folder.startswith('client') else ''}{number:03d}.png"
            draw(kind, rng).save(root / folder / name)
    (root / "pool/clutter/checks/broken.png").write_bytes(b"not an image")
    return root


@pytest.fixture
def data(image_tree: Path) -> list[str]:
    """The small images as settings of train.py."""
    return ["data=folder", f"data.pool={image_tree}/pool", f"data.client={image_tree}/client"]


@pytest.fixture
def job(data, tmp_path, monkeypatch, capsys):
    """Run train.main in this process, signalled at some training steps; (status, seen, stderr)."""
    import train
    from ecos_pl.modules.self_labeling import SelfLabelingModule

    def call(run_id, *overrides, base, stop_at=(), by=signal.SIGTERM, kind=SelfLabelingModule):
        seen = []
        step = kind.training_step

        def watched(module, batch, batch_idx):
            if len(seen) in stop_at:
                os.kill(os.getpid(), by)
            seen.append((module.current_epoch, batch_idx, int(batch[0].sum())))
            return step(module, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "training_step", watched)
            status = train.main(
                [*base, *data, f"run_root={tmp_path}", f"run_id={run_id}", *overrides]
            )
        return status, seen, capsys.readouterr().err

    return call


@pytest.fixture(scope="session")
def finished(image_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run done by train.py; to be read, not changed."""
    import train
    from tests.test_train import SMALL

    root = tmp_path_factory.mktemp("runs")
    data = ["data=folder", f"data.pool={image_tree}/pool", f"data.client={image_tree}/client"]
    few = ["data.client_domain=bars", "labels.num_dims=6", "labels.num_views=2"]
    assert train.main([*SMALL, *data, *few, f"run_root={root}", "run_id=run"]) == 0
    return root / "run"
