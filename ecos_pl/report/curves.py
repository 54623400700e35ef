"""Loss and accuracy over the training steps, drawn as SVG from the run's metrics."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from ecos_pl.report.blocks import Chart

_BLUE, _ORANGE, _GREEN = "#2b6ca3", "#b85c0e", "#157a41"
_MOST_POINTS = 400
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 250, 48, 12, 12, 36

Points = list[tuple[float, float]]  # (step, value), ascending


@dataclass(frozen=True)
class _Line:
    name: str
    points: Points
    colour: str
    dots: bool = False


def curves(folder: Path, test_accuracy: float | None = None) -> list[Chart]:
    """Charts for what the metrics hold; none without them.

    Args:
        folder: ``metrics`` of a run folder: ``version_0/metrics.csv`` and so on.
        test_accuracy: Drawn as a line, where a simulation knows it.
    """
    found = read_points(folder, ("train/loss", "val/loss", "val/accuracy"))
    losses = [
        _Line("training", found["train/loss"], _BLUE),
        _Line("held-out chosen images", found["val/loss"], _ORANGE, dots=True),
    ]
    accuracy = [(step, 100 * value) for step, value in found["val/accuracy"]]
    charts = []
    if any(line.points for line in losses):
        title = "Loss: how far the predictions are from the labels (lower is better)"
        charts.append(_chart(title, [line for line in losses if line.points]))
    if accuracy:
        title = "Accuracy, in percent"
        lines = [_Line("held-out chosen images", accuracy, _ORANGE, dots=True)]
        if test_accuracy is not None:
            ends = (0.0, accuracy[-1][0])
            level = [(step, 100 * test_accuracy) for step in ends]
            lines.append(_Line("simulation: the client's test images, at the end", level, _GREEN))
        charts.append(_chart(title, lines))
    return charts


def read_points(folder: Path, names: Sequence[str]) -> dict[str, Points]:
    """Metrics over steps. A resumed run's later file replaces what an earlier one says after it."""
    points: dict[str, Points] = {name: [] for name in names}
    files = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: (len(str(path)), path))
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        for name in names:
            later = sorted(
                (step, value)
                for row in rows
                if (step := _float(row.get("step"))) is not None
                and (value := _float(row.get(name))) is not None
            )
            if later:
                kept = [point for point in points[name] if point[0] < later[0][0]]
                points[name] = kept + later
    return points


def _float(text: str | None) -> float | None:
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that span a range.

    >>> ticks(0.13, 2.04), ticks(91.2, 97.4)
    ([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], [90.0, 92.0, 94.0, 96.0, 98.0])
    """
    span = max(high - low, 1e-9 * max(1.0, abs(high)))
    power = 10.0 ** math.floor(math.log10(span / (most - 1)))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first + 1 <= most:
            break
    return [round(step * place, 10) for place in range(first, max(last, first + 1) + 1)]


def _chart(title: str, lines: Sequence[_Line]) -> Chart:
    values = [value for line in lines for _, value in line.points]
    steps = ticks(0, max(step for line in lines for step, _ in line.points))
    levels = ticks(min(values), max(values))

    def x(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / steps[-1]

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (levels[-1] - value) / (levels[-1] - levels[0])

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">']
    for level in levels:
        ends = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(level):.1f}" y2="{y(level):.1f}"'
        parts.append(f'<line class="grid" {ends}/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y(level) + 4:.1f}">{level:g}</text>')
    for step in steps:
        place = f'x="{x(step):.1f}" y="{_HEIGHT - _BOTTOM + 16}"'
        parts.append(f'<text class="middle" {place}>{step:,.0f}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="middle" x="{middle}" y="{_HEIGHT - 4}">training step</text>')
    for line in lines:
        every = -(-len(line.points) // _MOST_POINTS)
        places = [(x(step), y(value)) for step, value in line.points[::every]]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
        dash = ' stroke-dasharray="6 4"' if line.colour == _GREEN else ""
        parts.append(f'<polyline points="{path}" stroke="{line.colour}"{dash}/>')
        if line.dots or len(places) == 1:
            parts += [
                f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{line.colour}"/>'
                for left, top in places
            ]
    svg = Markup("".join([*parts, "</svg>"]))
    return Chart(svg, title, [(line.colour, line.name) for line in lines])
