"""The cells of a study: every combination of its axes, each a run of train.py that is checked.

A cell's run id holds its labels, to be read, and a hash of all its settings: other settings, in the
file, in its experiment or on the command line, are another cell, and never read as this one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ecos_pl.config import (
    Config,
)
from ecos_pl.config_files import (
    config_of,
    experiment_in,
    load_config,
    to_dict,
)
from ecos_pl.overrides import (
    ConfigError,
    Setting,
    groups_of,
    parts_of,
)
from ecos_pl.storage import fingerprint_of
from ecos_pl.study.nodes import as_number
from ecos_pl.study.study_file import Axis, Study

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG_DIR = REPOSITORY / "configs"

_OF_THE_STUDY = ("run_id", "run_root")  # what the study itself sets
_LABEL_LENGTH = 32  # of what a run id shows of a label


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        run_id: Its name, which tells its settings.
        labels: Its label on each of its axes.
        settings: What its axes set, for the table of results.
        argv: Arguments of train.py, but for `run_id` and `run_root`.
        config: What these come to.
    """

    run_id: str
    labels: Mapping[str, str]
    settings: Mapping[str, str]
    argv: tuple[str, ...]
    config: Config


def cells_of(study: Study, overrides: Sequence[Setting] = ()) -> list[Cell]:
    """All cells in the order in which they are run: the first axis changes slowest.

    Args:
        study: The study.
        overrides: Settings of the command line; they count more than the study's `settings`.

    Raises:
        ConfigError: A setting does not exist or cannot be so; the line says where it was written.
    """
    _check_overrides(study, overrides)
    cells = [_cell(study, overrides, labels, chosen) for labels, chosen in _combinations(study)]
    seen: dict[str, Cell] = {}
    for cell in cells:
        facts = fingerprint_of(to_dict(cell.config))
        if facts in seen:
            raise ConfigError(
                f"{study.path}: {_described(cell)} and {_described(seen[facts])} have the same "
                "settings: the axes do not tell them apart"
            )
        seen[facts] = cell
    return cells


def _combinations(study: Study) -> Iterator[tuple[dict[str, str], list[Setting]]]:
    for block in study.blocks:
        axes: Sequence[Axis] = (*study.axes, *block)
        shown = [axis.name for axis in (*block, *study.axes)]
        for labels in itertools.product(*(axis.values for axis in axes)):
            chosen = [
                s for axis, label in zip(axes, labels, strict=True) for s in axis.values[label]
            ]
            by_name = dict(zip((axis.name for axis in axes), labels, strict=True))
            yield {name: by_name[name] for name in shown}, chosen


def _cell(
    study: Study, overrides: Sequence[Setting], labels: dict[str, str], chosen: list[Setting]
) -> Cell:
    layers = [study.settings, overrides, chosen]
    experiment = experiment_in(layers, CONFIG_DIR)
    config = config_of([experiment, *layers])
    argv = tuple(_argument(setting) for setting in _in_force(layers))
    if load_config(argv, config_dir=CONFIG_DIR) != config:
        raise ConfigError(
            f"{study.path}: the settings of {_described_labels(labels)} cannot be written as "
            "arguments of train.py: leave out quotes around null, true or numbers"
        )
    hashed = fingerprint_of(sorted(map(_argument, _in_force([experiment, *layers]))))[:8]
    return Cell(
        run_id="-".join([*map(_readable, labels, labels.values()), hashed]),
        labels=labels,
        settings={setting.key: _argument(setting).partition("=")[2] for setting in chosen},
        argv=argv,
        config=config,
    )


def _check_overrides(study: Study, overrides: Sequence[Setting]) -> None:
    given = {setting.key: setting for setting in (*study.settings, *overrides)}
    axes = [axis for block in (study.axes, *study.blocks) for axis in block]
    on_axes = {s.key: (s, axis) for axis in axes for some in axis.values.values() for s in some}
    for key in _OF_THE_STUDY:
        if found := given.get(key) or (on_axes[key][0] if key in on_axes else None):
            raise ConfigError(
                f"{found.where}{key} is set by the study itself; --out names its folder"
            )
    for setting in overrides:
        if setting.key in on_axes:
            other, axis = on_axes[setting.key]
            raise ConfigError(
                f"{setting.key}={setting.value}: {other.where}axis {axis.name} sets "
                f"{setting.key}; --only {axis.name}=… runs a part of an axis"
            )


def _in_force(layers: Sequence[Sequence[Setting]]) -> list[Setting]:
    """Settings that are left: the last of each key, without those of parts that were replaced."""
    groups = groups_of(Config)
    parts = {name: next(iter(parts_of(group)), None) for name, group in groups.items()}
    chosen = {name: first for name, first in parts.items() if first is not None}
    left: dict[str, Setting] = {}
    for layer in layers:
        below = dict(left)
        for setting in layer:
            group = setting.key.removesuffix(".name")
            if group in chosen:
                if setting.value != chosen[group]:
                    for key in [key for key in below if key.startswith(f"{group}.")]:
                        left.pop(key, None)
                chosen[group] = str(setting.value)
                left.pop(f"{group}.name", None)
                left[group] = Setting(group, setting.value, setting.where, setting.quoted)
            elif setting.value != "":
                left.pop(setting.key, None)
                left[setting.key] = setting
    return list(left.values())


def _argument(setting: Setting) -> str:
    """`key=value` as it is written on the command line."""
    if isinstance(setting.value, str):
        return f"{setting.key}={setting.value}"
    text = yaml.safe_dump(list(setting.value), default_flow_style=True, width=10**6)
    return f"{setting.key}={text.strip()}"


def _readable(axis: str, label: str) -> str:
    """What a run id shows of a label: `ecos`, `seed1`, `size300`."""
    text = re.sub(r"[^a-z0-9.]+", "_", label.lower()).strip("_.")[:_LABEL_LENGTH]
    is_clear = text and as_number(label) is None
    return text if is_clear else f"{axis.rpartition('.')[2]}{text}"


def _described(cell: Cell) -> str:
    return _described_labels(cell.labels)


def _described_labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{axis}={label}" for axis, label in labels.items())


def difference(there: Mapping[str, Any], config: Config) -> str:
    """First option in which the config in a run's folder differs from the one it should have.

    Options that one of the two does not have are no difference: they came with another version.
    """
    for key, value in _flat(to_dict(config)).items():
        if key in _MAY_DIFFER or key.endswith(".num_workers"):
            continue
        old = _flat(there).get(key, value)
        if old != value:
            return f"{key}={old} there, {key}={value} here"
    return ""


_MAY_DIFFER = (*_OF_THE_STUDY, "experiment", "trainer.enable_progress_bar")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        found |= {f"{prefix}{key}": value} if inner is None else inner
    return found
