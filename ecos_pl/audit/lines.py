"""The lines of the audit's table: which checks and canaries a mechanism gets, and the verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ecos_pl.accounting import epsilon_of
from ecos_pl.audit import checks, mechanisms, vote_checks
from ecos_pl.audit.bounds import epsilon_any_shape, gaussian_epsilon, noise_at_most
from ecos_pl.audit.checks import ALPHA, AuditFailure, Floats, Mechanism
from ecos_pl.audit.votes import Votes, make_plan, screening_canaries, vote_canaries
from ecos_pl.privacy import Release

_VOTES_SHARE = 4
"""A canary of the votes takes as long as some of the others."""

Canaries = Callable[[], tuple[npt.NDArray[np.bool_], Floats]]
Check = tuple[str, Callable[[], None]]


@dataclass(frozen=True)
class Line:
    """A mechanism with its parameters.

    Attributes:
        mechanism: Name.
        noise_std: Per unit of what one sample changes.
        unit: Whom ε protects.
        release: What is claimed: the release that a canary's unit takes part in.
        canaries: Draws coins and scores.
        checks: The other checks, by name.
        thresholds: Scores from which a canary is guessed present, for `epsilon_any_shape`.
    """

    mechanism: str
    noise_std: float
    unit: str
    release: Release
    canaries: Canaries
    checks: Sequence[Check]
    thresholds: Sequence[float] = (0.5,)


@dataclass(frozen=True)
class Result:
    """What the audit of a line found.

    Attributes:
        mechanism: See `Line`, as for the parameters.
        noise_std: See `Line`.
        sample_rate: Of the Poisson sample.
        unit: See `Line`.
        claimed: ε that the accountant states.
        bound_any: Lower bound on ε whatever the noise's shape.
        bound_declared: The same for noise of the declared shape and unknown size.
        num_canaries: Canaries behind the bounds.
        passed: Names of checks.
        failed: What was seen, by name of the check.
        seconds: Time taken.
    """

    mechanism: str
    noise_std: float
    sample_rate: float
    unit: str
    claimed: float
    bound_any: float
    bound_declared: float
    num_canaries: int
    passed: list[str]
    failed: dict[str, str]
    seconds: float


def audit(line: Line, delta: float, alpha: float) -> Result:
    """Run the checks of a line and bound its ε at `delta` from below by canaries.

    Each of the two bounds returned is wrong with probability `alpha`. Whether one exceeds the claim
    is judged by bounds that are wrong with probability `ALPHA` in all.
    """
    started = time.monotonic()
    passed, failed = [], {}
    for name, check in line.checks:
        try:
            check()
            passed.append(name)
        except AuditFailure as failure:
            failed[name] = str(failure)
    coins, scores = line.canaries()
    claimed = epsilon_of([line.release], delta)
    surely = max(canary_bounds(line, coins, scores, delta, ALPHA / 2))
    if surely > claimed:
        failed["canaries"] = f"ε is at least {surely:.3g}, more than the claimed {claimed:.3g}"
    else:
        passed.append("canaries")
    bound_any, bound_declared = canary_bounds(line, coins, scores, delta, alpha)
    return Result(
        mechanism=line.mechanism,
        noise_std=line.noise_std,
        sample_rate=line.release.sample_rate,
        unit=line.unit,
        claimed=claimed,
        bound_any=bound_any,
        bound_declared=bound_declared,
        num_canaries=len(coins),
        passed=passed,
        failed=failed,
        seconds=time.monotonic() - started,
    )


def canary_bounds(
    line: Line,
    coins: npt.NDArray[np.bool_],
    scores: Floats,
    delta: float,
    alpha: float,
) -> tuple[float, float]:
    """Bound ε from below, for noise of any shape and of the declared one, each wrong by `alpha`."""
    rate, one_coordinate = line.release.sample_rate, line.release.one_coordinate
    right = int(((scores >= 0.5) == coins).sum())
    noise = noise_at_most(
        right, len(coins), sample_rate=rate, one_coordinate=one_coordinate, alpha=alpha
    )
    return (
        epsilon_any_shape(coins, scores, line.thresholds, delta=delta, alpha=alpha),
        gaussian_epsilon(noise, sample_rate=rate, one_coordinate=one_coordinate, delta=delta),
    )


def all_lines(
    noise_std: float, sample_rate: float, per_person: int, num_canaries: int
) -> Iterator[Line]:
    """Yield every mechanism: unsampled, at `sample_rate`, and with persons of several samples."""
    for make in (mechanisms.coverage, mechanisms.class_table, mechanisms.prototypes):
        yield totals_line(make(noise_std), noise_std, 1.0, num_canaries)
        if sample_rate < 1:
            yield totals_line(make(noise_std), noise_std, sample_rate, num_canaries, sampled=True)
        if per_person > 1:
            persons = make(noise_std, per_person)
            unit = f"{per_person}/person"
            yield totals_line(persons, noise_std, sample_rate, num_canaries, unit=unit)
    yield from vote_lines(Votes(noise_std), sample_rate, num_canaries // _VOTES_SHARE)


def totals_line(
    mechanism: Mechanism,
    noise_std: float,
    sample_rate: float,
    num_canaries: int,
    *,
    sampled: bool = False,
    unit: str = "sample",
) -> Line:
    """Return the line of a mechanism that releases totals.

    With `sampled` only what sampling changes is checked, for another line does the rest.
    """
    _, release = mechanism.release(np.zeros(0, dtype=np.int64), 1, sample_rate)
    tests: list[Check] = []
    if not sampled:
        tests += [
            ("integers", lambda: checks.check_integers(mechanism)),
            ("neighbours", lambda: checks.check_neighbours(mechanism)),
            ("residuals", lambda: checks.check_residuals(mechanism)),
            ("fresh", lambda: checks.check_fresh(mechanism)),
        ]
    if sample_rate < 1:
        tests.append(("sampling", lambda: checks.check_sampling(mechanism, sample_rate)))
    noise = mechanism.noise_std(release) / mechanism.length
    return Line(
        mechanism=mechanism.name,
        noise_std=noise_std,
        unit=unit,
        release=release,
        canaries=lambda: checks.canary_scores(mechanism, num_canaries, sample_rate),
        checks=tests,
        thresholds=[0.5 + z * noise for z in (1, 1.5, 2, 2.5)],
    )


def vote_lines(votes: Votes, sample_rate: float, num_canaries: int) -> Iterator[Line]:
    """Yield the lines of the neighbor votes: one query's vote, sampled or not, and screening."""
    std = votes.noise_std
    screening, vote = votes.charges(make_plan(1, 1, std, screening_std=std))
    yield Line(
        mechanism="kNN vote",
        noise_std=std,
        unit="sample",
        release=vote,
        canaries=lambda: vote_canaries(votes, num_canaries, 1.0),
        checks=[
            ("integers", lambda: vote_checks.check_vote_integers(votes)),
            ("neighbours", lambda: vote_checks.check_vote_neighbours(votes)),
            ("noise", lambda: vote_checks.check_vote_noise(votes)),
            ("fresh", lambda: vote_checks.check_vote_fresh(votes)),
        ],
    )
    if sample_rate < 1:
        yield Line(
            mechanism="kNN vote",
            noise_std=std,
            unit="sample",
            release=replace(vote, sample_rate=sample_rate),
            canaries=lambda: vote_canaries(votes, num_canaries, sample_rate),
            checks=[("sampling", lambda: vote_checks.check_vote_sampling(votes, sample_rate))],
        )
    yield Line(
        mechanism="kNN screening",
        noise_std=std,
        unit="sample",
        release=screening,
        canaries=lambda: screening_canaries(votes, num_canaries),
        checks=[],
    )
