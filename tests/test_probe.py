import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ecos_pl.accounting import epsilon_of
from ecos_pl.client import Client
from ecos_pl.client_policy import ClientPolicy
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import scan_folder
from ecos_pl.label_rounds import LabelRound
from ecos_pl.labeling import PublicLabeler
from ecos_pl.ledger import Ledger
from ecos_pl.mailbox import InProcessMailbox
from ecos_pl.messages import CoverageAnswer, MessageError
from ecos_pl.probe import Probe, ProbePlan
from ecos_pl.prototype_labeler import PrototypeLabeler
from ecos_pl.revealed_client import RevealedClient
from ecos_pl.selection import NOT_PRIVATE

SPEC = EncoderSpec("mobilenetv3_small_050", "random", 32)
# Untrained, the encoder tells pictures of one kind hardly apart: none is a near-duplicate here.
PLAN = ProbePlan(
    encoder=SPEC,
    num_clusters=8,
    num_dims=8,
    size=60,
    duplicate_distance=0.0,
    noise_std=1.0,
    max_epsilon=9.0,
)
CLASSES = ["horizontal", "vertical"]


class World:
    """A pool, a simulated client, and a folder for both sides; counts what is asked."""

    def __init__(self, image_tree, folder):
        self.pool = scan_folder(image_tree / "pool")
        self.private = scan_folder(image_tree / "client" / "train")
        self.folder, self.asked = folder, 0

    def probe(
        self, plan=PLAN, labeler=None, change=lambda answer: answer, client_id="c", revealed=False
    ):
        def mailbox(fingerprint):
            policy = ClientPolicy(min_noise_std=0.5, min_noise_multiplier=0.05, encoder=SPEC)

            def answer(query):
                self.asked += 1
                client = Client.simulated(self.client_folder(fingerprint), self.private, policy)
                return change(client.answer(query))

            return InProcessMailbox(lambda: SimpleNamespace(answer=answer), client_id=client_id)

        labeler = labeler or PublicLabeler(CLASSES)
        return Probe(
            self.pool,
            plan,
            labeler,
            mailbox,
            self.folder / "cache",
            client_id=client_id,
            revealed=RevealedClient(self.private, self.client_folder) if revealed else None,
            batch_size=32,
        )

    def client_folder(self, fingerprint):
        return self.folder / "clients" / fingerprint[:16]


@pytest.fixture
def world(image_tree, tmp_path):
    return World(image_tree, tmp_path)


def test_it_chooses_the_clients_kind_of_images(world):
    result = world.probe().run()
    domains = [world.pool.domains[index] for index in result.indices]
    assert len(result.proxy_set) == 60
    assert domains.count("bars") / 60 > 0.8  # 100 of 260 images are bars
    assert list(result.proxy_set.ids) == [world.pool.ids[index] for index in result.indices]
    assert result.num_unreadable == 1
    assert "clutter/checks/broken.png" not in result.proxy_set.ids
    assert int(result.selection.quotas.sum()) == 60
    assert result.cluster_sizes.sum() == 260
    assert result.communication["round_trips"] == 1
    assert result.communication["bytes_up"] > 8 * 8
    assert not set(result.unlabeled.tolist()) & set(result.indices.tolist())


def test_unreadable_pool_images_are_named_in_one_warning(world, caplog):
    world.probe().run()
    named = [record.message for record in caplog.records if "broken.png" in record.message]
    assert named == ["left out 1 pool images that cannot be read: clutter/checks/broken.png"]


def test_a_second_run_reads_the_disk_and_asks_nobody(world):
    first = world.probe().run()
    asked = world.asked
    second = world.probe().run()
    assert world.asked == asked == 1
    assert second.from_disk
    assert not first.from_disk
    assert list(second.proxy_set.ids) == list(first.proxy_set.ids)
    assert torch.equal(second.noisy_counts, first.noisy_counts)
    assert second.privacy == first.privacy


def test_interrupted_after_the_answer_it_resumes_and_spends_nothing_more(world):
    class Broken(PublicLabeler):
        def label(self, task):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.probe(labeler=Broken(CLASSES)).run()
    result = world.probe().run()
    assert world.asked == 1
    ledgers = list(world.folder.glob("clients/*/ledger.sqlite"))
    assert len(ledgers) == 1
    assert result.privacy["epsilon"] == pytest.approx(
        epsilon_of(
            Ledger.open(ledgers[0], client_id=world.private.fingerprint[:32]).releases(), 1e-5
        )
    )


def test_the_answers_loss_on_the_way_costs_nothing(world):
    def lose(answer):
        raise ConnectionError("lost")

    with pytest.raises(ConnectionError):
        world.probe(change=lose).run()
    world.probe().run()
    (path,) = world.folder.glob("clients/*/ledger.sqlite")
    ledger = Ledger.open(path, client_id=world.private.fingerprint[:32])
    assert len(ledger.releases()) == 1


