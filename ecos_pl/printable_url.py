"""URLs as they may be printed: what is secret in them stays out of messages, logs and files."""

from __future__ import annotations

import re
from urllib.parse import unquote


def printable_url(url: str) -> str:
    """The URL without user, password and query, in every part of a chain.

    >>> printable_url("simplecache::sftp://ann:pw@host:22/box?token=1")
    'simplecache::sftp://host:22/box'
    """
    return "::".join(_split_url(part)[1] for part in url.split("::"))


def without_secrets(text: str, url: str) -> str:
    """A driver's words without the passwords of the URL that it was given.

    >>> without_secrets("cannot reach http://ann:pw12@host/x with pw12", "ftp://ann:pw12@host/x")
    'cannot reach http://host/x with ***'
    """
    text = re.sub(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+", lambda match: printable_url(match[0]), text)
    for secret in _secrets(url):
        text = text.replace(secret, "***")
    return text


def _split_url(part: str) -> tuple[str, str, str]:
    """User information, what may be printed, and the query of one part of a chain."""
    scheme, mark, rest = part.partition("://")
    if not mark:
        return "", part, ""
    host = re.split(r"[/?#]", rest, maxsplit=1)[0]
    cut = host.rfind("@")
    if cut < 0 and re.search(r":(?!\d*$)", host):
        cut = rest.rfind("@")  # no port: it begins a password with a slash or a question mark
    user, place = rest[: max(cut, 0)], rest[cut + 1 :]
    place, _, query = place.partition("?")
    return user, f"{scheme}://{place}", query


def _secrets(url: str) -> list[str]:
    """Passwords and query values of a URL, as written and decoded, the longest first."""
    found: set[str] = set()
    for part in url.split("::"):
        user, _, query = _split_url(part)
        found.add(user.partition(":")[2])
        found.update(pair.partition("=")[2] for pair in query.split("&"))
    texts = {text for secret in found for text in (secret, unquote(secret)) if len(text) > 3}
    return sorted(texts, key=len, reverse=True)
