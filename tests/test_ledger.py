import hashlib
import os
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

import pytest

from ecos_pl.accounting import epsilon_of
from ecos_pl.ledger import BudgetExceededError, Ledger, LedgerError, QueryRefusedError
from ecos_pl.privacy import Release

DELTA = 1e-5
COUNTS = Release("coverage_counts", 5.0, 1.0, one_coordinate=True)
HASH = hashlib.sha256(b"query").hexdigest()
OTHER_HASH = hashlib.sha256(b"other").hexdigest()


@pytest.fixture
def ledger(tmp_path):
    return Ledger.create(tmp_path / "budget.sqlite", client_id="clinic", wait_s=0.1)


def ask(ledger, query_id="q1", draw=lambda: os.urandom(16), **changes):
    options = {"max_epsilon": 10.0, "delta": DELTA, **changes}
    releases = options.pop("releases", [COUNTS])
    return ledger.answer(query_id, options.pop("sha256", HASH), releases, draw, **options)


def never():
    raise AssertionError("drawn although refused")


def test_replay_is_identical_and_free(ledger):
    first = ask(ledger)
    again = Ledger.open(ledger.path, client_id="clinic")
    assert ask(again) == ask(again, max_epsilon=0.01) == first
    assert again.releases() == [COUNTS]
    assert again.epsilon(DELTA) == epsilon_of([COUNTS], DELTA)


def test_several_releases_in_one_answer(ledger):
    table = Release("class_table", 40.0, 1.0, one_coordinate=True)
    ask(ledger, releases=[COUNTS, table, COUNTS])
    assert ledger.releases() == [COUNTS, table, COUNTS]
    assert ledger.epsilon(DELTA) == epsilon_of([COUNTS, COUNTS, table], DELTA)
    with pytest.raises(LedgerError, match="at least one release"):
        ask(ledger, "q2", never, releases=[])


def test_entries_tell_what_was_charged(ledger):
    before = datetime.now(timezone.utc) - timedelta(seconds=1)  # charged_at has whole seconds
    ask(ledger, "q1", requester="Cloud of Ωmega")
    with pytest.raises(ZeroDivisionError):
        ask(ledger, "q2", lambda: 1 / 0)
    first, second = ledger.entries()
    assert (first.number, first.query_id, first.requester) == (1, "q1", "Cloud of Ωmega")
    assert (first.releases, first.answered) == ((COUNTS,), True)
    assert (second.number, second.query_id, second.requester) == (2, "q2", "")
    assert not second.answered
    assert before <= datetime.fromisoformat(first.charged_at) <= datetime.now(timezone.utc)


def test_same_id_with_other_content_refused(ledger):
    ask(ledger)
    with pytest.raises(QueryRefusedError, match="asked before with another content"):
        ask(ledger, sha256=OTHER_HASH)
    assert len(ledger.entries()) == 1


def test_over_budget_refused_and_not_charged(ledger):
    limit = epsilon_of([COUNTS, COUNTS], DELTA) + 0.01
    ask(ledger, "q1", max_epsilon=limit)
    ask(ledger, "q2", max_epsilon=limit)
    with pytest.raises(BudgetExceededError) as caught:
        ask(ledger, "q3", never, max_epsilon=limit)
    text = str(caught.value)
    numbers = re.search(r"cost ε (\S+) .* total to (\S+), .*: (\S+) is spent, (\S+) is left", text)
    cost, total, spent, left = (float(number) for number in numbers.groups())
    # Rounded against whoever asks, by less than a ten-thousandth.
    exactly = epsilon_of([COUNTS] * 3, DELTA)
    assert 0 <= total - exactly < 1.01e-4
    assert 0 <= spent - ledger.epsilon(DELTA) < 1.01e-4
    assert 0 <= cost - (exactly - ledger.epsilon(DELTA)) < 1.01e-4
    assert 0 <= 0.01 - left < 1.01e-4
    assert f"over the limit of {limit:g}" in text
    assert text.endswith("nothing was charged")
    assert "\n" not in text

    # A limit lowered below what is spent.
    with pytest.raises(BudgetExceededError, match=r"0\.0000 is left"):
        ask(ledger, "q3", never, max_epsilon=0.1)
    assert len(ledger.entries()) == 2
    ask(ledger, "q3", max_epsilon=None)
    assert len(ledger.entries()) == 3


