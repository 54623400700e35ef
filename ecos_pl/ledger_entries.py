"""What a ledger's entries are: their chain, the limits they must keep, and why one is refused."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ecos_pl.accounting import epsilon_of
from ecos_pl.privacy import Release, check_delta

FORMAT = "ecos_pl ledger 2"


class LedgerError(RuntimeError):
    """The ledger refuses; the text is one line for the person who runs the client."""


class QueryRefusedError(LedgerError):
    """This query gets no answer, now or later; the ledger itself is fine.

    Other than a plain `LedgerError`'s, the text names no file and may be sent to who asked.
    """


class BudgetExceededError(QueryRefusedError):
    """The answer would take ε, or the number of answers, over the limit; nothing was charged."""


@dataclass(frozen=True)
class LedgerEntry:
    """One charged answer.

    Attributes:
        number: 1 for the first answer ever charged, and so on; the order of charging.
        query_id: Name of the query.
        requester: Who asked, by their own account; may be empty.
        charged_at: UTC of this machine's clock, ISO 8601. For people: nothing is decided by it.
        releases: What was charged.
        answered: Whether the answer was stored; if not, it was never handed out.
    """

    number: int
    query_id: str
    requester: str
    charged_at: str
    releases: tuple[Release, ...]
    answered: bool


@dataclass(frozen=True)
class Charge:
    """An entry with what ties it to its query, its answer and its place in the chain."""

    entry: LedgerEntry
    query_sha256: str
    checksum: str

    @classmethod
    def from_row(
        cls, number: int, texts: Sequence[str], checksum: str, *, answered: bool
    ) -> Charge:
        """Read the columns from query_id to releases, whose checksum has been compared."""
        query_id, query_sha256, requester, charged_at, text = texts
        releases = tuple(Release.from_dict(fields) for fields in json.loads(text))
        entry = LedgerEntry(number, query_id, requester, charged_at, releases, answered)
        return cls(entry, query_sha256, checksum)

    def payload_sha256(self, payload: bytes) -> str:
        """Hash an answer together with its entry, so that answers cannot change places."""
        return hashlib.sha256(self.checksum.encode() + payload).hexdigest()


@dataclass(frozen=True)
class Limits:
    """What may be charged; the arguments of `Ledger.answer`."""

    max_epsilon: float | None
    delta: float
    max_queries: int | None

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if self.max_epsilon is not None and not self.max_epsilon > 0:  # NaN is not above zero
            raise LedgerError(f"max_epsilon must be above zero, not {self.max_epsilon}")
        if self.max_queries is not None and not self.max_queries >= 1:
            raise LedgerError(f"max_queries must be 1 or more, not {self.max_queries}")

    def check(self, charges: Sequence[Charge], releases: Sequence[Release]) -> None:
        """Raise BudgetExceededError unless one more answer, of `releases`, fits."""
        if self.max_queries is not None and len(charges) >= self.max_queries:
            raise BudgetExceededError(
                f"{len(charges)} queries were charged and the limit is {self.max_queries} ever; "
                "nothing was charged for this one"
            )
        if self.max_epsilon is None:
            return
        earlier = [release for charge in charges for release in charge.entry.releases]
        total = epsilon_of([*earlier, *releases], self.delta)
        if not total <= self.max_epsilon:
            spent = epsilon_of(earlier, self.delta)
            left = math.floor(max(0.0, self.max_epsilon - spent) * 1e4) / 1e4
            raise BudgetExceededError(
                f"this answer would cost ε {_up(total - spent)} and bring the total to "
                f"{_up(total)}, over the limit of {self.max_epsilon:g}: {_up(spent)} is spent, "
                f"{left:.4f} is left (δ = {self.delta:g}); nothing was charged"
            )


def find_charge(charges: Sequence[Charge], query_id: str, query_sha256: str) -> Charge | None:
    """Return the charge of this query; an id reused for another query is refused."""
    for charge in charges:
        if charge.entry.query_id == query_id:
            if charge.query_sha256 != query_sha256:
                raise QueryRefusedError(f"query {query_id} was asked before with another content")
            return charge
    return None


def _up(epsilon: float) -> str:
    """Print with four decimals, rounded up: the printed spending is never too small."""
    return f"{math.ceil(epsilon * 1e4) / 1e4:.4f}" if math.isfinite(epsilon) else str(epsilon)


def first_head(client_id: str) -> str:
    """What the first entry's checksum builds on: it ties the chain to the data's id."""
    return chained_hash(FORMAT, client_id)


def chained_hash(*parts: str | int) -> str:
    """Hash of an entry's parts, of which the first is the hash of the entry before it."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
