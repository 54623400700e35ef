"""Distances between the pool and a client that shows its embeddings, block by block.

Shapes: N pool rows, n client images, d embedding dimensions, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.row_blocks import Rows, read_rows

BLOCK_DISTANCES = 2**22
"""Distances computed at once (32 MiB in float64)."""

Indices = npt.NDArray[np.int64]


def distances_by_block(
    embeddings: Rows, rows: Indices, client: Tensor, *, device: torch.device | str = "cpu"
) -> Iterator[tuple[slice, Tensor]]:
    """Yield where a block lies in ``rows``, and its squared distances [n, B] float32.

    Computed in float64, so that products do not blur what is near, and rounded.

    Args:
        embeddings: [N, d].
        rows: Places of rows there, ascending; those that are looked at.
        client: [n, d], embeddings of the client's images.
        device: Where distances are computed.
    """
    client = client.to(device).double()
    squares = client.square().sum(dim=1, keepdim=True)
    block_rows = max(256, BLOCK_DISTANCES // max(1, len(client)))
    for first in range(0, len(rows), block_rows):
        place = slice(first, min(first + block_rows, len(rows)))
        block = read_rows(embeddings, rows[place]).to(device).double()
        distances = torch.addmm(block.square().sum(dim=1), client, block.T, alpha=-2)
        yield place, distances.add_(squares).clamp_min_(0).float()


def nearest_distances(
    embeddings: Rows, rows: Indices, client: Tensor, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Squared distance [len(rows)] float32 of each row to the nearest client image."""
    found = torch.empty(len(rows))
    for place, distances in distances_by_block(embeddings, rows, client, device=device):
        found[place] = distances.amin(dim=0).cpu()
    return found
