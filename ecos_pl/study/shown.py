"""What a study shows: the columns of its table, and its figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from ecos_pl.overrides import ConfigError, nearest, where_in
from ecos_pl.study.nodes import entries, items, text, texts, yes


@dataclass(frozen=True)
class Column:
    """A column of the table: a fact of `summary.json`, as mean ± std over some cells.

    Attributes:
        title: Its head.
        fact: Place in `summary.json`, as in `simulation.test_accuracy`.
        form: Of one number, as in `{:.3f}`.
        best: ``highest`` or ``lowest``, which is set in bold; empty: none is.
        spread: Whether to show the standard deviation.
    """

    title: str
    fact: str
    form: str = "{:.3f}"
    best: str = ""
    spread: bool = True


COLUMNS: tuple[Column, ...] = (
    Column("images", "proxy.size", "{:,.0f}", spread=False),
    Column("ε", "privacy.epsilon", "{:.2f}", spread=False),
    Column("purity", "simulation.purity", best="highest"),
    Column("label accuracy", "simulation.label_accuracy", best="highest"),
    Column("test accuracy", "simulation.test_accuracy", best="highest"),
    Column("seconds", "seconds.total", "{:.0f}", spread=False),
)
"""What a table shows unless its study says otherwise."""


@dataclass(frozen=True)
class TableForm:
    """Attributes:
    rows: Axes that name a row; all cells of equal labels on them are one row.
    over: Axes that mean and spread are taken over.
    columns: What is shown.
    best_within: Only rows of equal labels on these axes compete for the bold print.
    reference: Labels whose rows do not compete.
    """

    rows: tuple[str, ...]
    over: tuple[str, ...]
    columns: tuple[Column, ...] = COLUMNS
    best_within: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()


@dataclass(frozen=True)
class FigureForm:
    """Facts against an axis: one panel for each.

    Attributes:
        name: Of the file, without its ending.
        x: The axis.
        y: Facts, as places in `summary.json`.
        lines: The axis with one line for each label; empty: one line.
        log: Whether x is logarithmic; None: where labels are numbers that span a factor of 8.
        where: Place in the file.
    """

    name: str
    x: str
    y: tuple[str, ...]
    lines: str = ""
    log: bool | None = None
    where: str = ""


def read_table(node: yaml.Node | None, path: Path, axes: Sequence[str]) -> TableForm:
    """Read the section `table`, or make the default one.

    Raises:
        ConfigError: One line with the place of the mistake.
    """
    keys = ("rows", "over", "columns", "best_within", "reference")
    found = {} if node is None else entries(node, path, keys)
    over: tuple[str, ...] = ("seed",) if "seed" in axes else ()
    if "over" in found:
        over = _axis_names(found["over"], path, axes)
    rows = tuple(name for name in axes if name not in over)
    if "rows" in found:
        rows = _axis_names(found["rows"], path, axes)
    if lost := [name for name in axes if name not in (*rows, *over)]:
        assert node is not None
        raise ConfigError(
            f"{where_in(path, node)}table: {lost[0]} is neither in rows nor in over: cells that "
            "differ in it must not become one number"
        )
    columns = COLUMNS
    if "columns" in found:
        columns = tuple(_column(item, path) for item in items(found["columns"], path))
    within = _axis_names(found["best_within"], path, axes) if "best_within" in found else ()
    reference = texts(found["reference"], path) if "reference" in found else ()
    return TableForm(rows, over, columns, within, reference)


def _column(node: yaml.Node, path: Path) -> Column:
    known = {column.title: column for column in COLUMNS}
    where = where_in(path, node)
    if isinstance(node, yaml.ScalarNode):
        if node.value not in known:
            raise ConfigError(
                f"{where}no column {node.value}{nearest(node.value, known)} (there are: "
                f"{', '.join(known)}; others are written {{title: …, fact: …}})"
            )
        return known[node.value]
    found = entries(node, path, ("title", "fact", "form", "best", "spread"))
    if "fact" not in found:
        raise ConfigError(f"{where}a column needs a fact, as in simulation.test_accuracy")
    fact = text(found["fact"], path)
    column = Column(
        title=text(found["title"], path) if "title" in found else fact,
        fact=fact,
        form=text(found["form"], path) if "form" in found else "{:.3f}",
        best=text(found["best"], path) if "best" in found else "",
        spread=yes(found["spread"], path) if "spread" in found else True,
    )
    try:
        column.form.format(0.5)
    except (ValueError, IndexError, KeyError):
        raise ConfigError(
            f"{where}form {column.form!r} does not format a number: write it as in '{{:.3f}}'"
        ) from None
    if column.best not in ("", "highest", "lowest"):
        raise ConfigError(f"{where}best must be highest or lowest, not {column.best}")
    return column


def read_figures(node: yaml.Node | None, path: Path, axes: Sequence[str]) -> Iterator[FigureForm]:
    """Read the section `figures`.

    Raises:
        ConfigError: One line with the place of the mistake.
    """
    names: set[str] = set()
    for item in [] if node is None else items(node, path):
        where = where_in(path, item)
        found = entries(item, path, ("name", "x", "y", "lines", "log"))
        if missing := [key for key in ("x", "y") if key not in found]:
            raise ConfigError(f"{where}a figure needs {missing[0]}")
        x, y = _axis_names(found["x"], path, axes)[0], texts(found["y"], path)
        name = f"{y[0].rpartition('.')[2]}-{x.rpartition('.')[2]}"
        if "name" in found:
            name = text(found["name"], path)
        if name in names or "/" in name:
            raise ConfigError(f"{where}figure {name}: give it another name")
        names.add(name)
        lines = _axis_names(found["lines"], path, axes)[0] if "lines" in found else ""
        log = yes(found["log"], path) if "log" in found else None
        yield FigureForm(name, x, y, lines, log, where)


def _axis_names(node: yaml.Node, path: Path, axes: Sequence[str]) -> tuple[str, ...]:
    names = texts(node, path)
    for name in names:
        if name not in axes:
            raise ConfigError(
                f"{where_in(path, node)}no axis {name}{nearest(name, axes)} (there are: "
                f"{', '.join(axes)})"
            )
    return names
