"""The cloud's view of a client, and a client within the same process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ecos_pl.envelope import MessageError
from ecos_pl.message_format import query_id_of
from ecos_pl.message_store import MailboxError

__all__ = [
    "DeadlineError",
    "InProcessMailbox",
    "Mailbox",
    "MailboxError",
    "RefusedError",
    "Traffic",
]


class RefusedError(MessageError):
    """The client does not answer this query; the text holds its reason."""


class DeadlineError(MailboxError):
    """No answer came in time; asking again goes on waiting for the same answer."""


class Mailbox(Protocol):
    """The cloud's view of the client: one question, one answer, both in bytes.

    Attributes:
        client_id: What tells one client from another; part of a probe's fingerprint.
        bytes_sent: Sizes of the queries answered so far, each counted once.
        bytes_received: Sizes of their answers.
    """

    @property
    def client_id(self) -> str: ...  # noqa: D102

    @property
    def bytes_sent(self) -> int: ...  # noqa: D102

    @property
    def bytes_received(self) -> int: ...  # noqa: D102

    def ask(self, query: bytes) -> bytes:
        """Send a query and wait for its answer."""
        ...


class Traffic:
    """Sizes of queries and answers, each query counted once however often it is asked."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, int]] = {}

    @property
    def bytes_sent(self) -> int:
        """Of the queries answered so far, as they travelled."""
        return sum(sent for sent, _ in self._sizes.values())

    @property
    def bytes_received(self) -> int:
        """Of their answers."""
        return sum(received for _, received in self._sizes.values())

    def count(self, query_id: str, sent: int, received: int) -> None:
        """Note an exchange, in bytes."""
        self._sizes[query_id] = (sent, received)


class InProcessMailbox(Traffic):
    """A client in this process, for simulations: its answers come from a function call.

    Args:
        make_answerer: Makes the client's ``answer`` when the first query comes, so that a run
            whose answers are on disk never touches the client's data.
        client_id: What tells this client from another.
    """

    def __init__(
        self, make_answerer: Callable[[], Callable[[bytes], bytes]], *, client_id: str
    ) -> None:
        super().__init__()
        self.client_id = client_id
        self._make_answerer = make_answerer
        self._answer: Callable[[bytes], bytes] | None = None

    def ask(self, query: bytes) -> bytes:
        """Hand the query over and return the answer."""
        if self._answer is None:
            self._answer = self._make_answerer()
        answer = self._answer(query)
        self.count(query_id_of(query), len(query), len(answer))
        return answer
