import contextlib
import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecos_pl.pool_index import IdTable, PoolIndex, open_index, write_index

ODD = [
    "",
    "a b",
    "line\nbreak",
    "naïve/ü.png",
    "日本/猫.jpg",
    "tab\t",
    "'\"",
    "\0",
    "🙂" * 50,
    "a" * 999,
]
NAMES = ["cat", None, "dog", "cat", "日本", None, "", "cat", "dog", "x"]


def make(folder: Path, ids=ODD, labels=NAMES) -> PoolIndex:
    with write_index(folder, ("size", "offset")) as writer:
        for start in range(0, len(ids), 4):  # in blocks that do not divide the whole
            part = ids[start : start + 4]
            numbers = np.arange(start, start + len(part))
            writer.add(part, labels[start : start + 4], size=numbers * 2, offset=numbers - 2**40)
        writer.facts["fingerprint"] = "ff"
    index = open_index(folder)
    assert index is not None
    return index


def test_rows_come_back(tmp_path: Path) -> None:
    index = make(tmp_path / "x")
    assert len(index) == len(index.ids) == len(index.labels) == len(ODD)
    assert list(index.ids) == ODD
    assert [index.ids[row] for row in range(-len(ODD), len(ODD))] == ODD * 2
    assert list(index.labels) == NAMES
    assert [index.labels[row] for row in range(-len(ODD), len(ODD))] == NAMES * 2
    assert list(index.domains) == [None] * len(ODD)
    assert index.labels.names == ["cat", "dog", "日本", "", "x"]
    assert index.labels.codes.tolist() == [0, -1, 1, 0, 2, -1, 3, 0, 1, 4]
    assert index.domains.names == []
    assert index.column("size").tolist() == list(range(0, 20, 2))
    assert index.column("offset")[3] == 3 - 2**40
    assert index.facts == {"fingerprint": "ff"}
    assert index.ids.index("tab\t") == 5
    assert "\0" in index.ids


@pytest.mark.parametrize(
    "where",
    [
        slice(None),
        slice(2, 5),
        slice(5, 2),
        slice(-3, None),
        slice(None, None, -1),
        slice(1, 99, 3),
    ],
)
def test_slices_are_those_of_a_list(tmp_path: Path, where: slice) -> None:
    index = make(tmp_path / "x")
    assert index.ids[where] == ODD[where]
    assert index.labels[where] == NAMES[where]


def test_rows_outside_are_refused(tmp_path: Path) -> None:
    index = make(tmp_path / "x")
    for column in (index.ids, index.labels):
        for row in (len(ODD), -len(ODD) - 1):
            with pytest.raises(IndexError):
                column[row]
        assert column[np.int64(3)] == column[3]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8")), st.none() | st.text(max_size=2))))
def test_any_text_comes_back(rows: list[tuple[str, str | None]]) -> None:
    ids, labels = [row[0] for row in rows], [row[1] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        index = make(Path(folder) / "x", ids, labels)
        assert list(index.ids) == index.ids[:] == ids
        assert list(index.labels) == index.labels[:] == labels


def test_a_table_is_pickled_as_a_path(tmp_path: Path) -> None:
    ids = [f"a rather long name for an image {number}" for number in range(10_000)]
    index = make(tmp_path / "x", ids, [None] * len(ids))
    for part in (index, index.ids, index.labels):
        content = pickle.dumps(part)
        assert len(content) < 500
        assert len(pickle.loads(content)) == len(ids)
    assert list(pickle.loads(pickle.dumps(index.ids))) == ids
    with multiprocessing.get_context("spawn").Pool(1) as worker:
        assert worker.apply(IdTable.__getitem__, (index.ids, 7)) == ids[7]


def test_many_rows_are_iterated_in_blocks(tmp_path: Path) -> None:
    ids = [f"{number:x}" for number in range(70_000)] + ["ü"]
    index = make(tmp_path / "x", ids, ids)
    assert list(index.ids) == list(index.labels) == ids


def test_a_failed_or_killed_build_leaves_nothing(tmp_path: Path) -> None:
    with contextlib.suppress(KeyError), write_index(tmp_path / "x") as writer:
        writer.add(["a"])
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    child = os.fork()
    if not child:
        with write_index(tmp_path / "x") as writer:
            writer.add(["a"])
            os._exit(9)
    os.waitpid(child, 0)
    assert open_index(tmp_path / "x") is None
    assert make(tmp_path / "x").ids[1] == "a b"


@pytest.mark.parametrize("name", ["ids", "ids.offsets", "labels", "labels.json", "size.column"])
def test_a_damaged_table_is_not_opened_and_is_replaced(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "x").folder
    whole = (folder / name).read_bytes()
    for damaged in (whole[:-1], whole + b"x", None):
        (folder / name).unlink()
        if damaged is not None:
            (folder / name).write_bytes(damaged)
        assert open_index(folder) is None
        assert list(make(folder).ids) == ODD


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"version": 0}', '{"version": 1, "columns": 3}']
)
def test_a_foreign_table_is_not_opened(tmp_path: Path, text: str) -> None:
    folder = make(tmp_path / "x").folder
    (folder / "index.json").write_text(text)
    assert open_index(folder) is None
    assert open_index(tmp_path / "nowhere") is None


def test_a_whole_table_stays(tmp_path: Path) -> None:
    first = make(tmp_path / "x")
    with write_index(tmp_path / "x") as writer:  # another process was quicker
        writer.add(["other"])
    assert list(first.ids) == list(make(tmp_path / "x").ids) == ODD


def test_names_that_are_not_utf_8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not UTF-8"), write_index(tmp_path / "x") as writer:
        writer.add([os.fsdecode(b"\xff.png")])
