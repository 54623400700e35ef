"""A Hugging Face data set on disk as a pool: `hf:FOLDER?split=train`.

Three kinds of folders: what `Dataset.save_to_disk` wrote, read in place; parquet files, of which
`datasets` keeps an Arrow copy in the cache (parquet has no access by row); an `imagefolder`, whose
images stay where they are. Nothing is fetched, no script of a data set is run.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ecos_pl.columns import Column, Constant, Numbered
from ecos_pl.images import IMAGE_EXTENSIONS, PoolPart, UnreadableImage, decode_image, read_image

_OPTIONS = ("split", "image_column", "label_column", "domain_column", "id_column")


class HuggingFacePool:
    """Made by `huggingface_pool`; pickled by the paths of its memory-mapped files.

    Attributes:
        name: the folder's path.
        ids: `split/000123`, the row's number, or the values of a column.
        labels: of the label column, None where it is empty.
        domains: of the domain column, None where it is empty.
        fingerprint: see `huggingface_pool`.
        licence: under which terms the images may be used, where known.
    """

    def __init__(
        self,
        folder: Path,
        part_name: str,
        images: _ArrowColumn,
        ids: Sequence[str],
        labels: Sequence[str | None],
        domains: Sequence[str | None],
        fingerprint: str,
        licence: str | None,
    ) -> None:
        self._folder, self._part_name, self._images = folder, part_name, images
        self.name, self.licence = str(folder), licence
        self.ids, self.labels, self.domains = ids, labels, domains
        self.fingerprint = fingerprint

    @property
    def image_folder(self) -> Path | None:
        """Where its images lie, which a folder of images must not be, too."""
        return self._folder

    @property
    def rows_of(self) -> tuple[str, str]:
        """Whose rows these are, however they are read: the folder and its split."""
        return os.path.realpath(self._folder), self._part_name

    @property
    def parts(self) -> Sequence[PoolPart]:
        """The data set, under its folder's name and its split."""
        return [PoolPart(self._part_name, self.licence, 0, len(self), self.fingerprint)]

    def __len__(self) -> int:
        return len(self._images)

    def __repr__(self) -> str:
        return f"HuggingFacePool({self.name!r}, {len(self)} images)"

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        where = f"{self.name}, row {index}"
        stored = self._images[index]
        content = stored.get("bytes") if isinstance(stored, dict) else stored
        path = stored.get("path") if isinstance(stored, dict) else None
        if isinstance(content, str):  # a column of paths
            content, path = None, content
        if content is not None:
            return decode_image(content, where)
        if not path:
            raise UnreadableImage(f"cannot read image {where!r}: the row holds none")
        if "::" in path or "://" in path:
            raise UnreadableImage(f"cannot read image {where!r}: it lies elsewhere, at {path!r}")
        return read_image(self._folder / path)


