import pytest
import torch

from ecos_pl.client import Client, ClientPolicy
from ecos_pl.encoder import EncoderSpec
from ecos_pl.images import scan_folder
from ecos_pl.ledger import LedgerError
from ecos_pl.messages import (
    CoverageAnswer,
    CoverageQuery,
    MessageError,
    PrototypeAnswer,
    PrototypeQuery,
    query_id_of,
)
from ecos_pl.privacy import epsilon_of

SPEC = EncoderSpec("mobilenetv3_small_050", "random", 32)
DIMS = 1024


def coverage_query(num_clusters=4, fingerprint=None, seed=0, dims=DIMS, attempt=0):
    generator = torch.Generator().manual_seed(seed)
    return CoverageQuery(
        encoder={"name": SPEC.name, "image_size": 32},
        encoder_fingerprint=fingerprint or SPEC.fingerprint(),
        mean=torch.zeros(dims).half(),
        components=torch.randn(3, dims, generator=generator).half(),
        centroids=torch.randn(num_clusters, 3, generator=generator).half(),
        attempt=attempt,
    ).to_bytes()


def prototype_query(multiplier=20.0, classes=("vertical", "horizontal")):
    generator = torch.Generator().manual_seed(0)
    return PrototypeQuery(
        encoder={"name": SPEC.name, "image_size": 32},
        encoder_fingerprint=SPEC.fingerprint(),
        mean=torch.zeros(DIMS).half(),
        components=torch.randn(3, DIMS, generator=generator).half(),
        classes=list(classes),
        clip_norm=1.0,
        count_weight=0.3,
        noise_multiplier=multiplier,
        attempt=0,
    ).to_bytes()


@pytest.fixture
def make_client(image_tree, tmp_path):
    def make(policy=ClientPolicy(), folder="client"):  # noqa: B008
        source = scan_folder(image_tree / "client" / "train")
        return Client(tmp_path / folder, source, policy, encoder=SPEC)

    return make


def test_counts_come_with_their_declared_noise_and_are_charged_once(make_client):
    client, query = make_client(), coverage_query()
    content = client.answer(query)
    answer = CoverageAnswer.from_bytes(content)
    assert answer.query_id == query_id_of(query)
    assert answer.noisy_counts.dtype == torch.int64
    assert (answer.noise_std, answer.sample_rate, answer.relation) == (5.0, 1.0, "add/remove")
    # 120 images in all; the sum of four noisy counts has standard deviation 10
    assert abs(int(answer.noisy_counts.sum()) - 120) < 90
    assert client.answer(query) == content
    assert make_client().answer(query) == content  # a restarted client replays it too
    assert len(client.ledger.releases()) == 1
    assert client.ledger.epsilon(1e-5) == pytest.approx(0.7266, abs=1e-3)


def test_prototypes_are_charged_beside_the_counts(make_client):
    client = make_client()
    client.answer(coverage_query())
    answer = PrototypeAnswer.from_bytes(client.answer(prototype_query()))
    assert answer.sums.shape == (2, 3)
    assert answer.counts.shape == (2,)
    releases = client.ledger.releases()
    assert [release.kind for release in releases] == ["coverage_counts", "prototypes"]
    assert releases[1].noise_multiplier == pytest.approx(20.0)
    assert client.ledger.epsilon(1e-5) == pytest.approx(epsilon_of(releases, 1e-5))
    counts = answer.counts * answer.grid / answer.count_weight
    assert abs(float(counts.sum()) - 120) < 8 * 20.0 * 1.05 / 0.3 * 2**0.5


def test_a_class_that_the_client_lacks_still_gets_noise(make_client):
    query = prototype_query(classes=("vertical", "horizontal", "diagonal"))
    answer = PrototypeAnswer.from_bytes(make_client().answer(query))
    assert answer.sums.shape == (3, 3)
    assert bool(answer.sums[2].any())


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (lambda: coverage_query(fingerprint="0" * 64), "another encoder"),
        (lambda: coverage_query(num_clusters=1), "1 centroids"),
        (lambda: coverage_query(num_clusters=9), "9 centroids"),
        (lambda: coverage_query(dims=7), "does not fit the encoder"),
        (lambda: prototype_query(multiplier=1e-9), "noise_std"),
        (lambda: coverage_query()[:-3], "not a readable message"),
        (
            lambda: CoverageAnswer("x", torch.zeros(2), 1.0, 1.0, "add/remove").to_bytes(),
            "does not answer",
        ),
    ],
)
def test_refusals_come_before_any_charge(make_client, query, words):
    client = make_client(ClientPolicy(max_clusters=8))
    with pytest.raises(MessageError, match=words) as caught:
        client.answer(query())
    assert "\n" not in str(caught.value)
    assert client.ledger.releases() == []


def test_the_budget_holds_across_restarts(make_client):
    policy = ClientPolicy(max_epsilon=1.1)  # one release of noise 5 costs 0.73, two cost 1.06
    for attempt in (0, 1):
        make_client(policy).answer(coverage_query(attempt=attempt))
    with pytest.raises(LedgerError, match=r"over the limit of 1\.1"):
        make_client(policy).answer(coverage_query(attempt=2))
    assert len(make_client(policy).ledger.releases()) == 2


def test_an_unreadable_private_image_is_left_out_without_a_word(
    image_tree, tmp_path, caplog, capfd
):
    import shutil

    shutil.copytree(image_tree / "client" / "train", tmp_path / "train")
    (tmp_path / "train" / "vertical" / "secret-000.png").write_bytes(b"secret-marker")
    client = Client(
        tmp_path / "c", scan_folder(tmp_path / "train"), ClientPolicy(0.5), encoder=SPEC
    )
    answer = CoverageAnswer.from_bytes(client.answer(coverage_query()))
    assert abs(int(answer.noisy_counts.sum()) - 119) < 10
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


def test_an_image_is_projected_alike_whatever_stands_beside_it(make_client):
    client = make_client()
    query = CoverageQuery.from_bytes(coverage_query())
    embeddings = client._own_embeddings()
    whole = query.project(embeddings)
    assert torch.equal(whole[5:6], query.project(embeddings[5:6]))
    assert torch.equal(whole[40:90], query.project(embeddings[40:90]))
