"""Messages through a place that both parties can reach: a folder, a bucket, a server.

The cloud leaves a sealed query there, the client an answer or a refusal under the query's id.
Neither side accepts a connection, and both may stop and come back at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

from ecos_pl import envelope
from ecos_pl.envelope import MessageError, seal, unseal
from ecos_pl.mailbox import DeadlineError, MailboxError, RefusedError, Traffic
from ecos_pl.message_store import Folder, MessageStore
from ecos_pl.messages import ANSWERS, Answer, Refusal, kind_of, query_id_of
from ecos_pl.waiting import since_text, waiting_line

MAX_REASON = 500


class RemoteMailbox(Traffic):
    """The cloud's side of a mailbox at any fsspec location.

    Args:
        url: Where messages lie, for example ``s3://bucket/project`` or a shared folder.
        sender: This side's name, for the client's ledger.
        key: Secret shared with the client; every message is then signed and checked.
        deadline_s: Longest wait for one answer; None waits for ever.
        poll_s: Pause before the second look; each further pause is twice as long.
        max_poll_s: Longest pause.
        on_wait: Called with the seconds waited and the mailbox's location after each look; None
            shows a line on a terminal, or log lines.
        grace_s: How long an answer that is not intact may still be on its way: some stores show
            files before they are whole.
        sleep: Replaces ``time.sleep`` in tests.
        clock: Replaces ``time.monotonic`` in tests; waiting does not follow the wall clock.

    Raises:
        MailboxError: The URL's driver is not installed; nothing is contacted yet.
    """

    def __init__(
        self,
        url: str,
        *,
        sender: str,
        key: bytes | None = None,
        deadline_s: float | None = None,
        poll_s: float = 2.0,
        max_poll_s: float = 60.0,
        on_wait: Callable[[float, str], None] | None = None,
        grace_s: float = 10.0,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < poll_s <= max_poll_s or (deadline_s is not None and not deadline_s >= 0):
            raise ValueError("a mailbox needs 0 < poll_s <= max_poll_s and a deadline_s >= 0")
        super().__init__()
        self._store = MessageStore(url)
        self._sender, self._key, self._on_wait = sender, key, on_wait
        self._deadline_s = float("inf") if deadline_s is None else deadline_s
        self._poll_s, self._max_poll_s, self._grace_s = poll_s, max_poll_s, grace_s
        self._sleep, self._clock = sleep, clock
        self.client_id = f"mailbox {self._store.shown}"

    def ask(self, query: bytes) -> bytes:
        """Leave the query in the mailbox, unless it lies there, and wait for its answer.

        Raises:
            RefusedError: The client does not answer. Asking once more deletes the refusal and
                asks again: the client may have changed its policy.
            DeadlineError: No answer came in time.
            MessageError: What came is damaged, forged or for another query, and stayed so.
            MailboxError: The query cannot be written.
        """
        query_id = query_id_of(query)
        sealed = seal(query, sender=self._sender, key=self._key)
        _publish(self._store, "queries", query_id, sealed, self._key)
        self._store.remove("refusals", query_id)
        sealed_answer, answer = self._wait(query_id)
        self.count(query_id, len(sealed), len(sealed_answer))
        return answer

    def send_model(self, content: bytes) -> str:
        """Leave a model's file in the mailbox, unless it lies there whole.

        Raises:
            MessageError: It is too large for any message.
            MailboxError: It cannot be written.
        """
        model_id = query_id_of(content)
        _check_size(content)
        sealed = seal(content, sender=self._sender, key=self._key)
        _publish(self._store, "models", model_id, sealed, self._key)
        self.count(model_id, len(sealed), 0)
        return model_id

    def _wait(self, query_id: str) -> tuple[bytes, bytes]:
        """Look with growing pauses until an answer or a refusal lies there."""
        since, start = datetime.now(), self._clock()
        damaged_since: float | None = None
        pause = self._poll_s
        with self._shown(since) as show:
            while True:
                trouble, damage = "", None
                try:
                    found = self._look(query_id)
                    if found is not None:
                        return found
                except RefusedError:
                    raise
                except MessageError as error:
                    damage = error
                except MailboxError as error:
                    trouble = str(error).removeprefix(f"{self._store.shown}: ")
                else:
                    damaged_since = None
                now = self._clock()
                waited = now - start
                if damage is not None:
                    damaged_since = now if damaged_since is None else damaged_since
                    pause = self._poll_s
                    if now - damaged_since >= self._grace_s or waited >= self._deadline_s:
                        raise damage
                if waited >= self._deadline_s:
                    raise DeadlineError(self._over(since, waited, trouble))
                show(waited, trouble)
                self._sleep(min(pause, self._deadline_s - waited))
                pause = min(2 * pause, self._max_poll_s)

    def _look(self, query_id: str) -> tuple[bytes, bytes] | None:
        """The answer, sealed and unsealed, if there is one; a refusal raises."""
        sealed = self._read("answers", query_id)
        if sealed is not None:
            return sealed
        refused = self._read("refusals", query_id)
        if refused is None:
            return None
        reason = _one_line(Refusal.from_bytes(refused[1]).reason)
        raise RefusedError(f"the client refuses: {reason}")

    def _read(self, folder: Folder, query_id: str) -> tuple[bytes, bytes] | None:
        try:
            content = self._store.read(folder, query_id)
            if content is None:
                return None
            payload, _ = unseal(content, key=self._key)
            _check_echo(folder, query_id, payload)
        except MessageError as error:
            where = self._store.where(folder, query_id)
            raise MessageError(
                f"{error} ({where}; delete that file and the client publishes it again, "
                "without a new charge)"
            ) from error
        return content, payload

    @contextmanager
    def _shown(self, since: datetime) -> Iterator[Callable[[float, str], None]]:
        if (on_wait := self._on_wait) is not None:
            yield lambda seconds, trouble: on_wait(seconds, self._store.shown)
        else:
            with waiting_line(since, self._store.shown) as show:
                yield show

    def _over(self, since: datetime, waited: float, trouble: str) -> str:
        note = f" (the last try failed: {trouble})" if trouble else ""
        return (
            f"no answer from the client since {since_text(since, waited)} at {self._store.shown}"
            f"{note}; the same command goes on waiting: nothing is asked or paid twice"
        )


class ClientMailbox:
    """The client's side of a mailbox at any fsspec location.

    Args:
        url: Where messages lie.
        sender: This side's name.
        key: Secret shared with the cloud; every message is then signed and checked.

    Attributes:
        shown: The location as it may be printed.

    Raises:
        MailboxError: The URL's driver is not installed; from all methods: the store cannot be
            reached, read or written.
    """

    def __init__(self, url: str, *, sender: str, key: bytes | None = None) -> None:
        self._store = MessageStore(url)
        self._sender, self._key = sender, key
        self.shown = self._store.shown

    def open_queries(self) -> list[str]:
        """Ids of queries with neither answer nor refusal, oldest first where the store tells."""
        asked = self._store.query_ids("queries")
        done = {*self._store.query_ids("answers"), *self._store.query_ids("refusals")}
        return [query_id for query_id in asked if query_id not in done]

    def read_query(self, query_id: str) -> tuple[bytes, str]:
        """A query's bytes and its sender's name, which only a key makes more than a claim.

        Raises:
            MessageError: It is gone, too large (checked before it is read), damaged, forged, or
                lies under another query's name.
        """
        content = self._store.read("queries", query_id)
        if content is None:
            raise MessageError("the query is no longer in the mailbox")
        payload, sender = unseal(content, key=self._key)
        if query_id_of(payload) != query_id:
            raise MessageError("the query lies under a name that is not its own")
        return payload, sender

    def read_model(self, model_id: str) -> bytes:
        """A model's bytes.

        Raises:
            MessageError: As `read_query`.
        """
        content = self._store.read("models", model_id)
        if content is None:
            raise MessageError("the model that the query uses is not in the mailbox")
        payload, _ = unseal(content, key=self._key)
        if query_id_of(payload) != model_id:
            raise MessageError("the model lies under a name that is not its own")
        return payload

    def publish_answer(self, query_id: str, payload: bytes) -> None:
        """Leave an answer in the mailbox, unless it lies there."""
        self._publish("answers", query_id, payload)

    def publish_refusal(self, query_id: str, reason: str) -> None:
        """Leave a refusal in the mailbox, with a reason that the cloud may read."""
        refusal = Refusal(query_id=query_id, reason=_one_line(reason))
        self._publish("refusals", query_id, refusal.to_bytes())

    def _publish(self, folder: Folder, query_id: str, payload: bytes) -> None:
        sealed = seal(payload, sender=self._sender, key=self._key)
        _publish(self._store, folder, query_id, sealed, self._key)


def _publish(
    store: MessageStore, folder: Folder, query_id: str, sealed: bytes, key: bytes | None
) -> None:
    """Write a message unless one with the same payload lies there, whole and signed as it must."""
    try:
        found = store.read(folder, query_id)
        if found is not None and unseal(found, key=key)[0] == unseal(sealed, key=key)[0]:
            return
    except MessageError:
        pass  # a damaged one is replaced
    store.write(folder, query_id, sealed)


def _check_size(model: bytes) -> None:
    most = envelope.MAX_BYTES - envelope.MAX_LINE
    if len(model) > most:
        raise MessageError(
            f"a model of {len(model) / 1e6:,.1f} MB is too large for a mailbox, which takes "
            f"{most / 1e6:,.1f} MB at most: send a smaller network"
        )


def _check_echo(folder: Folder, query_id: str, payload: bytes) -> None:
    kind = kind_of(payload)
    kinds: tuple[type[Answer] | type[Refusal], ...] = ANSWERS if folder == "answers" else (Refusal,)
    for message in kinds:
        if message.kind == kind:
            if message.from_bytes(payload).query_id != query_id:
                raise MessageError("this is the answer to another query")
            return
    raise MessageError(f"a {kind!r} lies where a client's reply should")


def _one_line(text: str) -> str:
    """Text of the other party as one printable line of limited length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:MAX_REASON] or "no reason given"
