"""Figures without a screen: drawn by Agg, written into the run folder, shown by the loggers."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from callbacks.logging_to import log_image
from ecos_pl.storage import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150

BLUE, ORANGE, GREEN, GREY, DARK = "#2b6ca3", "#d9731a", "#1a9850", "#b8bec5", "#30353a"
"""Apart from each other for colour-blind readers too; green only for what simulation knows."""


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of so many pixels, apart from pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain_axes(axes: Axes, *, right: bool = False) -> None:
    """Take away the frame; ``right`` keeps the spine of a second scale."""
    axes.spines[["top"] if right else ["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def save_figure(trainer: Trainer, figure: Figure, name: str) -> Path:
    """Write ``figures/<name>.png`` into the run folder and log it. Rank zero only."""
    assert trainer.is_global_zero
    content = BytesIO()
    with warnings.catch_warnings():
        # A class name in a script that matplotlib's font lacks shows boxes, and is no news.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.savefig(content, format="png", dpi=DPI)
    path = Path(trainer.default_root_dir) / "figures" / f"{name}.png"
    write_bytes(path, content.getvalue())
    log_image(trainer, f"figures/{name}", path)
    return path
