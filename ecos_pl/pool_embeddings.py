"""The whole pool's embeddings: one bank for each of its parts, made here or given.

A bank belongs to a part and an encoder, not to a pool: a part that joins another pool, or one that
is added, costs no second pass over the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ecos_pl.columns import Span
from ecos_pl.embedding_bank import EmbeddingBank, build_bank
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import PoolPart, PoolSource
from ecos_pl.once import in_turn
from ecos_pl.precomputed import precomputed_bank, precomputed_fingerprint
from ecos_pl.ranks import ALONE, Ranks


class PartOfPool:
    """The images of one part, as a source of their own.

    Args:
        pool: The whole.
        part: Which of its rows.
    """

    def __init__(self, pool: PoolSource, part: PoolPart) -> None:
        self._pool, self._part = pool, part
        self.name, self.fingerprint = part.name, part.fingerprint
        rows = part.start, part.stop
        # As they were before the part joined others.
        self.ids = Span(pool.ids, *rows, partial(_without, part.prefix))
        self.labels: Sequence[str | None] = Span(pool.labels, *rows)
        self.domains: Sequence[str | None] = Span(pool.domains, *rows)

    def __len__(self) -> int:
        return self._part.stop - self._part.start

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        return self._pool.read(self._part.start + index)


def _without(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


@dataclass(frozen=True)
class PoolEmbeddings:
    """Embeddings [N, D] float16 of a pool, as the rows of its parts' banks.

    Attributes:
        banks: Of the parts, in order.
        key: Names the pool's rows and their encoder.
    """

    banks: Sequence[EmbeddingBank]
    key: str

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return sum(len(bank) for bank in self.banks), self.banks[0].num_dims

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Rows of the pool, in the order asked."""
        starts = np.concatenate([[0], np.cumsum([len(bank) for bank in self.banks])])
        if len(self.banks) == 1:
            return self.banks[0][rows]
        if isinstance(rows, slice):
            first, stop, step = rows.indices(len(self))
            if step != 1:
                return self[np.arange(first, stop, step)]
            if first >= stop:
                return self.banks[0][0:0]
            pieces = [
                bank[max(0, first - start) : stop - start]
                for bank, start in zip(self.banks, starts.tolist(), strict=False)
                if start < stop and start + len(bank) > first
            ]
            return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        result = np.empty((len(rows), self.shape[1]), np.float16)
        owners = np.searchsorted(starts, rows, side="right") - 1
        for owner in np.unique(owners):
            mine = owners == owner
            result[mine] = self.banks[owner][rows[mine] - starts[owner]]
        return result

    def unreadable(self) -> npt.NDArray[np.int64]:
        """Rows of the images that could not be read, ascending."""
        found, start = [], 0
        for bank in self.banks:
            found.append(bank.unreadable() + start)
            start += len(bank)
        return np.concatenate(found)


def embed_pool(
    pool: PoolSource,
    spec: EncoderSpec,
    cache_dir: Path,
    *,
    given: Mapping[str, Path] | None = None,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
) -> PoolEmbeddings:
    """Embed what is missing of the pool; every rank does a share.

    Args:
        pool: The public images.
        spec: The encoder.
        cache_dir: On a disk that all ranks see.
        given: Files of embeddings made elsewhere, by part name; such a part's images are read
            for a check of some of them only.
        batch_size: Images per forward pass.
        num_workers: Processes that decode images ahead of the encoder.
        device: Where the encoder runs.
        ranks: Who shares the work.

    Raises:
        ValueError: Given embeddings do not belong to these images or this encoder.
    """
    given = given or {}
    encoder = Encoder(spec).to(device)
    banks = []
    for part in pool.parts:
        source = PartOfPool(pool, part)
        folder = _bank_folder(part, spec, cache_dir, given)
        title = "embedding the pool" if len(pool.parts) == 1 else f"embedding {part.name}"
        with in_turn(folder, f"another run embeds {part.name}", ranks):
            if part.name in given:
                bank = precomputed_bank(
                    given[part.name], source, encoder, folder, device=device, ranks=ranks
                )
            else:
                bank = build_bank(
                    folder,
                    source,
                    encoder,
                    image_size=spec.image_size,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    device=device,
                    ranks=ranks,
                    title=title,
                )
        banks.append(bank)
    return _of_parts(banks)


def pool_embeddings(
    pool: PoolSource,
    spec: EncoderSpec,
    cache_dir: Path,
    given: Mapping[str, Path] | None = None,
) -> PoolEmbeddings | None:
    """What `embed_pool` left on disk; None if a part of it is no longer there."""
    banks = []
    for part in pool.parts:
        bank = EmbeddingBank.finished(_bank_folder(part, spec, cache_dir, given or {}))
        if bank is None or len(bank) != part.stop - part.start:
            return None
        banks.append(bank)
    return _of_parts(banks)


def _of_parts(banks: Sequence[EmbeddingBank]) -> PoolEmbeddings:
    return PoolEmbeddings(banks, "+".join(bank.folder.name for bank in banks))


def given_facts(given: Mapping[str, Path]) -> dict[str, str]:
    """What determines given embeddings: a fingerprint of the files, by part name."""
    return {name: precomputed_fingerprint(path) for name, path in given.items()}


def _bank_folder(
    part: PoolPart, spec: EncoderSpec, cache_dir: Path, given: Mapping[str, Path]
) -> Path:
    name = f"{part.fingerprint[:16]}-{spec.key}"
    if part.name in given:
        name = f"{name}-{precomputed_fingerprint(given[part.name])[:16]}"
    return cache_dir / "embeddings" / name
