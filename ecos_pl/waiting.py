"""What a person sees while the cloud waits for a client: for minutes, or for days."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime

log = logging.getLogger(__name__)

FIRST_LOG_S = 60.0


@contextmanager
def waiting_line(since: datetime, place: str) -> Iterator[Callable[[float, str], None]]:
    """Yield ``show(seconds, trouble)``: one updating line on a terminal, rare log lines elsewhere.

    Log lines come after 1, 2, 4, 8… minutes.

    Args:
        since: When the waiting began.
        place: The mailbox, as it may be printed.
    """

    def line(seconds: float, trouble: str) -> str:
        waited = f"since {since_text(since, seconds)} ({duration_text(seconds)}) at {place}"
        note = f"; the last try failed ({trouble}), trying again" if trouble else ""
        help_text = f"on its side: ecos-client serve DIR --mailbox {place}"
        return f"waiting for the client {waited}; {help_text}{note}"

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status(escape(line(0, ""))) as status:
            yield lambda seconds, trouble: status.update(escape(line(seconds, trouble)))
        return
    next_s = FIRST_LOG_S

    def show(seconds: float, trouble: str) -> None:
        nonlocal next_s
        if seconds >= next_s:
            # A person has to do something, so this shows where only warnings do.
            log.warning("%s", line(seconds, trouble))
        while seconds >= next_s:
            next_s *= 2

    yield show


def since_text(since: datetime, seconds: float) -> str:
    """The time of day, with the date once that is needed.

    >>> since_text(datetime(2026, 3, 1, 16, 41), 200)
    '16:41'
    """
    return f"{since:%H:%M}" if seconds < 12 * 3600 else f"{since:%Y-%m-%d %H:%M}"


def duration_text(seconds: float) -> str:
    """Seconds as a person says them.

    >>> [duration_text(s) for s in (5, 185, 7500, 200_000)]
    ['5 s', '3 min', '2 h 5 min', '2 d 7 h']
    """
    minutes, hours, days = (int(seconds // unit) for unit in (60, 3600, 86400))
    if minutes < 1:
        return f"{int(seconds)} s"
    if hours < 1:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 1 else f"{days} d {hours % 24} h"
