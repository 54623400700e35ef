"""CIFAR-10 with ImageNet-32, and CelebA with UTKFace and Tiny-ImageNet: who has which images."""

import logging
import shutil

import numpy as np
import pytest
import torchvision.datasets

import train
from datamodules.celeba_utkface import celeba_utkface
from datamodules.cifar10_imagenet32 import CLASSES, cifar10_imagenet32
from datamodules.client_draw import ClientDraw
from datamodules.domainnet import TEN_CLASSES
from datamodules.scenarios import open_scenario
from ecos_pl.config_files import (
    load_config,
)
from tests.miniatures import (
    CIFAR10_CLASSES,
    make_celeba,
    make_cifar10,
    make_domainnet,
    make_fedbn_lists,
    make_imagenet32,
    make_tiny_imagenet,
    make_utkface,
)


def check_nothing_is_on_two_sides(scenario):
    sides = [set(s.ids) for s in (scenario.pool, scenario.client_train, scenario.client_test)]
    assert sum(map(len, sides)) == len(set.union(*sides))


# --- CIFAR-10 and ImageNet-32 ---


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    make_cifar10(tmp_path / "data", monkeypatch)
    make_imagenet32(tmp_path / "data/imagenet32")

    def opened(draw=ClientDraw(), **options):  # noqa: B008 - frozen
        roots = (tmp_path / "data", tmp_path / "data/imagenet32")
        return cifar10_imagenet32(*roots, draw, cache_dir=tmp_path / "cache", **options)

    return opened


def test_half_of_cifar10_is_the_clients_and_the_rest_joins_imagenet32(cifar, tmp_path):
    scenario = cifar()
    assert list(scenario.classes) == CLASSES == CIFAR10_CLASSES
    assert (len(scenario.client_train), len(scenario.client_test)) == (100, 40)
    assert len(scenario.pool) == 100 + 40
    assert scenario.pool.domains.count("cifar10") == 100
    assert scenario.pool.domains.count("imagenet32") == 40
    check_nothing_is_on_two_sides(scenario)
    expected = torchvision.datasets.CIFAR10(tmp_path / "data", train=True)
    for source in (scenario.client_train, scenario.pool):
        place = int(source.ids[3].rpartition("/")[2])
        assert source.ids[3].startswith("cifar10/")
        assert source.labels[3] == expected.classes[expected.targets[place]]
        assert (np.asarray(source.read(3)) == expected.data[place]).all()


def test_imagenets_labels_are_none_of_the_clients(cifar):
    pool = cifar(rest_in_pool=False).pool
    assert len(pool) == 40
    assert set(pool.domains) == {"imagenet32"}
    assert not set(pool.labels).intersection(CLASSES)


def test_what_the_client_does_not_get_may_stay_unused(cifar):
    small = cifar(ClientDraw(size=30), rest_in_pool=False)
    assert len(small.client_train) == 30
    assert small.client_domain is None  # so nothing speaks of purity, which would always be 0
    whole = cifar(ClientDraw(fraction=1.0))
    assert len(whole.client_train) == 200
    assert set(whole.pool.domains) == {"imagenet32"}
    assert set(cifar(None, rest_in_pool=False).pool.domains) == {"imagenet32"}
    assert len(cifar(None).pool) == 200 + 40


def test_the_clients_domain_is_cifar10_alone(cifar):
    with pytest.raises(ValueError, match="'imagenet32' has no image of the classes airplane"):
        cifar(ClientDraw(domain="imagenet32"))


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_cifar10_is_checked_as_torchvision_does(cifar, tmp_path, name):
    path = tmp_path / "data/cifar-10-batches-py" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not found or corrupted") as caught:
        cifar()
    assert "\n" not in str(caught.value)
    assert f"looked in '{tmp_path}/data'" in str(caught.value)
    assert "data.download=true" in str(caught.value)


# --- CelebA, UTKFace and Tiny-ImageNet ---


@pytest.fixture
def faces(tmp_path):
    make_celeba(tmp_path / "data")
    make_utkface(tmp_path / "data")
    make_tiny_imagenet(tmp_path / "data")

    def opened(draw=ClientDraw(), **options):  # noqa: B008 - frozen
        return celeba_utkface(tmp_path / "data", draw, cache_dir=tmp_path / "cache", **options)

    return opened


def test_celeba_is_the_clients_and_other_faces_and_things_are_the_pool(faces):
    scenario = faces()
    assert list(scenario.classes) == ["female", "male"]
    assert (len(scenario.client_train), len(scenario.client_test)) == (10, 20)
    assert {int(name[-10:-4]) for name in scenario.client_train.ids} <= set(range(1, 21))
    assert [int(name[-10:-4]) for name in scenario.client_test.ids] == list(range(41, 61))
    assert len(scenario.pool) == 4 + 6 + 4
    assert set(scenario.pool.domains) == {"utkface", "tiny_imagenet"}
    assert scenario.pool.ids[4] == "tiny_imagenet/train/n01443537/images/n01443537_0.JPEG"
    assert set(scenario.pool.labels[:4]) == {"male", "female"}
    check_nothing_is_on_two_sides(scenario)


