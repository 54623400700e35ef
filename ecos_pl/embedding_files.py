"""Files of embeddings that others made: what clip-retrieval, datacomp and plain exports look like.

Each file holds rows [n, D] and comes with n ids, in itself or in a file beside it:

    img_emb/img_emb_0.npy     metadata/metadata_0.parquet   clip-retrieval
    00000.npz (l14_img, …)    00000.parquet                 datacomp
    x.npy                     x.parquet, x.txt or x.json
    x.safetensors             the same, or a JSON list "ids" in its header
    x.parquet                 in itself: a column of lists, a column of ids
"""

from __future__ import annotations

import json
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

BLOCK_ROWS = 8192
"""Rows or ids in memory at once."""

ID_COLUMNS = ("id", "image_path", "key", "__key__", "uid", "path", "file_name", "image_id")
"""Columns that may hold ids, in the order in which they are tried."""

_ENDINGS = (".npy", ".npz", ".safetensors", ".parquet")
_ID_ENDINGS = (".parquet", ".txt", ".json")
_SAFETENSORS_TYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}


class EmbeddingFile(ABC):
    """Rows [n, D] in a file, and their ids.

    Attributes:
        path: The file.
        ids_path: Where the ids are; may be the same file.
        shape: ``(n, D)``.
    """

    shape: tuple[int, int]

    def __init__(self, path: Path, ids_path: Path | None) -> None:
        self.path, self.ids_path = path, ids_path or path

    @abstractmethod
    def blocks(self) -> Iterator[Array]:
        """All rows in order, some thousand at a time."""

    def mapped(self) -> Array | None:
        """All rows as a memory map, where the format allows it."""
        return None

    def id_columns(self) -> list[str]:
        """Columns that may hold the ids; "" where there are no columns."""
        if self.ids_path.suffix != ".parquet":
            return [""]
        with _one_line(self.ids_path), _parquet(self.ids_path) as file:
            names = file.schema_arrow.names
        found = [name for name in ID_COLUMNS if name in names]
        if not found:
            raise ValueError(
                f"{self.ids_path} has no column of ids: none of {', '.join(ID_COLUMNS)} is among "
                f"its columns {', '.join(names)}"
            )
        return found

    def ids(self, column: str) -> Iterator[list[str]]:
        """All ids in order, some thousand at a time."""
        if self.ids_path.suffix != ".parquet":
            ids = self._plain_ids()
            yield from (ids[i : i + BLOCK_ROWS] for i in range(0, len(ids), BLOCK_ROWS))
            return
        with _one_line(self.ids_path), _parquet(self.ids_path) as file:
            for batch in file.iter_batches(BLOCK_ROWS, columns=[column]):
                yield [str(value) for value in batch.column(0).to_pylist()]

    def _plain_ids(self) -> list[str]:
        with _one_line(self.ids_path):
            if self.ids_path.suffix == ".safetensors":
                header, _ = _safetensors_header(self.ids_path)
                found = json.loads(header.get("__metadata__", {}).get("ids", "null"))
                if found is None:
                    raise ValueError(f"no ids: add {self.path.stem}.txt, one id per line")
            elif self.ids_path.suffix == ".json":
                found = json.loads(self.ids_path.read_text(encoding="utf-8"))
            else:
                found = self.ids_path.read_text(encoding="utf-8").splitlines()
            if not isinstance(found, list):
                raise ValueError("the ids must be a list")
        return [str(value) for value in found]


class _Npy(EmbeddingFile):
    def __init__(self, path: Path, ids_path: Path | None) -> None:
        super().__init__(path, ids_path)
        if ids_path is None:
            raise ValueError(f"{path} comes without ids: add {path.stem}.txt, one id per line")
        self.shape = _rows_and_dims(path, self.mapped().shape)

    def mapped(self) -> Array:
        with _one_line(self.path):
            stored: Array = np.load(self.path, mmap_mode="r")
            return stored

    def blocks(self) -> Iterator[Array]:
        return _in_blocks(self.mapped())


