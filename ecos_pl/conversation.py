"""What is said between the cloud and one client about one pool: each question once, ever."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ecos_pl.mailbox import Mailbox
from ecos_pl.messages import kind_of, query_id_of
from ecos_pl.once import in_turn
from ecos_pl.storage import read_json, write_bytes, write_json


class Conversation:
    """Asks a client, and keeps its answers: what was asked before is read from disk.

    Args:
        cache_dir: Answers go to ``answers`` in it.
        fingerprint: Of the probe; answers to others are other answers.
        mailbox_for: Gives the way to the client, from the fingerprint; not called before there is
            something to send.

    Attributes:
        traffic: ``bytes_down, bytes_up, round_trips`` of everything said through this object, read
            from disk or not.
        exchanges: The same one by one: ``kind, bytes_down, bytes_up``.
    """

    def __init__(
        self, cache_dir: Path, fingerprint: str, mailbox_for: Callable[[str], Mailbox]
    ) -> None:
        self._folder, self._fingerprint = cache_dir / "answers", fingerprint
        self._mailbox_for = mailbox_for
        self._mailbox: Mailbox | None = None
        self.traffic = {"bytes_down": 0, "bytes_up": 0, "round_trips": 0}
        self.exchanges: list[dict[str, Any]] = []

    def ask(self, query: bytes) -> bytes:
        """Ask once; the answer is kept, and read from disk when asked again.

        Raises:
            MessageError: The client refuses, or its answer is damaged.
            MailboxError: The mailbox cannot be used, or the deadline is over.
        """
        kept = self._folder / f"{self._fingerprint[:16]}-{query_id_of(query)}.answer"
        sizes = kept.with_suffix(".json")
        with in_turn(kept, "another run asks the client the same"):
            if not (kept.is_file() and sizes.is_file()):
                mailbox = self._open()
                before = mailbox.bytes_sent, mailbox.bytes_received
                answer = mailbox.ask(query)
                down, up = mailbox.bytes_sent - before[0], mailbox.bytes_received - before[1]
                write_bytes(kept, answer)
                write_json(sizes, {"bytes_down": down, "bytes_up": up})
        self._count(sizes, kind_of(query).removesuffix("_query"))
        self.traffic["round_trips"] += 1
        return kept.read_bytes()

    def send_model(self, content: bytes) -> None:
        """Put a model's file where the client finds it; its size is counted once, ever.

        Sent again whenever it is called: a mailbox may have been emptied, and an answer that is
        still missing needs it.

        Raises:
            MailboxError: The mailbox cannot be used.
        """
        sizes = self._folder / f"{self._fingerprint[:16]}-{query_id_of(content)}.model.json"
        mailbox = self._open()
        before = mailbox.bytes_sent
        mailbox.send_model(content)
        if not sizes.is_file():
            down = mailbox.bytes_sent - before
            write_json(sizes, {"bytes_down": down, "bytes_up": 0})
        self._count(sizes, "backbone")

    def _open(self) -> Mailbox:
        self._mailbox = self._mailbox or self._mailbox_for(self._fingerprint)
        return self._mailbox

    def _count(self, sizes: Path, kind: str) -> None:
        found = read_json(sizes)
        for name, size in found.items():
            self.traffic[name] += size
        self.exchanges.append({"kind": kind, **found})
