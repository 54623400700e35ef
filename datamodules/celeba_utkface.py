"""`data=celeba_utkface`: a client with CelebA's faces, UTKFace and Tiny-ImageNet as the pool.

What is told apart is one of CelebA's attributes. UTKFace knows the gender of its faces and none of
the other attributes, so its labels serve data.target=Male alone; Tiny-ImageNet is what no client
with faces needs. The client's images come from CelebA's training part, its test part (other
persons) measures, its validation part is not used.
"""

from __future__ import annotations

import logging
from pathlib import Path

from datamodules.celeba import celeba, class_names, persons
from datamodules.client_draw import ClientDraw
from datamodules.domains import Domain, domain_scenario
from datamodules.own_rest import without_persons_of_client, without_rest
from datamodules.scenario import Scenario
from datamodules.several_pools import SeveralPools
from datamodules.tiny_imagenet import FOLDER, tiny_imagenet
from datamodules.utkface import utkface

log = logging.getLogger(__name__)

PROTOCOL = ClientDraw(domain="celeba", fraction=0.5)


def celeba_utkface(
    root: Path,
    draw: ClientDraw | None,
    *,
    cache_dir: Path,
    target: str = "Male",
    rest_in_pool: bool = False,
    has_tiny_imagenet: bool | None = None,
) -> Scenario:
    """Half of CelebA's training images, or what `draw` says, are the client's.

    Args:
        root: Holds celeba, UTKFace and tiny-imagenet-200.
        draw: Which images the client has; None for a client elsewhere.
        cache_dir: Where listings are kept.
        target: CelebA's attribute to tell apart.
        rest_in_pool: The rest of the training images joins the pool (but, where identity_CelebA.txt
            is there, no image of a person whom the client knows); else it is not used.
        has_tiny_imagenet: Whether Tiny-ImageNet is in the pool; None: if it is there.

    Raises:
        ValueError: One line: see `celeba`, `utkface`, `tiny_imagenet` and `domain_scenario`.
    """
    train, test = (celeba(root, part, target, cache_dir=cache_dir) for part in ("train", "test"))
    domains = [
        Domain("celeba", train, test),
        Domain("utkface", utkface(root, cache_dir=cache_dir)),
    ]
    if has_tiny_imagenet is None:
        has_tiny_imagenet = (root / FOLDER).is_dir()
        if not has_tiny_imagenet:
            log.info("celeba_utkface: no %s in %s, so the pool is UTKFace alone", FOLDER, root)
    if has_tiny_imagenet:
        parts = [(s, None, tiny_imagenet(root, s, cache_dir=cache_dir)) for s in ("train", "val")]
        domains.append(Domain("tiny_imagenet", SeveralPools(parts)))
    classes = sorted(class_names(target))
    scenario = domain_scenario("celeba_utkface", domains, classes, draw, default=PROTOCOL)
    if not rest_in_pool:
        return without_rest(scenario, domains, "celeba")
    person_of = persons(root)
    return scenario if person_of is None else without_persons_of_client(scenario, person_of)
