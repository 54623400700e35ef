"""Pools by name: what `data.pool=` and a pool file may say.

    photos/                                   a folder of images
    shards/{000..199}.tar                     tar shards (WebDataset's), a glob or folder of them
    torchvision:MNIST?root=data&split=train   a data set of torchvision's
    hf:prints?split=train                     a Hugging Face data set on disk
    pools.yaml                                a pool file: several of the above

A pool file is a list; paths in it are relative to the file:

    - name: prints            # begins the images' ids; needed
      licence: CC-BY-4.0      # any text, best an SPDX identifier; "unknown" if left out
      images: prints/         # one of the kinds above
    - name: digits
      images: torchvision:MNIST
      options: {root: data, split: train}    # the same as ?root=data&split=train
      embeddings: digits.npy  # made elsewhere by the same encoder
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

from datamodules.several_pools import SeveralPools
from ecos_pl.images import IMAGE_EXTENSIONS, PoolSource

_KEYS = ("name", "licence", "license", "images", "options", "embeddings")
_SCHEMES = ("torchvision", "hf")


@dataclass(frozen=True)
class PoolEntry:
    """One entry of a pool file.

    Attributes:
        name: Begins the ids of its images.
        licence: Under which terms the images may be used; None where it does not say.
        images: Where they are, relative to the pool file's folder.
        options: Those of its kind of pool, as text.
        embeddings: File or folder of embeddings made elsewhere, absolute; None if there is none.
    """

    name: str
    licence: str | None
    images: str
    options: Mapping[str, str]
    embeddings: Path | None


def open_pool(spec: str, *, cache_dir: Path, licence: str | None = None) -> PoolSource:
    """Open the pool that `spec` names; see the top of this file.

    Args:
        spec: Paths in it are relative to the present folder.
        cache_dir: Where listings and indices are kept.
        licence: Of the images; in a pool file, of those pools that state none.

    Raises:
        ValueError: One line: it is not there, holds no images, or is written wrongly.
    """
    if not _is_pool_file(spec):
        return _open_one(spec, {}, Path.cwd(), cache_dir, licence)
    path = Path(os.path.abspath(os.path.expanduser(spec)))
    pools = []
    for entry in read_pool_file(path):
        terms = entry.licence or licence
        try:
            source = _open_one(entry.images, entry.options, path.parent, cache_dir, terms)
        except ValueError as error:
            raise ValueError(f"{path}, pool {entry.name!r}: {error}") from error
        pools.append((entry.name, terms, source))
    return SeveralPools(pools)


def embeddings_of(spec: str) -> dict[str, Path]:
    """Embeddings made elsewhere that a pool file names, by name of the pool; else none.

    Raises:
        ValueError: One line: see `read_pool_file`.
    """
    if not _is_pool_file(spec):
        return {}
    entries = read_pool_file(Path(os.path.abspath(os.path.expanduser(spec))))
    return {entry.name: entry.embeddings for entry in entries if entry.embeddings is not None}


def folders_of(spec: str) -> list[Path]:
    """Folders of images that a pool's name speaks of, absolute: a client must not lie in one.

    Those of image folders and Hugging Face data sets; shards hold files of nobody else.

    Raises:
        ValueError: One line: see `read_pool_file`.
    """
    if _is_pool_file(spec):
        path = Path(os.path.abspath(os.path.expanduser(spec)))
        places = [(path.parent, entry.images) for entry in read_pool_file(path)]
    else:
        places = [(Path.cwd(), spec)]
    found = []
    for base, images in places:
        scheme, colon, rest = images.partition(":")
        if not (colon and scheme in _SCHEMES):
            folder = _under(base, images)
            found += [folder] if folder.is_dir() and not _is_of_shards(str(folder)) else []
        elif scheme == "hf":
            found.append(_under(base, _query(images, rest, {})[0]))
    return found


def named_pool(spec: str) -> tuple[str, str, dict[str, str]] | None:
    """Kind, name and options of `torchvision:NAME?…` or `hf:FOLDER?…`; None for a path.

    Raises:
        ValueError: One line: the options are written wrongly.
    """
    scheme, colon, rest = spec.partition(":")
    if not (colon and scheme in _SCHEMES):
        return None
    return scheme, *_query(spec, rest, {})


def read_pool_file(path: Path) -> list[PoolEntry]:
    """Read a pool file; no pool is opened.

    Raises:
        ValueError: One line: the file is missing, no list of pools, or an entry has an unknown
            key, lacks one, or names embeddings that are not there.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ValueError(f"no pool file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read pool file {str(path)!r}{where}: {problem}") from error
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise ValueError(f"pool file {str(path)!r} must be a list of pools: - name: … images: …")
    entries = [_entry(path, node) for node in root.value]
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path}: two pools are called {name!r}")
    return entries


# --- the pool file ---


