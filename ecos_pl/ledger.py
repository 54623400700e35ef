"""The client's privacy budget: every charged release and its answer, in one SQLite file.

The order makes a crash cost budget, never privacy: the charge is on disk before any noise is
drawn, and the answer is on disk before it is handed out. Asking again replays the stored bytes.
An answer that was charged and could not be stored (the process died, the disk was full) is
thrown away, not sent: nobody could replay it, and a second draw would be a second release. It
stays charged; the query must be asked under a new id and is paid for again.

Each entry's checksum covers the one before it, and the newest is kept a second time beside the
number of entries. An entry that was altered, moved or removed is therefore noticed, also the
last one. What nobody can notice from the file: an older copy of the whole of it put back, a
second ledger for the same data, somebody who computes the checksums anew. The first two forget
releases that others have seen; the file is the budget. Keep it on a local disk: locks of network
file systems are not to be relied on.

The accountant assumes that noise and sample rate of a release are fixed by the client's plan, not
chosen after looking at earlier answers.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from ecos_pl.accounting import epsilon_of
from ecos_pl.ledger_entries import (
    FORMAT,
    BudgetExceededError,
    Charge,
    LedgerEntry,
    LedgerError,
    Limits,
    QueryRefusedError,
    chained_hash,
    find_charge,
    first_head,
)
from ecos_pl.privacy import Release

__all__ = ["BudgetExceededError", "Ledger", "LedgerEntry", "LedgerError", "QueryRefusedError"]

_SCHEMA = """
CREATE TABLE meta (
    format TEXT NOT NULL, client_id TEXT NOT NULL, num_charges INTEGER NOT NULL, head TEXT NOT NULL
);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY,
    query_id TEXT NOT NULL UNIQUE,
    query_sha256 TEXT NOT NULL,
    requester TEXT NOT NULL,
    charged_at TEXT NOT NULL,
    releases TEXT NOT NULL,
    checksum TEXT NOT NULL,
    payload_sha256 TEXT,
    payload BLOB
);
"""
_FIND_IT = "find the right file, a new ledger would forget what was released"
# SQLite's own words (its result codes reach Python from 3.11 on), and what they mean to a person.
_REASONS = {
    "is locked": "is in use by another process for {busy_timeout_s:g} s; try again",
    "disk is full": "cannot grow: no space is left on its disk; make room and try again",
    "disk I/O error": "cannot be read or written: its disk is full, over a quota or failing",
    "readonly": "is read-only; make the file and its folder writable",
    "unable to open": "cannot be opened or written; check who may write the file and its folder",
    "no such table": "is not a ledger, or was emptied; " + _FIND_IT,
    "not a database": "is not a ledger, or was overwritten; " + _FIND_IT,
}
_DAMAGED = (
    "is damaged ({}); what was released is no longer certain, so nothing more is answered: "
    "a new ledger or an older copy would forget releases"
)


class Ledger:
    """The releases a client has made, charged before they are drawn (see the module's text).

    Safe to use from several processes and threads: every call opens the file anew and checks all
    entries.
    """

    def __init__(
        self, path: str | os.PathLike[str], client_id: str, wait_s: float, busy_timeout_s: float
    ) -> None:
        self.path = Path(path)
        self.client_id = client_id
        self._wait_s = wait_s
        self._busy_timeout_s = busy_timeout_s

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        client_id: str,
        wait_s: float = 5.0,
        busy_timeout_s: float = 30.0,
    ) -> Ledger:
        """Make an empty ledger; one that exists is never overwritten (LedgerError).

        The arguments are those of `open`.
        """
        ledger = cls(path, client_id, wait_s, busy_timeout_s)
        path = ledger.path
        _check_text(client_id, "client id")
        draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            with closing(sqlite3.connect(draft, isolation_level=None)) as connection:
                connection.executescript(f"PRAGMA synchronous=EXTRA; BEGIN; {_SCHEMA}")
                connection.execute(
                    "INSERT INTO meta VALUES (?, ?, 0, ?)",
                    (FORMAT, client_id, first_head(client_id)),
                )
                connection.execute("COMMIT")
            draft.chmod(0o600)
            os.link(draft, path)  # unlike a rename, fails if the ledger is there already
            _sync_folder(path.parent)
        except FileExistsError:
            raise LedgerError(f"{path} exists; a ledger is never overwritten") from None
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"cannot create the ledger {path}: {error}") from error
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        return ledger

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        client_id: str,
        wait_s: float = 5.0,
        busy_timeout_s: float = 30.0,
    ) -> Ledger:
        """Open a ledger; a missing, damaged or foreign one is refused (LedgerError).

        Args:
            path: The file that `create` made.
            client_id: Id of the data whose budget it must be, 1 to 200 printable characters.
            wait_s: How long (seconds) `answer` waits for another process that is drawing the
                same answer.
            busy_timeout_s: How long (seconds) any call waits for another process that holds the
                file locked.
        """
        ledger = cls(path, client_id, wait_s, busy_timeout_s)
        with ledger._session() as (connection, _):
            if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                raise ledger._damaged("its pages do not fit together")
        return ledger

    def answer(
        self,
        query_id: str,
        query_sha256: str,
        releases: Sequence[Release],
        draw: Callable[[], bytes],
        *,
        max_epsilon: float | None,
        delta: float,
        requester: str = "",
        max_queries: int | None = None,
    ) -> bytes:
        """Charge `releases`, draw the answer once and return it; a repeated query replays it free.

        Args:
            query_id: Name of the query, chosen by who asks.
            query_sha256: Hash of the whole query, 64 hexadecimal digits.
            releases: What the answer costs, one or more.
            draw: Makes the answer's bytes, noise included; called at most once per query id.
            max_epsilon: Limit on ε over all releases ever, these included; None for no limit.
            delta: The δ at which ε is computed.
            requester: Who asks, by their own account: at most 200 printable characters.
            max_queries: Limit on the number of answers ever charged; None for no limit.

        Raises:
            BudgetExceededError: If the answer does not fit; nothing is charged.
            QueryRefusedError: If the id was used for another query, or was charged and its answer
                is not there to be replayed.
            LedgerError: If an argument is wrong, or the file cannot be read or written. Then
                nothing was handed out; the text says so if the query is charged all the same.
        """
        _check_text(query_id, "query id")
        _check_text(requester, "requester's name", shortest=0)
        if not re.fullmatch("[0-9a-f]{64}", query_sha256):
            raise LedgerError("the query's sha256 must be 64 lower-case hexadecimal digits")
        if not releases:
            raise LedgerError("an answer must be charged at least one release")
        limits = Limits(max_epsilon, delta, max_queries)
        try:
            charge = self._reserve(query_id, query_sha256, requester, releases, limits)
        except QueryRefusedError:
            raise
        except LedgerError as error:
            raise LedgerError(f"{error}; nothing was released") from error
        if charge is None:
            return self._replay(query_id, query_sha256)

        # Committed. Whatever happens from here on, the releases are paid for.
        payload = draw()
        try:
            self._store(charge, payload)
        except LedgerError as error:
            raise LedgerError(
                f"{error}. Query {query_id} is charged; its answer could not be stored and is "
                "not sent"
            ) from error
        return payload

    def entries(self) -> list[LedgerEntry]:
        """Return every answer charged so far, oldest first."""
        with self._session() as (_, charges):
            return [charge.entry for charge in charges]

    def releases(self) -> list[Release]:
        """Return every release charged so far, oldest first."""
        return [release for entry in self.entries() for release in entry.releases]

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta` over every release charged so far (`privacy.epsilon_of`)."""
        return epsilon_of(self.releases(), delta)

    @contextmanager
    def _session(self, *, write: bool = False) -> Iterator[tuple[sqlite3.Connection, list[Charge]]]:
        """One transaction, all entries checked at its start; errors become one clear line."""
        try:
            if self.path.is_dir():
                raise LedgerError(f"{self.path} is a folder, not a ledger")
            if not self.path.exists():
                raise LedgerError(
                    f"there is no ledger at {self.path}; if this data was never queried create "
                    "one, otherwise find it: a new one would forget what was released"
                )
            uri = self.path.absolute().as_uri() + "?mode=rw"  # never creates a file
            with closing(
                sqlite3.connect(uri, uri=True, timeout=self._busy_timeout_s, isolation_level=None)
            ) as connection:
                connection.execute("PRAGMA synchronous=EXTRA")
                # A plain BEGIN keeps what is read consistent while others write.
                connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
                try:
                    yield connection, self._checked_charges(connection)
                    connection.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):  # some errors have rolled back already
                        connection.execute("ROLLBACK")
                    raise
        except UnicodeDecodeError as error:  # SQLite's own text quotes damaged bytes
            raise self._damaged("unreadable text") from error
        except sqlite3.Error as error:
            raise self._error(error) from error
        except OSError as error:
            raise LedgerError(
                f"the ledger {self.path} cannot be opened: {error.strerror}"
            ) from error

    def _error(self, error: sqlite3.Error) -> LedgerError:
        for words, reason in _REASONS.items():
            if words in str(error):
                reason = reason.format(busy_timeout_s=self._busy_timeout_s)
                return LedgerError(f"the ledger {self.path} {reason}")
        return self._damaged(ascii(str(error)[:60]))  # it may quote damaged text, at any length

    def _damaged(self, what: str) -> LedgerError:
        return LedgerError(f"the ledger {self.path} {_DAMAGED.format(what)}")

    def _checked_charges(self, connection: sqlite3.Connection) -> list[Charge]:
        """Return all entries after following the chain of checksums from first to last.

        Everything is decided on this list, so that a damaged index cannot hide an entry.
        """
        formats = connection.execute("SELECT format FROM meta").fetchall()
        if formats != [(FORMAT,)]:
            raise LedgerError(
                f"the ledger {self.path} was made by another version of ecos_pl, or is damaged; "
                f"this version reads the format {FORMAT!r}"
            )
        ((client_id, num_charges, last),) = connection.execute(
            "SELECT client_id, num_charges, head FROM meta"
        )
        if client_id != self.client_id:
            raise LedgerError(
                f"the ledger {self.path} belongs to another client's data; use the one that was "
                "made for this data"
            )
        charges: list[Charge] = []
        head = first_head(client_id)
        rows = connection.execute(
            "SELECT id, query_id, query_sha256, requester, charged_at, releases, checksum,"
            " payload_sha256 FROM answers ORDER BY id"
        )
        for number, (row_id, *texts, checksum, payload_sha256) in enumerate(rows, 1):
            try:
                head = chained_hash(head, number, *texts)
                if (row_id, checksum) != (number, head):
                    raise ValueError("checksum differs")
                answered = payload_sha256 is not None
                charge = Charge.from_row(number, texts, head, answered=answered)
            except (ValueError, TypeError) as error:  # TypeError: a text has become something else
                raise self._damaged(f"entry {number}, or one before it, was changed") from error
            charges.append(charge)
        if (num_charges, last) != (len(charges), head):
            raise self._damaged(f"entries after number {len(charges)} were removed or changed")
        return charges

    def _reserve(
        self,
        query_id: str,
        query_sha256: str,
        requester: str,
        releases: Sequence[Release],
        limits: Limits,
    ) -> Charge | None:
        """Commit a charge for this query; None if it was charged before."""
        with self._session() as (_, charges):
            if find_charge(charges, query_id, query_sha256) is not None:
                return None
        # Looked at before the write lock is taken, for the sake of the accountant's cache: the
        # lock is then held for milliseconds. What counts is the look inside the lock: another
        # process may have charged this query, or others, meanwhile.
        limits.check(charges, releases)
        with self._session(write=True) as (connection, charges):
            if find_charge(charges, query_id, query_sha256) is not None:
                return None
            limits.check(charges, releases)
            number = len(charges) + 1
            head = charges[-1].checksum if charges else first_head(self.client_id)
            text = json.dumps([release.to_dict() for release in releases], allow_nan=False)
            texts = (query_id, query_sha256, requester, _utc_now(), text)
            checksum = chained_hash(head, number, *texts)
            charge = Charge.from_row(number, texts, checksum, answered=False)
            connection.execute(
                "INSERT INTO answers"
                " (id, query_id, query_sha256, requester, charged_at, releases, checksum)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (number, *texts, checksum),
            )
            connection.execute("UPDATE meta SET num_charges = ?, head = ?", (number, checksum))
        return charge

    def _store(self, charge: Charge, payload: bytes) -> None:
        with self._session(write=True) as (connection, _):
            stored = connection.execute(
                "UPDATE answers SET payload_sha256 = ?, payload = ?"
                " WHERE id = ? AND checksum = ? AND payload IS NULL",
                (charge.payload_sha256(payload), payload, charge.entry.number, charge.checksum),
            )
            if stored.rowcount != 1:
                raise LedgerError(f"the ledger {self.path} was changed while answering")

    def _replay(self, query_id: str, query_sha256: str) -> bytes:
        """Return the stored answer, waiting a little for a process that may be drawing it."""
        deadline = time.monotonic() + self._wait_s
        while True:
            with self._session() as (connection, charges):
                charge = find_charge(charges, query_id, query_sha256)
                if charge is None:
                    raise LedgerError(f"the ledger {self.path} was changed while answering")
                if charge.entry.answered:
                    ((payload, checksum),) = connection.execute(
                        "SELECT payload, payload_sha256 FROM answers WHERE id = ?",
                        (charge.entry.number,),
                    )
                    if not isinstance(payload, bytes) or checksum != charge.payload_sha256(payload):
                        raise QueryRefusedError(
                            f"the stored answer to query {query_id} is damaged and is not sent; "
                            "ask under a new query id, which is paid for again"
                        )
                    return payload
            if time.monotonic() >= deadline:
                raise QueryRefusedError(
                    f"query {query_id} is charged but has no stored answer (the client stopped "
                    f"before storing it, or has been drawing it for more than {self._wait_s:g} s);"
                    " ask under a new query id, which is paid for again"
                )
            time.sleep(0.02)


def _check_text(text: str, name: str, shortest: int = 1) -> None:
    if not isinstance(text, str) or not shortest <= len(text) <= 200 or not text.isprintable():
        raise LedgerError(f"the {name} must be {shortest} to 200 printable characters")


def _utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _sync_folder(folder: Path) -> None:
    """Put a folder's new entry on disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
