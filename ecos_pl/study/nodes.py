"""Parts of a YAML file, read as what they must be: a mistake is one line with its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from ecos_pl.overrides import ConfigError, nearest, where_in


def mapping(node: yaml.Node, path: Path) -> yaml.MappingNode:
    """A node that must be a mapping."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{where_in(path, node)}expected 'key: value', or {{key: value}}")
    return node


def entries(node: yaml.Node, path: Path, allowed: Sequence[str] = ()) -> dict[str, yaml.Node]:
    """The values of a mapping by key; with `allowed`, no other keys."""
    found: dict[str, yaml.Node] = {}
    for key, value in mapping(node, path).value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{where_in(path, key)}a key must be one word or number")
        if allowed and key.value not in allowed:
            raise ConfigError(
                f"{where_in(path, key)}no key {key.value}{nearest(key.value, allowed)} here (there "
                f"are: {', '.join(allowed)})"
            )
        if key.value in found:
            raise ConfigError(f"{where_in(path, key)}{key.value} is given twice")
        found[key.value] = value
    return found


def items(node: yaml.Node, path: Path) -> list[yaml.Node]:
    """The nodes of a list."""
    if not isinstance(node, yaml.SequenceNode):
        raise ConfigError(f"{where_in(path, node)}expected a list: lines that begin with '- '")
    return list(node.value)


def text(node: yaml.Node, path: Path) -> str:
    """A single text."""
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        raise ConfigError(f"{where_in(path, node)}expected one text")
    return str(node.value)


def texts(node: yaml.Node, path: Path) -> tuple[str, ...]:
    """Texts of a list, or a single one; at least one."""
    if isinstance(node, yaml.ScalarNode):
        return (text(node, path),)
    if not (found := tuple(text(item, path) for item in items(node, path))):
        raise ConfigError(f"{where_in(path, node)}expected at least one")
    return found


def yes(node: yaml.Node, path: Path) -> bool:
    """True or false."""
    word = text(node, path).lower()
    if word not in ("true", "false"):
        raise ConfigError(f"{where_in(path, node)}must be true or false, not {word}")
    return word == "true"


def as_number(text: str) -> int | float | None:
    """The number that a label is, or None."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
