"""Pool rows that the client's images take in turn. Not private: it reads the client's embeddings.

Shapes: N pool rows, n client images, d embedding dimensions, k rows listed for an image.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.distances_to_client import distances_by_block
from ecos_pl.row_blocks import Rows

LISTED_ROWS = 32
"""Rows listed for each client image at first, at least; twice as many whenever a list is used up.

Where the client's images are alike, they are near the same few rows, and most find theirs gone.
"""

LIST_VALUES = 2**24
"""Rows in all lists together at most (128 MiB), unless each is shorter than ``LISTED_ROWS``."""

Indices = npt.NDArray[np.int64]


class NearestInTurn:
    """Rows in the order in which the client's images choose, each its nearest one that is left.

    The images come in an order that is drawn, again and again. Every image has its say, as where
    large training sets are retrieved for a small one (DINOv2, Oquab et al. 2023, "sample-based"):
    the chosen rows then follow the client's distribution, and the mean distance of a client image
    to its nearest chosen row is small. The rows that are nearest to any client image would crowd
    where the client's images are alike, and leave out its rare kinds.

    Exact, of equally near rows (in float32) the first. Each reading of the pool costs ``n · N · d``
    multiplications and ``8 · n · k`` bytes; one is enough unless all the rows that are listed for
    an image go to others.

    Args:
        embeddings: [N, d], finite at ``rows``.
        rows: Places of the rows that may be taken, ascending.
        client: [n, d], embeddings of the client's images.
        generator: Draws the order of the images.
        device: Where distances are computed.
    """

    def __init__(
        self,
        embeddings: Rows,
        rows: Indices,
        client: Tensor,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        self._embeddings, self._rows, self._device = embeddings, rows, device
        self._client = client[torch.randperm(len(client), generator=generator)]
        self._is_left, self._num_left = np.ones(len(rows), np.bool_), len(rows)
        self._turn = 0
        self._lists = np.empty((len(client), 0), np.int64)  # [n, k] places in `rows`
        self._next = np.zeros(len(client), np.int64)  # [n], how far each list is used up
        self._num_listed = 0

    def more(self, number: int) -> Indices:
        """The next rows, so many if there are."""
        taken: list[int] = []
        while len(taken) < number and self._num_left:
            row = self._nearest_left(self._turn)
            if row is None:
                wanted = max(2 * self._num_listed, 4 * number // len(self._client))
                most = LIST_VALUES // len(self._client)
                self._num_listed = max(LISTED_ROWS, min(wanted, most))
                self._list_anew(self._num_listed)
                continue
            self._is_left[row] = False
            self._num_left -= 1
            taken.append(row)
            self._turn = (self._turn + 1) % len(self._client)
        return self._rows[np.array(taken, np.int64)]

    def _nearest_left(self, image: int) -> int | None:
        listed = self._lists[image]
        while self._next[image] < len(listed):
            row = int(listed[self._next[image]])
            self._next[image] += 1
            if self._is_left[row]:
                return row
        return None

    def _list_anew(self, number: int) -> None:
        """List for each client image the nearest rows that are left, so many if there are."""
        left = np.flatnonzero(self._is_left)
        best = torch.empty((len(self._client), 0), dtype=torch.int64, device=self._device)
        for place, distances in distances_by_block(
            self._embeddings, self._rows[left], self._client, device=self._device
        ):
            # The bits of a float32 that is not negative are in its order; the row breaks ties.
            keys = distances.view(torch.int32).long() << 32
            keys |= torch.arange(place.start, place.stop, device=self._device)
            best = torch.cat([best, keys], dim=1)
            best = best.topk(min(number, best.shape[1]), largest=False).values
        self._lists = left[(best & (2**32 - 1)).cpu().numpy()]
        self._next[:] = 0
