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
from torchvision.transforms.v2 import functional as F

from ecos_pl.invariance import random_view

Augment = Literal["none", "crop", "crop_flip", "affine", "affine_flip"]
View = Callable[[Tensor], Tensor]


def make_view(augment: Augment, image_size: int, *, strong: bool = False) -> View:
    """A map from [3, S, S] uint8 to a random view of the same shape.

    Weak (FixMatch, Sohn et al. 2020, §2.3): shift by up to an eighth of the side, reflecting at
    the border, for ``crop``; turned, scaled and sheared besides (``random_view``) for ``affine``,
    which makes wrong labels harder to learn by heart; ``…_flip`` mirrors half of them too.
    Strong: the weak view, then RandAugment with three operations of *random* magnitude (timm's;
    torchvision's has one fixed magnitude) and a grey square of up to half the side (Cutout), as
    in the paper's appendix.
    """
    steps: list[View] = []
    if augment.startswith("crop"):
        steps.append(v2.RandomCrop(image_size, padding=image_size // 8, padding_mode="reflect"))
    if augment.startswith("affine"):
        steps.append(_affine)
    if augment.endswith("flip"):
        steps.append(v2.RandomHorizontalFlip())
    if strong:
        steps += [_RandAugment(), _Cutout(image_size // 2)]
    return v2.Compose(steps) if steps else _unchanged


def _affine(image: Tensor) -> Tensor:
    return random_view(image, torch.default_generator)  # the loader seeds it in every worker


def _unchanged(image: Tensor) -> Tensor:
    return image


class _RandAugment:
    """timm's RandAugment; magnitudes uniform in [0, 10] (``mstd101``), none that mirrors."""

    def __init__(self) -> None:
        from timm.data.auto_augment import rand_augment_transform

        self._transform = rand_augment_transform(
            "rand-m10-n3-mstd101-inc1", {"translate_const": 10, "img_mean": (127, 127, 127)}
        )

    def __call__(self, image: Tensor) -> Tensor:
        return F.pil_to_tensor(self._transform(F.to_pil_image(image)))


class _Cutout:
    def __init__(self, longest: int) -> None:
        self._longest = longest

    def __call__(self, image: Tensor) -> Tensor:
        side = int(torch.randint(0, self._longest + 1, ()))
        _, height, width = image.shape
        y, x = int(torch.randint(0, height, ())), int(torch.randint(0, width, ()))
        image = image.clone()
        top, left = max(0, y - side // 2), max(0, x - side // 2)
        image[:, top : y + (side + 1) // 2, left : x + (side + 1) // 2] = 127
        return image
