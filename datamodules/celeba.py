"""CelebA: 202,599 faces with 40 attributes, in torchvision's folder.

    celeba/img_align_celeba/000001.jpg …
    celeba/list_attr_celeba.txt       number of images; names of the attributes; a line per image
    celeba/list_eval_partition.txt    000001.jpg 0: training, 1: validation, 2: test
    celeba/identity_CelebA.txt        000001.jpg 2880: whose face it is; optional

The official parts share no person. Liu et al., "Deep Learning Face Attributes in the Wild", 2015.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from datamodules.folder_pool import open_folder_pool
from datamodules.listed_images import (
    ListedImages,
    damaged,
    existing,
    in_order,
    rows_of,
    text_lines,
)
from datamodules.utkface import GENDERS

LICENCE = "non-commercial research only (CelebA)"
SPLITS = {"train": 0, "valid": 1, "test": 2}
ADVICE = (
    "get img_align_celeba.zip and the lists from http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html "
    "(In-The-Wild Images are not needed) and unzip the images there"
)


def celeba(root: Path, split: str, target: str = "Male", *, cache_dir: Path) -> ListedImages:
    """The faces of one official part, labelled by one attribute; no image is decoded.

    Args:
        root: Holds the folder celeba.
        split: "train", "valid" or "test".
        target: The attribute: see `class_names`.
        cache_dir: Where the listing is kept.

    Raises:
        ValueError: One line: a file is missing or damaged, images are, or there is no such
            attribute.
    """
    base = existing(root / "celeba", "CelebA", ADVICE)
    attributes, partition = base / "list_attr_celeba.txt", base / "list_eval_partition.txt"
    has_it = _attribute(attributes, target)
    part_of = _numbers(partition, "0, 1 or 2")
    if part_of.keys() != has_it.keys():
        raise ValueError(
            f"{str(attributes)!r} and {str(partition)!r} list other images ({len(has_it):,} and "
            f"{len(part_of):,}): one of them is damaged or half-downloaded; {ADVICE}"
        )
    place = existing(base / "img_align_celeba", "CelebA's folder of images", ADVICE)
    folder = open_folder_pool(place, cache_dir=cache_dir, licence=LICENCE)
    wanted = [name for name, number in part_of.items() if number == SPLITS[split]]
    if not wanted:
        raise ValueError(f"{str(partition)!r} lists no image of part {split!r}: {ADVICE}")
    rows = rows_of(folder, wanted, listed_in=partition, advice=ADVICE)
    classes = class_names(target)
    codes = np.array([classes.index(_class_name(target, has_it[name])) for name in wanted], np.int8)
    rows, codes = in_order(rows, codes, listed_in=partition)
    name = f"CelebA/{split}"
    return ListedImages(folder, rows, classes, codes, name=name, licence=LICENCE)


def class_names(target: str) -> tuple[str, str]:
    """The two classes of an attribute; those of Male are also UTKFace's.

    >>> class_names("Male"), class_names("Smiling")
    (('male', 'female'), ('not_Smiling', 'Smiling'))
    """
    return GENDERS if target == "Male" else (f"not_{target}", target)


def persons(root: Path) -> dict[str, int] | None:
    """Whose face each image shows, by the image's name; None where identity_CelebA.txt is not.

    Raises:
        ValueError: One line: the file is damaged.
    """
    path = root / "celeba" / "identity_CelebA.txt"
    return _numbers(path, "a person's number") if path.exists() else None


def _class_name(target: str, has_it: bool) -> str:
    is_second = not has_it if target == "Male" else has_it
    return class_names(target)[is_second]


def _attribute(path: Path, target: str) -> dict[str, bool]:
    """Whether each image has the attribute."""
    lines = text_lines(path, "CelebA's list of attributes", ADVICE)
    names = lines[1].split() if len(lines) > 1 else []
    if not lines[0].strip().isdigit() or not names:
        expected = "the number of images, above a line with the attributes' names"
        raise damaged(path, 1, lines[0], expected, ADVICE)
    if target not in names:
        near = get_close_matches(target, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(names)}"
        raise ValueError(f"CelebA has no attribute {target!r}: {hint}")
    column = names.index(target) + 1
    found: dict[str, bool] = {}
    for number, line in enumerate(lines[2:], 3):
        fields = line.split()
        if len(fields) != len(names) + 1 or fields[column] not in ("-1", "1"):
            raise damaged(path, number, line, f"NAME and {len(names)} of -1 and 1", ADVICE)
        found[fields[0]] = fields[column] == "1"
    if len(found) != int(lines[0]):
        raise ValueError(
            f"{str(path)!r} lists {len(found):,} images, not the {int(lines[0]):,} that its first "
            f"line says: it is half-downloaded; {ADVICE}"
        )
    return found


def _numbers(path: Path, of_what: str) -> dict[str, int]:
    """The number that a list gives each image."""
    found: dict[str, int] = {}
    for number, line in enumerate(text_lines(path, f"CelebA's {path.name}", ADVICE), 1):
        matched = re.fullmatch(r"(\S+) +(\d+) *", line)
        if not matched:
            raise damaged(path, number, line, f"NAME and {of_what}", ADVICE)
        found[matched[1]] = int(matched[2])
    return found
