"""Tiny-ImageNet: 200 classes of ImageNet at 64×64, 500 training and 50 validation images each.

The official folder: `tiny-imagenet-200/train/nXXXX/images/*.JPEG`, `val/images/*.JPEG` with
`val/val_annotations.txt` (a line is name, WordNet id and a box, parted by tabs), `words.txt`. The
images of its test part have no public labels and are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from datamodules.folder_pool import open_folder_pool
from datamodules.listed_images import (
    ListedImages,
    damaged,
    existing,
    in_order,
    numbered,
    rows_of,
    text_lines,
)

LICENCE = "ImageNet terms of access (non-commercial research)"
FOLDER = "tiny-imagenet-200"
ADVICE = (
    "get tiny-imagenet-200.zip from http://cs231n.stanford.edu/tiny-imagenet-200.zip and unzip it "
    "there"
)


def tiny_imagenet(root: Path, split: str = "train", *, cache_dir: Path) -> ListedImages:
    """Images of one part, labelled by WordNet id and word, as in "n01443537 goldfish".

    Args:
        root: Holds the folder tiny-imagenet-200.
        split: "train" or "val".
        cache_dir: Where the listing is kept.

    Raises:
        ValueError: One line: something is missing, half unpacked, or a list is damaged.
    """
    base = existing(root / FOLDER, "Tiny-ImageNet", ADVICE)
    wnids = [line.strip() for line in _lines(base / "wnids.txt") if line.strip()]
    part = existing(base / split, f"the {split} part of Tiny-ImageNet", ADVICE)
    folder = open_folder_pool(part, cache_dir=cache_dir, licence=LICENCE)
    if split == "train":
        wanted, listed_in = _of_train(folder.ids, wnids, part), base / "wnids.txt"
    else:
        listed_in = part / "val_annotations.txt"
        wanted = _of_val(listed_in, set(wnids))
    number = numbered(wnids)
    rows = rows_of(folder, list(wanted), listed_in=listed_in, advice=ADVICE)
    codes = np.array([number[wnid] for wnid in wanted.values()], np.int16)
    rows, codes = in_order(rows, codes, listed_in=listed_in)
    classes = _words(base / "words.txt", wnids)
    name = f"tiny_imagenet/{split}"
    return ListedImages(folder, rows, classes, codes, name=name, licence=LICENCE)


def _of_train(ids: Sequence[str], wnids: list[str], part: Path) -> dict[str, str]:
    """WordNet id of each image `nXXXX/images/x.JPEG`."""
    known, found = set(wnids), {}
    for path in ids:
        steps = path.split("/")
        if len(steps) == 3 and steps[1] == "images" and steps[0] in known:
            found[path] = steps[0]
    missing = sorted(known.difference(found.values()))
    if missing:
        raise ValueError(
            f"Tiny-ImageNet is not whole: {len(missing)} of the {len(known)} classes in wnids.txt "
            f"have no image in {str(part)!r}, {missing[0]}/images to begin with; {ADVICE}"
        )
    return found


def _of_val(annotations: Path, known: set[str]) -> dict[str, str]:
    """WordNet id of each validation image, as its list says."""
    found = {}
    for number, line in enumerate(_lines(annotations), 1):
        fields = line.split("\t")
        if len(fields) != 6 or fields[1] not in known:
            expected = "NAME, a class of wnids.txt and four numbers, parted by tabs"
            raise damaged(annotations, number, line, expected, ADVICE)
        found[f"images/{fields[0]}"] = fields[1]
    return found


def _words(path: Path, wnids: list[str]) -> list[str]:
    """Each WordNet id with the first of its words; the id alone where words.txt is not there."""
    words: dict[str, str] = {}
    if path.exists():
        for line in _lines(path):
            wnid, _, meaning = line.partition("\t")
            words[wnid] = meaning.split(",")[0].strip()
    return [f"{wnid} {words.get(wnid, '')}".strip() for wnid in wnids]


def _lines(path: Path) -> list[str]:
    return text_lines(path, f"Tiny-ImageNet's {path.name}", ADVICE)
