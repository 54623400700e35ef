"""A pool's embeddings on disk: fixed chunks, each written whole, checked, and resumable."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ecos_pl.images import ImageSource, UnreadableImage, to_tensor
from ecos_pl.progress import progress_bar
from ecos_pl.storage import read_json, write_bytes, write_json

log = logging.getLogger(__name__)

CHUNK_ROWS = 4096
"""Images per chunk file: what an interruption costs at most, and what one read brings in."""


class Embedder(Protocol):
    """What turns images [B, 3, S, S] uint8 into embeddings [B, D] float32: an ``Encoder``."""

    num_dims: int

    def __call__(self, images: Tensor) -> Tensor:
        """Embed one batch."""
        ...


class SourceDataset(Dataset[tuple[int, Tensor]]):
    """Some images of a source as ``(index, [3, S, S] uint8)``; index -1 marks an unreadable one."""

    def __init__(self, source: ImageSource, indices: Sequence[int], image_size: int) -> None:
        self.source, self.indices, self.image_size = source, indices, image_size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor]:
        index = self.indices[position]
        try:
            return index, to_tensor(self.source.read(index), self.image_size)
        except UnreadableImage:
            return -1, torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)


class EmbeddingBank:
    """Embeddings [N, D] float16 of one image source under one encoder, in files of 4,096 rows.

    A chunk counts once its sidecar with its checksum stands beside it; a damaged or missing one
    is embedded again. Rows of unreadable images are NaN and listed in ``unreadable``.

    Args:
        folder: Where the chunks lie; its name should carry both fingerprints.
        num_rows: Images ``N`` in the source.
        num_dims: Embedding dimension ``D``.
    """

    def __init__(self, folder: Path, num_rows: int, num_dims: int) -> None:
        self.folder, self.num_rows, self.num_dims = folder, num_rows, num_dims

    @property
    def num_chunks(self) -> int:
        """Number of chunk files of a complete bank."""
        return -(-self.num_rows // CHUNK_ROWS)

    def rows_of(self, chunk: int) -> range:
        """Row numbers that a chunk holds."""
        return range(chunk * CHUNK_ROWS, min((chunk + 1) * CHUNK_ROWS, self.num_rows))

    def missing_chunks(self) -> list[int]:
        """Chunks that are absent or do not match their checksum."""
        return [chunk for chunk in range(self.num_chunks) if not self._is_intact(chunk)]

    def write_chunk(self, chunk: int, embeddings: npt.NDArray[np.float16]) -> None:
        """Store the rows of one chunk; it is there whole or not at all."""
        expected = (len(self.rows_of(chunk)), self.num_dims)
        if embeddings.shape != expected or embeddings.dtype != np.float16:
            raise ValueError(f"chunk {chunk} must be {expected} float16, not {embeddings.shape}")
        buffer = BytesIO()
        np.save(buffer, embeddings, allow_pickle=False)
        content = buffer.getvalue()
        write_bytes(self._path(chunk), content)
        bad = np.flatnonzero(np.isnan(embeddings[:, 0])) + chunk * CHUNK_ROWS
        sidecar = {"crc32": zlib.crc32(content), "unreadable": bad.tolist()}
        write_json(self._path(chunk).with_suffix(".json"), sidecar)

    def chunks(self) -> Iterator[tuple[range, npt.NDArray[np.float16]]]:
        """Yield ``(row numbers, [rows, D] float16 memory map)`` for every chunk in order."""
        for chunk in range(self.num_chunks):
            yield self.rows_of(chunk), np.load(self._path(chunk), mmap_mode="r")

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Read some rows, in the order asked: [len(indices), D] float32."""
        result = np.empty((len(indices), self.num_dims), np.float32)
        for chunk in np.unique(indices // CHUNK_ROWS):
            where = np.flatnonzero(indices // CHUNK_ROWS == chunk)
            stored = np.load(self._path(int(chunk)), mmap_mode="r")
            result[where] = stored[indices[where] - chunk * CHUNK_ROWS]
        return result

    def unreadable(self) -> npt.NDArray[np.int64]:
        """Row numbers of the images that could not be read, ascending."""
        rows = [
            row
            for chunk in range(self.num_chunks)
            for row in read_json(self._path(chunk).with_suffix(".json"))["unreadable"]
        ]
        return np.array(rows, np.int64)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"rows_{chunk * CHUNK_ROWS:010d}.npy"

    def _is_intact(self, chunk: int) -> bool:
        path = self._path(chunk)
        try:
            return bool(
                read_json(path.with_suffix(".json"))["crc32"] == zlib.crc32(path.read_bytes())
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False


def build_bank(
    folder: Path,
    source: ImageSource,
    encoder: Embedder,
    *,
    image_size: int,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    chunks_for_me: Callable[[list[int]], list[int]] = list,
    title: str | None = "embedding the pool",
) -> EmbeddingBank:
    """Embed what is missing of a source; interrupted, it goes on at the last whole chunk.

    Args:
        folder: Of the bank.
        source: The pool.
        encoder: Already on ``device``.
        image_size: Input side in pixels.
        batch_size: Images per forward pass.
        num_workers: Processes that decode images ahead of the encoder.
        device: Where the encoder is.
        chunks_for_me: Picks this process' share of the missing chunks (all of them by default).
        title: Of the progress bar; None shows none, as for a client, whose number of images is
            private.
    """
    bank = EmbeddingBank(folder, len(source), encoder.num_dims)
    todo = chunks_for_me(bank.missing_chunks())
    if not todo:
        return bank
    indices = [row for chunk in todo for row in bank.rows_of(chunk)]
    dataset = SourceDataset(source, indices, image_size)
    on_gpu = torch.device(device).type == "cuda"
    loader = DataLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        pin_memory=on_gpu,
        generator=torch.Generator(),  # else a loader draws from the global one
    )
    pending: list[npt.NDArray[np.float16]] = []
    unfinished = iter(todo)
    chunk = next(unfinished)
    with progress_bar(title, len(indices), "images") as advance:
        for found, images in loader:
            # Always full batches: another batch size may round an image's embedding differently.
            padding = (0, 0, 0, 0, 0, 0, 0, batch_size - len(found))
            padded = nn.functional.pad(images, padding).to(device, non_blocking=True)
            embeddings = encoder(padded)[: len(found)].half()
            embeddings[found.to(device) < 0] = torch.nan
            pending.append(embeddings.cpu().numpy())
            # A batch may end one chunk and begin the next.
            while pending and sum(map(len, pending)) >= (need := len(bank.rows_of(chunk))):
                rows = np.concatenate(pending)
                bank.write_chunk(chunk, rows[:need])
                pending = [rows[need:]] if len(rows) > need else []
                if (following := next(unfinished, None)) is None:
                    break
                chunk = following
            advance(len(found))
    return bank
