"""`data=digits5`: five domains of digits, one of which is the client's.

The paper's digits benchmark: MNIST, SVHN, USPS, SynthDigits and MNIST-M (the last two by Ganin et
al., "Domain-Adversarial Training of Neural Networks", 2016). Each is read as its authors,
torchvision or FedBN (Li et al., 2021) pack it; docs/datasets.md says which files and where from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datamodules.array_pool import Arrays, array_pool
from datamodules.client_draw import ClientDraw
from datamodules.digit_files import (
    partitions_in,
    read_mat,
    read_mnist_m_folder,
    read_mnist_m_tar,
    read_pickles,
)
from datamodules.domains import Domain, domain_scenario, limited
from datamodules.mixed_digits import DIGITS
from datamodules.scenario import Scenario
from datamodules.torchvision_pool import torchvision_pool
from ecos_pl.images import PoolSource, scan_folder
from ecos_pl.overrides import nearest
from ecos_pl.storage import one_at_a_time

DOMAINS = ("mnist", "svhn", "usps", "synth_digits", "mnist_m")
DEFAULT_SIZE = 1000
"""The client's training images, as in this project's other families of digits."""

_SPLITS = ("train", "test")
_FOLDERS = {  # names that a domain's folder goes by, the first being ours
    "mnist": ("MNIST",),
    "svhn": ("SVHN",),
    "usps": ("USPS",),
    "synth_digits": ("SynthDigits", "synth_digits", "SYN", "syn", "synth"),
    "mnist_m": ("MNIST_M", "mnist_m", "MNIST-M", "MNISTM"),
}
_LOOKED_FOR = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte (torchvision's folder)",
    "svhn": "SVHN/train_32x32.mat and test_32x32.mat",
    "usps": "USPS/usps.bz2 and usps.t.bz2",
    "synth_digits": "SynthDigits/synth_train_32x32.mat and synth_test_32x32.mat",
    "mnist_m": "MNIST_M/mnist_m.tar.gz, MNIST_M/mnist_m_train with mnist_m_train_labels.txt, or "
    "MNIST_M/train/DIGIT/x.png",
}
_DOWNLOADS = ("mnist", "svhn", "usps")


def digits5(
    root: Path,
    draw: ClientDraw | None,
    *,
    cache_dir: Path,
    domains: Sequence[str] = DOMAINS,
    max_per_domain: int | None = None,
    download: bool = False,
    allow_pickle: bool = False,
) -> Scenario:
    """Open the domains; the client has 1,000 images of MNIST, or of the first, unless told.

    Args:
        root: Folder of the data sets.
        draw: Which images the client has; None for a client elsewhere.
        cache_dir: Where images of packed files are kept, unpacked.
        domains: Which of `DOMAINS`, in the pool's order.
        max_per_domain: Training images of each domain at most; None for all.
        download: Fetch what is missing of those that torchvision can fetch.
        allow_pickle: Read FedBN's pickles where there are some, instead of other files.

    Raises:
        ValueError: One line: an unknown domain, files that are missing or damaged, or a client
            that they do not hold.
    """
    _check_names(domains)
    if download:
        _fetch(root, [name for name in domains if name in _DOWNLOADS], allow_pickle, cache_dir)
    found = {name: _find(name, root, allow_pickle, cache_dir) for name in domains}
    default = ClientDraw(domain="mnist" if "mnist" in domains else domains[0], at_most=DEFAULT_SIZE)
    measured = None if draw is None else draw.domain or default.domain
    opened = []
    for name in domains:
        test = _open(name, root, found, "test") if name == measured else None
        domain = Domain(name, _open(name, root, found, "train"), test)
        opened.append(limited(domain, max_per_domain))
    return domain_scenario("digits5", opened, DIGITS, draw, default=default)


def _check_names(domains: Sequence[str]) -> None:
    if not domains:
        raise ValueError(f"data.domains is empty: name some of {', '.join(DOMAINS)}")
    for name in domains:
        if name not in DOMAINS:
            raise ValueError(
                f"data.domains: no domain {name!r}{nearest(name, DOMAINS)} (there are: "
                f"{', '.join(DOMAINS)})"
            )
        if list(domains).count(name) > 1:
            raise ValueError(f"data.domains names {name!r} twice")


# --- where the files are ---


@dataclass(frozen=True)
class _Files:
    """Files of a domain: where, and what makes a source of a split."""

    where: Path
    open: Callable[[str], PoolSource]
    is_refused: bool = False


def _find(name: str, root: Path, allow_pickle: bool, cache_dir: Path) -> _Files | None:
    pickles = next((p for p in _places(name, root) if (p / "partitions").is_dir()), None)
    if pickles is not None and allow_pickle:
        return _Files(pickles, partial(_from_pickles, name, pickles, cache_dir=cache_dir))
    files = _FINDERS[name](name, root, cache_dir)
    if files is None and pickles is not None:
        return _Files(pickles, partial(_from_pickles, name, pickles, cache_dir=cache_dir), True)
    return files


def _places(name: str, root: Path) -> Iterator[Path]:
    """Folders that may hold a domain's files: of its own, or the root for all."""
    for base in (root, root / "digit_dataset"):  # which is what FedBN's archive unpacks to
        yield from (base / folder for folder in _FOLDERS[name] if (base / folder).is_dir())
    yield root


