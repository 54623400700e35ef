"""Embeddings made elsewhere, in place of a pass over the pool: matched by id, checked, and stored.

The client embeds its own images with the declared encoder, so rows of any other encoder would make
its answer worthless. That is why some images are embedded here after all, and compared.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ecos_pl.embedding_bank import EmbeddingBank
from ecos_pl.embedding_files import Array, EmbeddingFile, all_paths, embedding_files
from ecos_pl.encoder import Encoder, describe
from ecos_pl.images import ImageSource, UnreadableImage, to_tensor
from ecos_pl.progress import progress_bar
from ecos_pl.ranks import ALONE, Ranks
from ecos_pl.storage import fingerprint_of

log = logging.getLogger(__name__)

MIN_SIMILARITY = 0.98
"""Median cosine of given and own embeddings of the same images: another decoder or another way to
resize costs less than this leaves, another input size or other weights cost more."""

NUM_COMPARED = 64  # images embedded for that

_BLOCK_IDS = 65_536
_IDS_TRIED = 50_000  # on which column and rule are chosen
_KEY_TYPE = np.uint64

Keys = npt.NDArray[np.uint64]


def precomputed_fingerprint(path: Path) -> str:
    """SHA-256 over name, size and modification time of the files of embeddings and ids.

    Raises:
        ValueError: There are none.
    """
    facts = []
    for file in all_paths(path):
        stat = file.stat()
        facts.append([os.path.relpath(file, path), stat.st_size, stat.st_mtime_ns])
    return fingerprint_of(facts)


def precomputed_bank(
    path: Path,
    source: ImageSource,
    encoder: Encoder,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    ranks: Ranks = ALONE,
    title: str | None = "reading embeddings",
) -> EmbeddingBank:
    """Make a bank of a source's embeddings out of files that hold them.

    An image and a row belong together if their ids are equal; or equal once the folders are left
    out that all of the files' ids (or of each side's) begin with; or if their last parts without
    suffix are equal and unique. One rule holds for all: the first by which most of the files' ids
    match, or else the best. Rows are scaled to unit length. Images without a row count as
    unreadable.

    Interrupted, it goes on at the last whole chunk. Memory: 24 bytes per image and row for the
    matching. Disk: parquet and npz files are unpacked beside the bank while it is made.

    Args:
        path: A file or folder; see ``embedding_files``.
        source: The images; few of them are read.
        encoder: Which should have made them; on ``device``.
        folder: Of the bank; its name should carry ``precomputed_fingerprint``.
        device: Where the encoder is.
        ranks: Which share the work.
        title: Of the progress bar; None shows none.

    Raises:
        ValueError: The files are damaged, do not belong to these images, or were made by another
            encoder.
        RankError: Another rank failed.
    """
    bank = EmbeddingBank(folder, len(source), encoder.num_dims)
    missing = bank.missing_chunks(ranks)
    if missing:
        files = embedding_files(path, encoder.num_dims)
        places_path, unpacked = folder / "places.npy", folder / "unpacked"
        with ranks.first() as is_first:
            if is_first and not places_path.is_file():
                folder.mkdir(parents=True, exist_ok=True)
                aside = folder / "places.part.npy"
                np.save(aside, _match(source, files, path))
                os.replace(aside, places_path)
        for number in ranks.share(range(len(files))):
            _unpack(files[number], unpacked / f"{number:06d}.npy")
        ranks.barrier()
        rows = _GivenRows(files, unpacked)
        places = np.load(places_path, mmap_mode="r")
        with ranks.first() as is_first:
            if is_first:
                _compare(rows, places, source, encoder, device)
        todo = ranks.share(missing)
        num_rows = sum(len(bank.rows_of(chunk)) for chunk in todo)
        with progress_bar(title if ranks.is_first else None, num_rows, "images") as advance:
            for chunk in todo:
                numbers = bank.rows_of(chunk)
                bank.write_chunk(chunk, rows.unit(places[numbers.start : numbers.stop]))
                advance(len(numbers))
    bank.finish(ranks)
    if missing and ranks.is_first:
        shutil.rmtree(unpacked, ignore_errors=True)
        places_path.unlink(missing_ok=True)
    return bank


# --- matching ids ------------------------------------------------------------------------------


class _Rule(NamedTuple):
    """How an id becomes what must be equal."""

    name: str
    own: Callable[[str], str]  # for the pool's ids
    given: Callable[[str], str]  # for the files'


def _match(
    source: ImageSource, files: Sequence[EmbeddingFile], path: Path
) -> npt.NDArray[np.int64]:
    """Row of each image among the files' rows, one file after the other; -1 where there is none."""
    column, rule, own = _best_rule(source, files, path)
    given = np.empty(sum(file.shape[0] for file in files), _KEY_TYPE)
    first = 0
    for file in files:
        num_ids = 0
        for ids in file.ids(column):
            stop = min(num_ids + len(ids), file.shape[0])
            given[first + num_ids : first + stop] = _keys(ids, rule.given)[: stop - num_ids]
            num_ids += len(ids)
        if num_ids != file.shape[0]:
            raise ValueError(
                f"{file.ids_path} holds {num_ids} ids for the {file.shape[0]} rows of {file.path}"
            )
        first += file.shape[0]
    order = np.argsort(given)
    in_order = given[order]
    left = np.searchsorted(in_order, own, "left")
    found = in_order[np.minimum(left, len(in_order) - 1)] == own
    twice = found & (in_order[np.minimum(left + 1, len(in_order) - 1)] == own)
    twice &= left + 1 < len(in_order)
    if twice.any():
        index = int(np.flatnonzero(twice)[0])
        raise ValueError(
            f"{path} holds {int(twice.sum())} ids more than once, {source.ids[index]!r} say "
            f"({rule.name})"
        )
    num_missing = len(own) - int(found.sum())
    if 2 * num_missing > len(own):
        raise _no_match(source, files, column, path, num_missing)
    if num_missing:
        log.warning(
            "%d of %d images of %s have no embedding in %s and are left out, %r say",
            num_missing,
            len(own),
            source.name,
            path,
            source.ids[int(np.flatnonzero(~found)[0])],
        )
    places: npt.NDArray[np.int64] = np.where(found, order[np.minimum(left, len(order) - 1)], -1)
    return places


