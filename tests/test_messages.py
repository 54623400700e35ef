import dataclasses
import json
import math
import struct

import pytest
import torch
from safetensors.torch import save

from ecos_pl import message_format
from ecos_pl.message_format import describe_message
from ecos_pl.messages import (
    CoverageAnswer,
    CoverageQuery,
    MessageError,
    PrototypeAnswer,
    PrototypeQuery,
    Refusal,
    TableAnswer,
    TableQuery,
    VoteAnswer,
    VoteQuery,
    kind_of,
    query_id_of,
    read_query,
)


def table(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coverage_query(**changes):
    fields = {
        "encoder": {"name": "tf_efficientnet_lite0", "image_size": 48, "features": "final"},
        "encoder_fingerprint": "ab" * 32,
        "mean": table(6).half(),
        "components": table(3, 6, seed=1).half(),
        "centroids": table(5, 3, seed=2).half(),
        "noise_std": 5.0,
        "sample_rate": 0.25,
        "attempt": 0,
    }
    return CoverageQuery(**{**fields, **changes})


def coverage_answer(**changes):
    fields = {
        "query_id": "0" * 32,
        "noisy_counts": torch.tensor([3, -7, 2**40]),
        "noise_std": 5.0,
        "sample_rate": 0.25,
        "relation": "add/remove",
        "max_per_unit": 1,
    }
    return CoverageAnswer(**{**fields, **changes})


def prototype_query(**changes):
    fields = {
        "encoder": {"name": "x", "image_size": 32, "features": "grid"},
        "encoder_fingerprint": "cd" * 32,
        "mean": table(4).half(),
        "components": table(2, 4).half(),
        "classes": ["zero", "œuf 🦆", 'a"b\n'],
        "clip_norm": 1.0,
        "count_weight": 0.1,
        "noise_multiplier": 4.4,
        "sample_rate": 1.0,
        "attempt": 1,
    }
    return PrototypeQuery(**{**fields, **changes})


def prototype_answer():
    return PrototypeAnswer(
        query_id="1" * 32,
        sums=torch.arange(-3, 3).view(3, 2),
        counts=torch.tensor([1, 2, -3]),
        grid=2**-10,
        clip_norm=1.0,
        count_weight=0.1,
        noise_std=4500.1,
        sample_rate=1.0,
        relation="add/remove",
        max_per_unit=1,
    )


def table_query(**changes):
    fields = {f.name: getattr(coverage_query(), f.name) for f in dataclasses.fields(CoverageQuery)}
    return TableQuery(**{**fields, "classes": ["cat", "dog"], **changes})


def vote_query(**changes):
    fields = {
        "encoder": {"name": "x", "image_size": 32, "features": "grid"},
        "encoder_fingerprint": "cd" * 32,
        "mean": table(4).half(),
        "components": table(2, 4).half(),
        "points": table(7, 2).half(),
        "classes": ["cat", "dog"],
        "num_neighbors": 40,
        "max_answers": 5,
        "vote_noise_std": 20.0,
        "screening_noise_std": 30.5,
        "threshold": 24.0,
        "sample_rate": 1.0,
        "attempt": 0,
    }
    return VoteQuery(**{**fields, **changes})


DECLARED = {
    "query_id": "2" * 32,
    "sample_rate": 1.0,
    "relation": "add/remove",
    "max_per_unit": 3,
}
TABLE = TableAnswer(noisy_counts=torch.arange(-4, 6).view(5, 2), noise_std=4.0, **DECLARED)
VOTES = VoteAnswer(labels=torch.tensor([0, -1, 1]), **DECLARED)
QUERIES = [coverage_query(), prototype_query(), table_query(), vote_query()]
ALL = [*QUERIES, coverage_answer(), prototype_answer(), TABLE, VOTES, Refusal("0" * 32, "no")]
each = pytest.mark.parametrize("message", ALL, ids=lambda message: message.kind)


def refusal(content, cls=CoverageAnswer):
    with pytest.raises(MessageError) as caught:
        cls.from_bytes(content)
    assert "\n" not in str(caught.value)
    assert str(caught.value)
    return str(caught.value)


def header_of(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["header"])


def with_header(header, **tensors):
    """A coverage answer's bytes with any header: a mapping, or text as it stands."""
    text = header if isinstance(header, str) else json.dumps(header)
    return save(tensors or {"noisy_counts": torch.zeros(3, dtype=torch.int64)}, {"header": text})


GOOD = header_of(coverage_answer().to_bytes())


@each
def test_round_trip(message):
    back = type(message).from_bytes(message.to_bytes())
    assert type(back) is type(message)
    for field in dataclasses.fields(message):
        value, found = getattr(message, field.name), getattr(back, field.name)
        if isinstance(value, torch.Tensor):
            assert found.dtype == value.dtype
            assert torch.equal(found, value)
        else:
            assert found == value
    assert back.to_bytes() == message.to_bytes()
    assert kind_of(message.to_bytes()) == message.kind


@each
def test_equal_content_gives_equal_bytes(message):
    values = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
    copies = {
        k: v.clone() if isinstance(v, torch.Tensor) else json.loads(json.dumps(v))
        for k, v in reversed(values.items())
    }
    assert type(message)(**copies).to_bytes() == message.to_bytes()


def test_layout_in_memory_and_order_of_keys_do_not_change_the_bytes():
    one = coverage_query()
    turned = coverage_query(
        components=one.components.T.contiguous().T, encoder=dict(reversed(one.encoder.items()))
    )
    assert turned.to_bytes() == one.to_bytes()
    assert query_id_of(one.to_bytes()) != query_id_of(coverage_query(attempt=1).to_bytes())
    assert len(query_id_of(one.to_bytes())) == 32


def test_nothing_but_the_fields_crosses():
    size = len(coverage_answer().to_bytes())
    assert size < 620
    assert len(coverage_answer(noisy_counts=torch.zeros(1003).long()).to_bytes()) - size < 8020
    names = {f.name for f in dataclasses.fields(CoverageAnswer)}
    assert set(GOOD) == (names - {"noisy_counts"}) | {"kind", "version"}


@each
def test_every_truncation_is_refused(message):
    content = message.to_bytes()
    for length in range(len(content)):
        refusal(content[:length], type(message))
    refusal(content + b"\0", type(message))


@each
def test_a_flipped_bit_is_refused_or_harmless(message):
    """No other exception ever; one inside a value makes another valid message."""
    content = message.to_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    refused = 0
    for place in range(start):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        try:
            back = type(message).from_bytes(bytes(flipped))
            assert query_id_of(bytes(flipped)) != query_id_of(content)
            back.to_bytes()
        except MessageError:
            refused += 1
            refusal(bytes(flipped), type(message))
    assert refused > start / 3


@each
def test_other_kinds_are_refused(message):
    for other in ALL:
        if other.kind != message.kind:
            reason = refusal(other.to_bytes(), type(message))
            assert reason == f"expected a {message.kind}, got a '{other.kind}'"


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_other_versions_are_refused(version):
    content = with_header({**GOOD, "version": version})
    assert refusal(content) == f"message version {version!r}, expected 2"
    with pytest.raises(MessageError, match="version"):
        kind_of(content)


def test_missing_unknown_and_repeated_fields_are_named():
    fewer = {k: v for k, v in GOOD.items() if k != "noise_std"}
    assert "'noise_std'" in refusal(with_header(fewer))
    assert "'raw_counts'" in refusal(with_header({**GOOD, "raw_counts": [1]}))
    assert "'extra'" in refusal(
        with_header(GOOD, noisy_counts=torch.zeros(3).long(), extra=torch.zeros(1))
    )
    assert "'noisy_counts'" in refusal(with_header(GOOD, other=torch.zeros(3)))
    assert "'noisy_counts'" in refusal(with_header({**GOOD, "noisy_counts": 1}))
    refusal(with_header({**GOOD, "new\nline": 1}))
    assert "a name occurs twice" in refusal(
        with_header(json.dumps(GOOD)[:-1] + ', "noise_std": 9.0}')
    )


@pytest.mark.parametrize("header", ["", "[]", "3", "null", '"text"', "{", "{}", "[" * 100_000])
def test_headers_that_are_no_mapping_are_refused(header):
    content = with_header(header)
    refusal(content)
    with pytest.raises(MessageError):
        kind_of(content)


def test_foreign_safetensors_are_refused():
    refusal(save({"noisy_counts": torch.zeros(3).long()}))
    refusal(save({"noisy_counts": torch.zeros(3).long()}, {"other": "x"}))
    for content in (b"", b"\0" * 8, b"\xff" * 64, b"PK\x03\x04" * 20):
        refusal(content)
        with pytest.raises(MessageError):
            kind_of(content)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_plain_numbers_that_are_not_finite_are_refused(number):
    text = json.dumps(GOOD).replace('"noise_std": 5.0', f'"noise_std": {number}')
    assert number in refusal(with_header(text))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tensors_that_are_not_finite_are_refused(value):
    bad = coverage_query().mean.clone()
    bad[2] = value
    with pytest.raises(MessageError, match="mean holds a value that is not finite"):
        coverage_query(mean=bad).to_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        coverage_answer(noise_std=value).to_bytes()
    query = coverage_query()
    tensors = {"mean": bad, "components": query.components, "centroids": query.centroids}
    content = save(tensors, {"header": json.dumps(header_of(query.to_bytes()))})
    assert "mean holds a value that is not finite" in refusal(content, CoverageQuery)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_std", "5"),
        ("noise_std", None),
        ("noise_std", True),
        ("query_id", 5),
        ("sample_rate", [0.5]),
        ("relation", {}),
    ],
)
def test_values_of_another_type_are_refused(field, value):
    assert field in refusal(with_header({**GOOD, field: value}))


