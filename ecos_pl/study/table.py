"""The Markdown table of a study: mean ± std over seeds, the best in bold."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ecos_pl.study.cells import Cell
from ecos_pl.study.shown import Column, TableForm

Labels = tuple[str, ...]
Found = Sequence[tuple[Cell, Mapping[str, Any] | None]]


def markdown_table(found: Found, form: TableForm) -> list[str]:
    """Lines of the table; cells without a summary are missing, and their rows say so.

    A row none of whose cells is done is left out: much of a study that was begun, or cut short by
    ``--only``, would be such rows.

    Args:
        found: All cells of the study, each with its summary if it is done.
        form: What is shown.
    """
    rows: dict[Labels, list[Mapping[str, Any] | None]] = {}
    for cell, summary in found:
        labels = tuple(cell.labels.get(axis, "–") for axis in form.rows)
        rows.setdefault(labels, []).append(summary)
    done = {labels: [one for one in ones if one is not None] for labels, ones in rows.items()}
    ordered = [labels for labels in sorted(rows, key=_order(found, form.rows)) if done[labels]]
    best = {column.title: best_rows(done, column, form) for column in form.columns}
    heads = [axis if len(form.rows) > 1 else "" for axis in form.rows] or [""]
    table = [[*heads, *(column.title for column in form.columns)]]
    for labels in ordered:
        cells = list(labels) or ["all"]
        if len(done[labels]) < len(rows[labels]):
            cells[0] += f" ({len(done[labels])} of {len(rows[labels])} runs)"
        for column in form.columns:
            text = shown(done[labels], column)
            cells.append(f"**{text}**" if labels in best[column.title] else text)
        table.append(cells)
    head, *body = (_line(cells) for cells in table)
    num_labels = len(heads)
    rule = ["---"] * num_labels + ["---:"] * len(form.columns)
    return [head, _line(rule), *body]


def shown(summaries: Sequence[Mapping[str, Any]], column: Column) -> str:
    """A cell of the table: "–" if no run has the fact."""
    values = [looked_up(summary, column.fact) for summary in summaries]
    if words := sorted({str(value) for value in values if isinstance(value, (str, bool))}):
        return ", ".join(words)
    return mean_and_std(values, column.form, spread=column.spread)


def best_rows(
    done: Mapping[Labels, Sequence[Mapping[str, Any]]], column: Column, form: TableForm
) -> set[Labels]:
    """Rows with the best mean of a column, to the digits shown; none where one row competes."""
    groups: dict[Labels, dict[Labels, float]] = {}
    if not column.best:
        return set()
    for labels, summaries in done.items():
        if set(labels) & set(form.reference):
            continue
        values = [looked_up(summary, column.fact) for summary in summaries]
        known = [value for value in values if isinstance(value, (int, float))]
        if known:
            by_axis = dict(zip(form.rows, labels, strict=True))
            group = tuple(by_axis.get(axis, "") for axis in form.best_within)
            groups.setdefault(group, {})[labels] = statistics.mean(known)
    best: set[Labels] = set()
    for means in groups.values():
        top = (max if column.best == "highest" else min)(means.values())
        if len(means) > 1:
            as_good = column.form.format(top)
            best |= {
                labels for labels, mean in means.items() if column.form.format(mean) == as_good
            }
    return best


def mean_and_std(values: Iterable[float | None], form: str, *, spread: bool = True) -> str:
    """A cell of a table: "–" without a value, the mean, and the spread if there are several.

    Args:
        values: One for each seed; None where a run has none.
        form: Of one number, as in `{:.3f}`.
        spread: Whether to show the standard deviation (n - 1).

    >>> mean_and_std([0.5, 0.7, None], "{:.2f}"), mean_and_std([], "{:.2f}")
    ('0.60 ± 0.14', '–')
    """
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = form.format(statistics.mean(known))
    if len(known) == 1 or not spread:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(known))}"


def looked_up(summary: Mapping[str, Any], place: str) -> Any:
    """A value of a summary by its place, as in `simulation.test_accuracy`; None if not there."""
    value: Any = summary
    for key in place.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _order(found: Found, axes: Sequence[str]) -> Any:
    """Sort key of rows: by each axis in turn, labels in the order of the study."""
    place: list[dict[str, int]] = []
    for axis in axes:
        labels = dict.fromkeys(cell.labels.get(axis, "–") for cell, _ in found)
        ordered = sorted(labels, key=lambda label: label == "–")  # rows without it come last
        place.append({label: number for number, label in enumerate(ordered)})
    return lambda labels: [place[at][label] for at, label in enumerate(labels)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
