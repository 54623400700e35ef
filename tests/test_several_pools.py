import pickle

import numpy as np
import pytest
from PIL import Image

from datamodules.several_pools import SeveralPools
from ecos_pl.images import PoolPart, UnreadableImage, scan_folder


def make(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, len(root.name), 7)).save(path)
    return scan_folder(root)


@pytest.fixture
def sources(tmp_path):
    first = make(tmp_path / "a", "photo/cat/1.png", "photo/dog/2.png", "x.png")
    second = make(tmp_path / "bb", "cat/1.png")
    third = make(tmp_path / "ccc", "photo/cat/1.png", "photo/cat/2.png")
    return first, second, third


def test_pools_lie_one_after_the_other(sources):
    first, second, third = sources
    pool = SeveralPools([("web", "CC0-1.0", first), ("own", None, second), ("b o x", "x", third)])
    assert len(pool) == 6
    assert list(pool.ids) == [
        *("web/photo/cat/1.png", "web/photo/dog/2.png", "web/x.png"),
        *("own/cat/1.png", "b o x/photo/cat/1.png", "b o x/photo/cat/2.png"),
    ]
    assert list(pool.labels) == ["cat", "dog", None, "cat", "cat", "cat"]
    assert list(pool.domains) == ["photo", "photo", "web", "own", "photo", "photo"]
    assert pool.name == "web + own + b o x"
    assert pool.parts == [
        PoolPart("web", "CC0-1.0", 0, 3, first.fingerprint, "web/"),
        PoolPart("own", None, 3, 4, second.fingerprint, "own/"),
        PoolPart("b o x", "x", 4, 6, third.fingerprint, "b o x/"),
    ]
    for same in (pool, pickle.loads(pickle.dumps(pool))):
        colours = [same.read(i).getpixel((0, 0))[:2] for i in range(6)]
        assert colours == [(0, 1), (1, 1), (2, 1), (0, 2), (0, 3), (1, 3)]
        assert same.fingerprint == pool.fingerprint


def test_ids_without_the_prefix_are_the_parts_own(sources):
    pool = SeveralPools([(f"p{k}", None, source) for k, source in enumerate(sources)])
    for part, source in zip(pool.parts, sources, strict=True):
        own = [name.removeprefix(part.prefix) for name in pool.ids[part.start : part.stop]]
        assert own == list(source.ids)


def test_pools_of_pools_keep_their_parts(sources):
    first, second, third = sources
    inner = SeveralPools([("x", "MIT", first), ("y", None, second)])
    pool = SeveralPools([("z", None, third), ("in", "CC0-1.0", inner)])
    assert [(p.name, p.licence, p.start, p.stop, p.prefix) for p in pool.parts] == [
        ("z", None, 0, 2, "z/"),
        ("in/x", "CC0-1.0", 2, 5, "in/x/"),
        ("in/y", "CC0-1.0", 5, 6, "in/y/"),
    ]
    assert pool.ids[5] == "in/y/cat/1.png"
    assert pool.domains[4] == "x"


def test_the_fingerprint_covers_names_order_and_content_but_not_licences(sources):
    first, second, third = sources

    def of(*pools):
        return SeveralPools(pools).fingerprint

    start = of(("a", None, first), ("b", None, second))
    assert of(("a", "MIT", first), ("b", "x", second)) == start
    others = {
        start,
        of(("b", None, second), ("a", None, first)),
        of(("a", None, first), ("c", None, second)),
        of(("a", None, first), ("b", None, third)),
        of(("a", None, first)),
    }
    assert len(others) == 5


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/broken.png").write_bytes(b"no image")
    pool = SeveralPools([("p", None, scan_folder(tmp_path / "p"))])
    with pytest.raises(UnreadableImage, match=r"broken\.png"):
        pool.read(0)


@pytest.mark.parametrize("name", ["", "a/b", " a", "a\n", "\0"])
def test_names_that_cannot_begin_an_id(sources, name):
    with pytest.raises(ValueError, match="without a slash") as caught:
        SeveralPools([(name, None, sources[0])])
    assert "\n" not in str(caught.value)


def test_what_counts_twice_is_refused(sources):
    first, second, _ = sources
    with pytest.raises(ValueError, match="two pools are called 'a'"):
        SeveralPools([("a", None, first), ("a", None, second)])
    with pytest.raises(ValueError, match="'a' and 'b' hold the same images"):
        SeveralPools([("a", None, first), ("b", None, first)])
    with pytest.raises(ValueError, match="no pools"):
        SeveralPools([])


def test_every_index_is_found(tmp_path):
    rng = np.random.default_rng(0)
    sources = []
    for k in range(5):
        num = int(rng.integers(1, 6))
        sources.append(make(tmp_path / ("f" * (k + 1)), *(f"{i}.png" for i in range(num))))
    pool = SeveralPools([(f"p{k}", None, source) for k, source in enumerate(sources)])
    found = [pool.read(i).getpixel((0, 0))[:2] for i in range(len(pool))]
    assert found == [(i, k + 1) for k, source in enumerate(sources) for i in range(len(source))]
