"""UTKFace: 23,708 faces whose file names tell age, gender and race, `25_1_2_20170116.jpg.chip.jpg`.

The aligned and cropped faces (UTKFace.tar.gz, https://susanqq.github.io/UTKFace/) in one folder or
several. Of the labels only the gender is used, under the names that CelebA's attribute Male has
here. Zhang, Song, Qi, "Age Progression/Regression by Conditional Adversarial Autoencoder", 2017.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np

from datamodules.folder_pool import open_folder_pool
from datamodules.listed_images import ListedImages, existing

log = logging.getLogger(__name__)

LICENCE = "non-commercial research only (UTKFace)"
GENDERS = ("male", "female")
"""By the number in a file name; CelebA's attribute Male has these names too (`celeba.py`)."""
ADVICE = (
    "get UTKFace.tar.gz (aligned and cropped faces) from https://susanqq.github.io/UTKFace/ and "
    "unpack it there"
)

_NAME = re.compile(r"\d{1,3}_(?P<gender>[01])_[0-4]_\d+\.jpg(\.chip\.jpg)?", re.IGNORECASE)


def utkface(root: Path, *, cache_dir: Path) -> ListedImages:
    """The faces below `root`/UTKFace, labelled by gender; no image is decoded.

    A file whose name is not age_gender_race_time is left out; one warning counts them (the
    original has three, which lack the race).

    Args:
        root: Holds the folder UTKFace.
        cache_dir: Where the listing is kept.

    Raises:
        ValueError: One line: the folder is missing, or no file is named so.
    """
    place = existing(root / "UTKFace", "UTKFace", ADVICE)
    folder = open_folder_pool(place, cache_dir=cache_dir, licence=LICENCE)
    rows, codes, odd = [], [], []
    for row, path in enumerate(folder.ids):
        found = _NAME.fullmatch(path.rpartition("/")[2])
        if found:
            rows.append(row)
            codes.append(int(found["gender"]))
        else:
            odd.append(path)
    if not rows:
        raise ValueError(
            f"no image in {str(place)!r} is named age_gender_race_time.jpg.chip.jpg, as is none of "
            f"{odd[0]!r} and {len(odd) - 1:,} others: {ADVICE}"
        )
    if odd:
        log.warning(
            "UTKFace: %d of %d images are left out, as their names are not age_gender_race_time: "
            "%s%s",
            *(len(odd), len(folder), ", ".join(odd[:3]), " …" if len(odd) > 3 else ""),
        )
    return ListedImages(
        folder,
        np.array(rows, np.int64),
        GENDERS,
        np.array(codes, np.int8),
        name="UTKFace",
        licence=LICENCE,
    )
