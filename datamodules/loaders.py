"""Loaders for any number of devices that stop in the middle of an epoch and go on there.

Which images make a batch, and how each is augmented, follows from the seed, the epoch and the
batch's number alone. So a resumed run sees what an undisturbed one would have seen, and the number
of worker processes changes nothing.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

_GRACE_S = 20  # in which a worker process still serves its parent after SIGTERM


class Draw(NamedTuple):
    """One image of a batch.

    Attributes:
        row: Its place in the dataset.
        seed: Of its augmentation; None where there is none.
        counts: False for what only fills up a share, so that all devices have equally many.
    """

    row: int
    seed: int | None = None
    counts: bool = True


class TrainingBatches(Sampler[list[Draw]]):
    """One device's batches of an epoch: whole ones of a seeded order, which all devices share.

    The first ``W · batch_size`` images of the order are the devices' first batches, and so on;
    what is left at the end of an order waits for another epoch. An epoch that has more batches
    than one order gives goes on with a new order.

    Args:
        num_rows: Images.
        batch_size: Images per batch and device; fewer where there are too few.
        seed: Of the orders.
        rank: Which device this is, of ``world_size``.
        world_size: Devices W.

    Attributes:
        num_batches: Batches per epoch: those of one order, unless ``equally_long`` asks for more.

    Raises:
        ValueError: There are fewer images than devices.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if num_rows < world_size:
            raise ValueError(f"{num_rows} training images are too few for {world_size} devices")
        self.num_rows, self.seed, self.rank, self.world_size = num_rows, seed, rank, world_size
        self.batch_size = min(batch_size, num_rows // world_size)
        self.num_batches = self.batches_per_order
        self._epoch, self._start = 0, 0

    @property
    def batches_per_order(self) -> int:
        """Whole batches that each device gets out of one order."""
        return self.num_rows // (self.batch_size * self.world_size)

    @property
    def sampler(self) -> TrainingBatches:
        """Itself: Lightning looks here for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; nothing if it is this one, which ``go_to`` may have entered midway."""
        if epoch != self._epoch:
            self.go_to(epoch, 0)

    def go_to(self, epoch: int, batch: int) -> None:
        """Let the next iteration begin at a batch of an epoch."""
        self._epoch, self._start = epoch, batch

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the next iteration begins."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[Draw]]:
        number, rows, seeds = -1, [], []
        for batch in range(self._start, self.num_batches):
            turn, place = divmod(batch, self.batches_per_order)
            if turn != number:
                number, (rows, seeds) = turn, self._order(turn)
            start = (place * self.world_size + self.rank) * self.batch_size
            part = slice(start, start + self.batch_size)
            yield [Draw(row, seed) for row, seed in zip(rows[part], seeds[part], strict=True)]

    def _order(self, turn: int) -> tuple[list[int], list[int]]:
        key = hashlib.sha256(f"{self.seed} {self._epoch} {turn}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:6], "big"))
        rows = torch.randperm(self.num_rows, generator=generator)
        seeds = torch.randint(2**32, (self.num_rows,), generator=generator)
        return rows.tolist(), seeds.tolist()


class EqualShare(Sampler[Draw]):
    """One device's share of all images, in order, filled up so that all shares are equally long.

    Equally long, since devices that work on one sharded model must do equally many steps; what
    fills up has weight 0, so that metrics come out as on a single device.
    """

    def __init__(self, num_rows: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.num_rows, self.rank, self.world_size = num_rows, rank, world_size

    def __len__(self) -> int:
        return -(-self.num_rows // self.world_size)

    def __iter__(self) -> Iterator[Draw]:
        for place in range(len(self)):
            row = place * self.world_size + self.rank
            yield Draw(min(row, self.num_rows - 1), counts=row < self.num_rows)


class Drawn(Dataset[Any]):
    """A dataset as ``Draw``s ask for it: augmented by the draw's seed, of weight 0 if it fills up.

    Args:
        dataset: Augments with the global generators of torch, numpy and Python. Where draws may
            fill up, its items are ``(image, target, weight, …)``; all but the first two become 0.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: Draw) -> Any:
        if draw.seed is None:
            item = self.dataset[draw.row]
        elif get_worker_info() is not None:  # this process draws nothing else
            _seed_all(draw.seed)
            item = self.dataset[draw.row]
        else:
            states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
            _seed_all(draw.seed)
            try:
                item = self.dataset[draw.row]
            finally:
                torch.set_rng_state(states[0])
                np.random.set_state(states[1])  # noqa: NPY002
                random.setstate(states[2])
        if draw.counts:
            return item
        image, target, *weights = item
        return image, target, *map(torch.zeros_like, weights)


def _seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's augmentations draw from numpy's global generator
    random.seed(seed)


def image_loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    num_workers: int,
    train: bool,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader[Any]:
    """This device's loader: shuffled whole batches for training; in order, all images otherwise.

    Args:
        dataset: See ``Drawn``.
        batch_size: Images per batch on each device.
        num_workers: Processes that read images.
        train: Whether to shuffle.
        seed: Of the order and of the augmentation.
        rank: Which device this is, of ``world_size``.
        world_size: Devices.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if train:
        batches = TrainingBatches(size, batch_size, seed=seed, rank=rank, world_size=world_size)
        how: dict[str, Any] = {"batch_sampler": batches}
    else:
        share = EqualShare(size, rank=rank, world_size=world_size)
        how = {"sampler": share, "batch_size": max(1, min(batch_size, len(share)))}
    return DataLoader(
        Drawn(dataset),
        **how,
        num_workers=num_workers,
        worker_init_fn=_outlast_the_parents_signals,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),  # leaves the global one alone
    )


def equally_long(loaders: dict[str, DataLoader[Any]]) -> dict[str, DataLoader[Any]]:
    """The same training loaders, the shorter ones going through their images more than once."""
    batches = [loader.batch_sampler for loader in loaders.values()]
    for one in batches:
        assert isinstance(one, TrainingBatches)
        one.num_batches = max(len(loader) for loader in loaders.values())
    return loaders


def _outlast_the_parents_signals(worker: int) -> None:
    """Let a worker serve on when a scheduler sends its signal to every process of the job.

    Its parent ends it once the batch is done; should that not happen, it ends by itself.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_GRACE_S))


def place_of(trainer: Any) -> dict[str, int]:
    """``rank`` and ``world_size`` of a trainer's process, or of the only one there is."""
    if trainer is None:
        return {"rank": 0, "world_size": 1}
    return {"rank": trainer.global_rank, "world_size": trainer.world_size}


def default_workers(num_workers: int | None, num_devices: int = 1) -> int:
    """Worker processes: the number given, else this device's share of the cores less one, ≤ 8.

    Cores that a scheduler bound to this process are its own; others it shares with the other
    devices of the machine.
    """
    if num_workers is not None:
        return num_workers
    cores = os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    if mine == cores:
        mine //= max(1, num_devices)
    return max(0, min(8, mine - 1))
