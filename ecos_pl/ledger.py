"""The client's privacy budget: every charged release and its answer, in one SQLite file.

The order makes a crash cost budget, never privacy: the charge is on disk before any noise is
drawn, and the answer is on disk before it is handed out. Asking again replays the stored bytes.

The file is the budget. Restoring an old copy of it, or keeping two ledgers for one dataset,
forgets releases that others have seen. The accountant assumes that noise and sample rate of a
release are fixed by the client's plan, not chosen after looking at earlier answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from ecos_pl.privacy import Release, check_delta, epsilon_of

_FORMAT = "ecos_pl ledger 1"
_BUSY_TIMEOUT_S = 30.0
_SCHEMA = """
CREATE TABLE meta (format TEXT NOT NULL, client_id TEXT NOT NULL);
CREATE TABLE answers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    query_id TEXT NOT NULL UNIQUE,
    query_sha256 TEXT NOT NULL,
    release TEXT NOT NULL,
    charge_sha256 TEXT NOT NULL,
    payload BLOB,
    payload_sha256 TEXT
);
"""


class LedgerError(RuntimeError):
    """The ledger refuses; the text is one line for the person who runs the client."""


class BudgetExceededError(LedgerError):
    """The release would take ε over the client's limit; nothing was charged."""


class Ledger:
    """The releases a client has made, charged before they are drawn (see the module's text).

    Safe to use from several processes and threads: every call opens the file anew.
    """

    def __init__(self, path: str | os.PathLike[str], client_id: str, wait_s: float) -> None:
        self.path = Path(path)
        self.client_id = client_id
        self._wait_s = wait_s

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, client_id: str, wait_s: float = 5.0) -> Ledger:
        """Make an empty ledger; one that exists is never overwritten (LedgerError)."""
        path = Path(path)
        _check_text(client_id, "client id")
        draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
        try:
            with closing(sqlite3.connect(draft, isolation_level=None)) as connection:
                connection.executescript(f"PRAGMA synchronous=EXTRA; BEGIN; {_SCHEMA}")
                connection.execute("INSERT INTO meta VALUES (?, ?)", (_FORMAT, client_id))
                connection.execute("COMMIT")
            draft.chmod(0o600)
            os.link(draft, path)  # unlike a rename, fails if the ledger is there already
            _sync_folder(path.parent)
        except FileExistsError:
            raise LedgerError(f"{path} exists; a ledger is never overwritten") from None
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"cannot create the ledger {path}: {error}") from error
        finally:
            draft.unlink(missing_ok=True)
        return cls(path, client_id, wait_s)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, client_id: str, wait_s: float = 5.0) -> Ledger:
        """Open a ledger; a missing, damaged or foreign one is refused (LedgerError).

        Args:
            path: The file that `create` made.
            client_id: Whose ledger it must be.
            wait_s: How long (seconds) `answer` waits for another process that is drawing the
                same answer.
        """
        ledger = cls(path, client_id, wait_s)
        with ledger._connect() as connection:
            if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
                raise LedgerError(f"the ledger {ledger.path} is damaged; restore no older copy")
            ledger._events(connection)
        return ledger

    def answer(
        self,
        query_id: str,
        query_sha256: str,
        release: Release,
        draw: Callable[[], bytes],
        *,
        max_epsilon: float | None,
        delta: float,
    ) -> bytes:
        """Charge `release`, draw the answer once and return it; a repeated query replays it free.

        Args:
            query_id: Name of the query, chosen by who asks.
            query_sha256: Hash of the whole query, 64 hexadecimal digits.
            release: What the answer costs.
            draw: Makes the answer's bytes, noise included; called at most once per query id.
            max_epsilon: Limit on ε over all releases ever, this one included; None for no limit.
            delta: The δ at which ε is computed.

        Raises:
            BudgetExceededError: If the release does not fit; nothing is charged.
            LedgerError: If the id was used for another query, if it was charged and has no stored
                answer, or if the file cannot be read or written.
        """
        _check_text(query_id, "query id")
        if not re.fullmatch("[0-9a-f]{64}", query_sha256):
            raise LedgerError("the query's sha256 must be 64 lower-case hexadecimal digits")
        if max_epsilon is not None and not max_epsilon > 0:  # NaN is not above zero either
            raise LedgerError(f"max_epsilon must be above zero, not {max_epsilon}")
        check_delta(delta)
        with self._connect() as connection:
            if self._charged(connection, query_id, query_sha256):
                return self._replay(query_id)
            # Computed here only to be cached: the write lock below is then held for milliseconds.
            if max_epsilon is not None:
                epsilon_of([*self._events(connection), release], delta)

        with self._connect() as connection, _transaction(connection):
            # Asked anew: another process may have charged this query, or others, meanwhile.
            charged = self._charged(connection, query_id, query_sha256)
            if not charged:
                self._check_budget([*self._events(connection), release], max_epsilon, delta)
                text = json.dumps(release.to_dict(), allow_nan=False)
                connection.execute(
                    "INSERT INTO answers (query_id, query_sha256, release, charge_sha256)"
                    " VALUES (?, ?, ?, ?)",
                    (query_id, query_sha256, text, _sha256(query_id, query_sha256, text)),
                )
        if charged:
            return self._replay(query_id)

        # Committed. Whatever happens from here on, the release is paid for.
        payload = bytes(draw())
        with self._connect() as connection, _transaction(connection):
            stored = connection.execute(
                "UPDATE answers SET payload = ?, payload_sha256 = ?"
                " WHERE query_id = ? AND payload IS NULL",
                (payload, _payload_sha256(payload), query_id),
            )
            if stored.rowcount != 1:
                raise LedgerError(f"the ledger {self.path} was changed while answering")
        return payload

    def releases(self) -> list[Release]:
        """Return every release charged so far, oldest first."""
        with self._connect() as connection:
            return self._events(connection)

    def epsilon(self, delta: float) -> float:
        """Return ε at `delta` over every release charged so far (`privacy.epsilon_of`)."""
        return epsilon_of(self.releases(), delta)

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        """Open the file, checking whose it is; database errors become one clear line."""
        if not self.path.is_file():
            raise LedgerError(f"there is no ledger at {self.path}; create one first")
        try:
            uri = self.path.absolute().as_uri() + "?mode=rw"  # never creates a file
            with closing(
                sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
            ) as connection:
                connection.execute("PRAGMA synchronous=EXTRA")
                meta = connection.execute("SELECT format, client_id FROM meta").fetchall()
                if len(meta) != 1 or meta[0][0] != _FORMAT:
                    raise LedgerError(f"{self.path} is not a ledger of this version")
                if meta[0][1] != self.client_id:
                    raise LedgerError(f"the ledger {self.path} belongs to another client")
                yield connection
        except sqlite3.Error as error:
            raise LedgerError(f"the ledger {self.path} cannot be used: {error}") from error

    def _events(self, connection: sqlite3.Connection) -> list[Release]:
        rows = connection.execute(
            "SELECT query_id, query_sha256, release, charge_sha256 FROM answers ORDER BY id"
        ).fetchall()
        try:
            for query_id, query_sha256, text, charge_sha256 in rows:
                if _sha256(query_id, query_sha256, text) != charge_sha256:
                    raise ValueError("checksum differs")
            return [Release.from_dict(json.loads(text)) for _, _, text, _ in rows]
        except (ValueError, TypeError) as error:
            raise LedgerError(f"the ledger {self.path} holds a damaged entry: {error}") from error

    def _charged(self, connection: sqlite3.Connection, query_id: str, query_sha256: str) -> bool:
        """Return whether this query has been charged; an id reused for another one is refused."""
        row = connection.execute(
            "SELECT query_sha256 FROM answers WHERE query_id = ?", (query_id,)
        ).fetchone()
        if row is not None and row[0] != query_sha256:
            raise LedgerError(f"query {query_id} was asked before with another content")
        return row is not None

    def _check_budget(
        self, releases: list[Release], max_epsilon: float | None, delta: float
    ) -> None:
        if max_epsilon is None:
            return
        total = epsilon_of(releases, delta)
        if not total <= max_epsilon:
            spent = epsilon_of(releases[:-1], delta)
            raise BudgetExceededError(
                f"this release would bring ε to {total:.4g}, over the limit of {max_epsilon:g} "
                f"(spent so far: {spent:.4g}, δ = {delta:g}); nothing was charged"
            )

    def _replay(self, query_id: str) -> bytes:
        """Return the stored answer, waiting a little for a process that may be drawing it."""
        deadline = time.monotonic() + self._wait_s
        while True:
            with self._connect() as connection:
                payload, checksum = connection.execute(
                    "SELECT payload, payload_sha256 FROM answers WHERE query_id = ?", (query_id,)
                ).fetchone()
            if payload is not None:
                if not isinstance(payload, bytes) or _payload_sha256(payload) != checksum:
                    raise LedgerError(f"the stored answer to query {query_id} is damaged")
                return payload
            if time.monotonic() >= deadline:
                raise LedgerError(
                    f"query {query_id} is charged but has no stored answer (the client stopped "
                    "before drawing it); a new query id must be asked, and is paid for again"
                )
            time.sleep(0.02)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock; commit at the end, roll back on any exception."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _check_text(text: str, name: str) -> None:
    if not isinstance(text, str) or not 0 < len(text) <= 200 or not text.isprintable():
        raise LedgerError(f"the {name} must be 1 to 200 printable characters")


def _sha256(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _payload_sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Put a folder's new entry on disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
