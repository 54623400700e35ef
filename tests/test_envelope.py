import json

import pytest

from ecos_pl import envelope
from ecos_pl.envelope import (
    MessageError,
    is_signed,
    new_key_file,
    read_key_file,
    seal,
    unseal,
)

PAYLOAD = bytes(range(256)) * 3
KEY, OTHER_KEY = b"k" * 32, b"o" * 32


def refused(content, key=None):
    with pytest.raises(MessageError) as caught:
        unseal(content, key=key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip_with_and_without_a_key():
    for key in (None, KEY):
        sealed = seal(PAYLOAD, sender="Krankenhaus Süd", key=key)
        assert unseal(sealed, key=key) == (PAYLOAD, "Krankenhaus Süd")
        assert is_signed(sealed) == (key is not None)
        assert sealed == seal(PAYLOAD, sender="Krankenhaus Süd", key=key)
    assert unseal(seal(b"", sender="x")) == (b"", "x")


def test_a_side_without_a_key_still_reads_a_signed_message():
    assert unseal(seal(PAYLOAD, sender="a", key=KEY)) == (PAYLOAD, "a")


def test_signatures_are_checked():
    assert "another key" in refused(seal(PAYLOAD, sender="a", key=OTHER_KEY), KEY)
    assert "not signed" in refused(seal(PAYLOAD, sender="a"), KEY)


def test_a_forger_without_the_key_cannot_change_payload_or_sender():
    ours = json.loads(seal(PAYLOAD, sender="a", key=KEY).partition(b"\n")[0])
    for payload, sender in ((b"other", "a"), (PAYLOAD, "b")):
        forged = json.loads(seal(payload, sender=sender).partition(b"\n")[0])
        line = {**forged, "hmac": ours["hmac"]}
        assert "another key" in refused(json.dumps(line).encode() + b"\n" + payload, KEY)


def test_every_flipped_bit_and_every_truncation_is_refused():
    sealed = seal(PAYLOAD, sender="a", key=KEY)
    for place in range(len(sealed)):
        for bit in (1, 32):
            flipped = bytearray(sealed)
            flipped[place] ^= bit
            refused(bytes(flipped), KEY)
    for length in range(len(sealed)):
        refused(sealed[:length], KEY)
    refused(sealed + b"\0", KEY)


def test_without_a_key_every_accident_in_the_payload_is_noticed():
    sealed = seal(PAYLOAD, sender="a")
    start = sealed.index(b"\n") + 1
    for place in range(start, len(sealed)):
        flipped = bytearray(sealed)
        flipped[place] ^= 4
        assert "SHA-256 differs" in refused(bytes(flipped))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{}",
        "[]",
        "3",
        '"text"',
        "[" * 900,
        '{"ecos": true, "from": "a", "sha256": "00"}',
        '{"ecos": 2, "from": "a", "sha256": "00"}',
        '{"ecos": 2, "from": "a", "from": "b", "sha256": "%s"}' % ("0" * 64),
        '{"ecos": 2, "from": "a", "sha256": "%s", "more": 1}' % ("0" * 64),
        '{"ecos": 2, "from": 3, "sha256": "%s"}' % ("0" * 64),
        '{"ecos": 2, "from": "", "sha256": "%s"}' % ("0" * 64),
        '{"ecos": 2, "from": "a\\u0007", "sha256": "%s"}' % ("0" * 64),
    ],
)
def test_odd_first_lines_are_refused(line):
    refused(line.encode() + b"\n" + PAYLOAD)


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 5000, b"\xff\xfe\n", b"PK\x03\x04\n"])
def test_foreign_bytes_are_refused(content):
    refused(content)


def test_another_version_is_named():
    line = '{"ecos": 1, "from": "a", "sha256": "%s"}' % ("0" * 64)
    assert refused(line.encode() + b"\n") == "message version 1, expected 2"


def test_too_large_a_message_is_refused_before_it_is_parsed(monkeypatch):
    sealed = seal(PAYLOAD, sender="a")
    monkeypatch.setattr(envelope, "MAX_BYTES", len(sealed) - 1)
    monkeypatch.setattr(envelope, "_split", None)  # never reached
    assert "exceeds the limit" in refused(sealed)
    with pytest.raises(MessageError, match="exceeds the limit"):
        seal(PAYLOAD, sender="a")


@pytest.mark.parametrize("sender", ["", "a\nb", "x" * 101, "\x1b[31m"])
def test_a_sender_must_be_printable(sender):
    with pytest.raises(MessageError, match="printable"):
        seal(PAYLOAD, sender=sender)


def test_a_key_file_is_private_fresh_and_never_overwritten(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        new_key_file(path)
        assert path.stat().st_mode & 0o777 == 0o600
    keys = [read_key_file(path) for path in paths]
    assert keys[0] != keys[1]
    assert all(len(key) == 64 for key in keys)
    with pytest.raises(ValueError, match="never overwritten"):
        new_key_file(paths[0])
    assert read_key_file(paths[0]) == keys[0]


def test_missing_and_short_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read the key file"):
        read_key_file(tmp_path / "none")
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(ValueError, match="too short"):
        read_key_file(tmp_path / "short")
    with pytest.raises(ValueError, match="cannot write the key file"):
        new_key_file(tmp_path / "no" / "folder")
