"""The form of a message: safetensors bytes with a strict JSON header.

No pickle anywhere on this road. safetensors refuses what is cut off, overlaps or has a huge header;
here follow what it lets through: NaN, numbers beyond range, names given twice, unknown fields.
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

from ecos_pl.envelope import MAX_BYTES, MessageError

VERSION = 2

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


def query_id_of(content: bytes) -> str:
    """The name of a query: the first half of its SHA-256, 32 hex digits."""
    return hashlib.sha256(content).hexdigest()[:32]


def kind_of(content: bytes) -> str:
    """Which kind of message some bytes hold."""
    return str(_parse(content, None)[0]["kind"])


def describe_message(content: bytes) -> list[str]:
    """A message's kind and fields, a line each: numbers in full, tensors by shape and range.

    Raises:
        MessageError: The bytes are no message.
    """
    header, tensors = _parse(content, None)
    lines = [f"{header.pop('kind')} (version {header.pop('version')})"]
    for name, value in header.items():
        parts = [f"{key}: {_shown(part)}" for key, part in value.items()] if _is_dict(value) else []
        for number, text in enumerate(parts or [_shown(value)]):
            lines.append(f"  {'' if number else name:20} {_printable(text)}")
    for name, tensor in tensors.items():
        shape = " × ".join(map(str, tensor.shape))
        span = f", {tensor.min():g} to {tensor.max():g}" if tensor.numel() else ""
        lines.append(f"  {name:20} {shape} {str(tensor.dtype)[6:]}{span}")
    return lines


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _printable(text: str) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)  # it goes to a terminal
    return text if len(text) <= 200 else text[:199] + "…"


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
        if type(value) is int and abs(value) >= 2**63:
            raise MessageError(f"{message.kind}: {name} is out of range")
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
