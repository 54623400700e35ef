"""Embeddings of a simulated client's test images, in memory alone."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from ecos_pl.embedding_bank import CPU_BATCH
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.image_reader import read_batches
from ecos_pl.images import ImageSource, SomeImages

MAX_CLIENT_IMAGES = 1000
"""Test images embedded at most; of more, a random sample."""


def client_embeddings(
    source: ImageSource, encoder: EncoderSpec, *, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Embed the client's test images [n, D] float32, those that can be read.

    Test images, since the training images are what the release protects: a number computed from
    those without noise would be a release of its own, even in a simulation. Both are drawn from
    the same distribution. Nothing is written to disk.

    Args:
        source: The client's test images.
        encoder: The public encoder that also embedded the pool.
        seed: Of the sample, if there are more than `MAX_CLIENT_IMAGES`.
        device: Where the encoder runs.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(source), generator=generator)[:MAX_CLIENT_IMAGES].sort().values
    images = SomeImages(source, rows.numpy().astype(np.int64))
    network = Encoder(encoder).to(device)
    spans = [
        range(first, min(first + CPU_BATCH, len(images)))
        for first in range(0, len(images), CPU_BATCH)
    ]
    batches = read_batches(
        images, spans, batch_size=CPU_BATCH, image_size=encoder.image_size, device=device
    )
    found = [torch.empty(0, network.num_dims, device=device)]
    with closing(batches):
        for pixels, readable in batches:
            # Rounded as the pool's embeddings are.
            embedded = network(pixels)[: len(readable)].half().float()
            found.append(embedded[readable.to(embedded.device)])
    return torch.cat(found)
