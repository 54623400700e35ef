"""A bounded look at a pool of any size, kept with the probe so that later processes can draw it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.row_blocks import Rows

NUM_OTHERS = 3000
NUM_CHOSEN = 1000

_PREFIX = "sample_"


@dataclass(frozen=True)
class PoolSample:
    """Some readable images of a pool: chosen ones, and others drawn uniformly.

    Attributes:
        rows: [m] int64, ascending places in the pool.
        clusters: [m] int64.
        points: [m, d] float16, embeddings in the pool's principal components, largest first.
        distances: [m] float32, of each from its cluster's centroid in those dimensions.
    """

    rows: Tensor
    clusters: Tensor
    points: Tensor
    distances: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """To be saved among other tensors."""
        return {f"{_PREFIX}{name}": value for name, value in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> PoolSample | None:
        """Out of tensors that were read; None where no sample is among them."""
        found = {
            name.removeprefix(_PREFIX): value
            for name, value in tensors.items()
            if name.startswith(_PREFIX)
        }
        return cls(**found) if found else None


def sample_pool(
    assignments: npt.NDArray[np.int32],
    projected: Rows,
    centroids: Tensor,
    chosen: Tensor,
    *,
    seed: int,
    num_others: int = NUM_OTHERS,
    num_chosen: int = NUM_CHOSEN,
) -> PoolSample:
    """Draw at most ``num_chosen`` of the chosen images and ``num_others`` of the rest.

    Args:
        assignments: [N], cluster of each row, -1 for unreadable images.
        projected: [N, d], the rows in principal components.
        centroids: [R, d].
        chosen: [n] int64 rows.
        seed: Of the draw.
        num_others: Not chosen ones at most; somewhat fewer where unreadable ones were drawn.
        num_chosen: Chosen ones at most.
    """
    generator = torch.Generator().manual_seed(seed)
    size = len(assignments)
    if size <= 8 * num_others:
        drawn = torch.arange(size)
    else:  # never all rows of a large pool
        drawn = torch.unique(torch.randint(size, (2 * num_others,), generator=generator))
    readable = torch.from_numpy(np.asarray(assignments[drawn.numpy()]) >= 0)
    others = drawn[readable & ~torch.isin(drawn, chosen)]
    others = others[torch.randperm(len(others), generator=generator)[:num_others]]
    shown = chosen[torch.randperm(len(chosen), generator=generator)[:num_chosen]]
    rows = torch.cat([shown, others]).sort().values
    places = rows.numpy()
    clusters = torch.from_numpy(np.asarray(assignments[places]).astype(np.int64))
    points = torch.from_numpy(np.asarray(projected[places], np.float16))
    distances = (points.float() - centroids[clusters].float()).norm(dim=1)
    return PoolSample(rows, clusters, points, distances)
