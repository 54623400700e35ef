"""The client's votes on public images: private kNN (Zhu et al., CVPR 2020) with Gaussian noise.

For every query the k nearest of the client's samples vote for their class, and the class with the
most votes after noise is the answer (GNMax; Papernot et al. 2018, arXiv 1802.08908, which also
gives the screening: a query is answered only where a noisy largest vote exceeds a threshold).

Sensitivity. Fix the Poisson sample S of a query, without one sample x. All samples are ordered by
distance to the query, equal distances by their order in the client's list; adding x does not
change the order of the others. While S has fewer than k samples all of them vote, and x adds one
vote: L2 distance 1. Otherwise x either stays out, or takes the k-th one's place: one vote more for
x's class and one less for the other's, L2 distance √2, or 0 if the classes are the same. So the
votes move by at most √2, *not* by 1, and their largest by at most 1, up or down.

A person with at most m samples puts a ≤ m of them among the voters and pushes out b ≤ a. Votes
change by p - r, both non-negative, of sums a and b, so ‖p - r‖² ≤ ‖p‖² + ‖r‖² ≤ a² + b² ≤ 2m², and
no single class by more than m: sensitivities √2·m and m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.coverage import finite_tables
from ecos_pl.privacy import (
    PER_SAMPLE,
    PrivacyUnits,
    Release,
    add_discrete_gaussian,
    check_sample_rate,
    grid_scale,
    integer_release,
    noisy_integers,
)
from ecos_pl.prototypes import checked_labels


@dataclass(frozen=True)
class VotePlan:
    """What the client will release, fixed before the first answer; the cost holds whatever it says.

    >>> from ecos_pl.accounting import epsilon_of
    >>> plan = VotePlan(1000, 600, 40, 0.15, 25.0, screening_noise_std=75.0, threshold=24.0)
    >>> round(epsilon_of(plan.releases(), 1e-5), 3)
    0.798

    Attributes:
        num_queries: Queries asked, Q.
        max_answers: Queries answered at most, A: the first that pass the screening. Q without it.
        num_neighbors: Voters for a query, k.
        sample_rate: Probability with which each unit takes part, anew for each screening and vote.
        vote_noise_std: Noise on each class's votes, in votes; with persons it is drawn
            `max_samples` times as large, as is the screening's.
        screening_noise_std: Noise on the largest vote that is compared with `threshold`; None for
            no screening.
        threshold: Noisy votes above which a query is answered; None for no screening.
        max_samples: Most samples of one person (`PrivacyUnits`), m.

    Raises:
        ValueError: If a number is out of range, or the plan contradicts itself.
    """

    num_queries: int
    max_answers: int
    num_neighbors: int
    sample_rate: float
    vote_noise_std: float
    screening_noise_std: float | None = None
    threshold: float | None = None
    max_samples: int = 1

    def __post_init__(self) -> None:
        for name in ("num_queries", "max_answers", "num_neighbors", "max_samples"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"vote plan: {name} must be a whole number above zero")
        check_sample_rate(self.sample_rate)
        if (self.screening_noise_std is None) != (self.threshold is None):
            raise ValueError("vote plan: screening_noise_std and threshold belong together")
        if self.max_answers > self.num_queries:
            raise ValueError("vote plan: max_answers must not exceed num_queries")
        if self.threshold is None and self.max_answers != self.num_queries:
            raise ValueError("vote plan: without screening every query is answered")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError("vote plan: threshold must be finite")
        self.releases()  # refuses noise that cannot be accounted for

    def releases(self) -> list[Release]:
        """Return what is charged beforehand: Q screenings, if any, and A votes.

        A query that is screened out pays its screening all the same; votes that are not needed
        stay paid for, since their number depends on private data.
        """
        m = self.max_samples
        votes = integer_release(
            "knn_votes",
            noise_std=m * self.vote_noise_std,
            sensitivity=m * math.sqrt(2),
            sample_rate=self.sample_rate,
            repeats=self.max_answers,
        )
        if self.screening_noise_std is None:
            return [votes]
        screenings = integer_release(
            "knn_screening",
            noise_std=m * self.screening_noise_std,
            sensitivity=m,
            sample_rate=self.sample_rate,
            one_coordinate=m == 1,
            repeats=self.num_queries,
        )
        return [screenings, votes]


def release_votes(
    embeddings: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    plan: VotePlan,
    units: PrivacyUnits = PER_SAMPLE,
) -> Tensor:
    """Answer queries with the noisy majority class of their nearest samples, as planned.

    Screenings and votes are drawn on separate Poisson samples with separate noise; all screenings
    come before the first vote, so that what is composed is a fixed list of mechanisms.

    Args:
        embeddings: `[n, d]`, the client's samples of the classes asked about; n may be zero.
        labels: `[n]` int64 in [0, num_classes).
        queries: `[Q, d]`, public points.
        num_classes: K.
        plan: What to release; its `releases` must have been charged.
        units: Who counts as one in the guarantee.

    Returns:
        `[Q]` int64 classes, -1 for a query that was screened out or came after `max_answers`.

    Raises:
        ValueError: If shapes or values do not fit; the text tells nothing about the samples.
    """
    if len(queries) != plan.num_queries:
        raise ValueError(f"the plan is for {plan.num_queries} queries, not {len(queries)}")
    if units.max_samples != plan.max_samples:
        raise ValueError("the plan is for another max_samples than the units have")
    screening_votes, votes = neighbor_votes(embeddings, labels, queries, num_classes, plan, units)
    answered = np.ones(len(queries), dtype=np.bool_)
    if plan.threshold is not None:
        assert plan.screening_noise_std is not None
        noisy_largest, _ = noisy_integers(
            screening_votes.max(1),
            kind="knn_screening",
            noise_std=plan.max_samples * plan.screening_noise_std,
            sensitivity=plan.max_samples,
            sample_rate=plan.sample_rate,
            one_coordinate=plan.max_samples == 1,
        )
        passed = noisy_largest > plan.threshold
        answered = passed & (np.cumsum(passed) <= plan.max_answers)
    # On the fine grid, undivided: ties are then rare, and go to the lower class.
    release = plan.releases()[-1]
    scale = grid_scale(plan.max_samples * plan.vote_noise_std)
    noisy = add_discrete_gaussian(scale * votes[answered], release.noise_std)
    classes = np.full(len(queries), -1, dtype=np.int64)
    classes[answered] = noisy.argmax(1)
    return torch.from_numpy(classes)


def neighbor_votes(
    embeddings: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    plan: VotePlan,
    units: PrivacyUnits = PER_SAMPLE,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count exact votes `[Q, K]` on two Poisson samples a query: private, before any noise.

    Every query is counted twice, screened out or not: the time taken must not tell.
    """
    points, targets = finite_tables(embeddings=embeddings, queries=queries)
    classes = checked_labels(labels, num_classes, num_samples=len(points))
    columns = np.ascontiguousarray(points.T)
    votes = np.zeros((2, len(targets), num_classes), dtype=np.int64)
    for index, target in enumerate(targets):
        distances = _squared_distances(columns, target)
        for purpose in range(2):
            kept = np.flatnonzero(units.mask(len(points), plan.sample_rate))
            voters = kept[_smallest(distances[kept], plan.num_neighbors)]
            votes[purpose, index] = np.bincount(classes[voters], minlength=num_classes)
    return votes[0], votes[1]


def _squared_distances(
    columns: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Return the squared distance `[n]` of each point, given as columns `[d, n]`.

    Summed in the order of the dimensions, one elementwise IEEE operation at a time: unlike a
    matrix product, a pair's result has the same bits whatever else is in the batch.
    """
    total = np.zeros(columns.shape[1])
    for column, value in zip(columns, target.tolist(), strict=True):
        difference = column - value
        difference *= difference
        total += difference
    return total


def _smallest(distances: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Return where the `count` smallest are, all if there are fewer; equal ones in their order."""
    if len(distances) <= count:
        return np.arange(len(distances))
    last = np.partition(distances, count - 1)[count - 1]
    closer = np.flatnonzero(distances < last)
    level = np.flatnonzero(distances == last)[: count - len(closer)]
    return np.concatenate([closer, level])
