"""The ledger under real faults: killed processes, full disks, damaged and locked files."""

import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ecos_pl.accounting import epsilon_of
from ecos_pl.ledger import Ledger, LedgerError, QueryRefusedError
from ecos_pl.privacy import Release

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the faults are made the POSIX way")

DELTA = 1e-5
COUNTS = Release("coverage_counts", 5.0, 1.0, one_coordinate=True)
HASH = hashlib.sha256(b"query").hexdigest()
ROOT = Path(__file__).parent.parent

# What every child process starts with; argv: the ledger, then whatever the test adds.
CHILD = """
import errno, hashlib, json, os, resource, signal, sqlite3, sys
from ecos_pl.ledger import BudgetExceededError, Ledger, LedgerError, QueryRefusedError
from ecos_pl.privacy import Release

COUNTS = Release("coverage_counts", 5.0, 1.0, one_coordinate=True)

def ask(ledger, query_id, draw, max_epsilon=None):
    return ledger.answer(
        query_id, hashlib.sha256(b"query").hexdigest(), [COUNTS], draw,
        max_epsilon=max_epsilon, delta=1e-5, requester=f"process {os.getpid()}",
    )

def append(path, line):
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, (line + "\\n").encode())
    os.fsync(descriptor)
    os.close(descriptor)

def refusal(action):
    try:
        action()
    except LedgerError as error:
        assert "\\n" not in str(error)
        return f"{type(error).__name__}: {error}"
    raise AssertionError("not refused")

def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def ledger(tmp_path):
    return Ledger.create(tmp_path / "budget.sqlite", client_id="clinic", wait_s=0.05)


@pytest.fixture
def child():
    """Start a child process on `CHILD` and more code; none outlives the test."""
    started = []

    def start(code, *arguments, command=()):
        process = subprocess.Popen(
            [*command, sys.executable, "-c", CHILD + code, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def output(process):
    """Return what a child printed; its failure is the test's."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


def ask(ledger, query_id="q1", draw=lambda: os.urandom(16), max_epsilon=None):
    return ledger.answer(query_id, HASH, [COUNTS], draw, max_epsilon=max_epsilon, delta=DELTA)


def never():
    raise AssertionError("drawn although it must not be")


def reopen(ledger):
    return Ledger.open(ledger.path, client_id="clinic", wait_s=0.05)


# --- SIGKILL ---------------------------------------------------------------------------------

# The child kills itself at `step`: before or after the n-th time it runs the SQL statement, or
# around `draw`. An answer's write transactions are the charge (1) and the store (2). Its payload is
# larger than SQLite's cache, so that the store's death leaves a half-written file and a journal.
KILLED = """
path, drawn, when, statement, count = sys.argv[1:]
seen = 0

class Connection(sqlite3.Connection):
    writing = False

    def execute(self, sql, *arguments):
        global seen
        self.writing = self.writing or sql == "BEGIN IMMEDIATE"
        hit = self.writing and sql.startswith(statement)
        seen += hit
        hit = hit and seen == int(count)
        if hit and when == "before":
            die()
        cursor = super().execute(sql, *arguments)
        if hit and when == "after":
            die()
        return cursor

connect = sqlite3.connect
sqlite3.connect = lambda *args, **options: connect(*args, factory=Connection, **options)

def draw():
    if (when, statement) == ("before", "draw"):
        die()
    payload = os.urandom(4_000_000)
    append(drawn, hashlib.sha256(payload).hexdigest())
    if (when, statement) == ("after", "draw"):
        die()
    return payload

ask(Ledger.open(path, client_id="clinic"), "q2", draw)
print("returned")
"""


