"""A pool's embeddings on disk: fixed chunks, each written whole, checked, and resumable."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ecos_pl.chunk_file import ChunkFile, Rows16
from ecos_pl.image_reader import Batch, read_batches
from ecos_pl.images import ImageSource
from ecos_pl.progress import progress_bar
from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.storage import read_json, write_bytes

CHUNK_ROWS = 4096
"""Rows per chunk file: what an interruption costs at most, and what one read brings in."""

CPU_BATCH = 64
"""Images per forward pass on a CPU at most: one thread's share, which its caches hold."""

_CHECKERS = 4  # threads that compare checksums: the sums run outside Python's lock
_CHUNKS_IN_FLIGHT = 2  # being copied back and written while the encoder goes on


class EmbeddingBank:
    """Rows [N, D] float16, one for each image of a source, in files of ``chunk_rows`` rows.

    Rows of unreadable images are NaN. ``bank[3:9]`` and ``bank[indices]`` read rows into memory;
    no file stays open, so a bank can be sent to other processes and read by several threads.

    Args:
        folder: Where the chunks lie; its name should carry both fingerprints.
        num_rows: Images ``N`` in the source.
        num_dims: Embedding dimension ``D``.
        chunk_rows: Rows per file; ``CHUNK_ROWS`` if not given.
    """

    dtype = np.dtype(np.float16)

    def __init__(
        self, folder: Path, num_rows: int, num_dims: int, chunk_rows: int | None = None
    ) -> None:
        self.folder, self.num_rows, self.num_dims = folder, num_rows, num_dims
        self.chunk_rows = chunk_rows or CHUNK_ROWS

    @classmethod
    def finished(cls, folder: Path) -> EmbeddingBank | None:
        """The bank that lies in a folder, without its encoder; None if it is not whole."""
        try:
            num_rows, num_dims = read_json(folder / "complete.json")["rows"]
        except (ValueError, KeyError, TypeError):
            return None
        bank = cls(folder, num_rows, num_dims)
        return None if bank._note() is None or bank.missing_chunks() else bank

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, D)``."""
        return self.num_rows, self.num_dims

    def __len__(self) -> int:
        return self.num_rows

    def __repr__(self) -> str:
        return f"EmbeddingBank({str(self.folder)!r}, {self.num_rows} × {self.num_dims})"

    # --- reading -------------------------------------------------------------------------------

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> Rows16:
        """Rows in the order asked, [n, D] float16: a slice, or row numbers in any order.

        Raises:
            IndexError: The bank does not have such a row.
            ValueError: A chunk is missing or cut off.
        """
        if not isinstance(rows, slice):
            return self._gather(np.asarray(rows, np.int64))
        start, stop, step = rows.indices(self.num_rows)
        if step != 1:
            return self._gather(np.arange(start, stop, step))
        stop = max(start, stop)
        result: Rows16 = np.empty((stop - start, self.num_dims), np.float16)
        for chunk in range(
            start // self.chunk_rows, -(-stop // self.chunk_rows) if result.size else 0
        ):
            held = self.rows_of(chunk)
            part = range(max(start, held.start), min(stop, held.stop))
            self._file(chunk).read(part, result[part.start - start : part.stop - start])
        return result

    def rows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Read some rows, in the order asked: [len(indices), D] float32."""
        return self[indices].astype(np.float32)

    def chunks(self) -> Iterator[tuple[range, Rows16]]:
        """Yield ``(row numbers, [rows, D] float16)`` for every chunk in order."""
        for rows in map(self.rows_of, range(self.num_chunks)):
            yield rows, self[rows.start : rows.stop]

    def unreadable(self) -> npt.NDArray[np.int64]:
        """Row numbers of the images that could not be read, ascending."""
        if (note := self._note()) is not None:
            return np.array(note["unreadable"], np.int64)
        return np.array(self._unreadable_by_chunk(), np.int64)

    def _gather(self, indices: npt.NDArray[np.int64]) -> Rows16:
        result: Rows16 = np.empty((len(indices), self.num_dims), np.float16)
        if not len(indices):
            return result
        if not 0 <= indices.min() <= indices.max() < self.num_rows:
            raise IndexError(f"rows {indices.min()} to {indices.max()} of {self.num_rows}")
        chunk_of = indices // self.chunk_rows
        order = np.argsort(chunk_of, kind="stable")  # places in `indices`, chunk by chunk
        chunks, firsts = np.unique(chunk_of[order], return_index=True)
        for chunk, places in zip(chunks.tolist(), np.split(order, firsts[1:]), strict=True):
            result[places] = self._file(chunk).take(indices[places])
        return result

    # --- writing and checking ------------------------------------------------------------------

    @property
    def num_chunks(self) -> int:
        """Number of chunk files of a complete bank."""
        return -(-self.num_rows // self.chunk_rows)

    def rows_of(self, chunk: int) -> range:
        """Row numbers that a chunk holds."""
        return range(chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.num_rows))

    def write_chunk(self, chunk: int, rows: Rows16) -> None:
        """Store the rows of one chunk; it is there whole or not at all."""
        self._note_path.unlink(missing_ok=True)
        self._file(chunk).write(rows)

    def missing_chunks(self, ranks: Ranks = ALONE) -> list[int]:
        """Chunks that are absent or do not match their checksum; every rank gets the same list.

        Ranks share the reading. Where `finish` found all chunks whole, those that have kept their
        size and time since are not read again.
        """
        note = self._note() or {"files": [None] * self.num_chunks}
        mine = ranks.block(self.num_chunks)
        with ThreadPoolExecutor(_CHECKERS) as threads:
            whole = threads.map(lambda chunk: self._is_whole(chunk, note["files"][chunk]), mine)
            missing = [chunk for chunk, is_whole in zip(mine, whole, strict=True) if not is_whole]
        found: list[int] = ranks.concat(torch.tensor(missing, dtype=torch.int64)).tolist()
        return found

    def finish(self, ranks: Ranks = ALONE) -> None:
        """Wait until all ranks have written their chunks; note what opening the bank needs.

        With the note, opening the bank reads one file and no chunk.
        """
        ranks.barrier()
        with ranks.first() as is_first:
            if not is_first:
                return
            files = [self._file(chunk).identity() for chunk in range(self.num_chunks)]
            note = self._note()
            if note is None or note["files"] != files:
                unreadable = self._unreadable_by_chunk()
                note = {"rows": self.shape, "files": files, "unreadable": unreadable}
                write_bytes(self._note_path, json.dumps(note).encode())

    @property
    def _note_path(self) -> Path:
        return self.folder / "complete.json"

    def _file(self, chunk: int) -> ChunkFile:
        rows = self.rows_of(chunk)
        return ChunkFile(self.folder / f"rows_{rows.start:010d}.npy", rows, self.num_dims)

    def _is_whole(self, chunk: int, identity: list[int] | None) -> bool:
        file = self._file(chunk)
        try:
            return file.identity() == identity or file.is_intact()
        except OSError:
            return False

    def _unreadable_by_chunk(self) -> list[int]:
        files = map(self._file, range(self.num_chunks))
        return [row for file in files for row in file.unreadable()]

    def _note(self) -> dict[str, Any] | None:
        """What `finish` wrote, unless a chunk was written since."""
        try:
            note = read_json(self._note_path)
            fits = note["rows"] == list(self.shape) and len(note["files"]) == self.num_chunks
            return note if fits and isinstance(note["unreadable"], list) else None
        except (ValueError, KeyError, TypeError):
            return None


