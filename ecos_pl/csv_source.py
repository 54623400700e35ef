"""Images listed in a CSV file: a path, a label and, if wanted, a person per row."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ecos_pl.images import read_image


@dataclass(frozen=True)
class CsvSource:
    """The images that a CSV file names; made by `read_csv_source`.

    Attributes:
        path: The CSV file, absolute.
        ids: Paths as they stand in the file, relative to its folder.
        labels: Class names; None where the cell is empty or there is no such column.
        domains: None throughout.
        persons: Whom each image belongs to; None where no column was asked for.
        fingerprint: SHA-256 over all rows and each file's size and modification time.
    """

    path: Path
    ids: Sequence[str]
    labels: Sequence[str | None]
    domains: Sequence[str | None]
    persons: Sequence[str] | None
    fingerprint: str

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.path)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:  # the generated one would print every id
        return f"CsvSource({self.name!r}, {len(self)} images)"

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        return read_image(self.path.parent / self.ids[index])


def read_csv_source(
    path: Path,
    *,
    path_column: str = "path",
    label_column: str = "label",
    person_column: str | None = None,
) -> CsvSource:
    """Read a CSV file with a header line; paths in it are relative to its own folder.

    An image that does not exist is kept and counts as unreadable, so that one lost file does not
    stop the others.

    Args:
        path: The file, UTF-8 (a byte order mark is ignored).
        path_column: Column of the images' paths; it must be there.
        label_column: Column of the class names; may be absent.
        person_column: Column that tells whom an image belongs to; must be there if given, and
            filled in every row.

    Raises:
        ValueError: One line: the file cannot be read, has no such column, no rows, a path twice,
            or a row without a path or a person.
    """
    path = path.absolute()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"cannot read {str(path)!r} as CSV: {reason}") from error
    for column in (path_column, person_column):
        if column is not None and column not in columns:
            listed = ", ".join(columns) or "none"
            raise ValueError(f"{str(path)!r} has no column {column!r} (its columns: {listed})")
    if not rows:
        raise ValueError(f"{str(path)!r} lists no images")
    ids, labels, persons = [], [], []
    digest = hashlib.sha256()
    for number, row in enumerate(rows, 2):
        name = (row[path_column] or "").strip()
        label = (row.get(label_column) or "").strip() or None
        person = (row[person_column] or "").strip() if person_column else ""
        if not name or (person_column and not person):
            what = "path" if not name else person_column
            raise ValueError(f"{str(path)!r}, line {number}: no {what}")
        digest.update(f"{name}\0{label}\0{person}\0{_stamp(path.parent / name)}\n".encode())
        ids.append(name)
        labels.append(label)
        persons.append(person)
    if len(set(ids)) != len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"{str(path)!r} lists {twice!r} twice")
    return CsvSource(
        path, ids, labels, [None] * len(ids), persons if person_column else None, digest.hexdigest()
    )


def _stamp(path: Path) -> str:
    try:
        stat = path.stat()
    except OSError:
        return "missing"
    return f"{stat.st_size} {stat.st_mtime_ns}"
