import dataclasses

import numpy as np
import pytest
import torch

from ecos_pl.accounting import epsilon_of
from ecos_pl.client_answers import prototype_answer, table_answer, vote_answer
from ecos_pl.encoder import EncoderSpec
from ecos_pl.labeling import LabelingTask, NoLabels, PublicLabeler
from ecos_pl.messages import (
    MessageError,
    PrototypeAnswer,
    TableAnswer,
    TableQuery,
    VoteAnswer,
    VoteQuery,
    query_id_of,
    read_query,
)
from ecos_pl.privacy import PER_SAMPLE, PrivacyUnits, Release
from ecos_pl.private_images import Features
from ecos_pl.prototype_labeler import PrototypeLabeler
from ecos_pl.table_labeler import TableLabeler
from ecos_pl.vote_labeler import VoteLabeler

COUNTS = Release("coverage_counts", 5.0, 1.0, one_coordinate=True)


class TinyPool:
    name = "tiny"
    ids = ("a", "b", "c")
    labels = ("cat", "ship", None)
    domains = (None, None, None)
    fingerprint = "f"


def public_task(indices):
    nothing = dict.fromkeys(f.name for f in dataclasses.fields(LabelingTask))
    return LabelingTask(**{**nothing, "pool": TinyPool(), "indices": np.array(indices)})


def test_public_labels_are_the_pools_own_and_others_weigh_nothing():
    labeler = PublicLabeler(["dog", "cat"])
    labels = labeler.label(public_task([2, 0, 1]))
    assert labels.weights.tolist() == [0, 1, 0]
    assert labels.targets.tolist() == [[0, 0], [0, 1], [0, 0]]
    assert labels.releases == []
    assert labeler.plan([], max_epsilon=1, delta=1e-5, sample_rate=1) == []


def test_nobody_labels_and_nothing_is_asked():
    labeler = NoLabels(["dog", "cat"])
    labels = labeler.label(public_task([2, 0, 1]))
    assert labels.targets.shape == (3, 2)
    assert not labels.targets.any()
    assert not labels.weights.any()
    assert labels.releases == labeler.plan([], max_epsilon=1, delta=1e-5, sample_rate=1) == []


def test_public_labels_that_fit_no_class_are_an_error():
    with pytest.raises(ValueError, match="annotates none"):
        PublicLabeler(["dog"]).label(public_task([0, 1]))


def test_noise_takes_what_the_counts_leave():
    labeler = PrototypeLabeler(["0", "1"])
    planned = labeler.plan([COUNTS], max_epsilon=2.0, delta=1e-5, sample_rate=1.0)
    total = epsilon_of([COUNTS, *planned], 1e-5)
    assert 1.98 < total <= 2.0
    alone = labeler.plan([], max_epsilon=2.0, delta=1e-5, sample_rate=1.0)
    assert alone[0].noise_multiplier < planned[0].noise_multiplier


def test_a_given_noise_is_kept_or_refused():
    generous = PrototypeLabeler(["0"], noise_multiplier=8.0)
    (release,) = generous.plan([COUNTS], max_epsilon=2.0, delta=1e-5, sample_rate=1.0)
    assert release.noise_multiplier == pytest.approx(8.0)
    with pytest.raises(ValueError, match=r"noise_multiplier=0\.5 brings the run to"):
        PrototypeLabeler(["0"], noise_multiplier=0.5).plan(
            [COUNTS], max_epsilon=2.0, delta=1e-5, sample_rate=1.0
        )


