"""Labels from private kNN votes of the client: the labelling of the paper (Zhu et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ecos_pl.accounting import calibrate_noise_multiplier, epsilon_of
from ecos_pl.answer_checks import check_answer
from ecos_pl.label_space import find_label_space
from ecos_pl.labeling import LabelingTask, Labels, RoundPlan
from ecos_pl.messages import MessageError, VoteAnswer, VoteQuery
from ecos_pl.neighbor_votes import VotePlan
from ecos_pl.privacy import Release
from ecos_pl.vote_posteriors import medoids, vote_posteriors

QUERIES_PER_CLASS = 3
NOISE_STDS_OF_ALL_VOTES = 3.0
"""Voters at each point, in noise standard deviations: a unanimous vote then stands out."""
THRESHOLD_SHARE = 0.6
"""Share of the voters that must agree, after noise, for a screened vote to be given."""


class VoteLabeler:
    """Noisy majority classes of the client's images near a few points of the proxy set.

    The paper asks about every proxy image; under a small ε that drowns each answer. Here the points
    are the centres of a few clusters, and their answers spread to all images over the public
    geometry (`vote_posteriors`), which costs nothing.

    Args:
        classes: Names of the client's classes.
        num_queries: Points Q; None for three a class.
        max_answers: Points answered at most, A; fewer than Q screens them: a point is answered
            where most voters agree. None answers all, and spends nothing on screening.
        num_neighbors: Voters k at each point; None for three noise standard deviations.
        num_dims: Dimensions of the label space.
        num_views: Random views from which that space is found (`find_label_space`).
        features: The encoder's features it works in.
    """

    name = "client_knn"
    rounds: RoundPlan | None = None

    def __init__(
        self,
        classes: Sequence[str],
        *,
        num_queries: int | None = None,
        max_answers: int | None = None,
        num_neighbors: int | None = None,
        num_dims: int = 32,
        num_views: int = 4,
        features: str = "grid",
    ) -> None:
        self.classes = list(classes)
        self.num_queries = num_queries or max(2, QUERIES_PER_CLASS * len(self.classes))
        self.max_answers = max_answers or self.num_queries
        if self.max_answers > self.num_queries:
            raise ValueError(
                f"labels.max_answers={self.max_answers} exceeds the {self.num_queries} queries"
            )
        self.num_neighbors = num_neighbors
        self.num_dims, self.num_views, self.features = num_dims, num_views, features

    def facts(self) -> dict[str, Any]:
        """See `Labeler`."""
        return {
            "classes": self.classes,
            "num_queries": self.num_queries,
            "max_answers": self.max_answers,
            "num_neighbors": self.num_neighbors,
            "num_dims": self.num_dims,
            "num_views": self.num_views,
            "features": self.features,
            "inference": 1,  # raise when vote_posteriors changes
        }

    def plan(
        self, spent: Sequence[Release], *, max_epsilon: float, delta: float, sample_rate: float
    ) -> list[Release]:
        """All votes, and screenings if any, calibrated to what the others leave together."""
        # One release with this multiplier would fit; without sampling, many with less are as one.
        high = calibrate_noise_multiplier(max_epsilon, delta, spent=spent)
        low = high / 1000 if sample_rate < 1 else high

        def fits(multiplier: float) -> bool:
            releases = self._votes(multiplier, sample_rate).releases()
            return epsilon_of([*spent, *releases], delta) <= max_epsilon

        while not fits(high):  # the accountant's grid may shift by a hair
            high *= 1.001
        while high > low * 1.003:
            middle = math.sqrt(low * high)
            low, high = (low, middle) if fits(middle) else (middle, high)
        return self._votes(high, sample_rate).releases()

    def _votes(self, multiplier: float, sample_rate: float, num_points: int = 0) -> VotePlan:
        """The plan that costs as much as one Gaussian release of this multiplier, unsampled."""
        screened = self.max_answers < self.num_queries
        shares = 2 if screened else 1  # half of the budget each
        vote_noise_std = multiplier * math.sqrt(2 * shares * self.max_answers)
        screening = multiplier * math.sqrt(shares * self.num_queries)
        voters = self.num_neighbors or math.ceil(NOISE_STDS_OF_ALL_VOTES * vote_noise_std)
        return VotePlan(
            num_queries=self.num_queries,
            max_answers=self.max_answers,
            num_neighbors=voters,
            sample_rate=sample_rate,
            vote_noise_std=vote_noise_std,
            screening_noise_std=screening if screened else None,
            threshold=THRESHOLD_SHARE * voters if screened else None,
        )

    def label(self, task: LabelingTask) -> Labels:
        """See `Labeler`.

        Raises:
            MessageError: The client's answer does not fit the question or the plan.
        """
        votes = task.planned[-1]
        shares = 2 if self.max_answers < self.num_queries else 1
        multiplier = votes.noise_multiplier / math.sqrt(shares * self.max_answers)
        plan = self._votes(multiplier, votes.sample_rate)
        space = find_label_space(task, num_dims=self.num_dims, num_views=self.num_views)
        points = space.clusters(self.num_queries, task.seed).centroids
        # In no order: the first that pass a screening are answered, and must not be alike.
        generator = torch.Generator().manual_seed(task.seed)
        points = points[torch.randperm(len(points), generator=generator)]
        if len(points) < plan.num_queries:
            raise ValueError(
                f"labels.num_queries={plan.num_queries}: the proxy set holds only {len(points)} "
                "different points"
            )
        query = VoteQuery(
            **space.encoding(task),
            points=points.half(),
            classes=self.classes,
            num_neighbors=plan.num_neighbors,
            max_answers=plan.max_answers,
            vote_noise_std=plan.vote_noise_std,
            screening_noise_std=plan.screening_noise_std or 0.0,
            threshold=plan.threshold or 0.0,
            sample_rate=plan.sample_rate,
            attempt=task.attempt,
        )
        content = query.to_bytes()
        answer = VoteAnswer.from_bytes(task.ask(content))
        check_answer(answer, content, sample_rate=plan.sample_rate)
        labels = answer.labels
        inside = (labels >= -1) & (labels < len(self.classes))
        if labels.dtype != torch.int64 or labels.shape != (len(points),) or not bool(inside.all()):
            raise MessageError(f"the client must answer {len(points)} class numbers")
        asked = medoids(space.features, points)
        targets = vote_posteriors(space.features, asked, labels, len(self.classes))
        # ε is per unit, whatever the client takes as one: the plan's releases, m times each.
        releases = plan.releases()
        weights = torch.ones(len(targets))
        return Labels(self.classes, targets, weights, releases, answer.max_per_unit)
