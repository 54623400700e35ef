"""How far near-duplicates and distinct images are apart: what DUPLICATE_DISTANCE rests on.

    python benchmarks/duplicate_distance.py          # two minutes

Distinct: each image of the pool of mixed_digits and its nearest other one, share within the
distance. Near-duplicates: images changed a little and embedded again, share within the distance;
300 of each domain, and pieces of 213 px of scikit-learn's two photos. Encoder: the default, 48 px.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datamodules.mixed_digits import mixed_digits
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import to_tensor

DISTANCES = (0.05, 0.08, 0.1, 0.12, 0.13, 0.15, 0.2)
PER_DOMAIN, PHOTO_SIDE = 300, 213

Change = Callable[[Image.Image], Image.Image]


def main() -> None:
    """Print the tables."""
    pool, spec = mixed_digits().pool, EncoderSpec()
    encoder = Encoder(spec)

    def embed(images: Sequence[Image.Image]) -> Tensor:
        tensors = [to_tensor(image, spec.image_size) for image in images]
        parts = [encoder(torch.stack(tensors[i : i + 256])) for i in range(0, len(tensors), 256)]
        return torch.cat(parts).half().float()

    images = [pool.read(index) for index in range(len(pool))]
    table = embed(images)
    nearest = nearest_others(table)
    domains = np.array(pool.domains)
    names = list(dict.fromkeys(pool.domains))
    print("share of distinct images with another one within the distance\n")
    print_header("domain")
    for name in names:
        print_row(str(name), nearest[torch.from_numpy(domains == name)])

    rng = np.random.default_rng(0)
    groups = {
        str(name): rng.choice(np.flatnonzero(domains == name), PER_DOMAIN, replace=False).tolist()
        for name in names
    }
    for name, rows in groups.items():
        show_changes(name, [images[row] for row in rows], table[rows], embed)
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    pieces = [
        photo.crop((left, top, left + PHOTO_SIDE, top + PHOTO_SIDE))
        for photo in photos
        for top in range(0, photo.size[1] - PHOTO_SIDE + 1, PHOTO_SIDE)
        for left in range(0, photo.size[0] - PHOTO_SIDE + 1, PHOTO_SIDE)
    ]
    show_changes("photo", pieces, embed(pieces), embed)


def nearest_others(table: Tensor) -> Tensor:
    """Distance [N] of each row to its nearest other one."""
    squares, found = table.square().sum(dim=1), []
    for first in range(0, len(table), 1000):
        part = table[first : first + 1000]
        distances = part.square().sum(dim=1, keepdim=True) + squares - 2 * part @ table.T
        own = torch.arange(len(part))
        distances[own, first + own] = torch.inf
        found.append(distances.min(dim=1).values.clamp_min(0).sqrt())
    return torch.cat(found)


def show_changes(
    name: str,
    images: Sequence[Image.Image],
    table: Tensor,
    embed: Callable[[Sequence[Image.Image]], Tensor],
) -> None:
    """Print how many changed images stay within each distance of the original."""
    print(f"\nshare of changed images within the distance: {name}\n")
    print_header("change")
    for change, apply in CHANGES.items():
        print_row(change, (embed([apply(image) for image in images]) - table).norm(dim=1))


def print_header(first: str) -> None:
    """Of a Markdown table."""
    print(f"| {first} | " + " | ".join(f"{distance:g}" for distance in DISTANCES) + " |")
    print("| --- " * (len(DISTANCES) + 1) + "|")


def print_row(name: str, distances: Tensor) -> None:
    """Shares within each distance."""
    shares = [float((distances <= distance).double().mean()) for distance in DISTANCES]
    print(f"| {name} | " + " | ".join(f"{share:.4f}" for share in shares) + " |", flush=True)


def saved(image: Image.Image, kind: str, quality: int) -> Image.Image:
    """Compressed and decoded again."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return Image.open(buffer).convert("RGB")


def resized(image: Image.Image, factor: float) -> Image.Image:
    """Made larger or smaller, and brought back."""
    width, height = image.size
    other = image.resize((max(1, round(width * factor)), max(1, round(height * factor))))
    return other.resize((width, height))


def moved(image: Image.Image) -> Image.Image:
    """One pixel to the right, the first column twice."""
    pixels = np.pad(np.array(image), ((0, 0), (1, 0), (0, 0)), mode="edge")
    return Image.fromarray(pixels[:, :-1])


CHANGES: dict[str, Change] = {
    "JPEG 95": lambda image: saved(image, "JPEG", 95),
    "JPEG 90": lambda image: saved(image, "JPEG", 90),
    "JPEG 75": lambda image: saved(image, "JPEG", 75),
    "WebP 80": lambda image: saved(image, "WEBP", 80),
    "enlarged twice": lambda image: image.resize((2 * image.size[0], 2 * image.size[1])),
    "to 90% and back": lambda image: resized(image, 0.9),
    "to 110% and back": lambda image: resized(image, 1.1),
    "moved by a pixel": moved,
    "2% brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.02),
    "2% darker": lambda image: ImageEnhance.Brightness(image).enhance(0.98),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


if __name__ == "__main__":
    main()
