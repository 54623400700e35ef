"""ImageNet-32: ImageNet's 1,281,167 training images at 32×32, as the client's public pool.

The official ten files of https://image-net.org/download-images ("Downsampled"; Chrabaszcz,
Loshchilov, Hutter, arXiv 1707.08819), in either packaging:

    train_data_batch_1.npz … train_data_batch_10.npz    Imagenet32_train_npz.zip
    train_data_batch_1     … train_data_batch_10        Imagenet32_train.zip: Python pickles

Each holds `data` [n, 3072] uint8 (red, green and blue planes) and `labels` [n], 1…1000 in the order
of ImageNet's map_clsloc.txt. The pixels, 3.9 GB, are never in memory: they are memory-mapped, in
place where the .npz is stored uncompressed, else from a copy in the cache that is made once (one
file at a time: a pickle takes 400 MB of memory while it is copied, 1 GB if of protocol 2).
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from datamodules.array_pickle import load_or_advise
from datamodules.listed_images import damaged, text_lines
from ecos_pl.columns import Coded, Constant, Joined, Numbered
from ecos_pl.images import PoolPart
from ecos_pl.storage import (
    committed_folder,
    fingerprint_of,
    one_at_a_time,
    read_json,
    write_json,
)

log = logging.getLogger(__name__)

LICENCE = "ImageNet terms of access (non-commercial research)"
NUM_FILES = 10
ADVICE = (
    "register at https://image-net.org/download-images, get Imagenet32_train_npz.zip and unzip it "
    "there"
)
_SIDE = 32
_ROW = 3 * _SIDE * _SIDE  # bytes of an image
_NUM_CLASSES = 1000
_LOCAL_HEADER = 30  # bytes of a zip member's own header before its name


@dataclass(frozen=True)
class _Batch:
    """The pixels of one of the files.

    Attributes:
        path: Of the file that they lie in.
        offset: Of their first byte there.
        num: Images.
        checksum: CRC-32 of the array as `.npy`, whatever it is packed in.
    """

    path: Path
    offset: int
    num: int
    checksum: int


class ImageNet32:
    """Made by `imagenet32`; pickled without its memory maps. A `PoolSource`.

    Attributes:
        ids: `1/000123`: the file's number and the row in it.
        labels: ImageNet's own classes, see `imagenet32`.
        domains: None throughout.
        fingerprint: of the checksums and labels, whatever the packaging.
    """

    def __init__(
        self, batches: Sequence[_Batch], codes: npt.NDArray[np.int16], classes: Sequence[str]
    ) -> None:
        self.name, self.licence = "imagenet32", LICENCE
        self._batches = list(batches)
        self._starts = np.cumsum([0, *(batch.num for batch in batches)])
        self._maps: dict[int, npt.NDArray[np.uint8]] = {}
        self.ids: Sequence[str] = Joined(
            [Numbered(f"{number}/", batch.num) for number, batch in enumerate(batches, 1)]
        )
        self.labels: Sequence[str | None] = Coded(classes, codes)
        self.domains: Sequence[str | None] = Constant(None, len(codes))
        digest = hashlib.sha256(codes.astype("<i2").tobytes())
        digest.update(fingerprint_of([[b.num, b.checksum] for b in batches]).encode())
        self.fingerprint = digest.hexdigest()

    @property
    def parts(self) -> Sequence[PoolPart]:
        """The data set, under its own name."""
        return [PoolPart(self.name, self.licence, 0, len(self), self.fingerprint)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"ImageNet32({len(self)} images in {len(self._batches)} files)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB, 32×32."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        planes = self._map(number)[index - int(self._starts[number])].reshape(3, _SIDE, _SIDE)
        return Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0)))

    def _map(self, number: int) -> npt.NDArray[np.uint8]:
        if number not in self._maps:
            batch = self._batches[number]
            self._maps[number] = np.memmap(
                batch.path, np.uint8, "r", offset=batch.offset, shape=(batch.num, _ROW)
            )
        return self._maps[number]


def imagenet32(
    root: Path, *, cache_dir: Path, allow_pickle: bool = False, num_files: int = NUM_FILES
) -> ImageNet32:
    """Open the training images of ImageNet-32.

    Their labels are ImageNet's classes, which are no other data set's: "class 0001" to "class
    1000", or, where ImageNet's map_clsloc.txt lies beside the files, "n02119789 kit_fox". Both are
    made so that they match no class of a client by accident.

    Args:
        root: Folder with the files.
        cache_dir: Where compressed pixels are unpacked to.
        allow_pickle: Read the pickled packaging too (see `array_pickle.py`).
        num_files: The first so many of the ten files; an eleventh does not exist.

    Raises:
        ValueError: One line: a file is missing, damaged or holds something else.
    """
    batches, labels = [], []
    for path in _files(root, allow_pickle, num_files):
        if path.suffix == ".npz":
            batch, codes = _of_npz(path, cache_dir)
        else:
            batch, codes = _of_pickle(path, cache_dir)
        _check_labels(path, batch, codes)
        batches.append(batch)
        labels.append(codes.astype(np.int16) - 1)
    return ImageNet32(batches, np.concatenate(labels), _class_names(root / "map_clsloc.txt"))


def _files(root: Path, allow_pickle: bool, num_files: int) -> list[Path]:
    if not root.is_dir():
        raise ValueError(f"ImageNet-32 is missing: looked for the folder {str(root)!r}; {ADVICE}")
    names = [f"train_data_batch_{number}" for number in range(1, num_files + 1)]
    zipped = [root / f"{name}.npz" for name in names]
    pickled = [root / name for name in names]
    there = [path for path in zipped if path.is_file()]
    if len(there) == num_files:
        return zipped
    if not there and any(path.is_file() for path in pickled):
        if not allow_pickle:
            raise ValueError(
                f"ImageNet-32 in {str(root)!r} is packed as pickles, which can hold programs: get "
                "the .npz packaging, or add data.allow_pickle=true to read arrays and text out of "
                "them and nothing else"
            )
        there, zipped = [path for path in pickled if path.is_file()], pickled
        if len(there) == num_files:
            return pickled
    missing = [path.name for path in zipped if path not in there]
    raise ValueError(
        f"ImageNet-32 is not whole: {len(missing)} of {num_files} files are missing in "
        f"{str(root)!r}, {missing[0]} to begin with; {ADVICE}"
    )


# --- the .npz packaging ---


def _of_npz(path: Path, cache_dir: Path) -> tuple[_Batch, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            member = archive.getinfo("data.npy")
            with archive.open("labels.npy") as labels:
                codes = np.lib.format.read_array(labels, allow_pickle=False)
            if member.compress_type == zipfile.ZIP_STORED:
                file.seek(_start_of(file, member))
                batch = _mapped(path, file, member.CRC)
            else:
                unpacked = _unpacked(path, archive, member, cache_dir)
                with unpacked.open("rb") as copy:
                    batch = _mapped(unpacked, copy, member.CRC)
            size = batch.path.stat().st_size
            if batch.offset + batch.num * _ROW > size:
                raise ValueError(f"its pixels end after {size} bytes")
            return batch, codes
    except (OSError, EOFError, KeyError, ValueError, struct.error, zipfile.BadZipFile) as error:
        raise ValueError(_broken(path, error)) from error


def _start_of(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin (PKWARE's APPNOTE, section 4.3.7)."""
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER)
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return int(member.header_offset + _LOCAL_HEADER + name_length + extra_length)


