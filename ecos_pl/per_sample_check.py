"""Does an image's embedding depend on that image alone?

The client's guarantee rests on it: a count changes by one when one image comes or goes only if no
other image's embedding moves. A network that looks at its whole batch (batch statistics, say) would
let one private image move all others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

TOLERANCE = 1e-4
"""Largest change of a unit vector's coordinate. Kernels for other batch sizes round differently, by
some 1e-6 (float32, on a CPU)."""

_NUM_IMAGES = 6


class NotPerSampleError(ValueError):
    """The network is not fit to embed private images; the text is one line."""


def check_per_sample(network: nn.Module, image_size: int) -> None:
    """Look at a network's layers, then try it on pseudo-random images in changing company.

    The trial is on the CPU, in float32, and its images are always the same: what comes out depends
    on the network alone.

    Args:
        network: Images [B, 3, S, S] uint8 → unit vectors [B, D], in eval mode.
        image_size: S.

    Raises:
        NotPerSampleError: An embedding depends on more than its image, or is not finite.
    """
    _check_layers(network)
    _check_embeddings(network, image_size)


def _check_layers(network: nn.Module) -> None:
    for layer in network.modules():
        kind = type(layer).__name__
        if layer.training:
            raise NotPerSampleError(f"a layer ({kind}) is in training mode")
        if isinstance(layer, _BatchNorm) and (
            layer.running_mean is None or layer.running_var is None
        ):
            raise NotPerSampleError(f"a layer ({kind}) uses the statistics of its batch")


@torch.inference_mode()
def _check_embeddings(network: nn.Module, image_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (2 * _NUM_IMAGES, 3, image_size, image_size)
    drawn = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    images, strangers = drawn[:_NUM_IMAGES], drawn[_NUM_IMAGES:]
    strangers[0], strangers[1] = 0, 255
    first = _embed(network, images)
    order = torch.randperm(_NUM_IMAGES, generator=generator)
    among = _embed(network, torch.cat([strangers, images]))
    alone = [_embed(network, image[None]) for image in images]
    others = {
        "its batch is embedded again": _embed(network, images),
        "the order of its batch changes": _embed(network, images[order])[order.argsort()],
        "others join its batch": among[len(strangers) :],
        "it stands alone": torch.cat(alone),
    }
    for when, embeddings in others.items():
        if embeddings.shape != first.shape or float((embeddings - first).abs().max()) > TOLERANCE:
            raise NotPerSampleError(f"an image's embedding changes when {when}")


def _embed(network: nn.Module, images: Tensor) -> Tensor:
    embeddings: Tensor = network(images)
    if len(embeddings) != len(images) or not bool(embeddings.isfinite().all()):
        raise NotPerSampleError("the embeddings of some images are not finite, or are missing")
    return embeddings
