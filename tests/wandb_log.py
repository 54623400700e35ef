"""Reads what an offline W&B run has written: the records of its log, ``run-<id>.wandb``.

The file is a LevelDB log (google/leveldb, ``doc/log_format.md``) behind a header of seven bytes:
blocks of 32 KiB, in them chunks of crc32, length and type, which make up protobuf records.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2 as pb

_BLOCK, _CHUNK_HEADER = 32768, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class OfflineRun:
    """What the log says of a run.

    Attributes:
        run: The run's record: id, project, group, tags, job type.
        config: Last value of each of its keys.
        history: All that was logged, in order: name → value.
        artifacts: Records of artifacts.
        ended: Whether the log says that the run is over.
    """

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    ended: bool = False

    def logged(self, name: str) -> list[Any]:
        """All values logged under a name."""
        return [row[name] for row in self.history if name in row]


def read_run(folder: Path) -> OfflineRun:
    """Read the one log in an ``offline-run-*`` folder, once W&B's own process has written it."""
    (path,) = folder.glob("run-*.wandb")
    for _ in range(600):
        found = _read(path.read_bytes())
        if found.ended:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} does not end")


def _read(log: bytes) -> OfflineRun:
    found = OfflineRun()
    for content in _records(log):
        record = pb.Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= _values(record.run.config.update)
        elif kind == "config":
            found.config |= _values(record.config.update)
        elif kind == "history":
            found.history.append(_values(record.history.item))
        elif kind == "request" and record.request.WhichOneof("request_type") == "partial_history":
            found.history.append(_values(record.request.partial_history.item))
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "exit":
            found.ended = True
    return found


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    place, parts = 7, []
    while place + _CHUNK_HEADER <= len(content):
        left = _BLOCK - place % _BLOCK
        if left < _CHUNK_HEADER:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += _CHUNK_HEADER
        if place + length > len(content):
            return  # still being written
        parts.append(content[place : place + length])
        place += length
        assert kind in (_FULL, _FIRST, _MIDDLE, _LAST), kind
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []
