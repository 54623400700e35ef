"""Images of the pool and of the client: sources to read them from, and their way to a tensor.

Used by both parties, so it knows nothing of Lightning or of any particular data set. A source is
cheap to pickle into DataLoader workers and holds no image in memory.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IMAGE_EXTENSIONS = (
    *(".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"),
)
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation → what turns the stored picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """An image that cannot be decoded; the message is one line and names the file."""


class ImageSource(Protocol):
    """An ordered, read-only collection of images; `len(ids)` of them.

    `labels` and `domains` are what the collection itself knows (None where it does not): a public
    labeler may use them, and evaluation in simulation does; selection never looks.
    """

    @property
    def name(self) -> str:
        """What to call the collection in messages: "mixed_digits/pool", a folder's path."""

    @property
    def ids(self) -> Sequence[str]:
        """Stable, unique names: relative POSIX paths."""

    @property
    def labels(self) -> Sequence[str | None]:
        """Class name per image, where known."""

    @property
    def domains(self) -> Sequence[str | None]:
        """Domain name per image, where known."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what determines ids and content."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""


def read_image(path: Path) -> Image.Image:
    """Decode an image file into mode RGB, upright, the first frame of several.

    Transparent pixels are shown on white: pictures with an alpha channel are mostly icons, clip
    art and scans, drawn dark for a white page, and would vanish on black. Grey levels of 16 bits
    are divided by 257, so that black and white stay what they are (Pillow's own conversion clips
    at 255); see `_to_8_bits` for 32-bit integers and floats.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, no image, or so large
            (`PIL.Image.MAX_IMAGE_PIXELS`, doubled) that it could be a decompression bomb.
    """
    try:
        with Image.open(path) as image:
            image.load()
            if 0 in image.size:
                raise ValueError("it has no pixels")
            turn = _UPRIGHT.get(_orientation(image))
            rgb = _to_rgb(image)
            return rgb if turn is None else rgb.transpose(turn)
    except MemoryError:  # says something about this machine, not about the file
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        reason = "the file is empty" if _is_empty(path) else _reason(error)
        raise UnreadableImage(f"cannot read image {str(path)!r}: {reason}") from error


def to_tensor(image: Image.Image, image_size: int) -> Tensor:
    """Resize an RGB image's shorter side to `image_size`, cut out the centre.

    Bicubic with antialiasing, at the places of torchvision's `resize` and `center_crop`, but only
    for the pixels that stay: faster, and a 1 × 100,000 strip needs no more memory than a square.
    Equal to torchvision up to rounding between Pillow's two passes.

    Returns:
        uint8 tensor [3, image_size, image_size], contiguous, values 0..255.
    """
    assert image.mode == "RGB", image.mode
    width, height = image.size
    short = min(width, height)
    # The size torchvision would give the whole picture, and its crop traced back into this one.
    resized_width = int(image_size * width / short)
    resized_height = int(image_size * height / short)
    left = round((resized_width - image_size) / 2) * width / resized_width
    top = round((resized_height - image_size) / 2) * height / resized_height
    right = min(left + image_size * width / resized_width, width)
    bottom = min(top + image_size * height / resized_height, height)
    square = image.resize(
        (image_size, image_size), Image.Resampling.BICUBIC, box=(left, top, right, bottom)
    )
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


class SomeImages:
    """Some images of a source, in a given order, as a source of their own.

    Args:
        source: Where they are.
        indices: [n] int64, their places there.
    """

    def __init__(self, source: ImageSource, indices: npt.NDArray[np.int64]) -> None:
        self._source, self._indices = source, indices
        rows = indices.tolist()
        self.name = f"{len(rows)} images of {source.name}"
        self.ids = [source.ids[row] for row in rows]
        self.labels = [source.labels[row] for row in rows]
        self.domains = [source.domains[row] for row in rows]
        digest = hashlib.sha256(indices.astype("<i8").tobytes())
        digest.update(source.fingerprint.encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        return self._source.read(int(self._indices[index]))


@dataclass(frozen=True)
class FolderSource:
    """The images below a folder; made by `scan_folder`.

    Attributes:
        root: the folder, absolute.
        ids: paths relative to `root`, POSIX, sorted.
        labels: name of each image's parent folder; None for images directly in `root`.
        domains: name of the folder above that; None where it would be `root`.
        fingerprint: see `scan_folder`.
    """

    root: Path
    ids: Sequence[str]
    labels: Sequence[str | None]
    domains: Sequence[str | None]
    fingerprint: str

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.root)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:  # the generated one would print every id
        return f"FolderSource({self.name!r}, {len(self)} images)"

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        return read_image(self.root / self.ids[index])


def scan_folder(root: Path) -> FolderSource:
    """List the images below `root`: `domain/class/x.png`, `class/x.png` or `x.png`.

    In a deeper tree the last two folders count. Hidden files and folders are left out, links to
    folders are followed unless they lead back up. The fingerprint covers path, size and
    modification time of each file: hashing the contents would read the whole pool, hours on
    network storage, before any work begins. The price is that a copy which does not keep times
    (`cp` without `-p`) counts as another pool.

    Raises:
        ValueError: no such folder, no image in it, or a name that is not UTF-8.
    """
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"image folder {str(root)!r} {what}: give a folder with images in it")
    found = sorted(_walk(str(root), "", frozenset()))
    if not found:
        known = " ".join(IMAGE_EXTENSIONS)
        raise ValueError(f"no images below {str(root)!r}: looked for files ending in {known}")
    digest = hashlib.sha256()
    labels: list[str | None] = []
    domains: list[str | None] = []
    for relative, size, mtime_ns in found:
        try:
            digest.update(f"{relative}\0{size}\0{mtime_ns}\n".encode())
        except UnicodeEncodeError as error:
            raise ValueError(
                f"file name {relative!r} below {str(root)!r} is not UTF-8: rename it"
            ) from error
        folders = relative.split("/")[-3:-1]
        labels.append(folders[-1] if folders else None)
        domains.append(folders[0] if len(folders) == 2 else None)
    ids = [relative for relative, _, _ in found]
    return FolderSource(root, ids, labels, domains, digest.hexdigest())


def _walk(
    folder: str, prefix: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, int, int]]:
    """Yield (relative path, bytes, modification time in ns) of the images below `folder`."""
    try:
        here = os.stat(folder)
        identity = (here.st_dev, here.st_ino)
        if identity in above:  # a link back up
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or _is_dead_link(entry):
                    continue
                if entry.is_dir():
                    yield from _walk(entry.path, f"{prefix}{entry.name}/", above | {identity})
                elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file():
                    stat = entry.stat()
                    yield prefix + entry.name, stat.st_size, stat.st_mtime_ns
    except OSError as error:
        raise ValueError(f"cannot list {error.filename or folder!r}: {error.strerror}") from error


def _is_dead_link(entry: os.DirEntry[str]) -> bool:
    """A link to nothing, or to itself (on which `entry.is_dir()` raises)."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # damaged metadata does not make the picture unreadable
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()  # a plain image, without the file handle
    if image.mode == "F" or image.mode.startswith("I"):  # I, I;16, I;16B …
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = _straight_alpha(image).convert("RGBA")
        page = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(page, rgba).convert("RGB")
    return image.convert("RGB")


def _straight_alpha(image: Image.Image) -> Image.Image:
    """Undo premultiplied alpha, which Pillow converts only to its own straight counterpart."""
    return image.convert("LA") if image.mode == "La" else image


def _to_8_bits(values: "np.ndarray[Any, Any]") -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Grey levels in more than 8 bits → uint8.

    Integers within 0..65535 are taken as 16-bit levels, floats within 0..1 as shares of white,
    floats within 0..255 as 8-bit levels. Whatever exceeds that has no known white: its own range
    is stretched over 0..255. Values that are not finite become 0.
    """
    levels = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(levels.min()), float(levels.max())
    is_float = values.dtype.kind == "f"
    if low >= 0 and high <= (1 if is_float else 65535):
        levels = levels * 255 if is_float else levels / 257
    elif not (is_float and low >= 0 and high <= 255):
        levels = (levels - low) * (255 / max(high - low, 1e-300))
    rounded: np.ndarray[Any, np.dtype[np.uint8]] = np.round(levels).astype(np.uint8)
    return rounded


def _is_empty(path: Path) -> bool:
    try:
        return os.path.getsize(path) == 0
    except OSError:
        return False


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of a kind Pillow does not know"
    return " ".join(f"{type(error).__name__}: {error}".split())
