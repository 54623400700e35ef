"""How a command names a pool of shards: a folder, a glob, or braces, as with WebDataset."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")


def list_shards(spec: str) -> list[Path]:
    """Absolute paths of the shards that `spec` names.

    Args:
        spec: A folder (every `.tar` below it, sorted), a `.tar` file, a glob (sorted), a pattern
            with braces (`{00000..00199}.tar`, in its own order), or several of these between `::`.

    Raises:
        ValueError: One line: nothing found, a shard is missing or listed twice, or an address that
            is no path.
    """
    shards = [Path(os.path.abspath(path)) for part in spec.split("::") for path in _expand(part)]
    if len(set(shards)) != len(shards):
        twice = next(path for path in shards if shards.count(path) > 1)
        raise ValueError(f"shard {str(twice)!r} is listed twice in {spec!r}")
    return shards


def _expand(spec: str) -> list[str]:
    if "://" in spec or spec.startswith("pipe:"):
        raise ValueError(
            f"{spec!r}: shards are read in place, at random, so they must be on a mounted path"
        )
    if os.path.isdir(spec):
        found = sorted(_below(spec))
        if not found:
            raise ValueError(f"no .tar files below {spec!r}")
        return found
    if os.path.isfile(spec):  # also one whose name has brackets or braces in it
        return [spec]
    found = []
    for path in expand_braces(spec):
        matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
        found += [match for match in matches if os.path.isfile(match)]
        if not matches or not os.path.isfile(matches[0]):
            raise ValueError(f"no shard {path!r}: give a folder, a glob or {{000..199}}.tar")
    return found


def _below(folder: str) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(".tar") and not name.startswith("."):
                yield os.path.join(parent, name)


def expand_braces(pattern: str) -> list[str]:
    """Write out `{00000..00199}`, `{0..10..2}`, `{a,b}` and braces in braces, as a shell would.

    >>> expand_braces("p/{008..010}-{x,y{1,2}}.tar")[:4]
    ['p/008-x.tar', 'p/008-y1.tar', 'p/008-y2.tar', 'p/009-x.tar']

    Raises:
        ValueError: A brace has no partner.
    """
    start = pattern.find("{")
    if start < 0:
        if "}" in pattern:
            raise ValueError(f"braces in {pattern!r} do not match")
        return [pattern]
    depth, commas, end = 0, [start], -1
    for place in range(start, len(pattern)):
        character = pattern[place]
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 1:
            commas.append(place)
        if depth == 0:
            end = place
            break
    if end < 0 or "}" in pattern[:start]:
        raise ValueError(f"braces in {pattern!r} do not match")
    inside, rest = pattern[start + 1 : end], expand_braces(pattern[end + 1 :])
    if numbers := _RANGE.fullmatch(inside):
        options = _counted(*numbers.groups())
    elif len(commas) > 1:
        bounds = [*commas, end]
        parts = [pattern[a + 1 : b] for a, b in pairwise(bounds)]
        options = [option for part in parts for option in expand_braces(part)]
    else:  # a name in braces is that name
        options = [f"{{{option}}}" for option in expand_braces(inside)]
    return [pattern[:start] + option + tail for option in options for tail in rest]


def _counted(first: str, last: str, step: str | None) -> list[str]:
    is_padded = any(re.match(r"-?0\d", end) for end in (first, last))
    width = max(len(first), len(last)) if is_padded else 0
    stride = int(step or 1) or 1
    a, b = int(first), int(last)
    numbers = range(a, b + 1, stride) if a <= b else range(a, b - 1, -stride)
    return [f"{number:0{width}d}" for number in numbers]
