"""Both sides of a mailbox in a folder, in memory, and in a place that fails on demand."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from ecos_pl import envelope
from ecos_pl.envelope import MessageError, seal, unseal
from ecos_pl.mailbox import (
    DeadlineError,
    InProcessMailbox,
    Mailbox,
    MailboxError,
    MissingModelError,
    RefusedError,
)
from ecos_pl.message_store import MessageStore
from ecos_pl.messages import CoverageAnswer, CoverageQuery, query_id_of
from ecos_pl.printable_url import printable_url
from ecos_pl.remote_mailbox import ClientMailbox, RemoteMailbox
from ecos_pl.waiting import waiting_line

KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def a_query(attempt: int = 0) -> bytes:
    half = torch.float16
    return CoverageQuery(
        encoder={"name": "tiny", "image_size": 24, "features": "pooled"},
        encoder_fingerprint="0" * 64,
        mean=torch.zeros(3, dtype=half),
        components=torch.eye(3, dtype=half),
        centroids=torch.eye(3, dtype=half),
        noise_std=5.0,
        sample_rate=1.0,
        attempt=attempt,
    ).to_bytes()


def an_answer(query: bytes) -> bytes:
    return CoverageAnswer(
        query_id=query_id_of(query),
        sample_rate=1.0,
        relation="add/remove",
        max_per_unit=1,
        noisy_counts=torch.tensor([7, -2, 11]),
        noise_std=5.0,
    ).to_bytes()


class Time:
    """Sleeping takes no time here, but something may happen meanwhile."""

    def __init__(self, *meanwhile: Callable[[], object]) -> None:
        self.now, self.pauses, self._meanwhile = 0.0, [], list(meanwhile)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)
        if self._meanwhile:
            self._meanwhile.pop(0)()
        assert len(self.pauses) < 50, "waits for ever"

    def mailbox(self, url: object, **options: Any) -> RemoteMailbox:
        options = {"sender": "cloud", "on_wait": lambda seconds, place: None, **options}
        return RemoteMailbox(str(url), **options, sleep=self.sleep, clock=lambda: self.now)


@pytest.fixture(params=["folder", "memory", "moved"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder, a store with whole puts, and one where files are written aside and moved."""
    name = uuid.uuid4().hex
    MovingFileSystem.reset()
    return {
        "folder": str(tmp_path / "box"),
        "memory": f"memory://{name}",
        "moved": f"moving://ann:hunter22@host/{name}?token=abcd1234",
    }[request.param]


