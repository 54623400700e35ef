"""Deliberately broken releases, and the check of `ecos_pl.audit` that must catch each.

Every check has a false-alarm probability of 1e-6 and uses fresh entropy: no seed makes it pass.
Each mutant lies six or more standard errors beyond what its check lets pass.
"""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ecos_pl.audit import checks, vote_checks
from ecos_pl.audit.checks import AuditFailure
from ecos_pl.audit.lines import audit, totals_line, vote_lines
from ecos_pl.audit.mechanisms import any_length, class_table, coverage, prototypes, ties, triple
from ecos_pl.audit.processes import check_processes
from ecos_pl.audit.votes import Votes
from ecos_pl.coverage import coverage_counts, coverage_release, nearest_centroids
from ecos_pl.neighbor_votes import neighbor_votes, release_votes
from ecos_pl.privacy import PrivacyUnits, add_discrete_gaussian, poisson_mask
from ecos_pl.prototypes import GRID, _sample_steps, class_totals, prototype_release

CHECKS = {
    "integers": checks.check_integers,
    "neighbours": checks.check_neighbours,
    "residuals": checks.check_residuals,
    "fresh": checks.check_fresh,
    "sampling": functools.partial(checks.check_sampling, sample_rate=0.5),
    "vote integers": vote_checks.check_vote_integers,
    "vote neighbours": vote_checks.check_vote_neighbours,
    "vote noise": vote_checks.check_vote_noise,
    "vote fresh": vote_checks.check_vote_fresh,
    "vote sampling": functools.partial(vote_checks.check_vote_sampling, sample_rate=0.5),
}


BROKEN_COVERAGE = []
BROKEN_PROTOTYPES = []


def caught_by(check, broken):
    """Add a mutant to a list, with the check that must catch it."""

    def add(mutant):
        broken.append(pytest.param(mutant, check, id=mutant.__name__))
        return mutant

    return add


# Coverage counts. A mutant takes (ids, num_bins, noise_std, sample_rate).


@pytest.mark.parametrize("name", ["integers", "neighbours", "residuals", "fresh", "sampling"])
def test_release_as_built_passes(name):
    CHECKS[name](coverage(1.7))  # test_audit.py runs all mechanisms at noise 5


def exact(ids, num_bins, sample_rate):
    keep = poisson_mask(len(ids), sample_rate)
    return np.bincount(ids[keep], minlength=num_bins).astype(np.int64)


def built(ids, num_bins, noise_std, sample_rate):
    return coverage(noise_std).release(ids, num_bins, sample_rate)[0][:, 0]


@caught_by("residuals", BROKEN_COVERAGE)
def none(ids, bins, std, rate):
    return exact(ids, bins, rate)


@caught_by("residuals", BROKEN_COVERAGE)
def double_noise(ids, bins, std, rate):
    return add_discrete_gaussian(exact(ids, bins, rate), 2 * std)


@caught_by("residuals", BROKEN_COVERAGE)
def halved_variance(ids, bins, std, rate):
    return add_discrete_gaussian(exact(ids, bins, rate), std / math.sqrt(2))


@caught_by("residuals", BROKEN_COVERAGE)
def variance_as_std(ids, bins, std, rate):
    return add_discrete_gaussian(exact(ids, bins, rate), std**2)


@caught_by("fresh", BROKEN_COVERAGE)
def own_seed(ids, bins, std, rate):
    noise = torch.randn(bins, generator=torch.Generator().manual_seed(len(ids))).numpy() * std
    return exact(ids, bins, rate) + noise.round().astype(np.int64)


@caught_by("fresh", BROKEN_COVERAGE)
def global_generator(ids, bins, std, rate):
    noise = torch.randn(bins).numpy() * std
    return exact(ids, bins, rate) + noise.round().astype(np.int64)


