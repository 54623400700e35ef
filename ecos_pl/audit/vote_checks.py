"""Checks of the neighbor votes, whose release is one class per query instead of noisy totals.

What is known of an answer's distribution is compared with many answers of one release: every query
has its own masks and noise, so all queries may stand at one place. Some checks choose a plan with
little noise, to see the masks.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats

from ecos_pl.audit.bounds import discrete_tail
from ecos_pl.audit.checks import ALPHA, require, same_seeds
from ecos_pl.audit.votes import Votes, answer, make_plan
from ecos_pl.neighbor_votes import VotePlan

_NUM_QUERIES = 4_000
_LITTLE_NOISE = 0.05


def check_vote_integers(votes: Votes) -> None:
    """Answers are class numbers of an integer type, never votes."""
    answers = answer(votes, [0.0, 1.0], [0, 1], make_plan(50, 1, votes.noise_std))
    require(answers.dtype == np.int64, "the answers are not int64")
    require(answers.shape == (50,), "there is not one answer per query")
    require(bool(np.isin(answers, [-1, 0, 1]).all()), "an answer is not a class number")


def check_vote_neighbours(votes: Votes) -> None:
    """Before noise, one sample changes the votes by no more than the charged sensitivity.

    The largest vote as well. Samples lie on a coarse grid, so that many are equally far away.
    """
    rng = np.random.default_rng()
    for size in (1, 2, 3, 4, 8, 30) * 10:
        plan = make_plan(6, 3, votes.noise_std, screening_std=votes.noise_std)
        screening, vote = votes.charges(plan)
        points = torch.from_numpy(rng.integers(-2, 3, (size, 2)).astype(np.float64))
        labels = torch.from_numpy(rng.integers(0, 4, size))
        queries = torch.from_numpy(rng.integers(-2, 3, (6, 2)).astype(np.float64))
        keep = np.delete(np.arange(size), rng.integers(size))
        _, more = votes.exact(points, labels, queries, 4, plan)
        _, fewer = votes.exact(points[keep], labels[keep], queries, 4, plan)
        most = votes.noise_std / vote.noise_multiplier * (1 + 1e-9)  # sensitivity, in votes
        require(
            math.sqrt(np.square(more - fewer).sum(1).max()) <= most,
            "a sample changes the votes by more than the charged sensitivity",
        )
        most = votes.noise_std / screening.noise_multiplier * (1 + 1e-9)
        require(
            np.abs(more.max(1) - fewer.max(1)).max() <= most,
            "a sample changes the largest vote by more than the charged sensitivity",
        )


def check_vote_noise(votes: Votes) -> None:
    """A majority of known size wins, and passes the screening, as often as the noise lets it."""
    std = votes.noise_std
    majority = max(1, round(1.2 * math.sqrt(2) * std))
    wins = float(stats.norm.cdf(majority / (math.sqrt(2) * std)))
    for label in (0, 1):
        plan = make_plan(_NUM_QUERIES, majority, std)
        won = answer(votes, [0.0] * majority, [label] * majority, plan) == label
        _require_share(won, wins, 1 / 3, "the majority wins")
    threshold = majority + math.ceil(0.8 * std) - 0.5
    plan = make_plan(_NUM_QUERIES, majority, std, screening_std=std, threshold=threshold)
    passed = answer(votes, [0.0] * majority, [0] * majority, plan) >= 0
    passes = discrete_tail(math.ceil(0.8 * std), std)
    _require_share(passed, passes, 1 / 3, "the screening is passed")


def check_vote_fresh(votes: Votes) -> None:
    """Without samples, two releases under the same seeds agree on half of the answers."""
    answers = []
    for _ in range(2):
        with same_seeds():
            answers.append(answer(votes, [], [], make_plan(_NUM_QUERIES, 1, votes.noise_std)))
    _require_share(answers[0] == answers[1], 0.5, 1 / 2, "two releases agree")
    _require_share(answers[0][1:] == answers[0][:-1], 0.5, 1 / 2, "neighbouring answers agree")


def check_vote_sampling(votes: Votes, sample_rate: float) -> None:
    """Each screening and each vote has a Poisson sample of its own, seen here with little noise."""
    _check_vote_masks(votes, sample_rate)
    _check_sample_size(votes, sample_rate)
    _check_separate_masks(votes, sample_rate)


def _check_vote_masks(votes: Votes, rate: float) -> None:
    """One voter: the nearer sample if it was drawn, else the other, else the noise decides."""
    plan = make_plan(_NUM_QUERIES, 1, _LITTLE_NOISE, sample_rate=rate)
    nearer = answer(votes, [0.0, 1.0], [0, 1], plan) == 0
    chance = rate + (1 - rate) ** 2 / 2
    _require_share(nearer, chance, 1 / 5, "the nearer of two samples is drawn")
    pairs = nearer.reshape(-1, 2)
    agree = chance**2 + (1 - chance) ** 2
    _require_share(pairs[:, 0] == pairs[:, 1], agree, 1 / 5, "neighbouring answers agree")


def _check_sample_size(votes: Votes, rate: float) -> None:
    """Everybody votes alike, so the largest vote is the sample's size: binomial."""
    size = min(2_000, math.ceil(25 / (rate * (1 - rate))))
    least = math.ceil(size * rate + math.sqrt(size * rate * (1 - rate)))
    plan = _screened(size, rate, least - 0.5)
    passed = answer(votes, [0.0] * size, [0] * size, plan) >= 0
    passes = sum(
        (discrete_tail(noise, 0.5) - discrete_tail(noise + 1, 0.5))
        * float(stats.binom.sf(least - noise - 1, size, rate))
        for noise in range(-10, 11)
    )
    _require_share(passed, passes, 1 / 5, "a sample's size passes the screening")


def _check_separate_masks(votes: Votes, rate: float) -> None:
    """One sample: whether it was drawn for the screening tells nothing of its vote."""
    answers = answer(votes, [0.0], [0], _screened(1, rate, 0.5))
    passes = rate * discrete_tail(0, 0.5) + (1 - rate) * discrete_tail(1, 0.5)
    _require_share(answers >= 0, passes, 1 / 5, "a drawn sample passes the screening")
    won = answers[answers >= 0] == 0
    _require_share(won, rate + (1 - rate) / 2, 1 / 5, "a screened sample wins the vote")


def _screened(num_neighbors: int, rate: float, threshold: float) -> VotePlan:
    return make_plan(
        _NUM_QUERIES,
        num_neighbors,
        _LITTLE_NOISE,
        sample_rate=rate,
        screening_std=0.5,
        threshold=threshold,
    )


def _require_share(
    happened: npt.NDArray[np.bool_], probability: float, share: float, name: str
) -> None:
    """Fail where independent trials, at this share of `ALPHA`, do not fit the probability."""
    hits, total = int(happened.sum()), len(happened)
    p_value = 2 * min(
        float(stats.binom.cdf(hits, total, probability)),
        float(stats.binom.sf(hits - 1, total, probability)),
    )
    text = f"{name} in {hits / total:.3f} of cases instead of {probability:.3f}"
    require(p_value >= ALPHA * share, text)
