"""Results on disk that are either whole or absent: write aside, then move into place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write plain data as JSON, atomically. NaN and infinity are refused (ValueError)."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file, or raise a ValueError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error


@contextmanager
def committed_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; it appears at ``path`` only if the block ends without an error.

    Where two processes fill the same folder, the first to finish wins: both hold the same result,
    since folders are named by a fingerprint of what determines them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield aside
        os.chmod(aside, 0o755)
        try:
            os.rename(aside, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def one_at_a_time(path: Path, note: str = "") -> Iterator[None]:
    """Run the block while no other process is in one of the same file; wait for as long as need be.

    Signals are heard while waiting, and a process that ends leaves its block.

    Args:
        path: A lock file; it stays, empty.
        note: What the log says if there is a wait.
    """
    import fcntl  # not on Windows, where a client may run

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if note:
                log.warning("waiting: %s", note)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fingerprint_of(facts: Any) -> str:
    """SHA-256 (64 hex digits) of plain data, independent of the order of mapping keys."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
