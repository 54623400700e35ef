"""Readers of the files that SVHN, SynthDigits, MNIST-M and FedBN's digits come in.

Each returns images [N, H, W] or [N, H, W, 3] uint8 and class numbers [N]. What is wrong with a file
is raised as whatever the decoder raises: `digits5` makes one line of it.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from datamodules.array_pickle import load_arrays
from datamodules.array_pool import Arrays
from ecos_pl.images import decode_image, read_image


def read_mat(path: Path) -> Arrays:
    """SVHN's format ("Format 2: Cropped Digits"), which SynthDigits has too.

    `X` is [32, 32, 3, N]; `y` is [N, 1], where 10 may stand for the digit 0.
    """
    from scipy.io import loadmat

    content = loadmat(path, variable_names=("X", "y"))
    if missing := {"X", "y"} - set(content):
        raise ValueError(f"it has no {' and no '.join(sorted(missing))}")
    images, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    if images.ndim != 4:
        raise ValueError(f"X is {list(images.shape)}, not [32, 32, 3, N]")
    return images.transpose(3, 0, 1, 2), np.where(labels == 10, 0, labels)


def read_mnist_m_folder(images: Path, labels: Path) -> Arrays:
    """MNIST-M as its authors pack it: a folder of PNG files and a text of `FILE LABEL` lines."""
    listed = _listed(labels.read_text(encoding="ascii"))
    there = {path.name for path in images.iterdir() if path.suffix == ".png"}
    _check_complete(listed, there, labels.name)
    return _stacked(np.asarray(read_image(images / name)) for name in listed), _codes(listed)


def read_mnist_m_tar(path: Path, split: str) -> Arrays:
    """The same, still in the archive, which is read from begin to end; nothing is unpacked."""
    wanted, text, found = f"mnist_m_{split}", None, {}
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            place = PurePosixPath(member.name)
            if not member.isfile() or place.name.startswith("."):
                continue
            if place.name == f"{wanted}_labels.txt":
                text = _content(archive, member).decode("ascii")
            elif place.parent.name == wanted and place.suffix == ".png":
                image = decode_image(_content(archive, member), member.name)
                found[place.name] = np.asarray(image)
    if text is None:
        raise ValueError(f"it has no {wanted}_labels.txt")
    listed = _listed(text)
    _check_complete(listed, set(found), f"{wanted}_labels.txt")
    return _stacked(found[name] for name in listed), _codes(listed)


def partitions_in(folder: Path) -> list[Path]:
    """FedBN's `partitions/train_part0.pkl`, `train_part1.pkl`, … in the order of their numbers.

    Raises:
        ValueError: There is none, or a number is left out.
    """
    paths = list((folder / "partitions").glob("train_part*.pkl"))
    expected = [folder / "partitions" / f"train_part{k}.pkl" for k in range(max(1, len(paths)))]
    if missing := [path.name for path in expected if path not in paths]:
        raise ValueError(f"partitions/{missing[0]} is missing")
    return expected


def read_pickles(paths: Sequence[Path]) -> Arrays:
    """FedBN's files: a pair of arrays each, images [n, H, W(, C)] and labels [n] or [n, 1]."""
    images, labels = [], []
    for path in paths:
        pair = load_arrays(path)
        if not (
            isinstance(pair, (tuple, list))
            and len(pair) == 2
            and all(isinstance(array, np.ndarray) and array.dtype != object for array in pair)
        ):
            raise ValueError(f"{path.name} is no pair of arrays, images and labels")
        images.append(pair[0][..., 0] if pair[0].shape[3:] == (1,) else pair[0])
        labels.append(pair[1].reshape(-1).astype(np.int64))
    return np.concatenate(images), np.concatenate(labels)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, "it is a file"
    return file.read()


def _listed(text: str) -> dict[str, int]:
    """Class number of each file, in the order listed."""
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"(\S+)\s+(\d)", line.strip())
        if match is not None:
            found[match[1]] = int(match[2])
        elif line.strip():
            raise ValueError(f"line {number} of the labels is no FILE LABEL: {line.strip()[:40]!r}")
    return found


def _check_complete(listed: Mapping[str, int], there: set[str], where: str) -> None:
    missing = [name for name in listed if name not in there]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(listed)} images listed in {where} are missing, as {missing[0]}"
        )
    if unlisted := sorted(there.difference(listed)):
        raise ValueError(f"{where} lacks {len(unlisted)} of the images there, as {unlisted[0]}")


def _stacked(images: Iterator[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    stack = list(images)
    sizes = sorted({image.shape for image in stack})
    if len(sizes) > 1:
        raise ValueError(f"its images have several sizes, as {sizes[0]} and {sizes[1]}")
    return np.stack(stack) if stack else np.empty((0, 1, 1), np.uint8)


def _codes(listed: Mapping[str, int]) -> npt.NDArray[np.int64]:
    return np.array(list(listed.values()), np.int64)
