"""Families of several domains: one domain is the client's, the others are the pool.

The paper's protocols: a share of one domain's training images is the client's; the rest of them
and all other domains make the pool. What measures is the client's domain's official test part, or
else a fifth of its images, set aside before anything is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from datamodules.client_draw import ClientDraw, class_codes, classes_of, client_rows
from datamodules.pool_rows import PoolRows
from datamodules.scenario import Scenario
from datamodules.several_pools import SeveralPools
from ecos_pl.columns import Constant, Span
from ecos_pl.images import PoolSource, SomeImages
from ecos_pl.overrides import nearest

HELD_OUT = 0.2
"""Share of a domain's images that measure, where no official split says which do."""


@dataclass(frozen=True)
class Domain:
    """Labelled images of one domain.

    Attributes:
        name: Begins the ids of its images; the pool's name for the domain.
        train: Its images, or those of the official training part.
        test: The official test part; None where there is none.
        licence: Under which terms they may be used; None for what `train` says.
    """

    name: str
    train: PoolSource
    test: PoolSource | None = None
    licence: str | None = None


def limited(domain: Domain, num_images: int | None) -> Domain:
    """A domain with some of its training images, at random; the same ones every time."""
    if num_images is None or num_images >= len(domain.train):
        return domain
    order = torch.randperm(len(domain.train), generator=torch.Generator().manual_seed(0))
    return replace(domain, train=PoolRows(domain.train, order[:num_images].sort().values.numpy()))


def domain_scenario(
    family: str,
    domains: Sequence[Domain],
    classes: Sequence[str],
    draw: ClientDraw | None,
    *,
    default: ClientDraw,
) -> Scenario:
    """One domain's share is the client's, the rest of it and the other domains are the pool.

    Ids are `DOMAIN/id` on both sides. Images of other classes than the client's stay in the pool,
    those of its own domain too. Test parts of other domains are not used.

    Args:
        family: The scenario's name, as in "digits5".
        domains: In the pool's order.
        classes: Names of all classes; labels that are none of them belong to pool images only.
        draw: Which images the client is to have; None for a client elsewhere: all are the pool.
        default: The family's protocol, for a draw without: `domain`, and one of `fraction`, `size`
            and `at_most`.

    Raises:
        ValueError: One line: an unknown domain or class, too few images, nothing to test on.
    """
    if draw is None:
        everything = [(one.name, one.licence, _all_of(one)) for one in domains]
        return Scenario(family, SeveralPools(everything), None, None, list(classes))
    draw = _completed(draw, default)
    mine = _named(domains, draw.domain)
    place = f"domain {mine.name!r}"
    own_classes = classes_of(draw, classes)
    codes = class_codes(mine.train, own_classes)
    if mine.test is None:
        held_out = set_aside(len(codes))
        test, test_codes = mine.train, np.where(held_out, codes, -1)
        codes = np.where(held_out, -1, codes)
    else:
        held_out = np.zeros(len(codes), bool)
        test, test_codes = mine.test, class_codes(mine.test, own_classes)
    rows, test_rows = client_rows(draw, codes, own_classes, place, test_codes)
    held_out[rows] = True
    rest = np.flatnonzero(~held_out)
    own = [PoolRows(mine.train, rest, has_domains=False)] if len(rest) else []
    pools = [
        (one.name, one.licence, source)
        for one in domains
        for source in (own if one is mine else [_all_of(one)])
    ]
    if not pools:
        raise ValueError(f"the client takes all of {place}, the only one: nothing is left as pool")
    return Scenario(
        name=family,
        pool=SeveralPools(pools),
        client_train=SomeImages(_Prefixed(mine.name, mine.train), rows),
        client_test=SomeImages(_Prefixed(mine.name, test), test_rows),
        classes=own_classes,
        client_domain=mine.name,
        repeats_allowed=True,
    )


def _completed(draw: ClientDraw, default: ClientDraw) -> ClientDraw:
    draw = replace(draw, domain=draw.domain or default.domain)
    if draw.fraction is not None or draw.size is not None:
        return draw
    return replace(draw, fraction=default.fraction, size=default.size, at_most=default.at_most)


def _named(domains: Sequence[Domain], name: str | None) -> Domain:
    names = [one.name for one in domains]
    for one in domains:
        if one.name == name:
            return one
    raise ValueError(
        f"client.domain: no domain {name!r}{nearest(name or '', names)} (there are: "
        f"{', '.join(names)})"
    )


def _all_of(domain: Domain) -> PoolRows:
    rows = np.arange(len(domain.train))
    return PoolRows(domain.train, rows, has_domains=False)  # their domain is the pool's name


def set_aside(num: int) -> npt.NDArray[np.bool_]:
    """Which images measure [N]; the same ones whatever the client is."""
    order = torch.randperm(num, generator=torch.Generator().manual_seed(0)).numpy()
    mask = np.zeros(num, bool)
    mask[order[: round(HELD_OUT * num)]] = True
    return mask


class _Prefixed:
    """Images of a domain under the names that they have, or would have, in the pool."""

    def __init__(self, domain: str, source: PoolSource) -> None:
        self._source = source
        self.name = f"{domain} ({source.name})"
        self.ids = Span(source.ids, 0, len(source), partial(_within, domain))
        self.labels = source.labels
        self.domains = Constant(domain, len(source))
        self.fingerprint = source.fingerprint

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Image.Image:
        return self._source.read(index)


def _within(domain: str, identifier: str) -> str:
    return f"{domain}/{identifier}"
