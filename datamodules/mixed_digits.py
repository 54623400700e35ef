"""`data=mixed_digits`: a client with MNIST digits, a pool that is mostly something else.

Real images without a download: `assets/mixed_digits.npz` (made by `scripts/make_mixed_digits.py`)
holds disjoint parts of MNIST and a part of Fashion-MNIST; scikit-learn brings 8×8 digits and two
photos, matplotlib brings fonts. Pool, 13,997 images in five domains:

    mnist        2,000  the client's domain
    mnist_photo  3,000  other MNIST digits blended over photo patches, |patch - digit| (MNIST-M:
                        Ganin et al., "Domain-Adversarial Training of Neural Networks", 2016)
    uci          1,797  scikit-learn's 8×8 digits
    font         2,200  digits set in 19 fonts, coloured, moved and turned
    fashion      5,000  garments: none of the client's classes
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from datamodules.scenario import Scenario
from ecos_pl.images import PoolPart

Array = np.ndarray[Any, np.dtype[np.uint8]]

ASSET = Path(__file__).parent / "assets" / "mixed_digits.npz"
DRAWING_VERSION = 1  # raise it whenever code below changes a pixel, an id or their order
SIDE = 28
FONT_SIZE_OF_DOMAIN = 2200
DIGITS = [str(digit) for digit in range(10)]
GARMENTS = [  # in Fashion-MNIST's order
    *("t_shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle_boot"),
]
# Those of matplotlib's fonts with ten upright, lining digits; the others hold symbols only, lack
# digits, or (cmmi10) have old-style ones.
FONTS = [
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
]


def mixed_digits() -> Scenario:
    """The pool and the client described above; no image is decoded or drawn yet."""
    return Scenario(
        name="mixed_digits",
        pool=_source("pool"),
        client_train=_source("client_train"),
        client_test=_source("client_test"),
        classes=DIGITS,
        client_domain="mnist",
    )


@dataclass(frozen=True)
class _Domain:
    """A run of images of one domain; `draw(i)` makes the i-th."""

    name: str
    labels: Sequence[str]
    draw: Callable[[int], Image.Image]
    first_number: int = 0  # so that MNIST digits of different parts have different ids


class MixedDigitsSource:
    """One part of mixed_digits as an image source; ids are `domain/class/number`.

    Pickled as its name alone: a DataLoader worker makes its own, once.
    """

    def __init__(self, part: str) -> None:
        self.name = f"mixed_digits/{part}"
        self._part = part
        self._where: list[tuple[_Domain, int]] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.domains: list[str] = []
        for domain in _domains_of(part):
            for i, label in enumerate(domain.labels):
                self._where.append((domain, i))
                self.ids.append(f"{domain.name}/{label}/{domain.first_number + i:05d}")
                self.labels.append(label)
                self.domains.append(domain.name)
        # Versions of Pillow, scikit-learn and matplotlib stay out although some pixels may change
        # with them by a grey level or two: an upgrade should not ask the client a second time.
        text = f"{_asset_sha256()} {self.name} {DRAWING_VERSION}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.parts = [PoolPart(self.name, None, 0, len(self.ids), self.fingerprint)]

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"MixedDigitsSource({self._part!r}, {len(self)} images)"

    def __reduce__(self) -> tuple[Callable[[str], "MixedDigitsSource"], tuple[str]]:
        return _source, (self._part,)

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB at its own size: 28×28, in domain uci 8×8."""
        domain, i = self._where[index]
        return domain.draw(i)


@cache
def _source(part: str) -> MixedDigitsSource:
    return MixedDigitsSource(part)


def _domains_of(part: str) -> list[_Domain]:
    mnist_parts = ("pool", "client_train", "client_test")
    first = sum(len(_labels(p)) for p in mnist_parts[: mnist_parts.index(part)])
    mnist = _Domain("mnist", _named(part, DIGITS), lambda i: _stored(part, i), first)
    if part != "pool":
        return [mnist]
    return [
        mnist,
        _Domain("mnist_photo", _named("blend", DIGITS), _draw_on_photo),
        _Domain("uci", [DIGITS[digit] for digit in _uci()[:, -1]], _draw_uci),
        _Domain("font", [_font_digit(i) for i in range(FONT_SIZE_OF_DOMAIN)], _draw_font),
        _Domain("fashion", _named("fashion", GARMENTS), lambda i: _stored("fashion", i)),
    ]


