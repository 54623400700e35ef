"""Clients by name: what `data.client=` may say besides a folder.

    torchvision:CIFAR10?root=data    a data set of torchvision's
    hf:prints?label_column=kind      a Hugging Face data set on disk

The data set's own training part is the client's and its test part measures; `split=…` and
`test_split=…` name others. All other options are those of pools (`pool_spec.py`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from datamodules.domains import set_aside
from datamodules.folder import check_apart
from datamodules.huggingface_pool import HuggingFacePool, huggingface_pool, splits_of
from datamodules.pool_rows import PoolRows
from datamodules.pool_spec import named_pool
from datamodules.several_pools import SeveralPools
from datamodules.torchvision_pool import TorchvisionPool, parameters_of, torchvision_pool
from ecos_pl.images import FolderSource, ImageSource, PoolSource, SomeImages

log = logging.getLogger(__name__)

_TEST_PARTS = ("test", "val", "valid", "validation")
"""What data sets call the part that measures, best first."""


@dataclass(frozen=True)
class NamedClient:
    """The client's images, out of a data set.

    Attributes:
        train: Its private images.
        test: What measures.
        classes: Names of the classes in the training part, sorted.
        sets: The parts of the data set that `train` and `test` are of.
    """

    train: ImageSource
    test: ImageSource
    classes: list[str]
    sets: Sequence[TorchvisionPool | HuggingFacePool]


def named_client(spec: str, *, cache_dir: Path) -> NamedClient | None:
    """The client that `spec` names; None if it is a folder.

    A data set without a test part gives a fifth of its images for it, always the same ones.

    Raises:
        ValueError: One line: the data set is missing, has no such part, or no labels.
    """
    named = named_pool(spec)
    if named is None:
        return None
    kind, place, options = named
    test_split = options.pop("test_split", None)
    train: TorchvisionPool | HuggingFacePool
    test: TorchvisionPool | HuggingFacePool | None
    if kind == "hf":
        train, test = _of_hugging_face(Path(place).expanduser(), options, test_split, cache_dir)
    else:
        train, test = _of_torchvision(place, options, test_split)
    if test is not None and test.fingerprint == train.fingerprint:
        test = None
    classes = _classes(spec, train, test)
    if test is not None:
        return NamedClient(train, test, classes, [train, test])
    aside = set_aside(len(train))
    rest, measures = (SomeImages(train, np.flatnonzero(mask)) for mask in (~aside, aside))
    return NamedClient(rest, measures, classes, [train])


def apart(pool: PoolSource, client: NamedClient, used: Sequence[ImageSource]) -> PoolSource:
    """The pool without the client's images, where a pool is of the same data set and part.

    Args:
        pool: One or several pools.
        client: What the client's images are of.
        used: Its images, and those that measure.

    Raises:
        ValueError: One line: nothing is left of the pool, or it is the folder that the client's
            images lie in, under another name.
    """
    dropped = np.zeros(len(pool), bool)
    names = [set(source.ids) for source in used]
    for start, leaf in _leaves(pool):
        for of in client.sets:
            if isinstance(leaf, FolderSource) and of.image_folder is not None:
                check_apart(leaf.root, of.image_folder)
            if _is_same(leaf, of):
                mine = [row for row, name in enumerate(of.ids) if any(name in n for n in names)]
                dropped[start + np.array(mine, np.int64)] = True
    num = int(dropped.sum())
    if not num:
        return pool
    if num == len(pool):
        raise ValueError(
            f"the client takes all images of {pool.name}, so none is left as pool: give it fewer, "
            "as client.fraction=0.5, or name another pool or another split"
        )
    log.info("%d images of %s are the client's or measure: not in the pool", num, pool.name)
    return PoolRows(pool, np.flatnonzero(~dropped))


def _leaves(pool: PoolSource) -> Iterator[tuple[int, PoolSource]]:
    """Pools in a pool, and where each starts."""
    start = 0
    for leaf in pool.sources if isinstance(pool, SeveralPools) else [pool]:
        yield start, leaf
        start += len(leaf)


def _is_same(one: PoolSource, other: TorchvisionPool | HuggingFacePool) -> bool:
    if isinstance(one, HuggingFacePool) and isinstance(other, HuggingFacePool):
        return one.rows_of == other.rows_of  # other columns make another fingerprint
    return one.fingerprint == other.fingerprint


# --- parts of data sets ---


def _of_torchvision(
    name: str, options: dict[str, str], test_split: str | None
) -> tuple[TorchvisionPool, TorchvisionPool | None]:
    takes = parameters_of(name)
    train = torchvision_pool(name, options)
    side = "split" if "split" in takes and "train" not in takes else "train"
    if side not in takes:
        if test_split is not None:
            raise ValueError(f"torchvision:{name} has no parts: leave test_split={test_split} out")
        return train, None
    if side == "train":
        if test_split not in (None, "train", "test"):
            raise ValueError(f"torchvision:{name} has test_split=train and test, not {test_split}")
        side_of = ("train",) if "split" in takes else ("train", "split")
        given = {key: value for key, value in options.items() if key not in side_of}
        given["train"] = "true" if test_split == "train" else "false"
        return train, torchvision_pool(name, given)
    for part in (test_split,) if test_split else _TEST_PARTS:
        try:
            return train, torchvision_pool(name, {**options, "split": part})
        except ValueError as error:
            has_no_such_part = re.search(r"Valid (values|splits) are", str(error))
            if test_split or not has_no_such_part:
                raise
    return train, None


def _of_hugging_face(
    folder: Path, options: dict[str, str], test_split: str | None, cache_dir: Path
) -> tuple[HuggingFacePool, HuggingFacePool | None]:
    train = huggingface_pool(folder, options, cache_dir=cache_dir)
    if test_split is None:
        there = splits_of(folder, cache_dir=cache_dir)
        test_split = next((part for part in _TEST_PARTS if part in there), None)
    if test_split is None:
        return train, None
    return train, huggingface_pool(folder, {**options, "split": test_split}, cache_dir=cache_dir)


def _classes(spec: str, train: ImageSource, test: ImageSource | None) -> list[str]:
    classes = sorted({label for label in train.labels if label is not None})
    if not classes:
        hint = "; name the column with label_column=…" if spec.startswith("hf:") else ""
        raise ValueError(f"data.client={spec}: its images have no labels that are known{hint}")
    tested = () if test is None else test.labels
    unknown = {label for label in tested if label is not None}.difference(classes)
    if unknown:
        raise ValueError(
            f"data.client={spec}: class {min(unknown)!r} is in its test part but not in its "
            "training part"
        )
    return classes
