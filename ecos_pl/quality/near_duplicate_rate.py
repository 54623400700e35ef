"""How many images of a set have a near-copy in it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ecos_pl.quality.distances import nearest_distances


class NearDuplicateRate(Metric):
    """Share of images that have another one of the set within a distance.

    What `near_duplicates.DistinctRows` leaves of a set has a rate of 0. The images asked about may
    be a sample of the set: the share is then an estimate.

    Args:
        rows: [Q, D] embeddings of the images asked about.
        ids: [Q] int64, which images they are: none is compared with itself.
        distance: Two images nearer than this, or as near, are near-duplicates.
        kwargs: Of `torchmetrics.Metric`.

    >>> rows, ids = torch.tensor([[0.0], [1.0], [1.1]]), torch.arange(3)
    >>> rate = NearDuplicateRate(rows, ids, 0.2)
    >>> rate.update(rows, ids)
    >>> round(float(rate.compute()), 4)
    0.6667
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    rows: Tensor
    ids: Tensor
    distances: Tensor

    def __init__(self, rows: Tensor, ids: Tensor, distance: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not distance > 0:
            raise ValueError(f"the distance of near-duplicates must be positive, not {distance}")
        self.distance = distance
        self.register_buffer("rows", rows.float(), persistent=False)
        self.register_buffer("ids", ids.to(rows.device), persistent=False)
        unknown = torch.full((len(rows),), math.inf, device=rows.device)
        self.add_state("distances", unknown, dist_reduce_fx="min")

    def update(self, rows: Tensor, ids: Tensor) -> None:
        """Compare with images [B, D] of the set, of ids [B]."""
        found = nearest_distances(
            self.rows,
            rows.to(self.rows).float(),
            point_ids=self.ids,
            center_ids=ids.to(self.ids.device),
        )
        self.distances = torch.minimum(self.distances, found)

    def compute(self) -> Tensor:
        """NaN without images."""
        return (self.distances <= self.distance).float().mean()
