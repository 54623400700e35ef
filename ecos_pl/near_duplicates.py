"""Telling near-duplicate images by their embeddings, as rows come in order of preference.

Shapes: N pool rows, d projected and D encoder dimensions, B rows of a block, K rows kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.exact_float32 import exact_float32
from ecos_pl.row_blocks import Rows
from ecos_pl.row_reading import read_scattered

DUPLICATE_DISTANCE = 0.12
"""Unit embeddings this near are of near-duplicates. Of tf_efficientnet_lite0 at 48 px:

Distinct images: in the pool of mixed_digits (13,997) all but one pair are farther apart than 0.13;
the pair shows one pullover. A larger pool of one kind is denser: of 10,000 MNIST digits 0.2% have
another within 0.12, of 10,000 garments 0.02%. Near-duplicates: photos of 213 px stay within 0.12
when they are saved as JPEG of quality 90 (all), or of 75 (10 of 12), are made larger or smaller by
a tenth (all), 2% brighter or darker (11 of 12), or moved by a pixel (9 of 12). Pictures of 28 px do
not: compression changes them more than digits differ, so that only copies, enlarged or 2% brighter
or darker ones are found (0.93 and more of them). Another encoder wants a measurement of its own.
``benchmarks/duplicate_distance.py`` measures all but the 10,000.
"""

BLOCK_ROWS = 2048
"""Rows compared with each other at once."""

KEPT_ROWS = 8192
"""Kept rows that a block is compared with at once."""

PAIR_ROWS = 4096
"""Pairs whose rows of D dimensions are in memory at once."""

HALF_ULP = 2.0**-11
"""Largest relative error of a number rounded to float16."""

Indices = npt.NDArray[np.int64]


class DistinctRows:
    """Takes rows in order of preference; keeps those that are no near-duplicate of a kept one.

    The kept rows lie farther from each other than ``distance``, and each one that is not kept has
    a kept one before it within the distance: nothing but the order and the rows matters, neither
    how many are given at a time nor how they are compared.

    The distance is Euclidean between ``full_embeddings``, the encoder's own. The rows in fewer
    dimensions serve to find the few pairs worth looking at: an orthogonal projection shortens
    distances, never stretches them, but for the rounding of both (float16), which is allowed for.

    Costs ``K²/2 · d`` multiplications, and ``4 · K · d`` bytes beside blocks.

    Args:
        embeddings: [N, d], an orthogonal projection of the full ones.
        full_embeddings: [N, D] unit rows; None if ``embeddings`` are all there is, which are then
            compared themselves.
        distance: Two images nearer than this, or as near, are near-duplicates; 0 keeps all rows.
        device: Where the rows in fewer dimensions are compared.
    """

    def __init__(
        self,
        embeddings: Rows,
        full_embeddings: Rows | None,
        distance: float,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if not distance >= 0:
            raise ValueError(f"duplicate_distance must not be negative, not {distance}")
        self.distance = distance
        self._embeddings, self._device = embeddings, device
        self._full = embeddings if full_embeddings is None else full_embeddings
        self._rows: list[Indices] = []
        self._kept: list[Tensor] = []

    def __call__(self, rows: Indices) -> npt.NDArray[np.bool_]:
        """Mark the rows [B] that are kept; rows given before must not come again."""
        if self.distance == 0:
            return np.ones(len(rows), np.bool_)
        with exact_float32():
            blocks = [
                self._keep(rows[first : first + BLOCK_ROWS])
                for first in range(0, len(rows), BLOCK_ROWS)
            ]
        return np.concatenate([np.empty(0, np.bool_), *blocks])

    def _keep(self, rows: Indices) -> npt.NDArray[np.bool_]:
        table = read_scattered(self._embeddings, rows).to(self._device).float()
        alive = np.ones(len(rows), np.bool_)
        for kept_rows, kept in zip(self._rows, self._kept, strict=True):
            new, old = self._near_pairs(table, kept)
            undecided = alive[new]
            new, old = new[undecided], old[undecided]
            alive[new[self._are_duplicates(rows[new], kept_rows[old])]] = False
        self._compare_with_each_other(rows, table, alive)
        self._add(rows[alive], table[torch.from_numpy(alive).to(self._device)])
        return alive

    def _compare_with_each_other(
        self, rows: Indices, table: Tensor, alive: npt.NDArray[np.bool_]
    ) -> None:
        """Take the mark from rows that have a kept one before them within the distance."""
        among = np.flatnonzero(alive)
        some = table[torch.from_numpy(among).to(self._device)]
        earlier, later = self._near_pairs(some, some)  # by the earlier one, ascending
        ordered = later > earlier
        earlier, later = among[earlier[ordered]], among[later[ordered]]
        if not len(earlier):
            return
        involved = np.unique(np.concatenate([earlier, later]))
        full = read_scattered(self._full, rows[involved])
        place = np.empty(len(rows), np.int64)
        place[involved] = np.arange(len(involved))
        first = np.flatnonzero(np.diff(earlier, prepend=-1))
        for start, stop in zip(first, np.append(first[1:], len(earlier)), strict=True):
            # Its turn has come, so it is known whether it is kept.
            if alive[earlier[start]]:
                others = later[start:stop]
                others = others[alive[others]]
                one = full[place[earlier[start]]].double()
                near = self._within(full[torch.from_numpy(place[others])].double() - one)
                alive[others[near]] = False

    def _add(self, rows: Indices, table: Tensor) -> None:
        if self._kept and len(self._kept[-1]) + len(rows) <= KEPT_ROWS:
            rows = np.concatenate([self._rows.pop(), rows])
            table = torch.cat([self._kept.pop(), table])
        self._rows.append(rows)
        self._kept.append(table)

    def _near_pairs(self, left: Tensor, right: Tensor) -> tuple[Indices, Indices]:
        """Pairs that may be near-duplicates, by the rows in fewer dimensions."""
        squares, others = left.square().sum(dim=1), right.square().sum(dim=1)
        # A projection rounded to float16 stretches a little, and so do rounded rows.
        size = float(squares.max().sqrt() + others.max().sqrt()) if len(left) and len(right) else 0
        reach = self.distance * (1 + 2 * HALF_ULP) + size * HALF_ULP
        found = torch.addmm(others, left, right.T, alpha=-2)
        limit = reach**2 + 1e-6 * size**2 - squares
        near = torch.nonzero(found <= limit[:, None]).cpu().numpy()
        return near[:, 0], near[:, 1]

    def _are_duplicates(self, left: Indices, right: Indices) -> npt.NDArray[np.bool_]:
        """Whether rows [P] and [P] lie within the distance in the encoder's own space."""
        found = np.empty(len(left), np.bool_)
        for first in range(0, len(left), PAIR_ROWS):
            some = slice(first, first + PAIR_ROWS)
            numbers, places = np.unique(np.stack([left[some], right[some]]), return_inverse=True)
            table = read_scattered(self._full, numbers).double()
            one, two = table[torch.from_numpy(places.reshape(2, -1))]
            found[some] = self._within(one - two)
        return found

    def _within(self, differences: Tensor) -> npt.NDArray[np.bool_]:
        return (differences.square().sum(dim=1).sqrt() <= self.distance).numpy()
