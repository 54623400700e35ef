"""Which images one WebDataset shard holds and where in the file, without reading them.

Imports no torch: many processes start to run this.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from typing_extensions import Self

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm")
MAX_TEXT = 1 << 20  # bytes; a longer .json or .cls is not looked into
_LABEL_FIELDS = ("label", "class_name", "class", "cls")
_META = re.compile(r"__[^/]*__($|/)")  # what the webdataset package leaves out, too
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


@dataclass
class Sample:
    """Files with one key: an image, and what says something about it.

    Attributes:
        key: Path up to the first dot of the file's name.
        member: The image's path in the shard; empty if the sample has none.
        offset: Where the image's bytes begin in the shard.
        size: The image's bytes.
        texts: Contents of its `cls`, `json` and `txt`.
        extensions: Of all its files.
        has_twins: Two of them have the same.
    """

    key: str
    member: str = ""
    offset: int = 0
    size: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)
    extensions: set[str] = field(default_factory=set)
    has_twins: bool = False


@dataclass(frozen=True)
class ScannedShard:
    """What a shard holds: one row per sample that has an image, in the order of the file.

    Attributes:
        members: [n] images' paths in the shard.
        offsets: [n] bytes before each image.
        sizes: [n] bytes of each image.
        labels: [n] class name or number, as text; None where the shard does not say.
        domains: [n] domain name; None where the shard does not say.
        damage: One line; None if the shard is whole.
    """

    members: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[str | None]
    domains: list[str | None]
    damage: str | None


def scan_shard(path: Path) -> ScannedShard:
    """Go through a shard's headers.

    A sample's label is the content of its `.cls`, else the field `label`, `class_name`, `class` or
    `cls` of its `.json`, else a whole number in its `.txt` (other texts are captions). Its domain
    is the field `domain` of its `.json`. Of several images in a sample the first counts. Members
    after a damaged header are out of reach, those before it are used.

    Raises:
        ValueError: One line: the shard is compressed, cannot be opened, or has a key twice.
    """
    found = ScannedShard([], [], [], [], [], None)
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            _refuse_compressed(path, file.read(8))
            length = os.fstat(file.fileno()).st_size
            file.seek(0)
            members = _Members(file, length)
            for sample in _samples(members, file):
                if sample.key in seen or sample.has_twins:
                    raise ValueError(
                        f"shard {str(path)!r} has key {sample.key!r} in two places: keys must be"
                        " unique, and a sample's files next to one another (tar --sort=name)"
                    )
                seen.add(sample.key)
                if sample.member:
                    label, domain = _label_and_domain(sample.texts)
                    found.members.append(sample.member)
                    found.offsets.append(sample.offset)
                    found.sizes.append(sample.size)
                    found.labels.append(label)
                    found.domains.append(domain)
            return replace(found, damage=members.damage)
    except OSError as error:
        raise ValueError(f"cannot read shard {str(path)!r}: {error.strerror}") from error


class _MemberInfo(tarfile.TarInfo):
    """Reads plain headers of plain files a few times faster than `tarfile`, all others with it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """See `tarfile.TarInfo.frombuf`."""
        number, checksum = _octal(buf[124:136]), _octal(buf[148:156])
        if (
            len(buf) != tarfile.BLOCKSIZE
            or buf[156:157] != tarfile.REGTYPE
            or number is None
            or checksum != sum(buf) - sum(buf[148:156]) + 8 * ord(" ")  # itself counts as spaces
        ):
            return super().frombuf(buf, encoding, errors)
        member = cls(buf[:100].partition(b"\0")[0].decode(encoding, errors))
        if buf[345]:
            prefix = buf[345:500].partition(b"\0")[0].decode(encoding, errors)
            member.name = f"{prefix}/{member.name}"
        member.size = number
        return member


def _octal(field: bytes | bytearray) -> int | None:
    """A header's number if it is written in the usual way."""
    digits = field.partition(b"\0")[0].strip()
    return int(digits, 8) if digits.isdigit() and not digits.strip(b"01234567") else None


class _Members:
    """The regular files of a tar archive that are whole; `damage` says why there are no more."""

    def __init__(self, file: Any, length: int) -> None:
        self._file, self._length = file, length
        self.damage: str | None = None

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        try:
            archive = tarfile.TarFile(
                fileobj=self._file, tarinfo=_MemberInfo, errors="surrogateescape"
            )
            while (member := archive.next()) is not None:
                archive.members = []  # else it keeps every member it has seen
                if not member.isreg() or member.issparse():  # of sparse ones, not all is there
                    continue
                if not 0 <= member.size <= self._length - member.offset_data:
                    self.damage = f"it ends within {member.name!r}"
                    return
                yield member
            end = archive.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:  # all from damaged headers
            self.damage = " ".join(str(error).split())
            return
        # tarfile takes a damaged header for the end; the real one is zeros, or nothing at all.
        self._file.seek(end)
        block = self._file.read(tarfile.BLOCKSIZE)
        if any(block) or 0 < len(block) < tarfile.BLOCKSIZE:
            self.damage = f"a damaged header at byte {end:,} of {self._length:,}"


def _samples(members: _Members, file: Any) -> Iterator[Sample]:
    """Group neighbours with the same key."""
    sample: Sample | None = None
    for member in members:
        key, extension = split_key(member.name)
        if not key:
            continue
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key)
        sample.has_twins |= extension in sample.extensions
        sample.extensions.add(extension)
        if extension in IMAGES and not sample.member:
            sample.member, sample.offset, sample.size = (
                member.name,
                member.offset_data,
                member.size,
            )
        elif extension in ("cls", "json", "txt") and member.size <= MAX_TEXT:
            file.seek(member.offset_data)
            sample.texts[extension] = file.read(member.size)
    if sample is not None:
        yield sample


def split_key(name: str) -> tuple[str, str]:
    """Split a member's path at the first dot of the file's name, as WebDataset does.

    The extension is in lower case. The key is empty for what belongs to no sample: hidden files,
    files without an extension, and names in double underscores.

    >>> split_key("train/a.b/cat_7.seg.PNG")
    ('train/a.b/cat_7', 'seg.png')
    """
    folder, slash, basename = name.rpartition("/")
    stem, dot, extension = basename.partition(".")
    if not stem or not dot or (name.startswith("__") and _META.match(name)):
        return "", ""
    return f"{folder}{slash}{stem}", extension.lower()


def _label_and_domain(texts: dict[str, bytes]) -> tuple[str | None, str | None]:
    fields = _json_object(texts.get("json", b""))
    named = [fields[name] for name in _LABEL_FIELDS if name in fields]
    in_json = [str(value) for value in named if type(value) in (str, int)]
    in_cls = texts.get("cls", b"").decode(errors="replace").strip()
    in_txt = texts.get("txt", b"").strip()
    label = in_cls or (in_json and in_json[0].strip()) or (in_txt.isdigit() and in_txt.decode())
    domain = fields.get("domain")
    return label or None, domain if isinstance(domain, str) and domain else None


def _json_object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content) if content else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _refuse_compressed(path: Path, start: bytes) -> None:
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise ValueError(
                f"shard {str(path)!r} is compressed ({name}): one cannot seek in it; unpack it to"
                " a plain .tar (its images are compressed already)"
            )
