"""Reading scattered rows of an embedding table from front to back, in whatever order they come."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.row_blocks import Rows, read_rows


def read_scattered(rows: Rows, numbers: npt.NDArray[np.int64]) -> Tensor:
    """The rows [n, d] of these numbers, in their order and in the dtype they are stored in."""
    if not (numbers[1:] < numbers[:-1]).any():
        return read_rows(rows, numbers)
    order = np.argsort(numbers, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return read_rows(rows, numbers[order])[torch.from_numpy(place)]
