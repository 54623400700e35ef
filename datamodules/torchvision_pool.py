"""A torchvision data set as a pool: `torchvision:MNIST?root=data&split=train`.

Any map-style set of single images will do. Sets that torchvision keeps in memory whole (MNIST,
CIFAR10, …) are there once in each process that reads images.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from ecos_pl.columns import Coded, Constant, Numbered
from ecos_pl.images import PoolPart, UnreadableImage, read_image, upright_rgb

_OURS = ("transform", "target_transform", "transforms", "loader", "kwargs")
_SIDES = {"train": True, "test": False}
_NUM_SAMPLED = 64
"""Images that stand for all where neither an array nor a list of files can be looked at."""


class TorchvisionPool:
    """Made by `torchvision_pool`; pickled without the data set, which is then opened again.

    Attributes:
        name: "torchvision:" and the class, its split and its other options.
        ids: `NAME/split/000123`.
        labels: class names, where known.
        domains: None throughout.
        fingerprint: see `torchvision_pool`.
        licence: under which terms the images may be used, where known.
    """

    def __init__(
        self, name: str, options: tuple[tuple[str, Any], ...], path: str, licence: str | None
    ) -> None:
        self._class, self._options, self._path, self.licence = name, options, path, licence
        data = _open(name, options)
        self._data: Any = data
        num = len(data)
        self.name = f"torchvision:{path}"
        self.ids = Numbered(f"{path}/", num)
        codes, names = _classes(data)
        self.labels = Constant(None, num) if codes is None else Coded(names, codes)
        self.domains = Constant(None, num)
        digest = hashlib.sha256(f"{path}\0{num}\n".encode())
        if codes is not None:
            digest.update(codes.astype("<i8").tobytes())
        for chunk in _content(data):
            digest.update(chunk)
        self.fingerprint = digest.hexdigest()

    @property
    def image_folder(self) -> Path | None:
        """Where its images lie, which a folder of images must not be, too; None: in archives."""
        root = dict(self._options).get("root")
        return Path(root) if self._class == "ImageFolder" and root else None

    @property
    def parts(self) -> Sequence[PoolPart]:
        """The data set, under its own name."""
        return [PoolPart(self._path, self.licence, 0, len(self), self.fingerprint)]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"TorchvisionPool({self._path!r}, {len(self)} images)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_data": None}

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        if self._data is None:  # in another process than the one that made it
            self._data = _open_once(self._class, self._options)
            if len(self._data) != len(self):
                raise ValueError(f"{self.name} has changed while it was used")
        return _read(self._data, index, self.ids[index])


def torchvision_pool(
    name: str,
    options: Mapping[str, str],
    *,
    base: Path | None = None,
    licence: str | None = None,
) -> TorchvisionPool:
    """Open a data set of torchvision's that lies on disk.

    Images are called `NAME/split/000123`. What has its images in files is read as an image folder
    is (upright, transparency on white). Labels are class names where they are known without
    reading the images; a digit of MNIST is called "3", not "3 - three".

    The fingerprint covers name, options, length and labels, and of the images: their pixels where
    torchvision holds them in memory, else path, size and modification time of each file, else
    the pixels of 64 of them.

    Args:
        name: Of the class in `torchvision.datasets`.
        options: `root`, the folder that torchvision calls so ("data" unless given); `split`, for
            sets with a choice of training and test images `train` (as is the default) or `test`;
            `download=true` to let torchvision fetch what is missing; and whatever else the class
            takes, as in `EMNIST?split=letters&train=false`.
        base: The folder that `root` is relative to; None for the present one.
        licence: Under which terms the images may be used, where known.

    Raises:
        ValueError: One line: no such data set or option, or the set is not where it was looked
            for, or does not consist of single images.
    """
    kind = _named(name)
    given = _arguments(kind, dict(options), base or Path.cwd())
    place = [kind.__name__]
    sides = {value: word for word, value in _SIDES.items()}
    for key, value in given.items():
        if key == "train":
            place.append(sides[bool(value)])
        elif key not in ("root", "download"):
            place.append(str(value) if key == "split" else f"{key}={value}")
    given.setdefault("download", False)
    if "download" not in _parameters(kind):
        del given["download"]
    path = "/".join(part.replace("/", "_") for part in place)
    return TorchvisionPool(kind.__name__, tuple(given.items()), path, licence)


def parameters_of(name: str) -> set[str]:
    """Names of what a data set's class takes, as "train" or "split".

    Raises:
        ValueError: One line: torchvision has no such data set.
    """
    return set(_parameters(_named(name)))


# --- names and options ---


def _named(name: str) -> type[Any]:
    from torchvision import datasets

    known = [
        key
        for key in datasets.__all__
        if inspect.isclass(getattr(datasets, key)) and key not in ("VisionDataset", "DatasetFolder")
    ]
    same = [key for key in known if key.lower() == name.lower()]
    if not same:
        near = get_close_matches(name.lower(), [key.lower() for key in known], n=1)
        hint = [key for key in known if key.lower() in near]
        raise ValueError(
            f"torchvision has no data set {name!r}: "
            + (f"did you mean {hint[0]!r}?" if hint else f"it has {', '.join(known)}")
        )
    kind: type[Any] = getattr(datasets, same[0])
    return kind


def _parameters(kind: type[Any]) -> dict[str, inspect.Parameter]:
    """What the class takes, where it passes on keyword arguments with those of its bases."""
    found: dict[str, inspect.Parameter] = {}
    for step in kind.__mro__:
        if "__init__" not in vars(step):
            continue
        here = inspect.signature(vars(step)["__init__"]).parameters
        found = {**found, **{key: value for key, value in here.items() if key not in found}}
        if "kwargs" not in here:
            break
    return {key: value for key, value in found.items() if key not in ("self", "args", "kwargs")}


def _arguments(kind: type[Any], options: dict[str, str], base: Path) -> dict[str, Any]:
    """Constructor arguments out of options, in the constructor's order."""
    takes = _parameters(kind)
    offered = [key for key in takes if key not in _OURS and not key.startswith("_")]
    sides = ["split"] if "train" in takes and "split" not in takes else []
    if sides and "split" in options:
        side = options.pop("split")
        if side not in _SIDES:
            raise ValueError(f"torchvision:{kind.__name__} has split=train and test, not {side!r}")
        options["train"] = str(_SIDES[side])
    if "root" in takes:
        options.setdefault("root", "data")
    if "train" in takes:
        options.setdefault("train", "true")
    for key in options:
        if key not in offered:
            near = get_close_matches(key, [*sides, *offered], n=1)
            known = ", ".join([*sides, *offered])
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {known}"
            raise ValueError(f"torchvision:{kind.__name__} has no option {key!r}: {hint}")
    for key in offered:
        if takes[key].default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"torchvision:{kind.__name__} needs a value for {key}: {key}=…")
    given: dict[str, Any] = {}
    for key in offered:
        if key in options:
            given[key] = _converted(kind, takes[key], options[key])
        elif key == "split":
            given[key] = takes[key].default  # so that it shows in the ids
    if "root" in given:
        given["root"] = os.path.abspath(base / os.path.expanduser(given["root"]))
    return given


