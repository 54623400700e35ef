"""Images that a data set packs into one file, unpacked once into an array that stays on disk.

A .mat file or an archive cannot be read image by image: it is read once, whole, and its images lie
from then on in an .npy file that all processes map into memory and share.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ecos_pl.columns import Coded, Constant, Numbered
from ecos_pl.images import PoolPart
from ecos_pl.storage import committed_folder, fingerprint_of, one_at_a_time

Arrays = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]
"""Images [N, H, W] or [N, H, W, 3], and their class numbers [N]."""

_VERSION = 1  # raise it when a reader changes a pixel, a label or their order
_CHUNK = 4096  # images copied at once


class ArrayPool:
    """Made by `array_pool`; pickled as a path.

    Attributes:
        name: What the images are called in messages.
        ids: `NAME/000123`.
        labels: Class names.
        domains: None throughout.
        fingerprint: Of name, pixels and labels: the same wherever the file lies.
    """

    def __init__(self, name: str, folder: Path, classes: Sequence[str]) -> None:
        self.name, self._path = name, folder / "images.npy"
        self._images: npt.NDArray[np.uint8] | None = None
        codes = np.load(folder / "labels.npy")
        self.ids = Numbered(f"{name}/", len(codes))
        self.labels = Coded(classes, codes)
        self.domains = Constant(None, len(codes))
        self.fingerprint: str = json.loads((folder / "facts.json").read_text())["fingerprint"]

    @property
    def parts(self) -> Sequence[PoolPart]:
        """The images, under their own name."""
        return [PoolPart(self.name, None, 0, len(self), self.fingerprint)]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"ArrayPool({self.name!r}, {len(self)} images)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}  # the mapped file would travel as a copy

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB, at its own size."""
        if self._images is None:
            self._images = np.load(self._path, mmap_mode="r")
        return Image.fromarray(np.array(self._images[index])).convert("RGB")


def array_pool(
    name: str,
    files: Sequence[Path],
    read: Callable[[], Arrays],
    classes: Sequence[str],
    *,
    cache_dir: Path,
) -> ArrayPool:
    """Unpack images, unless they are unpacked already.

    Args:
        name: Begins the ids; names part of a data set, as in "SVHN/train".
        files: What `read` reads: if one of them changes, it is read again.
        read: Reads all images and labels.
        classes: Names of the class numbers.
        cache_dir: Where the arrays are kept.

    Raises:
        ValueError: One line: no images, not 8-bit, not as many labels, or labels beyond `classes`.
    """
    facts = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    folder = cache_dir / "arrays" / fingerprint_of([_VERSION, name, list(classes), facts])[:16]
    with one_at_a_time(cache_dir / "arrays" / ".lock", f"another process unpacks {name}"):
        if not folder.is_dir():
            images, labels = read()
            _check(images, labels, len(classes))
            with committed_folder(folder) as aside:
                _write(aside, name, images, labels.astype(np.int64))
    return ArrayPool(name, folder, classes)


def _write(
    folder: Path, name: str, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]
) -> None:
    digest = hashlib.sha256(f"{name}\0{images.shape}\n".encode())
    digest.update(labels.astype("<i8").tobytes())
    kept = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, images.shape)
    for first in range(0, len(images), _CHUNK):
        chunk = np.ascontiguousarray(images[first : first + _CHUNK])
        digest.update(chunk.tobytes())
        kept[first : first + _CHUNK] = chunk
    kept.flush()
    np.save(folder / "labels.npy", labels)
    (folder / "facts.json").write_text(json.dumps({"fingerprint": digest.hexdigest()}))
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _check(images: npt.NDArray[Any], labels: npt.NDArray[Any], num_classes: int) -> None:
    is_grey = images.ndim == 3
    if images.dtype != np.uint8 or not (is_grey or (images.ndim == 4 and images.shape[3] == 3)):
        raise ValueError(f"its images are {images.dtype} {list(images.shape)}, not 8-bit pictures")
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(images):
        raise ValueError(f"it has {len(images)} images, but labels {list(labels.shape)}")
    if not len(images):
        raise ValueError("it holds no image")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"its labels go from {labels.min()} to {labels.max()}")