def test_same_answer_same_ids_whatever_the_batch_size(world):
    first = world.probe().run()
    other = world.probe()
    (world.folder / "cache" / "probes" / first.fingerprint[:16]).rename(world.folder / "aside")
    for folder in ("embeddings", "projected", "clusters"):
        (world.folder / "cache" / folder).rename(world.folder / folder)
    other._embedder = dataclasses.replace(other._embedder, batch_size=7)
    again = other.run()
    assert not again.from_disk
    assert world.asked == 1
    assert list(again.proxy_set.ids) == list(first.proxy_set.ids)


def test_both_releases_are_accounted_together(world):
    labeler = PrototypeLabeler(CLASSES, num_dims=12, num_views=0)
    plan = dataclasses.replace(PLAN, max_epsilon=30.0)  # the noise must not decide the test
    result = world.probe(plan, labeler).run()
    (path,) = world.folder.glob("clients/*/ledger.sqlite")
    ledger = Ledger.open(path, client_id=world.private.fingerprint[:32])
    assert [release.kind for release in ledger.releases()] == ["coverage_counts", "prototypes"]
    assert 29 < result.privacy["epsilon"] <= 30
    assert ledger.epsilon(1e-5) == pytest.approx(result.privacy["epsilon"], rel=1e-3)
    assert result.communication["round_trips"] == 2
    labels = result.proxy_set.labels
    truth = [world.pool.labels[index] for index in result.indices]
    right = [a == b for a, b in zip(labels, truth, strict=True) if b in CLASSES]
    assert sum(right) / len(right) > 0.65  # 25 runs: 0.84 on average, 0.79 at least


@pytest.mark.parametrize("strategy", ["random", "all", "cluster_uniform", "k_center"])
def test_the_baselines_ask_nobody_for_counts(world, strategy):
    result = world.probe(dataclasses.replace(PLAN, strategy=strategy)).run()
    assert world.asked == 0
    assert result.privacy["epsilon"] == 0
    assert result.noisy_counts is None
    assert len(result.proxy_set) == (260 if strategy == "all" else 60)


@pytest.mark.parametrize("strategy", NOT_PRIVATE)
def test_what_reads_the_clients_images_asks_for_no_counts_and_states_no_epsilon(world, strategy):
    plan = dataclasses.replace(PLAN, strategy=strategy)
    result = world.probe(plan, revealed=True).run()
    assert world.asked == 0
    assert result.noisy_counts is None
    assert result.privacy["epsilon"] is None
    assert result.spent_now is None
    assert "not private" in str(result.statement)
    domains = [world.pool.domains[index] for index in result.indices]
    assert domains.count("bars") / 60 > 0.8

    again = world.probe(plan, revealed=True).run()
    assert again.from_disk
    assert again.privacy["epsilon"] is None
    assert again.spent_now == 0
    assert again.proxy_set.provenance["privacy"]["epsilon"] is None

    # The client's embeddings lie in the simulated client's folder alone.
    (folder,) = (world.folder / "clients").iterdir()
    assert folder == world.client_folder(result.fingerprint)
    width = Encoder(SPEC).num_dims
    banks = [path for path in world.folder.rglob("*.npy") if np.load(path).shape == (120, width)]
    assert banks
    assert all(folder in path.parents for path in banks)


def test_a_release_of_labels_makes_no_finite_epsilon_of_what_is_not_private(world):
    plan = dataclasses.replace(PLAN, strategy="nearest")
    labeler = PrototypeLabeler(CLASSES, num_dims=4, num_views=0)
    result = world.probe(plan, labeler, revealed=True).run()
    assert [release.kind for release in result.releases] == ["prototypes"]
    assert result.privacy["epsilon"] is None
    found = LabelRound(
        number=1,
        targets=result.proxy_set.targets,
        weights=result.proxy_set.weights,
        releases=result.releases,
        max_per_unit=1,
        traffic={"bytes_down": 1, "bytes_up": 1, "round_trips": 1},
        changed=0.0,
    )
    after = result.with_round(found)
    assert after.privacy["epsilon"] is None
    assert after.spent_now is None
    assert len(after.releases) == 2


def test_a_client_that_is_not_simulated_shows_nothing(world):
    with pytest.raises(ValueError, match="nearest reads the client's images: it is for sim"):
        world.probe(dataclasses.replace(PLAN, strategy="nearest"))


def test_the_clients_images_name_a_result_that_they_determine(world, image_tree):
    def fingerprint(strategy):
        return world.probe(dataclasses.replace(PLAN, strategy=strategy), revealed=True).fingerprint

    before = {strategy: fingerprint(strategy) for strategy in ("random", "mak", "nearest")}
    world.private = scan_folder(image_tree / "client" / "test")
    assert fingerprint("random") == before["random"]
    assert fingerprint("mak") != before["mak"]
    assert fingerprint("nearest") != before["nearest"]


