"""A folder of millions of images as a pool: its listing is kept, and checked before it is used.

Listing a million files takes seconds on a local disk and up to an hour on network storage, for
each file's size and time has to be asked for. A directory's own modification time tells whether
anything in it came, went or was renamed, so one question per directory replaces one per file.
What it does not tell is that a file was overwritten in place: for that, a sample of the files is
looked at. Whoever overwrites single images in place deletes the listing, whose folder the progress
messages name, or touches the directory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ecos_pl.images import (
    FolderEntries,
    FolderSource,
    ImageFile,
    class_and_domain,
    existing_folder,
    facts_of_files,
    list_folder,
    no_images,
)
from ecos_pl.pool_index import IndexWriter, open_index, write_index
from ecos_pl.progress import progress_bar
from ecos_pl.storage import committed_folder, fingerprint_of

log = logging.getLogger(__name__)

SAMPLE_SIZE = 1000
"""Files looked at before a listing is used again: a changed hundredth goes unseen once in 23,000
times, a changed thousandth once in three."""

_THREADS = 8  # questions to the storage that wait for their answers at once
_AHEAD = 16  # directories listed before their turn comes
_BLOCK = 16_384  # rows written at once
_KEPT = 3  # listings, whatever their age
_KEPT_NS = 7 * 24 * 3600 * 10**9  # every listing, as it may serve a run that began with it
_TICK_NS = 2_000_000_000  # the coarsest modification times that file systems keep
_DOUBTFUL = -1  # instead of a directory's time: it alone cannot tell that nothing changed
_LOOP = -2  # a link back up, which is not followed


def open_folder_pool(root: Path, *, cache_dir: Path, licence: str | None = None) -> FolderSource:
    """The images below `root`, as `scan_folder` finds them, from a listing kept in `cache_dir`.

    The fingerprint is the same as a fresh scan's. Directories that changed are listed again, and
    all of them if a sampled file changed. Memory grows with the number of directories (about 300
    bytes each) and with the largest directory, not with the number of images.

    Raises:
        ValueError: no such folder, no image in it, or a name that is not UTF-8.
    """
    root = existing_folder(root)
    kept = cache_dir / "pools" / f"folder-{fingerprint_of(str(root))[:16]}"
    with ThreadPoolExecutor(_THREADS) as threads:
        listing = _newest(kept)
        changed: set[int] = set()
        if listing is not None:
            changed = _changed_folders(listing, root, threads)
            if not _sample_is_unchanged(listing, root, changed, threads):
                listing = None
        if listing is None or changed:
            log.info("listing %s; the listing is kept in %s", root, kept)
            listing = _list_again(root, kept, listing, changed, threads)
    return FolderSource(
        root,
        listing.files.ids,
        listing.files.labels,
        listing.files.domains,
        listing.files.facts["fingerprint"],
        licence,
    )


class _Listing:
    """Files in the order of their paths; directories, each before those in it.

    Args:
        folder: Holds two tables. `folders` has a row per directory, the root's first, with columns
            `mtime_ns` (or _DOUBTFUL, or _LOOP), `end` (the row after the last directory below),
            `first_file` and `end_file` (the rows of the files below). `files` has columns `size`,
            `mtime_ns` and `folder` (each file's directory's row).

    Raises:
        FileNotFoundError: There is no listing, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        files, folders = open_index(folder / "files"), open_index(folder / "folders")
        if files is None or folders is None:
            raise FileNotFoundError(folder)
        self.files, self.folders = files, folders
        self.size, self.mtime_ns = files.column("size"), files.column("mtime_ns")
        self.folder_of = files.column("folder")
        self.folder_mtime_ns, self.end = folders.column("mtime_ns"), folders.column("end")
        self.first_file, self.end_file = folders.column("first_file"), folders.column("end_file")

    def children(self, row: int) -> Iterator[int]:
        """Rows of the directories directly in a directory."""
        child = row + 1
        while child < self.end[row]:
            yield child
            child = int(self.end[child])

    def entries(self, row: int) -> tuple[list[ImageFile], list[str]]:
        """What directly lay in a directory: its images, and the names of its directories."""
        skip = len(_prefix(self.folders.ids[row]))
        first, end = int(self.first_file[row]), int(self.end_file[row])
        own = np.flatnonzero(self.folder_of[first:end] == row) + first
        if len(own) == end - first:
            paths = self.files.ids[first:end]
        else:
            paths = [self.files.ids[index] for index in own.tolist()]
        names = [path[skip:] for path in paths]
        files = map(ImageFile, names, self.size[own].tolist(), self.mtime_ns[own].tolist())
        return list(files), [self.folders.ids[child][skip:] for child in self.children(row)]


