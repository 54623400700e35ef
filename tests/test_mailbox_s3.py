"""Both sides of a mailbox in a bucket, against a real S3 protocol server on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from s3_server import BUCKET, S3Server, s3_server
from test_mailbox import Time, a_query, an_answer, answer_all

from ecos_pl import envelope
from ecos_pl.envelope import MessageError, seal
from ecos_pl.mailbox import DeadlineError, MailboxError, RefusedError
from ecos_pl.messages import query_id_of
from ecos_pl.remote_mailbox import ClientMailbox

KEY = b"k" * 32
URL = f"s3://{BUCKET}/project"
QUERY = a_query()
NAME = query_id_of(QUERY)


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def server(running: S3Server) -> S3Server:
    """The server with an empty bucket."""
    boto = running.boto()
    found = boto.list_object_versions(Bucket=BUCKET)
    for item in [*found.get("Versions", []), *found.get("DeleteMarkers", [])]:
        boto.delete_object(Bucket=BUCKET, Key=item["Key"], VersionId=item["VersionId"])
    return running


def put(server: S3Server, folder: str, content: bytes) -> None:
    server.boto().put_object(Bucket=BUCKET, Key=f"project/{folder}/{NAME}.ecos", Body=content)


def test_round_trip_writes_every_object_once(server: S3Server) -> None:
    mailbox = Time(lambda: None, lambda: answer_all(URL, KEY)).mailbox(URL, key=KEY)
    assert mailbox.ask(QUERY) == an_answer(QUERY)
    objects = [f"project/answers/{NAME}.ecos", f"project/queries/{NAME}.ecos"]
    assert server.keys() == objects
    sealed = [
        seal(QUERY, sender="cloud", key=KEY),
        seal(an_answer(QUERY), sender="client", key=KEY),
    ]
    assert [mailbox.bytes_sent, mailbox.bytes_received] == [len(message) for message in sealed]
    assert Time().mailbox(URL, key=KEY).ask(QUERY) == an_answer(QUERY)
    client = ClientMailbox(URL, sender="client", key=KEY)
    client.publish_answer(NAME, an_answer(QUERY))
    assert client.read_query(NAME) == (QUERY, "cloud")
    assert [server.versions(key) for key in objects] == [1, 1]


def test_listings_are_never_stale(server: S3Server) -> None:
    client = ClientMailbox(f"s3://{BUCKET}", sender="client")
    assert client.open_queries() == []
    for attempt in range(3):
        query = a_query(attempt)
        with pytest.raises(DeadlineError):
            Time().mailbox(f"s3://{BUCKET}", deadline_s=0).ask(query)
        assert client.open_queries() == [query_id_of(query)]
        client.publish_answer(query_id_of(query), an_answer(query))
        assert client.open_queries() == []


def test_a_refusal_and_asking_again(server: S3Server) -> None:
    client = ClientMailbox(URL, sender="client")
    with pytest.raises(RefusedError, match="budget"):
        Time(lambda: client.publish_refusal(NAME, "the budget is spent")).mailbox(URL).ask(QUERY)
    assert client.open_queries() == []
    assert Time(lambda: answer_all(URL)).mailbox(URL).ask(QUERY) == an_answer(QUERY)


@pytest.mark.parametrize("damage", ["empty", "cut", "large"])
def test_damage_is_noticed_and_put_right(
    server: S3Server, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = seal(an_answer(QUERY), sender="client", key=KEY)
    monkeypatch.setattr(envelope, "MAX_BYTES", 20_000)
    content = {
        "empty": b"",
        "cut": whole[:-3],
        "large": whole + bytes(20_000),
    }[damage]
    put(server, "answers", content)
    with pytest.raises(MessageError, match=f"s3://{BUCKET}/project/answers/{NAME}.ecos; delete"):
        Time().mailbox(URL, key=KEY).ask(QUERY)
    time = Time(lambda: put(server, "answers", whole))
    assert time.mailbox(URL, key=KEY).ask(QUERY) == an_answer(QUERY)


def test_a_missing_bucket_is_one_line_on_both_sides_and_none_is_made(server: S3Server) -> None:
    url = "s3://mistyped-box/project"
    time = Time()
    with pytest.raises(MailboxError, match=r"s3://mistyped-box/project: .*does not exist"):
        time.mailbox(url).ask(QUERY)
    assert time.pauses == []
    with pytest.raises(MailboxError, match="does not exist"):
        ClientMailbox(url, sender="client").open_queries()
    assert [b["Name"] for b in server.boto().list_buckets()["Buckets"]] == [BUCKET]


@pytest.mark.slow
def test_a_server_that_goes_away_while_the_cloud_waits(server: S3Server) -> None:
    troubled = []

    def comes_back() -> None:
        troubled.append(True)
        server.start()
        answer_all(URL)

    time = Time(server.stop, comes_back)
    assert time.mailbox(URL).ask(QUERY) == an_answer(QUERY)
    assert troubled == [True]
