"""How far the proxy set stays inside the client's manifold, and how much of it it fills.

Shapes: n images of the client, m chosen ones, D dimensions, k neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ecos_pl.quality.distances import distance_blocks

NUM_NEIGHBORS = 5
"""k of Naeem et al.; Kynkäänniemi et al. take 3."""


class Manifold(Metric):
    """k-NN precision, recall, density and coverage of chosen images for those of the client.

    The manifold of a set is the union of balls about its images, each as large as the distance to
    the image's k-th nearest neighbour in the set.

    - ``precision``: share of the chosen images that lie in the client's manifold;
    - ``recall``: share of the client's images that lie in the chosen images' manifold
      (both: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative
      Models", NeurIPS 2019, Eq. 2);
    - ``density``: how many of the client's balls a chosen image lies in, over k: about 1 if the
      sets are alike, more where they are denser, and not stretched by a single outlier's ball;
    - ``coverage``: share of the client's images with a chosen one in their ball
      (both: Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models", ICML
      2020, Eqs. 3 and 4).

    All depend on both numbers of images: compare sets of one size.

    Args:
        num_neighbors: k.
        kwargs: Of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    chosen: list[Tensor]
    client: list[Tensor]

    def __init__(self, num_neighbors: int = NUM_NEIGHBORS, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_neighbors < 1:
            raise ValueError(f"num_neighbors must be at least 1, not {num_neighbors}")
        self.num_neighbors = num_neighbors
        self.add_state("chosen", [], dist_reduce_fx="cat")
        self.add_state("client", [], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, *, client: bool) -> None:
        """Add embeddings [B, D] to the client's or to the chosen ones."""
        (self.client if client else self.chosen).append(embeddings.float())

    def compute(self) -> dict[str, Tensor]:
        """``precision``, ``recall``, ``density``, ``coverage``.

        Raises:
            ValueError: A set has no more images than neighbours are asked for.
        """
        chosen, client = dim_zero_cat(self.chosen), dim_zero_cat(self.client)
        client_radii = neighbor_distances(client, self.num_neighbors)
        chosen_radii = neighbor_distances(chosen, self.num_neighbors)
        in_client = torch.zeros(len(chosen), dtype=torch.bool, device=chosen.device)
        in_chosen = torch.zeros(len(client), dtype=torch.bool, device=chosen.device)
        has_chosen = torch.zeros_like(in_chosen)
        num_balls = torch.zeros((), dtype=torch.int64, device=chosen.device)
        for place, distances in distance_blocks(client, chosen):  # (B, m)
            in_ball = distances <= client_radii[place, None]
            in_client |= in_ball.any(dim=0)
            has_chosen[place] = in_ball.any(dim=1)
            num_balls += in_ball.sum()
            in_chosen[place] = (distances <= chosen_radii).any(dim=1)
        return {
            "precision": in_client.float().mean(),
            "recall": in_chosen.float().mean(),
            "density": num_balls / (self.num_neighbors * len(chosen)),
            "coverage": has_chosen.float().mean(),
        }


def neighbor_distances(rows: Tensor, num_neighbors: int) -> Tensor:
    """Distance [n] of each row [n, D] to its k-th nearest neighbour among the others.

    Raises:
        ValueError: There are no more rows than neighbours.
    """
    if len(rows) <= num_neighbors:
        raise ValueError(f"{len(rows)} images do not have {num_neighbors} neighbours each")
    found = rows.new_empty(len(rows))
    for place, distances in distance_blocks(rows, rows):
        own = torch.arange(place.start, place.stop, device=rows.device)
        distances[own - place.start, own] = torch.inf
        found[place] = distances.kthvalue(num_neighbors, dim=1).values
    return found
