"""Who labels the proxy set: what every labeler is given and gives; the pool's labels, and none.

The labelers that ask the client are in `prototype_labeler.py`, `table_labeler.py` and
`vote_labeler.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.encoder import EncoderSpec
from ecos_pl.images import ImageSource
from ecos_pl.privacy import Release


@dataclass(frozen=True)
class Labels:
    """Labels of the chosen images, in their order.

    Attributes:
        classes: Names of the K classes.
        targets: [n, K] float32 class probabilities, zero rows where there is no label.
        weights: [n] float32, 0 where there is no label.
        releases: What the client released for them.
        max_per_unit: Samples of one unit of privacy, as the client declared it (`messages.Answer`).
    """

    classes: Sequence[str]
    targets: Tensor
    weights: Tensor
    releases: Sequence[Release] = field(default_factory=list)
    max_per_unit: int = 1


@dataclass(frozen=True)
class LabelingTask:
    """What a labeler is given.

    Attributes:
        pool: The public images.
        indices: [n], places of the chosen ones.
        embeddings: Gives their embeddings in chunks [B, D], as often as it is called, in the
            labeler's features.
        views: Gives embeddings of each image and that many random views of it, in chunks
            [B, 1 + V, D] in the order of ``indices``; of a sample only, if there are many.
        encoder: The public encoder, with the labeler's features.
        encoder_fingerprint: Its fingerprint.
        ask: Sends a query to the client and returns its answer.
        planned: The releases that this labeler planned, in the order of the rounds.
        number: Which round of labels this is: 0 for the first.
        seed: Of whatever the labeler draws.
        attempt: Goes into every query.
    """

    pool: ImageSource
    indices: npt.NDArray[np.int64]
    embeddings: Callable[[], Iterable[npt.NDArray[np.float32]]]
    views: Callable[[int], Iterable[npt.NDArray[np.float32]]]
    encoder: EncoderSpec
    encoder_fingerprint: str
    ask: Callable[[bytes], bytes]
    planned: Sequence[Release]
    seed: int
    attempt: int
    number: int = 0


@dataclass(frozen=True)
class RoundPlan:
    """Further rounds of labels, fixed before the first question.

    Attributes:
        epochs: Before which epochs of the training the client is asked again.
        num_dims: Dimensions of the adapted space in which it is asked; None for as many as before.
        features: Of the adapted backbone (`encoder.FEATURES`).
        run: Name of the run whose training adapts the backbone: another one asks about another
            space, and is another probe.
    """

    epochs: tuple[int, ...]
    num_dims: int | None = None
    features: str = "grid"
    run: str = ""


class Labeler(Protocol):
    """Labels chosen images; everything it asks of the client is planned beforehand.

    Attributes:
        name: As in ``labels=NAME``.
        features: The encoder's features that it works in (`encoder.FEATURES`).
        rounds: Further rounds in the space of an adapted backbone; None for none.
    """

    name: str
    features: str
    rounds: RoundPlan | None

    def facts(self) -> dict[str, Any]:
        """What determines the labels, beyond the images: part of the probe's fingerprint."""
        ...

    def plan(
        self, spent: Sequence[Release], *, max_epsilon: float, delta: float, sample_rate: float
    ) -> list[Release]:
        """The releases that ``label`` will ask for, beside those already planned.

        Raises:
            ValueError: They do not fit into ``max_epsilon``.
        """
        ...

    def label(self, task: LabelingTask) -> Labels:
        """Label the chosen images."""
        ...


class PublicLabeler:
    """The pool's own annotations: what a human labeler would say.

    An image of a class that the client does not have gets no label and weight 0.
    """

    name = "public"
    features = "final"
    rounds: RoundPlan | None = None

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)

    def facts(self) -> dict[str, Any]:
        """See `Labeler`."""
        return {"classes": self.classes}

    def plan(
        self, spent: Sequence[Release], *, max_epsilon: float, delta: float, sample_rate: float
    ) -> list[Release]:
        """The client releases nothing."""
        return []

    def label(self, task: LabelingTask) -> Labels:
        """See `Labeler`.

        Raises:
            ValueError: The pool annotates none of the chosen images with a class of the client's.
        """
        pool = task.pool
        number = {name: k for k, name in enumerate(self.classes)}
        found = [number.get(pool.labels[index] or "", -1) for index in task.indices.tolist()]
        known = torch.tensor(found) >= 0
        if not bool(known.any()):
            raise ValueError(
                f"labels=public: the pool {pool.name} annotates none of the chosen images with one "
                f"of the client's classes ({', '.join(self.classes[:10])})"
            )
        targets = torch.nn.functional.one_hot(torch.tensor(found).clamp_min(0), len(self.classes))
        return Labels(self.classes, targets.float() * known[:, None], known.float())


class NoLabels:
    """Nobody labels while the probe runs. The coverage counts alone spend ε.

    For a student who follows a teacher; or for people, whose labels come later
    (`outsourced_labels.py`) and change nothing of what was asked and chosen.

    Args:
        classes: Names of the client's classes.
        name: As in ``labels=NAME``.
    """

    features = "final"
    rounds: RoundPlan | None = None

    def __init__(self, classes: Sequence[str], *, name: str = "none") -> None:
        self.classes, self.name = list(classes), name

    def facts(self) -> dict[str, Any]:
        """See `Labeler`."""
        return {"classes": self.classes}

    def plan(
        self, spent: Sequence[Release], *, max_epsilon: float, delta: float, sample_rate: float
    ) -> list[Release]:
        """The client releases nothing."""
        return []

    def label(self, task: LabelingTask) -> Labels:
        """See `Labeler`."""
        num_images = len(task.indices)
        targets = torch.zeros(num_images, len(self.classes))
        return Labels(self.classes, targets, torch.zeros(num_images))