@caught_by("residuals", BROKEN_COVERAGE)
def shared_noise(ids, bins, std, rate):
    noise = add_discrete_gaussian(np.zeros((bins + 1) // 2, dtype=np.int64), std)
    return exact(ids, bins, rate) + np.repeat(noise, 2)[:bins]


@caught_by("residuals", BROKEN_COVERAGE)
def double_counted(ids, bins, std, rate):
    return add_discrete_gaussian(2 * exact(ids, bins, rate), std)


@caught_by("residuals", BROKEN_COVERAGE)
def two_bins(ids, bins, std, rate):
    counts = exact(ids, bins, rate)
    return add_discrete_gaussian(counts + np.roll(counts, 1), std)


@caught_by("residuals", BROKEN_COVERAGE)
def sparse_only(ids, bins, std, rate):
    counts = exact(ids, bins, rate)
    return np.where(counts > 0, add_discrete_gaussian(counts, std), 0)


@caught_by("sampling", BROKEN_COVERAGE)
def fixed_size(ids, bins, std, rate):
    kept = np.random.default_rng().choice(ids, int(rate * len(ids)), replace=False)
    return add_discrete_gaussian(np.bincount(kept, minlength=bins).astype(np.int64), std)


@caught_by("sampling", BROKEN_COVERAGE)
def no_sampling(ids, bins, std, rate):
    return built(ids, bins, std, 1.0)


@caught_by("sampling", BROKEN_COVERAGE)
def same_mask(ids, bins, std, rate):
    kept = ids[reused_mask(len(ids), rate)]
    return add_discrete_gaussian(np.bincount(kept, minlength=bins).astype(np.int64), std)


@functools.cache
def reused_mask(num_samples, rate):
    return poisson_mask(num_samples, rate)


@caught_by("integers", BROKEN_COVERAGE)
def float_counts(ids, bins, std, rate):
    return exact(ids, bins, rate) + np.random.default_rng().normal(0, std, bins)


@caught_by("residuals", BROKEN_COVERAGE)
def clipped(ids, bins, std, rate):
    return np.maximum(built(ids, bins, std, rate), 0)


def broken_coverage(mutant, noise_std):
    def release(ids, num_bins, rate):
        return mutant(ids, num_bins, noise_std, rate)[:, None], coverage_release(noise_std, rate)

    return replace(coverage(noise_std), release=release)


@pytest.mark.parametrize("noise_std", [1.7, 5.0])
@pytest.mark.parametrize(("mutant", "check"), BROKEN_COVERAGE)
def test_broken_coverage_is_caught(mutant, check, noise_std):
    with pytest.raises(AuditFailure):
        CHECKS[check](broken_coverage(mutant, noise_std))


@pytest.mark.parametrize("mutant", [none, halved_variance, double_counted])
def test_leaking_coverage_exceeds_its_claim(mutant):
    """Canaries alone, at noise 1.7: A - 1/2 is 0.117 as built, 0.166 with noise 1.2."""
    line = totals_line(broken_coverage(mutant, 1.7), 1.7, 1.0, 20_000)
    result = audit(replace(line, checks=[]), 1e-5, 0.01)
    assert list(result.failed) == ["canaries"]
    assert result.bound_declared > result.claimed


def normalised(points, centers):
    """Normalisation fitted on the client's samples: every sample moves every other's bin."""
    return coverage_counts((points - points.mean()) / (points.std() + 1), centers)


def twice(points, centers):
    return 2 * coverage_counts(points, centers)


def two_entries(points, centers):
    counts = coverage_counts(points, centers)
    return counts + counts.roll(1)


def shares(points, centers):
    return coverage_counts(points, centers) / max(1, len(points))


@pytest.mark.parametrize("counts", [normalised, twice, two_entries, shares])
def test_broken_counts_are_caught_exactly(counts):
    def totals(ids, num_bins):
        places = torch.arange(num_bins, dtype=torch.float64)[:, None]
        return counts(torch.from_numpy(ids).double()[:, None], places).numpy()[:, None]

    def neighbours(rng):
        for size in (2, 10, 300) * 4:
            centers, points = ties(rng, size)
            yield triple(lambda part, centers=centers: counts(part, centers).numpy(), points)

    with pytest.raises(AuditFailure, match="other integers"):
        checks.check_neighbours(replace(coverage(5.0), totals=totals))
    with pytest.raises(AuditFailure, match="a sample"):
        checks.check_neighbours(replace(coverage(5.0), neighbours=neighbours))


def test_hostile_samples_lie_on_ties():
    centers, points = ties(np.random.default_rng(), 2000)
    smallest = torch.cdist(points, centers).topk(2, largest=False).values
    assert ((smallest[:, 1] - smallest[:, 0]) < 1e-9).double().mean() > 0.2
    assert len(np.unique(nearest_centroids(points, centers))) > 5


def test_broken_class_table_is_caught():
    """Every sample counted under its class and once more under another."""

    def release(rows, num_rows, rate):
        noisy, declared = class_table(5.0).release(rows, num_rows, rate)
        return noisy + np.bincount((rows + 1) % num_rows, minlength=num_rows)[:, None], declared

    with pytest.raises(AuditFailure, match="mean"):
        checks.check_residuals(replace(class_table(5.0), release=release))


# Persons with several samples each.


def person_sample_masks(rows, num_rows, rate):
    """Each sample drawn by itself, although the person is the unit."""
    kept = rows.repeat(4)[poisson_mask(4 * len(rows), rate)]
    return add_discrete_gaussian(np.bincount(kept, minlength=num_rows).astype(np.int64), 20.0)


def person_sample_noise(rows, num_rows, rate):
    """Noise for one sample, although a person has four."""
    mask = PrivacyUnits(np.arange(len(rows)).repeat(4), 4).mask(4 * len(rows), rate)
    counts = np.bincount(rows.repeat(4)[mask], minlength=num_rows).astype(np.int64)
    return add_discrete_gaussian(counts, 5.0)


@pytest.mark.parametrize(
    ("mutant", "check"), [(person_sample_masks, "sampling"), (person_sample_noise, "residuals")]
)
def test_broken_persons_are_caught(mutant, check):
    def release(rows, num_rows, rate):
        return mutant(rows, num_rows, rate)[:, None], coverage_release(5.0, rate, 4)

    with pytest.raises(AuditFailure, match="variance"):
        CHECKS[check](replace(coverage(5.0, 4), release=release))


# Class prototypes. A mutant takes (clipped steps [n, d], unclipped ones, classes, K, noise_std).


def total(steps, classes, num_classes):
    return class_totals(steps, classes, num_classes, round(0.5 / GRID))


@caught_by("residuals", BROKEN_PROTOTYPES)
def not_clipped(steps, unclipped, classes, num_classes, std):
    return add_discrete_gaussian(total(unclipped, classes, num_classes), std)


@caught_by("residuals", BROKEN_PROTOTYPES)
def exact_counts(steps, unclipped, classes, num_classes, std):
    totals = total(steps, classes, num_classes)
    noisy = add_discrete_gaussian(totals, std)
    noisy[:, -1] = totals[:, -1]
    return noisy


@caught_by("residuals", BROKEN_PROTOTYPES)
def first_class_only(steps, unclipped, classes, num_classes, std):
    totals = total(steps, classes, num_classes)
    totals[0] = add_discrete_gaussian(totals[0], std)
    return totals


@caught_by("integers", BROKEN_PROTOTYPES)
def float_sums(steps, unclipped, classes, num_classes, std):
    totals = total(steps, classes, num_classes)
    return totals + np.random.default_rng().normal(0, std, totals.shape)


@caught_by("residuals", BROKEN_PROTOTYPES)
def one_noise_per_class(steps, unclipped, classes, num_classes, std):
    noise = add_discrete_gaussian(np.zeros((num_classes, 1), dtype=np.int64), std)
    return total(steps, classes, num_classes) + noise


@caught_by("fresh", BROKEN_PROTOTYPES)
def global_seed(steps, unclipped, classes, num_classes, std):
    totals = total(steps, classes, num_classes)
    return totals + (torch.randn(totals.shape).numpy() * std).round().astype(np.int64)


@pytest.mark.parametrize(("mutant", "check"), BROKEN_PROTOTYPES)
def test_broken_prototypes_are_caught(mutant, check):
    def release(rows, num_rows, rate):
        steps = np.repeat([[0, -1]], len(rows), axis=0) * 2**16
        declared = prototype_release(0.5, 5.0, rate)
        return mutant(steps, 1000 * steps, rows, num_rows, declared.noise_std), declared

    with pytest.raises(AuditFailure):
        CHECKS[check](replace(prototypes(5.0), release=release))


def unclipped(table, labels):
    return total(torch.trunc(table.clamp(-1e9, 1e9) / 2 / GRID).long().numpy(), labels.numpy(), 5)


def rounded_after_adding(table, labels):
    """Clipped, but put on the grid only after the sum: off by up to a step per integer."""
    unit = table / table.norm(dim=1, keepdim=True).clamp(min=2.0)
    sums = torch.stack([unit[labels == label].sum(0) for label in range(5)])
    counts = torch.bincount(labels, minlength=5) * round(0.5 / GRID)
    return torch.cat([(sums / GRID).round().long(), counts[:, None]], 1).numpy()


def normalised_features(table, labels):
    """The mean over the client's samples is taken off first: every sample moves every class."""
    return total(_sample_steps(table - table.mean(0), 2.0), labels.numpy(), 5)


@pytest.mark.parametrize("exact", [unclipped, rounded_after_adding, normalised_features])
def test_broken_prototype_sums_are_caught_exactly(exact):
    def neighbours(rng):
        for table, labels in any_length(rng, 2.0):
            yield triple(exact, table, labels)

    with pytest.raises(AuditFailure, match="a sample"):
        checks.check_neighbours(replace(prototypes(5.0), neighbours=neighbours))


# Neighbor votes. A mutant is the changed part of `Votes`.

STD = 5.0


def answers_from(votes_of=neighbor_votes, vote_noise=None, screening_noise=None):
    """A `release_votes` of given parts: exact votes, noise on votes, noise on the screening."""

    def release(embeddings, labels, queries, num_classes, plan):
        screening, votes = votes_of(embeddings, labels, queries, num_classes, plan)
        noisy = (vote_noise or enough)(votes, plan.vote_noise_std)
        classes = noisy.argmax(1)
        if plan.threshold is not None:
            largest = (screening_noise or as_counts)(screening.max(1), plan.screening_noise_std)
            classes[largest <= plan.threshold] = -1
        return torch.from_numpy(classes)

    return {"release": release}


def enough(votes, std):
    return add_discrete_gaussian(2**17 * votes, 2**17 * std)


def as_counts(largest, std):
    return add_discrete_gaussian(largest, std)


def masked(draw):
    """Exact votes where `draw` tells how often each sample is drawn: (Q, n, rate) → [2, Q, n]."""

    def votes_of(embeddings, labels, queries, num_classes, plan):
        order = (embeddings[:, 0] - queries).abs().argsort(dim=1, stable=True).numpy()  # [Q, n]
        drawn = np.broadcast_to(
            draw(len(queries), len(labels), plan.sample_rate), (2, *order.shape)
        )
        drawn = np.take_along_axis(drawn, np.broadcast_to(order, drawn.shape), 2).astype(np.int64)
        before = drawn.cumsum(2) - drawn
        voters = np.clip(plan.num_neighbors - before, 0, drawn)  # [2, Q, n]
        classes = labels.numpy()[order]
        votes = [(voters * (classes == label)).sum(2) for label in range(num_classes)]
        return tuple(np.stack(votes, axis=2))

    return votes_of


def poisson(num_queries, num_samples, rate):
    return poisson_mask(2 * num_queries * num_samples, rate).reshape(2, num_queries, num_samples)


def one_mask_for_both(num_queries, num_samples, rate):
    return poisson(num_queries, num_samples, rate)[:1]


def one_mask_for_all(num_queries, num_samples, rate):
    return poisson(1, num_samples, rate)


def with_replacement(num_queries, num_samples, rate):
    """As the reference code of Private-kNN samples, which accounts for Poisson sampling."""
    shares = np.full(num_samples, 1 / num_samples)
    size = int(rate * num_samples)
    return np.random.default_rng().multinomial(size, shares, size=(2, num_queries))


def everybody(num_queries, num_samples, rate):
    return np.ones((2, num_queries, num_samples))


def charged_as_one(plan):
    screening, votes = plan.releases()
    return [screening, replace(votes, sensitivity=votes.noise_std / plan.vote_noise_std)]


def less_noise(votes, std):
    return enough(votes, std / math.sqrt(2))


def no_noise(votes, std):
    return votes


def first_class_noise(votes, std):
    noisy = 2**17 * votes
    noisy[:, 0] = add_discrete_gaussian(noisy[:, 0], 2**17 * std)
    return noisy


def seeded_noise(votes, std):
    return votes + torch.randn(votes.shape, generator=torch.Generator().manual_seed(0)).numpy()


def float_votes(embeddings, labels, queries, num_classes, plan):
    _, votes = neighbor_votes(embeddings, labels, queries, num_classes, plan)
    return torch.from_numpy(enough(votes, plan.vote_noise_std) / 2**17)


BROKEN_VOTES = {
    "less noise": (answers_from(vote_noise=less_noise), "vote noise"),
    "no noise": (answers_from(vote_noise=no_noise), "vote noise"),
    "noise on the first class": (answers_from(vote_noise=first_class_noise), "vote noise"),
    "no screening noise": (answers_from(screening_noise=no_noise), "vote noise"),
    "seeded noise": (answers_from(vote_noise=seeded_noise), "vote fresh"),
    "charged as sensitivity 1": ({"charges": charged_as_one}, "vote neighbours"),
    "float votes": ({"release": float_votes}, "vote integers"),
    "one mask for both": (answers_from(masked(one_mask_for_both)), "vote sampling"),
    "one mask for all": (answers_from(masked(one_mask_for_all)), "vote sampling"),
    "with replacement": (answers_from(masked(with_replacement)), "vote sampling"),
    "no sampling": (answers_from(masked(everybody)), "vote sampling"),
}


@pytest.mark.parametrize("name", BROKEN_VOTES)
def test_broken_votes_are_caught(name):
    parts, check = BROKEN_VOTES[name]
    with pytest.raises(AuditFailure):
        CHECKS[check](Votes(STD, **parts))


def test_votes_of_these_parts_pass():
    """The mutants' parts are sound where nothing is broken: it is the break that is caught."""
    votes = Votes(STD, **answers_from(masked(poisson)))
    for name, check in CHECKS.items():
        if name.startswith("vote"):
            check(votes)


def test_noise_free_votes_exceed_their_claim():
    line = next(vote_lines(Votes(STD, **answers_from(vote_noise=no_noise)), 1.0, 500))
    assert list(audit(replace(line, checks=[]), 1e-5, 0.01).failed) == ["canaries"]
    assert release_votes is Votes(STD).release


# Other processes; test_audit.py runs the check on the noise as built.


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print(*range(128))", "the noise repeats"),
        ("import os; print(*os.urandom(64), *[1] * 64)", "the Poisson mask repeats"),
        ("raise SystemExit(1)", "could not be run"),
    ],
)
def test_repeated_draws_are_caught(program, message):
    with pytest.raises(AuditFailure, match=message):
        check_processes(("-c", program))
