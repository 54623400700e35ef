"""What a benchmark knows and a real run does not: all of it is labelled ``simulation/``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ecos_pl.classifier import Classifier
from ecos_pl.images import ImageSource
from ecos_pl.proxy_set import ProxySet


def domain_purity(pool: ImageSource, indices: Sequence[int], domain: str | None) -> float | None:
    """Share of some pool images that belong to a domain; None where domains are unknown."""
    if domain is None or not len(indices):
        return None
    return sum(pool.domains[index] == domain for index in indices) / len(indices)


def domain_share(pool: ImageSource, domain: str | None) -> float | None:
    """Share of all pool images that belong to a domain: the purity that random sampling gets."""
    if domain is None or not len(pool):
        return None
    return pool.domains.count(domain) / len(pool)


def label_accuracy(
    proxy_set: ProxySet, pool: ImageSource, indices: Sequence[int], domain: str | None
) -> float | None:
    """Share of right labels among labelled images of the client's domain and classes.

    Without a domain, all labelled images whose true class is one of the client's count. None
    where no such image is there.
    """
    classes = set(proxy_set.classes)
    right = [
        label == pool.labels[index]
        for index, label in zip(indices, proxy_set.labels, strict=True)
        if label is not None
        and pool.labels[index] in classes
        and (domain is None or pool.domains[index] == domain)
    ]
    return sum(right) / len(right) if right else None


def class_numbers(source: ImageSource, classes: Sequence[str]) -> Tensor:
    """Class number [len(source)] int64 of each image, -1 where it is none of ``classes``."""
    number = {name: k for k, name in enumerate(classes)}
    return torch.tensor([number.get(label or "", -1) for label in source.labels])


def accuracy(model: Classifier, batches: Iterable[Sequence[Tensor]]) -> float | None:
    """Share of right answers of a model in eval mode; None where no image counts.

    Args:
        model: On any device.
        batches: ``(images [B, 3, S, S], targets [B, K], weights [B])``; weight 0 does not count.
    """
    device = next(model.parameters()).device
    right, num_images = 0, 0
    with torch.inference_mode():
        for images, targets, weights in batches:
            answers = model(images.to(device)).argmax(dim=1).cpu()
            right += int(((answers == targets.argmax(dim=1)) & (weights > 0)).sum())
            num_images += int((weights > 0).sum())
    return right / num_images if num_images else None
