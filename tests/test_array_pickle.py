"""Pickles of arrays come out equal whatever wrote them; everything else is refused."""

import os
import pickle

import numpy as np
import pytest

from datamodules.array_pickle import load_or_advise

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
FOUND = [
    (PIXELS, np.arange(5)),
    (np.array(["a/b.jpg", "c"], object), np.array(["bird", "owl"])),
    np.array([["a", "b"], ["c", "d"]], object),
    np.array([[1, 2], [3, None]], object),
    np.asfortranarray(PIXELS[..., 0]),
    np.array([1.5, -2], ">f4"),
    [np.str_("word"), np.int64(3), b"bytes", None, True],
    {"data": PIXELS, "labels": [1, 2], "mean": PIXELS.mean(0)},
]


def check_equal(found, expected):
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert (found == expected).all()
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            check_equal(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected)
        for one, other in zip(found, expected, strict=True):
            check_equal(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("expected", FOUND, ids=range(len(FOUND)))
def test_arrays_and_text_come_out_equal(tmp_path, expected, protocol):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(expected, protocol))
    check_equal(load_or_advise(path, advice="…"), expected)


def test_names_of_numpy_1_and_2_are_one(tmp_path):
    path, text = tmp_path / "x.pkl", pickle.dumps(PIXELS, 0).decode("latin1")
    here = "numpy._core" if "numpy._core" in text else "numpy.core"
    for name in ("numpy.core", "numpy._core"):
        path.write_bytes(text.replace(here, name).encode("latin1"))
        check_equal(load_or_advise(path, advice="…"), PIXELS)


def test_what_python_2_wrote_is_read(tmp_path):
    """There the bytes of an array are a plain string (opcode U), which Python 3 takes for text."""
    path = tmp_path / "x.pkl"
    path.write_bytes(
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85"
        b"U\x01b\x87Rq\x03(K\x01K\x06\x85cnumpy\ndtype\nq\x04U\x02u1K\x00K\x01\x87Rq\x05"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"U\x06\xc8\xc9\xca\xcb\xcc\xcdtb."
    )
    check_equal(load_or_advise(path, advice="…"), np.arange(200, 206, dtype=np.uint8))


class Command:
    def __reduce__(self):
        return os.system, ("touch was_here",)


class LyingDtype:
    """An array of addresses that says it is none: numpy would follow the addresses."""

    def __reduce__(self):
        state = (1, (1,), self.Dtype(), False, b"\0" * 8)
        return np.ndarray.__reduce__(np.zeros(1))[0], (np.ndarray, (0,), b"b"), state

    class Dtype:
        def __reduce__(self):
            return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)


@pytest.mark.parametrize(
    ("held", "named"),
    [
        (Command(), r"(posix|nt)\.system"),
        ([PIXELS, {"x": Command()}], r"\.system"),
        (np.array([Command()], object), r"\.system"),
        (LyingDtype(), "addresses in memory"),
        (np.zeros(2, [("a", "u1"), ("b", "O")]), "dtype"),
        (np.zeros(2, "M8[s]"), "dtype"),
        (slice(1, 2), "slice"),
    ],
)
def test_everything_else_is_refused_and_not_run(tmp_path, monkeypatch, held, named):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(held, 2))
    with pytest.raises(ValueError, match=named) as caught:
        load_or_advise(path, advice="…")
    assert "\n" not in str(caught.value)
    assert "x.pkl" in str(caught.value)
    assert not (tmp_path / "was_here").exists()


def test_what_is_damaged_or_missing_is_one_line_with_advice(tmp_path):
    path = tmp_path / "x.pkl"
    written = pickle.dumps((PIXELS, np.array(["a"], object)), 2)
    for content in (written[:-5], written[:60], b"", b"no pickle", b"\x80\x02]q\x00."[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no whole pickle") as caught:
            load_or_advise(path, advice="get it there")
        assert str(caught.value).endswith("get it there")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is not there; get it there"):
        load_or_advise(tmp_path / "none.pkl", advice="get it there")