class _Safetensors(EmbeddingFile):
    def __init__(self, path: Path, ids_path: Path | None) -> None:
        super().__init__(path, ids_path)
        with _one_line(path):
            header, self._start = _safetensors_header(path)
            if "embeddings" not in header:
                names = ", ".join(name for name in header if name != "__metadata__")
                raise ValueError(f"it has no tensor 'embeddings' (there are: {names})")
            about = header["embeddings"]
            if about["dtype"] not in _SAFETENSORS_TYPES:
                raise ValueError(f"embeddings of type {about['dtype']}")
            self._dtype, self._first = about["dtype"], about["data_offsets"][0]
            if path.stat().st_size < self._start + about["data_offsets"][1]:
                raise ValueError("the file ends early")
            self.shape = _rows_and_dims(path, tuple(about["shape"]))

    def mapped(self) -> Array | None:
        # numpy has no bfloat16.
        return None if self._dtype == "BF16" else self._map()

    def blocks(self) -> Iterator[Array]:
        for block in _in_blocks(self._map()):
            if self._dtype == "BF16":  # the upper half of a float32
                yield (block.astype(np.uint32) << 16).view(np.float32)
            else:
                yield block

    def _map(self) -> Array:
        dtype = np.dtype(_SAFETENSORS_TYPES[self._dtype])
        return np.memmap(self.path, dtype, "r", self._start + self._first, self.shape)


class _Npz(EmbeddingFile):
    def __init__(self, path: Path, ids_path: Path | None, num_dims: int) -> None:
        super().__init__(path, ids_path)
        if ids_path is None:
            raise ValueError(f"{path} comes without ids: add {path.stem}.parquet")
        with _one_line(path), zipfile.ZipFile(path) as archive:
            shapes = {}
            for name in archive.namelist():
                with archive.open(name) as file:
                    shapes[name.removesuffix(".npy")] = _npy_header(file)[0]
        images = {name: shape for name, shape in shapes.items() if _is_of_images(name)}
        fitting = [name for name, shape in images.items() if shape[1:] == (num_dims,)]
        if len(fitting) != 1:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            what = "no" if not fitting else "more than one"
            raise ValueError(
                f"{path} has {what} array of image embeddings in {num_dims} dimensions: {found}"
            )
        self._array = f"{fitting[0]}.npy"
        self.shape = _rows_and_dims(path, shapes[fitting[0]])

    def blocks(self) -> Iterator[Array]:
        with _one_line(self.path), zipfile.ZipFile(self.path).open(self._array) as file:
            _, dtype = _npy_header(file)
            left, dims = self.shape
            while left:
                rows = min(left, BLOCK_ROWS)
                content = file.read(rows * dims * dtype.itemsize)
                yield np.frombuffer(content, dtype).reshape(rows, dims)
                left -= rows


class _Parquet(EmbeddingFile):
    def __init__(self, path: Path, ids_path: Path | None) -> None:
        super().__init__(path, ids_path)
        import pyarrow.types as types

        with _one_line(path), _parquet(path) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
            lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
            columns = [
                field.name
                for field in schema
                if any(is_list(field.type) for is_list in lists)
                and types.is_floating(field.type.value_type)
                and _is_of_images(field.name)
            ]
            if len(columns) != 1:
                found = ", ".join(columns) or ", ".join(schema.names)
                what = "more than one column" if columns else "no column"
                raise ValueError(f"it has {what} of lists of numbers: {found}")
            self._column = columns[0]
            head = next(file.iter_batches(1, columns=columns), None)
        num_dims = 0 if head is None or not head.num_rows else len(head.column(0)[0])
        self.shape = _rows_and_dims(path, (num_rows, num_dims))

    def blocks(self) -> Iterator[Array]:
        with _one_line(self.path), _parquet(self.path) as file:
            done = 0
            for batch in file.iter_batches(BLOCK_ROWS, columns=[self._column]):
                lists = batch.column(0)
                values = lists.flatten().to_numpy(zero_copy_only=False)
                lengths = lists.value_lengths() if hasattr(lists, "value_lengths") else None
                if (
                    lists.null_count
                    or len(values) != len(lists) * self.shape[1]
                    or (lengths is not None and len(lengths.unique()) > 1)
                ):
                    raise ValueError(
                        f"rows {done} to {done + len(lists)} are not all of {self.shape[1]} numbers"
                    )
                done += len(lists)
                yield values.reshape(len(lists), self.shape[1])


