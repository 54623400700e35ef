"""Miniatures of the five digit sets, in the formats that their authors and FedBN publish."""

from __future__ import annotations

import bz2
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from tests.test_torchvision_pool import make_mnist

NUM = {"train": 30, "test": 20}


def pictures(num, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def make_mat(path: Path, num: int, seed: int = 0, ten_is_zero: bool = True) -> None:
    """SVHN's cropped digits (ufldl.stanford.edu/housenumbers, "Format 2")."""
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = np.arange(num) % 10
    if ten_is_zero:
        labels = np.where(labels == 0, 10, labels)
    images = pictures(num, 32, 32, 3, seed=seed).transpose(1, 2, 3, 0)
    content = {"X": images, "y": labels[:, None].astype(np.uint8)}
    scipy.io.savemat(path, content, do_compression=True)


def make_svhn(root: Path, seed: int = 1) -> None:
    for split, num in NUM.items():
        make_mat(root / "SVHN" / f"{split}_32x32.mat", num, seed + num)


def make_synth(root: Path, seed: int = 2) -> None:
    for split, num in NUM.items():
        path = root / "SynthDigits" / f"synth_{split}_32x32.mat"
        make_mat(path, num, seed + num, ten_is_zero=False)


def make_usps(root: Path, seed: int = 3) -> None:
    """libsvm's text, compressed: `CLASS 1:VALUE … 256:VALUE`, classes from 1, values in -1..1."""
    (root / "USPS").mkdir(parents=True, exist_ok=True)
    for (_, num), file in zip(NUM.items(), ("usps.bz2", "usps.t.bz2"), strict=True):
        values = pictures(num, 256, seed=seed + num) / 127.5 - 1
        lines = [
            f"{k % 10 + 1} " + " ".join(f"{i}:{v:.6f}" for i, v in enumerate(row, 1))
            for k, row in enumerate(values)
        ]
        (root / "USPS" / file).write_bytes(bz2.compress(("\n".join(lines) + "\n").encode()))


def mnist_m_files(seed: int = 4) -> dict[str, bytes]:
    """MNIST-M's files by path: `mnist_m_SPLIT/00000000.png`, `mnist_m_SPLIT_labels.txt`."""
    found = {}
    for split, num in NUM.items():
        lines = []
        for k, image in enumerate(pictures(num, 32, 32, 3, seed=seed + num)):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "PNG")
            found[f"mnist_m_{split}/{k:08d}.png"] = content.getvalue()
            lines.append(f"{k:08d}.png {k % 10}")
        found[f"mnist_m_{split}_labels.txt"] = ("\n".join(lines) + "\n").encode()
    return found


def make_mnist_m(root: Path) -> None:
    for name, content in mnist_m_files().items():
        path = root / "mnist_m" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def make_mnist_m_tar(root: Path) -> Path:
    path = root / "mnist_m" / "mnist_m.tar.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in mnist_m_files().items():
            member = tarfile.TarInfo(f"mnist_m/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def make_mnist_m_classes(root: Path) -> None:
    for name, content in mnist_m_files().items():
        if name.endswith(".png"):
            split, file = name.removeprefix("mnist_m_").split("/")
            path = root / "MNIST_M" / split / str(int(file[:-4]) % 10) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def make_fedbn(root: Path, name: str = "USPS", channels: int = 1, parts: int = 3) -> None:
    """FedBN's `digit_dataset/NAME`: pickled (images, labels), as `np.load` reads them there."""
    folder = root / "digit_dataset" / name
    (folder / "partitions").mkdir(parents=True)
    shape = (28, 28, 3) if channels == 3 else (28, 28)
    for k in range(parts):
        images = pictures(10, *shape, seed=10 + k)
        with (folder / f"partitions/train_part{k}.pkl").open("wb") as file:
            pickle.dump((images, (np.arange(10) + k) % 10), file, protocol=2 + k)
    with (folder / "test.pkl").open("wb") as file:
        pickle.dump((pictures(20, *shape, seed=9), np.arange(20)[:, None] % 10), file)


def make_digits5(root: Path) -> Path:
    """All five, each as its authors pack it."""
    make_mnist(root, train=NUM["train"], test=NUM["test"])
    make_svhn(root)
    make_usps(root)
    make_synth(root)
    make_mnist_m(root)
    return root