class MovingFileSystem(MemoryFileSystem):
    """A store without whole puts, which counts reads and fails when told to."""

    protocol = "moving"
    failures: ClassVar[list[Exception]] = []
    reads: ClassVar[int] = 0
    written: ClassVar[list[str]] = []

    @classmethod
    def reset(cls) -> None:
        cls.failures.clear()
        cls.written.clear()
        cls.reads = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        path = re.sub(r"^moving://([^/@]*@)?host", "memory://", path).split("?")[0]
        return super()._strip_protocol(path)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        if self.failures:
            raise self.failures.pop(0)
        return super().info(path, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        type(self).reads += 1
        return super().cat_file(path, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        self.written.append(path)
        super().pipe_file(path, value, *args, **kwargs)


fsspec.register_implementation("moving", MovingFileSystem, clobber=True)


def put(url: str, folder: str, query_id: str, content: bytes) -> None:
    """Write a file as it is, past everything that would check it."""
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(f"{root}/{folder}", exist_ok=True)
    with fs.open(f"{root}/{folder}/{query_id}.ecos", "wb") as file:
        file.write(content)


def age_of(url: str, folder: str, query_id: str) -> object:
    fs, root = fsspec.core.url_to_fs(url)
    if Path(root).exists():
        return os.stat(f"{root}/{folder}/{query_id}.ecos").st_mtime_ns
    return fs.created(f"{root}/{folder}/{query_id}.ecos")


def answer_all(url: str, key: bytes | None = None) -> None:
    client = ClientMailbox(url, sender="client", key=key)
    for query_id in client.open_queries():
        client.publish_answer(query_id, an_answer(client.read_query(query_id)[0]))


def test_a_client_in_this_process_is_made_once_and_only_when_asked() -> None:
    made = []

    class Reverser:
        adopted: ClassVar[list[bytes]] = []

        def answer(self, content: bytes) -> bytes:
            if content == b"with a model" and not self.adopted:
                raise MissingModelError(hashlib.sha256(b"weights").hexdigest())
            return content[::-1] * 2

        def adopt(self, content: bytes) -> None:
            self.adopted.append(content)

    mailbox: Mailbox = InProcessMailbox(lambda: (made.append(1), Reverser())[1], client_id="ann")
    assert (made, mailbox.bytes_sent, mailbox.bytes_received) == ([], 0, 0)
    assert mailbox.ask(b"abc") == mailbox.ask(b"abc") == b"cbacba"
    assert mailbox.ask(b"z") == b"zz"
    assert (made, mailbox.client_id) == ([1], "ann")
    assert (mailbox.bytes_sent, mailbox.bytes_received) == (3 + 1, 6 + 2)
    with pytest.raises(MissingModelError, match="does not hold the model"):
        mailbox.ask(b"with a model")
    other, model = mailbox.send_model(b"other"), mailbox.send_model(b"weights")
    assert (other, model) == (query_id_of(b"other"), query_id_of(b"weights"))
    assert mailbox.send_model(b"weights") == model
    assert mailbox.bytes_sent == 4 + 5 + 7
    assert mailbox.ask(b"with a model") == 2 * b"ledom a htiw"
    assert Reverser.adopted == [b"weights"]


@pytest.mark.parametrize("key", [None, KEY])
def test_round_trip(url: str, key: bytes | None) -> None:
    query = a_query()
    mailbox: Mailbox = Time(lambda: None, lambda: answer_all(url, key)).mailbox(url, key=key)
    assert mailbox.ask(query) == an_answer(query)
    name = query_id_of(query)
    client = ClientMailbox(url, sender="client", key=key)
    assert client.read_query(name) == (query, "cloud")
    assert client.open_queries() == []
    sent = MessageStore(url).read("queries", name)
    received = MessageStore(url).read("answers", name)
    assert sent == seal(query, sender="cloud", key=key)
    assert received == seal(an_answer(query), sender="client", key=key)
    assert (mailbox.bytes_sent, mailbox.bytes_received) == (len(sent), len(received))
    mailbox.ask(query)
    assert (mailbox.bytes_sent, mailbox.bytes_received) == (len(sent), len(received))


@pytest.mark.parametrize("key", [None, KEY])
def test_a_model_is_left_once_and_read_whole(url: str, key: bytes | None) -> None:
    model = bytes(range(256)) * 100
    mailbox: Mailbox = Time().mailbox(url, key=key)
    model_id = mailbox.send_model(model)
    assert model_id == hashlib.sha256(model).hexdigest()[:32]
    sealed = MessageStore(url).read("models", model_id)
    assert sealed == seal(model, sender="cloud", key=key)
    assert mailbox.bytes_sent == len(sealed)
    written = age_of(url, "models", model_id)
    Time().mailbox(url, key=key).send_model(model)
    mailbox.send_model(model)
    assert age_of(url, "models", model_id) == written
    assert (mailbox.bytes_sent, mailbox.bytes_received) == (len(sealed), 0)
    client = ClientMailbox(url, sender="client", key=key)
    assert client.read_model(model_id) == model
    assert client.open_queries() == []
    put(url, "models", model_id, sealed[:-1])
    with pytest.raises(MessageError, match="SHA-256"):
        client.read_model(model_id)
    mailbox.send_model(model)
    assert client.read_model(model_id) == model


def test_odd_models_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox, client = Time().mailbox(url), ClientMailbox(url, sender="client")
    with pytest.raises(MessageError, match="not in the mailbox"):
        client.read_model("a" * 32)
    put(url, "models", "a" * 32, seal(b"another", sender="cloud"))
    with pytest.raises(MessageError, match="a name that is not its own"):
        client.read_model("a" * 32)
    with pytest.raises(MessageError, match="32 hexadecimal digits"):
        client.read_model("../" + "a" * 29)
    with pytest.raises(MessageError, match="not signed"):
        ClientMailbox(url, sender="client", key=KEY).read_model("a" * 32)
    monkeypatch.setattr(envelope, "MAX_BYTES", 20_000)
    with pytest.raises(MessageError, match=r"a model of 0\.0 MB is too large .* send a smaller"):
        mailbox.send_model(bytes(19_500))
    assert mailbox.bytes_sent == 0
    mailbox.send_model(bytes(18_000))


def test_the_layout_is_three_folders_of_files_named_by_the_query(tmp_path: Path) -> None:
    query = a_query()
    Time(lambda: answer_all(str(tmp_path))).mailbox(tmp_path).ask(query)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == [f"answers/{query_id_of(query)}.ecos", f"queries/{query_id_of(query)}.ecos"]


def test_publishing_twice_writes_once(url: str) -> None:
    query = a_query()
    name = query_id_of(query)
    client = ClientMailbox(url, sender="client")

    def client_is_quick() -> None:
        answer_all(url)
        client.publish_refusal("f" * 32, "no")

    Time(client_is_quick).mailbox(url).ask(query)
    places = [("queries", name), ("answers", name), ("refusals", "f" * 32)]
    before = [age_of(url, *place) for place in places]
    Time().mailbox(url).ask(query)
    Time().mailbox(url, sender="another name").ask(query)
    client.publish_answer(name, an_answer(query))
    client.publish_refusal("f" * 32, "no")
    assert [age_of(url, *place) for place in places] == before


def test_a_damaged_query_or_answer_is_replaced_by_its_publisher(url: str) -> None:
    query = a_query()
    name = query_id_of(query)
    sealed = seal(query, sender="cloud")
    put(url, "queries", name, sealed[:-1])
    with pytest.raises(MessageError, match="SHA-256"):
        ClientMailbox(url, sender="client").read_query(name)
    with pytest.raises(DeadlineError):
        Time().mailbox(url, deadline_s=0).ask(query)
    assert MessageStore(url).read("queries", name) == sealed
    put(url, "answers", name, b"half")
    ClientMailbox(url, sender="client").publish_answer(name, an_answer(query))
    assert Time().mailbox(url).ask(query) == an_answer(query)


def test_an_unsigned_query_is_signed_once_there_is_a_key(url: str) -> None:
    query = a_query()
    for key in (None, KEY):
        with pytest.raises(DeadlineError):
            Time().mailbox(url, key=key, deadline_s=0).ask(query)
    assert ClientMailbox(url, sender="client", key=KEY).read_query(query_id_of(query))[0] == query


def test_a_refusal_ends_the_wait_and_the_next_ask_asks_again(url: str) -> None:
    query = a_query()
    client = ClientMailbox(url, sender="client")

    def refuse() -> None:
        (query_id,) = client.open_queries()
        client.publish_refusal(query_id, "the budget\nis \x1b[31mspent")

    with pytest.raises(RefusedError, match=r"^the client refuses: the budget is \[31mspent$"):
        Time(refuse).mailbox(url).ask(query)
    assert client.open_queries() == []
    time = Time(lambda: answer_all(url))
    assert time.mailbox(url).ask(query) == an_answer(query)
    assert len(time.pauses) == 1
    assert MessageStore(url).query_ids("refusals") == []


def flipped(content: bytes, position: int) -> bytes:
    at = position % len(content)
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


SEALED = seal(an_answer(a_query()), sender="client", key=KEY)
BAD_ANSWERS = {
    "empty": b"",
    "cut off": SEALED[:-1],
    "cut off early": SEALED[:40],
    "followed by more": SEALED + b"\0",
    "bit flipped in the payload": flipped(SEALED, -10),
    "bit flipped in the signature": flipped(SEALED, SEALED.index(b'"hmac"') + 12),
    "unsigned": seal(an_answer(a_query()), sender="client"),
    "signed with another key": seal(an_answer(a_query()), sender="client", key=OTHER_KEY),
    "another query's": seal(an_answer(a_query(1)), sender="client", key=KEY),
    "a query": seal(a_query(), sender="client", key=KEY),
    "no message": seal(b"not safetensors", sender="client", key=KEY),
    "not sealed": an_answer(a_query()),
    "too large": seal(an_answer(a_query()) + bytes(20_000), sender="client", key=KEY),
}


@pytest.mark.parametrize("content", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_an_answer_that_stays_bad_is_an_error_that_says_where_it_lies(
    url: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envelope, "MAX_BYTES", 20_000)
    query = a_query()
    put(url, "answers", query_id_of(query), content)
    time = Time()
    with pytest.raises(MessageError) as caught:
        time.mailbox(url, key=KEY, grace_s=10).ask(query)
    assert not isinstance(caught.value, RefusedError)
    text = str(caught.value)
    assert f"/answers/{query_id_of(query)}.ecos; delete that file" in text
    assert "\n" not in text
    assert "hunter22" not in text
    assert "abcd1234" not in text
    assert 10 <= time.now < 14
    # Put right, it is accepted.
    put(url, "answers", query_id_of(query), SEALED)
    assert Time().mailbox(url, key=KEY).ask(query) == an_answer(query)


def test_an_answer_still_being_written_is_waited_for(url: str) -> None:
    query = a_query()
    whole = seal(an_answer(query), sender="client")
    steps = [
        lambda size=size: put(url, "answers", query_id_of(query), whole[:size])
        for size in (0, 30, len(whole) // 2, len(whole))
    ]
    time = Time(*steps)
    assert time.mailbox(url).ask(query) == an_answer(query)
    assert len(time.pauses) == 4


def test_no_key_means_signed_messages_are_accepted_unchecked(url: str) -> None:
    query = a_query()
    put(url, "answers", query_id_of(query), seal(an_answer(query), sender="client", key=KEY))
    assert Time().mailbox(url).ask(query) == an_answer(query)


@pytest.mark.parametrize("signed_with", [None, OTHER_KEY])
def test_the_client_refuses_to_read_what_is_not_signed_with_its_key(
    url: str, signed_with: bytes | None
) -> None:
    with pytest.raises(DeadlineError):
        Time().mailbox(url, key=signed_with, deadline_s=0).ask(a_query())
    with pytest.raises(MessageError, match="signed"):
        ClientMailbox(url, sender="client", key=KEY).read_query(query_id_of(a_query()))


def test_a_late_answer_is_found_by_the_next_ask_without_a_new_query(url: str) -> None:
    query = a_query()
    with pytest.raises(DeadlineError) as caught:
        Time().mailbox(url, deadline_s=100).ask(query)
    assert re.fullmatch(
        r"no answer from the client since \d\d:\d\d at \S+; the same command goes on waiting: "
        "nothing is asked or paid twice",
        str(caught.value),
    )
    answer_all(url)
    asked = age_of(url, "queries", query_id_of(query))
    time = Time()
    assert time.mailbox(url, deadline_s=0).ask(query) == an_answer(query)
    assert time.pauses == []
    assert age_of(url, "queries", query_id_of(query)) == asked


def test_pauses_grow_up_to_a_limit_and_end_at_the_deadline(url: str) -> None:
    time, seen = Time(), []
    mailbox = time.mailbox(url, deadline_s=200, on_wait=lambda *words: seen.append(words))
    with pytest.raises(DeadlineError):
        mailbox.ask(a_query())
    assert time.pauses == [2, 4, 8, 16, 32, 60, 60, 18]
    assert [seconds for seconds, _ in seen] == [0, 2, 6, 14, 30, 62, 122, 182]
    assert {place for _, place in seen} == {MessageStore(url).shown}


@pytest.mark.parametrize(
    "options", [{"poll_s": 0}, {"poll_s": 90}, {"deadline_s": -1}, {"deadline_s": float("nan")}]
)
def test_impossible_waits_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="poll_s"):
        RemoteMailbox("memory://box", sender="cloud", **options)


class DriverError(Exception):
    """Like botocore's and paramiko's: not an OSError."""


LEAK = "cannot reach https://ann:hunter22@host/x?token=abcd1234\nfor hunter22, abcd1234"


def test_trouble_while_waiting_is_survived_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    MovingFileSystem.reset()
    url = f"moving://ann:hunter22@host/{uuid.uuid4().hex}?token=abcd1234"
    errors = [OSError(LEAK), TimeoutError(), DriverError(LEAK), PermissionError("no"), EOFError()]
    fail = MovingFileSystem.failures.append
    steps = [lambda error=error: fail(error) for error in errors]
    time = Time(*steps, lambda: answer_all(url))
    mailbox = time.mailbox(url, poll_s=60, on_wait=None)
    with caplog.at_level(logging.WARNING, "ecos_pl"):
        assert mailbox.ask(a_query()) == an_answer(a_query())
    assert MovingFileSystem.failures == []
    assert len(time.pauses) == 6
    lines = [record.getMessage() for record in caplog.records]
    assert [re.search(r"\((\d min)\)", line)[1] for line in lines] == ["1 min", "2 min", "4 min"]
    assert "cannot reach https://host/x for ***, ***" in lines[0]
    assert "the last try failed (cannot read from answers/: no), trying again" in lines[2]
    assert "ecos-client serve DIR --mailbox moving://host/" in lines[0]
    assert not any(secret in caplog.text for secret in ("ann:", "hunter22", "abcd1234"))


def test_trouble_that_lasts_until_the_deadline_is_named_without_secrets() -> None:
    MovingFileSystem.reset()
    url = f"moving://ann:hunter22@host/{uuid.uuid4().hex}?token=abcd1234"
    fail = MovingFileSystem.failures.append
    mailbox = Time(*[lambda: fail(DriverError(LEAK))] * 99).mailbox(url, deadline_s=500)
    with pytest.raises(DeadlineError) as caught:
        mailbox.ask(a_query())
    text = f"{caught.value} {mailbox.client_id}"
    assert "(the last try failed: cannot read from answers/: cannot reach" in text
    assert not any(secret in text for secret in ("ann:", "hunter22", "abcd1234", "\n"))


def test_trouble_at_first_contact_is_raised_at_once_without_secrets() -> None:
    MovingFileSystem.reset()
    url = f"moving://ann:hunter22@host/{uuid.uuid4().hex}?token=abcd1234"
    MovingFileSystem.failures.append(DriverError(LEAK))
    time = Time()
    with pytest.raises(MailboxError, match=r"^moving://host/\w+: cannot read from") as caught:
        time.mailbox(url).ask(a_query())
    assert time.pauses == []
    assert caught.value.__suppress_context__, "a traceback would print the driver's own words"
    assert not any(s in str(caught.value) for s in ("hunter22", "abcd1234", "\n"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MailboxError, match=r"cannot (read from|write to) queries/") as caught:
        Time().mailbox(tmp_path / "file").ask(a_query())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [
        ("s3://key:hunter22@bucket/x", "s3fs", "s3fs"),
        ("gs://bucket/x", "gcsfs", "gcsfs"),
        ("sftp://ann:hunter22@host/x", "paramiko", "paramiko"),
        ("simplecache::s3://bucket/x", "s3fs", "s3fs"),
    ],
)
def test_a_missing_driver_is_named(
    url: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.sftp", raising=False)
    for protocol in ("s3", "gs", "sftp"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    for side in (RemoteMailbox, ClientMailbox):
        with pytest.raises(MailboxError) as caught:
            side(url, sender="cloud")
        assert str(caught.value).endswith(f"is not installed: pip install {package}")
        assert "hunter22" not in str(caught.value)


def test_an_unknown_kind_of_location_is_one_line() -> None:
    with pytest.raises(MailboxError, match=r"^zork://box: zork:// is no known kind of location$"):
        RemoteMailbox("zork://ann:pass@box", sender="cloud")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/data/box@home?", "/data/box@home?"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("s3://key:secret@bucket/a@b", "s3://bucket/a@b"),
        ("sftp://ann@host:22/box", "sftp://host:22/box"),
        ("sftp://ann:a/b?c@host/box", "sftp://host/box"),
        ("https://host/box?sig=secret#part", "https://host/box"),
        ("simplecache::az://n:secret@box/x", "simplecache::az://box/x"),
    ],
)
def test_printed_urls_hold_no_credentials(url: str, shown: str) -> None:
    assert printable_url(url) == shown


def test_nothing_is_contacted_before_the_first_message(tmp_path: Path) -> None:
    MovingFileSystem.reset()
    MovingFileSystem.failures.append(OSError("contacted"))
    for side in (RemoteMailbox, ClientMailbox):
        side("moving://host/box", sender="cloud")
        side(str(tmp_path / "box"), sender="cloud")
    assert len(MovingFileSystem.failures) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_same_place_is_the_same_client(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["box", "box/", str(tmp_path / "box"), f"file://{tmp_path}/box"]
    folders = {RemoteMailbox(name, sender="cloud").client_id for name in names}
    assert folders == {f"mailbox {tmp_path}/box"}
    urls = ["s3://key:hunter22@bucket/a", "s3://bucket/a", "s3://bucket/a/"]
    assert {RemoteMailbox(url, sender="cloud").client_id for url in urls} == {
        "mailbox s3://bucket/a"
    }


def test_a_chained_url_works() -> None:
    url = f"dir::memory://{uuid.uuid4().hex}"
    assert Time(lambda: answer_all(url)).mailbox(url).ask(a_query()) == an_answer(a_query())


def test_open_queries_are_the_unanswered_ones_oldest_first(tmp_path: Path) -> None:
    queries = [a_query(attempt) for attempt in range(6)]
    names = [query_id_of(query) for query in queries]
    for age, (name, query) in enumerate(zip(names, queries, strict=True)):
        put(str(tmp_path), "queries", name, seal(query, sender="cloud"))
        os.utime(tmp_path / "queries" / f"{name}.ecos", (0, 1e9 - 100 * age))
    client = ClientMailbox(str(tmp_path), sender="client")
    client.publish_answer(names[1], an_answer(queries[1]))
    client.publish_refusal(names[4], "no")
    for odd in (".hidden", "notes.txt", "A" * 32 + ".ecos", "a" * 31 + ".ecos", "b" * 32):
        (tmp_path / "queries" / odd).write_text("not a query")
    (tmp_path / "queries" / f"{'c' * 32}.ecos").mkdir()
    assert client.open_queries() == [names[5], names[3], names[2], names[0]]


def test_an_empty_mailbox_has_no_queries(url: str) -> None:
    client = ClientMailbox(url, sender="client")
    assert client.open_queries() == []
    with pytest.raises(MessageError, match="no longer"):
        client.read_query("a" * 32)


def test_a_query_under_another_name_is_refused(url: str) -> None:
    put(url, "queries", "a" * 32, seal(a_query(), sender="cloud"))
    with pytest.raises(MessageError, match="not its own"):
        ClientMailbox(url, sender="client").read_query("a" * 32)


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 32, "a" * 33, "a" * 32 + "\n"])
def test_names_that_are_no_ids_reach_no_file(tmp_path: Path, name: str) -> None:
    client = ClientMailbox(str(tmp_path), sender="client")
    for act in (
        lambda: client.read_query(name),
        lambda: client.publish_answer(name, b"x"),
        lambda: client.publish_refusal(name, "no"),
    ):
        with pytest.raises(MessageError, match="32 hexadecimal digits"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_what_is_too_large_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    MovingFileSystem.reset()
    url = f"moving://host/{uuid.uuid4().hex}"
    name = query_id_of(a_query())
    put(url, "queries", name, seal(a_query(), sender="cloud"))
    client = ClientMailbox(url, sender="client")
    monkeypatch.setattr(envelope, "MAX_BYTES", 100)
    with pytest.raises(MessageError, match="exceeds the limit 100"):
        client.read_query(name)
    assert MovingFileSystem.reads == 0


def test_a_store_without_whole_puts_is_written_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    MovingFileSystem.reset()
    store = MessageStore(f"moving://host/{uuid.uuid4().hex}")
    for content in (b"one", b"two"):
        store.write("answers", "a" * 32, content)
        assert store.read("answers", "a" * 32) == content
    assert all("/." in path for path in MovingFileSystem.written)

    def broken(*args: object, **options: object) -> None:
        raise OSError("the line is down")

    monkeypatch.setattr(MovingFileSystem, "mv", broken)
    with pytest.raises(MailboxError, match="the line is down"):
        store.write("answers", "b" * 32, b"three")
    fs, _ = fsspec.core.url_to_fs("memory://")
    assert not fs.exists(MovingFileSystem.written[-1]), "the file aside is left behind"


def test_a_reader_never_sees_a_part_of_a_file(tmp_path: Path) -> None:
    name, rounds = "a" * 32, 60
    contents = [seal(bytes([number]) * 300_000, sender="cloud") for number in range(2)]
    failures: list[Exception] = []
    reading = threading.Event()

    def write(content: bytes) -> None:
        store = MessageStore(str(tmp_path))
        for _ in range(rounds):
            store.write("queries", name, content)
        reading.set()

    def read() -> None:
        store = MessageStore(str(tmp_path))
        while not reading.is_set():
            try:
                found = store.read("queries", name)
                assert found is None or len(unseal(found)[0]) == 300_000
                assert store.query_ids("queries") in ([], [name])
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    threads += [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_log_tells_of_the_wait_after_1_2_4_and_8_minutes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        caplog.at_level(logging.WARNING, "ecos_pl"),
        waiting_line(datetime(2026, 3, 1, 16, 41), "s3://box") as show,
    ):
        for minute in range(0, 11):
            show(60.0 * minute, "")
    assert [record.getMessage() for record in caplog.records] == [
        f"waiting for the client since 16:41 ({minutes} min) at s3://box; "
        "on its side: ecos-client serve DIR --mailbox s3://box"
        for minutes in (1, 2, 4, 8)
    ]


def test_a_terminal_shows_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    with waiting_line(datetime(2026, 3, 1, 16, 41), "/data/[box]") as show:
        show(190.0, "no route")
        wanted = "since 16:41 (3 min) at /data/[box]"
        while wanted not in terminal.getvalue():
            threading.Event().wait(0.02)  # it is drawn by a thread
    assert "no route" in terminal.getvalue()
