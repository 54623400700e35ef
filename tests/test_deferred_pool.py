import pickle

import pytest
from PIL import Image

from datamodules.deferred_pool import DeferredPool
from ecos_pl.images import FolderSource, scan_folder


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pool/a/b").mkdir(parents=True)
    Image.new("RGB", (3, 2), "red").save(tmp_path / "pool/a/b/x.png")
    return tmp_path / "pool"


def test_it_opens_once_at_the_first_use(folder):
    calls = []

    def opening():
        calls.append(1)
        return scan_folder(folder)

    pool = DeferredPool(opening)
    assert not calls
    assert not pool.is_open
    assert repr(pool) == "DeferredPool(not open)"
    assert not calls
    source = scan_folder(folder)
    assert len(pool) == 1
    for name in ("name", "ids", "labels", "domains", "fingerprint", "parts"):
        assert getattr(pool, name) == getattr(source, name)
    assert pool.read(0).size == (3, 2)
    assert len(calls) == 1
    assert pool.is_open
    assert pool.source is pool.source


def test_pickled_it_is_the_source(folder):
    pool = DeferredPool(lambda: scan_folder(folder))  # a lambda itself cannot be pickled
    copy = pickle.loads(pickle.dumps(pool))
    assert isinstance(copy, FolderSource)
    assert copy == pool.source
    assert copy.read(0).size == (3, 2)


def test_errors_come_through_unchanged_and_it_tries_again(folder):
    wanted = folder.parent / "later"
    pool = DeferredPool(lambda: scan_folder(wanted))
    with pytest.raises(ValueError, match="does not exist"):
        len(pool)
    with pytest.raises(ValueError, match="does not exist"):
        pickle.dumps(pool)
    folder.rename(wanted)
    assert len(pool) == 1
