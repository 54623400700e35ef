"""From the options ``labels=…`` to who labels, and what comes over the labels later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ecos_pl.annotation_job import JobTerms
from ecos_pl.config import (
    ClientKnnOptions,
    ClientPrototypesOptions,
    ClientTableOptions,
    Config,
    HumanLabelsOptions,
    NoLabelsOptions,
    PublicLabelsOptions,
)
from ecos_pl.images import ImageSource
from ecos_pl.labeling import Labeler, NoLabels, PublicLabeler, RoundPlan
from ecos_pl.outsourced_labels import OutsourcedLabels
from ecos_pl.prototype_labeler import PrototypeLabeler
from ecos_pl.relabeling import FirstLabels, Relabeler
from ecos_pl.run_folder import newest_checkpoint
from ecos_pl.table_labeler import TableLabeler
from ecos_pl.vote_labeler import VoteLabeler


def labeler_of(config: Config, classes: Sequence[str], folder: Path) -> Labeler:
    """Who labels in the probe.

    Args:
        config: Of the run.
        classes: The client's, in its order.
        folder: Of the run.
    """
    if isinstance(config.labels, ClientPrototypesOptions):
        return PrototypeLabeler(
            classes,
            num_dims=config.labels.num_dims,
            num_views=config.labels.num_views,
            noise_multiplier=config.labels.noise_multiplier,
            features=config.labels.features,
            rounds=_rounds(config.labels, folder),
        )
    if isinstance(config.labels, ClientTableOptions):
        return TableLabeler(
            classes,
            num_clusters=config.labels.num_clusters,
            num_dims=config.labels.num_dims,
            num_views=config.labels.num_views,
            noise_std=config.labels.noise_std,
            features=config.labels.features,
        )
    if isinstance(config.labels, ClientKnnOptions):
        return VoteLabeler(
            classes,
            num_queries=config.labels.num_queries,
            max_answers=config.labels.max_answers,
            num_neighbors=config.labels.num_neighbors,
            num_dims=config.labels.num_dims,
            num_views=config.labels.num_views,
            features=config.labels.features,
        )
    if isinstance(config.labels, (HumanLabelsOptions, NoLabelsOptions)):
        return NoLabels(classes, name=config.labels.name)
    assert isinstance(config.labels, PublicLabelsOptions)
    return PublicLabeler(classes)


def relabeler_of(config: Config, pool: ImageSource, folder: Path) -> Relabeler | None:
    """What lays labels over the proxy set after the probe; None for nothing.

    Args:
        config: Of the run.
        pool: Whose images people are shown.
        folder: Of the run.
    """
    labels = config.labels
    if isinstance(labels, PublicLabelsOptions) and labels.num_images is not None:
        return FirstLabels(labels.num_images, seed=config.seed)
    if not isinstance(labels, HumanLabelsOptions):
        return None
    return OutsourcedLabels(
        pool,
        folder,
        JobTerms(
            labels.num_images,
            labels.batch_size,
            labels.annotators,
            labels.price_per_label,
            labels.image_size,
        ),
        seed=config.seed,
        returned=Path(labels.returned) if labels.returned else None,
        training_began=newest_checkpoint(folder) is not None,
        is_trial=config.trainer.fast_dev_run,
    )


def _rounds(options: ClientPrototypesOptions, folder: Path) -> RoundPlan | None:
    """Further rounds of labels; the run's name makes them its own."""
    if not options.rounds:
        return None
    return RoundPlan(
        tuple(options.rounds), options.round_num_dims, options.round_features, run=folder.name
    )
