"""A pool that is opened when it is first needed, not where it is named."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from ecos_pl.images import PoolPart, PoolSource


class DeferredPool:
    """An image source behind a function that opens it, called once, at the first use.

    Opening a large pool lists millions of files, or indexes shards: that belongs into
    `prepare_data`, where the other ranks wait without a time limit, not into the building of
    objects. What the function raises comes through unchanged, and the next use tries again.
    Pickled, it is the opened source.

    Args:
        open_source: Opens the pool.
    """

    def __init__(self, open_source: Callable[[], PoolSource]) -> None:
        self._open = open_source
        self._source: PoolSource | None = None

    @property
    def source(self) -> PoolSource:
        """The pool itself, opened now at the latest."""
        if self._source is None:
            self._source = self._open()
        return self._source

    @property
    def is_open(self) -> bool:
        """Whether it has been opened."""
        return self._source is not None

    @property
    def name(self) -> str:
        """See `PoolSource`."""
        return self.source.name

    @property
    def ids(self) -> Sequence[str]:
        """See `PoolSource`."""
        return self.source.ids

    @property
    def labels(self) -> Sequence[str | None]:
        """See `PoolSource`."""
        return self.source.labels

    @property
    def domains(self) -> Sequence[str | None]:
        """See `PoolSource`."""
        return self.source.domains

    @property
    def fingerprint(self) -> str:
        """See `PoolSource`."""
        return self.source.fingerprint

    @property
    def parts(self) -> Sequence[PoolPart]:
        """See `PoolSource`."""
        return self.source.parts

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return f"DeferredPool({self._source!r})" if self.is_open else "DeferredPool(not open)"

    def __reduce__(self) -> tuple[Callable[[PoolSource], PoolSource], tuple[PoolSource]]:
        return _same, (self.source,)

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        return self.source.read(index)


def _same(source: PoolSource) -> PoolSource:
    return source
