"""Which images of a domain are the client's: how many, of which classes, in which shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ecos_pl.images import ImageSource
from ecos_pl.overrides import nearest

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ClientDraw:
    """What a simulated client is to be; the options `client.…` of `client=simulated`.

    Attributes:
        domain: The domain that its images come from; None for the family's own choice.
        fraction: Its training images as a share of those there are; not beside `size`.
        size: Number of its training images.
        classes: The classes it has; empty for all.
        imbalance: Concentration of the Dirichlet distribution that class shares are drawn from:
            the smaller, the more unequal. None leaves classes as they come.
        seed: Of the draw.
        at_most: Training images where neither `fraction` nor `size` says: so many, or all there
            are; None for all.
    """

    domain: str | None = None
    fraction: float | None = None
    size: int | None = None
    classes: Sequence[str] = ()
    imbalance: float | None = None
    seed: int = 0
    at_most: int | None = None

    def __post_init__(self) -> None:
        if self.fraction is not None and self.size is not None:
            raise ValueError(
                "client.fraction and client.size both say how many images the client has: give one"
            )

    @property
    def is_of_all(self) -> bool:
        """Whether the client is simply all there is."""
        amount = (self.fraction, self.size, self.imbalance)
        return not self.classes and all(value is None for value in amount)


def classes_of(draw: ClientDraw, known: Sequence[str]) -> list[str]:
    """The client's classes, in the family's order: from here on, all there are to tell apart.

    Raises:
        ValueError: One line: an unknown class, or one that is named twice.
    """
    for name in draw.classes:
        if name not in known:
            listed = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
            raise ValueError(
                f"client.classes: no class {name!r}{nearest(name, known)} (there are: {listed})"
            )
        if list(draw.classes).count(name) > 1:
            raise ValueError(f"client.classes names {name!r} twice")
    return [name for name in known if not draw.classes or name in draw.classes]


def class_codes(source: ImageSource, classes: Sequence[str]) -> Ints:
    """Class number [N] of each image, -1 where it is none of `classes`."""
    number = {name: k for k, name in enumerate(classes)}
    codes = (number.get(label or "", -1) for label in source.labels)
    return np.fromiter(codes, np.int64, len(source))


def client_rows(
    draw: ClientDraw,
    codes: Ints,
    classes: Sequence[str],
    place: str,
    test_codes: Ints | None = None,
) -> tuple[Ints, Ints]:
    """Rows of the client's training images, and of test images that are distributed as they are.

    Args:
        draw: What the client is to be.
        codes: [N], see `drawn_rows`.
        classes: Names of the K classes.
        place: What to call the images in messages.
        test_codes: [M], class numbers of images to test on, -1 for those that are out; None tests
            on the images that the client does not get.

    Raises:
        ValueError: One line: see `drawn_rows`, or nothing is left to test on.
    """
    rows = drawn_rows(draw, codes, classes, place)
    shares = None
    if draw.imbalance is not None:
        shares = np.bincount(codes[rows], minlength=len(classes)) / len(rows)
    if test_codes is None:
        test_codes = codes.copy()
        test_codes[rows] = -1
    test_rows = alike_rows(shares, test_codes, draw.seed)
    if not len(test_rows):
        raise ValueError(
            f"no image of {place} is left to test on: none of the classes "
            f"{', '.join(classes)} in the client's shares"
        )
    return rows, test_rows


def drawn_rows(draw: ClientDraw, codes: Ints, classes: Sequence[str], place: str) -> Ints:
    """Rows [n] of the client's training images, ascending.

    The images of a smaller client are among those of a larger one of the same seed, unless class
    shares are drawn.

    Args:
        draw: What the client is to be.
        codes: [N], class numbers of the images to draw from, -1 for those that are out.
        classes: Names of the K classes.
        place: What to call the images in messages, as in "domain 'mnist'".

    Raises:
        ValueError: One line: too few images, a class without any, or no image left.
    """
    available = np.bincount(codes[codes >= 0], minlength=len(classes))
    if draw.classes and not available.all():
        missing = classes[int(np.argmin(available))]
        raise ValueError(f"client.classes: {place} has no image of class {missing!r}")
    total = int(available.sum())
    if not total:
        raise ValueError(f"{place} has no image of the classes {', '.join(classes)}")
    size = _size(draw, total, place)
    if draw.imbalance is None:
        counts = None
        size = total if size is None else size
    else:
        shares = dirichlet_shares(draw.imbalance, len(classes), draw.seed) * (available > 0)
        shares = shares / shares.sum() if shares.sum() else available / total
        counts = counts_by_share(shares, available, size)
        size = int(counts.sum())
    if not size:
        raise ValueError(f"client.fraction={draw.fraction:g} of {total} images of {place} is none")
    return _first_of_each(codes, counts, size, draw.seed)


def alike_rows(shares: Floats | None, codes: Ints, seed: int) -> Ints:
    """Rows [n] of as many images as there are with these class shares [K], ascending.

    Args:
        shares: Of the classes; None takes every image of any class.
        codes: [N], class numbers, -1 for images that are out.
        seed: Of the draw.
    """
    if shares is None:
        return np.flatnonzero(codes >= 0)
    counts = counts_by_share(shares, np.bincount(codes[codes >= 0], minlength=len(shares)), None)
    return _first_of_each(codes, counts, int(counts.sum()), seed)


def check_no_domain(draw: ClientDraw, family: str) -> None:
    """Refuse (ValueError) a choice of domain where the family has one client for all."""
    if draw.domain is not None:
        raise ValueError(
            f"client.domain={draw.domain}: data={family} has one client, whose images are given; "
            "domains to choose from are in data=digits5, data=domainnet10 and data=domainnet"
        )


def dirichlet_shares(concentration: float, num_classes: int, seed: int) -> Floats:
    """Class shares [K] from the symmetric Dirichlet distribution: mean 1/K, variance
    (K - 1) / (K² (K `concentration` + 1)).
    """
    shares = np.random.default_rng(seed).dirichlet(np.full(num_classes, concentration))
    if not np.isfinite(shares).all():  # all gamma variates underflow where it is very small
        shares = np.eye(num_classes)[np.random.default_rng(seed).integers(num_classes)]
    return shares


def counts_by_share(shares: Floats, available: Ints, size: int | None) -> Ints:
    """Images per class [K] in given shares, none more than there are.

    Args:
        shares: [K], sum 1.
        available: [K].
        size: Their sum, at most that of `available`: a class of too few images gives all, and the
            others, in proportion, what it lacks. None keeps the shares and takes as many images as
            they allow.
    """
    if size is None:
        wanted = shares > 0
        size = int(np.floor((available[wanted] / shares[wanted]).min() + 1e-9))
        while (counts := _rounded(shares, size)).max(initial=0) and (counts > available).any():
            size -= 1
        return counts
    counts = np.zeros(len(shares), np.int64)
    while (missing := size - int(counts.sum())) > 0:
        room = counts < available
        weights = np.where(room, shares, 0.0)
        if weights.sum() <= 0:  # only classes without a share have images left
            weights = (available - counts).astype(float)
        counts = np.minimum(counts + _rounded(weights / weights.sum(), missing), available)
    return counts


def _rounded(shares: Floats, size: int) -> Ints:
    """Whole numbers near `size` × shares that sum to `size`: the largest remainders round up."""
    exact = shares * size
    counts = np.floor(exact).astype(np.int64)
    up = np.argsort(counts - exact, kind="stable")[: size - int(counts.sum())]
    counts[up] += 1
    return counts


def _size(draw: ClientDraw, total: int, place: str) -> int | None:
    if draw.fraction is not None:
        return round(draw.fraction * total)
    if draw.size is not None and draw.size > total:
        of = f" of the classes {', '.join(draw.classes)}" if draw.classes else ""
        raise ValueError(f"client.size={draw.size}: {place} has {total} images{of}")
    if draw.size is None and draw.at_most is not None:
        return min(draw.at_most, total)
    return draw.size


def _first_of_each(codes: Ints, counts: Ints | None, size: int, seed: int) -> Ints:
    """In one random order of all images, the first `size`, or the first `counts` of each class."""
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed)).numpy()
    in_order = codes[order]
    if counts is None:
        return np.sort(order[in_order >= 0][:size])
    picked = [order[in_order == k][:count] for k, count in enumerate(counts)]
    return np.sort(np.concatenate(picked))
