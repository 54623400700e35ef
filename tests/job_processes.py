"""Runs ``train.main`` in real processes, forked off one that has imported everything already.

A job of two ranks then takes seconds, most of which importing torch and Lightning would take.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Job:
    """One ``train.main`` in a process of its own."""

    pid: int
    output: Path
    nursery: Nursery

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def until(self, words: str, timeout_s: float = 120) -> None:
        """Wait until it has printed some words."""
        end = time.monotonic() + timeout_s
        while words not in self.text():
            assert time.monotonic() < end, self.text()
            time.sleep(0.01)

    def kill(self, number: int = signal.SIGTERM) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit status; -N if signal N ended it."""
        return self.nursery.ask({"wait": self.pid})


class Nursery:
    """The process that forks the jobs off."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, argv: Sequence[str], **env: object) -> Job:
        """Fork off a job."""
        self._count += 1
        output = self._folder / f"output-{self._count}"
        texts = {name: str(value) for name, value in env.items()}
        pid = self.ask({"argv": list(argv), "env": texts, "output": str(output)})
        return Job(pid, output, self)

    def ranks(self, argv: Sequence[str], num: int = 2, **env: object) -> list[Job]:
        """Fork off a job of several processes on this machine, as torchrun would start them."""
        common = {
            "WORLD_SIZE": num,
            "LOCAL_WORLD_SIZE": num,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
            "TORCHELASTIC_RUN_ID": "test",
            **env,
        }
        return [self.start(argv, **common, RANK=rank, LOCAL_RANK=rank) for rank in range(num)]

    def ask(self, request: dict[str, object]) -> int:
        """Send a request; its answer is a number."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End it and what is left of its jobs."""
        self._process.communicate()


@contextlib.contextmanager
def nursery_in(folder: Path) -> Iterator[Nursery]:
    """Yield a nursery."""
    nursery = Nursery(folder)
    try:
        yield nursery
    finally:
        nursery.close()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _job(request: dict[str, object]) -> None:
    import train

    output = os.open(str(request["output"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.environ.update(request["env"])  # type: ignore[arg-type]
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    status = 1
    try:
        status = train.main(request["argv"])  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import importlib

    import torch

    for name in ("timm", "wandb", "callbacks.training_curves", "datamodules.proxy"):
        importlib.import_module(name)
    torch.set_num_threads(1)
    jobs = []
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
            jobs.remove(request["wait"])
            print(status, flush=True)
        elif pid := os.fork():
            jobs.append(pid)
            print(pid, flush=True)
        else:
            _job(request)
    for pid in jobs:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
