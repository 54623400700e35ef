import hashlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ecos_pl.ledger import BudgetExceededError, Ledger, LedgerError
from ecos_pl.privacy import Release, epsilon_of

DELTA = 1e-5
COUNTS = Release("coverage_counts", 5.0, 1.0, one_coordinate=True)
HASH = hashlib.sha256(b"query").hexdigest()
ROOT = Path(__file__).parent.parent

CHILD = """
import os, sys, time
from ecos_pl.ledger import BudgetExceededError, Ledger, LedgerError
from ecos_pl.privacy import Release
release = Release("coverage_counts", 5.0, 1.0, one_coordinate=True)
ledger = Ledger.open(sys.argv[1], client_id="clinic")
"""


@pytest.fixture
def ledger(tmp_path):
    return Ledger.create(tmp_path / "budget.sqlite", client_id="clinic", wait_s=0.1)


def ask(ledger, query_id="q1", draw=lambda: os.urandom(16), **changes):
    limits = {"max_epsilon": 10.0, "delta": DELTA, **changes}
    return ledger.answer(query_id, limits.pop("sha256", HASH), COUNTS, draw, **limits)


def child(ledger, code):
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code, str(ledger.path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_replay_is_identical_and_free(ledger):
    first = ask(ledger)
    again = Ledger.open(ledger.path, client_id="clinic")
    assert ask(again) == ask(again, max_epsilon=0.01) == first
    assert again.releases() == [COUNTS]
    assert again.epsilon(DELTA) == epsilon_of([COUNTS], DELTA)


def test_same_id_with_other_content_refused(ledger):
    ask(ledger)
    with pytest.raises(LedgerError, match="asked before with another content"):
        ask(ledger, sha256=hashlib.sha256(b"other").hexdigest())
    assert len(ledger.releases()) == 1


def test_over_budget_refused_and_not_charged(ledger):
    limit = epsilon_of([COUNTS, COUNTS], DELTA)
    ask(ledger, "q1", max_epsilon=limit)
    ask(ledger, "q2", max_epsilon=limit)

    def never():
        raise AssertionError("drawn although refused")

    with pytest.raises(BudgetExceededError, match=r"over the limit of .* nothing was charged"):
        ask(ledger, "q3", never, max_epsilon=limit)
    assert len(ledger.releases()) == 2
    ask(ledger, "q3", max_epsilon=None)
    assert len(ledger.releases()) == 3


@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0])
def test_bad_limits_refused(ledger, bad):
    with pytest.raises((LedgerError, ValueError)):
        ask(ledger, max_epsilon=bad)
    with pytest.raises(ValueError, match="delta"):
        ask(ledger, delta=bad)
    for changes in ({"query_id": ""}, {"query_id": "a\nb"}, {"sha256": "abc"}):
        with pytest.raises(LedgerError):
            ask(ledger, **changes)
    assert ledger.releases() == []


def test_failed_draw_stays_charged(ledger):
    def fail():
        raise OSError("camera unplugged")

    with pytest.raises(OSError, match="camera"):
        ask(ledger, draw=fail)
    assert ledger.releases() == [COUNTS]
    with pytest.raises(LedgerError, match="a new query id must be asked"):
        ask(ledger)
    assert len(ask(ledger, "q2")) == 16
    assert ledger.releases() == [COUNTS, COUNTS]


def test_killed_while_drawing_stays_charged(ledger):
    code = """
def draw():
    print("drawing", flush=True)
    time.sleep(60)
ledger.answer("q1", "0" * 64, release, draw, max_epsilon=10.0, delta=1e-5)
"""
    with child(ledger, code) as process:
        assert process.stdout.readline() == "drawing\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    reopened = Ledger.open(ledger.path, client_id="clinic", wait_s=0.1)
    assert reopened.releases() == [COUNTS]
    with pytest.raises(LedgerError, match="charged but has no stored answer"):
        ask(reopened, sha256="0" * 64)


def test_two_processes_grant_exactly_the_budget(ledger):
    code = f"""
granted = 0
for index in range(6):
    try:
        ledger.answer(f"{{os.getpid()}}-{{index}}", "0" * 64, release, lambda: b"x",
                      max_epsilon={epsilon_of([COUNTS] * 7, DELTA)!r}, delta=1e-5)
        granted += 1
    except BudgetExceededError:
        pass
print(granted)
"""
    processes = [child(ledger, code), child(ledger, code)]
    granted = sum(int(process.communicate()[0]) for process in processes)
    assert granted == len(ledger.releases()) == 7


def test_the_same_query_in_two_threads_is_drawn_once(tmp_path):
    ledger = Ledger.create(tmp_path / "budget.sqlite", client_id="clinic", wait_s=20.0)
    draws = []

    def draw():
        draws.append(1)
        time.sleep(0.2)
        return os.urandom(16)

    with ThreadPoolExecutor(4) as pool:
        answers = set(pool.map(lambda _: ask(ledger, draw=draw), range(4)))
    assert len(answers) == len(draws) == len(ledger.releases()) == 1


def test_answer_that_cannot_be_stored_is_not_sent(ledger):
    def draw():
        ledger.path.unlink()
        return b"secret"

    with pytest.raises(LedgerError, match="no ledger at"):
        ask(ledger, draw=draw)


def test_create_never_overwrites(ledger):
    ask(ledger)
    with pytest.raises(LedgerError, match="never overwritten"):
        Ledger.create(ledger.path, client_id="clinic")
    assert len(ledger.releases()) == 1
    assert [entry.name for entry in ledger.path.parent.iterdir()] == ["budget.sqlite"]


def test_missing_refused(tmp_path):
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger.open(tmp_path / "none.sqlite", client_id="clinic")
    with pytest.raises(LedgerError, match="cannot create"):
        Ledger.create(tmp_path / "no" / "folder.sqlite", client_id="clinic")
    assert not (tmp_path / "none.sqlite").exists()


def test_other_clients_refused(ledger):
    with pytest.raises(LedgerError, match="belongs to another client"):
        Ledger.open(ledger.path, client_id="hospital")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "overwritten"])
def test_damaged_file_refused(ledger, damage):
    ask(ledger)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(
        {
            "empty": b"",
            "text": b"not a database " * 100,
            "cut": whole[: len(whole) // 2],
            "overwritten": whole[:4096] + b"\x07" * 4096 + whole[8192:],
        }[damage]
    )
    with pytest.raises(LedgerError, match="ledger"):
        Ledger.open(ledger.path, client_id="clinic")
    with pytest.raises(LedgerError, match="ledger"):
        ask(ledger, "q2")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE answers SET release = replace(release, '5.0', '9.0')",
        "UPDATE answers SET release = 'NaN'",
        "UPDATE answers SET query_sha256 = 'x'",
        "UPDATE meta SET format = 'ecos_pl ledger 999'",
        "DELETE FROM meta",
    ],
)
def test_changed_entries_refused(ledger, statement):
    ask(ledger)
    with sqlite3.connect(ledger.path) as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(LedgerError):
        ask(ledger, "q2")


def test_changed_answer_is_not_replayed(ledger):
    ask(ledger)
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("UPDATE answers SET payload = x'00'")
    connection.close()
    with pytest.raises(LedgerError, match="is damaged"):
        ask(ledger)


def test_locked_file_is_one_clear_line(ledger, monkeypatch):
    monkeypatch.setattr("ecos_pl.ledger._BUSY_TIMEOUT_S", 0.1)
    other = sqlite3.connect(ledger.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="cannot be used: database is locked"):
        ask(ledger)
    other.close()
    assert ledger.releases() == []
