"""Training images as they are, without augmentation: to calibrate on and to compare on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor, Tensor]


class HasPlainImages(Protocol):
    """A datamodule that hands out its images unaugmented."""

    def plain_images(self, part: str) -> Dataset[Any]:
        """Those of ``train`` or ``held_out``, as ``(image uint8, target, weight)``."""


def plain_batches(
    datamodule: HasPlainImages, number: int, *, seed: int, batch_size: int = 32
) -> Iterator[Batch]:
    """Batches of at most ``number`` training images, drawn at random by the seed."""
    dataset = datamodule.plain_images("train")
    rows = _drawn(len(dataset), seed)[:number]  # type: ignore[arg-type]
    for start in range(0, len(rows), batch_size):
        yield _stacked(dataset, rows[start : start + batch_size])


def calibration_images(
    datamodule: HasPlainImages, number: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Images to calibrate on and others to compare on, each [N, 3, S, S] uint8.

    Compared is on the held-out part; where nothing was held out, on training images that the
    calibration leaves over, or its own if none are left.

    Args:
        datamodule: After ``setup()``.
        number: Images to calibrate on, at most.
        seed: Of the draw.
    """
    train, held_out = datamodule.plain_images("train"), datamodule.plain_images("held_out")
    rows = _drawn(len(train), seed)  # type: ignore[arg-type]
    calibration = _stacked(train, rows[:number])[0]
    num_held_out = len(held_out)  # type: ignore[arg-type]
    if num_held_out:
        return calibration, _stacked(held_out, list(range(num_held_out)))[0]
    others = rows[number : 2 * number] or rows[:number]
    return calibration, _stacked(train, others)[0]


def _drawn(number: int, seed: int) -> list[int]:
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()


def _stacked(dataset: Dataset[Any], rows: list[int]) -> Batch:
    images, targets, weights = zip(*(dataset[row] for row in rows), strict=True)
    return torch.stack(images), torch.stack(targets), torch.stack(weights)
