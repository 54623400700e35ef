"""The config beside its defaults, and the command that brings a run about again."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from ecos_pl.config import (
    Config,
)
from ecos_pl.config_files import (
    to_dict,
)
from ecos_pl.overrides import REQUIRED, Resolver, Setting, groups_of, parts_of
from ecos_pl.printable_url import printable_url

_WHERE_FROM = "experiment"  # what it says is in the config already

Flat = dict[str, Any]  # dotted key → value


def flattened(config: dict[str, Any], prefix: str = "") -> Flat:
    """Options by dotted key.

    >>> flattened({"seed": 1, "task": {"name": "x", "target": {"macs": None}}})
    {'seed': 1, 'task.name': 'x', 'task.target.macs': None}
    """
    flat: Flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def defaults_of(config: dict[str, Any]) -> Flat:
    """What would hold if no option but the names of the parts had been given."""
    chosen = []
    for group, field in groups_of(Config).items():
        given = config.get(group)
        name = given.get("name") if isinstance(given, dict) else None
        if name in parts_of(field):
            chosen.append(Setting(group, str(name)))
    return flattened(to_dict(Resolver(Config, [chosen]).instance()))


def differences(config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options that differ from their defaults: key → (value, default), parts first."""
    ours, defaults, first = flattened(config), defaults_of(config), flattened(to_dict(Config()))
    parts, others = {}, {}
    for key, value in ours.items():
        group, _, name = key.partition(".")
        if name == "name":
            if value != first.get(key):
                parts[group] = value, first.get(key)
        elif key != _WHERE_FROM and value != defaults.get(key):
            others[key] = value, defaults.get(key)
    return parts | others


def command(config: dict[str, Any]) -> str:
    """The shell command of a run, in one line."""
    settings = [f"{key}={as_typed(value)}" for key, (value, _) in differences(config).items()]
    return shlex.join(["python", "train.py", *settings])


def as_typed(value: Any) -> str:
    """A value as it is written on the command line.

    >>> as_typed(None), as_typed(True), as_typed([2, 4]), as_typed(1e-05), as_typed(["a b"])
    ('null', 'true', '[2,4]', '1e-05', '["a b"]')
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(_item(one) for one in value)}]"
    return str(value)


def _item(value: Any) -> str:
    text = str(value)
    return text if re.fullmatch(r"[\w./-]+", text) else json.dumps(text, ensure_ascii=False)


def in_words(value: Any) -> str:
    """A value or a default as the page shows it."""
    return "must be given" if value == REQUIRED else as_typed(value)


def printable(config: Any) -> Any:
    """The config without passwords in addresses."""
    if isinstance(config, dict):
        return {key: printable(value) for key, value in config.items()}
    if isinstance(config, list):
        return [printable(value) for value in config]
    return printable_url(config) if isinstance(config, str) and "://" in config else config
