"""The five digit sets, on miniatures in their own formats: whole, damaged, and half there."""

import hashlib
import pickle
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torchvision.datasets

from datamodules.array_pickle import load_arrays
from datamodules.client_draw import ClientDraw
from datamodules.digits5 import DOMAINS, digits5
from ecos_pl.images import read_image
from tests.digit_fixtures import (
    make_digits5,
    make_fedbn,
    make_mat,
    make_mnist_m,
    make_mnist_m_classes,
    make_mnist_m_tar,
    make_svhn,
    make_usps,
    pictures,
)
from tests.test_torchvision_pool import _no_network, make_mnist  # noqa: F401

DRAW = ClientDraw(size=5)


@pytest.fixture
def root(tmp_path):
    return make_digits5(tmp_path / "data")


@pytest.fixture
def opened(tmp_path):
    def call(root, *domains, draw=None, **options):
        cache = tmp_path / "cache"
        return digits5(root, draw, cache_dir=cache, domains=domains or DOMAINS, **options)

    return call


@pytest.fixture
def refusal(opened):
    def call(*args, **options):
        with pytest.raises(ValueError, match=" ") as caught:
            opened(*args, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return call


def pixels(source, row):
    return np.asarray(source.read(row))


# --- the protocol ---


def test_the_papers_protocol(root, opened):
    scenario = opened(root, draw=DRAW)
    assert scenario.client_domain == "mnist"
    assert (len(scenario.client_train), len(scenario.client_test)) == (5, 20)
    others = dict.fromkeys(DOMAINS[1:], 30)
    assert Counter(scenario.pool.domains) == {"mnist": 25, **others}
    assert scenario.pool.ids[-1] == "mnist_m/MNIST_M/train/000029"
    assert set(scenario.pool.labels) == set(scenario.classes) == {str(k) for k in range(10)}
    assert scenario.pool.read(140).mode == "RGB"


def test_another_domain_and_a_subset(root, opened):
    scenario = opened(root, "svhn", "usps", draw=ClientDraw(domain="usps", fraction=0.5))
    assert Counter(scenario.pool.domains) == {"svhn": 30, "usps": 15}
    assert opened(root, "svhn", "usps", draw=DRAW).client_domain == "svhn"


def test_a_client_elsewhere_and_a_client_too_large(root, opened, refusal):
    assert len(opened(root).pool) == 150
    assert "client.size=31: domain 'mnist' has 30 images" in refusal(root, draw=ClientDraw(size=31))
    assert len(opened(root, draw=ClientDraw()).client_train) == 30  # 1,000, or all there are


def test_a_limit_for_each_domain(root, opened):
    scenario = opened(root, draw=DRAW, max_per_domain=12)
    assert Counter(scenario.pool.domains) == {"mnist": 7, **dict.fromkeys(DOMAINS[1:], 12)}
    assert len(scenario.client_test) == 20
    fewer, more = (opened(root, "usps", max_per_domain=num).pool for num in (5, 12))
    assert set(fewer.ids) < set(more.ids)
    assert fewer.fingerprint != more.fingerprint


def test_names_of_domains(root, refusal):
    assert "did you mean svhn?" in refusal(root, "shvn")
    assert "twice" in refusal(root, "usps", "usps")
    text = refusal(root, "usps", draw=ClientDraw(domain="mnist"))
    assert "client.domain: no domain 'mnist'" in text


# --- each format ---


def test_svhn_is_what_torchvision_reads(root, opened, monkeypatch):
    source = opened(root, "svhn").pool
    files = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
    lists = {
        split: ["", file, hashlib.md5((root / "SVHN" / file).read_bytes()).hexdigest()]
        for split, file in files.items()
    }
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", lists)
    theirs = torchvision.datasets.SVHN(root / "SVHN", "train")
    assert len(source) == len(theirs)
    for row, (image, label) in enumerate(theirs):
        assert (pixels(source, row) == np.asarray(image)).all()
        assert source.labels[row] == str(label)


def test_usps_is_what_torchvision_reads(root, opened):
    source = opened(root, "usps").pool
    for row, (image, label) in enumerate(torchvision.datasets.USPS(root / "USPS", train=True)):
        assert (pixels(source, row) == np.asarray(image.convert("RGB"))).all()
        assert source.labels[row] == str(label)


def test_synth_digits_as_written(root, opened):
    source = opened(root, "synth_digits").pool
    assert (pixels(source, 7) == pictures(30, 32, 32, 3, seed=32)[7]).all()
    assert source.labels[:11] == [str(k % 10) for k in range(11)]


@pytest.mark.parametrize("make", [make_mnist_m, make_mnist_m_tar, make_mnist_m_classes])
def test_mnist_m_in_three_packagings(make, tmp_path, opened):
    make(tmp_path)
    scenario = opened(tmp_path, "mnist_m", draw=DRAW)
    assert (len(scenario.pool), len(scenario.client_test)) == (25, 20)
    truth = pictures(30, 32, 32, 3, seed=34)
    for source in (scenario.pool, scenario.client_train):
        for row, label in enumerate(source.labels):
            [k] = np.flatnonzero((truth == pixels(source, row)).all(axis=(1, 2, 3)))
            assert label == str(k % 10)


def test_flat_folders_are_found(root, tmp_path, opened):
    flat = tmp_path / "flat"
    flat.mkdir()
    for folder in ("SVHN", "USPS", "SynthDigits"):
        for path in (root / folder).iterdir():
            shutil.copy(path, flat)
    assert len(opened(flat, "svhn", "usps", "synth_digits").pool) == 90


@pytest.mark.parametrize("channels", [1, 3])
def test_fedbns_pickles_behind_the_opt_in(channels, tmp_path, opened, refusal):
    make_fedbn(tmp_path, channels=channels)
    assert "data.allow_pickle=true" in refusal(tmp_path, "usps")
    scenario = opened(tmp_path, "usps", draw=DRAW, allow_pickle=True)
    assert (len(scenario.pool), len(scenario.client_test)) == (25, 20)
    whole = opened(tmp_path, "usps", allow_pickle=True).pool
    shape = (28, 28, 3) if channels == 3 else (28, 28)
    second = pictures(10, *shape, seed=11)[4]
    assert (pixels(whole, 14) == (second if channels == 3 else second[..., None])).all()
    assert whole.labels[14] == "5"


def test_pickles_of_numpy_1_are_read_and_programs_are_not_run(tmp_path):
    images = pictures(3, 4, 4)
    old = pickle.dumps((images, [1, 2]), protocol=2).replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core.multiarray" in old
    (tmp_path / "old.pkl").write_bytes(old)
    found, numbers = load_arrays(tmp_path / "old.pkl")
    assert (found == images).all()
    assert numbers == [1, 2]

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "hacked"), "w"))

    (tmp_path / "evil.pkl").write_bytes(pickle.dumps((images, Evil())))
    with pytest.raises(ValueError, match="which is no part of an array: not run"):
        load_arrays(tmp_path / "evil.pkl")
    assert not (tmp_path / "hacked").exists()


