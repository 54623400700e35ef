"""The client's loop: look into the mailbox, show what is asked, answer or refuse."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from ecos_pl.client import Client, Request, UnknownEncoderError
from ecos_pl.encoder import EncoderSpec
from ecos_pl.envelope import MessageError
from ecos_pl.ledger import QueryRefusedError
from ecos_pl.message_store import MailboxError
from ecos_pl.remote_mailbox import ClientMailbox


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
) -> None:
    """Answer queries as they come, until ``stop`` is set.

    Answers leave at whole multiples of ``poll_s`` after a query was seen, so that the time an
    answer takes tells little of how many images there are.

    Args:
        client: Who answers; embeds its images before the first look.
        mailbox: Where queries come from.
        person: Sees every query, and is asked where the policy says so.
        once: Answer what is there now, then return.
        poll_s: Seconds between two looks.
        signed: Whether a shared key proves who asks.
        stop: Ends the loop after the answer in progress.

    Raises:
        LedgerError: The ledger cannot be used; what was charged stays so, nothing else is lost.
        MailboxError: The mailbox cannot be reached at the first look.
    """
    client.embed()
    damaged: set[str] = set()
    reached = False
    while not stop.is_set():
        try:
            for query_id in mailbox.open_queries():
                if stop.is_set():
                    return
                _handle(client, mailbox, person, query_id, damaged, poll_s, signed, stop)
            reached = True
        except MailboxError as error:
            if not reached or once:
                raise
            person.tell(f"{_now()}  {error}; trying again")
        if once and not damaged:
            return
        stop.wait(poll_s)


def _handle(
    client: Client,
    mailbox: ClientMailbox,
    person: Person,
    query_id: str,
    damaged: set[str],
    poll_s: float,
    signed: bool,
    stop: threading.Event,
) -> None:
    start = time.monotonic()
    try:
        payload, sender = mailbox.read_query(query_id)
    except MessageError as error:
        if query_id in damaged:  # still so at the second look: it is not just being written
            damaged.remove(query_id)
            _refuse(mailbox, person, query_id, str(error))
        else:
            damaged.add(query_id)
        return
    damaged.discard(query_id)
    proof = "signed" if signed else "not signed"
    person.tell(f"{_now()}  query {query_id[:12]} from {sender!r} ({proof})")
    try:
        request = _read(client, payload, person)
        if not _agreed(client, request, person):
            _refuse(mailbox, person, query_id, "the person at the client said no")
            return
        answer = client.give(request, sender)
    except (MessageError, QueryRefusedError) as error:
        _refuse(mailbox, person, query_id, str(error))
        return
    taken = time.monotonic() - start
    stop.wait(poll_s - taken % poll_s)
    mailbox.publish_answer(query_id, answer)
    person.tell("          answered")


def _read(client: Client, payload: bytes, person: Person) -> Request:
    try:
        return client.read(payload)
    except UnknownEncoderError as unknown:
        if not _trusts(person, unknown.spec):
            raise
        try:
            client.trust(unknown.spec)
        except ValueError as error:  # its own text may name a path of this machine
            raise MessageError(
                f"this client cannot load the encoder {unknown.spec.name}"
            ) from error
    return client.read(payload)


def _trusts(person: Person, spec: EncoderSpec) -> bool:
    question = f"it uses the public encoder {spec.name} at {spec.image_size} px: trust it?"
    return person.ask is not None and person.ask(f"          {question}")


def _agreed(client: Client, request: Request, person: Person) -> bool:
    person.tell(f"          asks {request.plan.what}")
    cost = client.cost(request)
    if cost.is_charged:
        person.tell("          asked before: the same answer again, at no cost")
        return True
    limit = client.policy.max_epsilon
    left = "" if limit is None else f", {max(0.0, limit - cost.after):.3f} left of {limit:g}"
    person.tell(
        f"          costs ε {cost.after - cost.before:.3f}: {cost.before:.3f} spent before, "
        f"{cost.after:.3f} after{left}"
    )
    if not client.policy.confirm:
        return True
    return person.ask is not None and person.ask("          answer it?")


def _refuse(mailbox: ClientMailbox, person: Person, query_id: str, reason: str) -> None:
    mailbox.publish_refusal(query_id, reason)
    person.tell(f"          refused {query_id[:12]}: {reason}")


def _now() -> str:
    return f"{datetime.now():%H:%M:%S}"
