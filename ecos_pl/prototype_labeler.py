"""Labels from the client's noisy class means, in a space found from public images alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ecos_pl.accounting import calibrate_noise_multiplier, epsilon_of
from ecos_pl.answer_checks import check_answer, check_integers, check_noise
from ecos_pl.class_posteriors import class_posteriors
from ecos_pl.label_space import find_label_space
from ecos_pl.labeling import LabelingTask, Labels, RoundPlan
from ecos_pl.messages import MessageError, PrototypeAnswer, PrototypeQuery
from ecos_pl.privacy import Release
from ecos_pl.prototypes import GRID, NoisyPrototypes, prototype_release

_CLIP_SHARE = 0.8  # of the proxy set's median norm: most images then weigh the same in a sum


class PrototypeLabeler:
    """Labels from one joint release of per-class feature sums and class counts.

    The space is public: the directions in which *proxy images* differ most relative to views of
    one image (``fit_invariant_projection``), each scaled to variance one over the proxy set, so
    that no noise is spent on what does not tell classes apart. The client clips each image's
    features to 0.8 of the proxy set's median norm, adds them up per class, and releases sums and
    counts with noise. What the cloud makes of them costs no privacy (`class_posteriors`).

    Args:
        classes: Names of the client's classes.
        num_dims: Dimensions of the space.
        num_views: Random views an image from which the space is found; 0 takes the proxy set's
            whitened principal components instead.
        noise_multiplier: Noise ÷ sensitivity; None takes what ``max_epsilon`` leaves.
        count_weight: Length of a count beside a feature vector of length 1 in the joint release.
            Small: a class' count (some 100 images) bears more noise than its feature sum.
        features: The encoder's features it works in (`encoder.FEATURES`).
        rounds: Further releases, as noisy as the first, in the space of an adapted backbone.
    """

    name = "client_prototypes"

    def __init__(
        self,
        classes: Sequence[str],
        *,
        num_dims: int = 32,
        num_views: int = 4,
        noise_multiplier: float | None = None,
        count_weight: float = 0.3,
        features: str = "grid",
        rounds: RoundPlan | None = None,
    ) -> None:
        self.classes, self.num_dims, self.num_views = list(classes), num_dims, num_views
        self.features, self.rounds = features, rounds
        self.noise_multiplier, self.count_weight = noise_multiplier, count_weight

    def facts(self) -> dict[str, Any]:
        """See `Labeler`."""
        return {
            "classes": self.classes,
            "num_dims": self.num_dims,
            "num_views": self.num_views,
            "noise_multiplier": self.noise_multiplier,
            "count_weight": self.count_weight,
            "features": self.features,
            "inference": 2,  # raise when class_posteriors changes
            **({"rounds": asdict(self.rounds)} if self.rounds else {}),
        }

    def plan(
        self, spent: Sequence[Release], *, max_epsilon: float, delta: float, sample_rate: float
    ) -> list[Release]:
        """One release for each round, equally noisy; calibrated to what the others leave of ε."""
        multiplier, num_releases = self.noise_multiplier, 1
        num_releases += len(self.rounds.epochs) if self.rounds else 0
        if multiplier is None:
            multiplier = calibrate_noise_multiplier(
                max_epsilon, delta, sample_rate=sample_rate, spent=spent, repeats=num_releases
            )
        releases = [prototype_release(self.count_weight, multiplier, sample_rate)] * num_releases
        total = epsilon_of([*spent, *releases], delta)
        if total > max_epsilon:
            raise ValueError(
                f"labels.noise_multiplier={multiplier:g} brings the run to ε = {total:.3f}, over "
                f"privacy.max_epsilon={max_epsilon:g}; leave it out to have it calibrated"
            )
        return releases

    def label(self, task: LabelingTask) -> Labels:
        """See `Labeler`.

        Raises:
            MessageError: The client's answer does not fit the question or the plan.
        """
        plan = task.planned[task.number]
        num_dims = self.rounds.num_dims if task.number and self.rounds else self.num_dims
        space = find_label_space(task, num_dims=num_dims, num_views=self.num_views)
        features = space.features
        query = PrototypeQuery(
            **space.encoding(task),
            classes=self.classes,
            clip_norm=max(_CLIP_SHARE * float(features.norm(dim=1).median()), GRID),
            count_weight=self.count_weight,
            noise_multiplier=plan.noise_multiplier,
            sample_rate=plan.sample_rate,
            attempt=task.attempt,
        )
        content = query.to_bytes()
        answer = PrototypeAnswer.from_bytes(task.ask(content))
        noisy, release = _checked(answer, query, content)
        targets = class_posteriors(
            features,
            noisy.class_sums().float(),
            noisy.class_counts().float(),
            sum_noise_std=noisy.sum_noise_std,
            count_noise_std=noisy.count_noise_std,
            views=space.views,
        )
        weights = torch.ones(len(targets))
        return Labels(self.classes, targets, weights, [release], answer.max_per_unit)


def _checked(
    answer: PrototypeAnswer, query: PrototypeQuery, content: bytes
) -> tuple[NoisyPrototypes, Release]:
    check_answer(answer, content, sample_rate=query.sample_rate)
    num_classes, num_dims = len(query.classes), len(query.components)
    check_integers("sums", answer.sums, (num_classes, num_dims))
    check_integers("counts", answer.counts, (num_classes,))
    weight = round(query.count_weight / GRID) * GRID
    if (answer.grid, answer.clip_norm, answer.count_weight) != (GRID, query.clip_norm, weight):
        raise MessageError("the client's grid, clip_norm or count_weight is not the one asked for")
    release = prototype_release(
        query.count_weight, query.noise_multiplier, query.sample_rate, answer.max_per_unit
    )
    check_noise(answer.noise_std, release.noise_std)
    noisy = NoisyPrototypes(
        answer.sums,
        answer.counts,
        answer.grid,
        answer.clip_norm,
        answer.count_weight,
        answer.noise_std,
    )
    return noisy, release
