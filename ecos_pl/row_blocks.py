"""Rows [N, d] of any size, read a block at a time: each rank its own blocks, always the same ones.

Work is cut into blocks by global row number, and a rank owns whole blocks. A matrix product thus
sees the same block whatever the number of ranks, and gives the same bits.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.ranks import ALONE, Ranks

_RESIDENT_BYTES = 1 << 24
"""Mapped pages are given back after so many bytes, so that reading a file does not fill memory."""


_KEPT_BYTES = 1 << 27
"""Chosen rows of up to so many bytes are kept in memory; more of them are read again each time."""


class Rows(Protocol):
    """Embeddings [N, d]: a tensor, an array, a memory map or an `EmbeddingBank`.

    ``rows[first:stop]`` and ``rows[numbers]`` (an int64 array) give a tensor or an array.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, d)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class RowBlocks:
    """This rank's blocks of some rows; iterating yields each as float32 on the device.

    Args:
        rows: [N, d].
        block_rows: Rows of a block; the last one may be shorter.
        device: Where blocks are brought.
        ranks: Each has a contiguous share of the blocks.
        chosen: Row numbers [n], ascending; only these are read, and kept if they are few.
    """

    def __init__(
        self,
        rows: Rows,
        block_rows: int,
        *,
        device: torch.device | str = "cpu",
        ranks: Ranks = ALONE,
        chosen: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.num_rows = len(rows) if chosen is None else len(chosen)
        self.num_dims = int(rows.shape[1])
        self.device, self.ranks = device, ranks
        self.is_sample = chosen is not None
        blocks = ranks.block(-(-self.num_rows // block_rows))
        self.first = blocks.start * block_rows
        self.stop = min(blocks.stop * block_rows, self.num_rows)
        self._block_rows = block_rows
        self._rows, self._chosen = rows, chosen
        self._kept: Tensor | None = None
        if chosen is not None and 2 * len(self) * self.num_dims <= _KEPT_BYTES:  # of float16
            self._kept = read_rows(rows, chosen[self.first : self.stop]).to(device)

    def __len__(self) -> int:
        """Rows of this rank's share."""
        return max(0, self.stop - self.first)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield where a block lies in this rank's share, and its rows [B, d] float32."""
        unreleased = 0
        for first in range(self.first, self.stop, self._block_rows):
            stop = min(first + self._block_rows, self.stop)
            place = slice(first - self.first, stop - self.first)
            if self._kept is not None:
                block = self._kept[place]
            elif self._chosen is not None:
                block = read_rows(self._rows, self._chosen[first:stop])
            else:
                block = as_tensor(self._rows[first:stop])
            yield place, block.to(self.device).float()
            unreleased += block.nbytes
            if unreleased > _RESIDENT_BYTES:
                release_pages(self._rows)
                unreleased = 0
        release_pages(self._rows)

    def zeros_by_block(self) -> Tensor:
        """Zeros float64, one for each block of this rank, on the device."""
        number = -(-len(self) // self._block_rows)
        return torch.zeros(number, dtype=torch.float64, device=self.device)

    def read(self, numbers: Tensor) -> Tensor:
        """Rows [n, d] float32 by their number in the whole, on every rank."""
        wanted = numbers.cpu().numpy()
        if self._chosen is not None:
            wanted = self._chosen[wanted]
        return read_rows(self._rows, wanted).to(self.device).float()


def read_rows(rows: Rows, numbers: npt.NDArray[np.int64]) -> Tensor:
    """The rows [n, d] of these numbers, in the dtype they are stored in; best ascending."""
    if isinstance(rows, Tensor):
        return rows.detach()[torch.from_numpy(numbers).to(rows.device)]
    # One row may bring 2 MB of a mapped file: what bounds memory is the span of the rows read.
    spans = numbers // max(1, _RESIDENT_BYTES // (4 * int(rows.shape[1])))
    edges = np.flatnonzero(np.diff(spans, prepend=-1, append=-1))
    found = torch.empty(0, int(rows.shape[1]))
    for first, stop in itertools.pairwise(edges.tolist()):
        part = as_tensor(rows[numbers[first:stop]])
        if not first:
            found = torch.empty(len(numbers), part.shape[1], dtype=part.dtype)
        found[first:stop] = part
        release_pages(rows)
    return found


def as_tensor(rows: Any) -> Tensor:
    """Rows as a tensor of the same dtype."""
    # A copy: a memory map may be read-only, which tensors cannot be.
    return rows.detach() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows))


def release_pages(rows: Rows) -> None:
    """Let the system have a memory map's pages back; they are read again when needed.

    Pages of a mapped file count as memory of the process that read them.
    """
    if isinstance(rows, np.memmap) and rows.mode in ("r", "r+"):  # "c" would lose what was written
        with contextlib.suppress(AttributeError, OSError):  # not on every system
            rows._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