def _holding(name: str, root: Path, files: Sequence[str]) -> Path | None:
    """The first folder with any of these files: if one is there, the others belong there."""
    places = _places(name, root)
    return next((p for p in places if any((p / file).exists() for file in files)), None)


def _open(name: str, root: Path, found: dict[str, _Files | None], split: str) -> PoolSource:
    files = found[name]
    if files is None:
        there = [other for other in found if found[other] is not None]
        hint = "docs/datasets.md says where to get it"
        if name in _DOWNLOADS:
            hint = "data.download=true fetches it"
        hint += f"; data.domains=[{','.join(there)}] goes without" if there else ""
        raise ValueError(
            f"data=digits5: no {name} in {str(root)!r}: looked for {_LOOKED_FOR[name]}; {hint}"
        )
    if files.is_refused:
        raise ValueError(
            f"data=digits5: {name} in {str(files.where)!r} is in pickles, a format that can hide "
            "programs: data.allow_pickle=true reads them, arrays only, if you trust their origin"
        )
    try:
        return files.open(split)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        reason = re.sub(r" \(looked in .*\)$", "", reason)  # said better below
        raise ValueError(
            f"data=digits5: the {split} part of {name} in {str(files.where)!r} cannot be read: "
            f"{reason}; if it is damaged or half there, remove it and get it again "
            + ("(data.download=true)" if name in _DOWNLOADS else "(docs/datasets.md)")
        ) from error


# --- one finder for each domain ---


def _mnist(name: str, root: Path, cache_dir: Path) -> _Files | None:
    place = next((p.parent for p in _places(name, root) if (p / "raw").is_dir()), None)
    if place is None:
        return None
    return _Files(place / "MNIST", lambda split: _of_torchvision("MNIST", place, split))


def _usps(name: str, root: Path, cache_dir: Path) -> _Files | None:
    place = _holding(name, root, ["usps.bz2", "usps.t.bz2"])
    if place is None:
        return None
    return _Files(place, lambda split: _of_torchvision("USPS", place, split))


def _of_torchvision(kind: str, place: Path, split: str) -> PoolSource:
    return torchvision_pool(kind, {"root": str(place), "split": split})


def _mat(name: str, root: Path, cache_dir: Path) -> _Files | None:
    prefix, title = ("", "SVHN") if name == "svhn" else ("synth_", "SynthDigits")
    files = {split: f"{prefix}{split}_32x32.mat" for split in _SPLITS}
    place = _holding(name, root, list(files.values()))
    if place is None:
        return None

    def opened(split: str) -> PoolSource:
        path = place / files[split]
        return _unpacked(f"{title}/{split}", [path], partial(read_mat, path), cache_dir)

    return _Files(place, opened)


