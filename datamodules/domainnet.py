"""DomainNet: 345 classes in six domains (Peng et al., "Moment Matching", ICCV 2019).

    clipart/aircraft_carrier/clipart_001_000001.jpg …    clipart.zip, unzipped; likewise the others
    clipart_train.txt  clipart_test.txt                  the official parts; optional
    clipart_train.pkl  clipart_test.pkl                  FedBN's and SplitMix' parts of ten classes

A line of the official lists is `clipart/aircraft_carrier/clipart_001_000001.jpg 0`. A pickle holds
two arrays, of paths and of class names; of a path the last three steps count, as in SplitMix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from datamodules.array_pickle import load_or_advise
from datamodules.client_draw import ClientDraw
from datamodules.domains import Domain, domain_scenario
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
from datamodules.scenario import Scenario
from ecos_pl.images import FolderSource

LICENCE = "research only, images of the web (DomainNet, fair use)"
DOMAINS = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
TEN_CLASSES = (  # the most frequent ones, by FedBN (Li et al., ICLR 2021, appendix D)
    *("bird", "feather", "headphones", "ice_cream", "teapot"),
    *("tiger", "whale", "windmill", "wine_glass", "zebra"),
)
ADVICE = "get {0}.zip from https://ai.bu.edu/M3SDA/ and unzip it there"
_LIST_ADVICE = (
    "get {0}_train.txt and {0}_test.txt from https://ai.bu.edu/M3SDA/ (for clipart and painting, "
    "images and lists must both be the cleaned ones or both the original ones)"
)
_PICKLE_ADVICE = (
    "get domainnet_dataset.zip, which the README of https://github.com/med-air/FedBN links to, and "
    "unzip it there"
)
_LINE = re.compile(r"(?P<domain>[^/ ]+)/(?P<image>(?P<label>[^/]+)/[^/]+) (?P<number>\d+)")


_PARTS = ("train", "test")
PROTOCOL = ClientDraw(domain="real", fraction=0.5)
"""The paper's: half of one domain is the client's; which one, it goes through all six."""


def domainnet(
    root: Path,
    draw: ClientDraw | None,
    *,
    cache_dir: Path,
    ten_classes: bool = False,
    allow_pickle: bool = False,
) -> Scenario:
    """Half of one domain, or what `draw` says, is the client's, the rest is the pool.

    Args:
        root: Holds the domains' folders and the lists.
        draw: Which images the client has; None for a client elsewhere.
        cache_dir: Where listings are kept.
        ten_classes: `TEN_CLASSES` alone, pool and client: FedBN's, which the paper takes over.
        allow_pickle: Split as FedBN's pickled lists do, which name those ten classes only.

    Raises:
        ValueError: One line: see `domainnet_domain` and `domain_scenario`.
    """
    if not root.is_dir():
        advice = f"get the six domains ({', '.join(DOMAINS)}) from https://ai.bu.edu/M3SDA/"
        raise ValueError(f"DomainNet is missing: looked for the folder {str(root)!r}; {advice}")
    parts = {
        domain: domainnet_domain(
            root,
            domain,
            cache_dir=cache_dir,
            classes=TEN_CLASSES if ten_classes else None,
            allow_pickle=allow_pickle,
        )
        for domain in DOMAINS
    }
    if all(test is None for _, test in parts.values()):
        _check_same_classes({domain: train for domain, (train, _) in parts.items()})
    classes = sorted({label for train, _ in parts.values() for label in train.labels if label})
    domains = [Domain(domain, train, test) for domain, (train, test) in parts.items()]
    family = "domainnet10" if ten_classes else "domainnet"
    return domain_scenario(family, domains, classes, draw, default=PROTOCOL)


def domainnet_domain(
    root: Path,
    domain: str,
    *,
    cache_dir: Path,
    classes: Sequence[str] | None = None,
    allow_pickle: bool = False,
) -> tuple[ListedImages, ListedImages | None]:
    """Training and test part of one domain; no image is decoded.

    The parts are those of the lists where there are any: the pickled ones with `allow_pickle`, else
    the official ones. Without lists all images below the domain's folder are one part, and the
    second is None.

    Args:
        root: Holds the domains' folders and the lists.
        domain: One of `DOMAINS`.
        cache_dir: Where the listing is kept.
        classes: Those to keep; None for all.
        allow_pickle: Read the pickled lists (see `array_pickle.py`), which must then be there.

    Raises:
        ValueError: One line: something is missing, half unpacked, or a list is damaged.
    """
    assert domain in DOMAINS, domain
    advice = ADVICE.format(domain)
    place = existing(root / domain, f"DomainNet's {domain}", advice)
    folder = open_folder_pool(place, cache_dir=cache_dir, licence=LICENCE)
    lists = [root / f"{domain}_{part}.{'pkl' if allow_pickle else 'txt'}" for part in _PARTS]
    if not allow_pickle and not any(path.exists() for path in lists):
        return _by_folders(folder, domain, classes), None
    read = _pickled if allow_pickle else _official
    listed = [read(path, domain) for path in lists]
    if both := listed[0].keys() & listed[1].keys():
        raise ValueError(f"{str(lists[0])!r} and {str(lists[1])!r} both list {min(both)!r}")
    train, test = (
        _by_list(folder, f"{domain}/{part}", path, label_of, classes)
        for part, path, label_of in zip(_PARTS, lists, listed, strict=True)
    )
    return train, test


def _by_list(
    folder: FolderSource,
    name: str,
    path: Path,
    label_of: dict[str, str],
    classes: Sequence[str] | None,
) -> ListedImages:
    known = sorted(set(label_of.values())) if classes is None else list(classes)
    number = numbered(known)
    label_of = {image: label for image, label in label_of.items() if label in number}
    _check_classes(label_of.values(), known, str(path), "get the list again")
    domain = name.partition("/")[0]
    advice = f"{ADVICE.format(domain)}, or {_LIST_ADVICE.format(domain)}"
    rows = rows_of(folder, list(label_of), listed_in=path, advice=advice)
    codes = np.array([number[label] for label in label_of.values()], np.int16)
    rows, codes = in_order(rows, codes, listed_in=path)
    return ListedImages(folder, rows, known, codes, name=f"domainnet/{name}", licence=LICENCE)


def _by_folders(folder: FolderSource, domain: str, classes: Sequence[str] | None) -> ListedImages:
    labels = [
        label if path.count("/") == 1 else None
        for path, label in zip(folder.ids, folder.labels, strict=True)
    ]
    known = list(classes) if classes is not None else sorted({name for name in labels if name})
    number = numbered(known)
    codes = np.array([number.get(label or "", -1) for label in labels], np.int16)
    rows = np.flatnonzero(codes >= 0)
    advice = f"it is half unpacked; {ADVICE.format(domain)}"
    _check_classes([known[code] for code in codes[rows]], known, folder.name, advice)
    return ListedImages(
        folder, rows, known, codes[rows], name=f"domainnet/{domain}", licence=LICENCE
    )


def _check_same_classes(parts: dict[str, ListedImages]) -> None:
    """Refuse (ValueError) a domain that lacks a class which another one has: half unpacked."""
    classes = {domain: set(filter(None, part.labels)) for domain, part in parts.items()}
    every = set().union(*classes.values())
    for domain, found in classes.items():
        if missing := sorted(every - found):
            raise ValueError(
                f"DomainNet's {domain} has {len(found)} of the {len(every)} classes that the other "
                f"domains have, no {missing[0]!r} for one: it is half unpacked; "
                f"{ADVICE.format(domain)}"
            )


def _check_classes(found: Iterable[str], known: Sequence[str], where: str, advice: str) -> None:
    missing = set(known).difference(found)
    if missing:
        raise ValueError(
            f"{where!r} has no image of {len(missing)} of {len(known)} classes, "
            f"{min(missing)!r} to begin with: {advice}"
        )


# --- lists ---


def _official(path: Path, domain: str) -> dict[str, str]:
    """Class of each image of a text list, by path below the domain's folder."""
    advice = _LIST_ADVICE.format(domain)
    found: dict[str, str] = {}
    for number, line in enumerate(text_lines(path, f"DomainNet's {path.name}", advice), 1):
        matched = _LINE.fullmatch(line.strip())
        if not matched or matched["domain"] != domain:
            expected = f"{domain}/CLASS/IMAGE.jpg NUMBER"
            raise damaged(path, number, line, expected, f"half-downloaded? {advice}")
        if matched["image"] in found:
            raise damaged(path, number, line, "listed for the first time", advice)
        found[matched["image"]] = matched["label"]
    return found


