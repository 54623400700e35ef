"""How messages travel between cloud and client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Mailbox(Protocol):
    """The cloud's view of the client: one question, one answer, both in bytes."""

    def ask(self, query: bytes) -> bytes:
        """Send a query and wait for its answer."""
        ...


class InProcessMailbox:
    """A client in this process, for simulations: its answers come from a function call.

    Args:
        make_answerer: Makes the client's ``answer`` when the first query comes, so that a run
            whose answers are on disk never touches the client's data.
    """

    def __init__(self, make_answerer: Callable[[], Callable[[bytes], bytes]]) -> None:
        self._make_answerer = make_answerer
        self._answer: Callable[[bytes], bytes] | None = None

    def ask(self, query: bytes) -> bytes:
        """Hand the query over and return the answer."""
        if self._answer is None:
            self._answer = self._make_answerer()
        return self._answer(query)
