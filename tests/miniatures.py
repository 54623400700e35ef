"""Small data sets in the exact formats of the real ones: a few images, every file."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import draw

DOMAINNET_DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")


def save(path: Path, rng: np.random.Generator, side: int = 12, kind: int | None = None) -> None:
    """One picture: noise, or one of conftest's kinds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind is None:
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    else:
        draw(kind, rng, side=24).save(path)


def make_domainnet(
    root: Path, classes: list[str], *, train: int = 3, test: int = 2, lists: bool = True, kinds=None
) -> Path:
    """DOMAIN/CLASS/DOMAIN_number_number.jpg and the official lists of the two parts."""
    rng = np.random.default_rng(0)
    for place, domain in enumerate(DOMAINNET_DOMAINS, 1):
        lines: dict[str, list[str]] = {"train": [], "test": []}
        for number, name in enumerate(sorted(classes)):
            for i in range(train + test):
                path = f"{domain}/{name}/{domain}_{number + 1:03d}_{place:02d}{i:04d}.jpg"
                save(root / path, rng, kind=kinds(domain, name) if kinds else None)
                lines["train" if i < train else "test"].append(f"{path} {number}\n")
        for part, listed in lines.items():
            if lists:
                (root / f"{domain}_{part}.txt").write_text("".join(listed))
    return root


def make_fedbn_lists(root: Path, *, train: int = 3, protocol: int = 2) -> None:
    """FedBN's DOMAIN_train.pkl and DOMAIN_test.pkl, of the images that lie there."""
    for domain in DOMAINNET_DOMAINS:
        listed: dict[str, list[tuple[str, str]]] = {"train": [], "test": []}
        for folder in sorted((root / domain).iterdir()):
            for i, path in enumerate(sorted(folder.iterdir())):
                pair = (f"DomainNet/{domain}/{folder.name}/{path.name}", folder.name)
                listed["train" if i < train else "test"].append(pair)
        for part, pairs in listed.items():
            columns = tuple(np.array(column, object) for column in zip(*pairs, strict=True))
            (root / f"{domain}_{part}.pkl").write_bytes(pickle.dumps(columns, protocol))


def make_imagenet32(
    root: Path, *, packed: str = "npz", files: int = 10, per_file: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """train_data_batch_1… as .npz (np.savez), compressed .npz or pickles; its images and labels.

    Returns:
        Images [N, 32, 32, 3] and labels [N] from 1.
    """
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    images = rng.integers(0, 256, (files * per_file, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(1, 1001, files * per_file)
    for number in range(files):
        rows = slice(number * per_file, (number + 1) * per_file)
        data = images[rows].transpose(0, 3, 1, 2).reshape(per_file, 3072)
        path = root / f"train_data_batch_{number + 1}"
        content = {"data": data, "labels": labels[rows], "mean": data.mean(axis=0)}
        if packed == "pickle":
            content["labels"] = labels[rows].tolist()
            path.write_bytes(pickle.dumps(content, protocol=2))
        elif packed == "compressed":
            np.savez_compressed(path.with_suffix(".npz"), **content)
        else:
            np.savez(path.with_suffix(".npz"), **content)
    return images, labels


CIFAR10_CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]


def make_cifar10(root: Path, monkeypatch, *, per_batch: int = 40) -> Path:
    """cifar-10-batches-py; torchvision's checksums become those of the files made here."""
    import torchvision.datasets

    rng = np.random.default_rng(1)
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums = {}
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"]:
        content: dict[str, object] = {"label_names": CIFAR10_CLASSES}
        if name != "batches.meta":
            pixels = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
            content = {"data": pixels, "labels": [i % 10 for i in range(per_batch)]}
        written = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(written)
        sums[name] = hashlib.md5(written).hexdigest()
    kind = torchvision.datasets.CIFAR10
    for attribute in ("train_list", "test_list"):
        listed = [[name, sums[name]] for name, _ in getattr(kind, attribute)]
        monkeypatch.setattr(kind, attribute, listed)
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums["batches.meta"]})
    return root


CELEBA_ATTRIBUTES = ["5_o_Clock_Shadow", "Male", "Smiling", "Young"]


def make_celeba(root: Path, *, per_part: int = 20, identities: bool = True) -> Path:
    """celeba/ as torchvision has it, with four of the forty attributes: 0, 1, 2 are the parts.

    Image i (from 1) is Male if i is even and Smiling if 3 divides i; two neighbours are a person.
    """
    rng = np.random.default_rng(2)
    base, num = root / "celeba", 3 * per_part
    names = [f"{i:06d}.jpg" for i in range(1, num + 1)]
    for name in names:
        save(base / "img_align_celeba" / name, rng)
    has = [
        [-1, 1 if i % 2 == 0 else -1, 1 if i % 3 == 0 else -1, 1 if i % 5 else -1]
        for i in range(1, num + 1)
    ]
    rows = [
        f"{name} " + " ".join(f"{value:2d}" for value in values) + "\n"
        for name, values in zip(names, has, strict=True)
    ]
    text = f"{num}\n{' '.join(CELEBA_ATTRIBUTES)} \n" + "".join(rows)
    (base / "list_attr_celeba.txt").write_text(text)
    parts = [f"{name} {i // per_part}\n" for i, name in enumerate(names)]
    (base / "list_eval_partition.txt").write_text("".join(parts))
    if identities:
        persons = [f"{name} {i // 2 + 1}\n" for i, name in enumerate(names)]
        (base / "identity_CelebA.txt").write_text("".join(persons))
    return root


UTKFACE_NAMES = [
    "1_0_0_20161219140623097.jpg.chip.jpg",
    "25_1_2_20170116174525125.jpg.chip.jpg",
    "101_1_0_20170112213500903.jpg.chip.jpg",
    "39_0_4_20170103201153847.jpg.chip.jpg",
]
UTKFACE_ODD_NAMES = [  # lack the race, as three of the real ones do
    "39_1_20170116174525125.jpg.chip.jpg",
    "61_1_20170109142408075.jpg.chip.jpg",
]


def make_utkface(root: Path) -> Path:
    """UTKFace/ with two of the odd names that the real one has."""
    rng = np.random.default_rng(3)
    for name in UTKFACE_NAMES + UTKFACE_ODD_NAMES:
        save(root / "UTKFace" / name, rng)
    return root


WNIDS = {"n01443537": "goldfish, Carassius auratus", "n01629819": "European fire salamander"}


def make_tiny_imagenet(root: Path, *, train: int = 3, val: int = 4) -> Path:
    """tiny-imagenet-200 with two classes."""
    rng = np.random.default_rng(4)
    base = root / "tiny-imagenet-200"
    base.mkdir(parents=True)
    (base / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(WNIDS)))
    words = {"n00001740": "entity", **WNIDS}
    (base / "words.txt").write_text("".join(f"{w}\t{text}\n" for w, text in words.items()))
    for wnid in WNIDS:
        boxes = []
        for i in range(train):
            save(base / f"train/{wnid}/images/{wnid}_{i}.JPEG", rng)
            boxes.append(f"{wnid}_{i}.JPEG\t0\t0\t62\t62\n")
        (base / f"train/{wnid}/{wnid}_boxes.txt").write_text("".join(boxes))
    lines = []
    for i in range(val):
        save(base / f"val/images/val_{i}.JPEG", rng)
        lines.append(f"val_{i}.JPEG\t{list(WNIDS)[i % 2]}\t0\t32\t44\t62\n")
    (base / "val/val_annotations.txt").write_text("".join(lines))
    save(base / "test/images/test_0.JPEG", rng)
    return root
