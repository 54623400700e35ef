"""The two terms of the method's own objective: proximity Δ and diversity H.

With the proxy set S, the client's images D_p, the pool D_q and the encoder φ, ECOS (Hong et al.,
NeurIPS 2022, Eq. 1; after MAK, Jiang et al., NeurIPS 2021) asks for

    min over S ⊆ D_q of  Δ(S, D_p) - H(S ∪ D_p; D_q)
    Δ(S, D_p)       = mean over x' in D_p of  min over x in S        of ‖φ(x) - φ(x')‖
    H(S ∪ D_p; D_q) = max  over x' in D_q of  min over x in S ∪ D_p  of ‖φ(x) - φ(x')‖

Both are distances of some points to the nearest of some centers, the mean of one, the largest of
the other. H as the paper prints it is the radius of k-center: what is chosen covers the pool the
better the *smaller* it is, although the formula subtracts it. We give the radius, without a sign.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from ecos_pl.quality.distances import nearest_distances


class NearestDistance(Metric):
    """Distance of fixed points to the nearest of centers that come in batches: mean and largest.

    With the client's images as points and the proxy set as centers, the mean is Δ(S, D_p). With
    the pool's images as points and the proxy set and the client's images as centers, the largest
    is H(S ∪ D_p; D_q).

    Memory: the points, a batch, and 16 MiB; work: ``P · C · d`` multiplications.

    Args:
        points: [P, d].
        kwargs: Of `torchmetrics.Metric`.

    >>> distance = NearestDistance(torch.tensor([[0.0], [4.0]]))
    >>> distance.update(torch.tensor([[1.0]]))
    >>> distance.update(torch.tensor([[9.0]]))
    >>> {name: float(value) for name, value in distance.compute().items()}
    {'mean': 2.0, 'max': 3.0}
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    points: Tensor
    distances: Tensor

    def __init__(self, points: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("points", points.float(), persistent=False)
        unknown = torch.full((len(points),), math.inf, device=points.device)
        self.add_state("distances", unknown, dist_reduce_fx="min")

    def update(self, centers: Tensor) -> None:
        """Take centers [C, d] into account."""
        found = nearest_distances(self.points, centers.to(self.points).float())
        self.distances = torch.minimum(self.distances, found)

    def compute(self) -> dict[str, Tensor]:
        """``mean`` and ``max`` over the points; infinite before the first center."""
        return {"mean": self.distances.mean(), "max": self.distances.max()}