class Embedder(Protocol):
    """What turns images [B, 3, S, S] uint8 into embeddings [B, D] float32: an ``Encoder``."""

    num_dims: int

    def __call__(self, images: Tensor) -> Tensor:
        """Embed one batch."""
        ...


def build_bank(
    folder: Path,
    source: ImageSource,
    encoder: Embedder,
    *,
    image_size: int,
    batch_size: int = 256,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    title: str | None = "embedding the pool",
) -> EmbeddingBank:
    """Embed what is missing of a source; interrupted, it goes on at the last whole chunk.

    Ranks share the missing chunks. A batch belongs to one chunk and is always full, so the files
    are the same, to the bit, however many ranks made them and however often they were stopped. On
    a CPU each thread embeds batches of its own: sums inside a network can depend on the number of
    threads that share them, and sharing costs more.

    Args:
        folder: Of the bank, on a disk that all ranks see.
        source: The pool.
        encoder: Already on ``device``.
        image_size: Input side in pixels.
        batch_size: Images per forward pass at most; on a CPU always ``CPU_BATCH``.
        num_workers: Processes that decode images ahead of the encoder; with 0 a thread does.
        device: Where the encoder is.
        ranks: Which share the work.
        title: Of the progress bar; None shows none, as for a client, whose number of images is
            private.

    Raises:
        ReaderError: A reader ran out of memory, was killed, or cannot reach its files.
        RankError: Another rank failed.
    """
    bank = EmbeddingBank(folder, len(source), encoder.num_dims)
    missing = bank.missing_chunks(ranks)
    device = torch.device(device)
    if device.type == "cpu":
        batch_size = CPU_BATCH
    spans = _spans(bank, ranks.share(missing), batch_size)
    batches = read_batches(
        source,
        spans,
        batch_size=_even(bank.chunk_rows, batch_size),
        image_size=image_size,
        num_workers=num_workers,
        device=device,
    )
    embeddings = _embedded_by_threads if device.type == "cpu" else _embedded
    with (
        progress_bar(title if ranks.is_first else None, sum(map(len, spans)), "images") as advance,
        ThreadPoolExecutor(_CHUNKS_IN_FLIGHT, "bank writer") as writers,
        closing(batches),
        closing(embeddings(encoder, batches)) as all_embedded,
    ):
        writing: deque[Future[None]] = deque()
        embedded: list[Tensor] = []  # of one chunk; they stay on the device until it is complete
        found: list[Tensor] = []
        for span, (rows, readable) in zip(spans, all_embedded, strict=True):
            embedded.append(rows)
            found.append(readable)
            chunk = span.start // bank.chunk_rows
            if span.stop == bank.rows_of(chunk).stop:
                content, copied = _fetched(torch.cat(embedded))
                if len(writing) == _CHUNKS_IN_FLIGHT:
                    writing.popleft().result()
                writing.append(
                    writers.submit(_write, bank, chunk, content, torch.cat(found), copied)
                )
                embedded, found = [], []
            advance(len(span))
        for written in writing:
            written.result()
    bank.finish(ranks)
    return bank