def huggingface_pool(
    folder: Path, options: Mapping[str, str], *, cache_dir: Path, licence: str | None = None
) -> HuggingFacePool:
    """Open a data set that lies on disk; no image is decoded.

    The fingerprint covers options and path, size and modification time of every file of the data
    set, as an image folder's does.

    Args:
        folder: Of `save_to_disk`, with parquet files, or with images.
        options: `split` (train unless given; need not be if there is but one); `image_column` (the
            only one of images); `label_column` (the only one of classes, or one called label);
            `domain_column` (none); `id_column` with unique names (else rows are numbered).
        cache_dir: Where `datasets` keeps what it makes of parquet files and image folders.
        licence: Under which terms the images may be used, where known.

    Raises:
        ValueError: One line: the package `datasets` or the folder is missing, it holds no data set,
            or there is no such split, column or option.
    """
    for key in options:
        if key not in _OPTIONS:
            near = get_close_matches(key, _OPTIONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(_OPTIONS)}"
            raise ValueError(f"hf:{folder} has no option {key!r}: {hint}")
    folder = _existing(folder)
    kind, files = _kind_and_files(folder)
    if kind != "saved" and glob.has_magic(str(folder)):
        raise ValueError(
            f"{str(folder)!r}: `datasets` would take * ? and [ in a path for a pattern: rename it"
        )
    with _quietly():
        splits = _load(folder, kind, cache_dir)
    split = _chosen_split(folder, splits, options.get("split"))
    data = splits[split]
    if not len(data):
        raise ValueError(f"Hugging Face data set {str(folder)!r} has no rows in split {split!r}")
    columns: dict[str, str | None] = {
        "image_column": _image_column(folder, data, options.get("image_column")),
        "label_column": _label_column(folder, data, options.get("label_column")),
        "domain_column": _names_column(folder, data, options.get("domain_column")),
        "id_column": _names_column(folder, data, options.get("id_column")),
    }
    digest = hashlib.sha256(f"{split}\0{len(data)}\0{columns}\n".encode())
    for path in files:
        stat = path.stat()
        relative = path.relative_to(folder).as_posix()
        digest.update(f"{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    num, prefix = len(data), f"{split}/" if split else ""
    images, named = columns["image_column"], columns["id_column"]
    assert images is not None
    return HuggingFacePool(
        folder,
        f"{folder.name}/{split}" if split else folder.name,
        _ArrowColumn(data, images),
        _unique(folder, named, _Names(data, named)) if named else Numbered(prefix, num),
        _names_or_none(data, columns["label_column"]),
        _names_or_none(data, columns["domain_column"]),
        digest.hexdigest(),
        licence,
    )


def splits_of(folder: Path, *, cache_dir: Path) -> list[str]:
    """Names of the splits of a data set on disk; one without splits has "" alone.

    Raises:
        ValueError: One line: as `huggingface_pool` does of the folder.
    """
    folder = _existing(folder)
    kind, _ = _kind_and_files(folder)
    with _quietly():
        return list(_load(folder, kind, cache_dir))


# --- what lies there ---


def _existing(folder: Path) -> Path:
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        what = "is a file: give its folder" if folder.exists() else "does not exist"
        raise ValueError(f"Hugging Face data set {str(folder)!r} {what}")
    return folder


def _kind_and_files(folder: Path) -> tuple[str, list[Path]]:
    """`saved`, `parquet` or `imagefolder`; and all files but hidden ones, sorted."""
    files: list[Path] = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place) / name for name in names if not name.startswith(".")]
    files.sort()
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return "saved", files
    parquet = [path for path in files if path.suffix == ".parquet"]
    if any(path.name != "metadata.parquet" for path in parquet):
        return "parquet", parquet
    if any(path.suffix.lower() in IMAGE_EXTENSIONS for path in files):
        return "imagefolder", files
    raise ValueError(
        f"{str(folder)!r} holds no Hugging Face data set: looked for dataset_dict.json and "
        "state.json (from save_to_disk), *.parquet and images"
    )


