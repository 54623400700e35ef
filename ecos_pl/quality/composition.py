"""What a set of images is made of: shares of a domain, of classes, of clusters.

Numbers are those of classes, or of clusters, from 0; -1 is none of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Share(Metric):
    """Share of images of which something is true: of the client's domain, it is the purity.

    >>> purity = Share()
    >>> purity.update(torch.tensor([True, True, False, True]))
    >>> float(purity.compute())
    0.75
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    num_true: Tensor
    num_images: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("num_true", "num_images"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, is_true: Tensor) -> None:
        """Count images [B] bool."""
        self.num_true += is_true.sum()
        self.num_images += len(is_true)

    def compute(self) -> Tensor:
        """NaN without images."""
        return self.num_true / self.num_images


class ClassCoverage(Metric):
    """Share of the classes of which there are at least so many images.

    Args:
        num_classes: K.
        min_images: From how many images on a class is covered.
        kwargs: Of `torchmetrics.Metric`.

    >>> coverage = ClassCoverage(4)
    >>> coverage.update(torch.tensor([0, 0, 2, -1]))
    >>> float(coverage.compute())
    0.5
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    counts: Tensor

    def __init__(self, num_classes: int, min_images: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1 or min_images < 1:
            raise ValueError("num_classes and min_images must be at least 1")
        self.min_images = min_images
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, numbers: Tensor) -> None:
        """Count class numbers [B] int64."""
        self.counts += _counts(numbers, len(self.counts))

    def compute(self) -> Tensor:
        """Between 0 and 1."""
        return (self.counts >= self.min_images).float().mean()


class NormalizedEntropy(Metric):
    """Entropy of the class frequencies over that of even ones: 1 is even, 0 a single class.

    ``-Σ p_k log p_k / log K``, images of none of the classes left out; known as Pielou's evenness
    (Pielou, "The measurement of diversity in different types of biological collections", 1966).
    With one class it is 1: that is as even as one class can be.

    Args:
        num_classes: K.
        kwargs: Of `torchmetrics.Metric`.

    >>> entropy = NormalizedEntropy(4)
    >>> entropy.update(torch.tensor([0, 1, 1, 0, -1]))
    >>> float(entropy.compute())
    0.5
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    counts: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError("num_classes must be at least 1")
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, numbers: Tensor) -> None:
        """Count class numbers [B] int64."""
        self.counts += _counts(numbers, len(self.counts))

    def compute(self) -> Tensor:
        """NaN without images."""
        frequencies = self.counts / self.counts.sum()
        if len(frequencies) == 1:
            return frequencies[0]
        entropy: Tensor = torch.special.entr(frequencies).sum()
        return entropy / math.log(len(frequencies))


def _counts(numbers: Tensor, num_classes: int) -> Tensor:
    return torch.bincount(numbers[numbers >= 0], minlength=num_classes)
