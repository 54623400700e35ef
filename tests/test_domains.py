"""One domain's share is the client's, the rest is the pool; on sources made here."""

import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from datamodules.client_draw import ClientDraw
from datamodules.domains import Domain, domain_scenario
from datamodules.pool_rows import PoolRows
from datamodules.several_pools import SeveralPools
from ecos_pl.images import PoolPart

CLASSES = ["ant", "bee", "cow"]
DEFAULT = ClientDraw(domain="real", fraction=0.5)


class Numbers:
    """Images whose grey level is their number plus an offset, so that each one is known."""

    def __init__(self, name, num, offset=0, classes=CLASSES):
        self.name, self.fingerprint = name, f"{name} {num} {offset}"
        self.offset = offset
        self.ids = [f"{k:03d}" for k in range(num)]
        self.labels = [classes[k % len(classes)] for k in range(num)]
        self.domains = ["its own"] * num
        self.parts = [PoolPart(name, "MIT", 0, num, self.fingerprint)]

    def __len__(self):
        return len(self.ids)

    def read(self, index):
        return Image.new("RGB", (4, 4), (self.offset + index,) * 3)


def number_of(source, row):
    return int(np.asarray(source.read(row))[0, 0, 0])


@pytest.fixture
def domains():
    real = Domain("real", Numbers("r", 60), Numbers("rt", 20, offset=60))
    return [Domain("sketch", Numbers("s", 40, offset=100)), real]


def scenario(domains, **options):
    return domain_scenario("toys", domains, CLASSES, ClientDraw(**options), default=DEFAULT)


def numbers(source):
    return {number_of(source, row) for row in range(len(source))}


@pytest.mark.parametrize(
    "options",
    [{}, {"size": 7}, {"classes": ("ant", "cow")}, {"imbalance": 0.5}, {"domain": "sketch"}],
)
def test_every_training_image_is_the_clients_or_the_pools_and_none_is_both(domains, options):
    found = scenario(domains, **options)
    pool, train, test = (numbers(s) for s in (found.pool, found.client_train, found.client_test))
    assert not pool & train
    assert not pool & test
    assert not train & test
    if options.get("domain") == "sketch":
        assert pool | train | test == {*range(60), *range(100, 140)}
    else:
        assert pool | train == {*range(60), *range(100, 140)}
        assert test <= set(range(60, 80))


def test_the_papers_protocol(domains):
    found = scenario(domains)
    assert len(found.client_train) == 30
    assert len(found.client_test) == 20
    assert found.client_domain == "real"
    assert list(found.classes) == CLASSES
    assert Counter(found.pool.domains) == {"sketch": 40, "real": 30}
    assert found.pool.ids[0] == "sketch/000"
    assert set(found.client_train.ids).isdisjoint(found.pool.ids)
    assert {*found.client_train.ids, *found.pool.ids} == {
        *(f"real/{k:03d}" for k in range(60)),
        *(f"sketch/{k:03d}" for k in range(40)),
    }
    assert [part.licence for part in found.pool.parts] == ["MIT", "MIT"]


def test_without_an_official_test_part_a_fifth_measures_whoever_the_client_is(domains):
    first = scenario(domains, domain="sketch", size=10)
    other = scenario(domains, domain="sketch", size=20, seed=5)
    assert len(first.client_test) == len(other.client_test) == 8
    assert first.client_test.ids == other.client_test.ids
    assert (len(first.client_train), len(other.client_train)) == (10, 20)
    assert Counter(first.pool.domains)["sketch"] == 40 - 8 - 10


def test_a_subset_of_classes_leaves_the_others_in_the_pool(domains):
    found = scenario(domains, classes=("cow", "ant"), fraction=1.0)
    assert found.classes == ["ant", "cow"]
    assert set(found.client_train.labels) == set(found.client_test.labels) == {"ant", "cow"}
    own = [lb for lb, d in zip(found.pool.labels, found.pool.domains, strict=True) if d == "real"]
    assert Counter(own) == {"bee": 20}


def test_test_images_follow_the_clients_shares(domains):
    found = scenario(domains, imbalance=0.3, size=12, seed=2)
    train, test = (Counter(s.labels) for s in (found.client_train, found.client_test))
    assert train.total() == 12
    for name in CLASSES:
        assert abs(test[name] - train[name] / 12 * test.total()) < 1


def test_another_client_is_another_fingerprint_and_another_pool(domains):
    prints = {
        (found.client_train.fingerprint, found.pool.fingerprint)
        for found in (
            scenario(domains, **options)
            for options in ({}, {"size": 3}, {"seed": 1}, {"imbalance": 1.0}, {"domain": "sketch"})
        )
    }
    assert len({client for client, _ in prints}) == len({pool for _, pool in prints}) == 5
    assert scenario(domains).pool.fingerprint == scenario(domains).pool.fingerprint


def test_embeddings_of_whole_domains_are_shared_and_those_of_a_rest_are_not(domains):
    parts = {part.name: part.fingerprint for part in scenario(domains).pool.parts}
    again = {part.name: part.fingerprint for part in scenario(domains, size=3).pool.parts}
    assert parts["sketch"] == again["sketch"] == domains[0].train.fingerprint
    assert len({parts["real"], again["real"], domains[1].train.fingerprint}) == 3


def test_a_client_elsewhere_leaves_everything_to_the_pool(domains):
    found = domain_scenario("toys", domains, CLASSES, None, default=DEFAULT)
    assert len(found.pool) == 100
    assert found.client_train is None
    assert found.client_test is None


def test_a_client_that_takes_all_of_its_domain(domains):
    found = scenario(domains, fraction=1.0)
    assert set(found.pool.domains) == {"sketch"}
    with pytest.raises(ValueError, match="nothing is left as pool"):
        scenario(domains[1:], fraction=1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"domain": "skech"}, "did you mean sketch"),
        ({"classes": ("ants",)}, "did you mean ant"),
        ({"size": 61}, "client.size=61: domain 'real' has 60 images"),
    ],
)
def test_a_mistake_is_one_line(domains, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        scenario(domains, **options)
    assert "\n" not in str(caught.value)


def test_nothing_to_test_on_is_one_line(domains):
    real = Domain("real", Numbers("r", 60), Numbers("rt", 20, offset=60, classes=["ant", "bee"]))
    with pytest.raises(ValueError, match="left to test on") as caught:
        scenario([domains[0], real], classes=("cow",))
    assert "\n" not in str(caught.value)


def test_some_rows_of_several_pools():
    pools = SeveralPools([("a", None, Numbers("x", 5)), ("b", "CC0", Numbers("y", 5, offset=50))])
    some = PoolRows(pools, np.array([1, 3, 6, 7, 8, 9]))
    assert list(some.ids) == ["a/001", "a/003", "b/001", "b/002", "b/003", "b/004"]
    assert [number_of(some, row) for row in range(6)] == [1, 3, 51, 52, 53, 54]
    assert [(p.name, p.licence, p.start, p.stop, p.prefix) for p in some.parts] == [
        ("a", "MIT", 0, 2, "a/"),
        ("b", "CC0", 2, 6, "b/"),
    ]
    assert some.parts[0].fingerprint != pools.parts[0].fingerprint
    assert PoolRows(pools, np.arange(10)).fingerprint == pools.fingerprint
    only_b = PoolRows(pools, np.arange(5, 10))
    assert [part.fingerprint for part in only_b.parts] == [pools.parts[1].fingerprint]
    copy = pickle.loads(pickle.dumps(some))
    assert list(copy.ids) == list(some.ids)
