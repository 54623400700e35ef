import pickle
import sys

import numpy as np
import pytest

from ecos_pl.columns import Coded, Constant, Joined, Numbered, Span

COLUMNS = {
    "numbered": (Numbered("a/", 5), [f"a/{i:06d}" for i in range(5)]),
    "constant": (Constant(None, 3), [None] * 3),
    "coded": (Coded(["x", "y"], np.array([1, -1, 0])), ["y", None, "x"]),
    "joined": (
        Joined([Numbered("", 2), Constant("b", 0), ["c", "d"], Numbered("e", 1)]),
        ["000000", "000001", "c", "d", "e000000"],
    ),
    "span": (Span(["a", "b", "c", "d"], 1, 3), ["b", "c"]),
    "span of a column": (
        Span(Numbered("x", 9), 6, 9, str.upper),
        [f"X00000{i}" for i in (6, 7, 8)],
    ),
    "empty": (Joined([]), []),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_is_a_sequence(name):
    column, expected = COLUMNS[name]
    for same in (column, pickle.loads(pickle.dumps(column))):
        assert len(same) == len(expected)
        assert list(same) == expected
        assert [same[i] for i in range(len(expected))] == expected
        assert [same[np.int64(i - len(same))] for i in range(len(expected))] == expected
        for step in (None, 2, -1):
            for start in (None, 1, 3, -2):
                for stop in (None, 0, 2, 4, 99, -1):
                    part = slice(start, stop, step)
                    assert same[part] == expected[part]
    for wrong in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            column[wrong]
    if expected:
        assert expected[-1] in column
        assert column.index(expected[-1]) == expected.index(expected[-1])


def test_numbers_beyond_six_digits_stay_distinct():
    column = Numbered("", 10_000_000)
    assert (column[0], column[999_999], column[1_000_000]) == ("000000", "999999", "1000000")


def test_codes_of_many_names():
    names = [str(i) for i in range(40_000)]
    assert list(Coded(names, np.array([39_999, 0]))) == ["39999", "0"]


def test_iteration_goes_by_blocks():
    column = Joined([Numbered("x", 70_000), Span(Numbered("y", 140_000), 3, 140_000)])
    for place, value in enumerate(column):
        assert value == (f"x{place:06d}" if place < 70_000 else f"y{place - 69_997:06d}")
    assert place == len(column) - 1


def test_a_million_names_take_no_memory():
    column = Joined([Numbered("x/", 10**9), Constant("y", 10**9)])
    assert column[10**9 - 1] == "x/999999999"
    assert column[10**9] == "y"
    assert len(pickle.dumps(column)) < 1000
    assert sys.getsizeof(column) < 1000
