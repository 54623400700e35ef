"""Draw noise and a mask, fork, draw in both processes and print: for `check_processes` to compare.

Run as a program, under fixed seeds.
"""

from __future__ import annotations

import os
import random

import numpy as np

from ecos_pl.privacy import add_discrete_gaussian, poisson_mask

LENGTH = 64


def _show() -> None:
    noise = add_discrete_gaussian(np.zeros(LENGTH, dtype=np.int64), 1e6)
    print(*noise, *poisson_mask(LENGTH, 0.5).astype(int), flush=True)


if __name__ == "__main__":
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    add_discrete_gaussian(np.zeros(1, dtype=np.int64), 1e6)  # the sampler exists before the fork
    child = os.fork() if hasattr(os, "fork") else None
    if child:
        os.waitpid(child, 0)
    _show()
    if child == 0:
        os._exit(0)
