"""The index of one shard on disk, so that a build that was interrupted goes on where it stopped.

Imports no torch: many processes start to run this.
"""

from __future__ import annotations

import io
import json
import os
import threading
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.tar_scan import ScannedShard, scan_shard
from ecos_pl.storage import fingerprint_of, write_bytes

_VERSION = 1  # raise it whenever a shard's index changes its meaning
_SMALL = 1 << 27  # bytes of shards for which starting processes would take longer than reading


@dataclass(frozen=True)
class Shard:
    """A shard as it was when it was listed.

    Attributes:
        path: Where it is.
        name: Its path below the folder that all shards of the pool share.
        size: In bytes.
        mtime_ns: When it was last written.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int


class ShardPieces:
    """Indexes of single shards in a folder; a piece counts if its shard is what it was.

    Args:
        folder: May hold pieces of other pools too, and does if they share shards.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, shard: Shard) -> ScannedShard | None:
        """A shard's index; None if there is none, a damaged one, or one of an older shard."""
        try:
            with np.load(self._path(shard), allow_pickle=False) as arrays:
                stored = json.loads(arrays["stored"].tobytes())
                if stored["shard"] != _identity(shard):
                    return None
                return ScannedShard(
                    stored["members"],
                    arrays["offsets"].tolist(),
                    arrays["sizes"].tolist(),
                    _named(stored["labels"], arrays["labels"]),
                    _named(stored["domains"], arrays["domains"]),
                    stored["damage"],
                )
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def has(self, shard: Shard) -> bool:
        """Whether `load` would find it."""
        return self.load(shard) is not None

    def make(self, shard: Shard) -> None:
        """Go through a shard and keep its index.

        Raises:
            ValueError: see `scan_shard`; or the shard is being written to.
        """
        scanned = scan_shard(shard.path)
        now = os.stat(shard.path)
        if (now.st_size, now.st_mtime_ns) != (shard.size, shard.mtime_ns):
            raise ValueError(f"shard {str(shard.path)!r} changes while it is read: begin again")
        label_names, labels = _coded(scanned.labels)
        domain_names, domains = _coded(scanned.domains)
        stored = {
            "shard": _identity(shard),
            "members": scanned.members,
            "labels": label_names,
            "domains": domain_names,
            "damage": scanned.damage,
        }
        buffer = io.BytesIO()
        np.savez(
            buffer,
            stored=np.frombuffer(json.dumps(stored).encode(), np.uint8),
            offsets=np.array(scanned.offsets, np.int64),
            sizes=np.array(scanned.sizes, np.int64),
            labels=labels,
            domains=domains,
        )
        write_bytes(self._path(shard), buffer.getvalue())

    def make_all(self, shards: Sequence[Shard], num_workers: int | None) -> Iterator[Shard]:
        """Make the pieces of these shards in several processes; yields each shard when done.

        Args:
            shards: Those without a piece.
            num_workers: Processes; 0 for this one alone, None to decide by the work and the cores.
        """
        if num_workers is None:
            is_little = sum(shard.size for shard in shards) < _SMALL or len(shards) == 1
            num_workers = 0 if is_little else min(os.cpu_count() or 1, len(shards), 32)
        if num_workers == 0:
            for shard in shards:
                self.make(shard)
                yield shard
            return
        # Not forked: this process may hold threads and locks of torch.
        context = get_context("spawn")
        with ProcessPoolExecutor(num_workers, context, initializer=_end_with_parent) as workers:
            try:
                waiting = {workers.submit(self.make, shard): shard for shard in shards}
                for future in as_completed(waiting):
                    future.result()
                    yield waiting[future]
            finally:
                workers.shutdown(cancel_futures=True)

    def _path(self, shard: Shard) -> Path:
        digest = fingerprint_of(str(shard.path))
        return self._folder / digest[:2] / f"{digest[2:34]}.npz"


def _identity(shard: Shard) -> dict[str, Any]:
    stat = {"size": shard.size, "mtime_ns": shard.mtime_ns}
    return {"version": _VERSION, "path": str(shard.path), **stat}


def _coded(values: Sequence[str | None]) -> tuple[list[str], Any]:
    """Names in the order in which they occur, and their numbers [n] int32; -1 for None."""
    code_of: dict[str, int] = {}
    codes = [-1 if v is None else code_of.setdefault(v, len(code_of)) for v in values]
    return list(code_of), np.array(codes, np.int32)


def _named(names: list[str], codes: Any) -> list[str | None]:
    name_of = [*names, None]  # code -1 is the last
    return [name_of[code] for code in codes.tolist()]


def _end_with_parent() -> None:
    """Keep no worker waiting for work from a process that was killed."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
