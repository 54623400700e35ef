"""The commands of the README and of docs/, run in the order in which a page shows them.

Small images and few steps stand in for what a command would take hours for: the settings in
``_small`` come before the command's own, which win. What is not run here is named in ``ELSEWHERE``
with the test that runs it; a command that is neither fails.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import train
from ecos_pl.client_cli import main as client_main
from tests.test_train import REPOSITORY, SMALL

PAGES = [*sorted(REPOSITORY.glob("docs/*.md")), REPOSITORY / "README.md"]
ELSEWHERE = {
    r"make (demo|test)": "CI",
    r"pip install ": "CI, and the Makefile",
    r"python benchmarks/": "tests/test_readme.py: they take minutes to hours",
    r"python train.py trainer.devices=4": "tests/test_jobs.py",
    r"(DEVICES=2 )?scripts/torchrun.sh": "tests/test_jobs.py",
    r"sbatch |kubectl ": "tests/test_jobs.py",
    r"python train.py data=digits5 ": "tests/test_digits5.py, tests/test_client_options.py",
    r"python train.py data=domainnet": "tests/test_domainnet.py",
    r"python train.py data=(cifar10_imagenet32|celeba_utkface) ": "tests/test_paper_families.py",
    r"python train.py data=folder data.client=(torchvision|hf):": "tests/test_client_spec.py",
    r"tensorboard --logdir": "tests/test_tracking.py reads the files",
    r"python -m ecos_pl.study( |$)": "tests/test_study_running.py, tests/test_study_cells.py",
}
SMALL_CLIENT = "--encoder=mobilenetv3_small_050 --weights=random --image-size=32 --max-epsilon=6"
CLIENT = {
    "init": [*SMALL_CLIENT.split(), "--min-noise-std=2", "--min-noise-multiplier=0.5"],
    "serve": ["--poll-seconds=0.1"],
}


def _blocks(page: Path) -> Iterator[str]:
    """Bash commands, a line each, and whole Python programs, in the page's order."""
    text = page.read_text(encoding="utf-8")
    for kind, block in re.findall(r"```(bash|python)\n(.*?)```", text, re.DOTALL):
        if kind == "python":
            yield block
        else:
            lines = (re.sub(r"\s+#.*", "", line).strip() for line in block.splitlines())
            yield from (line for line in lines if line)


def _is_elsewhere(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in ELSEWHERE)


def _small(arguments: list[str]) -> list[str]:
    """What makes a command quick, as far as its task knows the option."""
    text = " ".join(arguments)
    small = [*SMALL, "trainer.max_epochs=1", "trainer.limit_train_batches=2", "logger=none"]
    if "privacy.max_epsilon=" in text:
        small += ["privacy.noise_std=4"]  # what the page's own noise leaves room for
    if "rounds" in text:
        small += ["trainer.max_epochs=6"]
    if "=compression" in text:
        small = [s for s in small if not re.match(r"task\.(backbone|weights|image_size)=", s)]
        small += ["task.num_prunings=1", "task.num_importance_images=16"]
    if "=distillation" in text:
        small += ["task.teacher_steps=2", "task.teacher_backbone=mobilenetv3_small_050"]
        small += ["task.teacher_weights=random", "task.teacher_image_size=32"]
    if "labels=" not in text and not re.search("distillation|outsourcing|local", text):
        small += ["labels.num_dims=6", "labels.num_views=2"]
    return small


class Walk:
    """A folder in which a page's commands run one after the other."""

    def __init__(self, folder: Path, image_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.images = folder, image_tree
        self.server: subprocess.Popen[bytes] | None = None
        monkeypatch.chdir(folder)

    def run(self, command: str) -> None:
        words = command.split()
        if words[:2] == ["python", "train.py"]:
            self.train(words[2:])
        elif words[0] == "ecos-client":
            self.client(words[1:])
        elif words[0] == "python" and "\n" not in command:
            target = words[1] if words[1] == "-m" else str(REPOSITORY / words[1])
            self.program([target, *words[2:]])
        elif "import " in command:
            self.program(["-c", command])
        else:
            pytest.fail(f"nothing runs this: {command}")

    def program(self, arguments: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def train(self, arguments: list[str]) -> None:
        text = " ".join(arguments)
        if "{00000..00199}" in text:
            self.pack_shards()
        if "runs/NAME/" in text and not Path("runs/NAME").exists():
            self.train(["run_id=NAME"])
        here = {"POOL": f"{self.images}/pool", "CLIENT": f"{self.images}/client"}
        given = [re.sub(r"\b(POOL|CLIENT)$", lambda m: here[m[1]], one) for one in arguments]
        given = [one.replace("{00000..00199}", "{00000..00001}") for one in given]
        data = ["data=folder", f"data.pool={here['POOL']}"]
        data += [f"data.client={here['CLIENT']}", "data.client_domain=bars"]
        if "client=mailbox" in arguments:
            digits = ",".join(str(digit) for digit in range(10))
            data = [*data[:2], f"data.classes=[{digits}]"]
            data += ["client.poll_seconds=0.1", "client.deadline_hours=0.1"]
        if "data=folder" in arguments or "client.size=" in text or "client.classes=" in text:
            data = []  # its own, or mixed_digits, whose client has enough images
        for labels in Path("runs").glob("*/annotation/labels.csv"):
            self.fill_in(labels)
        status = train.main([*_small(arguments), *data, *given])
        # Whether a network gets as fast as asked depends on the machine.
        assert status == 0 or ("latency_ms" in text and status == 2)
        if "client=mailbox" in arguments:
            self.await_delivery()

    def client(self, words: list[str]) -> None:
        words = [*words, *CLIENT.get(words[0], [])]
        if words[0] == "serve":
            command = [sys.executable, "-m", "ecos_pl.client_cli", *words]
            environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
            self.server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            return
        if words[0] != "init" and not Path("walk/client").exists():  # made on another page
            shutil.copytree(self.images / "client", "walk/images")
            self.client(
                ["init", "walk/client", "--data", "walk/images/train", "--test", "walk/images/test"]
            )
        given = [str(found) for w in words for found in (Path().glob(w) if "*" in w else [w])]
        assert client_main(given) == 0

    def await_delivery(self) -> None:
        deadline = time.monotonic() + 300
        while not list(Path("walk/client/models").glob("*.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def end(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGINT)
            assert self.server.wait(60) == 0

    def fill_in(self, table: Path) -> None:
        """Annotate as somebody would who sees the pictures: the class is in the image's id."""
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            known = re.search("vertical|horizontal", row["image_id"])
            row["label"] = known[0] if known else "other"
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)

    def pack_shards(self) -> None:
        Path("shards").mkdir(exist_ok=True)
        images = sorted(self.images.glob("pool/*/*/[0-9]*.png"))
        for number in range(2):
            with tarfile.open(f"shards/{number:05d}.tar", "w") as shard:
                for place, path in enumerate(images[number::2]):
                    shard.add(path, f"{number}{place:04d}.png")


@pytest.fixture
def walk(tmp_path, image_tree, monkeypatch):
    one = Walk(tmp_path, image_tree, monkeypatch)
    yield one
    one.end()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_pages_commands_run_one_after_the_other(page, walk, capsys):
    earlier = {c for other in PAGES[: PAGES.index(page)] for c in _blocks(other)}
    for command in _blocks(page):
        if command not in earlier and not _is_elsewhere(command):
            walk.run(command)
            capsys.readouterr()


@pytest.mark.parametrize("pattern", ELSEWHERE)
def test_what_runs_elsewhere_is_still_shown(pattern):
    commands = [command for page in PAGES for command in _blocks(page)]
    assert any(re.match(pattern, command) for command in commands)
