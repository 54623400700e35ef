"""Greedy k-center: rows of the pool that each lie as far as can be from those before them.

Shapes: N pool rows, C candidates, d embedding dimensions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.progress import progress_bar
from ecos_pl.row_blocks import Rows
from ecos_pl.row_reading import read_scattered

HELD_VALUES = 2**26
"""Numbers of candidates in memory at once (256 MiB in float32): 1M rows of 64 dimensions."""

BLOCK_VALUES = 2**19
"""Numbers that a CPU subtracts at once (2 MiB in float32): they fit its caches."""

_CHECKED_PICKS = 256
"""Picks between two looks at whether any candidate is left that is no copy of a pick."""

_LONG_WORK = 2**34
"""Subtractions from which on there is a progress bar: some seconds of one CPU core."""

Indices = npt.NDArray[np.int64]


class KCenter:
    """The pool's rows in the order of greedy k-center, from a first row that is drawn.

    Gonzalez' greedy rule (1985), as in Sener & Savarese (ICLR 2018): each row is the farthest from
    all before it, of equally far ones the first in an order drawn beforehand. However many are
    taken, no row of the pool is farther from them than twice what the best choice could reach.

    Exact for up to ``HELD_VALUES`` numbers of embeddings; ``picks · N · d`` subtractions, so that
    1,500 of 120,000 rows of 64 dimensions take some seconds of one CPU core. Of a larger pool the
    candidates are a uniform sample of so many rows, as far as it goes; then a further one, which
    starts anew: what is rarer than one row in a million may be missed.

    Args:
        embeddings: [N, d], finite at ``rows``.
        rows: Places of the rows that may be taken.
        generator: Draws the order.
        device: Where distances are computed.
    """

    def __init__(
        self,
        embeddings: Rows,
        rows: Indices,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        self._embeddings, self._device = embeddings, device
        self._order = rows[torch.randperm(len(rows), generator=generator).numpy()]
        self._limit = max(1, HELD_VALUES // int(embeddings.shape[1]))
        self._sample: FarthestFirst | None = None

    def more(self, number: int) -> Indices:
        """The next rows, about so many; none if there are no more."""
        while True:
            found = np.empty(0, np.int64) if self._sample is None else self._sample.more(number)
            if len(found) or not len(self._order):
                return found
            sample, self._order = self._order[: self._limit], self._order[self._limit :]
            self._sample = FarthestFirst(self._embeddings, sample, device=self._device)


class FarthestFirst:
    """Candidates, each the farthest from all before it and from the centers that there are.

    Takes ``4 · C · d`` bytes of memory.

    Args:
        embeddings: [N, d], finite at the candidates.
        candidates: [C], their places; of equally far ones the first here comes first.
        closest: [C] float32, squared distances to the nearest of the centers that there are; None
            if there are none, and the first candidate begins.
        device: Where distances are computed.
    """

    def __init__(
        self,
        embeddings: Rows,
        candidates: Indices,
        closest: Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self._candidates, self._num_left = candidates, len(candidates)
        self._table = read_scattered(embeddings, candidates).to(device).float()
        if closest is None:
            closest = torch.full((len(candidates),), torch.inf)
        self._closest = closest.to(device, torch.float32, copy=True)  # -inf once it is taken
        whole = self._table.device.type != "cpu"
        self._block_rows = len(candidates) if whole else BLOCK_VALUES // self._table.shape[1] + 1

    def more(self, number: int) -> Indices:
        """The next ones, so many if there are."""
        number = min(number, self._num_left)
        self._num_left -= number
        picks: list[Tensor] = []
        title = "choosing far-apart images" if number * self._table.numel() > _LONG_WORK else None
        with progress_bar(title, number, "images") as advance:
            while len(picks) < number:
                if len(picks) % _CHECKED_PICKS == 0 and not self._closest.max() > 0:
                    break
                picks.append(self._take_farthest())
                advance(1)
        # Copies of the picks: all are at distance 0, and the first come first.
        copies = torch.nonzero(self._closest == 0).flatten()[: number - len(picks)]
        self._closest[copies] = -torch.inf
        places = torch.cat([torch.stack(picks), copies]) if picks else copies
        found: Indices = self._candidates[places.cpu().numpy()]
        return found

    def _take_farthest(self) -> Tensor:
        pick = self._closest.argmax()  # of equal ones the first
        point = self._table[pick]
        blocks = (torch.split(t, self._block_rows) for t in (self._closest, self._table))
        for closest, rows in zip(*blocks, strict=True):
            # Differences, no products: exact to the last bits also where rows are near.
            torch.minimum(closest, (rows - point).square_().sum(dim=1), out=closest)
        self._closest[pick] = -torch.inf
        return pick
