import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from datamodules.loaders import (
    Drawn,
    EqualShare,
    TrainingBatches,
    default_workers,
    equally_long,
    image_loader,
)


def rows(batches):
    return [[draw.row for draw in batch] for batch in batches]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_devices_share_an_epoch_without_overlap(world_size):
    parts = [
        TrainingBatches(50, 6, seed=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(part) for part in parts} == {50 // (6 * world_size)}
    seen = [row for part in parts for batch in rows(part) for row in batch]
    assert len(seen) == len(set(seen)) == len(parts[0]) * 6 * world_size
    order = rows(TrainingBatches(50, 50, seed=1))[0]
    assert sorted(order) == list(range(50))
    # The first images of the shared order make the devices' first batches.
    first = [row for part in parts for row in rows(part)[0]]
    assert first == order[: 6 * world_size]


def test_an_epoch_entered_midway_is_the_rest_of_it():
    whole = TrainingBatches(50, 6, seed=1)
    whole.set_epoch(3)
    wanted = list(whole)
    later = TrainingBatches(50, 6, seed=1)
    later.go_to(3, 5)
    later.set_epoch(3)  # as Lightning does when it enters the epoch
    assert list(later) == wanted[5:]
    assert len(later) == len(wanted)
    later.set_epoch(4)
    assert len(list(later)) == len(wanted)
    assert rows(later) != rows(whole)


def test_an_epoch_of_more_batches_goes_through_the_images_again():
    loaders = equally_long(
        {
            name: image_loader(Noise(size), 4, num_workers=0, train=True, seed=1)
            for name, size in (("few", 9), ("many", 41))
        }
    )
    assert [len(loader) for loader in loaders.values()] == [10, 10]
    batches = list(loaders["few"].batch_sampler)
    assert rows(batches[:2]) != rows(batches[2:4])
    again = loaders["few"].batch_sampler
    again.go_to(0, 7)
    assert list(again) == batches[7:]


def test_too_few_images_for_the_devices():
    with pytest.raises(ValueError, match="3 training images are too few for 4 devices"):
        TrainingBatches(3, 8, seed=1, rank=0, world_size=4)
    assert rows(TrainingBatches(3, 8, seed=1, world_size=3)) == [[rows_of_three()[0]]]


def rows_of_three():
    return rows(TrainingBatches(3, 8, seed=1))[0]


@pytest.mark.parametrize(("size", "world_size"), [(10, 1), (10, 3), (2, 4), (1, 3), (0, 2)])
def test_every_image_counts_once_and_shares_are_equally_long(size, world_size):
    shares = [list(EqualShare(size, rank=r, world_size=world_size)) for r in range(world_size)]
    assert {len(share) for share in shares} == {-(-size // world_size)}
    counted = [draw.row for share in shares for draw in share if draw.counts]
    assert sorted(counted) == list(range(size))
    assert all(0 <= draw.row < size for share in shares for draw in share)


class Noise(Dataset):
    """Items that draw from all three global generators."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        drawn = [torch.rand(()).item(), float(np.random.rand()), random.random()]  # noqa: NPY002
        return torch.tensor([float(row), *drawn]), torch.ones(2), torch.tensor(1.0)


def test_what_is_drawn_depends_on_the_draw_alone():
    loaders = [
        image_loader(Noise(12), 4, num_workers=number, train=True, seed=1) for number in (0, 2)
    ]
    torch.rand(1)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    items = [torch.cat([batch[0] for batch in loader]) for loader in loaders]
    assert torch.equal(items[0], items[1])
    assert torch.equal(state[0], torch.get_rng_state())
    assert state[1:] == (random.getstate(), np.random.get_state()[1].tobytes())  # noqa: NPY002
    assert len(items[0][:, 1:].unique()) == 36
    loaders[0].batch_sampler.set_epoch(1)
    other = torch.cat([batch[0] for batch in loaders[0]])
    assert not set(items[0][:, 1].tolist()) & set(other[:, 1].tolist())


def test_what_fills_up_has_no_weight():
    loader = image_loader(Noise(5), 4, num_workers=0, train=False, seed=1, rank=1, world_size=2)
    [(images, _, weights)] = loader
    assert images[:, 0].tolist() == [1, 3, 4]
    assert weights.tolist() == [1, 1, 0]
    image, target, weight = Drawn(Noise(5))[next(iter(EqualShare(5)))]
    assert (float(image[0]), len(target), float(weight)) == (0, 2, 1)


class Signalled(Noise):
    """Its worker gets the signals of a job that is stopped."""

    def __getitem__(self, row):
        if get_worker_info() is not None and row == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
        return super().__getitem__(row)


def test_workers_outlast_a_signal_to_the_whole_job():
    loader = image_loader(Signalled(12), 4, num_workers=1, train=False, seed=1)
    assert sum(len(batch[0]) for batch in loader) == 12


def test_default_workers(monkeypatch):
    assert default_workers(3, 4) == 3
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(16), raising=False)
    assert [default_workers(None, devices) for devices in (1, 2, 4, 16)] == [8, 7, 3, 0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4), raising=False)
    assert default_workers(None, 4) == 3  # these four cores are bound to this process alone
