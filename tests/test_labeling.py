import numpy as np
import pytest
import torch

from ecos_pl.encoder import EncoderSpec
from ecos_pl.labeling import PrototypeLabeler, PublicLabeler
from ecos_pl.messages import MessageError, PrototypeAnswer, PrototypeQuery, query_id_of
from ecos_pl.privacy import Release, epsilon_of
from ecos_pl.prototypes import release_prototypes

COUNTS = Release("coverage_counts", 5.0, 1.0, one_coordinate=True)


class TinyPool:
    name = "tiny"
    ids = ("a", "b", "c")
    labels = ("cat", "ship", None)
    domains = (None, None, None)
    fingerprint = "f"


def test_public_labels_are_the_pools_own_and_others_weigh_nothing():
    labeler = PublicLabeler(["dog", "cat"])
    labels = labeler.label(pool=TinyPool(), indices=np.array([2, 0, 1]))
    assert labels.weights.tolist() == [0, 1, 0]
    assert labels.targets.tolist() == [[0, 0], [0, 1], [0, 0]]
    assert labels.releases == []
    assert labeler.plan([], max_epsilon=1, delta=1e-5, sample_rate=1) == []


def test_public_labels_that_fit_no_class_are_an_error():
    with pytest.raises(ValueError, match="annotates none"):
        PublicLabeler(["dog"]).label(pool=TinyPool(), indices=np.array([0, 1]))


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


def ask_labeler(labeler, pool_rows, client_rows, client_labels, change=lambda answer: answer):
    planned = labeler.plan([], max_epsilon=2.0, delta=1e-5, sample_rate=1.0)

    def ask(content):
        query = PrototypeQuery.from_bytes(content)
        noisy, release = release_prototypes(
            query.project(client_rows),
            client_labels,
            len(query.classes),
            clip_norm=query.clip_norm,
            count_weight=query.count_weight,
            noise_multiplier=query.noise_multiplier,
            sample_rate=1.0,
        )
        answer = {
            "query_id": query_id_of(content),
            "sums": noisy.sums,
            "counts": noisy.counts,
            "grid": noisy.grid,
            "clip_norm": noisy.clip_norm,
            "count_weight": noisy.count_weight,
            "noise_std": release.noise_std,
            "sample_rate": 1.0,
            "relation": "add/remove",
        }
        return PrototypeAnswer(**change(answer)).to_bytes()

    rng = np.random.default_rng(0)
    rows = pool_rows.numpy()
    return labeler.label(
        pool=TinyPool(),
        indices=np.arange(len(rows)),
        embeddings=lambda: [rows[:100], rows[100:]],
        views=lambda num_views: [
            rows[:, None] + rng.normal(size=(len(rows), num_views, rows.shape[1]))
        ],
        encoder=EncoderSpec(),
        encoder_fingerprint="f",
        ask=ask,
        planned=planned,
        attempt=0,
    )


@pytest.mark.parametrize("num_views", [0, 4])
def test_a_client_of_200_labels_a_pool_of_its_own_distribution(num_views):
    rows, classes = three_blobs(500)
    labeler = PrototypeLabeler(["x", "y", "z"], num_dims=6, num_views=num_views)
    labels = ask_labeler(labeler, rows[:300], rows[300:], classes[300:])
    accuracy = (labels.targets.argmax(1) == classes[:300]).float().mean()
    assert float(accuracy) > 0.9
    assert labels.weights.tolist() == [1.0] * 300
    assert [release.kind for release in labels.releases] == ["prototypes"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query_id": "0"}, "another question"),
        ({"counts": torch.zeros(2, dtype=torch.int64)}, "whole numbers"),
        ({"sums": torch.zeros(3, 6)}, "whole numbers"),
        ({"clip_norm": 99.0}, "clip_norm"),
        ({"noise_std": 1e6}, "the plan's"),
        ({"sample_rate": 0.5}, "the plan's"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(change, words):
    rows, classes = three_blobs()
    labeler = PrototypeLabeler(["x", "y", "z"], num_dims=6, num_views=0)
    with pytest.raises(MessageError, match=words):
        ask_labeler(labeler, rows, rows, classes, lambda answer: {**answer, **change})
