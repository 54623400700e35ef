"""A picture of the client's noisy answer and what was made of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch import Trainer
from typing_extensions import override

from callbacks.figures import BLUE, DARK, GREY, ORANGE, new_figure, plain_axes, save_figure
from callbacks.probed import Probed
from callbacks.shows_probe import ShowsProbe
from ecos_pl.probe_result import ProbeResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CoverageFigure(ShowsProbe):
    """Writes ``figures/coverage.png``: noisy counts and quotas of all clusters.

    Nothing where the client was not asked for counts.
    """

    @override
    def show(self, trainer: Trainer, found: Probed) -> None:
        if found.result.noisy_counts is not None:
            save_figure(trainer, draw_coverage(found.result), "coverage")


def draw_coverage(result: ProbeResult) -> Figure:
    """The figure; needs ``result.noisy_counts``."""
    from matplotlib.ticker import MaxNLocator

    assert result.noisy_counts is not None
    order = result.noisy_counts.argsort(descending=True, stable=True)
    counts, kept = result.noisy_counts[order], result.selection.kept[order]
    quotas, threshold = result.selection.quotas[order], result.selection.threshold
    num_clusters = len(counts)
    places = torch.arange(num_clusters)

    figure = new_figure(1200, 630)
    bars = figure.subplots()
    width = 0.85 if num_clusters <= 100 else 1.0
    handles = []
    for which, colour, name in ((kept, BLUE, "relevant"), (~kept, GREY, "other")):
        label = f"noisy count, {name} clusters ({int(which.sum())})"
        bars.bar(places[which].tolist(), counts[which].tolist(), width, color=colour)
        handles.append(bars.bar([0], [0], color=colour, label=label))
    line = bars.axhline(
        threshold,
        color=DARK,
        linewidth=1.2,
        linestyle="--",
        label=f"edge of the relevant region, {threshold:.1f} images a cluster",
    )
    steps = bars.twinx()
    edges = [place - 0.5 for place in range(num_clusters + 1)]
    stairs = steps.stairs(
        quotas.tolist(), edges, baseline=None, color=ORANGE, linewidth=1.5, label="quota (right)"
    )

    # Both scales have their zero at the same height.
    low, high = min(0, int(counts.min())), 1.08 * max(int(counts.max()), threshold)
    top = 1.08 * max(1, int(quotas.max()))
    bars.set_ylim(1.08 * low, high)
    steps.set_ylim(1.08 * low * top / high, top)
    bars.set_xlim(-0.5 - width / 2, num_clusters - 0.5 + width / 2)
    bars.axhline(0, color=DARK, linewidth=0.6)
    for axis in (bars.xaxis, bars.yaxis, steps.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    bars.set_xlabel("clusters, largest noisy count first", fontsize=9)
    bars.set_ylabel("noisy count (client images)", fontsize=9)
    steps.set_ylabel("quota (proxy images)", fontsize=9, color=ORANGE)
    plain_axes(bars, right=True)
    plain_axes(steps, right=True)
    steps.tick_params(axis="y", colors=ORANGE)
    bars.legend(handles=[*handles, line, stairs], fontsize=8, frameon=False, loc="upper right")
    figure.suptitle(
        f"R = {num_clusters} clusters, {int(kept.sum())} relevant; "
        f"{int(quotas.sum())} proxy images\n{result.statement}",
        fontsize=10,
    )
    return figure