def _newest(kept: Path) -> _Listing | None:
    for folder in sorted(kept.glob("listing-*"), reverse=True):
        try:
            return _Listing(folder)
        except FileNotFoundError:
            continue
    return None


def _changed_folders(listing: _Listing, root: Path, threads: ThreadPoolExecutor) -> set[int]:
    """Rows of the directories whose entries are no longer those listed."""

    def is_changed(row: int, path: str, known: int) -> bool:
        try:
            if known == _DOUBTFUL:
                files, folders = listing.entries(row)
                found = list_folder(os.path.join(root, path))
                return (sorted(files), sorted(folders)) != (
                    sorted(found.files),
                    sorted(found.folders),
                )
            return known != _LOOP and os.stat(os.path.join(root, path)).st_mtime_ns != known
        except (OSError, ValueError):
            return True  # gone, or not to be listed: the walk will find out

    known = listing.folder_mtime_ns.tolist()
    rows = range(len(known))
    answers = _in_threads(threads, is_changed, zip(rows, listing.folders.ids, known, strict=True))
    return {row for row, changed in zip(rows, answers, strict=True) if changed}


def _sample_is_unchanged(
    listing: _Listing, root: Path, changed: set[int], threads: ThreadPoolExecutor
) -> bool:
    """Whether files in directories that did not change have the size and time listed."""
    num_files = len(listing.files)
    sample = np.random.default_rng(0).choice(num_files, min(num_files, SAMPLE_SIZE), replace=False)

    def is_unchanged(row: int) -> bool:
        if int(listing.folder_of[row]) in changed:
            return True
        try:
            stat = os.stat(root / listing.files.ids[row])
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (listing.size[row], listing.mtime_ns[row])

    return all(_in_threads(threads, is_unchanged, ((row,) for row in np.sort(sample).tolist())))


def _list_again(
    root: Path,
    kept: Path,
    old: _Listing | None,
    changed: set[int],
    threads: ThreadPoolExecutor,
) -> _Listing:
    """Walk through `root`, taking over from `old` what did not change, and keep the listing."""
    folder = kept / f"listing-{time.time_ns():020d}"
    with (
        committed_folder(folder) as aside,
        progress_bar("listing the pool", None, "images") as advance,
    ):
        with write_index(aside / "files", ("size", "mtime_ns", "folder")) as files:
            walk = _Walk(str(root), old, changed, threads, _FileRows(files, advance))
            walk.go_down("", frozenset(), 0 if old else None)
            files.facts["fingerprint"] = walk.files.finish()
        if not files.num_rows:
            raise no_images(root)
        with write_index(aside / "folders", tuple(walk.columns)) as folders:
            folders.add(walk.paths, **walk.columns)
    for outdated in sorted(kept.glob("listing-*"))[:-_KEPT]:
        if int(outdated.name.partition("-")[2]) < time.time_ns() - _KEPT_NS:
            shutil.rmtree(outdated, ignore_errors=True)
    return _Listing(folder)


class _FileRows:
    """Gathers files, in the order of their paths, into blocks worth writing."""

    def __init__(self, writer: IndexWriter, advance: Callable[[int], None]) -> None:
        self._writer, self._advance = writer, advance
        self._digest = hashlib.sha256()
        self._runs: list[tuple[str, list[ImageFile], int]] = []
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._writer.num_rows + self._num_waiting

    def add(self, prefix: str, files: list[ImageFile], folder_row: int) -> None:
        """Take a run of files in one directory."""
        self._digest.update(facts_of_files(prefix, files))
        self._runs.append((prefix, files, folder_row))
        self._num_waiting += len(files)
        if self._num_waiting >= _BLOCK:
            self._write()

    def finish(self) -> str:
        """Write what is left; returns the fingerprint of all."""
        self._write()
        return self._digest.hexdigest()

    def _write(self) -> None:
        lengths = [len(files) for _, files, _ in self._runs]
        names = [class_and_domain(prefix) for prefix, _, _ in self._runs]
        labels, domains = (
            [pair[kind] for pair, length in zip(names, lengths, strict=True) for _ in range(length)]
            for kind in (0, 1)
        )
        self._writer.add(
            [prefix + file.name for prefix, files, _ in self._runs for file in files],
            labels,
            domains,
            size=[file.size for _, files, _ in self._runs for file in files],
            mtime_ns=[file.mtime_ns for _, files, _ in self._runs for file in files],
            folder=np.repeat([row for _, _, row in self._runs], lengths),
        )
        self._advance(self._num_waiting)
        self._runs, self._num_waiting = [], 0


