"""Where messages lie: any fsspec location, with files that appear whole and listings never stale.

Reads are capped before they start, and no error text carries a password of the location's URL.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from fsspec.core import get_filesystem_class, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from ecos_pl import envelope
from ecos_pl.envelope import MessageError
from ecos_pl.printable_url import printable_url, without_secrets
from ecos_pl.storage import write_bytes

Folder = Literal["queries", "answers", "refusals", "models"]

# Stores where a put either happens as a whole or not at all.
_WHOLE_PUTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "memory"}
_DRIVERS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
}
_FILE_NAME = re.compile(r"([0-9a-f]{32})\.ecos")

T = TypeVar("T")


class MailboxError(ValueError):
    """The mailbox cannot be used or reached; the text is one line and holds no password."""


class MessageStore:
    """The folders of a mailbox: ``<url>/{queries,answers,refusals,models}/<id>.ecos``.

    An id is that of a query, or of a model: the first half of the SHA-256 of its bytes.

    Args:
        url: A path, or any URL that fsspec understands, chained ones too.

    Attributes:
        shown: The location as it may be printed: without user, password and query.

    Raises:
        MailboxError: The URL's driver is not installed; nothing is contacted yet.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.shown = printable_url(url).rstrip("/")
        schemes = [part.split("://")[0] for part in url.split("::") if "://" in part]
        for scheme in schemes:
            self._check_driver(scheme)
        if not schemes or schemes == ["file"]:
            self.shown = str(LocalFileSystem._strip_protocol(url))
        # The first contact comes with the first message: a job may have its answers on disk.
        self._fs: Any = None
        self._root = ""

    def read(self, folder: Folder, query_id: str) -> bytes | None:
        """The sealed message, or None where there is none.

        Raises:
            MessageError: It is larger than ``envelope.MAX_BYTES``; nothing was read.
            MailboxError: The store cannot be reached or read.
        """
        file = _file(folder, query_id)

        def call(fs: Any) -> bytes | None:
            path = f"{self._root}/{file}"
            try:
                size = fs.info(path).get("size")
            except FileNotFoundError as error:
                return _unless_bucket_is_missing(error, None)
            if size is not None and size > envelope.MAX_BYTES:
                limit = f"exceeds the limit {envelope.MAX_BYTES:,}"
                raise MessageError(f"a message of {size:,} bytes {limit}")
            if size == 0:
                return b""  # S3 refuses a range of nothing
            try:
                # The end, because the file may have grown since its size was asked.
                return bytes(fs.cat_file(path, end=envelope.MAX_BYTES + 1))
            except FileNotFoundError:
                return None

        return self._try(f"cannot read from {folder}/", call)

    def write(self, folder: Folder, query_id: str, content: bytes) -> None:
        """Publish a sealed message: readers see all of it or nothing.

        Raises:
            MailboxError: The store cannot be reached or written.
        """
        file = _file(folder, query_id)

        def call(fs: Any) -> None:
            path = f"{self._root}/{file}"
            if isinstance(fs, LocalFileSystem):
                write_bytes(Path(path), content)
            elif any(_protocols(layer) & _WHOLE_PUTS for layer in _layers(fs)):
                fs.pipe_file(path, content)
            else:
                _write_aside_and_move(fs, path, content)

        self._try(f"cannot write to {folder}/", call)

    def remove(self, folder: Folder, query_id: str) -> None:
        """Delete a message if it is there."""
        file = _file(folder, query_id)

        def call(fs: Any) -> None:
            path = f"{self._root}/{file}"
            with contextlib.suppress(FileNotFoundError):
                fs.info(path)  # deleting may need a right that is not granted
                fs.rm_file(path)

        self._try(f"cannot delete from {folder}/", call)

    def query_ids(self, folder: Folder) -> list[str]:
        """Whose messages lie in a folder, oldest first where the store tells; others are ignored.

        Raises:
            MailboxError: The store cannot be reached or listed.
        """

        def call(fs: Any) -> list[dict[str, Any]]:
            try:
                return list(fs.ls(f"{self._root}/{folder}", detail=True))
            except FileNotFoundError as error:
                return _unless_bucket_is_missing(error, [])

        found = []
        for info in self._try(f"cannot list {folder}/", call):
            match = _FILE_NAME.fullmatch(str(info["name"]).rsplit("/", 1)[-1])
            if match and info.get("type") == "file":
                found.append((_written(info), match[1]))
        return [query_id for _, query_id in sorted(found)]

    def where(self, folder: Folder, query_id: str) -> str:
        """A message's place, as it may be printed."""
        return f"{self.shown}/{_file(folder, query_id)}"

    def _check_driver(self, scheme: str) -> None:
        try:
            get_filesystem_class(scheme)
        except ImportError as error:
            hint = f"pip install {_DRIVERS[scheme]}" if scheme in _DRIVERS else self._text(error)
            raise MailboxError(
                f"{self.shown}: the driver for {scheme}:// is not installed: {hint}"
            ) from None
        except ValueError:
            raise MailboxError(f"{self.shown}: {scheme}:// is no known kind of location") from None

    def _try(self, failure: str, call: Callable[[Any], T]) -> T:
        """Call with the file system; whatever its driver raises becomes one line of ours.

        Every driver has its own errors (botocore's are no OSErrors), hence the wide ``except``;
        the cause is dropped because its text may hold a password.
        """
        try:
            if self._fs is None:
                self._fs, root = url_to_fs(self._url, skip_instance_cache=True)
                self._root = str(root).rstrip("/")
            for layer in _layers(self._fs):
                layer.invalidate_cache()
            return call(self._fs)
        except (MailboxError, MessageError):
            raise
        except Exception as error:
            self._fs = None  # a connection that broke is made anew
            raise MailboxError(f"{self.shown}: {failure}: {self._text(error)}") from None

    def _text(self, error: Exception) -> str:
        text = " ".join(str(error).split()) or type(error).__name__
        return without_secrets(text, self._url)


def _file(folder: Folder, query_id: str) -> str:
    if not re.fullmatch("[0-9a-f]{32}", query_id):
        raise MessageError("an id must be 32 hexadecimal digits")
    return f"{folder}/{query_id}.ecos"


def _layers(fs: Any) -> Iterator[Any]:
    """The file systems of a chained URL, from the outermost to the one that stores."""
    while fs is not None:
        yield fs
        fs = getattr(fs, "fs", None)


def _protocols(fs: Any) -> set[str]:
    return {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)


def _write_aside_and_move(fs: Any, path: str, content: bytes) -> None:
    folder, name = path.rsplit("/", 1)
    aside = f"{folder}/.{name}.{uuid.uuid4().hex[:8]}"
    fs.makedirs(folder, exist_ok=True)
    try:
        fs.pipe_file(aside, content)
        if fs.exists(path):
            fs.rm_file(path)  # some servers do not rename onto a file
        fs.mv(aside, path)
    except BaseException:
        with contextlib.suppress(Exception):
            fs.rm_file(aside)
        raise


def _unless_bucket_is_missing(error: FileNotFoundError, absent: T) -> T:
    """A mistyped bucket must not look like a mailbox that is still empty."""
    if "NoSuchBucket" in str(error.__cause__):
        raise error
    return absent


def _written(info: dict[str, Any]) -> float:
    """When a file was written, in seconds; 0 where the store does not tell."""
    for name in ("mtime", "LastModified", "last_modified", "updated", "modify", "created"):
        value = info.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value.replace("Z", "+00:00"))
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0