def test_more_images_than_there_are_is_said(world, caplog):
    result = world.probe(dataclasses.replace(PLAN, size=1000)).run()
    assert len(result.proxy_set) == 260
    assert "only 260 images could be chosen, not the 1000 asked for" in caplog.text


def test_near_duplicates_are_replaced_and_said(world, image_tree, caplog, tmp_path):
    """Every image of the client's domain twice: no copy is chosen beside its original."""
    shutil.copytree(image_tree / "pool", tmp_path / "pool")
    for path in sorted((tmp_path / "pool" / "bars").glob("*/*.png")):
        shutil.copy(path, path.with_name(f"copy_{path.name}"))
    world.pool = scan_folder(tmp_path / "pool")
    result = world.probe(dataclasses.replace(PLAN, size=250, duplicate_distance=1e-4)).run()
    chosen = set(result.proxy_set.ids)
    assert len(chosen) == 250
    assert not chosen & {name.replace("copy_", "") for name in chosen if "copy_" in name}
    assert result.selection.num_duplicates > 0
    assert f"{result.selection.num_duplicates} near-duplicates were left out" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_epsilon": 0.2}, "max_epsilon=0.2 is less than the ε"),
        ({"num_clusters": 261}, "num_clusters=261 exceeds the pool's 260"),
    ],
)
def test_a_plan_that_cannot_be_kept_is_refused_before_asking(world, changes, words):
    with pytest.raises(ValueError, match=words):
        world.probe(dataclasses.replace(PLAN, **changes)).run()
    assert world.asked == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"query_id": "0" * 32}, "another question"),
        ({"noisy_counts": torch.zeros(7, dtype=torch.int64)}, "8 whole numbers"),
        ({"noisy_counts": torch.zeros(8)}, "8 whole numbers"),
        ({"noisy_counts": torch.full((8,), 2**60)}, "too large to be true"),
        ({"noisy_counts": torch.full((8,), -(2**63))}, "too large to be true"),
        ({"sample_rate": 0.5}, "the plan says 1"),
        ({"relation": "replace"}, "of another kind"),
        ({"max_per_unit": 0}, "out of range"),
        ({"max_per_unit": 5}, "noise_std is 1, the plan says 5"),
        ({"noise_std": 0.7}, "the plan says"),
    ],
)
def test_an_answer_that_does_not_fit_the_question_is_refused(world, changes, words):
    def change(content):
        return dataclasses.replace(CoverageAnswer.from_bytes(content), **changes).to_bytes()

    with pytest.raises(MessageError, match=words):
        world.probe(change=change).run()


def test_the_plan_and_the_labeler_name_the_result(world):
    fingerprints = {
        world.probe().fingerprint,
        world.probe(dataclasses.replace(PLAN, seed=2)).fingerprint,
        world.probe(dataclasses.replace(PLAN, noise_std=2.0)).fingerprint,
        world.probe(dataclasses.replace(PLAN, attempt=1)).fingerprint,
        world.probe(labeler=PublicLabeler(CLASSES[:1])).fingerprint,
        world.probe(client_id="another").fingerprint,
    }
    assert len(fingerprints) == 6
    assert world.probe().fingerprint in fingerprints


def test_nothing_private_is_in_the_clouds_files(world):
    """Neither the client's number of images nor its ids or true counts."""
    world.probe(labeler=PrototypeLabeler(CLASSES, num_dims=4, num_views=0)).run()
    for path in (world.folder / "cache").rglob("*"):
        if path.is_file() and path.suffix != ".npy":
            content = path.read_bytes()
            assert b"secret" not in content, path
            if path.suffix == ".json":
                assert 120 not in _numbers(json.loads(content)), path


def _numbers(value):
    if isinstance(value, dict):
        return [n for item in value.values() for n in _numbers(item)]
    if isinstance(value, list):
        return [n for item in value for n in _numbers(item)]
    return [value]


def test_the_global_random_state_is_left_alone(world):
    state = torch.get_rng_state()
    world.probe(labeler=PrototypeLabeler(CLASSES, num_dims=4, num_views=2)).run()
    assert torch.equal(state, torch.get_rng_state())


def test_candidates_count_as_part_of_the_plan_once_there_are_any(world):
    plain, drawn = (
        world.probe(dataclasses.replace(PLAN, size=20, candidates_per_pick=number))
        for number in (None, 1.0)
    )
    assert plain.fingerprint == world.probe(dataclasses.replace(PLAN, size=20)).fingerprint
    assert plain.fingerprint != drawn.fingerprint
    assert len(drawn.run().indices) == 20
