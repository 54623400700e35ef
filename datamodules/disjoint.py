"""No image is in two of these: the client's training images, its test images, the pool.

Images of one id whose pixels agree are the same image. Besides, a picture may be there twice under
two names: decoded pixels are compared by hash where reading both sides is within `BUDGET`; larger
ones are compared by id alone, and the statement says so. The hashes of each part of the pool are
kept, so that another client costs no second look. All of this is a simulation's, which knows both.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from datamodules.scenario import Scenario
from ecos_pl.images import ImageSource, PoolSource, UnreadableImage
from ecos_pl.pool_embeddings import PartOfPool
from ecos_pl.progress import progress_bar
from ecos_pl.storage import fingerprint_of, read_json, write_bytes, write_json

Hashes = npt.NDArray[np.uint64]

log = logging.getLogger(__name__)

BUDGET = 10**9
"""Pixels that are decoded at most, each image counting 4,096 more: 200,000 digits, some seconds, or
18,000 photos of 224 px, a minute.
"""

_VERSION = 1  # raise it when a change below finds other pairs
_UNREADABLE = 0


def client_facts(scenario: Scenario) -> dict[str, Any]:
    """How many images of which class the simulated client has: `num_train`, `num_test`, `classes`.

    `classes` maps each class to its numbers of training and of test images.
    """
    parts = (scenario.client_train, scenario.client_test)
    train, test = (Counter(part.labels if part is not None else ()) for part in parts)
    return {
        "domain": scenario.client_domain,
        "num_train": sum(train[name] for name in scenario.classes),
        "num_test": sum(test[name] for name in scenario.classes),
        "classes": {name: [train[name], test[name]] for name in scenario.classes},
    }


def check_disjoint(
    scenario: Scenario, cache_dir: Path | None = None, *, with_pool: bool = True
) -> dict[str, Any]:
    """Compare the parts of a scenario with each other; once, if `cache_dir` keeps the result.

    Args:
        scenario: Of a simulation: the client's images are here.
        cache_dir: For the result and the pool's hashes; None keeps none.
        with_pool: Whether the pool is used at all.

    Returns:
        `same_ids`: 0, or this raises. `same_pixels`: for each pair of parts, how many images of the
        first are found in the second under another id, which `scenario.repeats_allowed` must
        permit; None where pixels were not compared.

    Raises:
        ValueError: One line that names an image that is in two parts.
    """
    parts = {"client_train": scenario.client_train, "client_test": scenario.client_test}
    parts |= {"pool": scenario.pool} if with_pool else {}
    present = {name: source for name, source in parts.items() if source is not None}
    facts = {name: source.fingerprint for name, source in present.items()}
    key = fingerprint_of([_VERSION, BUDGET, scenario.repeats_allowed, facts])[:16]
    kept = cache_dir / "simulation" / f"disjoint-{key}.json" if cache_dir else None
    if kept is not None and kept.is_file():
        return dict(read_json(kept))
    names = list(present)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    for a, b in pairs:
        _check_ids(a, present[a], b, present[b])
    hashes = {
        name: _hashes_of_pool(scenario.pool, cache_dir) if name == "pool" else _hashes(source)
        for name, source in present.items()
        if _cost(source) <= BUDGET
    }
    repeats: dict[str, int | None] = {}
    for a, b in pairs:
        repeats[f"{a} in {b}"] = (
            _repeats(scenario, (a, present[a], hashes[a]), (b, present[b], hashes[b]))
            if a in hashes and b in hashes
            else None
        )
    result = {"same_ids": 0, "same_pixels": repeats}
    if kept is not None:
        write_json(kept, result)
    return result


_WORDS = {
    "client_train": "the client's training images",
    "client_test": "the client's test images",
    "pool": "the pool",
}


def _check_ids(a: str, first: ImageSource, b: str, second: ImageSource) -> None:
    """Refuse an id that is in both, unless it means another picture there.

    In folders it may: ids are relative to the part's own folder.
    """
    place = {identifier: row for row, identifier in enumerate(first.ids)}
    for row, identifier in enumerate(second.ids):
        other = place.get(identifier)
        if other is not None and _is_same(first, other, second, row):
            raise ValueError(
                f"image {identifier!r} is in {_WORDS[a]} and in {_WORDS[b]}: what the client has "
                "must not be public, and what measures must not be trained on"
            )


def _repeats(
    scenario: Scenario,
    one: tuple[str, ImageSource, Hashes],
    other: tuple[str, ImageSource, Hashes],
) -> int:
    """How many images of one part are in the other; refused if that is no habit of the data."""
    (a, first, of_first), (b, second, of_second) = one, other
    found = np.flatnonzero(np.isin(of_first, of_second[of_second != _UNREADABLE]))
    pairs = ((row, int(np.flatnonzero(of_second == of_first[row])[0])) for row in found.tolist())
    same = next(((i, j) for i, j in pairs if _is_same(first, i, second, j)), None)
    if same is None:
        return 0
    pair = f"{first.ids[same[0]]!r} in {_WORDS[a]} and {second.ids[same[1]]!r} in {_WORDS[b]}"
    if not scenario.repeats_allowed:
        raise ValueError(f"{pair} are the same picture: remove one of them ({len(found)} are)")
    log.warning("%d pictures are in two parts of the data set itself, as %s", len(found), pair)
    return len(found)


def _is_same(first: ImageSource, row: int, second: ImageSource, other: int) -> bool:
    try:
        return _pixels(first, row) == _pixels(second, other)
    except UnreadableImage:
        return False


def _pixels(source: ImageSource, row: int) -> bytes:
    image = source.read(row)
    return f"{image.size}".encode() + image.tobytes()


def _cost(source: ImageSource) -> int:
    """Pixels to decode, estimated from three images."""
    if not len(source):
        return 0
    sizes = []
    for row in {0, len(source) // 2, len(source) - 1}:
        try:
            width, height = source.read(row).size
        except UnreadableImage:
            continue
        sizes.append(width * height)
    return len(source) * (4096 + max(sizes, default=0))


def _hashes_of_pool(pool: PoolSource, cache_dir: Path | None) -> Hashes:
    found = []
    for part in pool.parts:
        path = cache_dir and cache_dir / "pixel_hashes" / f"{part.fingerprint[:16]}.npy"
        if path and path.is_file():
            found.append(np.load(path))
            continue
        found.append(_hashes(PartOfPool(pool, part), f"comparing {part.name} with the client"))
        if path:
            content = io.BytesIO()
            np.save(content, found[-1])
            write_bytes(path, content.getvalue())
    return np.concatenate(found) if found else np.zeros(0, np.uint64)


def _hashes(source: ImageSource, title: str | None = None) -> Hashes:
    """A hash [N] of each image's decoded pixels; 0 for one that cannot be read."""
    hashes = np.zeros(len(source), np.uint64)
    with progress_bar(title, len(source), "images") as advance:
        for row in range(len(source)):
            hashes[row] = _hash(source, row)
            advance(1)
    return hashes


def _hash(source: ImageSource, row: int) -> int:
    try:
        digest = hashlib.blake2b(_pixels(source, row), digest_size=8).digest()
    except UnreadableImage:
        return _UNREADABLE
    return max(1, int.from_bytes(digest, "little"))
