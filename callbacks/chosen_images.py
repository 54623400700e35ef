"""A look at the proxy set."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from typing_extensions import override

from callbacks.figures import DARK, GREEN, GREY, new_figure, save_figure
from callbacks.probed import Probed, probed
from ecos_pl.images import UnreadableImage, to_tensor
from ecos_pl.selection import water_fill

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 120  # pixels
_THUMBNAIL = 96  # pixels at most; smaller images stay as they are
_LABEL_LENGTH = 12  # letters


class ChosenImages(Callback):
    """Writes ``figures/chosen.png``: chosen images with their pseudo-labels, cluster by cluster.

    Args:
        num_images: Images shown at most, drawn evenly over the clusters. Those that cannot be
            read are left out.
    """

    def __init__(self, num_images: int = 64) -> None:
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
    proxy_set = found.result.proxy_set
    images = {}
    for row in evenly_over_clusters(proxy_set.clusters, num_images):
        image = _thumbnail(found, row)
        if image is not None:
            images[row] = image
    if not images:
        return None
    # A little wider than high, and no narrower than the title.
    num_columns = max(6, min(len(images), math.ceil(math.sqrt(1.5 * len(images)))))
    num_rows = math.ceil(len(images) / num_columns)
    client_domain = found.scenario.client_domain
    figure = new_figure(_CELL * num_columns, round(1.3 * _CELL * num_rows) + 90)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal")
    for place, (row, image) in enumerate(images.items()):
        x, y = place % num_columns, 1.32 * (place // num_columns)
        axes.imshow(image, extent=(x + 0.06, x + 0.94, y + 0.94, y + 0.06))
        ours = client_domain is not None and client_domain == _domain(found, row)
        axes.plot(
            [x + 0.06, x + 0.94, x + 0.94, x + 0.06, x + 0.06],
            [y + 0.06, y + 0.06, y + 0.94, y + 0.94, y + 0.06],
            color=GREEN if ours else GREY,
            linewidth=2.4 if ours else 0.8,
            solid_joinstyle="miter",
        )
        text: dict[str, Any] = {"ha": "center", "va": "top", "parse_math": False}
        axes.text(x + 0.5, y + 0.98, _caption(found, row), fontsize=6.5, color=DARK, **text)
        cluster = f"cluster {int(proxy_set.clusters[row])}"
        axes.text(x + 0.5, y + 1.13, cluster, fontsize=5, color="#70777e", **text)
    axes.set_xlim(0, num_columns)
    axes.set_ylim(1.32 * num_rows, 0)
    figure.suptitle(
        f"{len(images)} of {len(proxy_set)} chosen images\n"
        f"pseudo-label and its probability, from {proxy_set.label_source}",
        fontsize=9,
        parse_math=False,
    )
    if client_domain is not None:
        legend = f"simulation: green = client's domain ({client_domain})"
        figure.supxlabel(legend, fontsize=8, color=GREEN, parse_math=False)
    return figure


def _thumbnail(found: Probed, row: int) -> Image.Image | None:
    try:
        image = found.scenario.pool.read(int(found.result.indices[row]))
    except (UnreadableImage, OSError):
        return None
    side = min(*image.size, _THUMBNAIL)
    return Image.fromarray(to_tensor(image, side).permute(1, 2, 0).numpy())


def _domain(found: Probed, row: int) -> str | None:
    return found.scenario.pool.domains[int(found.result.indices[row])]


def _caption(found: Probed, row: int) -> str:
    proxy_set = found.result.proxy_set
    if proxy_set.weights[row] <= 0:
        return "no label"
    probability, best = proxy_set.targets[row].max(dim=0)
    label = proxy_set.classes[int(best)]
    if len(label) > _LABEL_LENGTH:
        label = label[: _LABEL_LENGTH - 1] + "…"
    return f"{label} · {100 * float(probability):.0f} %"
