"""Requests to stop a run, made by signals, wherever in the run they come.

A scheduler that wants its machine back sends SIGTERM (Kubernetes, a preempted job) or SIGUSR1
(SLURM, some time before the job's limit). Both end the run so that the same command goes on.

While pools are opened, the pool is embedded, a client is waited for or a model is tested, the
handler raises ``Stopped`` right away: what these leave on disk is written whole or not at all. In
training, where the state is in memory, the request is only noted, and the training loop ends at
the next place where it can save itself (``callbacks/stop_and_resume.py``).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


STATUS = 128 + signal.SIGTERM
"""Exit status of a run that ended on request."""


class Stopped(SystemExit):
    """The run was asked to stop: ``main`` says so; a process without ``main`` ends in silence.

    Args:
        by: The signal.
    """

    def __init__(self, by: signal.Signals) -> None:
        super().__init__(STATUS)
        self.by = by


class StopRequests:
    """What this process was asked; one per process, since signal handlers are.

    Attributes:
        by: The signal that came; None before one did. SIGUSR1, which may want a job to be queued
            again, counts more than SIGTERM.
        postponed: Whether requests are only noted.
    """

    def __init__(self) -> None:
        self.by: signal.Signals | None = None
        self.postponed = False
        self._pid: int | None = None
        self._ending = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Listen to the signals within the block; outside of the main thread, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.by, self.postponed, self._ending = None, False, False
        self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Set the handlers, for as long as this process lives."""
        self._pid = os.getpid()
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def check(self) -> None:
        """Raise if a request has come.

        Raises:
            Stopped: A signal came.
        """
        if self.by is not None and not self._ending:
            raise Stopped(self.by)

    def end(self) -> None:
        """Let no further signal interrupt what is left to do: the run is ending."""
        self._ending = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a process that was forked off and has no handlers yet
            if number == signal.SIGTERM:
                os._exit(STATUS)
            return
        if self.by is not signal.SIGUSR1:
            self.by = signal.Signals(number)
        if not self.postponed:
            # Again at every signal: an exception that is raised in a finalizer gets lost.
            self.check()


REQUESTS = StopRequests()
"""This process's."""


def is_first_process() -> bool:
    """Whether this is rank 0, from the launcher's variables: before there is a process group.

    torchrun sets RANK. srun sets SLURM_PROCID, Lightning's own launcher LOCAL_RANK and NODE_RANK.
    """
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    names = ("SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return all(os.environ.get(name, "0") == "0" for name in names)


def is_lightnings_child() -> bool:
    """Whether Lightning started this process, which then ends with 0 where it ends on request.

    Its parent watches it, and kills the whole run at any other status.
    """
    return "RANK" not in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"


def slurm_job() -> str | None:
    """What ``scontrol`` calls this job (``123``, or ``123_4`` in an array); None outside SLURM."""
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    return job if job and re.fullmatch(r"\d+(_\d+)?", job) else None


def requeue(job: str) -> str:
    """Put the SLURM job into the queue again, and say in a few words how that went."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"SLURM job {job} could not be requeued: {error}"
    if done.returncode:
        return f"SLURM job {job} could not be requeued: {' '.join(done.stderr.split())}"
    return f"SLURM job {job} is queued again"
