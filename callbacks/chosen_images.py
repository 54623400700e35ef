"""A look at the proxy set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from callbacks.figures import save_figure
from callbacks.image_grid import (
    Tile,
    clients_legend,
    draw_grid,
    is_clients,
    shortened,
    thumbnail,
)
from callbacks.probed import Probed, probed
from ecos_pl.selection import water_fill

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ChosenImages(Callback):
    """Writes ``figures/chosen.png``: chosen images with their pseudo-labels, cluster by cluster.

    Args:
        num_images: Images shown at most, drawn evenly over the clusters. Those that cannot be
            read are left out.
    """

    def __init__(self, num_images: int = 36) -> None:
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        self.num_images = num_images
        self._done: set[str] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        found = probed(trainer)
        if found is None or found.result.fingerprint in self._done:
            return
        self._done.add(found.result.fingerprint)
        if trainer.is_global_zero:
            figure = draw_chosen(found, self.num_images)
            if figure is not None:
                save_figure(trainer, figure, "chosen")


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
    """The figure; None if no chosen image can be read."""
    proxy_set, indices = found.result.proxy_set, found.result.indices.tolist()
    tiles = []
    for row in evenly_over_clusters(proxy_set.clusters, num_images):
        image = thumbnail(found, indices[row])
        if image is not None:
            note = f"cluster {int(proxy_set.clusters[row])}"
            framed = is_clients(found, indices[row])
            tiles.append(Tile(image, _caption(found, row), note, framed))
    if not tiles:
        return None
    title = (
        f"{len(tiles)} of {len(proxy_set):,} chosen images\n"
        f"label and its probability, from {proxy_set.label_source}"
    )
    return draw_grid([("", tiles)], title, clients_legend(found))


def _caption(found: Probed, row: int) -> str:
    proxy_set = found.result.proxy_set
    if proxy_set.weights[row] <= 0:
        return "no label"
    probability, best = proxy_set.targets[row].max(dim=0)
    return f"{shortened(proxy_set.classes[int(best)])} · {100 * float(probability):.0f} %"
