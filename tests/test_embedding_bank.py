import json
import os
import pickle
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ecos_pl import embedding_bank
from ecos_pl.chunk_file import ChunkFile
from ecos_pl.embedding_bank import EmbeddingBank, build_bank
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.image_reader import ReaderError
from ecos_pl.images import UnreadableImage

SIZE = 8


class Source:
    """Pictures of noise; some cannot be read, one may bring in an interruption."""

    def __init__(self, num=37, unreadable=(), interrupt_at=None):
        self.num, self.unreadable, self.interrupt_at = num, set(unreadable), interrupt_at
        self.name, self.fingerprint, self.labels, self.domains = "noise", "ab", [], []
        self.ids = [str(index) for index in range(num)]
        self.read_indices = []

    def __len__(self):
        return self.num

    def read(self, index):
        self.read_indices.append(index)
        if index == self.interrupt_at:
            raise KeyboardInterrupt
        if index in self.unreadable:
            raise UnreadableImage(f"cannot read {index}")
        pixels = np.random.default_rng(index).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


class TinyEncoder(nn.Module):
    """A fixed linear map; counts the batches and their sizes."""

    num_dims = 5

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3 * SIZE * SIZE, self.num_dims, generator=generator)
        self.batches = []

    @torch.inference_mode()
    def forward(self, images):
        self.batches.append(len(images))
        return nn.functional.normalize((images.flatten(1) / 255 - 0.5) @ self.weight, dim=1)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(embedding_bank, "CHUNK_ROWS", 10)


def build(folder, source=None, encoder=None, *, batch_size=4, **options):
    options = {"image_size": SIZE, **options}
    source = Source() if source is None else source
    with mock.patch.object(embedding_bank, "CPU_BATCH", batch_size):
        return build_bank(folder, source, encoder or TinyEncoder(), **options)


def content(bank):
    return np.concatenate([rows for _, rows in bank.chunks()])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("rows_*")}


def test_rows_are_the_embeddings_of_the_images(tmp_path):
    source, encoder = Source(), TinyEncoder()
    bank = build(tmp_path, source, encoder)
    expected = encoder(
        torch.stack(
            [torch.from_numpy(np.array(source.read(i))).permute(2, 0, 1) for i in range(37)]
        )
    )
    assert content(bank).dtype == np.float16
    assert np.allclose(content(bank), expected.numpy(), atol=1e-3)
    assert bank.num_chunks == 4
    assert [rows for rows, _ in bank.chunks()] == [
        range(10 * c, min(10 * c + 10, 37)) for c in range(4)
    ]
    assert bank.missing_chunks() == []
    assert len(files(tmp_path)) == 8


@pytest.mark.parametrize("num", [0, 1, 9, 10, 11, 20])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_every_size_is_complete(tmp_path, num, batch_size):
    bank = build(tmp_path, Source(num), batch_size=batch_size)
    assert bank.missing_chunks() == []
    assert sum(len(rows) for _, rows in bank.chunks()) == num
    assert bank.unreadable().tolist() == []
    if num:
        assert np.isfinite(content(bank)).all()


@pytest.mark.parametrize("batch_size", [1, 3, 10, 25, 64])
def test_batch_size_changes_no_row(tmp_path, batch_size):
    expected = content(build(tmp_path / "a", Source(unreadable=[12])))
    found = content(build(tmp_path / "b", Source(unreadable=[12]), batch_size=batch_size))
    assert np.allclose(found, expected, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("batch_size", "batches"), [(4, [4] * 11), (6, [5] * 8), (64, [10] * 4), (1, [1] * 37)]
)
def test_batches_are_always_full_and_of_one_chunk(tmp_path, batch_size, batches):
    """Another batch size may round an image's embedding differently."""
    encoder = TinyEncoder()
    build(tmp_path, encoder=encoder, batch_size=batch_size)
    assert encoder.batches == batches


def test_a_complete_bank_is_not_embedded_again(tmp_path):
    build(tmp_path)
    source, encoder, before = Source(), TinyEncoder(), files(tmp_path)
    build(tmp_path, source, encoder)
    assert encoder.batches == []
    assert source.read_indices == []
    assert files(tmp_path) == before