class _Walk:
    """One way through all directories, in the order of the files' paths.

    Attributes:
        files: Where the files found go.
        paths: Of the directories passed, below the root.
        columns: What `_Listing` says of the directories.
    """

    def __init__(
        self,
        root: str,
        old: _Listing | None,
        changed: set[int],
        threads: ThreadPoolExecutor,
        files: _FileRows,
    ) -> None:
        self._root, self._old, self._changed, self._threads = root, old, changed, threads
        self._recent_ns = time.time_ns() - _TICK_NS
        self.files = files
        self.paths: list[str] = []
        self.columns = {name: array("q") for name in ("mtime_ns", "end", "first_file", "end_file")}

    def go_down(
        self,
        path: str,
        above: frozenset[tuple[int, int]],
        old_row: int | None,
        listed: Future[FolderEntries] | None = None,
    ) -> None:
        """Take in a directory, where `old_row` is its row in the old listing, if it has one."""
        here = listed.result() if listed else self._entries(path, old_row)
        row = len(self.paths)
        self.paths.append(path)
        is_loop = here.identity in above
        for name, value in (
            ("mtime_ns", _LOOP if is_loop else self._trusted_time(here)),
            ("end", row + 1),
            ("first_file", len(self.files)),
            ("end_file", len(self.files)),
        ):
            self.columns[name].append(value)
        if is_loop:
            return
        old_rows = self._old_children(old_row)
        entries = list(here.in_order())
        folders = [entry for entry in entries if isinstance(entry, str)]
        ahead = self._listed_ahead(path, folders, old_rows)
        above |= {here.identity}
        for entry in entries:
            if isinstance(entry, str):
                self.go_down(_prefix(path) + entry, above, old_rows.get(entry), next(ahead))
            else:
                self.files.add(_prefix(path), entry, row)
        self.columns["end"][row] = len(self.paths)
        self.columns["end_file"][row] = len(self.files)

    def _entries(self, path: str, old_row: int | None) -> FolderEntries:
        folder = os.path.join(self._root, path)
        if self._old is None or old_row is None or not self._is_kept(old_row):
            return list_folder(folder)
        stat = os.stat(folder)
        files, folders = self._old.entries(old_row)
        mtime_ns = int(self._old.folder_mtime_ns[old_row])  # of when these were its entries
        return FolderEntries((stat.st_dev, stat.st_ino), mtime_ns, files, folders, False)

    def _is_kept(self, old_row: int) -> bool:
        assert self._old is not None
        return old_row not in self._changed and self._old.folder_mtime_ns[old_row] >= 0

    def _trusted_time(self, here: FolderEntries) -> int:
        """When the directory last changed, if a later change cannot bear the same time."""
        doubtful = here.has_dead_links or here.mtime_ns > self._recent_ns
        return _DOUBTFUL if doubtful else here.mtime_ns

    def _old_children(self, old_row: int | None) -> dict[str, int]:
        if self._old is None or old_row is None:
            return {}
        skip = len(_prefix(self._old.folders.ids[old_row]))
        children = self._old.children(old_row)
        return {self._old.folders.ids[child][skip:]: child for child in children}

    def _listed_ahead(
        self, path: str, folders: list[str], old_rows: dict[str, int]
    ) -> Iterator[Future[FolderEntries]]:
        """Directories next to one another, listed by threads before their turn comes."""
        waiting: deque[Future[FolderEntries]] = deque()
        for name in folders:
            below = _prefix(path) + name
            waiting.append(self._threads.submit(self._entries, below, old_rows.get(name)))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
        yield from waiting


def _prefix(path: str) -> str:
    """What the paths of a directory's entries begin with; the root's path is empty."""
    return f"{path}/" if path else ""


def _in_threads(
    threads: ThreadPoolExecutor,
    function: Callable[..., bool],
    arguments: Iterable[tuple[Any, ...]],
) -> Iterator[bool]:
    """Answers in order; a few questions at once, as each waits for the storage."""
    remaining = iter(arguments)
    while block := list(islice(remaining, _BLOCK)):
        yield from threads.map(lambda one: function(*one), block)
