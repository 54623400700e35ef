"""ImageNet-32 in all its packagings, made here in the official layout; and what breaks of it."""

import pickle
import shutil
import zipfile

import numpy as np
import pytest

from datamodules.imagenet32 import imagenet32
from tests.miniatures import make_imagenet32

PACKAGINGS = ["npz", "compressed", "pickle"]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "imagenet32"


def opened(root, **options):
    return imagenet32(root, cache_dir=root.parent / "cache", **options)


@pytest.mark.parametrize("packed", PACKAGINGS)
def test_every_packaging_gives_the_same_images_and_labels(root, packed):
    images, labels = make_imagenet32(root, packed=packed)
    pool = opened(root, allow_pickle=packed == "pickle")
    assert len(pool) == len(images) == 40
    assert [pool.ids[i] for i in (0, 3, 4, 39)] == [
        *("1/000000", "1/000003", "2/000000", "10/000003")
    ]
    assert list(pool.labels) == [f"class {number:04d}" for number in labels]
    assert list(pool.domains) == [None] * 40
    for i in range(40):
        assert (np.asarray(pool.read(i)) == images[i]).all()
    (part,) = pool.parts
    assert (part.start, part.stop, part.fingerprint) == (0, 40, pool.fingerprint)
    assert "ImageNet" in part.licence
    again = pickle.loads(pickle.dumps(pool))  # as a DataLoader's worker gets it
    assert (np.asarray(again.read(17)) == images[17]).all()


def test_the_fingerprint_is_that_of_the_content(root, tmp_path):
    prints = set()
    for packed in PACKAGINGS:
        make_imagenet32(tmp_path / packed / "x", packed=packed)
        prints.add(opened(tmp_path / packed / "x", allow_pickle=True).fingerprint)
    assert len(prints) == 1
    make_imagenet32(root)
    assert opened(root).fingerprint in prints
    assert opened(root, num_files=9).fingerprint not in prints
    with np.load(root / "train_data_batch_4.npz") as arrays:
        changed = {name: arrays[name].copy() for name in arrays.files}
    changed["data"][0, 0] ^= 1
    np.savez(root / "train_data_batch_4.npz", **changed)
    assert opened(root).fingerprint not in prints


def test_pixels_are_mapped_and_unpacked_once(root):
    make_imagenet32(root)
    pool = opened(root)
    assert not (root.parent / "cache").exists()  # stored: read in place
    pool.read(0)
    assert isinstance(pool._maps[0], np.memmap)
    assert set(pool._maps) == {0}
    shutil.rmtree(root)
    make_imagenet32(root, packed="compressed")
    opened(root)
    kept = sorted((root.parent / "cache/imagenet32").glob("*/data.npy"))
    assert len(kept) == 10
    times = [path.stat().st_mtime_ns for path in kept]
    opened(root)
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_classes_have_names_where_imagenets_list_is_there(root):
    _, labels = make_imagenet32(root)
    names = [f"n{number:08d} {number} word_{number}\n" for number in range(1, 1001)]
    (root / "map_clsloc.txt").write_text("".join(names))
    assert list(opened(root).labels) == [f"n{k:08d} word_{k}" for k in labels]
    (root / "map_clsloc.txt").write_text("".join(names[:500]))
    with pytest.raises(ValueError, match="does not name the classes 1 to 1000"):
        opened(root)


def test_pickles_are_an_opt_in(root):
    make_imagenet32(root, packed="pickle")
    with pytest.raises(ValueError, match=r"data\.allow_pickle=true"):
        opened(root)


def truncate(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip_a_byte(path):
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("data.npy").header_offset + 5000
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


def rewrite(path, **changes):
    with np.load(path) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    np.savez(path, **{key: value for key, value in {**content, **changes}.items() if len(value)})


@pytest.mark.parametrize(
    ("packed", "break_it", "expected"),
    [
        ("npz", shutil.rmtree, r"looked for the folder '.*imagenet32'"),
        ("npz", lambda r: (r / "train_data_batch_9.npz").unlink(), "1 of 10 files are missing"),
        ("pickle", lambda r: (r / "train_data_batch_9").unlink(), "train_data_batch_9 to begin"),
        ("npz", lambda r: truncate(r / "train_data_batch_2.npz", 9000), "half-downloaded"),
        ("npz", lambda r: truncate(r / "train_data_batch_2.npz", 0), "half-downloaded"),
        ("compressed", lambda r: flip_a_byte(r / "train_data_batch_3.npz"), "damaged"),
        ("pickle", lambda r: truncate(r / "train_data_batch_2", 9000), "no whole pickle"),
        ("pickle", lambda r: (r / "train_data_batch_1").write_bytes(b"\x80\x02]."), "dictionary"),
        (
            "npz",
            lambda r: rewrite(r / "train_data_batch_1.npz", data=np.zeros((4, 12288), np.uint8)),
            r"data is uint8 \(4, 12288\)",  # ImageNet-64
        ),
        (
            "npz",
            lambda r: rewrite(r / "train_data_batch_1.npz", data=np.zeros((4, 3072), np.float32)),
            "data is float32",
        ),
        ("npz", lambda r: rewrite(r / "train_data_batch_1.npz", data=[]), r"no .*data\.npy"),
        (
            "npz",
            lambda r: rewrite(r / "train_data_batch_1.npz", labels=np.array([0, 1, 2, 3])),
            "labels are not 1 to 1000",
        ),
        ("npz", lambda r: rewrite(r / "train_data_batch_1.npz", labels=np.array([1])), "labels"),
        (
            "npz",
            lambda r: rewrite(r / "train_data_batch_1.npz", labels=np.array(["a"] * 4, object)),
            "half-downloaded",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_one_line_on_how_to_get_it(root, packed, break_it, expected):
    make_imagenet32(root, packed=packed)
    break_it(root)
    with pytest.raises(ValueError, match=expected) as caught:
        opened(root, allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert "https://image-net.org/download-images" in str(caught.value)
    assert str(root) in str(caught.value)
    kept = root.parent / "cache/imagenet32"
    assert not list(kept.glob(".*"))  # nothing half-written
