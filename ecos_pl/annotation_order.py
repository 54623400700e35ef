"""In which order people label the proxy set, so that a half-done job is already useful.

Shapes: n images in K clusters, N ≤ n of them labelled.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def annotation_order(
    clusters: Tensor, *, num_images: int | None = None, batch_size: int = 50, seed: int = 0
) -> Tensor:
    """Rows to label, batch after batch.

    Any number of whole batches, and the N images together, hold each cluster in proportion to its
    share of the proxy set, within one image, and a random sample of it. Within a batch, images of
    a cluster stand together, so that similar ones are labelled together. A larger N begins with
    the same images, whatever the batches.

    Args:
        clusters: [n] int64, the cluster of each image.
        num_images: N; None, or more than there are, for all.
        batch_size: Images per batch; the last one may have fewer.
        seed: Of what is left to chance.

    Returns:
        Rows [N] int64, each once.
    """
    generator = torch.Generator().manual_seed(seed)
    _, cluster_of, sizes = torch.unique(clusters, return_inverse=True, return_counts=True)
    shuffled = torch.randperm(len(clusters), generator=generator)
    # Rows cluster by cluster, at random within each.
    rows = shuffled[cluster_of[shuffled].argsort(stable=True)].tolist()
    phases = torch.rand(len(sizes), generator=generator, dtype=torch.float64)
    turns = proportional_turns(sizes.numpy(), phases.numpy())[:num_images]
    following = (sizes.cumsum(0) - sizes).tolist()  # place of each cluster's next image in `rows`
    order = []
    for start in range(0, len(turns), batch_size):
        for cluster in sorted(turns[start : start + batch_size]):
            order.append(rows[following[cluster]])
            following[cluster] += 1
    return torch.tensor(order, dtype=torch.int64)


def proportional_turns(sizes: npt.NDArray[np.int64], phases: npt.NDArray[np.float64]) -> list[int]:
    """Cluster numbers [n] such that every beginning is in proportion, within one.

    After t turns cluster k has had between ⌊t·s_k/n⌋ and ⌈t·s_k/n⌉ of its s_k (P-fairness on one
    processor: Baruah et al., "Proportionate progress", 1996). So its j-th turn, from 0, may not
    come before place ⌊j·n/s_k⌋ and must have come when ⌈(j+1)·n/s_k⌉ turns are done. Of the
    orders that keep this, one that gives each turn its wished-for place (j + phase)·n/s_k as far
    as it can: whoever wishes to be first of those that let all others be in time. Without wishes,
    the earliest deadline first would leave all small clusters for the end.

    Args:
        sizes: [K] int64, s_k > 0.
        phases: [K], in [0, 1): uniformly random ones let an early turn go to a cluster with a
            chance in proportion to its size.

    >>> proportional_turns(np.array([2, 4, 1]), np.array([0.5, 0.5, 0.5]))
    [1, 0, 1, 2, 1, 0, 1]
    """
    num, clusters = int(sizes.sum()), np.arange(len(sizes))
    done = np.zeros_like(sizes)
    # Turns left to give away freely before `place` turns are done, if all deadlines are to be
    # kept: places up to there, less deadlines up to there that are still open.
    places = np.arange(num + 1)
    slack = places.copy()
    for size in sizes.tolist():
        slack -= places * size // num
    turns: list[int] = []
    for place in range(num):
        tight = place + 1 + int((slack[place + 1 :] == 0).argmax())  # the last one is: slack[n] = 0
        deadline = -(-(done + 1) * num // sizes)
        allowed = (done < sizes) & (done * num // sizes <= place) & (deadline <= tight)
        wishes = np.where(allowed, (done + phases) / sizes, np.inf)
        chosen = int(clusters[wishes.argmin()])
        assert allowed[chosen], "some turn comes too late"
        slack[place + 1 : deadline[chosen]] -= 1
        done[chosen] += 1
        turns.append(chosen)
    return turns
