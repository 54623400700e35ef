"""Jobs that schedulers stop: signals at any moment, several processes, SLURM's environment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import yaml
from job_processes import nursery_in
from rank_processes import run_ranks

import train
from callbacks.from_config import trainer_of
from ecos_pl import run_folder
from ecos_pl.config_files import (
    load_config,
)
from ecos_pl.probe import Probe
from ecos_pl.stopping import is_first_process

ROOT = Path(train.__file__).parent
SMALL = [
    "task.backbone=test_efficientnet",
    "task.weights=random",
    "task.image_size=32",
    "task.batch_size=16",
    "task.num_workers=0",
    "task.learning_rate=3e-3",
    "task.ema_decay=0.9",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "logger=none",
]
LOCAL = [*SMALL, "train_on=client"]  # 120 images, 7 batches an epoch, no probe
NUM_BATCHES = 7


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def delivered(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stops", [[3], [6, 2], [13]])
def test_a_stopped_training_goes_on_with_the_next_batch(job, tmp_path, stops):
    """Stopped in an epoch, in its last batch, twice, in the last batch of all."""
    _, wanted, _ = job("whole", base=LOCAL)
    assert [place[:2] for place in wanted] == [(e, b) for e in range(2) for b in range(NUM_BATCHES)]
    seen = []
    for stop in stops:
        status, part, err = job("stopped", stop_at=[stop], base=LOCAL)
        assert status == 143
        assert err == "stopped by SIGTERM; the same command goes on from here\n"
        seen += part
    status, part, err = job("stopped", base=LOCAL)
    assert (status, err) == (0, "")
    assert seen + part == wanted
    assert delivered(tmp_path / "stopped") == delivered(tmp_path / "whole")
    results = [summary(tmp_path / name) for name in ("whole", "stopped")]
    assert results[0]["simulation"] == results[1]["simulation"]


# --- the probe -----------------------------------------------------------------------------------

PROBE = [
    *SMALL,
    "encoder.name=test_efficientnet",
    "encoder.weights=random",
    "encoder.image_size=32",
    "encoder.batch_size=16",
    "encoder.num_workers=0",
    "probe.num_clusters=8",
    "probe.num_dims=8",
    "privacy.noise_std=2",
    "privacy.max_epsilon=6",
    "selection.size=60",
    "labels.num_dims=6",
    "labels.num_views=1",
    "trainer.max_epochs=1",
]


@pytest.mark.slow
def test_signals_at_random_moments_change_nothing_and_cost_nothing(job, tmp_path):
    job("whole", base=PROBE)
    wanted = summary(tmp_path / "whole")
    root = f"run_root={tmp_path / 'other'}"
    status, num_stops = None, 0
    rng = random.Random(3)
    while status != 0:
        with signalled_after(rng.uniform(0.1, 1.5 + num_stops)):
            status, _, err = job("whole", root, base=PROBE)
        if status == 143:
            num_stops += 1
            assert err.endswith("stopped by SIGTERM; the same command goes on from here\n")
            assert "Traceback" not in err
        assert status in (0, 143)
    assert num_stops > 1
    found = summary(tmp_path / "other/whole")
    assert found["proxy"]["size"] == wanted["proxy"]["size"] == 60
    assert found["privacy"]["epsilon"] == wanted["privacy"]["epsilon"]
    ledgers = [
        sorted(map(len, map(Path.read_bytes, (root / "clients").rglob("*.jsonl"))))
        for root in (tmp_path, tmp_path / "other")
    ]
    assert ledgers[0] == ledgers[1]


@contextlib.contextmanager
def signalled_after(seconds, by=signal.SIGTERM):
    """Signal this process after so many seconds of it, unless the block has ended."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # between two jobs nobody listens
    timer = threading.Timer(seconds, os.kill, (os.getpid(), by))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        signal.signal(signal.SIGTERM, before)


# --- several processes ---------------------------------------------------------------------------

