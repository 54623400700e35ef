"""Against torchvision itself, on its own file layouts: downloaded ones, or small ones made here."""

import multiprocessing
import os
import pickle
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from PIL import Image
from torch.utils.data import DataLoader

from datamodules.torchvision_pool import torchvision_pool
from ecos_pl.image_reader import SourceDataset
from ecos_pl.images import UnreadableImage

TORCHVISION_DATA = Path(__file__).parents[2] / "shared/data"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family != socket.AF_UNIX:  # which DataLoader's workers use
            raise AssertionError("no network in tests")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


def idx(values):
    """The format of MNIST's files (yann.lecun.com/exdb/mnist, "THE IDX FILE FORMAT")."""
    values = np.asarray(values, np.uint8)
    header = bytes([0, 0, 8, values.ndim])
    return header + b"".join(size.to_bytes(4, "big") for size in values.shape) + values.tobytes()


def make_mnist(root, name="MNIST", train=7, test=3, seed=0):
    rng = np.random.default_rng(seed)
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for prefix, num in (("train", train), ("t10k", test)):
        pixels = rng.integers(0, 256, (num, 28, 28))
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(pixels))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(num) % 10))
    return root


def make_folder(root):
    rng = np.random.default_rng(0)
    for name in ("ant/0.png", "ant/1.jpg", "bee/x.png", "cow/y y.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(root / name)
    return root


def test_mnist(tmp_path):
    options = {"root": str(make_mnist(tmp_path))}
    pool = torchvision_pool("MNIST", options, licence="CC-BY-SA-3.0")
    expected = torchvision.datasets.MNIST(tmp_path)
    assert len(pool) == len(expected) == 7
    assert list(pool.ids) == [f"MNIST/train/{i:06d}" for i in range(7)]
    assert list(pool.labels) == list("0123456")
    assert list(pool.domains) == [None] * 7
    assert pool.name == "torchvision:MNIST/train"
    (part,) = pool.parts
    assert (part.name, part.licence, part.start, part.stop) == ("MNIST/train", "CC-BY-SA-3.0", 0, 7)
    for i in range(7):
        assert (np.asarray(pool.read(i)) == np.asarray(expected[i][0].convert("RGB"))).all()
    test = torchvision_pool("mnist", {**options, "split": "test"})
    assert list(test.ids) == [f"MNIST/test/{i:06d}" for i in range(3)]
    same = torchvision_pool("MNIST", {**options, "train": "False"})
    assert same.fingerprint == test.fingerprint != pool.fingerprint


def test_the_fingerprint_follows_the_pixels_not_the_place(tmp_path):
    def of(folder):
        return torchvision_pool("MNIST", {"root": str(folder)}).fingerprint

    first = make_mnist(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b", copy_function=shutil.copyfile)  # with other times
    make_mnist(tmp_path / "c", seed=1)
    assert of(first) == of(tmp_path / "b") != of(tmp_path / "c")
    fashion = make_mnist(tmp_path / "d", "FashionMNIST")
    assert torchvision_pool("FashionMNIST", {"root": str(fashion)}).fingerprint != of(first)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_the_real_files(name):
    if not (TORCHVISION_DATA / name).is_dir():
        pytest.skip(f"{name} is not in {TORCHVISION_DATA}")
    pool = torchvision_pool(name, {"root": str(TORCHVISION_DATA), "split": "test"})
    expected = getattr(torchvision.datasets, name)(TORCHVISION_DATA, train=False)
    assert len(pool) == 10_000
    names = [str(k) for k in range(10)] if name == "MNIST" else expected.classes
    assert list(pool.labels) == [names[k] for k in expected.targets.tolist()]
    for i in (0, 5_000, 9_999):
        assert (np.asarray(pool.read(i))[:, :, 1] == expected.data[i].numpy()).all()


def test_emnist_has_a_split_and_a_side(tmp_path):
    raw = tmp_path / "EMNIST/raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28))
    (raw / "emnist-letters-test-images-idx3-ubyte").write_bytes(idx(pixels))
    (raw / "emnist-letters-test-labels-idx1-ubyte").write_bytes(idx([1, 2, 26, 1]))
    options = {"root": str(tmp_path), "split": "letters", "train": "false"}
    pool = torchvision_pool("EMNIST", options)
    assert pool.ids[3] == "EMNIST/letters/test/000003"
    assert list(pool.labels) == ["a", "b", "z", "a"]
    with pytest.raises(ValueError, match="split=…"):
        torchvision_pool("EMNIST", {"root": str(tmp_path)})
    with pytest.raises(ValueError, match="Valid values are"):
        torchvision_pool("EMNIST", {"root": str(tmp_path), "split": "leters"})


def test_an_image_folder_is_read_as_a_folder_pool_is(tmp_path):
    root = make_folder(tmp_path)
    upright = Image.new("RGB", (8, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(root / "bee/turned.png", exif=exif)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(root / "bee/clear.png")
    (root / "ant/broken.png").write_bytes(b"no image")
    pool = torchvision_pool("ImageFolder", {"root": str(root)})
    expected = torchvision.datasets.ImageFolder(str(root))
    assert list(pool.labels) == [expected.classes[k] for k in expected.targets]
    place = {os.path.basename(path): i for i, (path, _) in enumerate(expected.samples)}
    assert pool.read(place["turned.png"]).size == (4, 8)
    assert pool.read(place["clear.png"]).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(UnreadableImage, match=r"broken\.png"):
        pool.read(place["broken.png"])
    before = pool.fingerprint
    assert torchvision_pool("ImageFolder", {"root": str(root)}).fingerprint == before
    os.utime(root / "ant/0.png", ns=(1, 1))
    assert torchvision_pool("ImageFolder", {"root": str(root)}).fingerprint != before


def test_arrays_of_svhn(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    path = tmp_path / "test_32x32.mat"
    scipy.io.savemat(path, {"X": pixels, "y": np.array([[1], [10], [3], [9]])})
    kind = torchvision.datasets.SVHN
    # The only thing that is not torchvision's own: the checksum of its test file.
    import hashlib

    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(kind.split_list, "test", [*kind.split_list["test"][:2], md5])
    pool = torchvision_pool("SVHN", {"root": str(tmp_path), "split": "test"})
    assert list(pool.labels) == ["1", "0", "3", "9"]
    assert pool.ids[0] == "SVHN/test/000000"
    assert (np.asarray(pool.read(2)) == pixels[:, :, :, 2]).all()


def test_images_that_are_drawn(tmp_path):
    pool = torchvision_pool("FakeData", {"size": "9"})
    expected = torchvision.datasets.FakeData(9)
    assert pool.ids[0] == "FakeData/size=9/000000"
    assert list(pool.labels) == [None] * 9
    assert (np.asarray(pool.read(4)) == np.asarray(expected[4][0])).all()
    again = torchvision_pool("FakeData", {"size": "9"})
    other = torchvision_pool("FakeData", {"size": "9", "random_offset": "5"})
    assert again.fingerprint == pool.fingerprint != other.fingerprint


def test_pickled_it_is_small_and_opens_again(tmp_path):
    pool = torchvision_pool("MNIST", {"root": str(make_mnist(tmp_path, train=2000))})
    content = pickle.dumps(pool)
    assert len(content) < 2000 * 2 + 2000  # two bytes a label, no pixels
    copy = pickle.loads(content)
    assert list(copy.ids) == list(pool.ids)
    assert list(copy.labels) == list(pool.labels)
    assert copy.fingerprint == pool.fingerprint
    assert (np.asarray(copy.read(3)) == np.asarray(pool.read(3))).all()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read(tmp_path, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    pool = torchvision_pool("MNIST", {"root": str(make_mnist(tmp_path))})
    dataset = SourceDataset(pool, range(7), 28)
    expected = [dataset[i][1] for i in range(7)]
    loader = DataLoader(dataset, 4, num_workers=1, multiprocessing_context=method)
    found = torch.cat([images for _, images in loader])
    assert (found == torch.stack(expected)).all()


REFUSED = [
    ("MNITS", {}, "did you mean 'MNIST'"),
    ("nothing like it", {}, "it has "),
    ("VisionDataset", {}, "no data set"),
    ("MNIST", {"spilt": "test"}, "did you mean 'split'"),
    ("MNIST", {"transform": "x"}, "no option 'transform'"),
    ("MNIST", {"split": "val"}, "split=train and test, not 'val'"),
    ("MNIST", {"download": "maybe"}, "must be true or false"),
    ("MNIST", {}, "download=true fetches"),
    ("CIFAR10", {}, "download=true fetches"),
    ("USPS", {}, "download=true fetches"),
    ("SEMEION", {}, "download=true fetches"),  # torchvision would download by default
    ("ImageFolder", {}, "looked in"),
    ("STL10", {"split": "unlabelled"}, "Valid values are"),
    ("CocoDetection", {}, "needs a value for annFile"),
]


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED)
def test_refusals_are_one_line(tmp_path, name, options, reason):
    root = tmp_path / "nothing here"
    with pytest.raises(ValueError, match=reason) as caught:
        torchvision_pool(name, {"root": str(root), **options})
    assert "\n" not in str(caught.value)
    if "fetches" in reason or "looked" in reason:
        assert str(root) in str(caught.value)


def test_sets_of_something_else_are_refused(tmp_path):
    np.save(tmp_path / "mnist_test_seq.npy", np.zeros((20, 3, 64, 64), np.uint8))
    (tmp_path / "MovingMNIST").mkdir()
    shutil.move(tmp_path / "mnist_test_seq.npy", tmp_path / "MovingMNIST")
    with pytest.raises(ValueError, match="no set of single images") as caught:
        torchvision_pool("MovingMNIST", {"root": str(tmp_path)})
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
    raw = make_mnist(tmp_path) / "MNIST/raw"
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="torchvision:MNIST") as caught:
        torchvision_pool("MNIST", {"root": str(tmp_path)})
    assert "\n" not in str(caught.value)
