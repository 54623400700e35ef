"""Images of a source as batches for an encoder, read ahead so that it need not wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ecos_pl.images import ImageSource, UnreadableImage, to_tensor

Batch = tuple[Tensor, Tensor]
"""Images [B, 3, S, S] and which of the first n are there: [n] bool."""

BATCHES_AHEAD = 4
"""Batches that each reader holds ready: enough for one slow image, little memory."""


class ReaderError(ValueError):
    """Images cannot be read at all, whatever each file holds; the message is one line."""


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


class _Batches(Dataset[Batch | ValueError]):
    """Whole batches, so that a process sends few, large messages: images, and which are there."""

    def __init__(
        self, source: ImageSource, spans: Sequence[range], batch_size: int, image_size: int
    ) -> None:
        self._images = SourceDataset(source, range(len(source)), image_size)
        self._spans, self._batch_size = spans, batch_size

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, position: int) -> Batch | ValueError:
        side = self._images.image_size
        # Always full: another batch size may round an image's embedding differently.
        images = torch.zeros(self._batch_size, 3, side, side, dtype=torch.uint8)
        readable = torch.zeros(len(self._spans[position]), dtype=torch.bool)
        for place, row in enumerate(self._spans[position]):
            try:
                index, image = self._images[row]
            # Returned, not raised: what leaves a process as an exception comes with a page of text.
            except ValueError as error:
                return error
            except (MemoryError, OSError) as error:
                reason = " ".join(f"{type(error).__name__} {error}".split())
                return ReaderError(f"cannot read images of {self._images.source.name}: {reason}")
            if index >= 0:
                images[place], readable[place] = image, True
        return images, readable


def read_batches(
    source: ImageSource,
    spans: Sequence[range],
    *,
    batch_size: int,
    image_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
) -> Generator[Batch, None, None]:
    """Yield ``(images [batch_size, 3, S, S] uint8 on device, readable [rows] bool on the CPU)``.

    A batch shorter than ``batch_size`` is filled up with zeros; so is the place of an unreadable
    image. Readers run ahead: processes, or with ``num_workers`` 0 a thread of this one. Copies to
    a GPU run beside its work.

    Args:
        source: The images.
        spans: Rows of each batch, at most ``batch_size``.
        batch_size: Images per batch.
        image_size: Side in pixels.
        num_workers: Processes that decode.
        device: Where the images should go.

    Raises:
        ReaderError: A reader ran out of memory, was killed, or cannot reach its files.
    """
    if not spans:
        return
    batches = _Batches(source, spans, batch_size, image_size)
    read = _read_in_processes if num_workers else _read_in_thread
    with closing(read(batches, num_workers, torch.device(device))) as found:
        yield from _on_device(found, torch.device(device))


def _read_in_processes(
    batches: _Batches, num_workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    loader = DataLoader(
        batches,
        batch_size=None,  # each item is a batch already
        num_workers=num_workers,
        prefetch_factor=BATCHES_AHEAD,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else a loader draws from the global one
    )
    try:
        for found in loader:
            yield _checked(found)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Caught" in str(error):
            raise  # a bug in a source, with its own traceback
        raise ReaderError(
            "a process that reads images was ended from outside, probably for want of memory: "
            f"{num_workers} of them were running (num_workers)"
        ) from error


def _read_in_thread(
    batches: _Batches, num_workers: int, device: torch.device
) -> Generator[Batch, None, None]:
    ready: queue.Queue[Batch | BaseException] = queue.Queue(BATCHES_AHEAD)
    is_over = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not is_over.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read() -> None:
        try:
            for position in range(len(batches)):
                if is_over.is_set():
                    return
                found = batches[position]
                if device.type == "cuda" and isinstance(found, tuple):
                    found = found[0].pin_memory(), found[1]
                put(found)
        except BaseException as error:  # raised again where it is heard
            put(error)

    thread = threading.Thread(target=read, name="image reader", daemon=True)
    thread.start()
    try:
        for _ in range(len(batches)):
            yield _checked(ready.get())
    finally:
        is_over.set()
        thread.join()


def _checked(found: Batch | BaseException) -> Batch:
    if isinstance(found, BaseException):
        raise found
    return found


def _on_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy batches to a device; to a CUDA one a batch ahead, on a stream beside the encoder's."""
    if device.type != "cuda":
        for images, readable in batches:
            yield images.to(device), readable
        return
    beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []

    def use() -> Batch:
        images, readable, copied = ahead.pop(0)
        here = torch.cuda.current_stream(device)
        here.wait_event(copied)
        images.record_stream(here)  # else its memory is given away while the encoder reads it
        return images, readable

    for images, readable in batches:
        with torch.cuda.stream(beside):
            copy = images.to(device, non_blocking=True)
        ahead.append((copy, readable, beside.record_event()))
        if len(ahead) > 1:
            yield use()
    while ahead:
        yield use()
