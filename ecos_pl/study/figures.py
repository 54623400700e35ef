"""Figures of a study: facts against an axis, a line for each label, spread over seeds shown."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecos_pl.storage import write_bytes
from ecos_pl.study.nodes import as_number
from ecos_pl.study.shown import COLUMNS, FigureForm
from ecos_pl.study.table import Found, looked_up

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Told apart by color-blind people, too (Okabe and Ito 2008)."""

MARKERS = "osD^vPX*"
NAMES = {
    **{column.fact: column.title for column in COLUMNS},
    "communication.bytes_down": "bytes to the client",
    "communication.bytes_up": "bytes from the client",
    "epsilon": "ε",
    "selection.size": "images in the proxy set",
    "probe.num_clusters": "clusters R",
    "client.size": "the client's images",
    "labels.num_images": "images labelled by people",
    "data.num_client": "the client's images",
}
"""How axes of figures are called."""

_LOG_FACTOR = 8  # numbers that span more are shown on a logarithmic axis


@dataclass
class Line:
    """What is drawn as one line.

    Attributes:
        points: Values of all seeds by label on the axis x.
        level: Values of cells that have no x: a horizontal line.
    """

    points: dict[str, list[float]] = field(default_factory=dict)
    level: list[float] = field(default_factory=list)


def lines_of(found: Found, form: FigureForm, fact: str, over: Sequence[str]) -> dict[str, Line]:
    """Lines by name; cells that differ in another axis are of another figure.

    Args:
        found: Cells with their summaries.
        form: Of the figure.
        fact: Which panel.
        over: Axes that mean and spread are taken over.
    """
    lines: dict[str, Line] = {}
    for cell, summary in found:
        if not set(cell.labels) <= {form.x, form.lines, *over}:
            continue
        value = None if summary is None else looked_up(summary, fact)
        if value is None:
            continue
        line = lines.setdefault(cell.labels.get(form.lines, ""), Line())
        x = cell.labels.get(form.x)
        (line.level if x is None else line.points.setdefault(x, [])).append(float(value))
    return lines


def write_figure(found: Found, form: FigureForm, over: Sequence[str], folder: Path) -> Path | None:
    """Draw a figure as PNG; None where no cell of it is done."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    panels = {fact: lines_of(found, form, fact, over) for fact in form.y}
    if not any(panels.values()):
        return None
    labels = dict.fromkeys(cell.labels[form.x] for cell, _ in found if form.x in cell.labels)
    drawn = [label for label in labels if any(_has(lines, label) for lines in panels.values())]
    places = _places(drawn)
    is_words = any(as_number(label) is None for label in drawn)
    width = 4.2 * len(panels) + (2.2 if is_words else 0)
    height = 0.42 * len(drawn) + 1.2 if is_words else 3.6
    figure, all_axes = plt.subplots(
        1,
        len(panels),
        figsize=(width, height),
        layout="constrained",
        squeeze=False,
        sharey=is_words,
    )
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (fact, lines) in zip(all_axes[0], panels.items(), strict=True):
        for number, name in enumerate(names):
            if name in lines:
                _draw(axes, lines[name], name, (number, len(names)), places, is_words)
        _dress(axes, fact, form, places, is_words)
    handles: dict[str, Any] = {}
    for axes in all_axes[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if len(names) > 1:
        ordered = [name for name in names if name in handles]
        figure.legend(
            [handles[name] for name in ordered],
            ordered,
            loc="outside lower center",
            ncols=min(len(ordered), 2 * len(panels)),
            title=NAMES.get(form.lines) if as_number(ordered[0]) is not None else None,
            frameon=False,
        )
    path = folder / f"{form.name}.png"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    write_bytes(path, buffer.getvalue())
    return path


def _draw(
    axes: Any,
    line: Line,
    name: str,
    number_of: tuple[int, int],
    places: Mapping[str, float],
    is_words: bool,
) -> None:
    number, num_lines = number_of
    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    if line.level:
        mean = statistics.mean(line.level)
        draw, span = (axes.axvline, axes.axvspan) if is_words else (axes.axhline, axes.axhspan)
        draw(mean, color=color, linestyle=(0, (4, 2)), linewidth=1.2, label=name)
        spread = _spread(line.level)
        if spread:
            span(mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0)
    labels = [label for label in places if label in line.points]
    if not labels:
        return
    at = [places[label] for label in labels]
    means = [statistics.mean(line.points[label]) for label in labels]
    spreads = [_spread(line.points[label]) for label in labels]
    style = {"color": color, "marker": marker, "markersize": 5, "capsize": 3, "elinewidth": 1}
    if is_words:  # side by side, where several lines have a point in one row
        at = [place + (number - (num_lines - 1) / 2) * 0.6 / num_lines for place in at]
        axes.errorbar(means, at, xerr=spreads, linestyle="none", label=name, **style)
    else:
        axes.errorbar(at, means, yerr=spreads, linestyle="-", linewidth=1.4, label=name, **style)


def _dress(
    axes: Any, fact: str, form: FigureForm, places: Mapping[str, float], is_words: bool
) -> None:
    title = NAMES.get(fact, fact)
    axes.grid(alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if is_words:
        axes.set_xlabel(title)
        axes.locator_params(axis="x", nbins=5)
        axes.set_yticks(list(places.values()), list(places))
        axes.set_ylim(max(places.values(), default=0) + 0.5, -0.5)  # the first one on top
        return
    axes.set_xlabel(NAMES.get(form.x, form.x))
    axes.set_ylabel(title)
    at = list(places.values())
    if at and (form.log if form.log is not None else _spans_much(at)):
        axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(at, list(places))


def _spans_much(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) >= _LOG_FACTOR * min(numbers)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _has(lines: Mapping[str, Line], label: str) -> bool:
    return any(label in line.points for line in lines.values())


def _places(labels: Sequence[str]) -> dict[str, float]:
    """Where labels lie: at their numbers, or if one is a word, one after the other."""
    numbers = {label: as_number(label) for label in labels}
    if None in numbers.values():
        return {label: float(place) for place, label in enumerate(labels)}
    return {label: float(number) for label, number in numbers.items() if number is not None}
