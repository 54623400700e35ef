import json
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ecos_pl import embedding_bank
from ecos_pl.embedding_bank import EmbeddingBank, build_bank
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


def build(folder, source=None, encoder=None, **options):
    options = {"image_size": SIZE, "batch_size": 4, **options}
    source = Source() if source is None else source
    return build_bank(folder, source, encoder or TinyEncoder(), **options)


def content(bank):
    return np.concatenate([rows for _, rows in bank.chunks()])


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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


def test_batches_are_always_full(tmp_path):
    """Another batch size may round an image's embedding differently."""
    encoder = TinyEncoder()
    build(tmp_path, encoder=encoder)
    assert encoder.batches == [4] * 10


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
    done = interrupt_at // 4 * 4 // 10  # whole batches of 4, whole chunks of 10
    bank = EmbeddingBank(tmp_path / "halves", 37, 5)
    assert bank.missing_chunks() == list(range(done, 4))
    source, encoder = Source(), TinyEncoder()
    build(tmp_path / "halves", source, encoder)
    assert source.read_indices == list(range(10 * done, 37))
    assert len(encoder.batches) == -(-(37 - 10 * done) // 4)
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


def test_shares_of_several_processes_make_one_bank(tmp_path):
    build(tmp_path / "one")
    for share in ([0, 2], [1, 3]):
        source = Source()
        build(tmp_path / "two", source, chunks_for_me=lambda todo, share=share: share)
        assert source.read_indices == [r for c in share for r in range(37)[10 * c : 10 * c + 10]]
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert build(tmp_path / "none", chunks_for_me=lambda todo: []).missing_chunks() == [0, 1, 2, 3]


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
        with pytest.raises(ValueError, match="chunk 0 must be"):
            bank.write_chunk(0, rows)
    bank.write_chunk(3, np.zeros((7, 5), np.float16))
    assert bank.missing_chunks() == [0, 1, 2]


def test_the_sidecar_says_what_its_chunk_holds(tmp_path):
    build(tmp_path, Source(unreadable=[14]))
    rows = tmp_path / "rows_0000000010.npy"
    sidecar = json.loads(rows.with_suffix(".json").read_text())
    assert sidecar == {"crc32": zlib.crc32(rows.read_bytes()), "unreadable": [14]}