def test_max_queries(ledger):
    first = ask(ledger, "q1", max_queries=2, max_epsilon=None)
    ask(ledger, "q2", max_queries=2, max_epsilon=None)
    with pytest.raises(BudgetExceededError, match="2 queries were charged and the limit is 2"):
        ask(ledger, "q3", never, max_queries=2, max_epsilon=None)
    assert ask(ledger, "q1", never, max_queries=1) == first  # a replay costs nothing
    assert len(ledger.entries()) == 2


@pytest.mark.parametrize("bad", [float("nan"), 0.0, -1.0])
def test_bad_limits_refused(ledger, bad):
    with pytest.raises((LedgerError, ValueError)):
        ask(ledger, max_epsilon=bad)
    with pytest.raises(ValueError, match="delta"):
        ask(ledger, delta=bad)
    with pytest.raises(LedgerError, match="max_queries"):
        ask(ledger, max_queries=bad)
    for changes in (
        {"query_id": ""},
        {"query_id": "a\nb"},
        {"sha256": "abc"},
        {"requester": "a\x1b[2J"},
        {"requester": "a" * 201},
    ):
        with pytest.raises(LedgerError):
            ask(ledger, draw=never, **changes)
    assert ledger.releases() == []


def test_failed_draw_stays_charged(ledger):
    def fail():
        raise OSError("camera unplugged")

    with pytest.raises(OSError, match="camera"):
        ask(ledger, draw=fail)
    assert ledger.releases() == [COUNTS]
    with pytest.raises(QueryRefusedError, match=r"has no stored answer .* new query id"):
        ask(ledger)
    for limits in ({"max_epsilon": epsilon_of([COUNTS], DELTA)}, {"max_queries": 1}):
        with pytest.raises(BudgetExceededError):  # what was lost counts like any other
            ask(ledger, "q2", never, **limits)
    assert len(ask(ledger, "q2")) == 16
    assert ledger.releases() == [COUNTS, COUNTS]


@pytest.mark.parametrize("theirs", ["q1", "q2"])
def test_another_process_charges_just_before(ledger, monkeypatch, theirs):
    """Between the first look at the budget and the lock another process answers a query."""
    limit = epsilon_of([COUNTS], DELTA)
    answers = []

    def epsilon_after_the_other(releases, delta):
        if not answers:
            answers.append(None)  # the other asks for ε as well
            answers[0] = ask(Ledger.open(ledger.path, client_id="clinic"), theirs)
        return epsilon_of(releases, delta)

    monkeypatch.setattr("ecos_pl.ledger_entries.epsilon_of", epsilon_after_the_other)
    if theirs == "q1":
        assert ask(ledger, "q1", never, max_epsilon=limit) == answers[0]
    else:
        with pytest.raises(BudgetExceededError):
            ask(ledger, "q1", never, max_epsilon=limit)
    assert [entry.query_id for entry in ledger.entries()] == [theirs]


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

    with pytest.raises(LedgerError, match=r"no ledger at .* q1 is charged; .* not sent"):
        ask(ledger, draw=draw)


def test_create_never_overwrites(ledger):
    ask(ledger)
    with pytest.raises(LedgerError, match="never overwritten"):
        Ledger.create(ledger.path, client_id="clinic")
    assert len(ledger.releases()) == 1
    assert [entry.name for entry in ledger.path.parent.iterdir()] == ["budget.sqlite"]


def test_missing_refused(tmp_path):
    with pytest.raises(LedgerError, match=r"there is no ledger .* would forget"):
        Ledger.open(tmp_path / "none.sqlite", client_id="clinic")
    with pytest.raises(LedgerError, match="cannot create"):
        Ledger.create(tmp_path / "no" / "folder.sqlite", client_id="clinic")
    assert not (tmp_path / "none.sqlite").exists()


def test_other_clients_refused(ledger):
    with pytest.raises(LedgerError, match="belongs to another client"):
        Ledger.open(ledger.path, client_id="hospital")


@pytest.mark.parametrize("client_id", ["", "a\nb", "a" * 201])
def test_bad_client_id_refused(tmp_path, client_id):
    with pytest.raises(LedgerError, match="client id"):
        Ledger.create(tmp_path / "budget.sqlite", client_id=client_id)
    assert list(tmp_path.iterdir()) == []