@pytest.mark.parametrize("interrupt_at", [0, 9, 13, 25, 36])
def test_an_interrupted_bank_goes_on(tmp_path, interrupt_at):
    build(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "halves", Source(interrupt_at=interrupt_at))
    bank = EmbeddingBank(tmp_path / "halves", 37, 5)
    done = len(files(tmp_path / "halves")) // 2 if (tmp_path / "halves").exists() else 0
    # All whole chunks, but for the batches that threads were working on.
    threads = torch.get_num_threads() + 1
    assert max(0, interrupt_at - 4 * threads - 10) // 10 <= done <= interrupt_at // 10
    assert bank.missing_chunks() == list(range(done, 4))
    source, encoder = Source(), TinyEncoder()
    build(tmp_path / "halves", source, encoder)
    assert source.read_indices == list(range(10 * done, 37))
    assert len(encoder.batches) == sum(
        -(-len(bank.rows_of(chunk)) // 4) for chunk in range(done, 4)
    )
    assert files(tmp_path / "halves") == files(tmp_path / "whole")


def flip(path):
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)


DAMAGES = {
    "flipped": lambda rows, sidecar: flip(rows),
    "truncated": lambda rows, sidecar: rows.write_bytes(rows.read_bytes()[:-3]),
    "empty": lambda rows, sidecar: rows.write_bytes(b""),
    "no rows": lambda rows, sidecar: rows.unlink(),
    "no sidecar": lambda rows, sidecar: sidecar.unlink(),
    "garbled sidecar": lambda rows, sidecar: sidecar.write_bytes(b"\xff{"),
    "truncated sidecar": lambda rows, sidecar: sidecar.write_bytes(sidecar.read_bytes()[:9]),
    "sidecar of nothing": lambda rows, sidecar: sidecar.write_text("null"),
    "sidecar without checksum": lambda rows, sidecar: sidecar.write_text('{"unreadable": []}'),
    "sidecar of a list": lambda rows, sidecar: sidecar.write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_chunk_is_rebuilt_and_no_other(tmp_path, damage):
    build(tmp_path, Source(unreadable=[11]))
    before = files(tmp_path)
    rows = tmp_path / "rows_0000000010.npy"
    DAMAGES[damage](rows, rows.with_suffix(".json"))
    assert files(tmp_path) != before
    source = Source(unreadable=[11])
    bank = build(tmp_path, source)
    assert source.read_indices == list(range(10, 20))
    assert files(tmp_path) == before
    assert bank.unreadable().tolist() == [11]


def test_chunks_that_do_not_adjoin_are_rebuilt(tmp_path):
    build(tmp_path)
    before = files(tmp_path)
    for first in (0, 20, 30):
        (tmp_path / f"rows_{first:010d}.npy").unlink()
    source = Source()
    build(tmp_path, source, batch_size=64)
    assert source.read_indices == [*range(10), *range(20, 37)]
    assert files(tmp_path) == before


RANK = f"""
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from ecos_pl import embedding_bank
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.ranks import Ranks
from test_embedding_bank import Source
embedding_bank.CHUNK_ROWS, embedding_bank.CPU_BATCH = 10, 4
folder, world, rank, victim = Path(sys.argv[1]), *map(int, sys.argv[2:])
encoder = Encoder(EncoderSpec("mobilenetv3_small_050", "random", 32))
store = dist.FileStore(str(folder / f"store-{{world}}-{{victim}}"), world)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
source = Source(95, unreadable=[3, 94])
if rank == victim:
    read = source.read
    def read_or_die(index):
        if index >= 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(index)
    source.read = read_or_die
with Ranks.of_processes() as ranks:
    bank = embedding_bank.build_bank(
        folder / "bank", source, encoder, image_size=32, ranks=ranks
    )
    print(bank.missing_chunks(ranks), bank.unreadable().tolist(), len(bank[:]))
"""


def run_ranks(folder, world, victim=-1):
    """Run so many gloo processes on one bank; return their exit codes and what they printed."""
    folder.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(world), str(rank), str(victim)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        ends = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]


@pytest.mark.slow
def test_any_number_of_processes_makes_the_same_files(tmp_path):
    """One, two of which one is killed, four that go on: the same to the bit."""
    encoder = Encoder(EncoderSpec("mobilenetv3_small_050", "random", 32))
    source = Source(95, unreadable=[3, 94])
    build(tmp_path / "one", source, encoder, image_size=32)
    expected = files(tmp_path / "one")
    assert len(expected) == 20

    ends = run_ranks(tmp_path, 2, victim=1)
    assert ends[1][0] == -signal.SIGKILL
    assert ends[0][0] == 1
    assert "RankError: rank 0 lost another rank of this run" in ends[0][2]
    kept = files(tmp_path / "bank")
    assert 0 < len(kept) < 20
    assert kept.items() <= expected.items()

    for code, out, log in run_ranks(tmp_path, 4):
        assert code == 0, log
        assert out == "[] [3, 94] 95\n"
    assert files(tmp_path / "bank") == expected