def test_utkfaces_labels_serve_no_other_target(faces):
    scenario = faces(target="Smiling")
    assert list(scenario.classes) == ["Smiling", "not_Smiling"]
    assert set(scenario.client_train.labels) == set(scenario.classes)
    assert not set(scenario.pool.labels).intersection(scenario.classes)


def test_no_person_of_the_client_is_in_the_pool(faces, tmp_path):
    """Two neighbours are a person: 1 and 2, 3 and 4, …"""

    def persons(source):
        names = [name for name in source.ids if name.startswith("celeba/")]
        return {(int(name[-10:-4]) - 1) // 2 for name in names}

    scenario = faces(ClientDraw(size=6), rest_in_pool=True)
    assert scenario.client_domain == "celeba"
    assert persons(scenario.pool)
    assert not persons(scenario.pool) & persons(scenario.client_train)
    assert persons(scenario.pool) | persons(scenario.client_train) == set(range(10))
    assert len(scenario.pool) == 14 + 2 * len(persons(scenario.pool))
    assert scenario.pool.parts[0].stop == 2 * len(persons(scenario.pool))
    (tmp_path / "data/celeba/identity_CelebA.txt").unlink()
    assert len(faces(ClientDraw(size=6), rest_in_pool=True).pool) == 14 + 14


def test_tiny_imagenet_is_optional(faces, tmp_path, caplog):
    assert set(faces(has_tiny_imagenet=False).pool.domains) == {"utkface"}
    shutil.rmtree(tmp_path / "data/tiny-imagenet-200")
    with caplog.at_level(logging.INFO):
        assert set(faces().pool.domains) == {"utkface"}
    assert "no tiny-imagenet-200" in caplog.text
    with pytest.raises(ValueError, match="Tiny-ImageNet is missing: looked for"):
        faces(has_tiny_imagenet=True)


def test_everything_is_the_pool_of_a_client_elsewhere(faces):
    scenario = faces(None, rest_in_pool=True)
    assert scenario.client_train is None
    assert len(scenario.pool) == 20 + 14
    assert len(faces(None).pool) == 14


# --- from the command line ---


@pytest.fixture
def scenario_of(tmp_path):
    def call(*argv):
        config = load_config(argv, config_dir=tmp_path)
        return open_scenario(config.data, config.client, cache_dir=tmp_path / "cache")

    return call


def test_options_of_domainnet_reach_it(tmp_path, scenario_of):
    root = make_domainnet(tmp_path, [*TEN_CLASSES, "t-shirt"], train=2, test=1)
    for path in root.glob("*_train.txt"):
        path.unlink()
    make_fedbn_lists(root, train=2)
    ten = ["data=domainnet10", f"data.root={root}", "client.domain=sketch", "client.size=7"]
    scenario = scenario_of(*ten, "data.allow_pickle=true")
    assert scenario.client_domain == "sketch"
    assert (len(scenario.client_train), len(scenario.classes)) == (7, 10)
    with pytest.raises(ValueError, match=r"clipart_train\.txt"):
        scenario_of(*ten)
    for path in root.glob("*.txt"):
        path.unlink()
    assert len(scenario_of("data=domainnet", f"data.root={root}").classes) == 11


def test_options_of_cifar10_imagenet32_reach_it(tmp_path, monkeypatch, scenario_of):
    make_cifar10(tmp_path, monkeypatch)
    make_imagenet32(tmp_path / "other", packed="pickle", files=3)
    roots = [f"data.root={tmp_path}", f"data.imagenet_root={tmp_path}/other", "data.num_files=2"]
    argv = ["data=cifar10_imagenet32", *roots]
    assert len(scenario_of(*argv, "data.allow_pickle=true").pool) == 100 + 8
    assert len(scenario_of(*argv, "data.allow_pickle=true", "data.rest=unused").pool) == 8
    with pytest.raises(ValueError, match=r"data\.allow_pickle=true"):
        scenario_of(*argv)
    asked = []
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", lambda self: asked.append(1))
    scenario_of(*argv, "data.allow_pickle=true", "data.download=true")
    assert asked


def test_options_of_celeba_utkface_reach_it(tmp_path, scenario_of):
    make_tiny_imagenet(make_utkface(make_celeba(tmp_path)))
    argv = ["data=celeba_utkface", f"data.root={tmp_path}", "client.fraction=0.25"]
    scenario = scenario_of(*argv, "data.target=Young", "data.rest=pool", "data.tiny_imagenet=false")
    assert list(scenario.classes) == ["Young", "not_Young"]
    assert len(scenario.client_train) == 5
    assert set(scenario.pool.domains) == {"celeba", "utkface"}
    assert len(scenario_of(*argv).pool) == 14


@pytest.mark.parametrize(
    "argv",
    [
        ["data=domainnet10", "data.root=nowhere"],
        ["data=domainnet", "data.root=nowhere"],
        ["data=cifar10_imagenet32", "data.root=nowhere", "data.imagenet_root=nowhere"],
        ["data=celeba_utkface", "data.root=nowhere"],
        ["data=folder", "data.pool=torchvision:MNIST?root=nowhere", "data.client=hf:nowhere"],
    ],
    ids=" ".join,
)
def test_train_py_says_in_one_line_what_is_missing(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([*argv, "run_root=runs"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "nowhere" in err