@pytest.mark.parametrize(
    ("when", "statement", "count", "charged", "drawn", "answered"),
    [
        ("after", "BEGIN IMMEDIATE", 1, False, False, False),
        ("before", "COMMIT", 1, False, False, False),
        ("after", "COMMIT", 1, True, False, False),
        ("before", "draw", 0, True, False, False),
        ("after", "draw", 0, True, True, False),
        ("before", "BEGIN IMMEDIATE", 2, True, True, False),
        ("before", "UPDATE answers", 1, True, True, False),
        ("before", "COMMIT", 2, True, True, False),
        ("after", "COMMIT", 2, True, True, True),
    ],
)
def test_killed_at_each_step(
    ledger, child, tmp_path, when, statement, count, charged, drawn, answered
):
    earlier = ask(ledger, "q1")
    note = tmp_path / "drawn"
    process = child(KILLED, ledger.path, note, when, statement, count)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (-signal.SIGKILL, "", "")
    journal = ledger.path.with_name(ledger.path.name + "-journal")
    if (when, statement, count) == ("before", "COMMIT", 2):
        assert ledger.path.stat().st_size > 1_000_000
        assert journal.stat().st_size > 0
        # Taken away without its journal, the half-written file must not pass for an earlier one.
        lone = tmp_path / "lone" / "budget.sqlite"
        lone.parent.mkdir()
        shutil.copy(ledger.path, lone)
        with suppress(LedgerError):
            assert len(Ledger.open(lone, client_id="clinic").entries()) == 2

    after = reopen(ledger)
    assert note.exists() == drawn
    assert charged or not drawn
    assert [entry.query_id for entry in after.entries()] == ["q1", "q2"][: 1 + charged]
    assert [entry.answered for entry in after.entries()] == [True, answered][: 1 + charged]
    assert after.epsilon(DELTA) == epsilon_of([COUNTS] * (1 + charged), DELTA)
    assert ask(after, "q1", never) == earlier

    # The retry: a first draw, a replay of what was stored, or a refusal; never a second draw.
    if answered:
        assert hashlib.sha256(ask(after, "q2", never)).hexdigest() == note.read_text().strip()
    elif charged:
        with pytest.raises(QueryRefusedError, match="q2 is charged but has no stored answer"):
            ask(after, "q2", never)
        ask(after, "q3")
    else:
        ask(after, "q2")
    assert len(reopen(ledger).entries()) == 2 + (charged and not answered)


@pytest.mark.slow
def test_killed_at_random_moments(ledger, child, tmp_path):
    code = """
ledger = Ledger.open(sys.argv[1], client_id="clinic")
for index in range(1_000_000):
    query_id = f"{os.getpid()}-{index}"
    payload = ask(ledger, query_id, lambda: os.urandom(5000))
    append(sys.argv[2], json.dumps([query_id, hashlib.sha256(payload).hexdigest()]))
    print(index, flush=True)
"""
    sent = tmp_path / "sent"
    for _ in range(15):
        process = child(code, ledger.path, sent)
        assert process.stdout.readline() == "0\n"
        time.sleep(random.uniform(0, 0.06))  # any moment will do
        process.kill()
        process.wait()
        reopen(ledger)

    after = reopen(ledger)
    lines = [json.loads(line) for line in sent.read_text().splitlines()]
    answered = {entry.query_id for entry in after.entries() if entry.answered}
    assert len(lines) >= 15
    assert {query_id for query_id, _ in lines} <= answered
    for query_id, digest in lines:
        assert hashlib.sha256(ask(after, query_id, never)).hexdigest() == digest
    # At most one answer per death was charged and not sent.
    assert len(lines) <= len(after.entries()) <= len(lines) + 15
    assert len(after.releases()) == len(after.entries())


# --- full disks ------------------------------------------------------------------------------


def test_file_size_limit(ledger, child):
    """Every write beyond the limit fails (EFBIG): first at the charge, then at the store."""
    ask(ledger, "q1")
    code = """
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger.open(sys.argv[1], client_id="clinic", wait_s=0.05)
size = os.path.getsize(sys.argv[1])

def never():
    raise AssertionError("drawn")

refused = []
for most in (0, 100, 600, 5000, 9000):  # of the journal: none, part of its header, some pages
    limit(most)
    refused.append(refusal(lambda: ask(ledger, "q2", never)))
    limit(resource.RLIM_INFINITY)
    assert [entry.query_id for entry in ledger.entries()] == ["q1"]

stored, again = [], []
for query_id, length in (("q2", 500_000), ("q3", 5_000_000)):  # fails in COMMIT, in UPDATE
    limit(size + 100_000)
    stored.append(refusal(lambda: ask(ledger, query_id, lambda: os.urandom(length))))
    again.append(refusal(lambda: ask(ledger, query_id, never)))
    limit(resource.RLIM_INFINITY)
print(json.dumps([refused, stored, again]))
"""
    refused, stored, again = json.loads(output(child(code, ledger.path)))
    for text in refused:
        assert "its disk is full, over a quota or failing; nothing was released" in text
    for query_id, text, next_text in zip(("q2", "q3"), stored, again, strict=True):
        assert f"Query {query_id} is charged; its answer could not be stored" in text
        assert f"QueryRefusedError: query {query_id} is charged but has no stored" in next_text
    assert [entry.answered for entry in reopen(ledger).entries()] == [True, False, False]
    ask(ledger, "q4")


