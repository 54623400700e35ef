"""`data=cifar10_imagenet32`: a client with CIFAR-10, ImageNet-32 as the pool.

The client's images come from CIFAR-10's training part (torchvision's folder, checked by MD5 as
torchvision does), its test part measures. Those of the training part that are not the client's join
the pool as its part in the client's domain, unless they are to be left out. ImageNet's classes are
not CIFAR-10's, so the labels of ImageNet-32 images label nothing for the client.
"""

from __future__ import annotations

from pathlib import Path

from datamodules.client_draw import ClientDraw
from datamodules.domains import Domain, domain_scenario
from datamodules.imagenet32 import NUM_FILES, imagenet32
from datamodules.own_rest import without_rest
from datamodules.scenario import Scenario
from datamodules.torchvision_pool import torchvision_pool

CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
PROTOCOL = ClientDraw(domain="cifar10", fraction=0.5)


def cifar10_imagenet32(
    root: Path,
    imagenet_root: Path,
    draw: ClientDraw | None,
    *,
    cache_dir: Path,
    rest_in_pool: bool = True,
    allow_pickle: bool = False,
    num_files: int = NUM_FILES,
    download: bool = False,
) -> Scenario:
    """Half of CIFAR-10's training images, or what `draw` says, are the client's.

    Args:
        root: Holds torchvision's cifar-10-batches-py.
        imagenet_root: Holds ImageNet-32's files.
        draw: Which images the client has; None for a client elsewhere.
        cache_dir: Where compressed pixels of ImageNet-32 are unpacked to.
        rest_in_pool: The rest of the training images joins the pool; else it is not used.
        allow_pickle: Read ImageNet-32's pickled packaging too.
        num_files: How many of ImageNet-32's files make the pool.
        download: Let torchvision fetch CIFAR-10 if it is missing.

    Raises:
        ValueError: One line: see `torchvision_pool`, `imagenet32` and `domain_scenario`.
    """
    pool = imagenet32(
        imagenet_root, cache_dir=cache_dir, allow_pickle=allow_pickle, num_files=num_files
    )
    options = {"root": str(root), "download": str(download).lower()}
    try:
        train, test = (
            torchvision_pool("CIFAR10", {**options, "split": split}) for split in ("train", "test")
        )
    except ValueError as error:
        raise ValueError(f"{error}; here these are data.root=… and data.download=true") from error
    domains = [Domain("cifar10", train, test), Domain("imagenet32", pool)]
    scenario = domain_scenario("cifar10_imagenet32", domains, CLASSES, draw, default=PROTOCOL)
    return scenario if rest_in_pool else without_rest(scenario, domains, "cifar10")
