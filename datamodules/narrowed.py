"""A client that is part of the one a data family has: fewer images, some classes, other shares."""

from __future__ import annotations

from dataclasses import replace

from datamodules.client_draw import (
    ClientDraw,
    check_no_domain,
    class_codes,
    classes_of,
    client_rows,
    drawn_rows,
)
from datamodules.scenario import Scenario
from ecos_pl.images import SomeImages


def narrowed(scenario: Scenario, draw: ClientDraw) -> Scenario:
    """The scenario with part of its client; the pool stays as it is.

    Client images that are not taken are not used at all. A subset of the classes leaves the pool's
    images of the others where they are: they are now irrelevant ones.

    Args:
        scenario: Of a family whose client is given.
        draw: Which of its images the client is to have.

    Raises:
        ValueError: One line: a domain is asked for, an unknown class, too few images, nothing to
            test on.
    """
    check_no_domain(draw, scenario.name)
    if draw.is_of_all:
        return scenario
    train, test = scenario.client_train, scenario.client_test
    if train is None:
        raise ValueError("client.size and the like choose among images that are not here")
    classes = classes_of(draw, scenario.classes)
    codes = class_codes(train, classes)
    if test is None:
        rows = drawn_rows(draw, codes, classes, "the client")
    else:
        test_codes = class_codes(test, classes)
        rows, test_rows = client_rows(draw, codes, classes, "the client", test_codes)
        test = SomeImages(test, test_rows)
    return replace(
        scenario, client_train=SomeImages(train, rows), client_test=test, classes=classes
    )
