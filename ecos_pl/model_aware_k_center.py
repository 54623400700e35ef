"""Model-Aware K-center (MAK): near the client, and diverse. Not private: it reads its embeddings.

Shapes: N pool rows, n client images, d embedding dimensions.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.distances_to_client import nearest_distances
from ecos_pl.k_center import FarthestFirst
from ecos_pl.row_blocks import Rows

CANDIDATE_RATIO = 1.5
"""Candidates for each row that is wanted, as in the authors' code."""

Indices = npt.NDArray[np.int64]


class ModelAwareKCenter:
    """Rows near the client, in the order of greedy k-center from the client's images.

    MAK (Huang et al., "Improving contrastive learning on imbalanced data via open-world sampling",
    NeurIPS 2021) as the centralised reference of ECOS (section 3): make ``Δ(S, D_p) - H(S ∪ D_p;
    D_q)`` small, with the client's images D_p and the pool D_q in one place. By the authors' greedy
    rule, in two steps:

    1. Proximity: the ``CANDIDATE_RATIO · size`` rows with the smallest distance to their nearest
       client image are candidates (of equally near ones the first); this bounds Δ.
    2. Diversity: from the client's images as the first centers, the candidate farthest from all
       centers is taken and becomes a center, again and again (`FarthestFirst`): no candidate is
       farther from S ∪ D_p than twice what the best S of its size could reach.

    Rows wanted beyond the candidates follow by their distance to the client.

    Two differences from that code: its distance is to the nearest of ten centers of the training
    images, here it is Δ's own; and its candidates must also have a large contrastive loss
    ("tailness"), which needs a network trained on the client's images, and which the objective of
    ECOS leaves out.

    Args:
        embeddings: [N, d], finite at ``rows``.
        rows: Places of the rows that may be taken, ascending.
        client: [n, d], embeddings of the client's images.
        size: Rows wanted.
        device: Where distances are computed.
    """

    def __init__(
        self,
        embeddings: Rows,
        rows: Indices,
        client: Tensor,
        size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        distances = nearest_distances(embeddings, rows, client, device=device)
        distances, order = distances.sort(stable=True)
        number = math.ceil(CANDIDATE_RATIO * size)
        ordered = rows[order.numpy()]
        self._candidates = FarthestFirst(
            embeddings, ordered[:number], distances[:number], device=device
        )
        self._rest = ordered[number:]

    def more(self, number: int) -> Indices:
        """The next rows, about so many; none if there are no more."""
        found = self._candidates.more(number)
        if not len(found):
            found, self._rest = self._rest[:number], self._rest[number:]
        return found