def test_an_evil_pickle_is_one_line(tmp_path, refusal):
    make_fedbn(tmp_path)
    path = tmp_path / "digit_dataset/USPS/partitions/train_part1.pkl"
    path.write_bytes(b"cos\nsystem\n(S'echo hacked'\ntR.")
    assert "os.system" in refusal(tmp_path, "usps", allow_pickle=True)


# --- unpacked once ---


def test_packed_files_are_read_once_and_processes_share_the_array(root, opened, monkeypatch):
    first = opened(root, "svhn", draw=DRAW)
    copy = pickle.loads(pickle.dumps(first.pool))
    client = pickle.loads(pickle.dumps(first.client_train))
    assert (pixels(client, 2) == pixels(first.client_train, 2)).all()
    assert (pixels(copy, 3) == pixels(first.pool, 3)).all()
    assert len(pickle.dumps(first.pool)) < 20_000

    def never(*args, **options):
        raise AssertionError("the file is unpacked already")

    monkeypatch.setattr("scipy.io.loadmat", never)
    again = opened(root, "svhn", draw=DRAW)
    assert again.pool.fingerprint == first.pool.fingerprint
    assert again.client_train.fingerprint == first.client_train.fingerprint


def test_a_file_that_changed_is_read_again_and_is_another_pool(root, opened):
    first = opened(root, "svhn").pool.fingerprint
    make_mat(root / "SVHN/train_32x32.mat", 30, seed=99)
    assert opened(root, "svhn").pool.fingerprint != first


def test_the_fingerprint_does_not_depend_on_the_place(root, tmp_path, opened):
    shutil.copytree(root, tmp_path / "elsewhere")
    elsewhere = opened(tmp_path / "elsewhere", draw=DRAW)
    assert opened(root, draw=DRAW).pool.fingerprint == elsewhere.pool.fingerprint


# --- missing, damaged, half there ---


