"""A look at the proxy set, and at the pool that it was chosen from."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from callbacks.figures import save_figure
from callbacks.image_grid import (
    Cell,
    clients_legend,
    draw_grid,
    is_clients,
    shortened,
    thumbnail,
)
from callbacks.probed import Probed
from callbacks.shows_probe import ShowsProbe
from ecos_pl.selection import water_fill

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABEL_LENGTH = 12  # letters


class ChosenImages(ShowsProbe):
    """Writes ``figures/chosen.png``: chosen images with their pseudo-labels, cluster by cluster.

    Beside it ``figures/random.png``: as many images of the whole pool, drawn at random.

    Args:
        num_images: Images shown at most, drawn evenly over the clusters. Those that cannot be
            read are left out.
    """

    def __init__(self, num_images: int = 36) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        super().__init__()
        self.num_images = num_images

    @override
    def show(self, trainer: Trainer, found: Probed) -> None:
        for name, draw in (("chosen", draw_chosen), ("random", draw_random)):
            figure = draw(found, self.num_images)
            if figure is not None:
                save_figure(trainer, figure, name)


def evenly_over_clusters(clusters: Tensor, num_rows: int) -> list[int]:
    """Rows [≤ num_rows] of ``clusters`` [n] int64, as even as can be, cluster after cluster.

    >>> evenly_over_clusters(torch.tensor([3, 3, 3, 3, 1, 1]), 4)
    [4, 5, 0, 2]
    """
    sizes = clusters.bincount()
    sizes = sizes[sizes > 0]
    shown = min(num_rows, len(sizes))
    weights = torch.zeros(len(sizes))
    weights[torch.arange(shown) * len(sizes) // max(shown, 1)] = 1
    quotas = water_fill(weights, sizes, num_rows)
    rows = clusters.argsort(stable=True).tolist()
    starts = (sizes.cumsum(0) - sizes).tolist()
    return [
        rows[start + i * size // quota]
        for start, size, quota in zip(starts, sizes.tolist(), quotas.tolist(), strict=True)
        for i in range(quota)
    ]


def draw_chosen(found: Probed, num_images: int) -> Figure | None:
    """The figure of the proxy set; None if no chosen image can be read."""
    proxy_set, pool = found.result.proxy_set, found.scenario.pool
    cells = []
    for row in evenly_over_clusters(proxy_set.clusters, num_images):
        index = int(found.result.indices[row])
        if (image := thumbnail(pool, index)) is not None:
            cluster = f"cluster {int(proxy_set.clusters[row])}"
            cells.append(Cell(image, _caption(found, row), cluster, is_clients(found, index)))
    if not cells:
        return None
    title = (
        f"{len(cells)} of {len(proxy_set):,} chosen images\n"
        f"label and its probability, from {proxy_set.label_source}"
    )
    return draw_grid(cells, title, clients_legend(found))


def draw_random(found: Probed, num_images: int) -> Figure | None:
    """The figure of the pool, the same at every call; None if no image of it can be read."""
    pool = found.scenario.pool
    drawn = random.Random(found.result.fingerprint).sample(
        range(len(pool)), min(len(pool), 2 * num_images)
    )
    cells: list[Cell] = []
    for index in drawn:
        if len(cells) < num_images and (image := thumbnail(pool, index)) is not None:
            line, small = (
                shortened(name or "") for name in (pool.labels[index], _domain(found, index))
            )
            cells.append(Cell(image, line, small, is_clients(found, index)))
    if not cells:
        return None
    what = [
        name
        for name, known in (
            ("its own label", any(cell.line for cell in cells)),
            ("its domain", any(cell.small for cell in cells)),
        )
        if known
    ]
    title = f"{len(cells)} of {len(pool):,} images of the pool, drawn at random"
    return draw_grid(cells, f"{title}\n{' and '.join(what)}".rstrip(), clients_legend(found))


def _domain(found: Probed, index: int) -> str | None:
    return found.scenario.pool.domains[index]


def _caption(found: Probed, row: int) -> str:
    proxy_set = found.result.proxy_set
    if proxy_set.weights[row] <= 0:
        return "no label"
    probability, best = proxy_set.targets[row].max(dim=0)
    label = shortened(proxy_set.classes[int(best)], _LABEL_LENGTH)
    return f"{label} · {100 * float(probability):.0f} %"
