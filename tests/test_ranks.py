"""Two real processes on CPU: one works, the other waits, longer than collectives usually may."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from datamodules.ranks import rank_zero_first

ROOT = Path(__file__).parents[1]
LIMIT_S = 2  # of the default group's collectives

RANK = f"""
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from datamodules.ranks import RankZeroError, rank_zero_first
rank, folder, limit_s = int(sys.argv[1]), Path(sys.argv[2]), {LIMIT_S}

def say(*words):
    print(*words, flush=True)

store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
# Only now, since starting the processes may take longer.
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=limit_s))

with rank_zero_first() as is_first:
    assert is_first == (rank == 0)
    if is_first:
        time.sleep(2 * limit_s)
        (folder / "result").write_text("found it")
    say((folder / "result").read_text())

try:
    with rank_zero_first() as is_first:
        say("tries" if is_first else "must not run")
        raise ValueError("the budget is spent")
except (RankZeroError, ValueError) as error:
    say(type(error).__name__, error)

with rank_zero_first():  # after a failure the processes can still talk to each other
    say("again")

if rank == 1:  # what would have happened with a plain barrier
    try:
        dist.barrier()
    except RuntimeError:
        say("a plain barrier gave up")
    (folder / "done").touch()
while not (folder / "done").exists():
    time.sleep(0.05)

with rank_zero_first() as is_first:
    if is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    say("must not run")
"""


def test_a_single_process_runs_the_block_at_once() -> None:
    with rank_zero_first() as is_first:
        assert is_first
    with pytest.raises(KeyError), rank_zero_first():
        raise KeyError("passes through")


@pytest.mark.slow
def test_the_other_rank_waits_long_and_ends_when_rank_zero_fails_or_is_killed(
    tmp_path: Path,
) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        (first, first_log), (second, second_log) = [p.communicate(timeout=120) for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()

    assert first.splitlines() == [
        "found it",
        "tries",
        "ValueError the budget is spent",
        "again",
    ], first_log
    assert processes[0].returncode == -signal.SIGKILL
    failed = "rank 0 failed while this rank waited for it; see rank 0's own message"
    assert second.splitlines() == [
        "found it",
        f"RankZeroError {failed}",
        "again",
        "a plain barrier gave up",
    ], second_log
    assert processes[1].returncode == 1
    assert second_log.rstrip().endswith(f"RankZeroError: {failed}")