def embedding_files(path: Path, num_dims: int) -> list[EmbeddingFile]:
    """Find the embeddings in a file or folder; only headers are read.

    Args:
        path: A file, or a folder of files as above.
        num_dims: Dimensions wanted.

    Raises:
        ValueError: There are none, one is damaged, has no ids or other dimensions.
    """
    found = [_opened(file, num_dims) for file in _embedding_paths(path)]
    for file in found:
        if file.shape[1] != num_dims:
            raise ValueError(
                f"{file.path} holds embeddings in {file.shape[1]} dimensions; the encoder gives "
                f"{num_dims}"
            )
    return found


def all_paths(path: Path) -> list[Path]:
    """The files of embeddings and of their ids, in order.

    Raises:
        ValueError: There are none.
    """
    paths = _embedding_paths(path)
    return sorted({*paths, *(ids for file in paths if (ids := _ids_path(file)) is not None)})


def _embedding_paths(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix not in _ENDINGS:
            raise ValueError(f"embeddings {path} must be one of {' '.join(_ENDINGS)} or a folder")
        return [path]
    if not path.is_dir():
        raise ValueError(f"embeddings {path} do not exist")
    folder = path / "img_emb" if (path / "img_emb").is_dir() else path
    files = sorted(file for file in folder.iterdir() if file.suffix in _ENDINGS)
    ids = {_ids_path(file) for file in files if file.suffix != ".parquet"}
    found = [file for file in files if file not in ids]
    if not found:
        raise ValueError(
            f"no embeddings in {folder}: looked for files ending in {' '.join(_ENDINGS)}"
        )
    return found


def _ids_path(path: Path) -> Path | None:
    """The file beside it that holds the ids: of the same name, or clip-retrieval's metadata."""
    if path.suffix == ".parquet":
        return None
    places = [path]
    if path.stem.startswith("img_emb_"):
        name = path.name.replace("img_emb_", "metadata_", 1)
        places += [path.with_name(name), path.parent.with_name("metadata") / name]
    candidates = [place.with_suffix(ending) for place in places for ending in _ID_ENDINGS]
    return next((file for file in candidates if file.is_file()), None)


def _opened(path: Path, num_dims: int) -> EmbeddingFile:
    ids_path = _ids_path(path)
    if path.suffix == ".npy":
        return _Npy(path, ids_path)
    if path.suffix == ".npz":
        return _Npz(path, ids_path, num_dims)
    if path.suffix == ".safetensors":
        return _Safetensors(path, ids_path)
    return _Parquet(path, ids_path)


def _in_blocks(rows: Array) -> Iterator[Array]:
    for first in range(0, len(rows), BLOCK_ROWS):
        yield np.array(rows[first : first + BLOCK_ROWS])


def _rows_and_dims(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{path} must hold rows of embeddings, not an array {list(shape)}")
    return shape[0], shape[1]


def _is_of_images(name: str) -> bool:
    return not any(word in name.lower() for word in ("txt", "text", "caption"))


def _npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, in_fortran_order, dtype = read(file)
    if in_fortran_order:
        raise ValueError("its rows are stored column by column")
    return shape, dtype


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the tensors begin, in bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("it is no safetensors file, or ends early")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, 8 + length


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            f'{path} needs pyarrow: pip install "ecos-pl[pools]" (or pip install pyarrow)'
        ) from error
    return parquet.ParquetFile(path)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Whatever a library says of a damaged file becomes one line that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        text = " ".join(str(error).split())
        if text.startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read as embeddings or ids: {text}") from error
