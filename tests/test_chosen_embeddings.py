import shutil

import numpy as np
import pytest
import torch

from ecos_pl.chosen_embeddings import ImageEmbedder, RandomViews, embed_chosen
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import SomeImages, scan_folder, to_tensor

SPEC = EncoderSpec("mobilenetv3_small_050", "random", 32)
GRID = EncoderSpec("mobilenetv3_small_050", "random", 32, "grid")
INDICES = np.array([7, 3, 120, 250])


@pytest.fixture
def pool(image_tree):
    return scan_folder(image_tree / "pool")


def chosen(pool, folder, encoder=GRID, bank=None):
    return embed_chosen(
        pool,
        INDICES,
        encoder,
        pool_encoder=SPEC,
        pool_bank=bank,
        embedder=ImageEmbedder(folder, device="cpu"),
        seed=3,
    )


def test_the_pools_bank_is_read_where_it_has_these_features(pool, tmp_path):
    bank = np.arange(600, dtype=np.float16).reshape(300, 2)
    found = chosen(pool, tmp_path, SPEC, bank)
    (rows,) = found.chunks()
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, bank[INDICES])
    assert not list(tmp_path.iterdir())


def test_other_features_are_embedded_in_the_order_chosen(pool, tmp_path):
    (rows,) = chosen(pool, tmp_path).chunks()
    images = torch.stack([to_tensor(pool.read(row), 32) for row in INDICES.tolist()])
    np.testing.assert_allclose(rows, Encoder(GRID)(images).numpy(), atol=2e-3)


def test_views_follow_their_image_and_are_the_same_again(pool, tmp_path):
    found = chosen(pool, tmp_path / "a")
    (views,) = found.views(3)
    (rows,) = found.chunks()
    assert views.shape == (4, 4, rows.shape[1])
    order = [int(np.flatnonzero((views[:, 0] == row).all(axis=1))[0]) for row in rows]
    assert order == [0, 1, 2, 3]
    assert len(np.unique(views.reshape(16, -1), axis=0)) == 16
    (again,) = chosen(pool, tmp_path / "b").views(3)
    np.testing.assert_array_equal(again, views)
    images = SomeImages(pool, INDICES)
    drawn = RandomViews(images, 3, 32, seed=3)
    content = torch.stack([to_tensor(drawn.read(place), 32) for place in range(12)])
    expected = Encoder(GRID)(content).reshape(4, 3, -1).numpy()
    np.testing.assert_allclose(views[:, 1:], expected, atol=2e-3)


def test_an_image_that_has_gone_is_one_clear_line(image_tree, tmp_path):
    shutil.copytree(image_tree / "pool", tmp_path / "pool")
    pool = scan_folder(tmp_path / "pool")
    (tmp_path / "pool" / pool.ids[3]).unlink()
    with pytest.raises(ValueError, match=rf"{pool.ids[3]} in .* cannot be now \(1 in all\)"):
        chosen(pool, tmp_path / "cache")
