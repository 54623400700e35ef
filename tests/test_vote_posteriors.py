import numpy as np
import pytest
import torch
from sklearn.semi_supervised import LabelSpreading

from ecos_pl.kmeans import kmeans
from ecos_pl.vote_posteriors import medoids, neighbor_graph, spread_labels, vote_posteriors

MEANS = torch.tensor([[3.0, 0.0], [-1.5, 2.6], [-1.5, -2.6]])


def mixture(num, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=generator)
    return MEANS[labels] + torch.randn(num, 2, generator=generator), labels


def bayes(features):
    return torch.cdist(features, MEANS).argmin(1)


@pytest.fixture(scope="module")
def scene():
    features, labels = mixture(1200, 0)
    rows = medoids(features, kmeans(features, 30, seed=0).centroids)
    return features, labels, rows


def test_graph_joins_the_nearest():
    features, _ = mixture(400, 0)
    distances = torch.cdist(features.double(), features.double()).fill_diagonal_(torch.inf)
    nearest = torch.zeros(400, 400).scatter_(1, distances.topk(7, largest=False).indices, 1.0)
    graph = neighbor_graph(features, 7).toarray()
    assert (graph == torch.maximum(nearest, nearest.T).numpy()).all()
    assert (neighbor_graph(features[:5], 10).toarray() == 1 - np.eye(5)).all()


@pytest.mark.parametrize("alpha", [0.5, 0.9])
def test_spreads_like_scikit_learn(scene, alpha):
    features, labels, rows = scene
    graph = neighbor_graph(features, 10)
    known = np.zeros((1200, 3))
    known[rows, labels[rows]] = 1
    ours = spread_labels(graph, known, alpha=alpha)
    marked = np.full(1200, -1)
    marked[rows] = labels[rows]
    reference = LabelSpreading(
        kernel=lambda a, b: graph.toarray(), alpha=alpha, max_iter=1000, tol=1e-10
    ).fit(features.numpy(), marked)
    reached = ours.sum(1) > 1e-6
    ours /= ours.sum(1, keepdims=True)
    assert reached.mean() > 0.9
    assert np.allclose(ours[reached], reference.label_distributions_[reached], atol=2e-3)


def test_spreading_solves_its_equation():
    graph = np.array([[0.0, 1, 1], [1, 0, 0], [1, 0, 0]])
    known = np.array([[0.0, 0], [1, 0], [0, 1]])
    scale = np.array([2.0, 1, 1]) ** -0.5
    exact = np.linalg.solve(np.eye(3) - 0.8 * scale[:, None] * graph * scale, 0.2 * known)
    assert np.allclose(spread_labels(graph, known, alpha=0.8), exact, atol=1e-8)
    assert (spread_labels(graph, known, alpha=0.0) == known).all()


def test_medoids_are_the_nearest_rows():
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    centroids = torch.tensor([[4.0, 4.0], [0.4, 0.1], [0.6, 0.1]])
    assert medoids(features, centroids).tolist() == [2, 0, 1]


@pytest.mark.parametrize("num_steps", [0, 1, 2])
def test_right_answers_label_like_bayes_rule(scene, num_steps):
    features, _, rows = scene
    posteriors = vote_posteriors(features, rows, bayes(features)[rows], 3, num_steps=num_steps)
    assert posteriors.shape == (1200, 3)
    assert posteriors.dtype == torch.float32
    assert torch.allclose(posteriors.sum(1), torch.ones(1200), atol=1e-5)
    assert bool((posteriors >= 0).all())
    assert float((posteriors.argmax(1) == bayes(features)).double().mean()) > 0.97


def test_wrong_answers_are_evened_out(scene):
    """Answers wrong with a growing share, on other queries each time."""
    features, _, rows = scene
    truth = bayes(features)
    generator = torch.Generator().manual_seed(0)
    accuracy = []
    for share in (0.0, 0.4, 1.0):
        right = 0.0
        for _ in range(5):
            guesses = torch.randint(3, rows.shape, generator=generator)
            wrong = torch.rand(rows.shape, generator=generator) < share
            answers = torch.where(wrong, guesses, truth[rows])
            posteriors = vote_posteriors(features, rows, answers, 3)
            right += float((posteriors.argmax(1) == truth).double().mean()) / 5
        accuracy.append(right)
    assert accuracy[0] > 0.97
    assert accuracy[1] > 0.85  # of the answers 0.73 are right
    assert accuracy[2] < 0.6


def test_unanswered_queries_are_left_out(scene):
    features, _, rows = scene
    answers = bayes(features)[rows]
    silent = torch.where(torch.arange(len(rows)) % 3 == 0, -1, answers)
    part = vote_posteriors(features, rows, silent, 3)
    assert torch.equal(part, vote_posteriors(features, rows[silent >= 0], silent[silent >= 0], 3))
    assert float((part.argmax(1) == bayes(features)).double().mean()) > 0.95
    nobody = vote_posteriors(features, rows, torch.full_like(answers, -1), 3)
    assert torch.equal(nobody, torch.full((1200, 3), 1 / 3))


def test_one_class_and_unreached_images():
    features = torch.tensor([[0.0], [0.1], [0.2], [90.0], [90.1], [90.2]])
    rows = torch.tensor([0])
    for num_steps in (0, 2):
        posteriors = vote_posteriors(
            features, rows, torch.tensor([1]), 4, num_neighbors=2, num_steps=num_steps
        )
        assert not bool(posteriors.isnan().any())
        assert bool((posteriors.argmax(1)[:3] == 1).all())
        assert torch.allclose(posteriors.sum(1), torch.ones(6), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": torch.tensor([0, 3])}, r"\[-1, 3\)"),
        ({"answers": torch.tensor([0, -2])}, r"\[-1, 3\)"),
        ({"answers": torch.tensor([0])}, "one length"),
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"num_neighbors": 0}, "num_neighbors"),
        ({"features": torch.zeros(1, 2)}, "two images"),
    ],
)
def test_bad_arguments_refused(changes, message):
    arguments = {
        "features": torch.randn(9, 2),
        "query_rows": torch.tensor([0, 4]),
        "answers": torch.tensor([0, 2]),
        "num_classes": 3,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        vote_posteriors(**arguments)
