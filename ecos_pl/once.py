"""Work that several runs want at the same time is done by one of them; the others read it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.storage import one_at_a_time

log = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)


@contextmanager
def in_turn(folder: Path, note: str, ranks: Ranks = ALONE) -> Iterator[None]:
    """Run the block while no other run is in one of the same folder.

    What the block makes has to be looked for inside it. On a disk without locks the block runs at
    once: results are written whole, so that two runs then do the same work, and both end well.

    Args:
        folder: What is worked on, ``CACHE/KIND/NAME``; its lock ``CACHE/locks/KIND-NAME`` stays,
            empty.
        note: What the log says if there is a wait.
        ranks: Of this run; all of them call this, and the first one waits for all.
    """
    kind = folder.parent
    lock = one_at_a_time(kind.with_name("locks") / f"{kind.name}-{folder.name}", note)
    locked = False
    with ranks.first() as is_first:
        if is_first:
            try:
                lock.__enter__()
                locked = True
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                log.warning("%s cannot be locked (%s)", folder, error.strerror)
    try:
        yield
    finally:
        if locked:
            lock.__exit__(None, None, None)