def _mnist_m(name: str, root: Path, cache_dir: Path) -> _Files | None:
    places = [*_places(name, root)]
    places += [place / "mnist_m" for place in places]  # unpacked within a folder of that name
    for place in places:
        for archive in ("mnist_m_{}.tar.gz", "mnist_m.tar.gz"):
            if (place / archive.format("train")).is_file():
                return _Files(place, partial(_mnist_m_of_tar, place / archive, cache_dir))
        if (place / "mnist_m_train").is_dir():
            return _Files(place, partial(_mnist_m_of_list, place, cache_dir))
        for folders in (("train", "test"), ("training", "testing"), ("trainset", "testset")):
            if place != root and (place / folders[0]).is_dir():
                return _Files(place, partial(_class_folders, place, folders))
    return None


def _mnist_m_of_tar(archive: Path, cache_dir: Path, split: str) -> PoolSource:
    path = Path(str(archive).format(split))
    read = partial(read_mnist_m_tar, path, split)
    return _unpacked(f"MNIST_M/{split}", [path], read, cache_dir)


def _mnist_m_of_list(place: Path, cache_dir: Path, split: str) -> PoolSource:
    images, labels = place / f"mnist_m_{split}", place / f"mnist_m_{split}_labels.txt"
    files = [labels, *sorted(images.iterdir())]
    read = partial(read_mnist_m_folder, images, labels)
    return _unpacked(f"MNIST_M/{split}", files, read, cache_dir)


def _class_folders(place: Path, folders: tuple[str, str], split: str) -> PoolSource:
    source = scan_folder(place / folders[_SPLITS.index(split)])
    strange = {label for label in source.labels if label not in DIGITS}
    if strange:
        raise ValueError(f"a class folder is called {min(map(str, strange))!r}, which is no digit")
    return source


_FINDERS: dict[str, Callable[[str, Path, Path], _Files | None]] = {
    "mnist": _mnist,
    "svhn": _mat,
    "usps": _usps,
    "synth_digits": _mat,
    "mnist_m": _mnist_m,
}


def _from_pickles(name: str, place: Path, split: str, *, cache_dir: Path) -> PoolSource:
    paths = partitions_in(place) if split == "train" else [place / "test.pkl"]
    title = f"FedBN_{_FOLDERS[name][0]}/{split}"
    return _unpacked(title, paths, partial(read_pickles, paths), cache_dir)


def _unpacked(
    title: str, files: Sequence[Path], read: Callable[[], Arrays], cache_dir: Path
) -> PoolSource:
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    return array_pool(title, files, read, DIGITS, cache_dir=cache_dir)


# --- downloads ---


def _fetch(root: Path, names: Sequence[str], allow_pickle: bool, cache_dir: Path) -> None:
    """Fetch files with torchvision's addresses and checksums; those that are right stay."""
    from torchvision import datasets
    from torchvision.datasets.utils import download_url

    for name in names:
        if allow_pickle and any((p / "partitions").is_dir() for p in _places(name, root)):
            continue
        try:
            with one_at_a_time(cache_dir / "downloads.lock", f"another process fetches {name}"):
                if name == "mnist":
                    datasets.MNIST(root, download=True)
                    continue
                kind = {"svhn": datasets.SVHN, "usps": datasets.USPS}[name]
                files = [kind.split_list[split] for split in _SPLITS]
                place = _holding(name, root, [file for _, file, _ in files])
                for url, file, checksum in files:
                    download_url(url, place or root / _FOLDERS[name][0], file, md5=checksum)
        except MemoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"data=digits5: {name} cannot be downloaded into {str(root)!r}: {reason}"
            ) from error