@pytest.mark.parametrize("classes", ["abc", [1, 2], [["a"]], {"a": 1}])
def test_classes_must_be_a_list_of_names(classes):
    query = prototype_query()
    header = {**header_of(query.to_bytes()), "classes": classes}
    content = save(
        {"mean": query.mean, "components": query.components}, {"header": json.dumps(header)}
    )
    assert "classes" in refusal(content, PrototypeQuery)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.bool, torch.uint8])
def test_tensors_of_other_types_are_refused(dtype):
    assert "noisy_counts" in refusal(with_header(GOOD, noisy_counts=torch.zeros(3).to(dtype)))


def test_a_tensor_cannot_stand_in_for_a_number():
    header = {k: v for k, v in GOOD.items() if k != "noise_std"}
    tensors = {"noisy_counts": torch.zeros(3).long(), "noise_std": torch.tensor(5.0)}
    assert "noise_std" in refusal(with_header(header, **tensors))


def test_a_message_above_the_limit_is_refused(monkeypatch):
    content = coverage_answer().to_bytes()
    monkeypatch.setattr(message_format, "MAX_BYTES", len(content))
    CoverageAnswer.from_bytes(content)
    monkeypatch.setattr(message_format, "MAX_BYTES", len(content) - 1)
    assert "exceeds the limit" in refusal(content)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean": torch.zeros(5).half()},
        {"mean": torch.zeros(6, 1).half()},
        {"components": torch.zeros(6).half()},
        {"components": torch.zeros(0, 6).half()},
        {"centroids": torch.zeros(5, 4).half()},
        {"centroids": torch.zeros(3).half()},
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes):
    with pytest.raises(MessageError, match=r"projection|centroids"):
        coverage_query(**changes)
    query = coverage_query()
    tensors = {k: getattr(query, k) for k in ("mean", "components", "centroids")}
    header = json.dumps(header_of(query.to_bytes()))
    refusal(save({**tensors, **changes}, {"header": header}), CoverageQuery)