def _pickled(path: Path, domain: str) -> dict[str, str]:
    """Class of each image of a pickled list, by path below the domain's folder."""
    listed = load_or_advise(path, advice=_PICKLE_ADVICE)
    columns = [np.asarray(column).tolist() for column in listed] if _is_pair(listed) else []
    if len(columns) != 2 or not all(isinstance(text, str) for text in [*columns[0], *columns[1]]):
        raise ValueError(
            f"{str(path)!r} does not hold two equally long arrays, of paths and of class names: "
            f"{_PICKLE_ADVICE}"
        )
    found: dict[str, str] = {}
    for image, label in zip(*columns, strict=True):
        steps = image.replace("\\", "/").split("/")[-3:]
        if len(steps) != 3 or steps[0] != domain or ".." in steps:
            raise ValueError(
                f"{str(path)!r} lists {image!r}, which does not end in {domain}/CLASS/IMAGE.jpg: "
                f"{_PICKLE_ADVICE}"
            )
        found["/".join(steps[1:])] = label
    return found


def _is_pair(listed: object) -> bool:
    if not isinstance(listed, (tuple, list, np.ndarray)) or len(listed) != 2:
        return False
    return all(isinstance(column, (list, np.ndarray)) for column in listed) and len(
        listed[0]
    ) == len(listed[1])
