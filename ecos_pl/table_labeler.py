"""Labels from the client's noisy class-by-cluster table: the plainest release that carries any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ecos_pl.accounting import calibrate_noise_multiplier, epsilon_of
from ecos_pl.answer_checks import check_answer, check_integers, check_noise
from ecos_pl.class_table import class_table_release
from ecos_pl.label_space import find_label_space
from ecos_pl.labeling import LabelingTask, Labels, RoundPlan
from ecos_pl.messages import TableAnswer, TableQuery
from ecos_pl.nearest import assign
from ecos_pl.privacy import Release
from ecos_pl.table_posteriors import table_posteriors

CLUSTERS_PER_CLASS = 5
"""A class's images look several ways; more clusters leave fewer images, and more noise, in each."""


class TableLabeler:
    """Counts of each class at each of some clusters of the proxy set (`table_posteriors`).

    Args:
        classes: Names of the client's classes.
        num_clusters: Clusters R; None for five a class.
        num_dims: Dimensions of the label space.
        num_views: Random views from which that space is found (`find_label_space`).
        noise_std: Noise on each count, in images; None takes what ``max_epsilon`` leaves.
        features: The encoder's features it works in.
    """

    name = "client_table"
    rounds: RoundPlan | None = None

    def __init__(
        self,
        classes: Sequence[str],
        *,
        num_clusters: int | None = None,
        num_dims: int = 32,
        num_views: int = 4,
        noise_std: float | None = None,
        features: str = "grid",
    ) -> None:
        self.classes = list(classes)
        self.num_clusters = num_clusters or max(2, CLUSTERS_PER_CLASS * len(self.classes))
        self.num_dims, self.num_views, self.noise_std = num_dims, num_views, noise_std
        self.features = features

    def facts(self) -> dict[str, Any]:
        """See `Labeler`."""
        return {
            "classes": self.classes,
            "num_clusters": self.num_clusters,
            "num_dims": self.num_dims,
            "num_views": self.num_views,
            "noise_std": self.noise_std,
            "features": self.features,
            "inference": 1,  # raise when table_posteriors changes
        }

    def plan(
        self, spent: Sequence[Release], *, max_epsilon: float, delta: float, sample_rate: float
    ) -> list[Release]:
        """One release; its noise is calibrated to what the others leave of ``max_epsilon``."""
        noise_std = self.noise_std
        if noise_std is None:
            noise_std = calibrate_noise_multiplier(
                max_epsilon, delta, sample_rate=sample_rate, spent=spent, one_coordinate=True
            )
        release = class_table_release(noise_std, sample_rate)
        total = epsilon_of([*spent, release], delta)
        if total > max_epsilon:
            raise ValueError(
                f"labels.noise_std={noise_std:g} brings the run to ε = {total:.3f}, over "
                f"privacy.max_epsilon={max_epsilon:g}; leave it out to have it calibrated"
            )
        return [release]

    def label(self, task: LabelingTask) -> Labels:
        """See `Labeler`.

        Raises:
            MessageError: The client's answer does not fit the question or the plan.
        """
        (plan,) = task.planned
        space = find_label_space(task, num_dims=self.num_dims, num_views=self.num_views)
        centroids = space.clusters(self.num_clusters, task.seed).centroids
        query = TableQuery(
            **space.encoding(task),
            centroids=centroids.half(),
            classes=self.classes,
            noise_std=plan.noise_std,
            sample_rate=plan.sample_rate,
            attempt=task.attempt,
        )
        content = query.to_bytes()
        answer = TableAnswer.from_bytes(task.ask(content))
        check_answer(answer, content, sample_rate=plan.sample_rate)
        check_integers("counts", answer.noisy_counts, (len(centroids), len(self.classes)))
        check_noise(answer.noise_std, plan.noise_std * answer.max_per_unit)
        targets = table_posteriors(
            space.features,
            centroids,
            assign(space.features, centroids),
            answer.noisy_counts,
            noise_std=answer.noise_std,
        )
        release = class_table_release(plan.noise_std, plan.sample_rate, answer.max_per_unit)
        weights = torch.ones(len(targets))
        return Labels(self.classes, targets, weights, [release], answer.max_per_unit)
