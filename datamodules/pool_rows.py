"""Some images of a pool as a pool of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from ecos_pl.columns import Constant, Picked
from ecos_pl.images import PoolPart, PoolSource


class PoolRows:
    """Rows of a pool, ascending; nothing but their numbers is held in memory.

    A part keeps its name, licence and prefix but gets a fingerprint of its own: embeddings on disk
    belong to a part, and those of all its images are not those of some.

    Args:
        pool: The whole.
        rows: [n] int64, places in it, ascending and each once.
        has_domains: Whether images keep the domains that they have there; else they have none.
    """

    def __init__(
        self, pool: PoolSource, rows: npt.NDArray[np.int64], *, has_domains: bool = True
    ) -> None:
        assert (np.diff(rows) > 0).all(), "rows must ascend"
        self._pool, self._rows = pool, rows
        whole = len(rows) == len(pool)
        self.name = pool.name if whole else f"{len(rows)} images of {pool.name}"
        self.ids: Sequence[str] = Picked(pool.ids, rows)
        self.labels: Sequence[str | None] = Picked(pool.labels, rows)
        self.domains: Sequence[str | None] = (
            Picked(pool.domains, rows) if has_domains else Constant(None, len(rows))
        )
        self.fingerprint = pool.fingerprint if whole else _fingerprint(pool.fingerprint, rows)
        self.parts: list[PoolPart] = []
        for part in pool.parts:
            start, stop = np.searchsorted(rows, [part.start, part.stop]).tolist()
            if start == stop:
                continue
            inside = rows[start:stop] - part.start
            kept = len(inside) == part.stop - part.start
            fingerprint = part.fingerprint if kept else _fingerprint(part.fingerprint, inside)
            self.parts.append(replace(part, start=start, stop=stop, fingerprint=fingerprint))

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"PoolRows({self.name!r}, {len(self)} images)"

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        return self._pool.read(int(self._rows[index]))


def _fingerprint(whole: str, rows: npt.NDArray[np.int64]) -> str:
    digest = hashlib.sha256(rows.astype("<i8").tobytes())
    digest.update(whole.encode())
    return digest.hexdigest()
