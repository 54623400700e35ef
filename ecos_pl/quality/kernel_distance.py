"""Whether two sets of embeddings look like draws from one distribution: MMD² with KID's kernel.

Shapes: n and m images, D dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ecos_pl.exact_float32 import exact_float32
from ecos_pl.quality.distances import blocks

BLOCK_IMAGES = 4096
"""Images of each set that are compared with each other; larger sets are compared in parts."""


class KernelDistance(Metric):
    """Squared maximum mean discrepancy of two sets, unbiased: about 0, or below, if alike.

    The kernel is ``(x·y + 1)³``: that of the Kernel Inception Distance (Bińkowski et al., ICLR
    2018), ``(x·y / D + 1)³``, for unit vectors that are scaled to the length √D which features
    have there. It compares means, covariances and third moments, and has no bandwidth to choose.

    The estimator is the U-statistic of Gretton et al., "A Kernel Two-Sample Test", JMLR 2012,
    Eq. 3. Of sets larger than `block_images` each is shuffled and cut into as many parts, and the
    estimates of the pairs of parts are averaged: still unbiased, at linear cost (Zaremba et al.,
    "B-tests", NeurIPS 2013).

    Args:
        block_images: Images of a part at most.
        seed: Of the shuffling.
        kwargs: Of `torchmetrics.Metric`.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    chosen: list[Tensor]
    client: list[Tensor]

    def __init__(self, block_images: int = BLOCK_IMAGES, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if block_images < 2:
            raise ValueError(f"block_images must be at least 2, not {block_images}")
        self.block_images, self.seed = block_images, seed
        self.add_state("chosen", [], dist_reduce_fx="cat")
        self.add_state("client", [], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, *, client: bool) -> None:
        """Add embeddings [B, D] to the client's or to the chosen ones."""
        (self.client if client else self.chosen).append(embeddings.float())

    def compute(self) -> Tensor:
        """The estimate, float64.

        Raises:
            ValueError: A set has fewer than two images.
        """
        sets = dim_zero_cat(self.chosen), dim_zero_cat(self.client)
        sizes = [len(one) for one in sets]
        if min(sizes) < 2:
            raise ValueError("the kernel distance needs two images of each set")
        num_parts = min(-(-max(sizes) // self.block_images), min(sizes) // 2)
        if num_parts == 1:
            return squared_mmd(*sets)
        generator = torch.Generator().manual_seed(self.seed)
        orders = [torch.randperm(size, generator=generator) for size in sizes]
        parts = [
            one[order.to(one.device)].tensor_split(num_parts)
            for one, order in zip(sets, orders, strict=True)
        ]
        return torch.stack([squared_mmd(*pair) for pair in zip(*parts, strict=True)]).mean()


def squared_mmd(left: Tensor, right: Tensor) -> Tensor:
    """Unbiased estimate, float64, of the squared MMD of sets [n, D] and [m, D].

    >>> float(squared_mmd(torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [1.0]])))
    7.0
    """
    n, m = len(left), len(right)
    within = (_kernel_sum(left, left) - _own_sum(left)) / (n * (n - 1))
    within = within + (_kernel_sum(right, right) - _own_sum(right)) / (m * (m - 1))
    return within - 2 * _kernel_sum(left, right) / (n * m)


def _kernel_sum(left: Tensor, right: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=left.device)
    for place in blocks(len(left), len(right)):
        with exact_float32():
            products = left[place] @ right.T
        total += (products + 1).pow_(3).sum(dtype=torch.float64)
    return total


def _own_sum(rows: Tensor) -> Tensor:
    """Of each row with itself."""
    return (rows.double().square().sum(dim=1) + 1).pow(3).sum()
