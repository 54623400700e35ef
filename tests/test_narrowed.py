"""Part of a given client, for the families that have one; the pool stays."""

from collections import Counter

import pytest

from datamodules.client_draw import ClientDraw
from datamodules.folder import folder_data, remote_client_data
from datamodules.mixed_digits import mixed_digits
from datamodules.narrowed import narrowed
from datamodules.scenarios import open_scenario
from ecos_pl.config import FolderOptions, MailboxOptions, MixedDigitsOptions, SimulatedClientOptions


def test_all_is_the_scenario_itself():
    whole = mixed_digits()
    assert narrowed(whole, ClientDraw(seed=9)) is whole


def test_a_smaller_client_of_the_same_pool():
    whole = mixed_digits()
    part = narrowed(whole, ClientDraw(size=120))
    assert part.pool is whole.pool
    assert len(part.client_train) == 120
    assert set(part.client_train.ids) < set(whole.client_train.ids)
    assert list(part.client_test.ids) == whole.client_test.ids
    assert len(narrowed(whole, ClientDraw(fraction=0.25)).client_train) == 250


def test_classes_and_shares_hold_for_training_and_test():
    part = narrowed(mixed_digits(), ClientDraw(size=90, classes=("0", "1", "2"), imbalance=1.0))
    assert part.classes == ["0", "1", "2"]
    train, test = (Counter(s.labels) for s in (part.client_train, part.client_test))
    assert train.total() == 90
    for name in part.classes:
        assert abs(test[name] - train[name] / 90 * test.total()) < 1


def test_different_clients_have_different_fingerprints():
    whole = mixed_digits()
    options = [{}, {"size": 100}, {"size": 100, "seed": 1}, {"classes": ("1",)}, {"imbalance": 0.5}]
    clients = [narrowed(whole, ClientDraw(**one)).client_train for one in options]
    assert len({client.fingerprint for client in clients}) == len(options)


def test_a_folders_client(image_tree):
    whole = folder_data(image_tree / "pool", image_tree / "client")
    name = whole.classes[0]
    part = narrowed(whole, ClientDraw(size=5, classes=(name,)))
    assert set(part.client_train.labels) == set(part.client_test.labels) == {name}
    assert len(part.client_train) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"domain": "usps"}, "client.domain=usps: data=mixed_digits has one client"),
        ({"size": 1001}, "client.size=1001: the client has 1000 images"),
        ({"classes": ("10",)}, "no class '10'; did you mean"),
    ],
)
def test_a_mistake_is_one_line(options, words):
    with pytest.raises(ValueError, match="client") as caught:
        narrowed(mixed_digits(), ClientDraw(**options))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_become_the_draw_and_a_client_elsewhere_is_left_alone(tmp_path, image_tree):
    client = SimulatedClientOptions(size=30, classes=["4", "2"], imbalance=2.0, seed=3)
    found = open_scenario(MixedDigitsOptions(), client, cache_dir=tmp_path)
    wanted = ClientDraw(size=30, classes=("4", "2"), imbalance=2.0, seed=3)
    assert found.client_train.fingerprint == (
        narrowed(mixed_digits(), wanted).client_train.fingerprint
    )
    elsewhere = MailboxOptions(url="x")
    assert open_scenario(MixedDigitsOptions(), elsewhere, cache_dir=tmp_path) == mixed_digits()
    folder = FolderOptions(pool=str(image_tree / "pool"), classes=["cat"])
    assert open_scenario(folder, elsewhere, cache_dir=tmp_path).client_train is None


def test_images_that_are_not_here_cannot_be_chosen(image_tree):
    remote = remote_client_data(image_tree / "pool", ["cat"])
    with pytest.raises(ValueError, match="not here"):
        narrowed(remote, ClientDraw(size=3))