def three_blobs(num_images=300, num_dims=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(3, num_dims, generator=generator)
    labels = torch.randint(0, 3, (num_images,), generator=generator)
    return (means[labels] + torch.randn(num_images, num_dims, generator=generator)), labels


def ask_labeler(
    labeler,
    pool_rows,
    client_rows,
    client_labels,
    change=lambda answer: answer,
    max_epsilon=2.0,
    units=PER_SAMPLE,
):
    """Label pool rows; the client's side is the real one, its images are rows of numbers."""

    def ask(content):
        query = read_query(content)
        images = Features(query.project(client_rows), units, client_labels)
        if isinstance(query, TableQuery):
            kind, plan = TableAnswer, table_answer(query, query_id_of(content), images)
        elif isinstance(query, VoteQuery):
            kind, plan = VoteAnswer, vote_answer(query, query_id_of(content), images)
        else:
            kind, plan = PrototypeAnswer, prototype_answer(query, query_id_of(content), images)
        assert epsilon_of(plan.releases, 1e-5) <= max_epsilon * 1.0001  # what the client charges
        answer = kind.from_bytes(plan.draw())
        fields = {f.name: getattr(answer, f.name) for f in dataclasses.fields(answer)}
        return kind(**change(fields)).to_bytes()

    rng = np.random.default_rng(0)
    rows = pool_rows.numpy()
    task = LabelingTask(
        pool=TinyPool(),
        indices=np.arange(len(rows)),
        embeddings=lambda: [rows[:100], rows[100:]],
        views=lambda num_views: [
            rows[:, None] + rng.normal(size=(len(rows), num_views, rows.shape[1]))
        ],
        encoder=EncoderSpec(features=labeler.features),
        encoder_fingerprint="f" * 64,
        ask=ask,
        planned=labeler.plan([], max_epsilon=max_epsilon, delta=1e-5, sample_rate=1.0),
        seed=1,
        attempt=0,
    )
    return labeler.label(task)


CLASSES = ["x", "y", "z"]


@pytest.mark.parametrize(
    "labeler",
    [
        PrototypeLabeler(CLASSES, num_dims=6, num_views=0),
        PrototypeLabeler(CLASSES, num_dims=6, num_views=4),
        TableLabeler(CLASSES, num_dims=6, num_views=0),
        TableLabeler(CLASSES, num_dims=6, num_views=4, num_clusters=6),
        VoteLabeler(CLASSES, num_dims=6, num_views=0),
        VoteLabeler(CLASSES, num_dims=6, num_views=4, num_queries=12, max_answers=8),
    ],
    ids=lambda labeler: f"{labeler.name}-{labeler.num_views}",
)
def test_a_client_of_900_labels_a_pool_of_its_own_distribution(labeler):
    rows, classes = three_blobs(1200)
    labels = ask_labeler(labeler, rows[:300], rows[300:], classes[300:], max_epsilon=12.0)
    accuracy = (labels.targets.argmax(1) == classes[:300]).float().mean()
    assert float(accuracy) > 0.85
    assert torch.allclose(labels.targets.sum(1), torch.ones(300), atol=1e-4)
    assert labels.weights.tolist() == [1.0] * 300
    assert 0 < epsilon_of(labels.releases, 1e-5) <= 12.0


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize(
    "labeler",
    [
        PrototypeLabeler(CLASSES),
        TableLabeler(CLASSES),
        VoteLabeler(CLASSES),
        VoteLabeler(CLASSES, num_queries=20, max_answers=7),
    ],
    ids=lambda labeler: labeler.name,
)
def test_every_labeler_takes_what_the_counts_leave(labeler, sample_rate):
    planned = labeler.plan([COUNTS], max_epsilon=1.0, delta=1e-5, sample_rate=sample_rate)
    assert 0.985 < epsilon_of([COUNTS, *planned], 1e-5) <= 1.0
    assert {release.sample_rate for release in planned} == {sample_rate}


def test_noise_that_does_not_fit_the_table_is_refused():
    with pytest.raises(ValueError, match=r"labels\.noise_std=2 brings the run to"):
        TableLabeler(CLASSES, noise_std=2.0).plan(
            [COUNTS], max_epsilon=1.0, delta=1e-5, sample_rate=1.0
        )
    with pytest.raises(ValueError, match="max_answers=9 exceeds the 6 queries"):
        VoteLabeler(CLASSES, num_queries=6, max_answers=9)


@pytest.mark.parametrize("make", [PrototypeLabeler, TableLabeler, VoteLabeler])
def test_a_client_that_protects_persons_is_believed(make):
    rows, classes = three_blobs(600)
    units = PrivacyUnits(torch.arange(300).numpy() // 2, 2)
    labeler = make(CLASSES, num_dims=6, num_views=0)
    labels = ask_labeler(labeler, rows[:300], rows[300:], classes[300:], units=units)
    assert labels.max_per_unit == 2
    assert 1.9 < epsilon_of(labels.releases, 1e-5) <= 2.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_id": "0"}, "another question"),
        ({"counts": torch.zeros(2, dtype=torch.int64)}, "whole numbers"),
        ({"sums": torch.zeros(3, 6)}, "whole numbers"),
        ({"clip_norm": 99.0}, "clip_norm"),
        ({"count_weight": 0.5}, "count_weight"),
        ({"noise_std": 1e6}, "the plan says"),
        ({"sample_rate": 0.5}, "the plan says"),
        ({"max_per_unit": 3}, "the plan says"),
    ],
)
def test_prototypes_that_do_not_fit_are_refused(change, words):
    refused(PrototypeLabeler(CLASSES, num_dims=6, num_views=0), change, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_id": "0"}, "another question"),
        ({"noisy_counts": torch.zeros(15, 2, dtype=torch.int64)}, "15 × 3 whole numbers"),
        ({"noisy_counts": torch.full((15, 3), 2**60)}, "too large"),
        ({"noise_std": 1.0}, "the plan says"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change, words):
    refused(TableLabeler(CLASSES, num_dims=6, num_views=0), change, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_id": "0"}, "another question"),
        ({"labels": torch.zeros(8, dtype=torch.int64)}, "9 class numbers"),
        ({"labels": torch.full((9,), 3)}, "9 class numbers"),
        ({"labels": torch.full((9,), -2)}, "9 class numbers"),
        ({"labels": torch.zeros(9)}, "9 class numbers"),
    ],
)
def test_votes_that_do_not_fit_are_refused(change, words):
    refused(VoteLabeler(CLASSES, num_dims=6, num_views=0), change, words)


def refused(labeler, change, words):
    rows, classes = three_blobs()
    with pytest.raises(MessageError, match=words) as caught:
        ask_labeler(labeler, rows, rows, classes, lambda answer: {**answer, **change})
    assert "\n" not in str(caught.value)
