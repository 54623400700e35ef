"""Several pools as one, each with a name and a licence."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any

from PIL import Image

from ecos_pl.columns import Joined, Span
from ecos_pl.images import PoolPart, PoolSource


class SeveralPools:
    """Pools one after the other; an image is called `pool/id`.

    An image's domain is the one that its own pool gives it, else the pool's name: so
    `client_domain` can name either, and equal domains of two pools are one domain. The
    fingerprint covers names, order and content but not the licences: to correct one must not ask
    the client a second time.

    Args:
        pools: Name, licence (None for that of the source itself) and source of each.

    Raises:
        ValueError: One line: no pool, a name that is empty, is used twice or has a slash in it,
            or a pool that is given twice.
    """

    def __init__(self, pools: Sequence[tuple[str, str | None, PoolSource]]) -> None:
        _check(pools)
        self.sources = [source for _, _, source in pools]
        self.name = " + ".join(name for name, _, _ in pools)
        self._ends = list(accumulate(len(source) for source in self.sources))
        self.parts: list[PoolPart] = []
        for (name, licence, source), end in zip(pools, self._ends, strict=True):
            self.parts += _parts_of(name, licence, source, end - len(source))
        self.ids = Joined([_seen(s.ids, partial(_within, name)) for name, _, s in pools])
        self.labels: Sequence[str | None] = Joined([source.labels for source in self.sources])
        self.domains = Joined([_seen(s.domains, partial(_or, name)) for name, _, s in pools])
        digest = hashlib.sha256()
        for name, _, source in pools:
            digest.update(f"{name}\0{source.fingerprint}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        return f"SeveralPools({self.name!r}, {len(self)} images)"

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        number = bisect_right(self._ends, index)
        return self.sources[number].read(index - (self._ends[number - 1] if number else 0))


def _check(pools: Sequence[tuple[str, str | None, PoolSource]]) -> None:
    if not pools:
        raise ValueError("no pools: give at least one")
    names = [name for name, _, _ in pools]
    for name in names:
        if not name or "/" in name or name != name.strip() or not name.isprintable():
            raise ValueError(
                f"pool name {name!r}: it begins the ids of its images, so it must be a word or "
                "more, without a slash"
            )
        if names.count(name) > 1:
            raise ValueError(f"two pools are called {name!r}: each needs a name of its own")
    first: dict[str, str] = {}
    for name, _, source in pools:
        other = first.setdefault(source.fingerprint, name)
        if other != name:
            raise ValueError(
                f"pools {other!r} and {name!r} hold the same images ({source.name}): list them "
                "once, or every image would count twice"
            )


def _parts_of(name: str, licence: str | None, source: PoolSource, start: int) -> list[PoolPart]:
    """The parts of one pool, moved to where it begins; one that has several keeps them."""
    whole = len(source.parts) == 1
    return [
        replace(
            part,
            name=name if whole else f"{name}/{part.name}",
            licence=licence if licence is not None else part.licence,
            start=start + part.start,
            stop=start + part.stop,
            prefix=f"{name}/{part.prefix}",
        )
        for part in source.parts
    ]


def _seen(values: Sequence[Any], made: Callable[[Any], str]) -> Sequence[str]:
    return Span(values, 0, len(values), made)


def _within(pool: str, identifier: str) -> str:
    return f"{pool}/{identifier}"


def _or(pool: str, domain: str | None) -> str:
    return pool if domain is None else domain