def _entry(path: Path, node: yaml.Node) -> PoolEntry:
    where = f"{path}, line {node.start_mark.line + 1}"
    fields = _plain(path, node)
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a pool, as in - name: … images: …")
    for key in fields:
        if key not in _KEYS:
            near = get_close_matches(key, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"a pool has {', '.join(_KEYS)}"
            raise ValueError(f"{where}: unknown key {key!r}: {hint}")
    options = fields.pop("options", None) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{where}: options must be written as {{option: value}}")
    for key, value in (*fields.items(), *options.items()):
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key} must be one text")
    for key in ("name", "images"):
        if not fields.get(key):
            raise ValueError(f"{where}: a pool needs a value for {key!r}")
    if "licence" in fields and "license" in fields:
        raise ValueError(f"{where}: write either licence or license")
    if _is_pool_file(fields["images"]):
        raise ValueError(f"{where}: a pool file cannot list another one: copy its entries")
    licence = " ".join((fields.get("licence") or fields.get("license") or "").split())
    embeddings = None
    if fields.get("embeddings"):
        embeddings = _under(path.parent, fields["embeddings"])
        if not embeddings.exists():
            raise ValueError(f"{where}: embeddings {str(embeddings)!r} are not there")
    return PoolEntry(fields["name"], licence or None, fields["images"], options, embeddings)


def _plain(path: Path, node: yaml.Node) -> Any:
    """A node as dicts, lists and text: numbers and words as `no` stay as they are written."""
    if isinstance(node, yaml.ScalarNode):
        is_null = node.tag == "tag:yaml.org,2002:null"
        return "" if is_null else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(path, item) for item in node.value]
    fields: dict[str, Any] = {}
    assert isinstance(node, yaml.MappingNode)
    for key, value in node.value:
        name = str(key.value)
        if name in fields:
            raise ValueError(f"{path}, line {key.start_mark.line + 1}: {name!r} stands there twice")
        fields[name] = _plain(path, value)
    return fields


def _is_pool_file(spec: str) -> bool:
    return spec.endswith((".yaml", ".yml"))


# --- one pool ---


def _open_one(
    spec: str, options: Mapping[str, str], base: Path, cache_dir: Path, licence: str | None
) -> PoolSource:
    """Open a pool of one kind; `base` is what paths are relative to."""
    scheme, colon, rest = spec.partition(":")
    if colon and scheme in _SCHEMES:
        place, given = _query(spec, rest, options)
        if scheme == "torchvision":
            from datamodules.torchvision_pool import torchvision_pool

            return torchvision_pool(place, given, base=base, licence=licence)
        from datamodules.huggingface_pool import huggingface_pool

        folder = _under(base, place)
        return huggingface_pool(folder, given, cache_dir=cache_dir, licence=licence)
    _check_is_a_path(spec, scheme, base)
    if options:
        raise ValueError(f"pool {spec!r} takes no options ({', '.join(options)})")
    path = "::".join(str(_under(base, part)) for part in spec.split("::"))
    if _is_of_shards(path):
        from datamodules.tar_shards import open_tar_shards

        return open_tar_shards(path, cache_dir=cache_dir, licence=licence)
    from datamodules.folder_pool import open_folder_pool

    return open_folder_pool(Path(path), cache_dir=cache_dir, licence=licence)


def _query(spec: str, rest: str, options: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """What stands before `?option=value&…`, and the options from there and elsewhere."""
    place, mark, query = rest.partition("?")
    if mark and "=" not in query:  # a question mark in a folder's name
        place, query = rest, ""
    if not place:
        raise ValueError(f"pool {spec!r} does not say which: {spec.partition(':')[0]}:NAME")
    given = dict(options)
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"pool {spec!r}: expected option=value, not {pair!r}")
        if key in given:
            raise ValueError(f"pool {spec!r}: option {key!r} is given twice")
        given[key] = unquote(value)
    return place, given


def _check_is_a_path(spec: str, scheme: str, base: Path) -> None:
    if not spec.strip():
        raise ValueError("no pool is named: give a folder, or see datamodules/pool_spec.py")
    if re.match(r"[A-Za-z][\w+.-]*://", spec):
        raise ValueError(
            f"pool {spec!r}: pools are read from a disk that this machine has mounted; copy or "
            "mount it"
        )
    if ":" in spec and not _under(base, spec).exists():
        near = get_close_matches(scheme.lower(), _SCHEMES, n=1)
        if near:
            raise ValueError(f"pool {spec!r}: did you mean {near[0]}:{spec.partition(':')[2]}?")


def _under(base: Path, path: str) -> Path:
    return Path(os.path.abspath(base / os.path.expanduser(path)))


def _is_of_shards(spec: str) -> bool:
    """Shards by name, or a folder whose first folder with files has shards and no images.

    The walk ends there: a folder of a million images is not listed to learn that it has no shards.
    """
    if spec.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.zst")) or "::" in spec:
        return True
    for _, folders, names in os.walk(spec):
        folders.sort()
        kinds = {os.path.splitext(name.lower())[1] for name in names if not name.startswith(".")}
        if kinds.intersection(IMAGE_EXTENSIONS):
            return False
        if ".tar" in kinds:
            return True
    return False