def _converted(kind: type[Any], parameter: inspect.Parameter, text: str) -> Any:
    wanted = str(parameter.annotation)
    if "bool" in wanted or isinstance(parameter.default, bool):
        if text.lower() not in ("true", "false"):
            raise ValueError(
                f"torchvision:{kind.__name__}: {parameter.name}={text} must be true or false"
            )
        return text.lower() == "true"
    if "int" in wanted and re.fullmatch(r"-?\d+", text):
        return int(text)
    return text


# --- the data set ---


def _open(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    kind, given = _named(name), dict(options)
    if "loader" in _parameters(kind):
        given["loader"] = _load
    try:
        data = kind(**given)
    except Exception as error:  # each class raises what it likes
        raise ValueError(_not_opened(kind, given, error)) from error
    given.pop("download", None)
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or len(data) == 0:
        raise ValueError(f"torchvision:{name} holds no images")
    _check_is_of_images(name, data)
    return data


_open_once = cache(_open)
"""For pickled pools: one worker may get several copies of the same."""


def _not_opened(kind: type[Any], given: Mapping[str, Any], error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    reason = re.sub(r" ?You can use download=True to download it\.?", "", reason).rstrip(".")
    line = f"torchvision:{kind.__name__}: {reason}"
    if "root" not in given:
        return line
    line += f" (looked in {given['root']!r}, as root=… says"
    can_download = "download" in _parameters(kind) and not given.get("download")
    return line + ("; download=true fetches what is missing)" if can_download else ")")


def _check_is_of_images(name: str, data: Any) -> None:
    try:
        first = data[0]
    except Exception:  # a damaged image, which is not the set's fault
        return
    image = first[0] if isinstance(first, (tuple, list)) and first else first
    try:
        _picture(image)
    except (TypeError, ValueError) as error:
        raise ValueError(f"torchvision:{name} is no set of single images: {error}") from error


def _load(path: str | Path) -> Image.Image:
    image = read_image(Path(path))
    image.info.clear()  # it is upright now, whatever its metadata say
    return image


def _read(data: Any, index: int, identifier: str) -> Image.Image:
    try:
        item = data[index]
        return _picture(item[0] if isinstance(item, (tuple, list)) else item)
    except (MemoryError, UnreadableImage):
        raise
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UnreadableImage(f"cannot read image {identifier!r}: {reason}") from error


def _picture(image: Any) -> Image.Image:
    """Mode RGB out of what data sets return: Pillow's images, arrays [H, W(, C)], tensors."""
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if isinstance(image, Tensor):
        image = image.numpy()
        if image.ndim == 3:  # torchvision's tensors are [C, H, W]; Pillow wants channels last
            image = image.transpose(1, 2, 0)
            image = image[:, :, 0] if image.shape[2] == 1 else image
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
        raise TypeError(f"it returns {type(image).__name__}{shape}")
    return upright_rgb(Image.fromarray(image))


# --- labels and fingerprint ---


def _classes(data: Any) -> tuple[npt.NDArray[Any] | None, list[str]]:
    """Class numbers [N], below 0 where unknown, and names; None where the set lists no classes."""
    codes = next(filter(lambda found: found is not None, _listed_classes(data)), None)
    if codes is None:
        return None, []
    num = int(codes.max(initial=-1)) + 1
    names = getattr(data, "classes", None) or getattr(data, "categories", None) or []
    if len(names) < num or not isinstance(names, (list, tuple)):
        return codes, [str(number) for number in range(num)]
    return codes, [_class_name(name) for name in names]


def _listed_classes(data: Any) -> Iterator[npt.NDArray[Any] | None]:
    for attribute in ("targets", "labels", "_labels", "y"):
        yield _as_codes(getattr(data, attribute, None), len(data))
    for attribute in ("samples", "_samples"):
        listed = getattr(data, attribute, None)
        if isinstance(listed, Sequence) and all(
            isinstance(item, tuple) and len(item) == 2 for item in listed
        ):
            yield _as_codes([target for _, target in listed], len(data))


def _as_codes(listed: Any, num: int) -> npt.NDArray[Any] | None:
    if isinstance(listed, Tensor):
        listed = listed.numpy()
    if not isinstance(listed, (list, np.ndarray)) or len(listed) != num:
        return None
    if isinstance(listed, list) and not all(isinstance(item, (int, np.integer)) for item in listed):
        return None
    codes = np.asarray(listed)
    return codes if codes.ndim == 1 and codes.dtype.kind in "iu" else None


def _class_name(name: Any) -> str:
    if isinstance(name, (list, tuple)):  # ImageNet: all words for it
        return ", ".join(map(str, name))
    digit = re.fullmatch(r"(\d) - [a-z]+", str(name))  # MNIST
    return digit[1] if digit else str(name)


def _content(data: Any) -> Iterator[bytes]:
    """What tells these images from others of the same set."""
    held = getattr(data, "data", None)
    if isinstance(held, Tensor):
        held = held.numpy()
    if isinstance(held, np.ndarray) and len(held) == len(data) and held.dtype != object:
        for first in range(0, len(held), 4096):
            yield held[first : first + 4096].tobytes()
        return
    paths = _files(data)
    if paths is not None:
        root = Path(data.root)
        for path in paths:
            stat = os.stat(path)
            relative = os.path.relpath(path, root)
            yield f"{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode()
        return
    for index in sorted({*np.linspace(0, len(data) - 1, _NUM_SAMPLED).astype(int).tolist()}):
        try:
            image = _read(data, index, str(index))
        except UnreadableImage:
            continue
        yield f"{index} {image.size}\n".encode()
        yield image.tobytes()


def _files(data: Any) -> list[str] | None:
    """The files of the images, where the set lists them."""
    for attribute in ("samples", "_samples", "_image_files", "_images", "images"):
        listed = getattr(data, attribute, None)
        if not isinstance(listed, list) or len(listed) != len(data):
            continue
        paths = [item[0] if isinstance(item, tuple) else item for item in listed]
        if all(isinstance(path, (str, Path)) and os.path.isfile(path) for path in paths):
            return [str(path) for path in paths]
    return None
