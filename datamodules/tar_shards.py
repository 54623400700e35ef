"""WebDataset tar shards as a pool, read in place: any image at any time, nothing unpacked.

An index built once says where in which shard each image lies. It is put together from one piece
per shard, so that an interrupted build goes on, and only shards that changed are gone through
again.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from datamodules.shard_list import list_shards
from datamodules.shard_pieces import Shard, ShardPieces
from datamodules.tar_scan import split_key
from ecos_pl.images import PoolPart, UnreadableImage, decode_image
from ecos_pl.pool_index import open_index, write_index
from ecos_pl.progress import progress_bar
from ecos_pl.storage import committed_folder, fingerprint_of

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 64
"""Shards that one process keeps open: each takes a file descriptor, of which 1,024 are usual."""

_VERSION = 1  # raise it whenever the same shards give other ids or labels


def open_tar_shards(
    spec: str, *, cache_dir: Path, licence: str | None = None, num_workers: int | None = None
) -> TarShards:
    """The images in WebDataset shards; the first time, an index of them is built.

    Ids are `SHARD/MEMBER`, as in `00012.tar/000120034.jpg`; labels and domains are those of
    `tar_scan.scan_shard`. The fingerprint covers each shard's name, size and modification time.
    While building, memory grows with the largest shard, not with their number.

    Args:
        spec: Which shards: see `shard_list.list_shards`.
        cache_dir: The index goes to `pools` in it: about 100 bytes per image, and as much again
            for the pieces.
        licence: Under which terms the images may be used, where known.
        num_workers: Processes that go through shards; 0 for none, None to decide by the work.

    Raises:
        ValueError: One line: no shards, a compressed one, a key twice in one shard, or no image
            in any of them.
    """
    paths = list_shards(spec)
    root = Path(os.path.commonpath([path.parent for path in paths]))
    shards = [_listed(path, root) for path in paths]
    facts = [[shard.name, shard.size, shard.mtime_ns] for shard in shards]
    fingerprint = fingerprint_of({"version": _VERSION, "shards": facts})
    pools = cache_dir / "pools"
    folder = pools / f"tar-{fingerprint[:16]}"
    if open_index(folder / "images") is None or open_index(folder / "shards") is None:
        pieces = ShardPieces(pools / "tar-pieces")
        log.info("indexing %d shards; the index is kept in %s", len(shards), folder)
        _make_pieces(pieces, shards, num_workers)
        shutil.rmtree(folder, ignore_errors=True)  # damaged
        _join(folder, pieces, shards, fingerprint)
    return TarShards(folder, root, spec, licence)


def _listed(path: Path, root: Path) -> Shard:
    stat = path.stat()
    return Shard(path, path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns)


def _make_pieces(pieces: ShardPieces, shards: Sequence[Shard], num_workers: int | None) -> None:
    with progress_bar("indexing the pool", len(shards), "shards") as advance:
        todo = [shard for shard in shards if not pieces.has(shard)]
        advance(len(shards) - len(todo))
        for _ in pieces.make_all(todo, num_workers):
            advance(1)


def _join(folder: Path, pieces: ShardPieces, shards: Sequence[Shard], fingerprint: str) -> None:
    damaged: list[str] = []
    ends: list[int] = []
    with committed_folder(folder) as aside:
        with write_index(aside / "images", ("shard", "offset", "size")) as images:
            images.facts["fingerprint"] = fingerprint
            for row, shard in enumerate(shards):
                piece = pieces.load(shard)
                if piece is None:
                    raise ValueError(f"shard {str(shard.path)!r} changes while it is indexed")
                if piece.damage:
                    damaged.append(f"{str(shard.path)!r}: {piece.damage}")
                images.add(
                    [f"{shard.name}/{member}" for member in piece.members],
                    piece.labels,
                    piece.domains,
                    shard=[row] * len(piece.members),
                    offset=piece.offsets,
                    size=piece.sizes,
                )
                ends.append(images.num_rows)
        if not images.num_rows:
            reason = damaged[0] if damaged else f"{len(shards)} shards, no image member"
            raise ValueError(f"no readable images in the shards: {reason}")
        with write_index(aside / "shards", ("size", "mtime_ns", "end")) as table:
            table.add(
                [shard.name for shard in shards],
                size=[shard.size for shard in shards],
                mtime_ns=[shard.mtime_ns for shard in shards],
                end=ends,
            )
    if damaged:
        log.warning(
            "%d of %d shards are damaged; the images before the damage are used: %s",
            len(damaged),
            len(shards),
            damaged[0] + (" …" if len(damaged) > 1 else ""),
        )


class TarShards:
    """Images in tar shards; made by `open_tar_shards`. A pickled one is a few paths.

    Safe to use from several threads and in processes forked or spawned from this one.

    Attributes:
        name: What the user calls the pool.
        ids: [N], `SHARD/MEMBER`, in the order of the shards and of the files in each.
        labels: [N], class name or number as text, or None.
        domains: [N], domain name or None.
        fingerprint: see `open_tar_shards`.
        parts: The one pool, under the name of the folder that holds the shards.
    """

    def __init__(self, folder: Path, root: Path, name: str, licence: str | None) -> None:
        images, shards = open_index(folder / "images"), open_index(folder / "shards")
        if images is None or shards is None:
            raise ValueError(f"the index of the shards in {str(folder)!r} is gone or damaged")
        self._folder, self._root, self.name, self._licence = folder, root, name, licence
        self._shards, self._end = shards.ids, shards.column("end")
        self._shard, self._offset = images.column("shard"), images.column("offset")
        self._size = images.column("size")
        self.ids, self.labels, self.domains = images.ids, images.labels, images.domains
        self.fingerprint: str = images.facts["fingerprint"]
        self.parts = [PoolPart(root.name, licence, 0, len(self), self.fingerprint)]
        stamps = shards.column("size"), shards.column("mtime_ns")
        self._files = _OpenFiles(root, self._shards, *stamps)

    def __reduce__(self) -> tuple[Callable[..., TarShards], tuple[Path, Path, str, str | None]]:
        return TarShards, (self._folder, self._root, self.name, self._licence)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"TarShards({self.name!r}, {len(self)} images in {len(self._shards)} shards)"

    def read(self, index: int) -> Image.Image:
        """The image at `index` in mode RGB; raises `UnreadableImage`."""
        return decode_image(self.read_bytes(index), str(self._root / self.ids[index]))

    def read_bytes(self, index: int) -> bytes:
        """The image's file as it is in the shard; raises `UnreadableImage`."""
        size, offset = int(self._size[index]), int(self._offset[index])
        try:
            file = self._files.get(int(self._shard[index]))
            content = file.read(offset, size)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # says nothing about the image
                raise
            content, reason = b"", error.strerror
        else:
            reason = "the shard ends before it" if size else "the file is empty"
        if len(content) != size or not size:
            raise UnreadableImage(f"cannot read image {self.ids[index]!r}: {reason}")
        return content

    def row(self, shard: str, key: str) -> int:
        """The place of a sample: by its shard's path below the common folder, and its key.

        Raises:
            KeyError: There is no such shard, or no image with this key in it.
        """
        try:
            number = list(self._shards).index(shard)
        except ValueError:
            raise KeyError(shard) from None
        start = int(self._end[number - 1]) if number else 0
        for row, name in enumerate(self.ids[start : int(self._end[number])], start):
            if split_key(name[len(shard) + 1 :])[0] == key:
                return row
        raise KeyError(key)