IN_TMPFS = ("unshare", "--map-root-user", "--mount", "--")


def test_full_and_read_only_file_system(child, tmp_path):
    """A tmpfs that is really full, then mounted read-only; in a mount namespace of its own."""
    mount = f"mount -t tmpfs -o size=256k tmpfs {tmp_path}"
    if shutil.which("unshare") is None or shutil.which("mount") is None:
        pytest.skip("no unshare or mount on this machine")
    probe = subprocess.run([*IN_TMPFS, "sh", "-c", mount], capture_output=True)
    if probe.returncode:
        pytest.skip("mounting is not permitted here")

    code = """
import subprocess
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True)
path = os.path.join(folder, "budget.sqlite")
ledger = Ledger.create(path, client_id="clinic", wait_s=0.05)
first = ask(ledger, "q1", lambda: os.urandom(16))

def never():
    raise AssertionError("drawn")

stored = refusal(lambda: ask(ledger, "q2", lambda: os.urandom(1_000_000)))
again = refusal(lambda: ask(ledger, "q2", never))

filler = os.path.join(folder, "filler")
with open(filler, "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError as error:
        assert error.errno == errno.ENOSPC
reserved = refusal(lambda: ask(ledger, "q3", never))
assert ask(ledger, "q1", never) == first  # replaying needs no room
created = refusal(lambda: Ledger.create(path + "2", client_id="clinic"))
assert sorted(os.listdir(folder)) == ["budget.sqlite", "filler"]

os.remove(filler)
ledger = Ledger.open(path, client_id="clinic", wait_s=0.05)
third = ask(ledger, "q3", lambda: os.urandom(16))

subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
ledger = Ledger.open(path, client_id="clinic", wait_s=0.05)
read_only = refusal(lambda: ask(ledger, "q4", never))
assert ask(ledger, "q3", never) == third
assert [(e.query_id, e.answered) for e in ledger.entries()] == [
    ("q1", True), ("q2", False), ("q3", True)]
print(json.dumps([stored, again, reserved, created, read_only]))
"""
    stored, again, reserved, created, read_only = json.loads(
        output(child(code, tmp_path, command=IN_TMPFS))
    )
    assert "no space is left on its disk" in stored
    assert "Query q2 is charged; its answer could not be stored and is not sent" in stored
    assert "query q2 is charged but has no stored answer" in again
    assert "no space is left on its disk" in reserved
    assert "nothing was released" in reserved
    assert "cannot create the ledger" in created
    assert "make the file and its folder writable; nothing was released" in read_only


def test_read_only_file_and_folder(child):
    """As a user who may not write; root may always, and becomes nobody first."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "budget.sqlite"
        ledger = Ledger.create(path, client_id="clinic")
        first = ask(ledger, "q1")
        code = """
path, folder = sys.argv[1], os.path.dirname(sys.argv[1])
if os.geteuid() == 0:
    os.chown(path, 65534, 65534)
    os.chown(folder, 65534, 65534)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
ledger = Ledger.open(path, client_id="clinic")

def never():
    raise AssertionError("drawn")

texts = []
for file_mode, folder_mode in ((0o400, 0o700), (0o600, 0o500), (0o000, 0o700)):
    os.chmod(path, file_mode)
    os.chmod(folder, folder_mode)
    texts.append(refusal(lambda: ask(ledger, "q2", never)))
    if file_mode:
        assert len(ask(ledger, "q1", never)) == 16  # reading and replaying go on