def test_projection_against_its_formula():
    query, rows = coverage_query(), table(7, 6, seed=3)
    expected = (rows.double() - query.mean.double()) @ query.components.double().T
    assert query.project(rows).dtype == torch.float32
    assert torch.allclose(query.project(rows).double(), expected, atol=1e-5)
    assert query.project(rows[:0]).shape == (0, 3)


@pytest.mark.parametrize("num_dims", [7, 31, 33, 64, 100])
@pytest.mark.parametrize("num_kept", [1, 5, 16])
def test_each_row_is_projected_on_its_own_bit_for_bit(num_dims, num_kept):
    """Or else one private image could move the others' bins."""
    query = coverage_query(
        mean=table(num_dims).half(),
        components=table(num_kept, num_dims).half(),
        centroids=table(2, num_kept).half(),
    )
    rows = table(60, num_dims, seed=4)
    whole = query.project(rows)
    for skip in (1, 2, 3):
        assert torch.equal(query.project(rows[skip:]), whole[skip:])
        assert torch.equal(query.project(rows[::skip]), whole[::skip])
    assert torch.equal(query.project(rows.flip(0)), whole.flip(0))
    assert torch.equal(torch.cat([query.project(row[None]) for row in rows]), whole)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.kind)
def test_every_query_is_read_and_no_answer_is_one(query):
    assert read_query(query.to_bytes()).to_bytes() == query.to_bytes()
    with pytest.raises(MessageError, match="does not answer a 'vote_answer'"):
        read_query(VOTES.to_bytes())