TWO = [
    *LOCAL,
    "task.batch_size=8",  # on each device: 7 batches an epoch again
    "trainer.strategy=ddp",
    "trainer.devices=2",
]


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    with nursery_in(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.mark.slow
def test_two_processes(nursery, data, tmp_path):
    """One after the other, since starting processes takes most of the time."""
    argv = [*TWO, *data, f"run_root={tmp_path}"]

    def run(run_id, *overrides, num=2):
        jobs = nursery.ranks([*argv, f"run_id={run_id}", *overrides], num)
        assert [one.wait() for one in jobs] == [0] * num, [one.text() for one in jobs]

    # A test on one device says the same as on two.
    run("whole")
    on_two = summary(tmp_path / "whole")["simulation"]
    run("whole", "trainer.devices=1", num=1)
    assert summary(tmp_path / "whole")["simulation"] == on_two

    for number, statuses in ((signal.SIGTERM, [143, 143]), (signal.SIGKILL, [1, -9])):
        name = number.name
        jobs = nursery.ranks([*argv, f"run_id={name}", "trainer.max_epochs=300"])
        wait_for(tmp_path / name / "checkpoints/last.ckpt", jobs)
        jobs[1].kill(number)  # that one alone
        start = time.monotonic()
        assert [one.wait() for one in jobs] == statuses
        assert time.monotonic() - start < 60
        said = "stopped by SIGTERM" if statuses[1] > 0 else "train.py: another process of this run"
        lines = [line for line in jobs[0].text().splitlines() if "goes on from here" in line]
        assert len(lines) == 1
        assert lines[0].startswith(said)
        assert "Traceback" not in jobs[0].text() + jobs[1].text()
        # It goes on where it stopped, and ends with its epoch.
        last = newest_checkpoint(tmp_path / name)
        run(name, f"trainer.max_epochs={last['epoch'] + 1}")
        after = newest_checkpoint(tmp_path / name)
        assert after["global_step"] == NUM_BATCHES * (last["epoch"] + 1)


METRICS = """
import warnings
from torch.utils.data import TensorDataset
from datamodules.loaders import image_loader
from ecos_pl.classifier import Classifier
from ecos_pl.modules.self_labeling import SelfLabelingModule
warnings.filterwarnings("ignore")
generator = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (11, 3, 32, 32), dtype=torch.uint8, generator=generator)
targets = torch.rand(11, 3, generator=generator).softmax(1)
weights = torch.linspace(0, 1, 11)  # the first weighs nothing and counts nowhere
model = Classifier.create("abc", backbone="test_efficientnet", weights="random", image_size=32)
torch.nn.init.normal_(model.net.get_classifier().weight, generator=generator)
module = SelfLabelingModule(model)
loader = image_loader(
    TensorDataset(images, targets, weights), 3, num_workers=0, train=False, seed=1,
    rank=rank, world_size=world_size,
)
module.eval()
with torch.no_grad():
    for batch in loader:
        module.validation_step(batch, 0)
scores = module.scores
print(float(scores.val_loss.compute()), float(scores.val_accuracy.compute()))
"""


@pytest.mark.slow
def test_validation_says_the_same_on_any_number_of_devices(tmp_path):
    found = [
        [float(word) for word in output.split()]
        for world_size in (1, 2)
        for output in run_ranks(METRICS, world_size, tmp_path)
    ]
    assert len(found) == 3
    loss, accuracy = found[0]
    assert all(one == pytest.approx([loss, accuracy], rel=1e-5) for one in found)
    assert 10 * accuracy == pytest.approx(round(10 * accuracy))  # of the ten that count


def newest_checkpoint(folder):
    return torch.load(run_folder.newest_checkpoint(folder), weights_only=True)


def wait_for(path, jobs, timeout_s=120):
    end = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < end, [one.text() for one in jobs]
        time.sleep(0.02)


@pytest.mark.slow
def test_workers_that_return_nothing(nursery, data, tmp_path):
    """``ddp_fork`` as ``ddp_spawn``: the parent writes the results all the same."""
    argv = [*PROBE, *data, f"run_root={tmp_path}", "run_id=run", "task.batch_size=8"]
    job = nursery.start([*argv, "trainer.strategy=ddp_fork", "trainer.devices=2"])
    assert job.wait() == 0, job.text()
    found = summary(tmp_path / "run")
    assert found["proxy"]["size"] == 60
    assert found["privacy"]["spent_by_this_run"] == found["privacy"]["epsilon"] > 0
    assert found["simulation"]["test_accuracy"] is not None
    assert found["seconds"]["fit"] > 0
    assert (tmp_path / "run/model.safetensors").exists()


# --- SLURM ---------------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path):
    """Stand-ins for SLURM's programs; ``calls`` are the arguments that they were given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scontrol = programs / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho scontrol "$@" >> {tmp_path}/calls\n')
    srun = programs / "srun"
    srun.write_text(
        f"""#!/bin/sh
echo srun "$@" >> {tmp_path}/calls
shift
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=1 SLURM_STEP_NODELIST=localhost
exec "$@"
"""
    )
    for program in (scontrol, srun):
        program.chmod(0o755)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_slurms_signal_requeues_the_job_in_training(job, cluster, tmp_path, monkeypatch):
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # this is no srun task
    status, _, err = job("run", stop_at=[2], by=signal.SIGUSR1, base=LOCAL)
    assert status == 143
    assert err.splitlines()[-1] == (
        "stopped by SIGUSR1; the same command goes on from here (SLURM job 70_4 is queued again)"
    )
    assert calls(tmp_path) == ["scontrol requeue 70_4"]


def test_slurms_signal_requeues_the_job_in_the_probe(job, cluster, tmp_path, monkeypatch):
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(60)  # waits for a client

    monkeypatch.setattr(Probe, "run", signalled)
    status, seen, err = job("run", base=PROBE)
    assert (status, seen) == (143, [])
    assert err.count("\n") == 1
    assert "(SLURM job 77 is queued again)" in err
    assert calls(tmp_path) == ["scontrol requeue 77"]


def test_a_requeue_that_fails_is_told(job, cluster, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    _, _, err = job("run", stop_at=[2], by=signal.SIGUSR1, base=LOCAL)
    assert "SLURM job 77 could not be requeued: " in err


def test_outside_slurm_its_signal_stops_as_sigterm_does(job, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    status, _, err = job("run", stop_at=[2], by=signal.SIGUSR1, base=LOCAL)
    assert (status, err) == (143, "stopped by SIGUSR1; the same command goes on from here\n")


@pytest.mark.slow
def test_the_sbatch_script_runs_is_requeued_and_goes_on(cluster, data, tmp_path):
    """The script, our process and our handlers are real; SLURM is not."""
    env = {
        **os.environ,
        **cluster,
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NAME": "ecos",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
    }
    argv = ["bash", str(ROOT / "scripts/slurm.sbatch"), *LOCAL, *data, f"run_root={tmp_path}"]
    with (tmp_path / "output").open("w") as output:
        kwargs = {"env": env, "stdout": output, "stderr": output}
        batch = subprocess.Popen([*argv, "trainer.max_epochs=500"], **kwargs)
        wait_for(tmp_path / "slurm-77/checkpoints/last.ckpt", [])
        batch.send_signal(signal.SIGUSR1)  # the script has become srun, and that the task
        assert batch.wait(60) == 143
    first, second = calls(tmp_path)
    assert first.startswith("srun --kill-on-bad-exit=1 ")
    assert " train.py run_id=slurm-77 trainer.devices=1 trainer.num_nodes=1 " in first
    assert second == "scontrol requeue 77"
    assert (tmp_path / "slurm-77/checkpoints/stopped.ckpt").exists()


def test_only_rank_0_of_a_slurm_job_speaks_and_requeues(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert is_first_process()
    for name, value, first in (
        ("SLURM_PROCID", "0", True),
        ("LOCAL_RANK", "1", False),  # a child of Lightning's in the first task
        ("RANK", "0", True),  # torchrun's word counts
        ("RANK", "3", False),
    ):
        monkeypatch.setenv(name, value)
        assert is_first_process() is first


# --- the scripts ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_on_two_processes(data, tmp_path):
    env = {**os.environ, "DEVICES": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    argv = [str(ROOT / "scripts/torchrun.sh"), *LOCAL, *data, f"run_root={tmp_path}", "run_id=run"]
    argv += ["task.batch_size=8", "trainer.max_epochs=1"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "run")["simulation"]["test_accuracy"] is not None
    assert done.stdout.count("test accuracy") == 1


def test_the_scripts_can_be_read(tmp_path):
    for name in ("slurm.sbatch", "torchrun.sh"):
        subprocess.run(["bash", "-n", str(ROOT / "scripts" / name)], check=True)
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [str(ROOT / "scripts/torchrun.sh")], env=env, capture_output=True, text=True
    )
    if done.returncode == 2:  # no GPU here
        assert done.stderr.count("\n") == 1
    service, job = yaml.safe_load_all((ROOT / "scripts/kubernetes-job.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec = job["spec"]["template"]["spec"]
    [container] = spec["containers"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert env["HEAD"].startswith(f"{job['metadata']['name']}-0.{spec['subdomain']}:")
    assert int(env["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(env["DEVICES"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert (ROOT / container["command"][0]).stat().st_mode & 0o111
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


# --- options that do not go together --------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.strategy=dpp"], "did you mean ddp?"),
        (["trainer.strategy=fsdp"], "add task.ema_decay=null"),
        (["trainer.strategy=fsdp", "task.ema_decay=null"], "FSDP"),
        (["trainer.strategy=deepspeed", "task.ema_decay=null"], "deepspeed"),
        (["trainer.sync_batchnorm=true"], "needs GPUs"),
        (["trainer.strategy=ddp", "trainer.devices=0,1"], "trainer"),
    ],
)
def test_a_strategy_that_cannot_be_is_one_line(job, overrides, words):
    status, _, err = job("run", *overrides, base=LOCAL)
    assert status == 2
    assert words.lower() in err.lower()
    assert err.count("\n") == 1, err


def test_the_timeout_reaches_the_strategy(tmp_path):
    argv = ["trainer.accelerator=cpu", "trainer.strategy=ddp", "trainer.timeout_minutes=1.5"]
    config = load_config([*argv, "logger=none"], config_dir=train.CONFIG_DIR)
    trainer, _ = trainer_of(config, tmp_path, False)
    assert trainer.strategy._timeout == timedelta(seconds=90)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())