os.chmod(path, 0o600)
print(json.dumps(texts))
"""
        read_only, no_journal, unreadable = json.loads(output(child(code, path)))
        for text in (read_only, no_journal):
            assert "is read-only; make the file and its folder writable" in text
        assert "check who may write the file and its folder" in unreadable
        after = Ledger.open(path, client_id="clinic")
        assert [entry.query_id for entry in after.entries()] == ["q1"]
        assert ask(after, "q1", never) == first


# --- damaged files ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A ledger's bytes, entries and answers by query id."""
    path = tmp_path_factory.mktemp("whole") / "budget.sqlite"
    ledger = Ledger.create(path, client_id="clinic")
    answers = {f"q{index}": ask(ledger, f"q{index}") for index in range(4)}
    answers["large"] = ask(ledger, "large", lambda: os.urandom(6_000))  # goes to pages of its own
    return path.read_bytes(), ledger.entries(), answers


def put(path, content):
    """Overwrite in place: some file systems flush a file that is truncated and written anew."""
    path.touch()
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def refusals(path, content, entries, answers):
    """Put `content` in place, use it, and return the refusals; what is not refused is intact."""
    put(path, content)
    texts = []
    try:
        ledger = Ledger.open(path, client_id="clinic", wait_s=0.0)
        assert ledger.entries() == entries
    except LedgerError as error:
        return [f"on opening: {error}"]
    for query_id, payload in answers.items():
        try:
            assert ask(ledger, query_id, never) == payload
        except LedgerError as error:
            texts.append(str(error))
    return texts


@pytest.mark.slow
def test_flipped_bytes(whole, tmp_path):
    """All over the file: refused, or every entry and every replayed answer is what it was."""
    content, entries, answers = whole
    path = tmp_path / "budget.sqlite"
    header = [(offset, 0x01) for offset in range(100)]
    rest = [(offset, 1 << offset % 8) for offset in range(100, len(content), 43)]
    found = []
    for offset, mask in header + rest:
        flipped = bytearray(content)
        flipped[offset] ^= mask
        found.append(refusals(path, flipped, entries, answers))
    for offset in range(0, len(content), 2048):  # whole stretches lost, as on a bad disk
        for filler in (b"\0", b"\xff"):
            hole = content[:offset] + filler * 512 + content[offset + 512 :]
            found.append(refusals(path, hole, entries, answers))
    assert [] in found  # unused bytes
    assert sum(map(len, found)) > 100
    assert all("\n" not in text for texts in found for text in texts)
    # After opening only a stored answer can turn out damaged.
    late = [text for texts in found for text in texts if not text.startswith("on opening")]
    assert late
    assert all("is damaged" in text for text in late)


def test_writing_after_a_flip_loses_nothing(whole, tmp_path):
    """A damage that only `open` looks for (an index) must not let a process already running on."""
    content, entries, _ = whole
    path = tmp_path / "budget.sqlite"
    path.write_bytes(content)
    ledger = Ledger.open(path, client_id="clinic", wait_s=0.0)
    for offset in range(100, len(content), 499):
        flipped = bytearray(content)
        flipped[offset] ^= 0xFF
        put(path, flipped)
        try:
            ask(ledger, "new")
        except LedgerError:
            continue
        assert ledger.entries()[:-1] == entries
        assert ledger.entries()[-1].query_id == "new"


def test_truncated(whole, tmp_path):
    content, entries, answers = whole
    path = tmp_path / "budget.sqlite"
    lengths = {*range(0, len(content), 512), *range(0, len(content), 777), 1, 15, 16, 99, 100}
    for length in lengths | {len(content) - 1}:
        assert refusals(path, content[:length], entries, answers), length


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is not a ledger, or was emptied"),
        (b"not a database " * 1000, "is not a ledger, or was overwritten"),
        (bytes(20_000), "is not a ledger, or was overwritten"),
        (os.urandom(20_000), "is not a ledger, or was overwritten"),
    ],
    ids=["empty", "text", "zeros", "noise"],
)
def test_another_file_in_its_place(ledger, content, text):
    ledger.path.write_bytes(content)
    for action in (lambda: reopen(ledger), lambda: ask(ledger, "q1", never), ledger.entries):
        with pytest.raises(LedgerError, match=text):
            action()
    assert ledger.path.read_bytes() == content


