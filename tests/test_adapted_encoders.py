"""A client is asked in the space of a backbone that the cloud has trained further."""

import dataclasses

import pytest
import torch
from safetensors.torch import load, save

from ecos_pl import adapted_encoders
from ecos_pl.backbone_file import backbone_bytes, save_adapted
from ecos_pl.client import Client
from ecos_pl.client_policy import ClientPolicy
from ecos_pl.encoder import Encoder, public_name
from ecos_pl.envelope import MessageError
from ecos_pl.images import scan_folder
from ecos_pl.mailbox import InProcessMailbox, MissingModelError
from ecos_pl.messages import CoverageAnswer, CoverageQuery
from ecos_pl.per_sample_check import NotPerSampleError
from tests.test_backbone_file import HEADER, trained
from tests.test_client import SPEC, coverage_query, points

POLICY = ClientPolicy(encoder=SPEC, min_noise_std=0.5)


@pytest.fixture
def make_client(image_tree, tmp_path):
    def make(policy=POLICY):
        source = scan_folder(image_tree / "client" / "train")
        return Client.simulated(tmp_path / "client", source, policy)

    return make


@pytest.fixture
def adapted(tmp_path):
    return save_adapted(trained(), SPEC, tmp_path / "cloud" / "round1.safetensors")


def content_of(spec):
    with open(spec.weights, "rb") as file:
        return file.read()


def query_for(spec, attempt=0, noise_std=0.5, **encoder):
    """A coverage query about four random centroids in the encoder's own space."""
    dims = 1024 if spec.features == "final" else 9 * 24
    generator = torch.Generator().manual_seed(0)
    return CoverageQuery(
        encoder={**public_name(spec), **encoder},
        encoder_fingerprint=spec.fingerprint(),
        mean=torch.zeros(dims).half(),
        components=torch.randn(3, dims, generator=generator).half(),
        centroids=points(4),
        noise_std=noise_std,
        sample_rate=1.0,
        attempt=attempt,
    ).to_bytes()


def true_counts(spec, image_tree, query):
    """How many of the client's images lie nearest to each centroid, by plain means."""
    from ecos_pl.images import to_tensor

    source = scan_folder(image_tree / "client" / "train")
    images = torch.stack([to_tensor(source.read(i), 32) for i in range(len(source))])
    rows = CoverageQuery.from_bytes(query).project(Encoder(spec)(images))
    nearest = torch.cdist(rows, CoverageQuery.from_bytes(query).centroids.float()).argmin(dim=1)
    return torch.bincount(nearest, minlength=4)


def test_the_answer_is_about_the_trained_backbones_space(make_client, adapted, image_tree):
    client, query = make_client(), query_for(adapted)
    with pytest.raises(MissingModelError) as missing:
        client.answer(query)
    assert missing.value.model_id == public_name(adapted)["model"][:32]
    assert client.ledger.releases() == []
    client.adopt(content_of(adapted))
    noisy = CoverageAnswer.from_bytes(client.answer(query)).noisy_counts
    counts = true_counts(adapted, image_tree, query)
    assert (noisy - counts).abs().max() <= 4  # eight standard deviations
    plain = true_counts(SPEC, image_tree, query)
    assert (counts - plain).abs().max() > 8  # else the test could not tell the spaces apart
    assert len(client.ledger.releases()) == 1


def test_a_restarted_client_needs_no_new_file_and_embeds_nothing_anew(make_client, adapted):
    make_client().adopt(content_of(adapted))
    answer = make_client().answer(query_for(adapted))
    (bank,) = (make_client().images.folder / "adapted").glob("*/embeddings-*")
    before = {path: path.stat().st_mtime_ns for path in bank.iterdir()}
    assert make_client().answer(query_for(adapted)) == answer
    make_client().answer(query_for(adapted, attempt=1))
    assert before == {path: path.stat().st_mtime_ns for path in bank.iterdir()}


def test_a_client_in_this_process_takes_the_file_from_the_mailbox(make_client, adapted):
    mailbox = InProcessMailbox(make_client, client_id="c")
    with pytest.raises(MissingModelError):
        mailbox.ask(query_for(adapted))
    content = content_of(adapted)
    assert mailbox.send_model(content) == mailbox.send_model(content)
    assert mailbox.bytes_sent == len(content)
    CoverageAnswer.from_bytes(mailbox.ask(query_for(adapted)))
    assert mailbox.bytes_sent == len(content) + len(query_for(adapted))


