"""FixMatch's strong view: two random operations of random strength, then a grey square.

Operations and ranges are those of Sohn et al. 2020, appendix (the table of RandAugment's
transformations). How they are drawn is as in the authors' code (google-research/fixmatch,
``AugmentPoolRAMC``): two of the fourteen, with replacement; each applied with probability one half,
at a strength drawn anew each time; and always Cutout of half the side. Two differences: strengths
are uniform on the whole range (the code's: nine steps of it), and what a shift, turn or Cutout
uncovers is mid-grey (black there; grey in the code's Cutout of images).

USB and TorchSSL use three operations, each for certain, and a square of random size; torchvision's
RandAugment has one fixed strength and no Cutout; timm's adds inversion, and brightens as well as
darkens. None of the operations mirrors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

NUM_OPERATIONS = 2
CHANCE = 0.5
GREY = 127
Operation = Callable[[Image.Image, float], Image.Image]


def strong_view(image: Tensor) -> Tensor:
    """A strongly changed copy of an image [3, S, S] uint8, drawn from the global generator."""
    changed = F.to_pil_image(image)
    names = list(OPERATIONS)
    for number in torch.randint(len(names), (NUM_OPERATIONS,)).tolist():
        chance, place = torch.rand(2).tolist()
        if chance < CHANCE:
            operation, low, high = OPERATIONS[names[number]]
            changed = operation(changed, low + (high - low) * place)
    return cutout(F.pil_to_tensor(changed), image.shape[-1] // 2)


def cutout(image: Tensor, side: int) -> Tensor:
    """A copy with a grey square around a random pixel, cut off at the border.

    As in DeVries & Taylor 2017.
    """
    height, width = image.shape[-2:]
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    top, left = y - side // 2, x - side // 2
    image = image.clone()
    image[:, max(0, top) : top + side, max(0, left) : left + side] = GREY
    return image


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    grey = (GREY,) * 3
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=grey)


OPERATIONS: dict[str, tuple[Operation, float, float]] = {
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), 0, 0),
    "brightness": (lambda image, v: ImageEnhance.Brightness(image).enhance(v), 0.05, 0.95),
    "color": (lambda image, v: ImageEnhance.Color(image).enhance(v), 0.05, 0.95),
    "contrast": (lambda image, v: ImageEnhance.Contrast(image).enhance(v), 0.05, 0.95),
    "equalize": (lambda image, _: ImageOps.equalize(image), 0, 0),
    "identity": (lambda image, _: image, 0, 0),
    "posterize": (lambda image, v: ImageOps.posterize(image, int(v)), 4, 9),  # 4 … 8 bits
    "rotate": (lambda image, v: image.rotate(v, fillcolor=(GREY,) * 3), -30, 30),
    "sharpness": (lambda image, v: ImageEnhance.Sharpness(image).enhance(v), 0.05, 0.95),
    "shear_x": (lambda image, v: _affine(image, 1, v, 0, 0, 1, 0), -0.3, 0.3),
    "shear_y": (lambda image, v: _affine(image, 1, 0, 0, v, 1, 0), -0.3, 0.3),
    "solarize": (lambda image, v: ImageOps.solarize(image, int(256 * v)), 0, 1),
    "translate_x": (lambda image, v: _affine(image, 1, 0, v * image.width, 0, 1, 0), -0.3, 0.3),
    "translate_y": (lambda image, v: _affine(image, 1, 0, 0, 0, 1, v * image.height), -0.3, 0.3),
}
"""Name → the operation and the range of its strength."""
