"""The nearest centroid of each row, by blocks whose scores stay in the processor's cache.

Shapes: N rows, d dimensions, R centroids, B rows of a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ecos_pl.centroid_search import GROUPED_ABOVE, ExactSearch, GroupedSearch
from ecos_pl.exact_float32 import exact_float32
from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.row_blocks import RowBlocks, Rows

_GROUPED_BLOCK_ROWS = 16_384


class NearestCentroid:
    """Finds the nearest (Euclidean) of some centroids [R, d], row by row.

    Exact, ties to the lowest index, up to ``GROUPED_ABOVE`` centroids; approximate, and sub-linear
    in R, above (`GroupedSearch`).
    """

    def __init__(self, centroids: Tensor) -> None:
        search = GroupedSearch if len(centroids) > GROUPED_ABOVE else ExactSearch
        self._search = search(centroids.float())

    def __call__(self, rows: Tensor, norms: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Nearest centroid [B] int64 of rows [B, d] and squared distance [B] float32 to it.

        NaN rows are at -1, at distance 0. Rows' squared norms [B] are computed if not given.
        """
        if norms is None:
            norms = rows.square().sum(dim=1)
        nearest, lowest = self._search(rows)
        distances = torch.add(norms, lowest, alpha=2).clamp_min_(0)
        unknown = norms.isnan()
        return nearest.masked_fill_(unknown, -1), distances.masked_fill_(unknown, 0)


def block_rows(num_clusters: int, device: torch.device | str) -> int:
    """Rows of a block for so many centroids: a function of nothing else, so that results are."""
    if torch.device(device).type != "cpu":  # many products at a time keep a GPU busy
        return min(65_536, max(512, (1 << 27) // num_clusters // 256 * 256))
    if num_clusters > GROUPED_ABOVE:
        return _GROUPED_BLOCK_ROWS
    return min(4096, max(512, (1 << 20) // num_clusters // 256 * 256))  # 4 MB of scores


@exact_float32()
def assign(
    rows: Rows, centroids: Tensor, *, device: torch.device | str = "cpu", ranks: Ranks = ALONE
) -> Tensor:
    """Index [N] int64 of the nearest centroid (ties go to the lowest index); -1 for NaN rows.

    Args:
        rows: [N, d].
        centroids: [R, d]; with more than `GROUPED_ABOVE`, see `GroupedSearch`.
        device: Where distances are computed; rows are brought there block by block.
        ranks: Each assigns its share of the rows; all get the whole result.

    Raises:
        ValueError: A row is infinite.
    """
    nearest = NearestCentroid(centroids.to(device))
    blocks = RowBlocks(rows, block_rows(len(centroids), device), device=device, ranks=ranks)
    found = torch.empty(len(blocks), dtype=torch.int32, device=device)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for place, block in blocks:
        found[place], distances = nearest(block)
        total += distances.sum(dtype=torch.float64)
    if not math.isfinite(ranks.sum(total)):
        raise ValueError("an embedding is not finite")
    return ranks.concat(found.cpu()).long()
