"""What answering each kind of query costs, and how its answer is drawn from the private images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ecos_pl.class_table import class_table_release, release_class_table
from ecos_pl.coverage import coverage_release, release_coverage
from ecos_pl.messages import (
    CoverageAnswer,
    CoverageQuery,
    PrototypeAnswer,
    PrototypeQuery,
    TableAnswer,
    TableQuery,
    VoteAnswer,
    VoteQuery,
)
from ecos_pl.neighbor_votes import VotePlan, release_votes
from ecos_pl.privacy import Release
from ecos_pl.private_images import Features
from ecos_pl.prototypes import prototype_release, release_prototypes

RELATION = "add/remove"


@dataclass(frozen=True)
class PlannedAnswer:
    """An answer that can be given; nothing is charged or drawn yet.

    Attributes:
        what: What is asked, in words.
        releases: What it costs: exactly what ``draw`` then makes.
        draw: Makes the answer, noise included. To be called once, after the charge.
    """

    what: str
    releases: Sequence[Release]
    draw: Callable[[], bytes]


def coverage_answer(query: CoverageQuery, query_id: str, images: Features) -> PlannedAnswer:
    """Noisy numbers of images near each centroid."""
    per_unit = images.units.max_samples
    release = coverage_release(query.noise_std, query.sample_rate, per_unit)

    def draw() -> bytes:
        noisy, made = release_coverage(
            images.points,
            query.centroids.float(),
            noise_std=query.noise_std,
            sample_rate=query.sample_rate,
            units=images.units,
        )
        assert made == release, "what is drawn must be what was charged"
        return CoverageAnswer(
            query_id=query_id,
            sample_rate=query.sample_rate,
            relation=RELATION,
            max_per_unit=per_unit,
            noisy_counts=noisy,
            noise_std=query.noise_std * per_unit,
        ).to_bytes()

    what = f"how many images lie near each of {len(query.centroids)} centroids"
    return PlannedAnswer(f"{what}, noise {query.noise_std * per_unit:g}", [release], draw)


def prototype_answer(query: PrototypeQuery, query_id: str, images: Features) -> PlannedAnswer:
    """Noisy feature sums and counts of the classes."""
    per_unit = images.units.max_samples
    release = prototype_release(
        query.count_weight, query.noise_multiplier, query.sample_rate, per_unit
    )

    def draw() -> bytes:
        noisy, made = release_prototypes(
            images.points,
            images.labels,
            len(query.classes),
            clip_norm=query.clip_norm,
            count_weight=query.count_weight,
            noise_multiplier=query.noise_multiplier,
            sample_rate=query.sample_rate,
            units=images.units,
        )
        assert made == release, "what is drawn must be what was charged"
        return PrototypeAnswer(
            query_id=query_id,
            sample_rate=query.sample_rate,
            relation=RELATION,
            max_per_unit=per_unit,
            sums=noisy.sums,
            counts=noisy.counts,
            grid=noisy.grid,
            clip_norm=noisy.clip_norm,
            count_weight=noisy.count_weight,
            noise_std=noisy.noise_std,
        ).to_bytes()

    size = f"{len(query.classes)} classes, {len(query.components)} numbers each"
    what = f"the means of {size}, noise ratio {query.noise_multiplier:g}"
    return PlannedAnswer(what, [release], draw)


def table_answer(query: TableQuery, query_id: str, images: Features) -> PlannedAnswer:
    """Noisy numbers of images of each class near each centroid."""
    per_unit = images.units.max_samples
    release = class_table_release(query.noise_std, query.sample_rate, per_unit)

    def draw() -> bytes:
        noisy, made = release_class_table(
            images.points,
            images.labels,
            query.centroids.float(),
            len(query.classes),
            noise_std=query.noise_std,
            sample_rate=query.sample_rate,
            units=images.units,
        )
        assert made == release, "what is drawn must be what was charged"
        return TableAnswer(
            query_id=query_id,
            sample_rate=query.sample_rate,
            relation=RELATION,
            max_per_unit=per_unit,
            noisy_counts=noisy,
            noise_std=query.noise_std * per_unit,
        ).to_bytes()

    size = f"{len(query.classes)} classes near {len(query.centroids)} centroids"
    what = f"how many images of {size}, noise {query.noise_std * per_unit:g}"
    return PlannedAnswer(what, [release], draw)


def vote_answer(query: VoteQuery, query_id: str, images: Features) -> PlannedAnswer:
    """The class that most of the images near each point have, after noise."""
    plan = vote_plan(query, images.units.max_samples)

    def draw() -> bytes:
        return VoteAnswer(
            query_id=query_id,
            sample_rate=query.sample_rate,
            relation=RELATION,
            max_per_unit=plan.max_samples,
            labels=release_votes(
                images.points,
                images.labels,
                query.points.float(),
                len(query.classes),
                plan,
                units=images.units,
            ),
        ).to_bytes()

    what = f"votes of {plan.num_neighbors} nearest images at {len(query.points)} points"
    noise = plan.vote_noise_std * plan.max_samples
    return PlannedAnswer(f"{what}, noise {noise:g}", plan.releases(), draw)


def vote_plan(query: VoteQuery, max_per_unit: int = 1) -> VotePlan:
    """The plan that a vote query asks for; a screening noise of zero means no screening."""
    screened = query.screening_noise_std != 0
    return VotePlan(
        num_queries=len(query.points),
        max_answers=query.max_answers,
        num_neighbors=query.num_neighbors,
        sample_rate=query.sample_rate,
        vote_noise_std=query.vote_noise_std,
        screening_noise_std=query.screening_noise_std if screened else None,
        threshold=query.threshold if screened else None,
        max_samples=max_per_unit,
    )
