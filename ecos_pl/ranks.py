"""The processes (ranks) of one run, as the probe needs them: shares, sums, and one that goes first.

They talk over a gloo group of their own, CPU tensors inside, which never gives up: collectives of
the default group end after 30 minutes, and a rank may wait for days while another one embeds its
share, or while rank 0 waits for a client. What crosses is small (sums per cluster, not rows), so
that gloo is fast enough beside any device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

FOR_EVER = timedelta(days=10_000)

_MAX_POLL_S = 0.02


class RankError(ValueError):
    """Another rank did not finish what this one waited for; its own message says why."""


class Ranks:
    """This process among those of the run; with ``group`` None it is the only one.

    Every method is a collective: all ranks call it, in the same order. A rank that fails leaves
    the group, and the others, wherever they wait, raise ``RankError``.

    Args:
        group: Over which they talk; see ``of_processes``.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.world_size = 1 if group is None else dist.get_world_size(group)

    @staticmethod
    @contextlib.contextmanager
    def of_processes() -> Iterator[Ranks]:
        """Yield the ranks of ``torch.distributed``, or ``ALONE`` where there is one process."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            yield ALONE
            return
        group = dist.new_group(backend="gloo", timeout=FOR_EVER)
        assert isinstance(group, dist.ProcessGroup), "every rank is a member"
        try:
            yield Ranks(group)
        finally:
            # Closes the connections: ranks that wait for this one notice.
            dist.destroy_process_group(group)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this rank's part of some items: every W-th."""
        return list(items[self.rank :: self.world_size])

    def block(self, num: int) -> range:
        """Return this rank's contiguous share of ``range(num)``; shares differ by one at most."""
        return range(num * self.rank // self.world_size, num * (self.rank + 1) // self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up the ranks' tensors; the result is on the same device, of the same dtype."""
        if self._group is None:
            return tensor
        total = tensor.to("cpu", copy=True)
        self._wait(dist.all_reduce(total, group=self._group, async_op=True))
        return total.to(tensor.device)

    def concat(self, tensor: Tensor) -> Tensor:
        """Join the ranks' rows [n_r, …] in the order of ranks: [Σ n_r, …] on every rank."""
        if self._group is None:
            return tensor
        lengths = torch.zeros(self.world_size, dtype=torch.int64)
        lengths[self.rank] = len(tensor)
        lengths = self.sum(lengths)
        # As bytes, all equally long: that much every dtype and gloo agree upon.
        padded = tensor.new_zeros(int(lengths.max()), *tensor.shape[1:], device="cpu")
        padded[: len(tensor)] = tensor.cpu()
        flat = padded.flatten().view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(self.world_size)]
        self._wait(dist.all_gather(parts, flat, group=self._group, async_op=True))
        rows = [
            part.view(tensor.dtype).view(padded.shape)[:length]
            for part, length in zip(parts, lengths.tolist(), strict=True)
        ]
        return torch.cat(rows).to(tensor.device)

    def broadcast(self, value: T | None) -> T:
        """Return rank 0's value, any plain object, on every rank; the others' is ignored."""
        if self._group is None:
            assert value is not None
            return value
        import pickle

        content = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        length = torch.tensor([len(content)])
        self._wait(dist.broadcast(length, src=0, group=self._group, async_op=True))
        if not self.is_first:
            content = torch.empty(int(length), dtype=torch.uint8)
        self._wait(dist.broadcast(content, src=0, group=self._group, async_op=True))
        result: T = pickle.loads(content.numpy().tobytes())
        return result

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.sum(torch.zeros(1))

    @contextlib.contextmanager
    def first(self) -> Iterator[bool]:
        """Run the block on rank 0, for as long as it takes, then on the others.

        Yields whether this is rank 0. If rank 0's block raises, the others' blocks do not run.

        Raises:
            RankError: On the other ranks, in place of their block: rank 0's block raised, or its
                process ended.
        """
        if self._group is None:
            yield True
        elif self.is_first:
            try:
                yield True
            except BaseException:
                with contextlib.suppress(RankError):  # what went wrong here must stay visible
                    self._tell(done=False)
                raise
            self._tell(done=True)
        else:
            if not self._tell(done=False):
                raise RankError(
                    "rank 0 failed while this rank waited for it; see rank 0's own message"
                )
            yield False

    def _tell(self, done: bool) -> bool:
        told = torch.tensor([done])
        self._wait(dist.broadcast(told, src=0, group=self._group, async_op=True))
        return bool(told)

    def _wait(self, work: Any) -> None:
        """Wait in Python, so that signals are heard, however long it takes."""
        pause = 1e-5
        try:
            while not work.is_completed():
                time.sleep(pause)
                pause = min(_MAX_POLL_S, 1.5 * pause)
            work.wait()
        except RuntimeError as error:  # the connection broke
            raise RankError(
                f"rank {self.rank} lost another rank of this run, which failed or was ended; its "
                "own message says why"
            ) from error


ALONE = Ranks()
"""The only process: every share is the whole, every sum is what it was."""
