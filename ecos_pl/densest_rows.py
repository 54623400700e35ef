"""Which rows of the pool the client's density is highest at, without sorting the pool's indices.

Shapes: N pool rows, R clusters, d embedding dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.count_smoothing import ClientDensity
from ecos_pl.exact_float32 import exact_float32
from ecos_pl.row_blocks import RowBlocks, Rows

READ_ROWS = 16_384
"""Rows read at once."""

CPU_ROWS = 1024
"""Rows whose densities a CPU computes at once: their distances to 1,024 points fit its caches."""

SUM_ROWS = 2**20
"""Densities added up at once."""


def densities(
    density: ClientDensity, embeddings: Rows, *, device: torch.device | str = "cpu"
) -> Tensor:
    """The client's density [N] float32 at each row of the pool; -inf at NaN rows.

    A CPU computes in float32, three times as fast as in float64 and within 2e-5 of the largest
    density; a GPU in float64.
    """
    kind = torch.device(device).type
    density = density.to(device, torch.float64 if kind == "cuda" else torch.float32)
    found = torch.empty(len(embeddings), dtype=torch.float32)
    rows_at_once = CPU_ROWS if kind == "cpu" else READ_ROWS
    with exact_float32():
        for place, rows in RowBlocks(embeddings, READ_ROWS, device=device):
            parts = [density(part) for part in torch.split(rows, rows_at_once)]
            found[place] = torch.cat(parts).float().cpu()
    return found.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def densest_rows(
    row_densities: Tensor, noisy_counts: Tensor, noise_std: float, *, shares: Sequence[float]
) -> list[Tensor]:
    """For each share, mark the fewest rows [N] bool that hold this share of the client's images.

    A highest density region (Hyndman 1996). How many images the client has is known but for the
    noise on R counts, so one standard deviation of their sum, ``noise_std · √R``, is taken off
    first: the less is certain, the fewer rows are marked; none where the sum drowns. Of equally
    dense rows the first ones are marked.

    Args:
        row_densities: [N], estimated client images at each row; the negative ones count, too:
            in the sum they make up for what noise alone put elsewhere. -inf: no such row.
        noisy_counts: [R].
        noise_std: Of the counts, in images.
        shares: Each above 0, at most 1.
    """
    values = row_densities.numpy()
    total, doubt = float(noisy_counts.sum()), noise_std * math.sqrt(len(noisy_counts))
    if total <= doubt:
        return [torch.zeros(len(values), dtype=torch.bool) for _ in shares]
    held = float(values.sum(dtype=np.float64, where=values > -np.inf))
    # While rows are positive, what the rows before them hold only grows: no other is looked at.
    descending = np.sort(values[values > 0])[::-1]
    numbers = [_num_that_hold(descending, share * (1 - doubt / total) * held) for share in shares]
    return [torch.from_numpy(_mark_largest(values, descending, number)) for number in numbers]


def _num_that_hold(descending: npt.NDArray[np.floating], wanted: float) -> int:
    """How many of the values it takes until their sum reaches ``wanted``; at most all."""
    if wanted <= 0:
        return 0
    before = 0.0
    for first in range(0, len(descending), SUM_ROWS):
        sums = before + descending[first : first + SUM_ROWS].cumsum(dtype=np.float64)
        if sums[-1] >= wanted:
            return first + int(np.searchsorted(sums, wanted)) + 1
        before = float(sums[-1])
    return len(descending)


def _mark_largest(
    values: npt.NDArray[np.floating], descending: npt.NDArray[np.floating], number: int
) -> npt.NDArray[np.bool_]:
    """Mark the ``number`` largest values, of equal ones the first."""
    if number == 0:
        return np.zeros(len(values), np.bool_)
    least = descending[number - 1]
    marked: npt.NDArray[np.bool_] = values > least
    marked[np.flatnonzero(values == least)[: number - int(marked.sum())]] = True
    return marked


def next_densest(
    row_densities: Tensor, number: int, taken: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """So many rows (fewer if there are no more) in order of density, without those taken.

    Args:
        row_densities: [N]; rows at -inf are never returned.
        number: Of rows.
        taken: Rows to leave out.
    """
    values = row_densities.numpy().copy()
    values[taken] = -np.inf
    number = min(number, int((values > -np.inf).sum()))
    if number == 0:
        return np.empty(0, np.int64)
    least = np.partition(values, len(values) - number)[len(values) - number]
    above = np.flatnonzero(values > least)
    level = np.flatnonzero(values == least)[: number - len(above)]
    above = above[np.argsort(-values[above], kind="stable")]
    return np.concatenate([above, level])