def _mapped(path: Path, file: BinaryIO, checksum: int) -> _Batch:
    """Where the pixels lie in a file that stands at the beginning of an array as `.npy`."""
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, fortran_order, dtype = read_header(file)
    if len(shape) != 2 or shape[1] != _ROW or dtype != np.uint8 or fortran_order:
        raise ValueError(f"data is {dtype} {shape}, not uint8 (images, {_ROW})")
    return _Batch(path, file.tell(), shape[0], checksum)


def _unpacked(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, cache_dir: Path
) -> Path:
    """The member as a file in the cache; zipfile compares its checksum."""
    kept = _kept(path, cache_dir)
    with _one_process(kept):
        if not kept.is_dir():
            log.info("ImageNet-32: unpacking %s to %s", path.name, kept)
            with (
                committed_folder(kept) as aside,
                archive.open(member) as packed,
                (aside / "data.npy").open("wb") as copy,
            ):
                shutil.copyfileobj(packed, copy, 1 << 20)
    return kept / "data.npy"


def _kept(path: Path, cache_dir: Path) -> Path:
    stat = path.stat()
    key = fingerprint_of([str(path.absolute()), stat.st_size, stat.st_mtime_ns])[:16]
    return cache_dir / "imagenet32" / f"{path.stem}-{key}"


