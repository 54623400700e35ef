"""`data=mnist_fashion`: a client with MNIST digits, all of MNIST and Fashion-MNIST as the pool.

120,000 pool images (the training parts, in torchvision's folders), half of them the client's
domain. The client's images and those that measure the result are drawn from MNIST's test part, so
pool, client and test share no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from datamodules.client_draw import (
    ClientDraw,
    check_no_domain,
    class_codes,
    classes_of,
    client_rows,
)
from datamodules.mixed_digits import DIGITS
from datamodules.scenario import Scenario
from datamodules.several_pools import SeveralPools
from datamodules.torchvision_pool import TorchvisionPool, torchvision_pool
from ecos_pl.images import SomeImages


def mnist_fashion(root: Path, draw: ClientDraw | None = None) -> Scenario:
    """Open the two data sets.

    Args:
        root: Folder that holds torchvision's ``MNIST`` and ``FashionMNIST``.
        draw: Which of MNIST's test images are the client's, 1,000 if it does not say how many; the
            rest of them measures.

    Raises:
        ValueError: One line: a data set is not where it was looked for, or is too small.
    """
    draw = draw or ClientDraw()
    check_no_domain(draw, "mnist_fashion")
    draw = replace(draw, at_most=1000)
    test, place = _opened("MNIST", root, "test"), "MNIST's test part"
    classes = classes_of(draw, DIGITS)
    client, rest = client_rows(draw, class_codes(test, classes), classes, place)
    pools = [
        (name, None, _opened(kind, root, "train"))
        for name, kind in (("mnist", "MNIST"), ("fashion", "FashionMNIST"))
    ]
    return Scenario(
        name="mnist_fashion",
        pool=SeveralPools(pools),
        client_train=SomeImages(test, client),
        client_test=SomeImages(test, rest),
        classes=classes,
        client_domain="mnist",
    )


def _opened(name: str, root: Path, split: str) -> TorchvisionPool:
    options: Mapping[str, str] = {"root": str(root), "split": split}
    return torchvision_pool(name, options)
