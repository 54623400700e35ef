"""Small images in rows, each with two lines below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from callbacks.figures import DARK, GREEN, GREY, new_figure
from ecos_pl.images import ImageSource, UnreadableImage, to_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 120  # pixels
_THUMBNAIL = 96  # pixels at most; smaller images stay as they are
_MIN_COLUMNS = 6  # no narrower than a title
_LENGTH = 18  # letters of a line


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


def draw_grid(cells: Sequence[Cell], title: str, legend: str) -> Figure:
    """The figure, about as wide as high; ``legend`` says what green means."""
    num_columns = max(_MIN_COLUMNS, math.ceil(math.sqrt(len(cells))))
    num_rows = math.ceil(len(cells) / num_columns)
    figure = new_figure(_CELL * num_columns, round(1.3 * _CELL * num_rows) + 90)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal")
    for place, cell in enumerate(cells):
        x, y = place % num_columns, 1.32 * (place // num_columns)
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
    axes.set_xlim(0, num_columns)
    axes.set_ylim(1.32 * num_rows, 0)
    figure.suptitle(title, fontsize=9, parse_math=False)
    if legend:
        figure.supxlabel(legend, fontsize=8, color=GREEN, parse_math=False)
    return figure