def _one_process(kept: Path) -> AbstractContextManager[None]:
    """Of several on one machine, one fills the cache and the others wait."""
    return one_at_a_time(kept.with_name(f"{kept.name}.lock"), "ImageNet-32 is being unpacked")


# --- the pickled packaging ---


def _of_pickle(path: Path, cache_dir: Path) -> tuple[_Batch, npt.NDArray[Any]]:
    kept = _kept(path, cache_dir)
    with _one_process(kept):
        if not kept.is_dir():
            pixels, codes = _unpickled(path)
            log.info("ImageNet-32: copying %s to %s", path.name, kept)
            with committed_folder(kept) as aside:
                np.save(aside / "data.npy", np.ascontiguousarray(pixels))
                np.save(aside / "labels.npy", codes, allow_pickle=False)
                write_json(aside / "facts.json", {"checksum": _crc32(aside / "data.npy")})
    with (kept / "data.npy").open("rb") as file:
        batch = _mapped(kept / "data.npy", file, read_json(kept / "facts.json")["checksum"])
    return batch, np.load(kept / "labels.npy", allow_pickle=False)


def _unpickled(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    found = load_or_advise(path, advice=ADVICE)
    if not isinstance(found, Mapping) or not {"data", "labels"} <= found.keys():
        raise ValueError(_broken(path, "it is no dictionary of data and labels"))
    pixels, codes = np.asarray(found["data"]), np.asarray(found["labels"])
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (_ROW,):
        problem = f"data is {pixels.dtype} {pixels.shape}, not uint8 (images, {_ROW})"
        raise ValueError(_broken(path, problem))
    return pixels, codes


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum


# --- labels ---


def _check_labels(path: Path, batch: _Batch, codes: npt.NDArray[Any]) -> None:
    if codes.shape != (batch.num,) or codes.dtype.kind not in "iu":
        problem = f"labels are {codes.dtype} {codes.shape} for {batch.num:,} images"
    elif batch.num == 0 or codes.min() < 1 or codes.max() > _NUM_CLASSES:
        problem = f"labels are not 1 to {_NUM_CLASSES}" if batch.num else "it holds no images"
    else:
        return
    raise ValueError(_broken(path, problem))


def _class_names(path: Path) -> list[str]:
    if not path.exists():
        return [f"class {number:04d}" for number in range(1, _NUM_CLASSES + 1)]
    names: dict[int, str] = {}
    for number, line in enumerate(text_lines(path, "ImageNet's map_clsloc.txt", ADVICE), 1):
        fields = line.split()
        if len(fields) != 3 or not fields[1].isdigit():
            raise damaged(path, number, line, "a WordNet id, a number and a word", ADVICE)
        names[int(fields[1])] = f"{fields[0]} {fields[2]}"
    if set(names) != set(range(1, _NUM_CLASSES + 1)):
        raise ValueError(f"{str(path)!r} does not name the classes 1 to {_NUM_CLASSES}: {ADVICE}")
    return [names[number] for number in sorted(names)]


def _broken(path: Path, error: Exception | str) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{str(path)!r} is damaged or half-downloaded ({reason}); {ADVICE}"
