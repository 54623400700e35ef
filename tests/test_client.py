import dataclasses

import numpy as np
import pytest
import torch

from ecos_pl.accounting import epsilon_of
from ecos_pl.client import Client, UnknownEncoderError
from ecos_pl.client_policy import ClientPolicy
from ecos_pl.encoder import EncoderSpec
from ecos_pl.images import scan_folder
from ecos_pl.ledger import Ledger, LedgerError
from ecos_pl.messages import (
    CoverageAnswer,
    CoverageQuery,
    MessageError,
    PrototypeAnswer,
    PrototypeQuery,
    TableAnswer,
    TableQuery,
    VoteAnswer,
    VoteQuery,
    query_id_of,
)
from ecos_pl.privacy import PrivacyUnits
from ecos_pl.private_images import PrivateImages

SPEC = EncoderSpec("mobilenetv3_small_050", "random", 32)
DIMS = 1024
POLICY = ClientPolicy(encoder=SPEC)


def encoding(seed=0, dims=DIMS, fingerprint=None, features="final"):
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder": {"name": SPEC.name, "image_size": 32, "features": features},
        "encoder_fingerprint": fingerprint or SPEC.fingerprint(),
        "mean": torch.zeros(dims).half(),
        "components": torch.randn(3, dims, generator=generator).half(),
    }


def points(number, seed=0):
    return torch.randn(number, 3, generator=torch.Generator().manual_seed(seed)).half()


def coverage_query(num_clusters=4, attempt=0, centroids=None, noise_std=5.0, rate=1.0, **space):
    return CoverageQuery(
        **encoding(**space),
        centroids=points(num_clusters) if centroids is None else centroids,
        noise_std=noise_std,
        sample_rate=rate,
        attempt=attempt,
    ).to_bytes()


def prototype_query(multiplier=20.0, classes=("vertical", "horizontal"), **changes):
    fields = {"clip_norm": 1.0, "count_weight": 0.3, "sample_rate": 1.0, "attempt": 0, **changes}
    return PrototypeQuery(
        **encoding(), classes=list(classes), noise_multiplier=multiplier, **fields
    ).to_bytes()


def table_query(num_clusters=4, noise_std=5.0):
    return TableQuery(
        **encoding(),
        centroids=points(num_clusters),
        classes=["vertical", "horizontal"],
        noise_std=noise_std,
        sample_rate=1.0,
        attempt=0,
    ).to_bytes()


def vote_query(num_points=4, **changes):
    fields = {
        "num_neighbors": 30,
        "max_answers": num_points,
        "vote_noise_std": 10.0,
        "screening_noise_std": 0.0,
        "threshold": 0.0,
        "sample_rate": 1.0,
        "attempt": 0,
    }
    return VoteQuery(
        **encoding(),
        points=points(num_points),
        classes=["vertical", "horizontal"],
        **{**fields, **changes},
    ).to_bytes()


@pytest.fixture
def make_client(image_tree, tmp_path):
    def make(policy=POLICY, folder="client"):
        source = scan_folder(image_tree / "client" / "train")
        return Client.simulated(tmp_path / folder, source, policy)

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


