"""Whose fault an error is: the user's, a lost process's, or ours."""

from __future__ import annotations

import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from ecos_pl.overrides import ConfigError
from ecos_pl.stopping import REQUESTS, STATUS


def lost_process(error: Exception) -> str:
    """One line if the error is that another process of this run has gone; else nothing."""
    from ecos_pl.ranks import RankError

    if isinstance(error, RankError):
        return str(error)
    if "torch" not in sys.modules:
        return ""
    from torch.multiprocessing.spawn import ProcessExitedException

    if isinstance(error, ProcessExitedException):
        if error.exit_code == STATUS and REQUESTS.by is None:
            REQUESTS.by = signal.SIGTERM  # a worker got it alone
        return " ".join(str(error).split())
    gone = r"closed by peer|reset by peer|Broken pipe|Socket closed|remote process exited"
    if isinstance(error, RuntimeError) and re.search(gone, str(error)):
        return "another process of this run has ended"
    return ""


def is_users_mistake(error: Exception, ours: Sequence[Path]) -> bool:
    """Our own code raises ValueError for mistakes of users; from anywhere else it is a bug.

    Args:
        error: With its traceback.
        ours: Files and folders of our own code.
    """
    from ecos_pl.ledger import LedgerError

    if isinstance(error, (ConfigError, LedgerError)):
        return True
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, about trainer options
        return True
    if not isinstance(error, (ValueError, FileNotFoundError)):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    file = Path(frame.f_code.co_filename).resolve()
    return any(file.is_relative_to(place) for place in ours)
