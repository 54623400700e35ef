"""The neighbor votes, as the audit sees them, and their canaries.

Samples and queries lie on a line, and there are two classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.audit.checks import Floats, Integers
from ecos_pl.neighbor_votes import VotePlan, neighbor_votes, release_votes
from ecos_pl.privacy import Release, poisson_mask


@dataclass(frozen=True)
class Votes:
    """The neighbor votes under audit: by default as built.

    Attributes:
        noise_std: Noise on votes and on the screening's largest vote, in votes.
        release: As `release_votes`.
        exact: As `neighbor_votes`.
        charges: The releases that a plan is charged for.
    """

    noise_std: float
    release: Callable[[Tensor, Tensor, Tensor, int, VotePlan], Tensor] = release_votes
    exact: Callable[[Tensor, Tensor, Tensor, int, VotePlan], tuple[Integers, Integers]] = (
        neighbor_votes
    )
    charges: Callable[[VotePlan], list[Release]] = VotePlan.releases


def make_plan(
    num_queries: int,
    num_neighbors: int,
    noise_std: float,
    *,
    sample_rate: float = 1.0,
    screening_std: float | None = None,
    threshold: float = 0.0,
) -> VotePlan:
    """Return a plan with screening if it has noise, and an answer for each query that passes."""
    return VotePlan(
        num_queries=num_queries,
        max_answers=num_queries,
        num_neighbors=num_neighbors,
        sample_rate=sample_rate,
        vote_noise_std=noise_std,
        screening_noise_std=screening_std,
        threshold=None if screening_std is None else threshold,
    )


def answer(
    votes: Votes,
    at: npt.ArrayLike,
    labels: npt.ArrayLike,
    plan: VotePlan,
    queries: Floats | None = None,
) -> Integers:
    """Answer as planned, for samples at these places; all queries at zero unless given."""
    places = np.zeros(plan.num_queries) if queries is None else queries
    answers = votes.release(
        torch.from_numpy(np.asarray(at, dtype=np.float64))[:, None],
        torch.from_numpy(np.asarray(labels, dtype=np.int64)),
        torch.from_numpy(places)[:, None],
        2,
        plan,
    )
    return answers.numpy()


def vote_canaries(
    votes: Votes, num_canaries: int, sample_rate: float, queries_per_run: int = 100
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Put a canary beside each query by a fair coin, where it turns 1 vote to 2 into 2 to 1.

    With sampling it is the only voter (0 to 1 against 1 to 0), so that nothing but its own mask
    blurs the answer.

    Returns:
        Coins `[N]`, and whether the canary's class won, as 0 or 1, `[N]`.
    """
    if sample_rate == 1:
        k, others = 3, [(1.0, 0), (3.0, 1), (3.0, 1)]
    else:  # one of the others is nearly always drawn
        k = 1
        others = [(3.0, 1)] * min(60, math.ceil(math.log(1e-3) / math.log(1 - sample_rate)))
    coins, scores = [], []
    for start in range(0, num_canaries, queries_per_run):
        coin = poisson_mask(min(queries_per_run, num_canaries - start), 0.5)
        places = 1000 * np.arange(len(coin), dtype=np.float64)
        at = np.concatenate([places[coin] + 2, *(places + distance for distance, _ in others)])
        label = np.repeat([0, *(c for _, c in others)], [coin.sum(), *[len(coin)] * len(others)])
        plan = make_plan(len(coin), k, votes.noise_std, sample_rate=sample_rate)
        coins.append(coin)
        scores.append(answer(votes, at, label, plan, places) == 0)
    return np.concatenate(coins), np.concatenate(scores).astype(np.float64)


def screening_canaries(
    votes: Votes, num_canaries: int, queries_per_run: int = 100
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Put a canary beside each query by a fair coin, where it lifts the largest vote from 2 to 3.

    Returns:
        Coins `[N]`, and whether the query passed the screening, as 0 or 1, `[N]`.
    """
    coins, scores = [], []
    for start in range(0, num_canaries, queries_per_run):
        coin = poisson_mask(min(queries_per_run, num_canaries - start), 0.5)
        places = 1000 * np.arange(len(coin), dtype=np.float64)
        at = np.concatenate([places[coin] + 2, places + 1, places + 1, places + 3])
        label = np.repeat([0, 0, 0, 1], [coin.sum(), *[len(coin)] * 3])
        std = votes.noise_std
        plan = make_plan(len(coin), 3, std, screening_std=std, threshold=2.5)
        coins.append(coin)
        scores.append(answer(votes, at, label, plan, places) >= 0)
    return np.concatenate(coins), np.concatenate(scores).astype(np.float64)
