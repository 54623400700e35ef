"""What crosses between the parties: safetensors bytes with a JSON header, and nothing else.

Shapes: D encoder dimensions, d projected dimensions, R centroids, K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

VERSION = 1
MAX_BYTES = 256 * 2**20


class MessageError(ValueError):
    """A message that is damaged or not of the expected kind; nothing is charged for it."""


M = TypeVar("M", bound="Message")


@dataclass(frozen=True)
class Message:
    """Base of all messages: tensors and plain values of a dataclass, to bytes and back.

    A ``Tensor`` field travels as it is; every other field as JSON in the header. Bytes are the
    same for equal content, so their hash names a query.
    """

    kind: ClassVar[str]

    def to_bytes(self) -> bytes:
        """Serialise; non-finite numbers are refused with a ValueError."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := self._at(f), Tensor)}
        plain = {f.name: self._at(f) for f in fields(self) if f.name not in tensors}
        _check_types(type(self), {**plain, **tensors})
        header = {"kind": self.kind, "version": VERSION, **plain}
        text = json.dumps(header, sort_keys=True, allow_nan=False)
        return save({k: v.contiguous() for k, v in tensors.items()}, {"header": text})

    @classmethod
    def from_bytes(cls: type[M], content: bytes) -> M:
        """Parse and check kind, version, fields and finiteness.

        Raises:
            MessageError: Anything is not as it must be; the text is one line.
        """
        header, tensors = _parse(content, cls.kind)
        names = {f.name for f in fields(cls)}
        found = {**header, **tensors}
        odd = (set(found) ^ names) | (set(header) & set(tensors))
        if odd:
            wrong = ", ".join(map(repr, sorted(odd)))
            raise MessageError(f"{cls.kind}: missing, unknown or repeated fields: {wrong}")
        _check_types(cls, found)
        return cls(**found)

    def _at(self, field: Any) -> Any:
        return getattr(self, field.name)


@dataclass(frozen=True)
class Encoding:
    """How the client must embed its images before it answers: the public encoder, then a map.

    The client computes ``(encoder(image) - mean) @ components.T``.
    """

    encoder: dict[str, Any]
    encoder_fingerprint: str
    mean: Tensor  # [D] float16
    components: Tensor  # [d, D] float16

    def check_encoding(self) -> None:
        """Raise MessageError unless the shapes fit."""
        if self.mean.ndim != 1 or self.components.ndim != 2 or len(self.components) < 1:
            raise MessageError("the projection must be a mean [D] and components [d, D]")
        if self.components.shape[1] != len(self.mean):
            raise MessageError("the projection's mean and components differ in dimension")

    def project(self, embeddings: Tensor) -> Tensor:
        """Apply the map to embeddings [n, D]: [n, d] float32, each row on its own."""
        centred = embeddings.float() - self.mean.float()
        # Row by row: a matrix product may round a row differently with its place in the batch.
        components = self.components.float()
        # It may also do so with its place in memory, hence the copy.
        rows = [components @ row.clone() for row in centred]
        return torch.stack(rows) if rows else centred.new_empty(0, len(components))


@dataclass(frozen=True)
class CoverageQuery(Message, Encoding):
    """How many of your images lie nearest to each of these centroids?"""

    kind: ClassVar[str] = "coverage_query"
    centroids: Tensor  # [R, d] float16
    attempt: int

    def __post_init__(self) -> None:
        self.check_encoding()
        if self.centroids.ndim != 2 or self.centroids.shape[1] != len(self.components):
            raise MessageError("the centroids must be [R, d] with the projection's d")


@dataclass(frozen=True)
class CoverageAnswer(Message):
    """Noisy coverage counts, with what the client declares about their noise."""

    kind: ClassVar[str] = "coverage_answer"
    query_id: str
    noisy_counts: Tensor  # [R] int64
    noise_std: float
    sample_rate: float
    relation: str


@dataclass(frozen=True)
class PrototypeQuery(Message, Encoding):
    """What do your images of each class look like on average, in this space?"""

    kind: ClassVar[str] = "prototype_query"
    classes: list[str]
    clip_norm: float
    count_weight: float
    noise_multiplier: float
    attempt: int

    def __post_init__(self) -> None:
        self.check_encoding()


@dataclass(frozen=True)
class PrototypeAnswer(Message):
    """Noisy per-class feature sums and counts, in steps of the public grid."""

    kind: ClassVar[str] = "prototype_answer"
    query_id: str
    sums: Tensor  # [K, d] int64
    counts: Tensor  # [K] int64
    grid: float
    clip_norm: float
    count_weight: float
    noise_std: float
    sample_rate: float
    relation: str


def query_id_of(content: bytes) -> str:
    """The name of a query: the first half of its SHA-256, 32 hex digits."""
    return hashlib.sha256(content).hexdigest()[:32]


def kind_of(content: bytes) -> str:
    """Which kind of message some bytes hold."""
    return str(_parse(content, None)[0]["kind"])


def _parse(content: bytes, kind: str | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if len(content) > MAX_BYTES:
        raise MessageError(f"a message of {len(content):,} bytes exceeds the limit {MAX_BYTES:,}")
    try:
        tensors = load(content)
        length = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + length])["__metadata__"]
        header = json.loads(
            metadata["header"],
            parse_constant=_refuse,
            parse_float=_finite,
            object_pairs_hook=_without_duplicates,
        )
        if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
            raise ValueError("its header names no kind")
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise MessageError(f"not a readable message: {_one_line(error)}") from error
    if header.get("version") != VERSION:
        raise MessageError(f"message version {header.get('version')!r}, expected {VERSION}")
    if kind is None:
        return header, tensors
    if header.get("kind") != kind:
        raise MessageError(f"expected a {kind}, got a {header.get('kind')!r}")
    return {k: v for k, v in header.items() if k not in ("kind", "version")}, tensors


_TYPES: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "list[str]": (list,),
    "dict[str, Any]": (dict,),
}
_DTYPES = (torch.float16, torch.float32, torch.int64)


def _check_types(message: type[Message], values: dict[str, Any]) -> None:
    for field in fields(message):
        name, value, kind = field.name, values[field.name], str(field.type)
        items = value if isinstance(value, list) else []
        if (
            not isinstance(value, _TYPES[kind])
            or isinstance(value, bool)
            or not all(isinstance(item, str) for item in items)
            or (isinstance(value, Tensor) and value.dtype not in _DTYPES)
        ):
            raise MessageError(f"{message.kind}: {name} is not of type {kind}")
        if isinstance(value, Tensor) and not bool(value.isfinite().all()):
            raise MessageError(f"{message.kind}: {name} holds a value that is not finite")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse(text)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
