"""`data=mnist_fashion`: a client with MNIST digits, all of MNIST and Fashion-MNIST as the pool.

120,000 pool images (the training parts, in torchvision's folders), half of them the client's
domain. The client's images and those that measure the result are drawn from MNIST's test part, so
pool, client and test share no image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from datamodules.mixed_digits import DIGITS
from datamodules.scenario import Scenario
from datamodules.several_pools import SeveralPools
from datamodules.torchvision_pool import TorchvisionPool, torchvision_pool
from ecos_pl.images import SomeImages


def mnist_fashion(root: Path, *, num_client: int = 1000, seed: int = 0) -> Scenario:
    """Open the two data sets.

    Args:
        root: Folder that holds torchvision's ``MNIST`` and ``FashionMNIST``.
        num_client: Images of the client; the rest of MNIST's test part measures.
        seed: Of the draw of the client's images.

    Raises:
        ValueError: One line: a data set is not where it was looked for, or is too small.
    """
    test = _opened("MNIST", root, "test")
    if not 0 < num_client < len(test):
        raise ValueError(
            f"data.num_client={num_client}: MNIST's test part holds {len(test)} images for client "
            "and test together"
        )
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed)).numpy()
    client, rest = np.sort(order[:num_client]), np.sort(order[num_client:])
    pools = [
        (name, None, _opened(kind, root, "train"))
        for name, kind in (("mnist", "MNIST"), ("fashion", "FashionMNIST"))
    ]
    return Scenario(
        name="mnist_fashion",
        pool=SeveralPools(pools),
        client_train=SomeImages(test, client),
        client_test=SomeImages(test, rest),
        classes=DIGITS,
        client_domain="mnist",
    )


def _opened(name: str, root: Path, split: str) -> TorchvisionPool:
    options: Mapping[str, str] = {"root": str(root), "split": split}
    return torchvision_pool(name, options)
