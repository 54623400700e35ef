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
    "LocalClient",
    "Mailbox",
    "MailboxError",
    "MissingModelError",
    "RefusedError",
    "Traffic",
]


class RefusedError(MessageError):
    """The client does not answer this query; the text holds its reason."""


class DeadlineError(MailboxError):
    """No answer came in time; asking again goes on waiting for the same answer."""


class MissingModelError(MessageError):
    """The query is for a backbone that this client does not hold: to be fetched, then read again.

    Attributes:
        model_id: Under which the mailbox holds it.
    """

    def __init__(self, sha256: str) -> None:
        super().__init__(f"this client does not hold the model {sha256[:12]} that the query uses")
        self.model_id = sha256[:32]


class Mailbox(Protocol):
    """The cloud's view of the client: one question, one answer, both in bytes.

    Attributes:
        client_id: What tells one client from another; part of a probe's fingerprint.
        bytes_sent: Sizes of the queries answered and the models sent so far, each counted once.
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

    def send_model(self, content: bytes) -> str:
        """Put a model's file where the client finds it, once; its id, as of a query.

        Queries that use it come after. Nothing is waited for.
        """
        ...


class LocalClient(Protocol):
    """A client within this process; ``client.Client`` is one."""

    def answer(self, content: bytes) -> bytes:
        """The answer to a query; raises MissingModelError for a backbone that it does not hold."""
        ...

    def adopt(self, content: bytes) -> None:
        """Take a backbone's file, for queries to come."""
        ...


class Traffic:
    """Sizes of queries, answers and models, each counted once however often it is sent."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, int]] = {}

    @property
    def bytes_sent(self) -> int:
        """Of the queries answered and the models sent so far, as they travelled."""
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
        make_client: Makes the client when the first query comes, so that a run whose answers are
            on disk never touches the client's data.
        client_id: What tells this client from another.
    """

    def __init__(self, make_client: Callable[[], LocalClient], *, client_id: str) -> None:
        super().__init__()
        self.client_id = client_id
        self._make_client = make_client
        self._client: LocalClient | None = None
        self._models: dict[str, bytes] = {}

    def ask(self, query: bytes) -> bytes:
        """Hand the query over and return the answer."""
        if self._client is None:
            self._client = self._make_client()
        try:
            answer = self._client.answer(query)
        except MissingModelError as missing:
            if missing.model_id not in self._models:
                raise
            self._client.adopt(self._models[missing.model_id])
            answer = self._client.answer(query)
        self.count(query_id_of(query), len(query), len(answer))
        return answer

    def send_model(self, content: bytes) -> str:
        """Keep the model for the client, who takes it with the first query that uses it."""
        model_id = query_id_of(content)
        self._models[model_id] = content
        self.count(model_id, len(content), 0)
        return model_id
