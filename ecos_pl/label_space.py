"""The public space in which a client is asked about labels, found from the proxy set alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.encoder import public_name
from ecos_pl.invariance import fit_invariant_projection
from ecos_pl.kmeans import Clustering, kmeans
from ecos_pl.labeling import LabelingTask
from ecos_pl.projection import Projection, fit_pca_of_chunks


@dataclass(frozen=True)
class LabelSpace:
    """A linear map of the encoder's features, and the proxy set in it.

    Attributes:
        projection: As it travels, rounded to float16.
        features: [n, d] float32, the chosen images.
        views: [n, V, d], random views of each; None if there are none, or not for every image.
    """

    projection: Projection
    features: Tensor
    views: Tensor | None

    def encoding(self, task: LabelingTask) -> dict[str, Any]:
        """The fields of a query that tell the client how to get there (`messages.Encoding`)."""
        return {
            "encoder": public_name(task.encoder),
            "encoder_fingerprint": task.encoder_fingerprint,
            "mean": self.projection.mean.half(),
            "components": self.projection.components.half(),
        }

    def clusters(self, num_clusters: int, seed: int) -> Clustering:
        """k-means of the chosen images, its centroids rounded as they travel."""
        found = kmeans(self.features, min(num_clusters, len(self.features)), seed=seed)
        centroids = torch.unique(found.centroids.half(), dim=0).float()
        return Clustering(centroids, found.assignments, found.inertia, found.num_iters)


def find_label_space(task: LabelingTask, *, num_dims: int, num_views: int) -> LabelSpace:
    """Directions in which proxy images differ most relative to random views of one image.

    Args:
        task: The proxy set.
        num_dims: Dimensions d.
        num_views: Random views an image, V; 0 takes whitened principal components instead.
    """
    seen = list(task.views(num_views)) if num_views else []
    if seen:
        projection = fit_invariant_projection(task.embeddings, seen, num_dims)
    else:
        projection = fit_pca_of_chunks(task.embeddings(), num_dims).whitened()
    projection = projection.rounded()
    features = torch.cat([projection(torch.from_numpy(rows)) for rows in task.embeddings()])
    return LabelSpace(projection, features, _views_of_all(seen, projection, len(features)))


def _views_of_all(
    seen: Sequence[npt.NDArray[np.float32]], projection: Projection, num_images: int
) -> Tensor | None:
    if not seen or sum(map(len, seen)) != num_images:
        return None
    return torch.cat([projection(torch.from_numpy(chunk[:, 1:]).float()) for chunk in seen])
