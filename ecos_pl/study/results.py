"""The tidy table of a study: one line a cell, with its labels, its settings and its summary."""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ecos_pl.storage import write_bytes
from ecos_pl.study.cells import Cell
from ecos_pl.study.nodes import as_number

Fact = str | int | float | bool | None
Row = dict[str, Fact]

_OF_THE_RUN = ("run_id", "seed")  # in the summary, too; the cell says them


def tidy_rows(found: Sequence[tuple[Cell, Mapping[str, Any]]]) -> list[Row]:
    """One row a cell: `run_id`, axes, `config.KEY` of what axes set, facts of `summary.json`.

    A fact's name is its place, as in `simulation.test_accuracy`; lists count from 0, as in
    `rounds.0.changed`. All rows have the same names in the same order; None is what one lacks.
    A label is a number where all labels of its axis are.
    """
    axes = _union(cell.labels for cell, _ in found)
    numbers = {axis for axis in axes if _are_numbers(cell.labels.get(axis) for cell, _ in found)}
    rows: list[Row] = []
    for cell, summary in found:
        row: Row = {"run_id": cell.run_id}
        for axis, label in cell.labels.items():
            row[axis] = as_number(label) if axis in numbers else label
        row |= {f"config.{key}": value for key, value in cell.settings.items()}
        for name, fact in flattened(summary).items():
            if name not in _OF_THE_RUN:
                row.setdefault(name, fact)
        rows.append(row)
    names = ["run_id", *axes, *sorted(n for n in _union(rows) if n.startswith("config."))]
    names += [name for name in _union(rows) if name not in set(names)]
    return [{name: row.get(name) for name in names} for row in rows]


def flattened(value: Any, prefix: str = "") -> dict[str, Fact]:
    """Scalars of nested dicts and lists, by their place.

    >>> flattened({"a": {"b": 1, "c": []}, "d": [{"e": None}]})
    {'a.b': 1, 'd.0.e': None}
    """
    if isinstance(value, Mapping):
        entries = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        entries = [(str(place), inner) for place, inner in enumerate(value)]
    else:
        return {prefix: value}
    found: dict[str, Fact] = {}
    for key, inner in entries:
        found |= flattened(inner, f"{prefix}.{key}" if prefix else key)
    return found


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write the table as CSV, with a head; what a cell lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def write_parquet(rows: Sequence[Row], path: Path) -> bool:
    """Write the table as Parquet with typed columns; False where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: _column([row[name] for row in rows]) for name in rows[0]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_bytes(path, buffer.getvalue())
    return True


def _column(values: list[Fact]) -> list[Fact]:
    """Values of one type, as Parquet's columns are: else all as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) > 1:
        return [None if value is None else str(value) for value in values]
    return values


def _are_numbers(labels: Any) -> bool:
    return all(label is None or as_number(label) is not None for label in labels)


def _union(mappings: Any) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))
