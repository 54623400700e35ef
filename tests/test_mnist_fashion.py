"""The two data sets as pool and client: on small files of their format, and on the real ones."""

from pathlib import Path

import numpy as np
import pytest

from datamodules.client_draw import ClientDraw
from datamodules.mnist_fashion import mnist_fashion
from tests.test_torchvision_pool import make_mnist

DATA = Path(__file__).parents[2] / "shared/data"


@pytest.fixture
def root(tmp_path):
    make_mnist(tmp_path, "MNIST", train=7, test=30)
    return make_mnist(tmp_path, "FashionMNIST", train=5, test=2, seed=1)


def test_pool_client_and_test_share_no_image(root):
    scenario = mnist_fashion(root, ClientDraw(size=20))
    assert len(scenario.pool) == 12
    assert scenario.pool.domains.count(scenario.client_domain) == 7
    assert set(scenario.pool.labels[:7]) <= set(scenario.classes)
    assert not set(scenario.pool.labels[7:]) & set(scenario.classes)
    client, test = scenario.client_train, scenario.client_test
    assert (len(client), len(test)) == (20, 10)
    assert not set(client.ids) & set(test.ids)
    assert np.asarray(client.read(0)).shape == (28, 28, 3)


def test_the_client_depends_on_the_seed_alone(root):
    first, again = (mnist_fashion(root, ClientDraw(size=20)).client_train for _ in range(2))
    assert first.fingerprint == again.fingerprint
    other = mnist_fashion(root, ClientDraw(size=20, seed=1)).client_train
    assert first.ids != other.ids


def test_some_classes_in_given_shares(root):
    scenario = mnist_fashion(root, ClientDraw(size=2, classes=("2", "5"), imbalance=1e6))
    assert scenario.classes == ["2", "5"]
    assert sorted(scenario.client_train.labels) == ["2", "5"]
    assert sorted(scenario.client_test.labels) == ["2", "2", "5", "5"]
    assert not set(scenario.client_train.ids) & set(scenario.client_test.ids)


def test_what_is_missing_or_too_small_is_one_line(root, tmp_path):
    with pytest.raises(ValueError, match=r"client\.size=31: MNIST's test part has 30 images"):
        mnist_fashion(root, ClientDraw(size=31))
    with pytest.raises(ValueError, match="no image of MNIST's test part is left to test on"):
        mnist_fashion(root, ClientDraw(size=30))
    with pytest.raises(ValueError, match=r"client\.domain=usps: data=mnist_fashion has one client"):
        mnist_fashion(root, ClientDraw(domain="usps"))
    with pytest.raises(ValueError, match="nowhere") as caught:
        mnist_fashion(tmp_path / "nowhere")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not DATA.is_dir(), reason="no torchvision folders here")
def test_the_real_sets_at_full_size():
    scenario = mnist_fashion(DATA)
    assert len(scenario.pool) == 120_000
    assert scenario.pool.domains.count("mnist") == 60_000
    assert (len(scenario.client_train), len(scenario.client_test)) == (1000, 9000)