def test_format_of_another_version_refused(tmp_path):
    path = tmp_path / "old.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE meta (format TEXT NOT NULL, client_id TEXT NOT NULL)")
        connection.execute("INSERT INTO meta VALUES ('ecos_pl ledger 1', 'clinic')")
    connection.close()
    with pytest.raises(LedgerError, match="another version of ecos_pl"):
        Ledger.open(path, client_id="clinic")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE answers SET releases = replace(releases, '5.0', '9.0') WHERE id = 2",
        "UPDATE answers SET releases = 'NaN' WHERE id = 1",
        "UPDATE answers SET query_sha256 = 'x' WHERE id = 1",
        "UPDATE answers SET requester = 'nobody' WHERE id = 2",
        "UPDATE answers SET charged_at = '1999-01-01T00:00:00+00:00' WHERE id = 3",
        "UPDATE answers SET checksum = x'00' WHERE id = 3",
        "DELETE FROM answers WHERE id = 1",
        "DELETE FROM answers WHERE id = 2",
        "DELETE FROM answers WHERE id = 3",
        "DELETE FROM answers WHERE id > 1",
        "DELETE FROM answers",
        "DELETE FROM answers WHERE id = 1; UPDATE answers SET id = id - 1",
        "UPDATE answers SET id = 10 WHERE id = 1; UPDATE answers SET id = 1 WHERE id = 2;"
        "UPDATE answers SET id = 2 WHERE id = 10",
        "UPDATE answers SET id = 5 WHERE id = 3",
        "UPDATE meta SET num_charges = 2",
        "DELETE FROM answers WHERE id = 3; UPDATE meta SET num_charges = 2",
        "UPDATE meta SET format = 'ecos_pl ledger 999'",
        "UPDATE meta SET client_id = 'hospital'",
        "DELETE FROM meta",
        "INSERT INTO meta SELECT * FROM meta",
        "DROP TABLE answers",
    ],
)
def test_changed_entries_refused(ledger, statement):
    for query_id in ("q1", "q2", "q3"):
        ask(ledger, query_id, max_epsilon=None)
    with sqlite3.connect(ledger.path) as connection:
        connection.executescript(statement)
    connection.close()
    for action in (
        lambda: Ledger.open(ledger.path, client_id="clinic"),
        lambda: ask(ledger, "q1", never),
        lambda: ask(ledger, "q4", never),
        ledger.entries,
    ):
        with pytest.raises(LedgerError) as caught:
            action()
        assert "\n" not in str(caught.value)


def test_entries_do_not_move_to_another_client(tmp_path, ledger):
    """The chain starts from the client's id: changing the id alone is not enough."""
    ask(ledger)
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("UPDATE meta SET client_id = 'hospital'")
    connection.close()
    with pytest.raises(LedgerError, match="is damaged"):
        Ledger.open(ledger.path, client_id="hospital")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE answers SET payload = x'00'",
        "UPDATE answers SET payload = 'text'",
        "UPDATE answers SET payload = NULL",
        # Two whole answers change places.
        "CREATE TABLE other AS SELECT id, payload, payload_sha256 FROM answers;"
        "UPDATE answers SET (payload, payload_sha256) ="
        " (SELECT payload, payload_sha256 FROM other WHERE other.id = 3 - answers.id)",
    ],
)
def test_changed_answer_is_not_replayed(ledger, statement):
    ask(ledger, "q1", max_epsilon=None)
    ask(ledger, "q2", max_epsilon=None)
    with sqlite3.connect(ledger.path) as connection:
        connection.executescript(statement)
    connection.close()
    for query_id in ("q1", "q2"):
        with pytest.raises(LedgerError, match="is damaged"):
            ask(ledger, query_id, never)


def test_clock_jump_changes_nothing(ledger, monkeypatch):
    clock = iter(["2031-05-01T00:00:00+00:00", "1970-01-01T00:00:00+00:00", "2019-02-03"])
    monkeypatch.setattr("ecos_pl.ledger._utc_now", lambda: next(clock))
    limit = epsilon_of([COUNTS] * 3, DELTA)
    payloads = [ask(ledger, f"q{i}", max_epsilon=limit) for i in range(3)]
    assert [entry.query_id for entry in ledger.entries()] == ["q0", "q1", "q2"]
    assert [entry.charged_at[:4] for entry in ledger.entries()] == ["2031", "1970", "2019"]
    assert ledger.epsilon(DELTA) == limit
    with pytest.raises(BudgetExceededError):
        ask(ledger, "q3", never, max_epsilon=limit)
    again = Ledger.open(ledger.path, client_id="clinic")
    assert [ask(again, f"q{i}", never) for i in range(3)] == payloads
