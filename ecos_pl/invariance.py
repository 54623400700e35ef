"""A public space for labels: directions in which images differ more than views of one image do.

What a small shift or turn changes in an embedding says nothing about the class. Such directions
are found without any label, from public images alone, and left out; the noise of a private
release then falls on fewer, more telling dimensions.

Shapes: B images of a chunk, V views an image, D embedding dimensions, d kept dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.projection import Projection, fit_pca_of_chunks

NUM_CANDIDATES = 256
"""Principal components among which directions are sought: fewer than images, so that both
covariances are well determined."""

_RIDGE = 0.1  # of the mean within-image variance: keeps rarely varying directions from ruling


def random_view(image: Tensor, generator: torch.Generator) -> Tensor:
    """A slightly turned, shifted, scaled and sheared copy of an image [3, S, S] uint8.

    Up to 15 degrees, an eighth of the side, 20% of the size, 10 degrees of shear: what leaves a
    digit, a garment or an organ what it is. Uncovered corners take the border's mean colour.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    side = image.shape[-1]
    angle, shift_x, shift_y, size, shear = (
        2 * torch.rand(5, generator=generator, dtype=torch.float64) - 1
    ).tolist()
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
    view: Tensor = F.affine(
        image,
        angle=15 * angle,
        translate=[round(shift_x * side / 8), round(shift_y * side / 8)],
        scale=1 + 0.2 * size,
        shear=[10 * shear, 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=border.float().mean(dim=1).tolist(),
    )
    return view


def fit_invariant_projection(
    embeddings: Callable[[], Iterable[npt.NDArray[np.float32]]],
    views: Iterable[npt.NDArray[np.float32]],
    num_dims: int,
) -> Projection:
    """Directions of largest variance between images relative to that between views of one image.

    Linear discriminant analysis in which every image, with its views, is a class of its own:
    the leading generalised eigenvectors of total against within-image covariance. Scaled so that
    every direction has variance one over the images.

    Args:
        embeddings: Gives chunks [B, D], as often as it is called.
        views: Chunks [B, V, D] of embeddings of several views each, for some of the images.
        num_dims: Directions kept.

    Raises:
        ValueError: There is no embedding or no view.
    """
    pca = fit_pca_of_chunks(embeddings(), NUM_CANDIDATES)
    within = torch.zeros(len(pca.components), len(pca.components), dtype=torch.float64)
    count = 0
    for chunk in views:
        deviations = torch.from_numpy(chunk - chunk.mean(axis=1, keepdims=True)).float()
        rows = (deviations.flatten(0, 1) @ pca.components.T).double()
        within += rows.T @ rows
        count += chunk.shape[0] * (chunk.shape[1] - 1)
    if not count:
        raise ValueError("no views to find invariant directions from")
    within /= count
    within += _RIDGE * within.diagonal().mean() * torch.eye(len(within), dtype=torch.float64)
    factor = torch.linalg.cholesky(within)
    total = torch.diag(pca.variances.double())
    half = torch.linalg.solve_triangular(factor, total, upper=False)
    symmetric = torch.linalg.solve_triangular(factor, half.T, upper=False)
    ratios, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    kept = min(num_dims, len(ratios))
    ratios, vectors = ratios.flip(0)[:kept], vectors.flip(1)[:, :kept]
    directions = torch.linalg.solve_triangular(factor.T, vectors, upper=True)
    directions = directions / ratios.clamp_min(1e-6 * float(ratios[0])).sqrt()
    signs = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    components = (directions * signs).T.float() @ pca.components
    return Projection(pca.mean, components, torch.ones(kept))
