"""Who labels the proxy set: the client under privacy, or the pool's own annotations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.class_posteriors import class_posteriors
from ecos_pl.clustering import Projection, fit_pca
from ecos_pl.encoder import EncoderSpec, public_name
from ecos_pl.images import ImageSource
from ecos_pl.invariance import fit_invariant_projection
from ecos_pl.messages import MessageError, PrototypeAnswer, PrototypeQuery, query_id_of
from ecos_pl.privacy import Release, calibrate_noise_multiplier, epsilon_of
from ecos_pl.prototypes import GRID, NoisyPrototypes, sensitivity_in_steps

_CLIP_SHARE = 0.8  # of the proxy set's median norm: most images then weigh the same in a sum


@dataclass(frozen=True)
class Labels:
    """Labels of the chosen images, in their order.

    Attributes:
        classes: Names of the K classes.
        targets: [n, K] float32 class probabilities, zero rows where there is no label.
        weights: [n] float32, 0 where there is no label.
        releases: What the client released for them.
    """

    classes: Sequence[str]
    targets: Tensor
    weights: Tensor
    releases: Sequence[Release] = field(default_factory=list)


class Labeler(Protocol):
    """Labels chosen images; everything it asks of the client is planned beforehand."""

    name: str

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

    def label(
        self,
        *,
        pool: ImageSource,
        indices: npt.NDArray[np.int64],
        embeddings: Callable[[], Iterable[npt.NDArray[np.float32]]],
        views: Callable[[int], Iterable[npt.NDArray[np.float32]]],
        encoder: EncoderSpec,
        encoder_fingerprint: str,
        ask: Callable[[bytes], bytes],
        planned: Sequence[Release],
        attempt: int,
    ) -> Labels:
        """Label the chosen images.

        Args:
            pool: The public images.
            indices: [n], places of the chosen ones.
            embeddings: Gives their embeddings in chunks [B, D], as often as it is called.
            views: Gives embeddings of each image and that many random views of it, in chunks
                [B, 1 + V, D] in the order of ``indices``; of a sample only, if there are many.
            encoder: The public encoder.
            encoder_fingerprint: Its fingerprint.
            ask: Sends a query to the client and returns its answer.
            planned: All planned releases of the probe, this labeler's last.
            attempt: Goes into every query.
        """
        ...


class PublicLabeler:
    """The pool's own annotations: what a human labeler would say.

    An image of a class that the client does not have gets no label and weight 0.
    """

    name = "public"

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

    def label(self, *, pool: ImageSource, indices: npt.NDArray[np.int64], **unused: Any) -> Labels:
        """See `Labeler`.

        Raises:
            ValueError: The pool annotates none of the chosen images with a class of the client's.
        """
        number = {name: k for k, name in enumerate(self.classes)}
        found = [number.get(pool.labels[index] or "", -1) for index in indices.tolist()]
        known = torch.tensor(found) >= 0
        if not bool(known.any()):
            raise ValueError(
                f"labels=public: the pool {pool.name} annotates none of the chosen images with one "
                f"of the client's classes ({', '.join(self.classes[:10])})"
            )
        targets = torch.nn.functional.one_hot(torch.tensor(found).clamp_min(0), len(self.classes))
        return Labels(self.classes, targets.float() * known[:, None], known.float())


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
    ) -> None:
        self.classes, self.num_dims, self.num_views = list(classes), num_dims, num_views
        self.noise_multiplier, self.count_weight = noise_multiplier, count_weight

    def facts(self) -> dict[str, Any]:
        """See `Labeler`."""
        return {
            "classes": self.classes,
            "num_dims": self.num_dims,
            "num_views": self.num_views,
            "noise_multiplier": self.noise_multiplier,
            "count_weight": self.count_weight,
            "inference": 1,  # raise when class_posteriors changes
        }

    def plan(
        self, spent: Sequence[Release], *, max_epsilon: float, delta: float, sample_rate: float
    ) -> list[Release]:
        """One release; its noise is calibrated to what the others leave of ``max_epsilon``."""
        sensitivity = sensitivity_in_steps(round(self.count_weight / GRID))
        multiplier = self.noise_multiplier
        if multiplier is None:
            multiplier = calibrate_noise_multiplier(
                max_epsilon, delta, sample_rate=sample_rate, spent=spent
            )
        release = Release("prototypes", multiplier * sensitivity, sensitivity, sample_rate)
        total = epsilon_of([*spent, release], delta)
        if total > max_epsilon:
            raise ValueError(
                f"labels.noise_multiplier={multiplier:g} brings the run to ε = {total:.3f}, over "
                f"privacy.max_epsilon={max_epsilon:g}; leave it out to have it calibrated"
            )
        return [release]

    def label(
        self,
        *,
        pool: ImageSource,
        indices: npt.NDArray[np.int64],
        embeddings: Callable[[], Iterable[npt.NDArray[np.float32]]],
        views: Callable[[int], Iterable[npt.NDArray[np.float32]]],
        encoder: EncoderSpec,
        encoder_fingerprint: str,
        ask: Callable[[bytes], bytes],
        planned: Sequence[Release],
        attempt: int,
    ) -> Labels:
        """See `Labeler`.

        Raises:
            MessageError: The client's answer does not fit the question or the plan.
        """
        seen = list(views(self.num_views)) if self.num_views else []
        if seen:
            projection = fit_invariant_projection(embeddings, seen, self.num_dims)
        else:
            projection = fit_pca(embeddings(), self.num_dims).whitened()
        projection = projection.rounded()
        features = torch.cat([projection(torch.from_numpy(rows)) for rows in embeddings()])
        query = PrototypeQuery(
            encoder=public_name(encoder),
            encoder_fingerprint=encoder_fingerprint,
            mean=projection.mean.half(),
            components=projection.components.half(),
            classes=self.classes,
            clip_norm=max(_CLIP_SHARE * float(features.norm(dim=1).median()), GRID),
            count_weight=self.count_weight,
            noise_multiplier=planned[-1].noise_multiplier,
            attempt=attempt,
        )
        content = query.to_bytes()
        noisy, release = self._checked(query, content, ask(content), planned[-1])
        targets = class_posteriors(
            features,
            noisy.class_sums().float(),
            noisy.class_counts().float(),
            sum_noise_std=noisy.sum_noise_std,
            count_noise_std=noisy.count_noise_std,
            views=_views_of_all(seen, projection, len(features)),
        )
        return Labels(self.classes, targets, torch.ones(len(targets)), [release])

    def _checked(
        self, query: PrototypeQuery, content: bytes, answer_bytes: bytes, plan: Release
    ) -> tuple[NoisyPrototypes, Release]:
        answer = PrototypeAnswer.from_bytes(answer_bytes)
        if answer.query_id != query_id_of(content):
            raise MessageError("the client answered another question than the one asked")
        num_classes, num_dims = len(query.classes), len(query.components)
        shapes = (answer.sums.shape, answer.counts.shape)
        integers = answer.sums.dtype == answer.counts.dtype == torch.int64
        if shapes != ((num_classes, num_dims), (num_classes,)) or not integers:
            raise MessageError(f"the client must answer {num_classes} × {num_dims} whole numbers")
        if (answer.grid, answer.clip_norm) != (GRID, query.clip_norm):
            raise MessageError("the client's grid or clip_norm is not the one asked for")
        same_noise = math.isclose(answer.noise_std, plan.noise_std, rel_tol=1e-9)
        if not same_noise or answer.sample_rate != plan.sample_rate:
            raise MessageError("the client's noise_std or sample_rate is not the plan's")
        noisy = NoisyPrototypes(
            answer.sums,
            answer.counts,
            answer.grid,
            answer.clip_norm,
            answer.count_weight,
            answer.noise_std,
        )
        sensitivity = sensitivity_in_steps(round(answer.count_weight / GRID))
        return noisy, Release("prototypes", answer.noise_std, sensitivity, answer.sample_rate)


def _views_of_all(
    seen: Sequence[npt.NDArray[np.float32]], projection: Projection, num_images: int
) -> Tensor | None:
    """Features [n, V, d] of the views, if they are there for every image."""
    if sum(map(len, seen)) != num_images:
        return None
    return torch.cat([projection(torch.from_numpy(chunk[:, 1:]).float()) for chunk in seen])
