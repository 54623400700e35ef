"""Pickled NumPy arrays, read without running what else a pickle may hold.

FedBN (med-air/FedBN) and SplitMix hand out digits and path lists as pickled NumPy arrays, and
ImageNet-32 comes so too. A pickle is a program: it may call any function of any package. Here it
gets none but those below, which make arrays of numbers and text; not even NumPy's own, since
`dtype.__setstate__` believes whatever a file says of memory. Still an opt-in:
`data.allow_pickle=true`.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

Order = Literal["C", "F"]

_SIMPLE = re.compile(r"[biuf][1248]|b1|[US]\d+|O\d?")


def load_arrays(path: Path) -> Any:
    """What a pickle file holds: dicts, lists, tuples, text, numbers, and NumPy arrays of them.

    Text of Python 2 is read as Latin-1.

    Raises:
        ValueError: It names anything else.
        Exception: It is damaged; `pickle` and NumPy raise what they like.
    """
    with path.open("rb") as file:
        return _plain(_Unpickler(file, encoding="latin1").load())


def load_or_advise(path: Path, *, advice: str) -> Any:
    """As `load_arrays`, but whatever is wrong is one line (ValueError) that names the file.

    Args:
        path: The file.
        advice: How to get a whole one.
    """
    try:
        return load_arrays(path)
    except FileNotFoundError:
        raise ValueError(f"looked for {str(path)!r}: it is not there; {advice}") from None
    except _Refused as error:
        raise ValueError(f"{str(path)!r} is refused: {error}; do not open it elsewhere") from None
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{str(path)!r} is no whole pickle ({reason}); {advice}") from error


class _Refused(ValueError):
    """Something other than arrays and text."""

    def __init__(self, what: str) -> None:
        super().__init__(f"it names {what}, which is no part of an array: not run")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        module = module.replace("numpy._core", "numpy.core")  # as numpy 2 calls it
        found = _ALLOWED.get(f"{module}.{name}")
        if found is None:
            raise _Refused(f"{module}.{name}")
        return found


class _Dtype:
    """Stands for `numpy.dtype`: plain numbers, text and objects, without fields."""

    def __init__(self, text: str, *_: Any) -> None:
        if not isinstance(text, str) or not _SIMPLE.fullmatch(text):
            raise _Refused(f"numpy.dtype({text!r})")
        self._text, self._order = text, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, subarray, names, fields, *_rest = state
        if order not in ("<", ">", "|", "=") or (subarray, names, fields) != (None, None, None):
            raise _Refused("a numpy.dtype with fields")
        self._order = order

    @property
    def is_object(self) -> bool:
        return self._text.startswith("O")

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._order + self._text)


class _Array:
    """Stands for `numpy.ndarray` until all is read."""

    value: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        if not isinstance(dtype, _Dtype):
            raise _Refused("an unknown type")
        order: Order = "F" if is_fortran else "C"
        if dtype.is_object and isinstance(content, list):
            flat = np.empty(len(content), object)
            for place, item in enumerate(content):  # at once, lists would become rows
                flat[place] = item
            self.value = flat.reshape(shape, order=order)
        else:
            self.value = _from_bytes(content, dtype, shape, order)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_bytes(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: Order = "C") -> Any:
    """Also numpy's `_frombuffer`, of pickle protocol 5."""
    content = content.encode("latin1") if isinstance(content, str) else content
    if dtype.is_object:
        raise _Refused("addresses in memory")
    return np.frombuffer(content, dtype.dtype()).reshape(shape, order=order)


def _scalar(dtype: _Dtype, content: Any = b"") -> Any:
    return _from_bytes(content, dtype, (1,))[0].item()


def _encode(text: str, encoding: str) -> bytes:
    """How protocols below 3 write bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise _Refused(f"_codecs.encode(…, {encoding!r})")
    return text.encode("latin1")


_ALLOWED: Mapping[str, Callable[..., Any]] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray._reconstruct": _reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _from_bytes,
    "_codecs.encode": _encode,
}


def _plain(found: Any) -> Any:
    """The same with arrays where the stand-ins are."""
    if isinstance(found, _Array):
        return _plain(found.value)
    if isinstance(found, np.ndarray) and found.dtype == object:
        for place in np.ndindex(found.shape):
            found[place] = _plain(found[place])
        return found
    if isinstance(found, dict):
        return {key: _plain(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return type(found)(_plain(item) for item in found)
    if isinstance(found, _Dtype):
        return found.dtype()
    return found