def test_a_policy_may_forbid_it(make_client, adapted):
    client = make_client(dataclasses.replace(POLICY, adapted_encoders=False))
    for call in (
        lambda: client.answer(query_for(adapted)),
        lambda: client.adopt(content_of(adapted)),
    ):
        with pytest.raises(MessageError, match=r"\(adapted_encoders: false\)"):
            call()
    client.answer(coverage_query(noise_std=5.0))  # the encoder itself is still answered for
    assert not (client.images.folder / "adapted").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "resnet18"}, "an architecture that this client does not trust"),
        ({"image_size": 15}, "must lie in 16 to 512"),
        ({"image_size": 513}, "must lie in 16 to 512"),
        ({"image_size": 64}, "not that of the encoder it names"),
        ({"features": "secret"}, "no encoder features 'secret'"),
        ({"model": "0" * 64}, "does not hold the model 000000000000"),
    ],
)
def test_odd_queries_are_refused_before_any_charge(make_client, adapted, changes, words):
    client = make_client()
    client.adopt(content_of(adapted))
    with pytest.raises(MessageError, match=words) as caught:
        client.answer(query_for(adapted, **changes))
    assert str(client.images.folder) not in str(caught.value)
    assert client.ledger.releases() == []


@pytest.mark.parametrize("model", ["", "0" * 63, "G" * 64, "AB" * 32, 7, None, "../" + "0" * 61])
def test_a_model_is_named_by_its_hash_alone(adapted, model):
    with pytest.raises(MessageError, match="64 hexadecimal digits"):
        query_for(adapted, model=model)


GOOD = load(backbone_bytes(trained(), SPEC.name))
STEM = GOOD["conv_stem.weight"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_stem.weight": None}, "is not a whole"),
        ({"extra": torch.zeros(1)}, "is not a whole"),
        ({"conv_stem.weight": torch.full_like(STEM, torch.nan)}, "not finite"),
        ({"conv_stem.weight": torch.zeros(5)}, "is no mobilenetv3_small_050"),
        ({"conv_stem.weight": STEM.double()}, r"torch\.float64"),
    ],
)
def test_odd_files_are_refused_and_not_kept(make_client, tmp_path, change, words):
    state = {name: t for name, t in {**GOOD, **change}.items() if t is not None}
    path = tmp_path / "odd.safetensors"
    path.write_bytes(save(state, HEADER))
    client = make_client()
    mailbox = InProcessMailbox(lambda: client, client_id="c")
    mailbox.send_model(path.read_bytes())
    spec = dataclasses.replace(SPEC, weights=str(path), adapted=True)
    with pytest.raises(MessageError, match=words) as caught:
        mailbox.ask(query_for(spec))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert client.ledger.releases() == []
    assert not list(client.images.folder.glob("adapted/*"))


def test_a_file_of_another_architecture_is_refused(make_client, tmp_path):
    content = backbone_bytes(trained("test_efficientnet"), "test_efficientnet")
    with pytest.raises(MessageError, match="of an architecture not trusted"):
        make_client().adopt(content)
    for content in (b"", b"x" * 100):
        with pytest.raises(MessageError, match="no file of a backbone"):
            make_client().adopt(content)


def test_an_encoder_that_is_not_per_sample_is_refused(make_client, adapted, monkeypatch):
    def check(network, image_size):
        assert image_size == 32
        raise NotPerSampleError("a layer (Odd) is in training mode")

    monkeypatch.setattr(adapted_encoders, "check_per_sample", check)
    client = make_client()
    client.adopt(content_of(adapted))
    with pytest.raises(MessageError, match=r"is refused: a layer \(Odd\)"):
        client.answer(query_for(adapted))
    assert client.ledger.releases() == []
    assert not list(client.images.folder.glob("adapted/*"))


def test_a_kept_file_that_is_damaged_is_had_again(make_client, adapted):
    client = make_client()
    client.adopt(content_of(adapted))
    (kept,) = client.images.folder.glob("adapted/*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.raises(MissingModelError):
        make_client().answer(query_for(adapted))
    client.adopt(content_of(adapted))
    client.answer(query_for(adapted))


def test_few_backbones_are_kept_with_their_embeddings(make_client, tmp_path, monkeypatch):
    monkeypatch.setattr(adapted_encoders, "MAX_KEPT", 2)
    client = make_client()
    specs = [
        save_adapted(trained(seed=seed), SPEC, tmp_path / f"{seed}.safetensors")
        for seed in range(4)
    ]
    for number, spec in enumerate(specs):
        client.adopt(content_of(spec))
        client.answer(query_for(spec, attempt=number))
    adapted = client.images.folder / "adapted"
    kept = {public_name(spec)["model"] for spec in specs[-2:]}
    assert {path.stem for path in adapted.glob("*.safetensors")} == kept
    assert {path.name for path in adapted.iterdir() if path.is_dir()} == kept
    assert len(client.images._embedded) == 1  # of the last one; there was no query without
    with pytest.raises(MissingModelError):
        client.answer(query_for(specs[0]))
    assert not list(client.images.folder.glob("embeddings-*"))


def test_grid_features_of_a_trained_backbone_are_answered_for(make_client, adapted):
    spec = dataclasses.replace(adapted, features="grid")
    client = make_client()
    client.adopt(content_of(adapted))
    dims = Encoder(spec).num_dims
    query = CoverageQuery.from_bytes(query_for(spec))
    wide = dataclasses.replace(
        query, mean=torch.zeros(dims).half(), components=torch.ones(3, dims).half()
    )
    assert CoverageAnswer.from_bytes(client.answer(wide.to_bytes()))
