"""A look at what was not chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from callbacks.chosen_images import evenly_over_clusters
from callbacks.figures import save_figure
from callbacks.image_grid import (
    Cell,
    clients_legend,
    draw_sections,
    is_clients,
    shortened,
    thumbnail,
)
from callbacks.probed import Probed
from callbacks.shows_probe import ShowsProbe

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RejectedImages(ShowsProbe):
    """Writes ``figures/rejected.png``: images of clusters that were not kept, and passed-over ones.

    The latter lie in kept clusters, and others were chosen there. Nothing where all were chosen.
    Both come from the sample of the pool that the probe has kept.

    Args:
        num_images: Images shown at most of each, drawn evenly over the clusters.
    """

    def __init__(self, num_images: int = 36) -> None:
        super().__init__()
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, not {num_images}")
        self.num_images = num_images

    @override
    def show(self, trainer: Trainer, found: Probed) -> None:
        figure = draw_rejected(found, self.num_images)
        if figure is not None:
            save_figure(trainer, figure, "rejected")


def draw_rejected(found: Probed, num_images: int) -> Figure | None:
    """The figure; None if nothing was rejected, or nothing of it is at hand."""
    sample, selection = found.result.pool_sample, found.result.selection
    if sample is None:
        return None
    others = ~torch.isin(sample.rows, selection.indices)
    kept = selection.kept[sample.clusters]
    left = found.result.cluster_sizes - selection.quotas
    num_out, num_passed = int(left[~selection.kept].sum()), int(left[selection.kept].sum())
    sections = []
    num_kept = int(selection.kept.sum())
    num_others = len(selection.kept) - num_kept
    for which, heading in (
        (others & ~kept, f"{num_others} clusters that were not kept: {num_out:,} images"),
        (others & kept, f"{num_kept} kept clusters: {num_passed:,} images passed over"),
    ):
        cells = _cells(found, sample.rows[which], sample.clusters[which], num_images)
        if cells:
            sections.append((heading, cells))
    if not sections:
        return None
    shown = sum(len(cells) for _, cells in sections)
    title = f"{shown} of {num_out + num_passed:,} images that were not chosen"
    return draw_sections(sections, title, clients_legend(found))


def _cells(found: Probed, rows: Tensor, clusters: Tensor, num_images: int) -> list[Cell]:
    pool, cells = found.scenario.pool, []
    for place in evenly_over_clusters(clusters, num_images):
        index = int(rows[place])
        if (image := thumbnail(pool, index)) is not None:
            name = shortened(pool.domains[index] or pool.labels[index] or "")
            cluster = f"cluster {int(clusters[place])}"
            cells.append(Cell(image, name, cluster, is_clients(found, index)))
    return cells