LIMITED = dataclasses.replace(POLICY, max_clusters=8, max_sample_rate=0.5)
UNKNOWN = CoverageAnswer(
    query_id="x",
    sample_rate=1.0,
    relation="add/remove",
    max_per_unit=1,
    noisy_counts=torch.zeros(2),
    noise_std=1.0,
)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (lambda: coverage_query(fingerprint="0" * 64, rate=0.5), "another encoder"),
        (lambda: coverage_query(features="secret", rate=0.5), "no encoder features 'secret'"),
        (lambda: coverage_query(num_clusters=1, rate=0.5), "1 centroids"),
        (lambda: coverage_query(num_clusters=9, rate=0.5), "9 centroids"),
        (lambda: coverage_query(centroids=points(1).repeat(2, 1), rate=0.5), "are the same"),
        (lambda: coverage_query(dims=7, rate=0.5), "does not fit the encoder"),
        (lambda: coverage_query(noise_std=4.9, rate=0.5), "noise_std 4.9 asked for"),
        (lambda: coverage_query(noise_std=-5.0, rate=0.5), "noise_std -5 asked for"),
        (lambda: coverage_query(rate=0.6), "sample_rate 0.6 asked for"),
        (lambda: coverage_query(rate=0.0), "sample_rate must be"),
        (lambda: coverage_query(rate=-1.0), "sample_rate must be"),
        (lambda: coverage_query(noise_std=1e300, rate=0.5), "noise_std must lie in"),
        (lambda: prototype_query(0.9, sample_rate=0.5), "noise multiplier 0.9 asked for"),
        (lambda: prototype_query(clip_norm=0.0, sample_rate=0.5), "out of range"),
        (lambda: prototype_query(count_weight=3.0, sample_rate=0.5), "out of range"),
        (lambda: table_query(noise_std=1.0).replace(b"1.0", b"0.5"), "noise_std"),
        (lambda: vote_query(9, sample_rate=0.5), "9 points"),
        (lambda: vote_query(vote_noise_std=1.0, sample_rate=0.5), "noise multiplier 0.707"),
        (lambda: vote_query(max_answers=3, sample_rate=0.5), "without screening"),
        (lambda: vote_query(screening_noise_std=0.1, sample_rate=0.5), "noise multiplier 0.1"),
        (lambda: vote_query(num_neighbors=0, sample_rate=0.5), "num_neighbors"),
        (lambda: coverage_query()[:-3], "not a readable message"),
        (UNKNOWN.to_bytes, "does not answer"),
    ],
)
def test_refusals_come_before_any_charge(make_client, query, words):
    client = make_client(LIMITED)
    with pytest.raises(MessageError, match=words) as caught:
        client.answer(query())
    assert "\n" not in str(caught.value)
    assert client.ledger.releases() == []


def test_every_kind_of_query_is_answered_as_it_was_charged(make_client):
    client = make_client(ClientPolicy(encoder=SPEC, min_noise_std=1.0))
    table = TableAnswer.from_bytes(client.answer(table_query(), "somebody"))
    votes = VoteAnswer.from_bytes(client.answer(vote_query(), "somebody"))
    assert table.noisy_counts.shape == (4, 2)
    assert abs(int(table.noisy_counts.sum()) - 120) < 8 * 5 * 8**0.5
    assert set(votes.labels.tolist()) <= {0, 1}
    entries = client.ledger.entries()
    assert [entry.requester for entry in entries] == ["somebody"] * 2
    kinds = [release.kind for entry in entries for release in entry.releases]
    assert kinds == ["class_table", "knn_votes"]
    assert entries[1].releases[0].repeats == 4
    assert entries[1].releases[0].noise_multiplier == pytest.approx(10 / 2**0.5)
    screened = vote_query(screening_noise_std=8.0, threshold=10.0, max_answers=2)
    client.answer(screened)
    last = client.ledger.entries()[-1].releases
    assert [(r.kind, r.repeats) for r in last] == [("knn_screening", 4), ("knn_votes", 2)]


def test_the_cost_is_told_before_it_is_charged(make_client):
    client = make_client()
    request = client.read(coverage_query())
    cost = client.cost(request)
    assert (cost.before, cost.is_charged) == (0, False)
    assert cost.after == pytest.approx(0.7266, abs=1e-3)
    assert client.ledger.releases() == []
    client.give(request, "a")
    again = client.cost(request)
    assert again.is_charged
    assert again.before == again.after == cost.after


def test_images_without_classes_answer_counts_alone(make_client, image_tree, tmp_path):
    made = make_client()
    source = scan_folder(image_tree / "client" / "train")
    client = Client(PrivateImages(tmp_path / "client", source), POLICY, made.ledger, labelled=False)
    client.answer(coverage_query())
    with pytest.raises(MessageError, match="carry no classes"):
        client.answer(prototype_query())


