"""Labels laid over a proxy set after the probe: its selection stays, the client is not asked."""

from __future__ import annotations

from typing import Protocol

import torch

from ecos_pl.annotation_order import annotation_order
from ecos_pl.probe_result import ProbeResult
from ecos_pl.ranks import Ranks


class Relabeler(Protocol):
    """Gives a probe's result other labels, whenever it is made or read from disk."""

    def apply(self, result: ProbeResult, ranks: Ranks) -> ProbeResult:
        """The result with its labels replaced (`ProbeResult.relabelled`), the same on every rank.

        Args:
            result: As the probe left it.
            ranks: The processes of the run; all of them call this.
        """
        ...


class FirstLabels:
    """Keeps the labels that so many annotators' answers would give, and forgets the others.

    The images that keep theirs are the first of `annotation_order`; the others are unlabelled
    training data. So `labels=public` plays annotators who stop after some images.

    Args:
        num_images: Images whose label is known.
        seed: Of the order.
    """

    def __init__(self, num_images: int, *, seed: int) -> None:
        self.num_images, self.seed = num_images, seed

    def apply(self, result: ProbeResult, ranks: Ranks) -> ProbeResult:
        """See `Relabeler`.

        Raises:
            ValueError: None of these images has a label.
        """
        proxy_set = result.proxy_set
        rows = annotation_order(proxy_set.clusters, num_images=self.num_images, seed=self.seed)
        asked = torch.zeros(len(proxy_set), dtype=torch.bool)
        asked[rows] = True
        weights = proxy_set.weights * asked
        if not bool(weights.any()):
            raise ValueError(
                f"labels.num_images={self.num_images}: none of these images is of one of the "
                "client's classes"
            )
        return result.relabelled(
            proxy_set.targets * asked[:, None],
            weights,
            proxy_set.label_source,
            unlabelled=~asked,
            facts={"num_asked": len(rows)},
        )