@pytest.mark.parametrize("name", DOMAINS)
def test_a_missing_set_says_where_it_was_looked_for_and_how_to_get_it(name, root, refusal):
    for path in root.iterdir():
        folder = "mnist_m" if name == "mnist_m" else name.replace("_", "").upper()
        if path.name.upper() == folder.upper():
            shutil.rmtree(path)
    text = refusal(root)
    assert f"no {name} in {str(root)!r}: looked for" in text
    there = ",".join(other for other in DOMAINS if other != name)
    assert text.endswith(f"data.domains=[{there}] goes without")
    assert ("data.download=true" in text) == (name in ("mnist", "svhn", "usps"))
    assert ("docs/datasets.md" in text) == (name in ("synth_digits", "mnist_m"))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte"),
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte"),
        ("svhn", "SVHN/train_32x32.mat"),
        ("usps", "USPS/usps.t.bz2"),
        ("synth_digits", "SynthDigits/synth_test_32x32.mat"),
        ("mnist_m", "mnist_m/mnist_m_test_labels.txt"),
        ("mnist_m", "mnist_m/mnist_m_train/00000012.png"),
    ],
)
@pytest.mark.parametrize("harm", ["half", "gone", "empty"])
def test_half_a_download_is_one_line(name, file, harm, root, refusal):
    path = root / file
    if harm == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if harm == "half" else b"")
    text = refusal(root, name, draw=DRAW)
    assert re.match(f"data=digits5: the (train|test) part of {name} in .* cannot be read: ", text)
    assert "remove it and get it again" in text
    assert "root=" not in text


def test_half_an_archive_is_one_line(tmp_path, refusal):
    path = make_mnist_m_tar(tmp_path)
    content = path.read_bytes()
    for share in (0.1, 0.5, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        assert "part of mnist_m in" in refusal(tmp_path, "mnist_m", draw=DRAW)


def test_a_missing_partition_is_one_line(tmp_path, opened, refusal):
    make_fedbn(tmp_path)
    folder = tmp_path / "digit_dataset/USPS"
    (folder / "partitions/train_part1.pkl").unlink()
    text = refusal(tmp_path, "usps", allow_pickle=True)
    assert "partitions/train_part1.pkl is missing" in text
    shutil.copy(folder / "test.pkl", folder / "partitions/train_part1.pkl")
    (folder / "test.pkl").unlink()
    assert len(opened(tmp_path, "usps", allow_pickle=True).pool) == 40  # nobody tests on it
    assert "test.pkl is missing" in refusal(tmp_path, "usps", draw=DRAW, allow_pickle=True)


def test_labels_and_pictures_must_belong_together(tmp_path, refusal):
    make_fedbn(tmp_path)
    path = tmp_path / "digit_dataset/USPS/test.pkl"
    for pair, words in (
        ((pictures(4, 28, 28), np.arange(3)), "4 images, but labels [3]"),
        ((pictures(2, 28, 28).astype(float), np.arange(2)), "not 8-bit pictures"),
        ((pictures(2, 28, 28), np.array([3, 10])), "its labels go from 3 to 10"),
        ((pictures(2, 28, 28), None), "no pair of arrays"),
    ):
        path.write_bytes(pickle.dumps(pair))
        assert words in refusal(tmp_path, "usps", draw=DRAW, allow_pickle=True)


def test_a_class_folder_that_is_no_digit(tmp_path, refusal):
    make_mnist_m_classes(tmp_path)
    (tmp_path / "MNIST_M/train/3").rename(tmp_path / "MNIST_M/train/three")
    assert "'three', which is no digit" in refusal(tmp_path, "mnist_m")


def test_a_download_without_a_network_is_one_line(tmp_path, refusal):
    text = refusal(tmp_path, "usps", download=True)
    assert f"usps cannot be downloaded into {str(tmp_path)!r}" in text


def test_a_download_leaves_what_is_right(tmp_path, opened, monkeypatch):
    make_mnist(tmp_path, train=30, test=20)
    make_svhn(tmp_path)
    make_usps(tmp_path)
    for kind, folder in ((torchvision.datasets.SVHN, "SVHN"), (torchvision.datasets.USPS, "USPS")):
        lists = {
            split: [url, file, hashlib.md5((tmp_path / folder / file).read_bytes()).hexdigest()]
            for split, (url, file, _) in kind.split_list.items()
            if split != "extra"
        }
        monkeypatch.setattr(kind, "split_list", lists)
    assert len(opened(tmp_path, "mnist", "svhn", "usps", download=True).pool) == 90


def test_images_read_through_the_scenario_are_the_files_own(tmp_path, opened):
    make_mnist_m(tmp_path)
    source = opened(tmp_path, "mnist_m").pool
    theirs = read_image(tmp_path / "mnist_m/mnist_m_train/00000003.png")
    assert (pixels(source, 3) == np.asarray(theirs)).all()
