"""Images of the pool and of the client: sources to read them from, and their way to a tensor.

Used by both parties, so it knows nothing of Lightning or of any particular data set. A source is
cheap to pickle into DataLoader workers and holds no image in memory.
"""

import hashlib
import io
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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


@dataclass(frozen=True)
class PoolPart:
    """A run of a pool's images that come from one place, under one licence.

    Attributes:
        name: What to call it in the manifest of a proxy set; no path of this machine.
        licence: Under which terms its images may be used; None where nobody said.
        start: Its first image's place in the pool.
        stop: The place after its last image.
        fingerprint: Of the collection that the images come from.
        prefix: What the pool puts before the ids that its images have there, as in "web/".
    """

    name: str
    licence: str | None
    start: int
    stop: int
    fingerprint: str
    prefix: str = ""


class PoolSource(ImageSource, Protocol):
    """A public collection: it also says what it is made of."""

    @property
    def parts(self) -> Sequence[PoolPart]:
        """Where its images come from: in order, from the first image to the last, no gaps."""


def read_image(path: Path) -> Image.Image:
    """Decode an image file into mode RGB, upright, the first frame of several: `upright_rgb`.

    Raises:
        UnreadableImage: the file is missing, empty, truncated, no image, or so large
            (`PIL.Image.MAX_IMAGE_PIXELS`, doubled) that it could be a decompression bomb.
    """
    return _decode(path, str(path), is_empty=lambda: _is_empty(path))


def decode_image(content: bytes, name: str) -> Image.Image:
    """As `read_image`, for the bytes of a file; `name` is what error messages call it."""
    return _decode(io.BytesIO(content), name, is_empty=lambda: not content)


def _decode(file: Path | io.BytesIO, name: str, is_empty: Callable[[], bool]) -> Image.Image:
    try:
        with Image.open(file) as image:
            return upright_rgb(image)
    except MemoryError:  # says something about this machine, not about the file
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        reason = "the file is empty" if is_empty() else _reason(error)
        raise UnreadableImage(f"cannot read image {name!r}: {reason}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any picture of Pillow's in mode RGB, upright, the first frame of several.

    Transparent pixels are shown on white: pictures with an alpha channel are mostly icons, clip
    art and scans, drawn dark for a white page, and would vanish on black. Grey levels of 16 bits
    are divided by 257, so that black and white stay what they are (Pillow's own conversion clips
    at 255); see `_to_8_bits` for 32-bit integers and floats.
    """
    image.load()
    if 0 in image.size:
        raise ValueError("it has no pixels")
    turn = _UPRIGHT.get(_orientation(image))
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


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
        licence: under which terms the images may be used, where known.
    """

    root: Path
    ids: Sequence[str]
    labels: Sequence[str | None]
    domains: Sequence[str | None]
    fingerprint: str
    licence: str | None = None

    @property
    def name(self) -> str:
        """The folder's path."""
        return str(self.root)

    @property
    def parts(self) -> Sequence[PoolPart]:
        """The folder, under its own name."""
        return [PoolPart(self.root.name, self.licence, 0, len(self), self.fingerprint)]

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
    root = existing_folder(root)
    digest = hashlib.sha256()
    ids: list[str] = []
    labels: list[str | None] = []
    domains: list[str | None] = []
    for prefix, files in _walk(str(root), "", frozenset()):
        digest.update(facts_of_files(prefix, files))
        label, domain = class_and_domain(prefix)
        ids += [prefix + file.name for file in files]
        labels += [label] * len(files)
        domains += [domain] * len(files)
    if not ids:
        raise no_images(root)
    return FolderSource(root, ids, labels, domains, digest.hexdigest())


class ImageFile(NamedTuple):
    """An image file in a folder: its name, bytes, and modification time in nanoseconds."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class FolderEntries:
    """What directly lies in a folder, as far as pools go.

    Attributes:
        identity: Tells the folder from every other one on this machine, however it is reached.
        mtime_ns: When an entry last came, went or changed its name.
        files: The images.
        folders: Names of the folders to go on with.
        has_dead_links: A link leads nowhere: it may come alive while `mtime_ns` stays.
    """

    identity: tuple[int, int]
    mtime_ns: int
    files: list[ImageFile]
    folders: list[str]
    has_dead_links: bool

    def in_order(self) -> Iterator[list[ImageFile] | str]:
        """Runs of files, and folders' names, such that going down at a folder sorts all paths.

        A folder stands where its name with the slash does: `a.png` < `a/x.png` < `a0.png`.
        """
        files, start = sorted(self.files), 0
        for name in sorted(self.folders, key=lambda name: f"{name}/"):
            end = bisect_left(files, (f"{name}/",))
            if end > start:
                yield files[start:end]
            yield name
            start = end
        if start < len(files):
            yield files[start:]


def list_folder(folder: str) -> FolderEntries:
    """The images and folders directly in a folder; hidden ones are left out.

    Raises:
        ValueError: It cannot be listed.
    """
    files: list[ImageFile] = []
    folders: list[str] = []
    has_dead_links = False
    try:
        here = os.stat(folder)  # before its entries: a change in between shows at the next look
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_dead_link(entry):
                    has_dead_links = True
                elif entry.is_dir():
                    folders.append(entry.name)
                elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and entry.is_file():
                    stat = entry.stat()
                    files.append(ImageFile(entry.name, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        raise ValueError(f"cannot list {error.filename or folder!r}: {error.strerror}") from error
    return FolderEntries(
        (here.st_dev, here.st_ino), here.st_mtime_ns, files, folders, has_dead_links
    )


def existing_folder(root: Path) -> Path:
    """The absolute path of a folder of images, or a ValueError that says what is wrong with it."""
    root = Path(os.path.abspath(root))
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"image folder {str(root)!r} {what}: give a folder with images in it")
    return root


def no_images(root: Path) -> ValueError:
    """What to raise about a folder without images."""
    known = " ".join(IMAGE_EXTENSIONS)
    return ValueError(f"no images below {str(root)!r}: looked for files ending in {known}")


def facts_of_files(prefix: str, files: Sequence[ImageFile]) -> bytes:
    """What a pool's fingerprint takes up of files in one folder, in the order of the paths."""
    try:
        return "".join(f"{prefix}{name}\0{size}\0{time}\n" for name, size, time in files).encode()
    except UnicodeEncodeError as error:
        name = next(prefix + file.name for file in files if not _is_utf_8(prefix + file.name))
        raise ValueError(f"file name {name!r} is not UTF-8: rename it") from error


def _is_utf_8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def class_and_domain(prefix: str) -> tuple[str | None, str | None]:
    """Names of a folder and of the one above, where there are any.

    >>> class_and_domain("photo/cat/"), class_and_domain("cat/"), class_and_domain("")
    (('cat', 'photo'), ('cat', None), (None, None))
    """
    folders = prefix.split("/")[-3:-1]
    return folders[-1] if folders else None, folders[0] if len(folders) == 2 else None


def _walk(
    folder: str, prefix: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, list[ImageFile]]]:
    """Yield runs of images below `folder`, each with its folder's path, in the paths' order."""
    here = list_folder(folder)
    if here.identity in above:  # a link back up
        return
    for entry in here.in_order():
        if isinstance(entry, str):
            below = f"{prefix}{entry}/"
            yield from _walk(os.path.join(folder, entry), below, above | {here.identity})
        else:
            yield prefix, entry


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