def test_folder_in_its_place_missing_and_copied(ledger, tmp_path):
    ask(ledger, "q1")
    copy = tmp_path / "copy.sqlite"
    shutil.copy(ledger.path, copy)
    with pytest.raises(LedgerError, match="belongs to another client's data"):
        Ledger.open(copy, client_id="hospital")
    ledger.path.unlink()
    with pytest.raises(LedgerError, match=r"there is no ledger .* would forget"):
        ask(ledger, "q2", never)
    assert not ledger.path.exists()
    ledger.path.mkdir()
    with pytest.raises(LedgerError, match="is a folder, not a ledger"):
        ask(ledger, "q2", never)
    with pytest.raises(LedgerError, match="exists"):
        Ledger.create(ledger.path, client_id="clinic")


# --- several processes -----------------------------------------------------------------------


def test_locked_by_another_process(ledger, child):
    first = ask(ledger, "q1")
    code = """
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.readline()
"""
    process = child(code, ledger.path)
    assert process.stdout.readline() == "locked\n"
    impatient = Ledger(ledger.path, "clinic", 0.05, 0.2)
    text = "in use by another process for 0.2 s; try again"
    for query_id in ("q1", "q2"):
        with pytest.raises(LedgerError, match=text + "; nothing was released"):
            ask(impatient, query_id, never)
    with pytest.raises(LedgerError, match=text):
        Ledger.open(ledger.path, client_id="clinic", busy_timeout_s=0.2)
    process.kill()  # a dead process holds no lock
    process.wait()
    assert ask(ledger, "q1", never) == first
    ask(ledger, "q2")


def test_locked_between_charge_and_store(ledger, child):
    """The one place where a lock costs budget: the answer is lost, not sent."""
    other = sqlite3.connect(ledger.path, isolation_level=None)

    def draw():
        other.execute("BEGIN EXCLUSIVE")
        return b"drawn"

    impatient = Ledger(ledger.path, "clinic", 0.05, 0.2)
    with pytest.raises(LedgerError, match=r"in use by another process .* not sent"):
        ask(impatient, "q1", draw)
    other.close()
    with pytest.raises(QueryRefusedError, match="has no stored answer"):
        ask(ledger, "q1", never)


@pytest.mark.slow
def test_four_processes_grant_exactly_what_fits(ledger, child):
    fits = 7
    code = """
import multiprocessing
from ecos_pl.accounting import epsilon_of
context = multiprocessing.get_context("fork")
limit = epsilon_of([COUNTS] * int(sys.argv[2]), 1e-5)  # loads the accountant, once for all four
start = context.Barrier(4)
ledger = Ledger.open(sys.argv[1], client_id="clinic")

def work(number):
    granted = 0
    start.wait()
    for index in range(4):
        try:
            ask(ledger, f"{number}-{index}", lambda: b"x", max_epsilon=limit)
            granted += 1
        except BudgetExceededError:
            pass
    return granted

with context.Pool(4) as pool:
    print(sum(pool.map(work, range(4), chunksize=1)))
"""
    assert int(output(child(code, ledger.path, fits))) == fits
    after = reopen(ledger)
    assert [entry.number for entry in after.entries()] == list(range(1, fits + 1))
    assert after.epsilon(DELTA) == epsilon_of([COUNTS] * fits, DELTA)


def test_two_processes_answering_the_same_query(ledger, child, tmp_path):
    code = """
def draw():
    payload = os.urandom(1000)
    append(sys.argv[2], payload.hex())
    print("drawing", flush=True)
    sys.stdin.readline()
    return payload

ledger = Ledger.open(sys.argv[1], client_id="clinic", wait_s=60.0)
print(ask(ledger, "q1", draw).hex())
"""
    drawn = tmp_path / "drawn"
    first = child(code, ledger.path, drawn)
    assert first.stdout.readline() == "drawing\n"
    second = child(code, ledger.path, drawn)
    with pytest.raises(QueryRefusedError, match="has no stored answer"):
        ask(ledger, "q1", never)  # a third, impatient one, while it is being drawn
    first.stdin.write("go\n")
    first.stdin.flush()
    (line,) = {output(first).strip(), output(second).strip()}
    assert drawn.read_text().split() == [line]
    assert [entry.answered for entry in reopen(ledger).entries()] == [True]
