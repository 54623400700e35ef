import json
import math
import os
import subprocess
import sys

import pytest

from ecos_pl.storage import (
    committed_folder,
    fingerprint_of,
    read_json,
    write_bytes,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_and_leaves_no_litter(tmp_path):
    path = tmp_path / "deep" / "down" / "file.bin"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path, monkeypatch, step, error):
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    def fail(*args):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert read_json(path) == {"a": 1}
    assert names(tmp_path) == ["file.json"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_refused(tmp_path, value):
    path = tmp_path / "file.json"
    write_json(path, [1])
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": [value]})
    assert read_json(path) == [1]
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint_of([value])


def test_json_round_trip(tmp_path):
    content = {"ü": [1, 0.1, None, True, "a\nb\u2028 🦆"], "e": {}, "big": 2**70}
    write_json(tmp_path / "file.json", content)
    assert read_json(tmp_path / "file.json") == content


def test_json_is_utf_8_whatever_the_locale(tmp_path):
    write_json(tmp_path / "file.json", "ü")
    program = "import sys, pathlib, ecos_pl.storage as s; s.read_json(pathlib.Path(sys.argv[1]))"
    options = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning"]
    command = [sys.executable, *options, "-c", program, str(tmp_path / "file.json")]
    subprocess.run(command, check=True, timeout=60)


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00"])
def test_damaged_json_names_the_file(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.json cannot be read as JSON") as caught:
        read_json(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"absent\.json cannot be read as JSON"):
        read_json(tmp_path / "absent.json")


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "above" / "result"
    with committed_folder(path) as aside:
        (aside / "file").write_text("x")
        assert not path.exists()
    assert (path / "file").read_text() == "x"
    assert names(path.parent) == ["result"]
    assert path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_with_an_error_leaves_nothing(tmp_path, error):
    path = tmp_path / "result"
    with pytest.raises(error), committed_folder(path) as aside:  # noqa: PT012
        (aside / "file").write_text("half")
        raise error
    assert names(tmp_path) == []


def test_the_first_of_two_folders_stays(tmp_path):
    path = tmp_path / "result"
    with committed_folder(path) as late:
        (late / "file").write_text("late")
        with committed_folder(path) as early:
            (early / "file").write_text("early")
    assert (path / "file").read_text() == "early"
    assert names(tmp_path) == ["result"]


def test_a_file_in_the_way_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "result").write_text("mine")
    with pytest.raises(OSError), committed_folder(tmp_path / "result") as aside:  # noqa: PT011
        (aside / "file").write_text("x")
    assert (tmp_path / "result").read_text() == "mine"
    assert names(tmp_path) == ["result"]


def test_fingerprints():
    one = fingerprint_of({"a": 1, "b": {"c": [1, 2], "d": "ü"}})
    assert one == fingerprint_of({"b": {"d": "ü", "c": [1, 2]}, "a": 1})
    assert len(one) == 64
    assert int(one, 16) >= 0
    others = [
        {"a": 1, "b": {"c": [2, 1], "d": "ü"}},
        {"a": 1.5, "b": {"c": [1, 2], "d": "ü"}},
        {"a": 1, "b": {"c": [1, 2]}},
        json.dumps({"a": 1}),
    ]
    assert len({one, *map(fingerprint_of, others)}) == 5


WAITS = """
import sys
from pathlib import Path
from ecos_pl.storage import one_at_a_time
folder = Path(sys.argv[1])
with one_at_a_time(folder / "lock", "another has it"):
    print((folder / "done").exists())
"""


def test_one_process_at_a_time_and_one_that_is_killed_makes_way(tmp_path):
    def start(script):
        return subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    holds = WAITS.replace(
        "    print(", "    print('in', flush=True)\n    import time; time.sleep(600); ("
    )
    holder = start(holds)
    try:
        assert holder.stdout.readline() == "in\n"
        waiting = start(WAITS)
        assert waiting.stderr.readline() == "waiting: another has it\n"
        (tmp_path / "done").touch()
    finally:
        holder.kill()
        holder.communicate()
    assert waiting.communicate(timeout=60)[0] == "True\n"
