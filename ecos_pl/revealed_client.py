"""A simulated client that hides nothing, for the selection strategies that are not private."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ecos_pl.encoder import EncoderSpec
from ecos_pl.images import ImageSource
from ecos_pl.private_images import PrivateImages


@dataclass(frozen=True)
class RevealedClient:
    """Shows the embeddings of a benchmark's own client images; no real client can.

    Attributes:
        source: The client's images.
        folder_of: The simulated client's folder for a probe, by the probe's fingerprint; nothing is
            kept elsewhere.
        device: Where images are embedded.
        batch_size: Images per forward pass.
        num_workers: Processes that decode images.
    """

    source: ImageSource
    folder_of: Callable[[str], Path]
    device: torch.device | str = "cpu"
    batch_size: int = 256
    num_workers: int = 0

    def embeddings(self, probe: str, encoder: EncoderSpec) -> Tensor:
        """Of the client's readable images, [n, D] float32.

        Args:
            probe: Fingerprint of the probe that asks.
            encoder: What to embed with.

        Raises:
            ValueError: No image can be read.
        """
        folder = self.folder_of(probe)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        images = PrivateImages(
            folder,
            self.source,
            device=self.device,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
        )
        embeddings, _ = images.embeddings(encoder)
        if not len(embeddings):
            raise ValueError("none of the client's images can be read")
        return embeddings
