"""The client's loop: look into the mailbox, show what is asked, answer or refuse."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from ecos_pl.client import Client, Request, UnknownEncoderError
from ecos_pl.encoder import EncoderSpec
from ecos_pl.envelope import MessageError
from ecos_pl.ledger import QueryRefusedError
from ecos_pl.mailbox import MissingModelError
from ecos_pl.message_store import MailboxError
from ecos_pl.messages import read_query
from ecos_pl.remote_mailbox import ClientMailbox

MODEL_GRACE_S = 600.0
"""How long a model may be on its way after the query that uses it: some folders are synchronised
file by file, small ones first."""


@dataclass(frozen=True)
class Person:
    """Whoever sits at the client's terminal.

    Attributes:
        tell: Shows a line.
        ask: Asks a yes-or-no question; None where nobody is there to answer.
    """

    tell: Callable[[str], None]
    ask: Callable[[str], bool] | None = None


def serve(
    client: Client,
    mailbox: ClientMailbox,
    person: Person,
    *,
    once: bool,
    poll_s: float,
    signed: bool,
    stop: threading.Event,
    adapted_s: float = 30.0,
) -> None:
    """Answer queries as they come, until ``stop`` is set.

    Answers leave at whole multiples of ``poll_s`` after a query was seen, so that the time an
    answer takes tells little of how many images there are. For a backbone that the cloud has
    trained further all images are embedded anew, which takes far longer: whatever is replied to
    such a query leaves at whole multiples of ``adapted_s``.

    Args:
        client: Who answers; embeds its images before the first look.
        mailbox: Where queries come from.
        person: Sees every query, and is asked where the policy says so.
        once: Answer what is there now, then return.
        poll_s: Seconds between two looks.
        signed: Whether a shared key proves who asks.
        stop: Ends the loop after the answer in progress.
        adapted_s: See above; seconds, more than embedding all images takes.

    Raises:
        LedgerError: The ledger cannot be used; what was charged stays so, nothing else is lost.
        MailboxError: The mailbox cannot be reached at the first look.
    """
    client.embed()
    desk = _Desk(client, mailbox, person, poll_s, max(adapted_s, poll_s), signed, once, stop)
    reached = False
    while not stop.is_set():
        try:
            for query_id in mailbox.open_queries():
                if stop.is_set():
                    return
                desk.handle(query_id)
            reached = True
        except MailboxError as error:
            if not reached or once:
                raise
            person.tell(f"{_now()}  {error}; trying again")
        if once and not desk.is_waiting():
            return
        stop.wait(poll_s)


class _NoModelYetError(Exception):
    """The model of a query is not in the mailbox, or not whole."""


@dataclass
class _Desk:
    """Where queries are handled, one at a time.

    Attributes:
        damaged: Queries that were damaged at the last look: they may just be being written.
        awaiting: Queries whose model is not there yet, with the time from which on they are
            refused.
    """

    client: Client
    mailbox: ClientMailbox
    person: Person
    poll_s: float
    adapted_s: float
    signed: bool
    once: bool
    stop: threading.Event
    damaged: set[str] = field(default_factory=set)
    awaiting: dict[str, float] = field(default_factory=dict)

    def is_waiting(self) -> bool:
        """Whether some query was not whole at the last look."""
        return bool(self.damaged or self.awaiting)

    def handle(self, query_id: str) -> None:
        """Show a query, and answer or refuse it."""
        start = time.monotonic()
        try:
            payload, sender = self.mailbox.read_query(query_id)
        except MessageError as error:
            if query_id in self.damaged:  # still so at the second look
                self.damaged.remove(query_id)
                self._refuse(query_id, str(error))
            else:
                self.damaged.add(query_id)
            return
        self.damaged.discard(query_id)
        if query_id not in self.awaiting:
            proof = "signed" if self.signed else "not signed"
            self.person.tell(f"{_now()}  query {query_id[:12]} from {sender!r} ({proof})")
        adapted = _is_adapted(payload)
        try:
            request = self._read(payload)
            self.awaiting.pop(query_id, None)
            if not self._agreed(request):
                raise MessageError("the person at the client said no")
            answer = self.client.give(request, sender)
        except _NoModelYetError as error:
            self._wait_for_model(query_id, str(error))
            return
        except (MessageError, QueryRefusedError) as error:
            self.awaiting.pop(query_id, None)
            if adapted:  # others are refused before any image is touched
                self._pause(start, self.adapted_s)
            self._refuse(query_id, str(error))
            return
        self._pause(start, self.adapted_s if adapted else self.poll_s)
        self.mailbox.publish_answer(query_id, answer)
        self.person.tell("          answered")

    def _read(self, payload: bytes) -> Request:
        try:
            return self.client.read(payload)
        except UnknownEncoderError as unknown:
            if not self._trusts(unknown.spec):
                raise
            try:
                self.client.trust(unknown.spec)
            except ValueError as error:  # its own text may name a path of this machine
                raise MessageError(
                    f"this client cannot load the encoder {unknown.spec.name}"
                ) from error
        except MissingModelError as missing:
            try:
                content = self.mailbox.read_model(missing.model_id)
            except MessageError as error:
                raise _NoModelYetError(str(error)) from error
            self.client.adopt(content)
        return self.client.read(payload)

    def _trusts(self, spec: EncoderSpec) -> bool:
        question = f"it uses the public encoder {spec.name} at {spec.image_size} px: trust it?"
        return self.person.ask is not None and self.person.ask(f"          {question}")

    def _agreed(self, request: Request) -> bool:
        tell, ask = self.person.tell, self.person.ask
        tell(f"          asks {request.plan.what}")
        if request.encoder.adapted:
            size = Path(request.encoder.weights).stat().st_size / 1e6
            tell(f"          with a backbone that the cloud has trained further ({size:,.1f} MB)")
        cost = self.client.cost(request)
        if cost.is_charged:
            tell("          asked before: the same answer again, at no cost")
            return True
        limit = self.client.policy.max_epsilon
        left = "" if limit is None else f", {max(0.0, limit - cost.after):.3f} left of {limit:g}"
        tell(
            f"          costs ε {cost.after - cost.before:.3f}: {cost.before:.3f} spent before, "
            f"{cost.after:.3f} after{left}"
        )
        if not self.client.policy.confirm:
            return True
        return ask is not None and ask("          answer it?")

    def _wait_for_model(self, query_id: str, reason: str) -> None:
        """Look again, for a while; then refuse."""
        now = time.monotonic()
        if query_id not in self.awaiting:
            self.awaiting[query_id] = now + (0 if self.once else MODEL_GRACE_S)
            self.person.tell("          its model is not in the mailbox yet")
        elif now >= self.awaiting[query_id]:
            del self.awaiting[query_id]
            self._refuse(query_id, reason)

    def _pause(self, start: float, period: float) -> None:
        """Until a whole number of periods after the start."""
        taken = time.monotonic() - start
        if period > self.poll_s and taken > period:
            self.person.tell("          it took longer than --adapted-seconds: give more there")
        self.stop.wait(period - taken % period)

    def _refuse(self, query_id: str, reason: str) -> None:
        self.mailbox.publish_refusal(query_id, reason)
        self.person.tell(f"          refused {query_id[:12]}: {reason}")


def _is_adapted(payload: bytes) -> bool:
    """Whether a query is for a backbone that the cloud has trained further."""
    try:
        return "model" in read_query(payload).encoder
    except MessageError:
        return False


def _now() -> str:
    return f"{datetime.now():%H:%M:%S}"