@pytest.mark.parametrize(
    "encoder",
    [
        {},
        {"name": "x", "image_size": 48},
        {"name": "x", "image_size": 48, "features": "final", "weights": "/home/me"},
        {"name": "x", "image_size": 48, "model": "0" * 64},
        {"name": "", "image_size": 48, "features": "final"},
        {"name": ["x"], "image_size": 48, "features": "final"},
        {"name": "x\n", "image_size": 48, "features": "final"},
        {"name": "x", "image_size": 48.0, "features": "final"},
        {"name": "x", "image_size": True, "features": "final"},
        {"name": "x", "image_size": 10**6, "features": "final"},
        {"name": "x", "image_size": 48, "features": None},
    ],
)
def test_the_encoder_is_named_and_nothing_else(encoder):
    with pytest.raises(MessageError, match="name, image_size and features alone"):
        coverage_query(encoder=encoder)


def test_a_backbone_trained_further_is_named_by_its_hash():
    encoder = {**coverage_query().encoder, "model": "0f" * 32}
    content = coverage_query(encoder=encoder).to_bytes()
    assert CoverageQuery.from_bytes(content).encoder["model"] == "0f" * 32
    assert query_id_of(content) != query_id_of(coverage_query().to_bytes())
    assert f"model: {json.dumps('0f' * 32)}" in "\n".join(describe_message(content))


@pytest.mark.parametrize("name", ["mean", "components", "centroids"])
def test_float32_is_refused_where_float16_is_due(name):
    with pytest.raises(MessageError, match=f"{name} must be float16"):
        coverage_query(**{name: getattr(coverage_query(), name).float()})


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([], "between 1 and 10,000"),
        (["a", "a"], "named twice"),
        (["a" * 201], "1 to 200 characters"),
        ([""], "1 to 200 characters"),
        ([str(number) for number in range(10_001)], "between 1 and 10,000"),
    ],
)
def test_odd_classes_are_refused(classes, words):
    for make in (prototype_query, table_query, vote_query):
        with pytest.raises(MessageError, match=words):
            make(classes=classes)


def test_a_number_beyond_any_range_is_refused_and_breaks_nothing():
    text = json.dumps(GOOD).replace('"noise_std": 5.0', '"noise_std": 1' + "0" * 400)
    assert "noise_std is out of range" in refusal(with_header(text))


@each
def test_a_message_in_words_names_every_field_and_fits_a_terminal(message):
    lines = describe_message(message.to_bytes())
    assert lines[0] == f"{message.kind} (version 2)"
    for field in dataclasses.fields(message):
        assert any(line.split()[0] == field.name for line in lines[1:])
    assert all(line.isprintable() for line in lines)
