from pathlib import Path

import numpy as np
import pytest
import torch

from ecos_pl.embedding_bank import EmbeddingBank
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import PoolPart, scan_folder
from ecos_pl.pool_embeddings import PartOfPool, PoolEmbeddings, embed_pool

SPEC = EncoderSpec("mobilenetv3_small_050", "random", 32)


def bank(folder: Path, first: int, num_rows: int) -> EmbeddingBank:
    """Rows that count up from ``first``; the last one is unreadable."""
    made = EmbeddingBank(folder, num_rows, 2, chunk_rows=3)
    rows = np.stack([np.arange(first, first + num_rows), np.zeros(num_rows)], axis=1)
    rows[-1] = np.nan
    for chunk in range(made.num_chunks):
        some = made.rows_of(chunk)
        made.write_chunk(chunk, rows[some.start : some.stop].astype(np.float16))
    return made


@pytest.fixture
def three(tmp_path):
    sizes = [(0, 4), (4, 1), (5, 6)]
    return PoolEmbeddings([bank(tmp_path / str(a), a, n) for a, n in sizes], "key")


def test_parts_read_like_one_table(three):
    rows = np.stack([np.arange(11.0), np.zeros(11)], axis=1)
    rows[[3, 4, 10]] = np.nan
    assert three.shape == (11, 2)
    assert len(three) == 11
    assert three.unreadable().tolist() == [3, 4, 10]
    for start in range(12):
        for stop in range(12):
            np.testing.assert_array_equal(three[start:stop], rows[start:stop].astype(np.float16))
    np.testing.assert_array_equal(three[::3], rows[::3].astype(np.float16))
    asked = np.array([10, 0, 5, 5, 4, 9])
    np.testing.assert_array_equal(three[asked], rows[asked].astype(np.float16))
    assert three[np.array([], np.int64)].shape == (0, 2)


def save(folder, rows, ids):
    np.save(folder / "given.npy", rows)
    (folder / "given.txt").write_text("\n".join(ids) + "\n")
    return folder / "given.npy"


class TwoParts:
    """The test's pool, said to come from two places."""

    def __init__(self, source):
        self._source, self.name, self.fingerprint = source, "both", source.fingerprint
        self.ids, self.labels, self.domains = source.ids, source.labels, source.domains
        half = len(source) // 2
        self.parts = [
            PoolPart("one", None, 0, half, "1" * 64),
            PoolPart("two", "CC0-1.0", half, len(source), "2" * 64),
        ]

    def __len__(self):
        return len(self._source)

    def read(self, index):
        return self._source.read(index)


def test_each_part_has_a_bank_of_its_own_and_given_rows_stand_in(image_tree, tmp_path):
    pool = TwoParts(scan_folder(image_tree / "pool"))
    own = embed_pool(pool, SPEC, tmp_path / "own", batch_size=64)
    assert len(list((tmp_path / "own" / "embeddings").iterdir())) == 2
    (broken,) = own.unreadable()
    assert pool.ids[broken] == "clutter/checks/broken.png"

    # The same rows, as files from elsewhere, in another order; the broken image has none.
    second = PartOfPool(pool, pool.parts[1])
    there = [row for row in range(len(second)) if pool.parts[1].start + row != broken]
    there.reverse()
    rows = own[pool.parts[1].start + np.array(there)]
    given = save(tmp_path, rows, [second.ids[row] for row in there])
    both = embed_pool(pool, SPEC, tmp_path / "given", given={"two": given}, batch_size=64)
    assert both.key != own.key
    assert both.unreadable().tolist() == own.unreadable().tolist()
    readable = np.setdiff1d(np.arange(len(pool)), [broken])
    np.testing.assert_allclose(
        both[readable].astype(np.float32), own[readable].astype(np.float32), atol=1e-3
    )


def test_given_rows_of_another_encoder_are_refused(image_tree, tmp_path):
    pool = scan_folder(image_tree / "pool")
    num_dims = Encoder(SPEC).num_dims
    rows = torch.randn(len(pool), num_dims, generator=torch.Generator().manual_seed(0)).numpy()
    given = save(tmp_path, rows, pool.ids)
    with pytest.raises(ValueError, match="were not made by"):
        embed_pool(pool, SPEC, tmp_path, given={pool.parts[0].name: given})
