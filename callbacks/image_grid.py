"""A grid of pool images with captions, in titled sections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from callbacks.figures import DARK, GREEN, GREY, new_figure
from callbacks.probed import Probed
from ecos_pl.images import UnreadableImage, to_tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL = 120  # pixels
_HEIGHT = 1.32  # of a cell with its captions, in cells
_HEADING = 0.42  # height of a section's heading, in cells
_THUMBNAIL = 96  # pixels at most; smaller images stay as they are
_LABEL_LENGTH = 12  # letters


@dataclass(frozen=True)
class Tile:
    """One image with what is written below it.

    Attributes:
        image: A thumbnail.
        caption: Written larger.
        note: Written smaller.
        framed: Whether it bears the frame that the legend explains.
    """

    image: Image.Image
    caption: str
    note: str
    framed: bool = False


def draw_grid(sections: Sequence[tuple[str, Sequence[Tile]]], title: str, legend: str) -> Figure:
    """Draw sections of a heading (or nothing) and tiles, one below the other."""
    longest = max(len(tiles) for _, tiles in sections)
    total = sum(len(tiles) for _, tiles in sections)
    # As many columns as rows: captions stay readable where two grids stand side by side. No
    # narrower than the title.
    num_columns = max(6, min(longest, math.ceil(math.sqrt(total))))
    height = 0.0
    for heading, tiles in sections:
        height += _HEADING * bool(heading) + _HEIGHT * math.ceil(len(tiles) / num_columns)
    figure = new_figure(_CELL * num_columns, round(0.985 * _CELL * height) + 90)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_aspect("equal")
    top = 0.0
    for heading, tiles in sections:
        if heading:
            axes.text(0.06, top + 0.26, heading, fontsize=8, color=DARK, parse_math=False)
            top += _HEADING
        for place, tile in enumerate(tiles):
            _draw_tile(axes, tile, place % num_columns, top + _HEIGHT * (place // num_columns))
        top += _HEIGHT * math.ceil(len(tiles) / num_columns)
    axes.set_xlim(0, num_columns)
    axes.set_ylim(height, 0)
    figure.suptitle(title, fontsize=9, parse_math=False)
    if legend:
        figure.supxlabel(legend, fontsize=8, color=GREEN, parse_math=False)
    return figure


def _draw_tile(axes: Axes, tile: Tile, x: float, y: float) -> None:
    axes.imshow(tile.image, extent=(x + 0.06, x + 0.94, y + 0.94, y + 0.06))
    axes.plot(
        [x + 0.06, x + 0.94, x + 0.94, x + 0.06, x + 0.06],
        [y + 0.06, y + 0.06, y + 0.94, y + 0.94, y + 0.06],
        color=GREEN if tile.framed else GREY,
        linewidth=2.4 if tile.framed else 0.8,
        solid_joinstyle="miter",
    )
    text: dict[str, Any] = {"ha": "center", "va": "top", "parse_math": False}
    axes.text(x + 0.5, y + 0.98, tile.caption, fontsize=6.5, color=DARK, **text)
    axes.text(x + 0.5, y + 1.13, tile.note, fontsize=5.5, color="#5d656d", **text)


def thumbnail(found: Probed, index: int) -> Image.Image | None:
    """A pool image, square and small; None if it cannot be read."""
    try:
        image = found.scenario.pool.read(index)
    except (UnreadableImage, OSError):
        return None
    side = min(*image.size, _THUMBNAIL)
    return Image.fromarray(to_tensor(image, side).permute(1, 2, 0).numpy())


def is_clients(found: Probed, index: int) -> bool:
    """Whether a pool image is of the client's domain, as far as simulation knows."""
    domain = found.scenario.client_domain
    return domain is not None and found.scenario.pool.domains[index] == domain


def clients_legend(found: Probed) -> str:
    """What the frames mean; empty where simulation knows nothing."""
    domain = found.scenario.client_domain
    return "" if domain is None else f"simulation: green = client's domain ({domain})"


def shortened(name: str) -> str:
    """A name that fits below a tile.

    >>> shortened("cat"), shortened("a very long name")
    ('cat', 'a very long…')
    """
    return name if len(name) <= _LABEL_LENGTH else name[: _LABEL_LENGTH - 1] + "…"
