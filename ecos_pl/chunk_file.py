"""Some rows in a file of their own, beside it a checksum: there whole, or not at all."""

from __future__ import annotations

import mmap
import os
import zlib
from dataclasses import dataclass
from io import BytesIO, FileIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ecos_pl.storage import read_json, write_bytes, write_json

Rows16 = npt.NDArray[np.float16]


@dataclass(frozen=True)
class ChunkFile:
    """Rows [n, D] float16 in numpy's format; its sidecar holds a CRC-32 and which rows are NaN.

    Attributes:
        path: Ends in ``.npy``.
        rows: Their numbers in the whole.
        num_dims: ``D``.
    """

    path: Path
    rows: range
    num_dims: int

    def write(self, rows: Rows16) -> None:
        """Store the rows, then the sidecar: without it they count as missing."""
        expected = (len(self.rows), self.num_dims)
        if rows.shape != expected or rows.dtype != np.float16:
            raise ValueError(
                f"{self.path.name} must hold {expected} float16, not {rows.shape} {rows.dtype}"
            )
        buffer = BytesIO()
        np.save(buffer, rows, allow_pickle=False)
        content = buffer.getvalue()
        write_bytes(self.path, content)
        bad = np.flatnonzero(np.isnan(rows[:, 0])) + self.rows.start
        write_json(self._sidecar, {"crc32": zlib.crc32(content), "unreadable": bad.tolist()})

    def read(self, rows: range, into: Rows16) -> None:
        """Read adjoining rows into ``into``, an array in C order."""
        with self._open() as file:
            # Read, not mapped: the pages of a map would count as this process' memory.
            skipped = (rows.start - self.rows.start) * self._width
            file.seek(self._offset(file) + skipped)
            if file.readinto(into.reshape(-1).view(np.uint8).data) != into.nbytes:
                raise ValueError(f"{self.path} ends early")

    def take(self, rows: npt.NDArray[np.int64]) -> Rows16:
        """Read some rows, in the order asked: [len(rows), D]."""
        with self._open() as file:
            offset = self._offset(file)
            # Mapped, not read: they may be few.
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        stored: Rows16 = np.frombuffer(pages, np.float16, len(self.rows) * self.num_dims, offset)
        return stored.reshape(-1, self.num_dims)[rows - self.rows.start]

    def unreadable(self) -> list[int]:
        """Numbers of the rows that are NaN."""
        found: list[int] = read_json(self._sidecar)["unreadable"]
        return found

    def identity(self) -> list[int]:
        """Sizes in bytes and times in ns of the two files: while they stay, so does the content."""
        stats = self.path.stat(), self._sidecar.stat()
        return [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns)]

    def is_intact(self) -> bool:
        """Whether the file has these rows' size and its checksum; reads all of it."""
        try:
            content = self.path.read_bytes()
            return bool(
                len(content) == _header_bytes(content) + len(self.rows) * self._width
                and read_json(self._sidecar)["crc32"] == zlib.crc32(content)
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @property
    def _sidecar(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def _width(self) -> int:
        return 2 * self.num_dims  # bytes per row

    def _open(self) -> FileIO:
        try:
            return FileIO(self.path)
        except OSError as error:
            raise ValueError(f"cannot read {self.path}: {error.strerror}") from error

    def _offset(self, file: FileIO) -> int:
        """Where the rows begin, in bytes; they go on up to the end."""
        offset = _header_bytes(file.read(10))
        if os.fstat(file.fileno()).st_size != offset + len(self.rows) * self._width:
            raise ValueError(f"{self.path} does not hold {len(self.rows)} × {self.num_dims} rows")
        return offset


def _header_bytes(head: bytes) -> int:
    """Bytes before the rows in a file of numpy's format, version 1."""
    return 10 + int.from_bytes(head[8:10], "little")
