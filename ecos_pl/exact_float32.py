"""float32 matrix products in full: no TF32, no bfloat16, whatever the program has set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Compute the block's float32 products with 24 bits of mantissa.

    ``torch.set_float32_matmul_precision("high")``, usual in training, would round distances to 10
    bits: another clustering, and on some machines only.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
