"""Class probabilities of public images from the client's votes on a few of them.

Shapes: n images, d dimensions, Q queries, K classes.

Votes are dear, so only some images are asked about (cluster medoids), and what they are said to be
is spread to the others over a graph of nearest neighbours (Zhou et al. 2004, "Learning with local
and global consistency"). A linear discriminant fitted to the result evens out wrong answers. All
this costs no privacy: nothing but the release and public images is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.neighbors import kneighbors_graph
from torch import Tensor

from ecos_pl.table_posteriors import NUM_STEPS, discriminant_posteriors

_CHUNK_SIZE = 1_024


def medoids(features: Tensor, centroids: Tensor) -> Tensor:
    """Return the rows [R] int64 of the images nearest to each centroid: whom to ask about."""
    nearest = []
    for start in range(0, len(centroids), _CHUNK_SIZE):
        part = centroids[start : start + _CHUNK_SIZE]
        nearest.append(torch.cdist(part.double(), features.double()).argmin(dim=1))
    return torch.cat(nearest)


def vote_posteriors(
    features: Tensor,
    query_rows: Tensor,
    answers: Tensor,
    num_classes: int,
    *,
    num_neighbors: int = 10,
    alpha: float = 0.9,
    num_steps: int = NUM_STEPS,
) -> Tensor:
    """Class probabilities [n, K] float32, rows summing to one.

    Args:
        features: [n, d], public images.
        query_rows: [Q] int64, which images were asked about.
        answers: [Q] int64, their noisy classes; -1 where there is no answer.
        num_classes: K.
        num_neighbors: Of an image in the graph.
        alpha: Weight of an image's neighbours against its own answer, in [0, 1).
        num_steps: Discriminants fitted after another; 0 gives the spread labels alone.

    Raises:
        ValueError: If shapes do not fit or a number is out of range.
    """
    if query_rows.ndim != 1 or query_rows.shape != answers.shape:
        raise ValueError("query_rows and answers must be lists of one length")
    if not bool(((answers >= -1) & (answers < num_classes)).all()):
        raise ValueError(f"answers must lie in [-1, {num_classes})")
    if len(features) < 2 or num_neighbors < 1:
        raise ValueError("spreading labels needs two images or more, and num_neighbors above zero")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must lie in [0, 1), not {alpha:g}")
    answered = answers >= 0
    if not bool(answered.any()):
        return torch.full((len(features), num_classes), 1 / num_classes)
    known = np.zeros((len(features), num_classes))
    known[query_rows[answered].numpy(), answers[answered].numpy()] = 1
    graph = neighbor_graph(features, num_neighbors)
    spread = spread_labels(graph, known, alpha=alpha)
    # Where no answer arrives, at most this is left: the answers' shares.
    shares = torch.from_numpy(spread + 1e-9 * known.mean(axis=0) + 1e-15)
    return discriminant_posteriors(
        features, shares / shares.sum(dim=1, keepdim=True), num_steps=num_steps
    )


def spread_labels(
    graph: Any, known: npt.NDArray[np.float64], *, alpha: float, num_iters: int = 200
) -> npt.NDArray[np.float64]:
    """Iterate F = α S F + (1 - α) Y, with S the graph normalised by its degrees (Zhou et al. 2004).

    Args:
        graph: [n, n] sparse matrix, symmetric, non-negative, zero diagonal.
        known: Y [n, K], one-hot rows of what is known, zeros elsewhere.
        alpha: In [0, 1); what is left to go after t iterations is below α^t.
        num_iters: Most iterations.
    """
    degrees = graph @ np.ones((len(known), 1))
    scale = 1 / np.sqrt(np.maximum(degrees, 1e-12))
    spread: npt.NDArray[np.float64] = (1 - alpha) * known
    for _ in range(num_iters):
        previous = spread
        spread = alpha * scale * (graph @ (scale * spread)) + (1 - alpha) * known
        if np.abs(spread - previous).max() < 1e-9:
            break
    return spread


def neighbor_graph(features: Tensor, num_neighbors: int) -> Any:
    """Join every image with its nearest others: a sparse [n, n], symmetric, weight one."""
    num_neighbors = min(num_neighbors, len(features) - 1)
    graph = kneighbors_graph(features.double().numpy(), num_neighbors, include_self=False)
    return graph.maximum(graph.T)