class _OpenFile:
    """A shard's descriptor, closed when nobody uses it any more.

    Raises:
        OSError: It cannot be opened, or is not the file that was indexed.
    """

    def __init__(self, path: Path, size: int, mtime_ns: int) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)
        stat = os.fstat(self._descriptor)
        if (stat.st_size, stat.st_mtime_ns) != (size, mtime_ns):
            raise OSError(errno.ESTALE, "the shard changed since it was indexed: start again")

    def read(self, offset: int, size: int) -> bytes:
        """As many bytes from `offset` as there are, at most `size`."""
        content = os.pread(self._descriptor, size, offset)
        while len(content) < size:  # one call may bring less, of 2 GiB or more for certain
            more = os.pread(self._descriptor, size - len(content), offset + len(content))
            if not more:
                break
            content += more
        return content

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class _OpenFiles:
    """The last used of many files, open.

    A file that is pushed out stays open as long as another thread reads from it. A forked process
    begins with none, and with a lock of its own: the parent's may be held at that moment.

    Args:
        root: Folder of the files.
        names: Their paths below it.
        sizes: In bytes, when they were indexed.
        mtimes_ns: Their modification times then.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        sizes: npt.NDArray[np.int64],
        mtimes_ns: npt.NDArray[np.int64],
    ) -> None:
        self._root, self._names, self._sizes, self._mtimes_ns = root, names, sizes, mtimes_ns
        self._start_afresh()

    def get(self, number: int) -> _OpenFile:
        """Open a file, or find it open."""
        if self._process != os.getpid():
            self._start_afresh()
        with self._lock:
            file = self._files.pop(number, None) or self._open(number)
            self._files[number] = file  # last: most recently used
            if len(self._files) > MAX_OPEN_SHARDS:
                self._files.popitem(last=False)
        return file

    def _open(self, number: int) -> _OpenFile:
        path = self._root / self._names[number]
        return _OpenFile(path, int(self._sizes[number]), int(self._mtimes_ns[number]))

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._process = os.getpid()
