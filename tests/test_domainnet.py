"""DomainNet in the official folders and lists, made here small; FedBN's lists; what breaks."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import train
from datamodules.client_draw import ClientDraw
from datamodules.domainnet import DOMAINS, TEN_CLASSES, domainnet, domainnet_domain
from ecos_pl.images import read_image
from ecos_pl.proxy_set import ProxySet
from tests.miniatures import DOMAINNET_DOMAINS, make_domainnet, make_fedbn_lists
from tests.test_train import SMALL

CLASSES = [*TEN_CLASSES, "aircraft_carrier", "t-shirt"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_domainnet(tmp_path_factory.mktemp("made"), CLASSES)


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "DomainNet")
    return tmp_path / "DomainNet"


def opened(root, draw=ClientDraw(), **options):  # noqa: B008 - frozen
    return domainnet(root, draw, cache_dir=root.parent / "cache", **options)


def test_the_official_lists_split_all_classes(root):
    train_part, test_part = domainnet_domain(root, "clipart", cache_dir=root.parent / "cache")
    assert (len(train_part), len(test_part)) == (3 * 12, 2 * 12)
    listed = (root / "clipart_test.txt").read_text().split()[::2]
    assert [f"clipart/{name}" for name in test_part.ids] == sorted(listed)
    assert [name.split("/")[0] for name in train_part.ids] == list(train_part.labels)
    first = root / "clipart" / train_part.ids[0]
    assert (np.asarray(train_part.read(0)) == np.asarray(read_image(first))).all()


@pytest.mark.parametrize("ten_classes", [False, True])
def test_half_of_a_domain_is_the_clients_and_nothing_is_on_two_sides(root, ten_classes):
    scenario = opened(root, ClientDraw(domain="sketch"), ten_classes=ten_classes)
    num_classes = 10 if ten_classes else 12
    assert scenario.name == ("domainnet10" if ten_classes else "domainnet")
    assert scenario.classes == sorted(TEN_CLASSES if ten_classes else CLASSES)
    assert len(scenario.client_train) == 3 * num_classes // 2
    assert len(scenario.client_test) == 2 * num_classes
    assert len(scenario.pool) == 6 * 3 * num_classes - len(scenario.client_train)
    assert scenario.client_domain == "sketch"
    counts = {domain: scenario.pool.domains.count(domain) for domain in DOMAINS}
    assert counts.pop("sketch") == 3 * num_classes - len(scenario.client_train)
    assert set(counts.values()) == {3 * num_classes}
    sides = [set(s.ids) for s in (scenario.pool, scenario.client_train, scenario.client_test)]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert all((root / identifier).is_file() for identifier in set.union(*sides))
    assert [part.name.split("/")[0] for part in scenario.pool.parts] == list(DOMAINS)
    assert all("DomainNet" in part.licence for part in scenario.pool.parts)


def test_the_default_domain_is_real_and_a_mailbox_gets_everything(root):
    assert opened(root).client_domain == "real"
    remote = opened(root, None)
    assert len(remote.pool) == 6 * 3 * 12
    assert remote.client_train is remote.client_test is None


def test_without_lists_the_folders_are_read_and_a_fifth_measures(root):
    for path in root.glob("*.txt"):
        path.unlink()
    scenario = opened(root, ClientDraw(domain="quickdraw"), ten_classes=True)
    assert len(scenario.client_test) == 10  # of 50
    assert len(scenario.client_train) == 20
    assert len(scenario.pool) == 5 * 50 + 20
    Image.new("RGB", (4, 4)).save(root / "quickdraw/thumbnail.jpg")  # in no class
    assert len(opened(root, ClientDraw(domain="quickdraw")).pool) == 5 * 60 + 24


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_fedbns_lists_give_the_same_as_the_official_ones(root, protocol):
    make_fedbn_lists(root, protocol=protocol)
    for domain in DOMAINS:
        parts = [
            domainnet_domain(
                root, domain, cache_dir=root.parent / "cache", classes=TEN_CLASSES, **options
            )
            for options in ({}, {"allow_pickle": True})
        ]
        for official, pickled in zip(*parts, strict=True):
            assert list(official.ids) == list(pickled.ids)
            assert list(official.labels) == list(pickled.labels)
            assert official.fingerprint == pickled.fingerprint


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


BROKEN = [
    (shutil.rmtree, {}, "looked for the folder"),
    (lambda r: shutil.rmtree(r / "real"), {}, r"DomainNet's real is missing: .*get real\.zip"),
    (lambda r: [p.unlink() for p in r.glob("real/*/*")], {}, "no images below"),
    (lambda r: (r / "sketch_test.txt").unlink(), {}, r"looked for '.*sketch_test\.txt'"),
    (lambda r: cut(r / "sketch_train.txt", 60), {}, r"sketch_train\.txt', line 2: .* is not"),
    (lambda r: cut(r / "sketch_train.txt", 0), {}, "is empty"),
    (
        lambda r: shutil.copy(r / "real_train.txt", r / "sketch_train.txt"),
        {},
        r"line 1: 'real/aircraft_carrier/.* is not sketch/CLASS",
    ),
    (
        lambda r: shutil.copy(r / "real_train.txt", r / "real_test.txt"),
        {},
        "both list 'aircraft_carrier/",
    ),
    (
        lambda r: next((r / "painting/tiger").iterdir()).unlink(),
        {},
        r"1 of 36 images that '.*painting_(train|test)\.txt' lists are not in",
    ),
    (lambda r: None, {"allow_pickle": True}, r"looked for '.*clipart_train\.pkl'"),
    (
        lambda r: (make_fedbn_lists(r), cut(r / "infograph_test.pkl", 200)),
        {"allow_pickle": True},
        "no whole pickle .*domainnet_dataset.zip",
    ),
    (
        lambda r: (make_fedbn_lists(r), (r / "real_train.pkl").write_bytes(b"\x80\x02]q\x00.")),
        {"allow_pickle": True},
        "two equally long arrays",
    ),
    (
        lambda r: (make_fedbn_lists(r), shutil.copy(r / "real_test.pkl", r / "sketch_test.pkl")),
        {"allow_pickle": True},
        "does not end in sketch/CLASS",
    ),
]


@pytest.mark.parametrize(("break_it", "options", "expected"), BROKEN)
def test_what_is_missing_or_damaged_is_one_line(root, break_it, options, expected):
    break_it(root)
    with pytest.raises(ValueError, match=expected) as caught:
        opened(root, ten_classes=bool(options), **options)
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)


def test_a_domain_that_is_half_unpacked_is_noticed_without_lists(root):
    for path in root.glob("*.txt"):
        path.unlink()
    shutil.rmtree(root / "infograph/zebra")
    with pytest.raises(ValueError, match=r"infograph has 11 of the 12 classes .* no 'zebra'"):
        opened(root)
    with pytest.raises(ValueError, match=r"no image of 1 of 10 classes, 'zebra' .*infograph\.zip"):
        opened(root, ten_classes=True)


def test_a_domain_that_is_none_names_the_nearest(root):
    with pytest.raises(ValueError, match=r"no domain 'scetch'.*sketch"):
        opened(root, ClientDraw(domain="scetch"))


@pytest.mark.slow
def test_train_py_on_a_small_domainnet(tmp_path, capsys):
    """Sketch has vertical bars, the other domains clutter: the probe finds its half of sketch."""
    kinds = {domain: 2 + place % 2 for place, domain in enumerate(DOMAINNET_DOMAINS)}
    root = make_domainnet(
        tmp_path / "DomainNet",
        list(TEN_CLASSES),
        train=8,
        test=2,
        kinds=lambda domain, name: 0 if domain == "sketch" else kinds[domain],
    )
    argv = [
        *SMALL,
        "data=domainnet10",
        f"data.root={root}",
        "client.domain=sketch",
        "labels=public",
        "selection.size=30",
        "trainer.max_epochs=1",
        f"run_root={tmp_path}",
        "run_id=run",
    ]
    assert train.main(argv) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    proxy_set = ProxySet.load(tmp_path / "run")
    assert len(proxy_set) == 30
    assert proxy_set.classes == sorted(TEN_CLASSES)
    simulation = summary["simulation"]
    assert simulation["random_purity"] == pytest.approx(40 / (6 * 80 - 40))
    assert simulation["purity"] > 2 * simulation["random_purity"]
    assert 0 <= simulation["test_accuracy"] <= 1
