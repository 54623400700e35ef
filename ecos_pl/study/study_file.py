"""A study as its file says it: settings and axes; every mistake has its line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from ecos_pl.overrides import ConfigError, Setting, read_nodes, settings_in, where_in
from ecos_pl.study.nodes import entries, items, mapping, text
from ecos_pl.study.shown import FigureForm, TableForm, read_figures, read_table

_SECTIONS = ("title", "settings", "axes", "blocks", "table", "figures")


@dataclass(frozen=True)
class Axis:
    """What cells differ in: a name, and for each of its labels the settings that it stands for."""

    name: str
    values: dict[str, tuple[Setting, ...]]
    where: str = ""


@dataclass(frozen=True)
class Study:
    """Everything that a study's file says.

    Attributes:
        name: The file's name without its ending.
        settings: Of all cells.
        axes: Common to all blocks.
        blocks: The axes of each.
    """

    name: str
    path: Path
    title: str
    settings: tuple[Setting, ...]
    axes: tuple[Axis, ...]
    blocks: tuple[tuple[Axis, ...], ...]
    table: TableForm
    figures: tuple[FigureForm, ...]

    def axis_names(self) -> list[str]:
        """Names of all axes, those of blocks first, each once."""
        names = [axis.name for block in (*self.blocks, self.axes) for axis in block]
        return list(dict.fromkeys(names))


def read_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        ConfigError: One line with the place of the mistake.
    """
    root = read_nodes(path)
    if root is None:
        raise ConfigError(f"{path} is empty: a study has axes")
    sections = entries(root, path, _SECTIONS)
    axes = _axes(sections["axes"], path) if "axes" in sections else ()
    blocks: tuple[tuple[Axis, ...], ...] = ((),)
    if "blocks" in sections:
        blocks = tuple(_axes(node, path) for node in items(sections["blocks"], path))
    if not any((*axes, *block) for block in blocks):
        raise ConfigError(f"{path} has no axes: write axes: {{seed: [1, 2, 3]}}")
    for block in blocks:
        _check_apart((*axes, *block))
    settings: Sequence[Setting] = ()
    if "settings" in sections:
        settings = settings_in(mapping(sections["settings"], path), path)
    every = list(dict.fromkeys(axis.name for block in (*blocks, axes) for axis in block))
    table = sections.get("table")
    return Study(
        name=path.stem,
        path=path,
        title=text(sections["title"], path) if "title" in sections else path.stem,
        settings=tuple(settings),
        axes=axes,
        blocks=blocks,
        table=read_table(table, path, every),
        figures=tuple(read_figures(sections.get("figures"), path, every)),
    )


def _axes(node: yaml.Node, path: Path) -> tuple[Axis, ...]:
    return tuple(_axis(name, value, path) for name, value in entries(node, path).items())


def _axis(name: str, node: yaml.Node, path: Path) -> Axis:
    where = where_in(path, node)
    if isinstance(node, yaml.SequenceNode):
        values: dict[str, tuple[Setting, ...]] = {
            item.value: (
                Setting(name, item.value, where_in(path, item), quoted=item.style is not None),
            )
            for item in node.value
            if isinstance(item, yaml.ScalarNode)
        }
        if len(values) < len(node.value):
            raise ConfigError(
                f"{where}axis {name}: values are words or numbers, each once; for others give "
                "each a name, as in NAME: {key: value}"
            )
    elif isinstance(node, yaml.MappingNode):
        values = {
            label: tuple(settings_in(mapping(bundle, path), path))
            for label, bundle in entries(node, path).items()
        }
    else:
        raise ConfigError(
            f"{where}axis {name} has one value: write {name}: [{node.value}], or put it under "
            "settings"
        )
    if not values:
        raise ConfigError(f"{where}axis {name} has no values")
    return Axis(name, values, where)


def _check_apart(axes: Sequence[Axis]) -> None:
    """Each key is set by one axis alone, and each axis is there once."""
    owners: dict[str, str] = {}
    seen: set[str] = set()
    for axis in axes:
        if axis.name in seen:
            raise ConfigError(f"{axis.where}axis {axis.name} is there twice in one block")
        seen.add(axis.name)
        keys = {s.key: s for settings in axis.values.values() for s in settings}
        for key, setting in keys.items():
            if key in owners:
                raise ConfigError(
                    f"{setting.where}{key} is set by axes {owners[key]} and {axis.name}"
                )
            owners[key] = axis.name