def _embedded(encoder: Embedder, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    """Embed batches in order: ``(rows [n, D] float16 on the device, readable [n])``."""
    for batch in batches:
        yield _embed(encoder, batch)


def _embedded_by_threads(
    encoder: Embedder, batches: Iterator[Batch]
) -> Generator[Batch, None, None]:
    """As `_embedded`, each batch by one thread, as many at a time as PyTorch uses threads."""
    num_threads = torch.get_num_threads()
    waiting: deque[Future[Batch]] = deque()
    try:
        with ThreadPoolExecutor(num_threads, "embedding", torch.set_num_threads, (1,)) as threads:
            for batch in batches:
                waiting.append(threads.submit(_embed, encoder, batch))
                if len(waiting) > num_threads:  # one lies ready for whoever is done first
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:  # the setting is that of each thread, but some libraries know one for all
        torch.set_num_threads(num_threads)


def _embed(encoder: Embedder, batch: Batch) -> Batch:
    images, readable = batch
    return encoder(images)[: len(readable)].half(), readable


def _even(chunk_rows: int, batch_size: int) -> int:
    """The batch size, at most this one, of which some fill a chunk with hardly any padding."""
    num_batches = -(-chunk_rows // batch_size)
    return -(-chunk_rows // num_batches)


def _spans(bank: EmbeddingBank, chunks: list[int], batch_size: int) -> list[range]:
    """Rows of each batch: none straddles two chunks."""
    step = _even(bank.chunk_rows, batch_size)
    return [
        range(first, min(first + step, rows.stop))
        for rows in map(bank.rows_of, chunks)
        for first in range(rows.start, rows.stop, step)
    ]


def _fetched(rows: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Start a copy to the CPU; it is complete after the event, for which nobody waits here."""
    copy = rows.to("cpu", non_blocking=rows.is_cuda)
    return copy, torch.cuda.current_stream(rows.device).record_event() if rows.is_cuda else None


def _write(
    bank: EmbeddingBank,
    chunk: int,
    rows: Tensor,
    readable: Tensor,
    copied: torch.cuda.Event | None,
) -> None:
    if copied is not None:
        copied.synchronize()
    embeddings = rows.numpy()
    embeddings[~readable.numpy()] = np.nan
    bank.write_chunk(chunk, embeddings)
