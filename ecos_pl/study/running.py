"""Run cells as processes, some at a time; whatever ends this process ends them first."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ecos_pl.study.cells import REPOSITORY, Cell
from ecos_pl.study.folder import StudyFolder

GRACE_S = 60.0
"""How long a run may take to save itself before it is killed."""

_POLL_S = 0.1
_TAKEN_POLL_S = 2.0  # between two looks whether another process has left a cell

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A signal asked this process to end; its children have ended.

    Args:
        by: The signal.
    """

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(by.name)
        self.by = by


@dataclass(frozen=True)
class Ended:
    """How a cell's process ended.

    Attributes:
        cell: Which.
        status: Its exit status; -N if signal N ended it.
        seconds: How long it took.
    """

    cell: Cell
    status: int
    seconds: float


@dataclass
class Watcher:
    """What is told while cells run; by default nobody."""

    started: Callable[[Cell], None] = lambda cell: None
    ended: Callable[[Ended], None] = lambda ended: None
    waiting: Callable[[Sequence[Cell]], None] = lambda cells: None
    stopping: Callable[[int], None] = lambda num_runs: None


@dataclass
class _Child:
    cell: Cell
    process: subprocess.Popen[bytes]
    slot: int
    start: float = field(default_factory=time.monotonic)


def command_of(cell: Cell, root: Path) -> list[str]:
    """The run of a cell, as arguments of a process."""
    train = str(REPOSITORY / "train.py")
    return [sys.executable, train, *cell.argv, f"run_id={cell.run_id}", f"run_root={root}"]


def run_cells(
    cells: Sequence[Cell], folder: StudyFolder, *, workers: int = 1, watcher: Watcher | None = None
) -> list[Ended]:
    """Run cells that are not done, `workers` at a time; one that fails does not stop the others.

    A cell that another process is running is left to it; if that ends without a result, it is run
    here.

    Args:
        cells: In the order in which they start.
        folder: Of the study.
        workers: Processes at a time; they share the cores, and the GPUs if there are several.
        watcher: Hears what happens.

    Raises:
        Interrupted: A signal came. The processes were asked to end, and have.
    """
    watcher = watcher or Watcher()
    waiting = deque(cells)
    children: list[_Child] = []
    ended: list[Ended] = []
    look_again, told = 0.0, False
    with _signals() as heard:
        try:
            while (waiting or children) and not heard:
                if len(children) < workers and time.monotonic() >= look_again:
                    child = _next(waiting, folder, workers, {child.slot for child in children})
                    if child is not None:
                        children.append(child)
                        watcher.started(child.cell)
                        continue
                    look_again = time.monotonic() + _TAKEN_POLL_S
                    if waiting and not children and not told:
                        told = True
                        watcher.waiting(tuple(waiting))
                time.sleep(_POLL_S)
                for child in [child for child in children if child.process.poll() is not None]:
                    children.remove(child)
                    seconds = time.monotonic() - child.start
                    ended.append(Ended(child.cell, child.process.returncode, seconds))
                    watcher.ended(ended[-1])
                    look_again = 0.0
        finally:
            if children:
                watcher.stopping(len(children))
            _end([child.process for child in children], heard)
        if heard:
            raise Interrupted(heard[0])
    return ended


def _next(
    waiting: deque[Cell], folder: StudyFolder, workers: int, slots: set[int]
) -> _Child | None:
    """Start the first cell that nobody has done or is at; None if there is none now."""
    for _ in range(len(waiting)):
        cell = waiting.popleft()
        if folder.state(cell) == "done":  # by another process meanwhile
            continue
        log = folder.take(cell)
        if log is None:
            waiting.append(cell)
            continue
        slot = next(number for number in range(workers) if number not in slots)
        command = command_of(cell, folder.root)
        os.write(log, f"$ {shlex.join(command)}\n".encode())
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **_share(slot, workers)},
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends them
            )
        finally:
            os.close(log)
        return _Child(cell, process, slot)
    return None


def _share(slot: int, workers: int) -> Mapping[str, str]:
    """Environment that keeps one of several processes to its share of cores and GPUs."""
    if workers == 1:
        return {}
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    share = {"OMP_NUM_THREADS": str(max(1, cores // workers))}
    if "OMP_NUM_THREADS" in os.environ:
        share = {}
    gpus = _gpus()
    return {**share, "CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if len(gpus) > 1 else share


def _gpus() -> list[str]:
    """What CUDA calls the GPUs that this process may use."""
    if (listed := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in listed.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Yield the signals that have come; in other threads than the main one, none do."""
    heard: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return

    def note(number: int, frame: FrameType | None) -> None:
        heard.append(signal.Signals(number))

    listened = [number for number in _SIGNALS if number not in _ignored()]
    before = {number: signal.signal(number, note) for number in listened}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignored() -> set[signal.Signals]:
    """Under nohup, a terminal that is closed must not end the study."""
    return {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()


def _end(processes: Sequence[subprocess.Popen[bytes]], heard: Sequence[signal.Signals]) -> None:
    """Ask processes to end, with all that they started; kill what has not when time is up.

    A further signal means that it is.
    """
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    num_heard, deadline = len(heard), time.monotonic() + GRACE_S
    while any(process.poll() is None for process in processes):
        if time.monotonic() >= deadline or len(heard) > num_heard:
            for process in processes:
                _signal_group(process, signal.SIGKILL)
                process.wait()
            break
        time.sleep(_POLL_S)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
