"""The page that `python train.py --help` prints, made from the schema itself."""

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ecos_pl.config import (
    Config,
)
from ecos_pl.config_files import (
    experiments_in,
)
from ecos_pl.overrides import (
    REQUIRED,
    bounds_in_words,
    fields_of,
    groups_of,
    parts_of,
    type_in_words,
    types_of,
)

_USAGE = """\
usage: python train.py [experiment=NAME] [--config FILE] [key=value …]
       python train.py --print-config …   show the resulting config, do nothing
       python train.py --help

A later source wins: defaults, experiment, --config file, key=value.
null is "no value"; a list is [a,b]."""


def help_text(config_dir: Path) -> str:
    """Return the help page: every option with type, default and meaning, at most 80 columns."""
    lines = [_USAGE, "", "experiments (experiment=NAME)"]
    for name, path in experiments_in(config_dir).items():
        lines += _wrap(f"{name}: {_first_comment(path)}".rstrip(": "), 2)
    if not experiments_in(config_dir):
        lines += _wrap(f"none in {config_dir / 'experiment'}", 2)
    lines += ["", "run", *_describe(Config, "")]
    hints = typing.get_type_hints(Config)
    for group, group_field in groups_of(Config).items():
        parts = parts_of(group_field)
        if not parts:
            lines += ["", *_wrap(f"{group}: {_doc(hints[group])}", 0)]
            lines += _describe(hints[group], f"{group}.")
        for position, (name, cls) in enumerate(parts.items()):
            default = " (default)" if position == 0 else ""
            lines += ["", *_wrap(f"{group}={name}{default}: {_doc(cls)}", 0)]
            lines += _describe(cls, f"{group}.")
    return "\n".join(lines) + "\n"


def _describe(cls: type, prefix: str) -> Iterator[str]:
    types = types_of(cls, prefix)
    for key, option_field in fields_of(cls, prefix).items():
        kind = type_in_words(types[key])
        if choices := option_field.metadata["choices"]:
            kind = " | ".join(choices) + (" | none" if option_field.default is None else "")
        if bounds := bounds_in_words(option_field):
            kind += f", {bounds}"
        default = _default_in_words(option_field)
        yield from _wrap(f"{key}{default}  ({kind})", 2)
        yield from _wrap(option_field.metadata["help"], 6)


def _default_in_words(option_field: "dataclasses.Field[Any]") -> str:
    default = option_field.default
    if default is dataclasses.MISSING:
        assert option_field.default_factory is not dataclasses.MISSING
        return f"=[{','.join(map(str, option_field.default_factory()))}]"
    if default == REQUIRED:
        return " required"
    words = {None: "null", True: "true", False: "false"}
    return f"={words[default] if default is None or isinstance(default, bool) else default}"


def _first_comment(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        return next((line.lstrip("# ").strip() for line in file if line.startswith("#")), "")


def _doc(cls: type) -> str:
    return (cls.__doc__ or "").partition("\n")[0]


def _wrap(text: str, indent: int) -> list[str]:
    spaces = " " * indent
    return textwrap.wrap(text, 80, initial_indent=spaces, subsequent_indent=spaces + "  ")