def _load(folder: Path, kind: str, cache_dir: Path) -> dict[str, Any]:
    """Split name → Dataset; a data set without splits is called ""."""
    datasets = _datasets()
    try:
        if kind == "saved":
            found = datasets.load_from_disk(str(folder), keep_in_memory=False)
        else:
            found = datasets.load_dataset(
                kind,
                data_dir=str(folder),
                cache_dir=str(Path(cache_dir).absolute() / "huggingface"),
                keep_in_memory=False,
            )
    except Exception as error:  # of pyarrow, fsspec, pandas …
        inner = error.__cause__ if isinstance(error.__cause__, Exception) else error
        reason = " ".join(f"{type(inner).__name__}: {inner}".split())
        raise ValueError(
            f"cannot open {str(folder)!r} as a Hugging Face data set ({kind}): {reason}"
        ) from error
    if isinstance(found, datasets.Dataset):
        return {"": found}
    return dict(found)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "pools hf:… need the package datasets: pip install 'ecos-pl[pools]'"
        ) from error
    return datasets


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars of `datasets`, which would be left on the terminal."""
    datasets = _datasets()
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _chosen_split(folder: Path, splits: Mapping[str, Any], wanted: str | None) -> str:
    if wanted is None and len(splits) == 1:
        return next(iter(splits))
    if (wanted or "train") in splits:
        return wanted or "train"
    known = ", ".join(map(repr, splits))
    if list(splits) == [""]:
        raise ValueError(f"{str(folder)!r} has no splits: leave split={wanted} out")
    asked = f"no split {wanted!r}" if wanted else "several splits: choose one with split=…"
    raise ValueError(f"{str(folder)!r} has {asked} (it has {known})")


# --- columns ---


def _given_column(folder: Path, data: Any, wanted: str | None) -> str | None:
    if wanted is None or wanted in data.column_names:
        return wanted
    near = get_close_matches(wanted, data.column_names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(data.column_names)}"
    raise ValueError(f"{str(folder)!r} has no column {wanted!r}: {hint}")


def _image_column(folder: Path, data: Any, wanted: str | None) -> str:
    given = _given_column(folder, data, wanted)
    if given is None:
        found = [name for name, kind in data.features.items() if _is_image(kind)]
        if len(found) != 1:
            what = (
                f"several columns of images ({', '.join(found)})"
                if found
                else f"no column of images among {', '.join(data.column_names)}"
            )
            raise ValueError(f"{str(folder)!r} has {what}: choose one with image_column=…")
        return str(found[0])
    column = data.data.column(given).type
    if not _can_hold_images(column):
        raise ValueError(f"column {given!r} of {str(folder)!r} holds no images but {column}")
    return given


def _is_image(kind: Any) -> bool:
    """An Image feature, or what pandas and others make of one: a struct of bytes and path."""
    if type(kind).__name__ == "Image":
        return True
    return isinstance(kind, dict) and set(kind) == {"bytes", "path"}


def _can_hold_images(kind: Any) -> bool:
    import pyarrow.types as t

    if t.is_struct(kind):
        return {kind.field(i).name for i in range(kind.num_fields)} >= {"bytes", "path"}
    return any(
        test(kind) for test in (t.is_binary, t.is_large_binary, t.is_string, t.is_large_string)
    )


def _label_column(folder: Path, data: Any, wanted: str | None) -> str | None:
    if wanted is not None:
        return _names_column(folder, data, wanted)
    of_classes = [
        name for name, kind in data.features.items() if type(kind).__name__ == "ClassLabel"
    ]
    called_so = [name for name in ("label", "labels") if name in data.column_names]
    if len(of_classes) == 1:
        return str(of_classes[0])
    for name in called_so:
        if _is_name(data.data.column(name).type):
            return name
    return None


def _names_column(folder: Path, data: Any, wanted: str | None) -> str | None:
    given = _given_column(folder, data, wanted)
    if given is not None and not _is_name(kind := data.data.column(given).type):
        raise ValueError(f"column {given!r} of {str(folder)!r} holds no names but {kind}")
    return given


def _is_name(kind: Any) -> bool:
    import pyarrow.types as t

    if t.is_dictionary(kind):
        kind = kind.value_type
    return any(test(kind) for test in (t.is_integer, t.is_string, t.is_large_string, t.is_boolean))


class _ArrowColumn(Column[Any]):
    """A memory-mapped column as plain Python values; pickled without what it looked up."""

    def __init__(self, data: Any, column: str) -> None:
        assert data._indices is None, "rows must lie in the order of the file"
        self._data, self._name, self._num = data, column, len(data)
        self._chunks: list[Any] | None = None
        self._starts: Any = None  # [chunks] int64, first row of each

    def __len__(self) -> int:
        return self._num

    def value(self, place: int) -> Any:
        """See `Column`."""
        chunks = self._opened()
        number = int(np.searchsorted(self._starts, place, side="right")) - 1
        return chunks[number][place - int(self._starts[number])].as_py()

    def block(self, start: int, stop: int) -> list[Any]:
        """See `Column`."""
        chunks = self._opened()
        values: list[Any] = []
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start + len(values) < stop:
            first = start + len(values) - int(self._starts[number])
            values += chunks[number].slice(first, stop - start - len(values)).to_pylist()
            number += 1
        return values

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_chunks": None, "_starts": None}

    def _opened(self) -> list[Any]:
        if self._chunks is None:
            chunks = [chunk for chunk in self._data.data.column(self._name).chunks if len(chunk)]
            ends = np.cumsum([len(chunk) for chunk in chunks])
            self._starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
            self._chunks = chunks
        return self._chunks


class _Names(Column["str | None"]):
    """A column as text: class names for class numbers, None where it is empty or below 0."""

    def __init__(self, data: Any, column: str) -> None:
        self._values = _ArrowColumn(data, column)
        names = getattr(data.features[column], "names", None)
        self._names: list[str] | None = list(names) if names else None

    def __len__(self) -> int:
        return len(self._values)

    def value(self, place: int) -> str | None:
        """See `Column`."""
        return self._text(self._values.value(place))

    def block(self, start: int, stop: int) -> list[str | None]:
        """See `Column`."""
        return [self._text(value) for value in self._values.block(start, stop)]

    def _text(self, value: Any) -> str | None:
        if value is None:
            return None
        if self._names is not None:
            return self._names[value] if 0 <= value < len(self._names) else None
        return str(value)


def _names_or_none(data: Any, column: str | None) -> Sequence[str | None]:
    return _Names(data, column) if column is not None else Constant(None, len(data))


def _unique(folder: Path, column: str, names: Sequence[str | None]) -> Any:
    """The names themselves, checked; meanwhile 16 bytes of each are held, no strings."""
    hashes = np.empty(len(names), np.int64)
    for row, name in enumerate(names):
        if not name:
            raise ValueError(f"column {column!r} of {str(folder)!r} names no image in row {row}")
        hashes[row] = hash(name)
    order = np.argsort(hashes)
    same = hashes[order[1:]] == hashes[order[:-1]]
    suspects = order[np.append(same, False) | np.append(False, same)]
    seen: set[str | None] = set()
    for row in suspects.tolist():
        if (name := names[row]) in seen:
            raise ValueError(
                f"column {column!r} of {str(folder)!r} names {name!r} twice: ids must be unique"
            )
        seen.add(name)
    return names
