import dataclasses

import pytest

from ecos_pl.client_policy import ClientPolicy, PolicyError, read_policy, write_policy
from ecos_pl.encoder import EncoderSpec

FULL = ClientPolicy(
    max_epsilon=1.5,
    delta=3e-6,
    min_noise_std=7.25,
    min_noise_multiplier=2.0,
    max_sample_rate=0.3,
    max_queries=4,
    max_clusters=300,
    max_per_person=5,
    confirm=True,
    adapted_encoders=False,
    encoder=EncoderSpec("resnet18", "a folder/weights: 1.pth", 96),
    fingerprint="ab" * 32,
)


@pytest.mark.parametrize("policy", [ClientPolicy(), FULL])
def test_what_is_written_is_read(tmp_path, policy):
    write_policy(tmp_path / "policy.yaml", policy)
    assert read_policy(tmp_path / "policy.yaml") == policy


def test_every_setting_is_in_the_file_with_a_comment(tmp_path):
    write_policy(tmp_path / "policy.yaml", FULL)
    text = (tmp_path / "policy.yaml").read_text()
    for field in dataclasses.fields(ClientPolicy):
        assert f"\n{field.name}: " in text
    assert text.count("#") > len(dataclasses.fields(ClientPolicy))
    assert max(map(len, text.splitlines())) <= 100


def test_it_is_never_overwritten(tmp_path):
    write_policy(tmp_path / "policy.yaml", FULL)
    with pytest.raises(PolicyError, match="never overwritten"):
        write_policy(tmp_path / "policy.yaml", ClientPolicy())
    assert read_policy(tmp_path / "policy.yaml") == FULL


@pytest.mark.parametrize(
    ("line", "other", "words"),
    [
        ("confirm: true", "confirm: maybe", "confirm must be true or false, not 'maybe'"),
        ("max_queries: 4", "max_queries: 4.5", "max_queries must be a whole number or null"),
        ("max_queries: 4", "max_queries: 0", "max_queries must be 1 or more"),
        ("delta: 3e-06", "delta: 2", "delta must lie in"),
        ("delta: 3e-06", "delta: .nan", "delta must be finite"),
        ("max_epsilon: 1.5", "max_epsilon: -1", "max_epsilon must be finite and above zero"),
        ("max_epsilon: 1.5", "max_epsilon: .inf", "max_epsilon must be finite and above zero"),
        ("max_epsilon: 1.5", "max_epsilon: yes", "max_epsilon must be a number or null"),
        ("min_noise_std: 7.25", "min_noise_std: 0", "min_noise_std must be 0.5 or more"),
        ("min_noise_std: 7.25", "min_noise_sdt: 7", "did you mean min_noise_std"),
        ("confirm: true", "", "the line for confirm is missing"),
        ("adapted_encoders: false", "adapted_encoders: 0", "must be true or false, not 0"),
        ("image_size: 96", "image_size: null", "image_size must be given"),
        ("encoder: resnet18", "encoder: ask", "goes with image_size: null"),
        ("max_clusters: 300", "max_clusters: [3", "cannot be read"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, other, words):
    path = tmp_path / "policy.yaml"
    write_policy(path, FULL)
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, other))
    with pytest.raises(PolicyError, match=words) as caught:
        read_policy(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_small_numbers_in_plain_notation_are_numbers(tmp_path):
    path = tmp_path / "policy.yaml"
    write_policy(path, FULL)
    path.write_text(path.read_text().replace("delta: 3e-06", "delta: 1e-5"))
    assert read_policy(path).delta == 1e-5  # YAML 1.1 takes 1e-5 for text


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\xfe", b"just text"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "policy.yaml").write_bytes(content)
    with pytest.raises(PolicyError):
        read_policy(tmp_path / "policy.yaml")


def test_a_missing_policy_says_what_makes_one(tmp_path):
    with pytest.raises(PolicyError, match="ecos-client init makes one"):
        read_policy(tmp_path / "policy.yaml")
