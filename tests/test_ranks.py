"""Real processes on CPU: they share, sum, join; one works while the others wait; some fail."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from ecos_pl.ranks import ALONE, Ranks
from tests.rank_processes import end, run_ranks, start_ranks

LIMIT_S = 2  # of the default group's collectives

COLLECTIVES = """
from ecos_pl.ranks import Ranks
with Ranks.of_processes() as ranks:
    assert (ranks.rank, ranks.world_size) == (rank, world_size)
    total = ranks.sum(torch.tensor([rank, 10], dtype=torch.int64))
    assert total.tolist() == [sum(range(world_size)), 10 * world_size], total
    exact = ranks.sum(torch.full((2, 2), 2.0**-24, dtype=torch.float64))
    assert exact.dtype == torch.float64 and exact[1, 1] == world_size * 2.0**-24
    for dtype in (torch.float16, torch.int32, torch.bool):
        rows = ranks.concat(torch.full((rank, 3), rank).to(dtype))  # rank 0 has none
        expected = [float(torch.tensor(r).to(dtype)) for r in range(world_size) for _ in range(r)]
        assert rows.dtype == dtype and rows[:, 2].double().tolist() == expected, (dtype, rows)
    assert ranks.broadcast({"rank": rank, "x": [1, None]}) == {"rank": 0, "x": [1, None]}
    parts = [[*range(7)][r::world_size] for r in range(world_size)]
    assert ranks.share(range(7)) == parts[rank]
    blocks = ranks.concat(torch.tensor([*ranks.block(11)]))
    assert blocks.tolist() == [*range(11)]
    ranks.barrier()
    print("done")
"""

FIRST = f"""
import os, signal, time
from datetime import timedelta
from ecos_pl.ranks import RankError, Ranks
limit_s = {LIMIT_S}

def say(*words):
    print(*words, flush=True)

# Only now, since starting the processes may take longer.
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=limit_s))

with Ranks.of_processes() as ranks:
    with ranks.first() as is_first:
        assert is_first == (rank == 0)
        if is_first:
            time.sleep(2 * limit_s)
            (folder / "result").write_text("found it")
        say((folder / "result").read_text())

    try:
        with ranks.first() as is_first:
            say("tries" if is_first else "must not run")
            raise ValueError("the budget is spent")
    except (RankError, ValueError) as error:
        say(type(error).__name__, error)

    with ranks.first():  # after a failure the processes can still talk to each other
        say("again")

    if rank == 1:  # what would have happened with a plain barrier
        try:
            dist.barrier()
        except RuntimeError:
            say("a plain barrier gave up")
        (folder / "done").touch()
    while not (folder / "done").exists():
        time.sleep(0.05)

    with ranks.first() as is_first:
        if is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        say("must not run")
"""

ONE_FAILS = """
from ecos_pl.ranks import Ranks
with Ranks.of_processes() as ranks:
    ranks.barrier()
    if rank == 1:
        raise ValueError("my disk is full")
    ranks.sum(torch.ones(3))
"""


def test_alone_every_share_is_the_whole() -> None:
    rows = torch.arange(6).reshape(3, 2)
    assert ALONE.sum(rows) is rows
    assert ALONE.concat(rows) is rows
    assert ALONE.broadcast("x") == "x"
    assert ALONE.share([3, 4]) == [3, 4]
    assert ALONE.block(5) == range(5)
    ALONE.barrier()
    with Ranks.of_processes() as ranks, ranks.first() as is_first:
        assert is_first
        assert ranks is ALONE
    with pytest.raises(KeyError), ALONE.first():
        raise KeyError("passes through")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_sum_join_and_tell(tmp_path: Path, world_size: int) -> None:
    assert run_ranks(COLLECTIVES, world_size, tmp_path) == ["done\n"] * world_size


@pytest.mark.slow
def test_the_other_rank_waits_long_and_ends_when_rank_zero_fails_or_is_killed(
    tmp_path: Path,
) -> None:
    processes = start_ranks(FIRST, 2, tmp_path)
    (first, first_log), (second, second_log) = end(processes)

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
        f"RankError {failed}",
        "again",
        "a plain barrier gave up",
    ], second_log
    assert processes[1].returncode == 1
    assert "RankError: rank 1 lost another rank of this run" in second_log


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    processes = start_ranks(ONE_FAILS, 3, tmp_path)
    logs = [log for _, log in end(processes, 60)]
    assert "ValueError: my disk is full" in logs[1]
    for rank in (0, 2):
        assert f"RankError: rank {rank} lost another rank of this run" in logs[rank]
