"""Columns of a pool that are worked out when asked: no list of a million strings."""

from __future__ import annotations

import operator
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

_BLOCK = 65_536  # values made at once by iteration


class Column(Sequence[T]):
    """A sequence that makes its values when they are asked for; a slice of it is a list."""

    @abstractmethod
    def value(self, place: int) -> T:
        """The value at 0 ≤ `place` < `len(self)`."""

    def block(self, start: int, stop: int) -> list[T]:
        """The values from `start` to `stop`, which may be faster than one by one."""
        return [self.value(place) for place in range(start, stop)]

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self.block(start, max(start, stop))
            return [self.value(place) for place in range(start, stop, step)]
        place = operator.index(index)  # numpy's integers too
        if place < 0:
            place += len(self)
        if not 0 <= place < len(self):
            raise IndexError(f"{index} is out of range for {len(self)} values")
        return self.value(place)

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), _BLOCK):
            yield from self.block(start, min(start + _BLOCK, len(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} values)"


class Numbered(Column[str]):
    """`prefix` and the place, padded to six digits or more.

    >>> Numbered("MNIST/train/", 60_000)[12]
    'MNIST/train/000012'
    """

    def __init__(self, prefix: str, num: int) -> None:
        self._prefix, self._num = prefix, num

    def __len__(self) -> int:
        return self._num

    def value(self, place: int) -> str:
        """See `Column`."""
        return f"{self._prefix}{place:06d}"


class Constant(Column[T]):
    """The same value everywhere: `None` for the labels of a pool that knows none."""

    def __init__(self, value: T, num: int) -> None:
        self._constant, self._num = value, num

    def __len__(self) -> int:
        return self._num

    def value(self, place: int) -> T:
        """See `Column`."""
        return self._constant


class Coded(Column["str | None"]):
    """Names by number; a number below 0 is no name.

    Args:
        names: What the numbers mean.
        codes: [N] integers, places in `names`.
    """

    def __init__(self, names: Sequence[str], codes: npt.NDArray[Any]) -> None:
        self._names = list(names)
        self._codes = codes.astype(np.int16 if len(self._names) < 2**15 else np.int32)

    def __len__(self) -> int:
        return len(self._codes)

    def value(self, place: int) -> str | None:
        """See `Column`."""
        code = int(self._codes[place])
        return self._names[code] if code >= 0 else None


class Span(Column[T]):
    """A run of another sequence, each value seen through a function.

    Args:
        whole: The other sequence.
        start: The place in it where this one begins.
        stop: The place after its last value.
        made: What to make of each value; None leaves it as it is.
    """

    def __init__(
        self, whole: Sequence[Any], start: int, stop: int, made: Callable[[Any], T] | None = None
    ) -> None:
        self._whole, self._start, self._num, self._made = whole, start, stop - start, made

    def __len__(self) -> int:
        return self._num

    def value(self, place: int) -> T:
        """See `Column`."""
        value: T = self._whole[self._start + place]
        return value if self._made is None else self._made(value)

    def block(self, start: int, stop: int) -> list[T]:
        """See `Column`."""
        values = self._whole[self._start + start : self._start + stop]
        return list(values if self._made is None else map(self._made, values))


class Picked(Column[T]):
    """Some values of another sequence, in the order asked.

    Args:
        whole: The other sequence.
        places: [n] integers, places in it.
    """

    def __init__(self, whole: Sequence[T], places: npt.NDArray[Any]) -> None:
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    def value(self, place: int) -> T:
        """See `Column`."""
        return self._whole[int(self._places[place])]


class Joined(Column[T]):
    """Sequences one after the other."""

    def __init__(self, columns: Sequence[Sequence[T]]) -> None:
        self._columns = list(columns)
        self._ends = list(accumulate(map(len, self._columns)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def value(self, place: int) -> T:
        """See `Column`."""
        number = bisect_right(self._ends, place)
        return self._columns[number][place - self._start(number)]

    def block(self, start: int, stop: int) -> list[T]:
        """See `Column`."""
        values: list[T] = []
        number = bisect_right(self._ends, start)
        while start + len(values) < stop:
            first = self._start(number)
            values += self._columns[number][max(start - first, 0) : stop - first]
            number += 1
        return values

    def _start(self, number: int) -> int:
        return self._ends[number - 1] if number else 0
