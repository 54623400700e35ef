"""What every data family hands over: one public pool, one client."""

from collections.abc import Sequence
from dataclasses import dataclass

from ecos_pl.images import ImageSource, PoolSource


@dataclass(frozen=True)
class Scenario:
    """A public pool and a private client, as image sources.

    Attributes:
        name: "mixed_digits", "folder", …
        pool: public images, labelled or not.
        client_train: the client's private images, labelled; None where the client is elsewhere.
        client_test: images of the client's distribution that training never sees, if any are here.
        classes: the client's class names; an image's class index is its place here.
        client_domain: the pool's name for the client's domain, where the pool has one. Only
            evaluation in simulation uses it.
        repeats_allowed: Whether a picture that is found in two of the parts is a repetition of the
            data set itself, as public benchmarks have some; else it is a mistake.
    """

    name: str
    pool: PoolSource
    client_train: ImageSource | None
    client_test: ImageSource | None
    classes: Sequence[str]
    client_domain: str | None = None
    repeats_allowed: bool = False
