"""Some of the images in a folder, with labels that a list or the file names give.

What the readers of DomainNet, CelebA, UTKFace and Tiny-ImageNet have in common: the folder is
listed once (`folder_pool.py`), and a row number and a class number is all that is held per image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ecos_pl.columns import Coded, Constant, Picked
from ecos_pl.images import FolderSource, PoolPart


class ListedImages:
    """Some images of a folder under other labels; a `PoolSource`.

    Args:
        folder: Lists the images.
        rows: [n], places there, ascending.
        classes: Class names.
        codes: [n], place of each image's class in `classes`, below 0 where it has none.
        name: What to call the collection, as in "domainnet/clipart/train".
        licence: Under which terms the images may be used, where known.
    """

    def __init__(
        self,
        folder: FolderSource,
        rows: npt.NDArray[np.int64],
        classes: Sequence[str],
        codes: npt.NDArray[Any],
        *,
        name: str,
        licence: str | None = None,
    ) -> None:
        assert len(rows) == len(codes), (len(rows), len(codes))
        self._folder, self._rows = folder, rows
        self.name, self.licence = name, licence
        self.ids: Sequence[str] = Picked(folder.ids, rows)
        self.labels: Sequence[str | None] = Coded(classes, codes)
        self.domains: Sequence[str | None] = Constant(None, len(rows))
        digest = hashlib.sha256(f"{folder.fingerprint}\0{list(classes)}\n".encode())
        digest.update(rows.astype("<i8").tobytes() + codes.astype("<i8").tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def parts(self) -> Sequence[PoolPart]:
        """The collection, under its own name."""
        return [PoolPart(self.name, self.licence, 0, len(self), self.fingerprint)]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"ListedImages({self.name!r}, {len(self)} images)"

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        return self._folder.read(int(self._rows[index]))


def rows_of(
    folder: FolderSource, wanted: Sequence[str], *, listed_in: Path, advice: str
) -> npt.NDArray[np.int64]:
    """Places [n] in a folder of files that a list names, in the list's order.

    Args:
        folder: Its listing.
        wanted: Paths relative to it.
        listed_in: The list, for the error.
        advice: What to do about a file that is not there.

    Raises:
        ValueError: One line: how many files of the list are missing, and the first of them.
    """
    place = {name: row for row, name in enumerate(folder.ids)}
    rows = np.array([place.get(name, -1) for name in wanted], np.int64)
    missing = np.flatnonzero(rows < 0)
    if len(missing):
        raise ValueError(
            f"{len(missing):,} of {len(wanted):,} images that {str(listed_in)!r} lists are not in "
            f"{folder.name!r}, {wanted[int(missing[0])]!r} to begin with: {advice}"
        )
    return rows


def in_order(
    rows: npt.NDArray[np.int64], codes: npt.NDArray[Any], *, listed_in: Path
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Rows, ascending, with their codes; a list that names an image twice is refused."""
    order = np.argsort(rows, kind="stable")
    rows, codes = rows[order], codes[order]
    if bool((rows[1:] == rows[:-1]).any()):
        raise ValueError(f"{str(listed_in)!r} lists an image twice: get the file again")
    return rows, codes


def existing(path: Path, what: str, advice: str) -> Path:
    """The path, if something lies there; else one line (ValueError) on where and how to get it."""
    if not path.exists():
        raise ValueError(f"{what} is missing: looked for {str(path)!r}; {advice}")
    return path


def text_lines(path: Path, what: str, advice: str) -> list[str]:
    """Lines of a text file that belongs to a data set.

    Raises:
        ValueError: One line: it is missing, empty or no text.
    """
    existing(path, what, advice)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"cannot read {what}, {str(path)!r}: {reason}; {advice}") from error
    if not any(lines):
        raise ValueError(f"{what}, {str(path)!r}, is empty: {advice}")
    return lines


def damaged(path: Path, number: int, line: str, expected: str, advice: str) -> ValueError:
    """What to raise about line `number` (from 1) of a list."""
    shown = line if len(line) <= 80 else line[:80] + "…"
    return ValueError(f"{str(path)!r}, line {number}: {shown!r} is not {expected}; {advice}")


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Place of each name."""
    return {name: number for number, name in enumerate(names)}