KILLED = f"""
import os, random, signal, sys, threading, time
from pathlib import Path
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from ecos_pl import embedding_bank
from test_embedding_bank import Source, TinyEncoder, build
embedding_bank.CHUNK_ROWS, embedding_bank.CPU_BATCH = 10, 4
folder, delay = Path(sys.argv[1]), float(sys.argv[2])
def end():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=end).start()
while True:
    build(folder, Source(2000), num_workers=int(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 1])
def test_killed_at_any_moment_it_goes_on(tmp_path, num_workers):
    rng = np.random.default_rng(num_workers)
    before = 0
    for delay in rng.uniform(0.05, 0.6, 3).tolist():
        command = [sys.executable, "-c", KILLED, str(tmp_path / "a"), str(delay), str(num_workers)]
        assert subprocess.run(command).returncode == -signal.SIGKILL
        found = len(files(tmp_path / "a")) if (tmp_path / "a").exists() else 0
        assert found >= before
        before = found
    bank = build(tmp_path / "a", Source(2000))
    build(tmp_path / "b", Source(2000))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert bank.missing_chunks() == []


def test_a_reader_that_is_killed_is_named(tmp_path):
    class Deadly(Source):
        def read(self, index):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ReaderError, match="was ended from outside, probably for want of memory"):
        build(tmp_path, Deadly(), num_workers=1)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("shard 7 ends early"), "^shard 7 ends early$"),
        (OSError(5, "disk gone"), r"^cannot read images of noise: OSError \[Errno 5\] disk gone$"),
        (MemoryError(), "^cannot read images of noise: MemoryError$"),
    ],
)
def test_an_error_of_a_reader_is_one_line(tmp_path, num_workers, error, said):
    class Faulty(Source):
        def read(self, index):
            if index == 5:
                raise error
            return super().read(index)

    with pytest.raises(ValueError, match=said):
        build(tmp_path, Faulty(), num_workers=num_workers)


def test_the_client_needs_no_torch_distributed_group(tmp_path):
    assert build(tmp_path, title=None).unreadable().tolist() == []


def test_opening_reads_no_chunk(tmp_path, monkeypatch):
    """Only what has changed since is compared with its checksum again."""
    build(tmp_path, Source(unreadable=[14]))
    checked = []
    is_intact = ChunkFile.is_intact
    monkeypatch.setattr(
        ChunkFile, "is_intact", lambda self: checked.append(self.rows.start) or is_intact(self)
    )
    bank = build(tmp_path, Source(unreadable=[14]))
    assert (checked, bank.unreadable().tolist()) == ([], [14])
    os.utime(tmp_path / "rows_0000000020.npy", ns=(0, 1))  # as a copy would
    for expected in ([20], [20]):
        build(tmp_path, Source(unreadable=[14]))
        assert checked == expected


def test_a_chunk_written_later_counts(tmp_path):
    """A note of what was complete must not outlive it."""
    bank = build(tmp_path)
    bank.write_chunk(1, np.full((10, 5), np.nan, np.float16))
    assert bank.unreadable().tolist() == list(range(10, 20))
    bank.finish()
    assert EmbeddingBank(tmp_path, 37, 5).unreadable().tolist() == list(range(10, 20))


def test_slices_and_row_numbers_read_like_an_array(tmp_path):
    bank = build(tmp_path, Source(unreadable=[3]))
    array = content(bank)
    assert (bank.shape, len(bank), bank.dtype) == ((37, 5), 37, np.float16)
    slices = [(None,), (3,), (7, 31), (10, 20), (20, 10), (9, 10), (-5, None), (0, 99), (40, 50)]
    for wanted in [slice(*s) for s in slices] + [slice(None, None, 3), slice(30, 2, -4)]:
        assert np.array_equal(bank[wanted], array[wanted], equal_nan=True)
        assert bank[wanted].shape == array[wanted].shape
    rng = np.random.default_rng(0)
    for size in (0, 1, 5, 400):
        wanted = rng.integers(0, 37, size)
        assert np.array_equal(bank[wanted], array[wanted], equal_nan=True)
    for wanted in ([37], [-1], [5, 99]):
        with pytest.raises(IndexError, match="of 37"):
            bank[np.array(wanted)]
    again = pickle.loads(pickle.dumps(bank))
    assert np.array_equal(again[:], array, equal_nan=True)


def test_other_chunk_sizes(tmp_path):
    rows = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float16)
    bank = EmbeddingBank(tmp_path, 100, 3, chunk_rows=64)
    for chunk in range(bank.num_chunks):
        held = bank.rows_of(chunk)
        bank.write_chunk(chunk, rows[held.start : held.stop])
    assert (bank[:] == rows).all()
    assert bank.missing_chunks() == []
    # The same files under another number of rows are no bank.
    assert EmbeddingBank(tmp_path, 100, 3, chunk_rows=32).missing_chunks() == [0, 1, 2, 3]
    assert EmbeddingBank(tmp_path, 90, 3, chunk_rows=64).missing_chunks() == [1]


def test_reading_a_missing_or_short_chunk_is_one_line(tmp_path):
    bank = build(tmp_path)
    path = tmp_path / "rows_0000000010.npy"
    path.write_bytes(path.read_bytes()[:99])
    for wanted in (slice(5, 15), np.array([12])):
        with pytest.raises(ValueError, match="does not hold 10 × 5 rows"):
            bank[wanted]
    path.unlink()
    for wanted in (slice(5, 15), np.array([12])):
        with pytest.raises(ValueError, match=r"cannot read .*rows_0000000010.npy: No such file"):
            bank[wanted]


def test_reading_a_bank_holds_little_memory(tmp_path):
    """Chunks are let go: 30 MB read, of which a few are held at a time."""
    bank = EmbeddingBank(tmp_path, 120_000, 128, chunk_rows=4096)
    for chunk in range(bank.num_chunks):
        bank.write_chunk(chunk, np.ones((len(bank.rows_of(chunk)), 128), np.float16))
    program = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
import numpy as np
from ecos_pl.embedding_bank import EmbeddingBank
bank = EmbeddingBank(Path({str(tmp_path)!r}), 120_000, 128, chunk_rows=4096)
bank[:10], bank[np.arange(10)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for first in range(0, 120_000, 1000):
    assert bank[first : first + 1000].sum(dtype=float) == 128_000
for first in range(0, 120_000, 1000):
    assert bank[np.arange(first, first + 1000)].sum(dtype=float) == 128_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert int(grown) < 8_000  # kB


def test_unreadable_images_are_nan_and_listed(tmp_path):
    bad = [0, 9, 10, 19, 36]
    found = content(bank := build(tmp_path, Source(unreadable=bad)))
    assert bank.unreadable().tolist() == bad
    assert bank.unreadable().dtype == np.int64
    assert np.flatnonzero(np.isnan(found).any(1)).tolist() == bad
    assert np.isnan(found[bad]).all()
    good = np.setdiff1d(np.arange(37), bad)
    assert (found[good] == content(build(tmp_path / "good"))[good]).all()


def test_other_errors_of_a_source_are_not_hidden(tmp_path):
    class Broken(Source):
        def read(self, index):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        build(tmp_path, Broken())


def test_rows_in_the_order_asked(tmp_path):
    bank = build(tmp_path, Source(unreadable=[3]))
    everything = content(bank).astype(np.float32)
    for wanted in ([36, 0, 36, 19, 20, 3, 0], list(range(37)), [5], []):
        indices = np.array(wanted, np.int64)
        found = bank.rows(indices)
        assert found.dtype == np.float32
        assert found.shape == (len(wanted), 5)
        assert np.array_equal(found, everything[indices], equal_nan=True)


def test_a_worker_process_changes_nothing(tmp_path):
    build(tmp_path / "zero", Source(unreadable=[7]))
    build(tmp_path / "one", Source(unreadable=[7]), num_workers=1)
    assert files(tmp_path / "one") == files(tmp_path / "zero")


def test_a_chunk_of_another_shape_or_type_is_refused(tmp_path):
    bank = EmbeddingBank(tmp_path, 37, 5)
    for rows in (np.zeros((9, 5), np.float16), np.zeros((10, 4), np.float16), np.zeros((10, 5))):
        with pytest.raises(ValueError, match="must hold"):
            bank.write_chunk(0, rows)
    bank.write_chunk(3, np.zeros((7, 5), np.float16))
    assert bank.missing_chunks() == [0, 1, 2]


def test_the_sidecar_says_what_its_chunk_holds(tmp_path):
    build(tmp_path, Source(unreadable=[14]))
    rows = tmp_path / "rows_0000000010.npy"
    sidecar = json.loads(rows.with_suffix(".json").read_text())
    assert sidecar == {"crc32": zlib.crc32(rows.read_bytes()), "unreadable": [14]}
