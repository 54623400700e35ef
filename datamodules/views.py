"""Weak and strong views of one image, drawn anew for every image and epoch.

Applied image by image in the loader's workers: torchvision's transforms draw once per call, so on
a batch every image would get the same view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2

from datamodules.strong_view import strong_view
from ecos_pl.invariance import random_view

Augment = Literal["none", "crop", "crop_flip", "affine", "affine_flip"]
View = Callable[[Tensor], Tensor]


def make_view(augment: Augment, image_size: int, *, strong: bool = False) -> View:
    """A map from [3, S, S] uint8 to a random view of the same shape.

    Weak (FixMatch, Sohn et al. 2020, §2.3): shift by up to an eighth of the side, reflecting at
    the border, for ``crop``; turned, scaled and sheared besides (``random_view``) for ``affine``,
    which makes wrong labels harder to learn by heart; ``…_flip`` mirrors half of them too.
    Strong: the weak view, then ``strong_view.strong_view``.
    """
    steps: list[View] = []
    if augment.startswith("crop"):
        steps.append(v2.RandomCrop(image_size, padding=image_size // 8, padding_mode="reflect"))
    if augment.startswith("affine"):
        steps.append(_affine)
    if augment.endswith("flip"):
        steps.append(v2.RandomHorizontalFlip())
    if strong:
        steps.append(strong_view)
    return v2.Compose(steps) if steps else _unchanged


def _affine(image: Tensor) -> Tensor:
    return random_view(image, torch.default_generator)  # the loader seeds it in every worker


def _unchanged(image: Tensor) -> Tensor:
    return image
