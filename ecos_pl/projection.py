"""Principal components of rows that stream by, the same bits in any order and on any ranks.

Shapes: N rows, D input dimensions, d kept dimensions, B rows of a block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ecos_pl.exact_float32 import exact_float32
from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.row_blocks import RowBlocks, Rows, as_tensor

_BLOCK_ROWS = 16_384

_FIXED_POINT = 2.0**18
"""Steps in a unit. Sums stay below 2^62 for 2^34 rows as long as those of the first block; there is
room for rows 32 times as long."""


@dataclass(frozen=True)
class Projection:
    """An affine map to fewer dimensions: ``(x - mean) @ components.T``.

    Attributes:
        mean: [D] float32.
        components: [d, D] float32; orthonormal rows for PCA, scaled ones for whitening.
        variances: [d] float32, the variance of each projected dimension, descending.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Project [B, D] to [B, d] float32."""
        return (embeddings.float() - self.mean) @ self.components.T

    def rounded(self) -> Projection:
        """The map as it travels in float16, so that both parties apply the same one."""
        return Projection(self.mean.half().float(), self.components.half().float(), self.variances)

    def whitened(self, floor: float = 1e-3) -> Projection:
        """The same map with every dimension scaled to variance one.

        Args:
            floor: Dimensions with less than this share of the largest variance are scaled by the
                floor instead: they hold rounding, not signal.
        """
        scale = self.variances.clamp_min(floor * float(self.variances[0])).rsqrt()
        return Projection(self.mean, self.components * scale[:, None], self.variances * scale**2)


def fit_pca(
    rows: Rows, num_dims: int, *, device: torch.device | str = "cpu", ranks: Ranks = ALONE
) -> Projection:
    """Principal components of rows [N, D] that ranks share.

    Each block's products are summed in float32 and then, as integers, over blocks: that sum is
    the same in any order, so that the result does not depend on the number of ranks. Component
    signs are fixed (the entry of largest magnitude is positive).

    Args:
        rows: NaN rows (unreadable images) are left out.
        num_dims: Dimensions kept, at most min(N, D).
        device: Where products are computed.
        ranks: Each reads its share of the rows.

    Raises:
        ValueError: There is no row, one is not finite, or rows are of very different lengths.
    """
    blocks = RowBlocks(rows, _BLOCK_ROWS, device=device, ranks=ranks)
    head = as_tensor(rows[:_BLOCK_ROWS]).to(device).float()
    return _pca((block for _, block in blocks), head, num_dims, ranks)


def fit_pca_of_chunks(chunks: Iterable[Rows], num_dims: int) -> Projection:
    """Principal components of rows that come as chunks [B, D], each once; see `fit_pca`."""
    blocks = (as_tensor(chunk).float() for chunk in chunks)
    head = next(blocks, torch.empty(0, 0))
    return _pca(itertools.chain([head], blocks), head, num_dims, ALONE)


@exact_float32()
def _pca(blocks: Iterable[Tensor], head: Tensor, num_dims: int, ranks: Ranks) -> Projection:
    moments = _moments(blocks, head, ranks)
    count = float(moments[0, 0])
    if count < 1:
        raise ValueError("no embeddings to find principal components of")
    mean = moments[0, 1:] / count
    num_dims = min(num_dims, len(mean), max(1, int(count)))
    found = None
    if ranks.is_first:  # another machine's eigh may round otherwise
        covariance = moments[1:, 1:] / count - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        components = vectors.flip(1)[:, :num_dims].T
        signs = components.gather(1, components.abs().argmax(dim=1, keepdim=True)).sign()
        found = (components * signs).float(), values.flip(0)[:num_dims].clamp_min(0).float()
    components, variances = ranks.broadcast(found)
    return Projection(mean.float(), components, variances)


def _moments(blocks: Iterable[Tensor], head: Tensor, ranks: Ranks) -> Tensor:
    """Count, sums and products in one matrix [D + 1, D + 1] float64, on the CPU.

    Rows are scaled by a power of two, found from ``head``, to a length of about one; then no sum
    of 2^34 rows leaves int64.
    """
    exponent = ranks.broadcast(_length_exponent(head))
    size = head.shape[1] + 1
    total = torch.zeros(size, size, dtype=torch.int64, device=head.device)
    largest = torch.zeros((), dtype=torch.float64, device=head.device)
    for block in blocks:
        known = ~block.isnan().any(dim=1, keepdim=True)
        ones = known.float()  # a column of them gives count and sums
        rows = torch.cat([ones, torch.where(known, block * 2.0**-exponent, 0.0)], dim=1)
        products = (rows.T @ rows).double()
        largest += products.diagonal().max()
        total += (products * _FIXED_POINT).round().long()
    largest = ranks.sum(largest)
    if not math.isfinite(largest):
        raise ValueError("an embedding is not finite")
    if largest * _FIXED_POINT > 2.0**62:
        raise ValueError(
            "embeddings are of very different lengths: scale them to length one, or leave the "
            "longest out"
        )
    moments = ranks.sum(total).cpu().double() / _FIXED_POINT
    moments[1:] *= 2.0**exponent
    moments[:, 1:] *= 2.0**exponent
    return moments


def _length_exponent(rows: Tensor) -> int:
    """The smallest power of two that is at least as long as any of these rows; 0 for none."""
    longest = rows.square().sum(dim=1).nan_to_num(0, 0, 0).max(dim=0).values if len(rows) else 0.0
    return math.ceil(math.log2(float(longest)) / 2) if longest else 0
