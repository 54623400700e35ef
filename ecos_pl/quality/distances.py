"""Distances between two sets of embeddings, a block at a time.

Shapes: P points, C centers, d dimensions, B points of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ecos_pl.exact_float32 import exact_float32

BLOCK_VALUES = 2**22
"""Distances in memory at once (16 MiB in float32)."""


def blocks(num_points: int, num_centers: int) -> Iterator[slice]:
    """Places of points such that the distances to all centers fit into a block."""
    size = max(1, BLOCK_VALUES // max(1, num_centers))
    for first in range(0, num_points, size):
        yield slice(first, min(first + size, num_points))


def distance_blocks(points: Tensor, centers: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield where a block of points lies, and its Euclidean distances [B, C] to all centers.

    By the scalar product, so of unit vectors right to about 5e-4 where they are nearly 0.
    """
    squares = centers.square().sum(dim=1)
    for place in blocks(len(points), len(centers)):
        some = points[place]
        with exact_float32():
            found = torch.addmm(squares, some, centers.T, alpha=-2)
        found += some.square().sum(dim=1, keepdim=True)
        yield place, found.clamp_min_(0).sqrt_()


def nearest_distances(
    points: Tensor,
    centers: Tensor,
    *,
    point_ids: Tensor | None = None,
    center_ids: Tensor | None = None,
) -> Tensor:
    """Euclidean distance [P] of each point to the nearest center; infinite without any.

    The scalar product finds the nearest one, the difference of both gives the distance: a point
    that is a center itself is at 0 sharp.

    Args:
        points: [P, d] float32.
        centers: [C, d] float32.
        point_ids: [P] int64; a point is not compared with centers of the same id.
        center_ids: [C] int64.

    >>> nearest_distances(torch.tensor([[0.0], [5.0]]), torch.tensor([[1.0], [2.0]])).tolist()
    [1.0, 3.0]
    """
    found = points.new_full((len(points),), math.inf)
    if not len(centers):
        return found
    halves = centers.square().sum(dim=1) / 2
    for place in blocks(len(points), len(centers)):
        some = points[place]
        with exact_float32():
            scores = torch.addmm(halves, some, centers.T, alpha=-1)
        if point_ids is not None and center_ids is not None:
            scores.masked_fill_(point_ids[place, None] == center_ids, math.inf)
        lowest, nearest = scores.min(dim=1)
        distances = torch.linalg.vector_norm(some - centers[nearest], dim=1)
        found[place] = distances.masked_fill_(lowest == math.inf, math.inf)
    return found
