"""One rank works, for as long as it takes, while the others wait for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

FOR_EVER = timedelta(days=10_000)


class RankZeroError(ValueError):
    """Rank 0 did not finish what the others waited for; its own message says why."""


@contextlib.contextmanager
def rank_zero_first() -> Iterator[bool]:
    """Run the block on rank 0, then on all other ranks; yields whether this is rank 0.

    The others wait over a gloo group of their own with an endless timeout: collectives of the
    default group give up after 30 minutes, and rank 0 may wait for a client for days. Lightning
    does the same around ``prepare_data`` (``_InfiniteBarrier``), but with a barrier alone, so that
    the others would wait for ever if rank 0 failed. Where there is one process only, the block
    simply runs.

    Raises:
        RankZeroError: On the other ranks, in place of their block: rank 0's block raised, or its
            process ended.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        yield True
        return
    group = dist.new_group(backend="gloo", timeout=FOR_EVER)
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    try:
        if dist.get_rank() == 0:
            yield from _tell_the_others(group)
        else:
            _wait_for_rank_zero(group)
            yield False
    finally:
        dist.destroy_process_group(group)


def _tell_the_others(group: dist.ProcessGroup) -> Iterator[bool]:
    try:
        yield True
    except BaseException:
        with contextlib.suppress(RuntimeError):  # what went wrong here must stay visible
            dist.broadcast(torch.tensor([False]), src=0, group=group)
        raise
    dist.broadcast(torch.tensor([True]), src=0, group=group)


def _wait_for_rank_zero(group: dist.ProcessGroup) -> None:
    finished = torch.tensor([False])
    with contextlib.suppress(RuntimeError):  # the connection broke: rank 0's process has ended
        dist.broadcast(finished, src=0, group=group)
    if not finished.item():
        raise RankZeroError("rank 0 failed while this rank waited for it; see rank 0's own message")
