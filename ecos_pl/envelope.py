"""The seal on a message: a line of JSON before its bytes that says whose it is and proves it whole.

``{"ecos": 2, "from": "lab", "sha256": "…", "hmac": "…"}`` and a newline, then the payload. SHA-256
tells accidents (safetensors does not notice a flipped bit); the HMAC, under a key that both parties
hold, tells forgeries. Both cover the sender's name and every byte of the payload.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from pathlib import Path
from typing import Any

VERSION = 2
MAX_BYTES = 64 * 2**20
"""Most bytes of a sealed message; checked before anything of it is parsed."""
MAX_LINE = 1000
MIN_KEY_BYTES = 16


class MessageError(ValueError):
    """A message that is damaged, forged or not acceptable; nothing is charged for it."""


def seal(payload: bytes, *, sender: str, key: bytes | None = None) -> bytes:
    """Put the line before a payload; the same arguments give the same bytes.

    Args:
        payload: A message's bytes.
        sender: Who sends it, 1 to 100 printable characters; only the key makes it more than a
            claim.
        key: Shared secret for the HMAC; None for none.

    Raises:
        MessageError: The name is not printable, or the message exceeds ``MAX_BYTES``.
    """
    _check_sender(sender)
    line: dict[str, Any] = {"ecos": VERSION, "from": sender}
    line["sha256"] = _digest(sender, payload).hexdigest()
    if key is not None:
        line["hmac"] = _signature(key, sender, payload)
    content = json.dumps(line, ensure_ascii=False).encode() + b"\n" + payload
    if len(content) > MAX_BYTES:
        raise MessageError(f"a message of {len(content):,} bytes exceeds the limit {MAX_BYTES:,}")
    return content


def unseal(content: bytes, *, key: bytes | None = None) -> tuple[bytes, str]:
    """Check a sealed message and return its payload and its sender's name.

    Raises:
        MessageError: It is too large, cut off, changed on the way, of another version, or (with
            a key) unsigned or signed with another key; the text is one line.
    """
    if len(content) > MAX_BYTES:
        raise MessageError(f"a message of {len(content):,} bytes exceeds the limit {MAX_BYTES:,}")
    line, payload = _split(content)
    sender = line["from"]
    if not hmac.compare_digest(line["sha256"], _digest(sender, payload).hexdigest()):
        raise MessageError("the message was damaged on its way: its SHA-256 differs")
    if key is not None:
        if "hmac" not in line:
            raise MessageError("the message is not signed, and this side was given a key")
        if not hmac.compare_digest(line["hmac"], _signature(key, sender, payload)):
            raise MessageError("the message is signed with another key than this side's")
    return payload, sender


def is_signed(content: bytes) -> bool:
    """Whether a sealed message carries an HMAC, right or wrong."""
    return "hmac" in _split(content)[0]


def new_key_file(path: Path) -> None:
    """Write a fresh key that only its owner may read; an existing file is kept (ValueError)."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ValueError(f"{path} exists; a key is never overwritten") from None
    except OSError as error:
        raise ValueError(f"cannot write the key file {path}: {error.strerror}") from error
    with os.fdopen(handle, "w") as file:
        file.write(os.urandom(32).hex() + "\n")


def read_key_file(path: Path) -> bytes:
    """Read a shared key: the file's bytes without white space around them.

    Raises:
        ValueError: The file cannot be read, or holds fewer than 16 bytes.
    """
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"cannot read the key file {path}: {error.strerror}") from error
    if len(key) < MIN_KEY_BYTES:
        raise ValueError(f"the key in {path} is too short: {MIN_KEY_BYTES} bytes at least")
    return key


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    head, newline, _ = content[:MAX_LINE].partition(b"\n")
    try:
        if not newline:
            raise ValueError("it does not begin with a line of JSON")
        pairs = json.loads(head, object_pairs_hook=list)
        line = dict(pairs)
        if len(line) != len(pairs):
            raise ValueError("a name occurs twice")
        if type(line.get("ecos")) is not int:
            raise ValueError("its first line names no version")
        if line["ecos"] != VERSION:
            raise MessageError(f"message version {line['ecos']}, expected {VERSION}")
        if set(line) - {"hmac"} != {"ecos", "from", "sha256"}:
            raise ValueError("its first line has missing or unknown names")
        for name in set(line) & {"sha256", "hmac"}:
            if not isinstance(line[name], str) or not re.fullmatch("[0-9a-f]{64}", line[name]):
                raise ValueError(f"its {name} is not 64 hexadecimal digits")
        _check_sender(line["from"])
    except MessageError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise MessageError(f"not a sealed message: {reason}") from error
    return line, content[len(head) + 1 :]


def _check_sender(sender: Any) -> None:
    if not isinstance(sender, str) or not 0 < len(sender) <= 100 or not sender.isprintable():
        raise MessageError("the sender's name must be 1 to 100 printable characters")


def _covered(sender: str, payload: bytes) -> bytes:
    return f"ecos {VERSION} from {len(sender)} {sender}\n".encode() + payload


def _digest(sender: str, payload: bytes) -> Any:
    return hashlib.sha256(_covered(sender, payload))


def _signature(key: bytes, sender: str, payload: bytes) -> str:
    return hmac.new(key, _covered(sender, payload), hashlib.sha256).hexdigest()
