"""What a pool of millions of images knows of each, on disk: ids, labels, domains, numbers.

Ids are one blob of UTF-8 with an offset per id, labels and domains are codes into a short list of
names, everything else is a column of integers. All are memory-mapped: opening takes no longer for
100 million images than for a thousand, processes on one machine share the pages they touch, and
a pickled table is the path of its folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import numpy.typing as npt

from ecos_pl.storage import committed_folder, read_json, write_json

_VERSION = 1  # raise it whenever the files below change their meaning
_BLOCK = 65_536  # rows decoded at once by iteration
_UNKNOWN = -1  # the code of an image without a label


class IdTable(Sequence[str]):
    """Strings in a memory-mapped file; a slice is a list.

    Args:
        path: The strings' UTF-8, one after the other; beside it lies `path.offsets`, where each
            begins: [N + 1] int64, little-endian.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = _mapped(_offsets_of(path), np.dtype("<i8"))
        self._blob = _mapped(path, np.dtype("u1"))

    def __reduce__(self) -> tuple[Callable[[Path], IdTable], tuple[Path]]:
        return IdTable, (self._path,)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __repr__(self) -> str:
        return f"IdTable({str(self._path)!r}, {len(self):,} ids)"

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._decoded(start, max(start, stop))
            return [self[row] for row in range(start, stop, step)]
        row = _row(index, len(self))
        start, stop = self._offsets[row : row + 2].tolist()
        return str(self._blob[start:stop].tobytes(), "utf-8")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), _BLOCK):
            yield from self._decoded(start, min(start + _BLOCK, len(self)))

    def _decoded(self, start: int, stop: int) -> list[str]:
        offsets = self._offsets[start : stop + 1]
        content = self._blob[offsets[0] : offsets[-1]].tobytes()
        bounds = pairwise((offsets - offsets[0]).tolist())
        if content.isascii():  # places in bytes are places in text: decoding once is enough
            text = content.decode("ascii")
            return [text[a:b] for a, b in bounds]
        return [content[a:b].decode() for a, b in bounds]


class Categories(Sequence["str | None"]):
    """A name, or None, for each image; a slice is a list.

    Args:
        path: The codes, int32, little-endian, -1 for None; beside it lies `path.json`, a list of
            the names that they stand for.

    Attributes:
        codes: [N] int32, memory-mapped: to count or compare a million at once.
        names: [C], in the order in which they first occurred.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.codes = _mapped(path, np.dtype("<i4"))
        self.names: list[str] = read_json(_names_of(path))
        self._name_of: list[str | None] = [*self.names, None]  # code -1 is the last

    def __reduce__(self) -> tuple[Callable[[Path], Categories], tuple[Path]]:
        return Categories, (self._path,)

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        return f"Categories({str(self._path)!r}, {len(self):,} rows, {len(self.names):,} names)"

    @overload
    def __getitem__(self, index: int) -> str | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[str | None]: ...

    def __getitem__(self, index: int | slice) -> str | list[str | None] | None:
        if isinstance(index, slice):
            return [self._name_of[code] for code in self.codes[index].tolist()]
        return self._name_of[int(self.codes[_row(index, len(self))])]

    def __iter__(self) -> Iterator[str | None]:
        for start in range(0, len(self), _BLOCK):
            yield from self[start : start + _BLOCK]


class PoolIndex:
    """A table made by `write_index` and opened by `open_index`.

    Attributes:
        folder: Where it lies.
        facts: The plain data that its maker stored with it.
        ids: [N].
        labels: [N], class name or None.
        domains: [N], domain name or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._description = read_json(folder / "index.json")
        self.facts: dict[str, Any] = self._description["facts"]

    def __reduce__(self) -> tuple[Callable[[Path], PoolIndex], tuple[Path]]:
        return PoolIndex, (self.folder,)

    def __len__(self) -> int:
        return int(self._description["num_rows"])

    @cached_property
    def ids(self) -> IdTable:
        """Memory-mapped at first use."""
        return IdTable(self.folder / "ids")

    @cached_property
    def labels(self) -> Categories:
        """Memory-mapped at first use."""
        return Categories(self.folder / "labels")

    @cached_property
    def domains(self) -> Categories:
        """Memory-mapped at first use."""
        return Categories(self.folder / "domains")

    def column(self, name: str) -> npt.NDArray[np.int64]:
        """A column of integers [N], memory-mapped."""
        assert name in self._description["columns"], name
        return _mapped(_column_file(self.folder, name), np.dtype("<i8"))


class IndexWriter:
    """Takes the rows of a new table, some at a time; memory does not grow with their number.

    Attributes:
        facts: Plain data to store with the table: set it before the `with` block ends.
        num_rows: Rows so far.
    """

    def __init__(self, folder: Path, columns: Sequence[str], files: ExitStack) -> None:
        self.facts: dict[str, Any] = {}
        self.num_rows = 0

        def new(path: Path) -> BinaryIO:
            return files.enter_context(path.open("wb", buffering=1 << 20))

        self._ids, self._offsets = new(folder / "ids"), new(_offsets_of(folder / "ids"))
        self._offsets.write(np.zeros(1, "<i8").tobytes())
        self._num_bytes = 0
        self._codes = {name: new(folder / name) for name in ("labels", "domains")}
        self.code_of: dict[str, dict[str, int]] = {"labels": {}, "domains": {}}
        self._columns = {name: new(_column_file(folder, name)) for name in columns}

    def add(
        self,
        ids: Sequence[str],
        labels: Sequence[str | None] | None = None,
        domains: Sequence[str | None] | None = None,
        **columns: npt.ArrayLike,
    ) -> None:
        """Append rows: [n] ids; labels and domains [n], or None for none; each column [n].

        Raises:
            ValueError: An id is not UTF-8, as a file's name on Linux may be.
        """
        try:
            encoded = [name.encode() for name in ids]
        except UnicodeEncodeError as error:
            raise ValueError(f"name {error.object!r} is not UTF-8: rename it") from error
        assert columns.keys() == self._columns.keys(), (columns.keys(), self._columns.keys())
        ends = np.cumsum([len(name) for name in encoded], dtype="<i8") + self._num_bytes
        self._ids.write(b"".join(encoded))
        self._offsets.write(ends.astype("<i8").tobytes())
        self._num_bytes = int(ends[-1]) if len(ends) else self._num_bytes
        for name, values in (("labels", labels), ("domains", domains)):
            codes = np.full(len(ids), _UNKNOWN, "<i4")
            if values is not None:
                codes[:] = self._coded(name, values)
            self._codes[name].write(codes.tobytes())
        for name, numbers in columns.items():
            column = np.asarray(numbers).astype("<i8")
            assert column.shape == (len(ids),), (name, column.shape)
            self._columns[name].write(column.tobytes())
        self.num_rows += len(ids)

    def _coded(self, name: str, values: Sequence[str | None]) -> list[int]:
        code_of = self.code_of[name]
        return [
            _UNKNOWN if value is None else code_of.setdefault(value, len(code_of))
            for value in values
        ]


@contextmanager
def write_index(folder: Path, columns: Sequence[str] = ()) -> Iterator[IndexWriter]:
    """Make a table; it appears at `folder` whole, or, if the block raises, not at all.

    What lies there already must be no table that `open_index` takes: it is removed.

    Args:
        folder: Where to put it.
        columns: Names of the columns of integers.
    """
    with committed_folder(folder) as aside:
        with ExitStack() as files:
            writer = IndexWriter(aside, columns, files)
            yield writer
        for name, code_of in writer.code_of.items():
            # Not indented: there may be a name per image, as in a pool of people.
            text = json.dumps(list(code_of), ensure_ascii=False)
            _names_of(aside / name).write_bytes(text.encode())
        description = {
            "version": _VERSION,
            "num_rows": writer.num_rows,
            "columns": list(columns),
            "facts": writer.facts,
            "sizes": {path.name: path.stat().st_size for path in sorted(aside.iterdir())},
        }
        write_json(aside / "index.json", description)
        if open_index(folder) is None:
            shutil.rmtree(folder, ignore_errors=True)


def open_index(folder: Path) -> PoolIndex | None:
    """The table at `folder`; None if there is none, or one that is damaged or of another version.

    Damage is a file of another size than was written; the content is not read through.
    """
    try:
        description = read_json(folder / "index.json")
        if description["version"] != _VERSION:
            return None
        expected = {"ids", "ids.offsets", "labels", "labels.json", "domains", "domains.json"}
        expected |= {_column_file(folder, name).name for name in description["columns"]}
        rows, sizes = description["num_rows"], description["sizes"]
        whole = (
            sizes.keys() == expected
            and all((folder / name).stat().st_size == size for name, size in sizes.items())
            and sizes["ids.offsets"] == 8 * (rows + 1)
            and sizes["labels"] == sizes["domains"] == 4 * rows
        )
        return PoolIndex(folder) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A file as a read-only array; a plain view, as `np.memmap` is slow to index."""
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def _row(index: int, num_rows: int) -> int:
    row = int(index) + (num_rows if index < 0 else 0)
    if not 0 <= row < num_rows:
        raise IndexError(f"row {index} of {num_rows}")
    return row


def _offsets_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.offsets")


def _names_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _column_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.column"