def test_an_encoder_is_asked_about_once_and_then_known(make_client):
    policy = ClientPolicy()
    client = make_client(policy)
    with pytest.raises(UnknownEncoderError) as caught:
        client.answer(coverage_query())
    assert caught.value.spec == EncoderSpec(SPEC.name, "auto", 32)
    client.trust(SPEC)
    client.answer(coverage_query())
    make_client(policy).answer(coverage_query())
    with pytest.raises(MessageError, match="another encoder"):  # same name, other weights
        make_client(policy).answer(coverage_query(fingerprint="0" * 64))
    assert len(client.ledger.releases()) == 1


def test_an_encoder_that_is_not_the_pinned_one_stops_the_client(make_client):
    with pytest.raises(ValueError, match="not the one that the policy pins"):
        make_client(dataclasses.replace(POLICY, fingerprint="0" * 64))
    make_client(dataclasses.replace(POLICY, fingerprint=SPEC.fingerprint()))


def test_persons_get_noise_for_all_their_images_and_the_same_epsilon(
    make_client, image_tree, tmp_path
):
    source = scan_folder(image_tree / "client" / "train")
    ledger = make_client().ledger
    units = PrivacyUnits(np.arange(120) // 10, 4)  # 12 persons, 4 of whose 10 images are used
    images = PrivateImages(tmp_path / "client", source, units=units)
    client = Client(images, POLICY, ledger)
    answer = CoverageAnswer.from_bytes(client.answer(coverage_query()))
    assert (answer.max_per_unit, answer.noise_std) == (4, 20.0)
    assert abs(int(answer.noisy_counts.sum()) - 48) < 8 * 20 * 2
    assert ledger.epsilon(1e-5) == pytest.approx(0.7256, abs=1e-3)  # a Gaussian's at 20/4
    answer = PrototypeAnswer.from_bytes(client.answer(prototype_query()))
    assert answer.max_per_unit == 4
    assert ledger.releases()[-1].noise_multiplier == pytest.approx(20.0)


def test_images_that_came_later_are_embedded_and_count(image_tree, tmp_path):
    import shutil

    shutil.copytree(image_tree / "client" / "train", tmp_path / "train")
    ledger = Ledger.create(tmp_path / "ledger.sqlite", client_id="c")
    (tmp_path / "c").mkdir()
    for number in (120, 121):
        source = scan_folder(tmp_path / "train")
        client = Client(PrivateImages(tmp_path / "c", source), POLICY, ledger)
        client.embed()
        embedded, _ = client.images.embeddings(SPEC)
        assert len(embedded) == number
        assert len(list((tmp_path / "c").glob("embeddings-*-final-*"))) == 1
        target = tmp_path / "train" / "vertical" / f"more-{number}.png"
        shutil.copy(tmp_path / "train" / "vertical" / "secret-001.png", target)


def test_the_budget_holds_across_restarts(make_client):
    policy = dataclasses.replace(
        POLICY, max_epsilon=1.1
    )  # one release of noise 5 costs 0.73, two cost 1.06
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
    policy = dataclasses.replace(POLICY, min_noise_std=0.5)
    client = Client.simulated(tmp_path / "c", scan_folder(tmp_path / "train"), policy)
    answer = CoverageAnswer.from_bytes(client.answer(coverage_query(noise_std=0.5)))
    assert abs(int(answer.noisy_counts.sum()) - 119) < 10
    assert "secret" not in caplog.text + "".join(capfd.readouterr())


def test_an_image_is_projected_alike_whatever_stands_beside_it(make_client):
    client = make_client()
    query = CoverageQuery.from_bytes(coverage_query())
    embeddings, _ = client.images.embeddings(SPEC)
    whole = query.project(embeddings)
    assert torch.equal(whole[5:6], query.project(embeddings[5:6]))
    assert torch.equal(whole[40:90], query.project(embeddings[40:90]))