def _best_rule(
    source: ImageSource, files: Sequence[EmbeddingFile], path: Path
) -> tuple[str, _Rule, Keys]:
    """The column and rule by which most ids of a sample are ids of the pool; and its keys [N]."""
    columns = files[0].id_columns()
    samples = {column: _some_ids(files, column) for column in columns}
    best: tuple[str, _Rule, Keys] | None = None
    most, ambiguous = 0, ""
    for column, rule in _rules(source, files, columns):
        sample = samples[column]
        own = _own_keys(source, rule)
        num_hits = int(np.isin(_keys(sample, rule.given), own).sum())
        if num_hits <= most:
            continue
        if len(np.unique(own)) < len(own):
            ambiguous = "; the last parts match, but are not unique in the pool"
            continue
        most, best = num_hits, (column, rule, own)
        if 2 * num_hits > len(sample):
            break
    if best is None:
        raise _no_match(source, files, columns[0], path, len(source), ambiguous)
    return best


def _rules(
    source: ImageSource, files: Sequence[EmbeddingFile], columns: Sequence[str]
) -> Iterator[tuple[str, _Rule]]:
    """Rules to try, the strictest first, for each column that may hold the ids."""
    for column in columns:
        yield column, _Rule("equal ids", str, str)
    own_folder = _common_folder(_blocks_of(source.ids))
    for column in columns:
        given = _without(_common_folder(block for file in files for block in file.ids(column)))
        yield column, _Rule("equal below the folder of all rows", str, given)
        yield column, _Rule("equal below common folders", _without(own_folder), given)
    for column in columns:
        yield column, _Rule("equal last parts without suffix", _stem, _stem)


def _no_match(
    source: ImageSource,
    files: Sequence[EmbeddingFile],
    column: str,
    path: Path,
    num_missing: int,
    more: str = "",
) -> ValueError:
    given = next(files[0].ids(column), ["nothing"])[0]
    return ValueError(
        f"{path} has no embedding for {num_missing} of {len(source)} images of {source.name}: ids "
        f"there are like {given!r}, the pool's like {source.ids[0]!r}{more}"
    )


def _own_keys(source: ImageSource, rule: _Rule) -> Keys:
    blocks = [_keys(ids, rule.own) for ids in _blocks_of(source.ids)]
    return np.concatenate(blocks) if blocks else np.empty(0, _KEY_TYPE)


def _keys(ids: Iterable[str], rule: Callable[[str], str]) -> Keys:
    """64 bits for each id: enough for 100 million to differ, but for a chance of 1 in 3,000."""
    digests = (
        hashlib.blake2b(rule(text).encode(errors="surrogatepass"), digest_size=8).digest()
        for text in ids
    )
    return np.frombuffer(b"".join(digests), "<u8").astype(_KEY_TYPE)