def _stored(part: str, i: int) -> Image.Image:
    return Image.fromarray(_images(part)[i]).convert("RGB")


def _draw_on_photo(i: int) -> Image.Image:
    rng = Random(f"photo {i}")
    photo = _photo(rng.choice(("china", "flower")))  # [height, width, 3]
    top, left = (int(rng.random() * (side - SIDE + 1)) for side in photo.shape[:2])
    patch = photo[top : top + SIDE, left : left + SIDE].astype(np.int16)
    blend = np.abs(patch - _images("blend")[i][:, :, None])
    return Image.fromarray(blend.astype(np.uint8))


def _draw_uci(i: int) -> Image.Image:
    grey = (_uci()[i, :-1].reshape(8, 8) * (255 / 16)).round().astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _font_digit(i: int) -> str:
    return DIGITS[i * len(DIGITS) // FONT_SIZE_OF_DOMAIN]


def _draw_font(i: int) -> Image.Image:
    """Draw at double size, turn, halve; colours differ in brightness by at least 80 of 255."""
    rng = Random(f"font {i}")
    font = _font(rng.choice(FONTS), rng.randint(36, 54))
    shift = [rng.uniform(-5, 5) for _ in range(2)]
    angle = rng.uniform(-12, 12)  # degrees
    ink, paper = _colour(rng), _colour(rng)
    while abs(_brightness(ink) - _brightness(paper)) < 80:
        ink, paper = _colour(rng), _colour(rng)
    mask = Image.new("L", (2 * SIDE, 2 * SIDE))
    middle = (SIDE + shift[0], SIDE + shift[1])
    left, top, right, bottom = font.getbbox(_font_digit(i))
    corner = (middle[0] - (left + right) / 2, middle[1] - (top + bottom) / 2)
    ImageDraw.Draw(mask).text(corner, _font_digit(i), fill=255, font=font)
    mask = mask.rotate(angle, Image.Resampling.BICUBIC, center=middle).reduce(2)
    return Image.composite(
        Image.new("RGB", mask.size, ink), Image.new("RGB", mask.size, paper), mask
    )


def _colour(rng: Random) -> tuple[int, int, int]:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


def _brightness(colour: tuple[int, int, int]) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]  # ITU-R BT.601 luma


# What follows is read once per process, when first needed.


@cache
def _asset() -> bytes:
    return ASSET.read_bytes()


@cache
def _asset_sha256() -> str:
    return hashlib.sha256(_asset()).hexdigest()


@cache
def _images(part: str) -> Array:
    """[n, 28, 28]."""
    with np.load(io.BytesIO(_asset())) as arrays:
        return np.asarray(arrays[f"{part}_images"])


@cache
def _labels(part: str) -> Array:
    """[n]."""
    with np.load(io.BytesIO(_asset())) as arrays:
        return np.asarray(arrays[f"{part}_labels"])


def _named(part: str, names: Sequence[str]) -> list[str]:
    return [names[label] for label in _labels(part)]


@cache
def _uci() -> Array:
    """scikit-learn's digits, [1797, 65]: 64 grey levels 0..16 and the digit."""
    path = _packaged("sklearn", "datasets/data/digits.csv.gz")
    return np.loadtxt(path, dtype=np.uint8, delimiter=",")


@cache
def _photo(name: str) -> Array:
    """One of scikit-learn's sample photos, [427, 640, 3]."""
    with Image.open(_packaged("sklearn", f"datasets/images/{name}.jpg")) as image:
        return np.asarray(image.convert("RGB"))


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts; laid out by Pillow itself, as Raqm is not everywhere."""
    path = _packaged("matplotlib", f"mpl-data/fonts/ttf/{name}.ttf")
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _packaged(package: str, relative: str) -> Path:
    """A file of an installed package, without the seconds that importing scikit-learn takes."""
    spec = find_spec(package)
    path = Path(spec.origin).parent / relative if spec and spec.origin else None
    if path is None or not path.is_file():
        raise FileNotFoundError(
            f"mixed_digits needs {package}'s file {relative}: reinstall {package} from PyPI"
        )
    return path
