"""Embeddings of the chosen images, and of random views of them, as a labeler sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ecos_pl.embedding_bank import CHUNK_ROWS, EmbeddingBank, build_bank
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import ImageSource, SomeImages, to_tensor
from ecos_pl.invariance import random_view
from ecos_pl.once import in_turn
from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.row_blocks import Rows
from ecos_pl.storage import fingerprint_of

MAX_VIEWED_IMAGES = 1500
"""Images whose views are embedded at most: enough for covariances of some hundred dimensions."""


@dataclass(frozen=True)
class ImageEmbedder:
    """How images are embedded on this machine: `build_bank` with everything but the images set.

    Attributes:
        cache_dir: Banks go to `embeddings` in it.
        batch_size: Images per forward pass.
        num_workers: Processes that read images.
        device: Where the encoder runs.
    """

    cache_dir: Path
    batch_size: int = 256
    num_workers: int = 0
    device: torch.device | str = "cpu"

    def bank(
        self, source: ImageSource, encoder: EncoderSpec, *, title: str, ranks: Ranks = ALONE
    ) -> EmbeddingBank:
        """The bank of a source of chosen images, made if it is not there.

        Raises:
            ValueError: One of them could be read when the pool was embedded, but cannot be now.
        """
        folder = self.cache_dir / "embeddings" / f"{source.fingerprint[:16]}-{encoder.key}"
        with in_turn(folder, f"another run is {title}", ranks):
            bank = build_bank(
                folder,
                source,
                Encoder(encoder).to(self.device),
                image_size=encoder.image_size,
                batch_size=self.batch_size,
                num_workers=self.num_workers,
                device=self.device,
                ranks=ranks,
                title=title,
            )
        if len(gone := bank.unreadable()):
            raise ValueError(
                f"{title}: {source.ids[int(gone[0])]} in {source.name} could be read when the pool "
                f"was embedded, but cannot be now ({len(gone)} in all); has the pool changed?"
            )
        return bank


class RandomViews:
    """Random views of images, V of each, as a source of their own: always the same ones.

    Args:
        images: The images.
        num_views: ``V``.
        image_size: Side of a view in pixels.
        seed: Of the views.
    """

    def __init__(self, images: SomeImages, num_views: int, image_size: int, seed: int) -> None:
        self._images, self._num_views = images, num_views
        self._image_size, self._seed = image_size, seed
        self.name = f"views of {images.name}"
        self.ids = [f"{name} ({view})" for name in images.ids for view in range(num_views)]
        self.labels: Sequence[str | None] = [None] * len(self.ids)
        self.domains = self.labels
        facts = [images.fingerprint, num_views, image_size, seed]
        self.fingerprint = fingerprint_of(facts)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Image.Image:
        """One view: of image ``index // V``; raises `UnreadableImage`."""
        place, view = divmod(index, self._num_views)
        own = int(fingerprint_of([self._seed, self._images.ids[place], view])[:15], 16)
        image = to_tensor(self._images.read(place), self._image_size)
        pixels = random_view(image, torch.Generator().manual_seed(own))
        return Image.fromarray(pixels.permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class ChosenEmbeddings:
    """Embeddings of chosen images, and of random views of them.

    Attributes:
        pool: The public images.
        indices: [n] int64, places of the chosen ones.
        encoder: By which they are embedded.
        bank: Holds their embeddings, among others.
        rows: [n] int64, their rows in it.
        embedder: Embeds the views.
        seed: Of the views.
    """

    pool: ImageSource
    indices: npt.NDArray[np.int64]
    encoder: EncoderSpec
    bank: Rows
    rows: npt.NDArray[np.int64]
    embedder: ImageEmbedder
    seed: int

    def chunks(self) -> Iterator[npt.NDArray[np.float32]]:
        """Embeddings [B, D] in the order of ``indices``."""
        for first in range(0, len(self.rows), CHUNK_ROWS):
            yield _float32(self.bank, self.rows[first : first + CHUNK_ROWS])

    def views(self, num_views: int) -> Iterator[npt.NDArray[np.float32]]:
        """Embeddings [B, 1 + V, D] of images and V random views of each; of a sample, if many."""
        generator = torch.Generator().manual_seed(self.seed)
        sample = torch.randperm(len(self.indices), generator=generator)[:MAX_VIEWED_IMAGES].numpy()
        sample.sort()
        images = SomeImages(self.pool, self.indices[sample])
        views = RandomViews(images, num_views, self.encoder.image_size, self.seed)
        bank = self.embedder.bank(views, self.encoder, title="embedding views")
        for first in range(0, len(sample), CHUNK_ROWS // num_views):
            some = sample[first : first + CHUNK_ROWS // num_views]
            of_views = _float32(bank, slice(first * num_views, (first + len(some)) * num_views))
            own = _float32(self.bank, self.rows[some])
            yield np.concatenate([own[:, None], of_views.reshape(len(some), num_views, -1)], axis=1)


def embed_chosen(
    pool: ImageSource,
    indices: npt.NDArray[np.int64],
    encoder: EncoderSpec,
    *,
    pool_encoder: EncoderSpec,
    pool_bank: Rows | None,
    embedder: ImageEmbedder,
    seed: int,
    ranks: Ranks = ALONE,
) -> ChosenEmbeddings:
    """Embed chosen images, unless the pool's bank has them by this encoder already.

    Args:
        pool: The public images.
        indices: [n] int64, places of the chosen ones.
        encoder: With the labeler's features.
        pool_encoder: By which ``pool_bank`` was made.
        pool_bank: [N, D], the pool's embeddings; None where they are not at hand.
        embedder: Does it.
        seed: Of random views.
        ranks: Who shares the work.
    """
    if pool_bank is not None and encoder == pool_encoder:
        return ChosenEmbeddings(pool, indices, encoder, pool_bank, indices, embedder, seed)
    chosen = SomeImages(pool, indices)
    bank = embedder.bank(chosen, encoder, title="embedding the proxy set", ranks=ranks)
    return ChosenEmbeddings(pool, indices, encoder, bank, np.arange(len(indices)), embedder, seed)


def _float32(bank: Rows, rows: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.float32]:
    return np.asarray(bank[rows], np.float32)