def _some_ids(files: Sequence[EmbeddingFile], column: str) -> list[str]:
    """Ids from the beginnings of files evenly among them."""
    chosen = files[:: max(1, len(files) // 16)]
    each = _IDS_TRIED // len(chosen)
    return [
        text
        for file in chosen
        for block in islice(file.ids(column), each // 8192 + 1)
        for text in block
    ]


def _blocks_of(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[first : first + _BLOCK_IDS] for first in range(0, len(ids), _BLOCK_IDS))


def _common_folder(blocks: Iterable[Sequence[str]]) -> str:
    """The folders that all ids begin with, as ``a/b/``; "" if there are none."""
    ends: tuple[str, str] | None = None
    for block in blocks:
        if block:
            ends = min(*block, *(ends or block[:1])), max(*block, *(ends or block[:1]))
    if ends is None:
        return ""
    alike = next((k for k, (a, b) in enumerate(zip(*ends, strict=False)) if a != b), len(ends[0]))
    return ends[0][: ends[0].rfind("/", 0, alike) + 1]


def _without(folder: str) -> Callable[[str], str]:
    return lambda text: text.removeprefix(folder)


def _stem(text: str) -> str:
    """``000123`` of ``shard_7/000123.jpg``."""
    return os.path.splitext(text.rpartition("/")[2])[0]


# --- rows --------------------------------------------------------------------------------------


def _unpack(file: EmbeddingFile, to: Path) -> None:
    """Copy rows out of a format that gives them only in order; nothing to do for the others."""
    if file.mapped() is not None or to.is_file():
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    aside = to.with_suffix(f".{os.getpid()}.part")
    dtype: np.dtype[Any] | None = None
    with aside.open("wb") as unpacked:
        for block in file.blocks():
            if dtype is None:
                dtype = np.dtype(np.float16 if block.dtype == np.float16 else np.float32)
                header = {"descr": dtype.str, "fortran_order": False, "shape": file.shape}
                np.lib.format.write_array_header_1_0(unpacked, header)
            unpacked.write(np.ascontiguousarray(block, dtype).tobytes())
    os.replace(aside, to)


class _GivenRows:
    """The rows of all files, one after the other, by number."""

    def __init__(self, files: Sequence[EmbeddingFile], unpacked: Path) -> None:
        self._files, self._unpacked = files, unpacked
        self._starts = np.cumsum([0, *(file.shape[0] for file in files)])

    def unit(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Unit rows [n, D]; NaN where the place is -1.

        Raises:
            ValueError: A row holds NaN or infinity.
        """
        result = np.full((len(places), self._files[0].shape[1]), np.nan, np.float32)
        owners = np.searchsorted(self._starts, places, "right") - 1
        for number in np.unique(owners[places >= 0]).tolist():
            where = np.flatnonzero(owners == number)
            rows = self._mapped(number)[places[where] - self._starts[number]].astype(np.float32)
            if not np.isfinite(rows).all():
                bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))[0]
                row = int(places[where[bad]] - self._starts[number])
                raise ValueError(f"{self._files[number].path} holds NaN or infinity in row {row}")
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            result[where] = rows / np.maximum(norms, 1e-12)  # zero rows stay: blank images have one
        return result.astype(np.float16)

    def _mapped(self, number: int) -> Array:
        mapped = self._files[number].mapped()
        if mapped is None:
            mapped = np.load(self._unpacked / f"{number:06d}.npy", mmap_mode="r")
        return mapped


def _compare(
    rows: _GivenRows,
    places: npt.NDArray[np.int64],
    source: ImageSource,
    encoder: Encoder,
    device: torch.device | str,
) -> None:
    """Embed some images and refuse rows that are not alike."""
    shuffled = np.random.default_rng(0).permutation(len(places))
    chosen: list[int] = []
    images: list[torch.Tensor] = []
    for index in shuffled.tolist():
        if len(images) == NUM_COMPARED:
            break
        if places[index] < 0:
            continue
        try:
            images.append(to_tensor(source.read(index), encoder.spec.image_size))
            chosen.append(index)
        except UnreadableImage:
            continue
    if not images:
        raise ValueError(f"no image of {source.name} can be read to check its embeddings")
    own = encoder(torch.stack(images).to(device)).float().cpu().numpy()
    given = rows.unit(places[np.array(chosen)]).astype(np.float32)
    similarity = float(np.median((own * given).sum(axis=1)))
    if similarity < MIN_SIMILARITY:
        raise ValueError(
            f"these embeddings were not made by {describe(encoder.spec)}: their median similarity "
            f"to its own is {similarity:.3f} on {len(images)} images, not {MIN_SIMILARITY} or more"
        )
