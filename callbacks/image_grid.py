"""Small images in rows, each with two lines below it; where there are sections, under headings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from callbacks.figures import DARK, GREEN, GREY, new_figure
from callbacks.probed import Probed
from ecos_pl.images import ImageSource, UnreadableImage, to_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL = 120  # pixels
_THUMBNAIL = 96  # pixels at most; smaller images stay as they are
_MIN_COLUMNS = 6  # no narrower than a title
_LENGTH = 18  # letters of a line
_HEIGHT = 1.32  # of a cell with its lines, in cells
_HEADING = 0.42  # height of a heading, in cells


@dataclass(frozen=True)
class Cell:
    """An image, the line below it, a smaller one below that, and whether to frame it in green."""

    image: Image.Image
    line: str
    small: str
    green: bool


def thumbnail(pool: ImageSource, index: int) -> Image.Image | None:
    """The middle square of an image, small; None if it cannot be read."""
    try:
        image = pool.read(index)
    except (UnreadableImage, OSError):
        return None
    side = min(*image.size, _THUMBNAIL)
    return Image.fromarray(to_tensor(image, side).permute(1, 2, 0).numpy())


def shortened(text: str, length: int = _LENGTH) -> str:
    """A text that fits below an image.

    >>> shortened("clutter", 5)
    'clut…'
    """
    return text if len(text) <= length else f"{text[: length - 1]}…"


def is_clients(found: Probed, index: int) -> bool:
    """Whether a pool image is of the client's domain, as far as simulation knows."""
    domain = found.scenario.client_domain
    return domain is not None and found.scenario.pool.domains[index] == domain


def clients_legend(found: Probed) -> str:
    """What green means; empty where simulation knows nothing."""
    domain = found.scenario.client_domain
    return "" if domain is None else f"simulation: green = client's domain ({domain})"


def draw_grid(cells: Sequence[Cell], title: str, legend: str) -> Figure:
    """The figure, about as wide as high; ``legend`` says what green means."""
    return draw_sections([("", cells)], title, legend)


def draw_sections(
    sections: Sequence[tuple[str, Sequence[Cell]]], title: str, legend: str
) -> Figure:
    """The same of cells under headings, one section below the other."""
    total = sum(len(cells) for _, cells in sections)
    longest = max(len(cells) for _, cells in sections)
    num_columns = max(_MIN_COLUMNS, min(longest, math.ceil(math.sqrt(total))))
    rows = [math.ceil(len(cells) / num_columns) for _, cells in sections]
    height = sum(_HEADING * bool(heading) for heading, _ in sections) + _HEIGHT * sum(rows)
    figure = new_figure(_CELL * num_columns, round(1.3 / _HEIGHT * _CELL * height) + 90)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal")
    top = 0.0
    for (heading, cells), num_rows in zip(sections, rows, strict=True):
        if heading:
            axes.text(0.06, top + 0.26, heading, fontsize=8, color=DARK, parse_math=False)
            top += _HEADING
        for place, cell in enumerate(cells):
            _draw_cell(axes, cell, place % num_columns, top + _HEIGHT * (place // num_columns))
        top += _HEIGHT * num_rows
    axes.set_xlim(0, num_columns)
    axes.set_ylim(height, 0)
    figure.suptitle(title, fontsize=9, parse_math=False)
    if legend:
        figure.supxlabel(legend, fontsize=8, color=GREEN, parse_math=False)
    return figure


def _draw_cell(axes: Axes, cell: Cell, x: float, y: float) -> None:
    axes.imshow(cell.image, extent=(x + 0.06, x + 0.94, y + 0.94, y + 0.06))
    axes.plot(
        [x + 0.06, x + 0.94, x + 0.94, x + 0.06, x + 0.06],
        [y + 0.06, y + 0.06, y + 0.94, y + 0.94, y + 0.06],
        color=GREEN if cell.green else GREY,
        linewidth=2.4 if cell.green else 0.8,
        solid_joinstyle="miter",
    )
    text: dict[str, Any] = {"ha": "center", "va": "top", "parse_math": False}
    axes.text(x + 0.5, y + 0.98, cell.line, fontsize=6.5, color=DARK, **text)
    axes.text(x + 0.5, y + 1.13, cell.small, fontsize=5.5, color="#5d656d", **text)
