import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import folder_pool
from datamodules.folder_pool import open_folder_pool
from ecos_pl.images import FolderSource, PoolPart, list_folder, scan_folder
from ecos_pl.pool_index import IdTable

LONG_AGO = 10**18  # ns; a directory that changed just now is not trusted yet


def add(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())  # listing does not decode


def age(root: Path) -> None:
    """Set all directories' times back, as if the last change were long ago."""
    for folder, _, _ in os.walk(root):
        os.utime(folder, ns=(LONG_AGO, LONG_AGO))


def assert_same(pool: FolderSource, fresh: FolderSource) -> None:
    assert list(pool.ids) == list(fresh.ids) == sorted(fresh.ids)
    assert list(pool.labels) == list(fresh.labels)
    assert list(pool.domains) == list(fresh.domains)
    assert pool.fingerprint == fresh.fingerprint
    assert pool.root == fresh.root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "pool"
    add(
        root,
        *("a/x/1.png", "a/x/2.JPG", "a/y/1.png", "a.png", "a/0.png", "a-b/z.gif", "a0/q.png"),
        *("b/x/deep/er/1.png", "naïve/日本/猫.png", "top.webp", "a/notes.txt", ".h/1.png"),
        *("a b/x\ny.png", "ab.png", "a/x.png", "a/x/.hidden.png", "b/empty/readme"),
    )
    age(root)
    return root


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Directories listed since."""
    seen: list[str] = []

    def noted(folder: str):
        seen.append(os.path.basename(folder.rstrip("/")))
        return list_folder(folder)

    monkeypatch.setattr(folder_pool, "list_folder", noted)
    return seen


def open_it(root: Path) -> FolderSource:
    return open_folder_pool(root, cache_dir=root.parent / "cache")


def test_a_listing_equals_a_scan_and_is_used_again(root: Path, listed: list[str]) -> None:
    assert_same(open_it(root), scan_folder(root))
    assert len(listed) == 14
    pool = open_it(root)
    assert_same(pool, scan_folder(root))
    assert len(listed) == 14
    assert isinstance(pool.ids, IdTable)


def test_it_reads_and_is_pickled_as_paths(root: Path) -> None:
    for number in range(500):
        add(root, f"many/{number:090d}.png")
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(root / "top.webp", lossless=True)
    cache_dir = root.parent / "cache"
    pool = open_folder_pool(root, cache_dir=cache_dir, licence="CC-BY-4.0")
    content = pickle.dumps(pool)
    assert len(content) < 1000
    other = pickle.loads(content)
    assert other.read(len(pool) - 1).getpixel((0, 0)) == (9, 9, 9)
    assert other.parts == [PoolPart("pool", "CC-BY-4.0", 0, len(pool), pool.fingerprint)]


def test_only_changed_directories_are_listed_again(root: Path, listed: list[str]) -> None:
    first = open_it(root)
    changes = (
        lambda: add(root, "a/x/3.png"),
        lambda: (root / "a/x/1.png").unlink(),
        lambda: (root / "a/x/2.JPG").rename(root / "a/x/0.png"),
    )
    for later, change in enumerate(changes, 1):
        listed.clear()
        change()
        os.utime(root / "a/x", ns=(LONG_AGO, LONG_AGO + later))
        pool = open_it(root)
        assert_same(pool, scan_folder(root))
        assert listed == ["x"]
    assert pool.fingerprint != first.fingerprint


def test_directories_come_go_and_move(root: Path) -> None:
    open_it(root)
    for change in (
        lambda: add(root, "new/one/1.png", "a/x/y/z/1.png"),
        lambda: shutil.rmtree(root / "a/x"),
        lambda: (root / "b").rename(root / "a/b"),
        lambda: (root / "naïve").rename(root / "c"),
        lambda: (root / "top.webp").rename(root / "a/top.webp"),
        lambda: add(root, "top.webp/was/a/file.png"),
    ):
        change()
        assert_same(open_it(root), scan_folder(root))
        assert_same(open_it(root), scan_folder(root))


def test_changes_at_the_moment_of_listing_are_seen(tmp_path: Path) -> None:
    root = tmp_path / "pool"  # every directory is as young as the listing
    add(root, "a/1.png", "b/1.png")
    times = {folder: os.stat(root / folder).st_mtime_ns for folder in ("a", "b", ".")}
    open_it(root)
    add(root, "a/2.png")
    (root / "b/1.png").unlink()
    for folder, time_ns in times.items():  # as a coarse clock would leave them
        os.utime(root / folder, ns=(time_ns, time_ns))
    assert_same(open_it(root), scan_folder(root))


def test_a_file_overwritten_in_place_is_seen(root: Path) -> None:
    first = open_it(root)
    age(root)
    (root / "a/x/1.png").write_bytes(b"other")
    assert os.stat(root / "a/x").st_mtime_ns == LONG_AGO
    second = open_it(root)
    assert_same(second, scan_folder(root))
    os.utime(root / "a/x/1.png", ns=(1, 1))
    third = open_it(root)
    assert_same(third, scan_folder(root))
    assert len({pool.fingerprint for pool in (first, second, third)}) == 3


def test_links(root: Path, listed: list[str]) -> None:
    outside = root.parent / "outside"
    add(outside, "o/1.png")
    (root / "link").symlink_to(outside)
    (root / "a/up").symlink_to(root)
    (root / "a/x/dead").symlink_to(root.parent / "later")
    (root / "dead.png").symlink_to(root / "nothing.png")
    age(root)
    age(outside)
    assert_same(open_it(root), scan_folder(root))
    listed.clear()
    assert_same(open_it(root), scan_folder(root))
    assert set(listed) <= {"x", "pool"}  # where a dead link may come alive
    add(outside, "o/2.png")
    assert_same(open_it(root), scan_folder(root))
    add(root.parent / "later", "l/1.png")
    pool = open_it(root)
    assert_same(pool, scan_folder(root))
    assert "a/x/dead/l/1.png" in pool.ids


def test_any_sequence_of_changes(tmp_path: Path) -> None:
    rng = random.Random(0)
    root = tmp_path / "pool"
    add(root, "0/0.png")
    folders = ["", *"012", "0/1", "0/1/2", "1/2", "1/2/0", "2/2"]
    for _ in range(60):
        for _ in range(rng.randint(0, 3)):
            here = [path for path in root.rglob("*") if rng.random() < 0.3]
            action = rng.random()
            if action < 0.5 or not here:
                place = root / rng.choice(folders)
                if not any(part.is_file() for part in (place, *place.parents)):
                    add(place, f"{rng.randint(0, 5)}{rng.choice(['.png', '', '.txt'])}x.png")
            elif action < 0.7 and here[0].is_file():
                here[0].unlink()
            elif action < 0.8 and here[-1].is_dir():
                shutil.rmtree(here[-1])
            elif here[0].is_file():
                here[0].rename(here[0].with_name(f"{rng.randint(0, 9)}r.png"))
        add(root, "keep.png")
        assert_same(open_it(root), scan_folder(root))


def test_a_damaged_listing_is_made_again(root: Path) -> None:
    open_it(root)
    for name in ("files/ids", "folders/index.json", "folders/end.column", "files/labels"):
        for listing in (root.parent / "cache/pools").glob("folder-*/listing-*"):
            (listing / name).write_bytes(b"")
        assert_same(open_it(root), scan_folder(root))


def test_an_older_listing_serves_for_a_week(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_it(root)
    old_ids = list(first.ids)
    for number in range(5):
        add(root, f"more/{number}.png")
        open_it(root)
    assert list(pickle.loads(pickle.dumps(first)).ids) == old_ids
    monkeypatch.setattr(folder_pool, "_KEPT_NS", 0)
    add(root, "more/5.png")
    assert "more/5.png" in open_it(root).ids
    assert len(list((root.parent / "cache/pools").glob("folder-*/*"))) == 3


def test_refusals(tmp_path: Path) -> None:
    add(tmp_path, "file.png", "empty/notes.txt")
    for folder, reason in [
        ("missing", "does not exist"),
        ("file.png", "is a file"),
        ("empty", "no images below"),
    ]:
        with pytest.raises(ValueError, match=reason) as caught:
            open_folder_pool(tmp_path / folder, cache_dir=tmp_path / "cache")
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("listing*"))


def test_a_pool_that_lost_its_images_is_refused(root: Path) -> None:
    open_it(root)
    for path in root.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match="no images below"):
        open_it(root)
