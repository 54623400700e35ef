"""data.client= by name, on small files in torchvision's and Hugging Face's own formats."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision.datasets

import train
from datamodules.client_spec import named_client
from datamodules.scenarios import open_scenario
from ecos_pl.config import (
    FolderOptions,
    SimulatedClientOptions,
)
from tests.conftest import draw
from tests.test_torchvision_pool import make_folder, make_mnist
from tests.test_train import SMALL


def opened(tmp_path, pool, client, **options):
    data = FolderOptions(pool=pool, client=client)
    return open_scenario(data, SimulatedClientOptions(**options), cache_dir=tmp_path / "cache")


def check_nothing_is_on_two_sides(scenario):
    sides = [set(s.ids) for s in (scenario.pool, scenario.client_train, scenario.client_test)]
    assert sum(map(len, sides)) == len(set.union(*sides))


@pytest.fixture
def mnist(tmp_path):
    return make_mnist(tmp_path / "data", train=40, test=10)


@pytest.fixture
def prints(tmp_path):
    """A data set with three splits, a label and an id; and one without splits."""
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["bar", "beam"]),
            "key": datasets.Value("string"),
        }
    )
    splits = {}
    for split, num in (("train", 20), ("validation", 6), ("unlabelled", 4)):
        rows = [
            {"image": draw(i % 2, rng), "label": i % 2, "key": f"{split}-{i}"} for i in range(num)
        ]
        splits[split] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "prints"))
    splits["train"].save_to_disk(str(tmp_path / "flat"))
    return tmp_path / "prints"


def test_a_folder_is_no_name(tmp_path):
    assert named_client(str(tmp_path), cache_dir=tmp_path) is None
    assert named_client("torchvision", cache_dir=tmp_path) is None


def test_torchvisions_own_parts_are_train_and_test(mnist, tmp_path):
    client = named_client(f"torchvision:MNIST?root={mnist}", cache_dir=tmp_path)
    assert client.train.ids[0] == "MNIST/train/000000"
    assert client.test.ids[0] == "MNIST/test/000000"
    assert (len(client.train), len(client.test)) == (40, 10)
    assert client.classes == list("0123456789")
    swapped = f"torchvision:MNIST?root={mnist}&split=test&test_split=train"
    client = named_client(swapped, cache_dir=tmp_path)
    assert (len(client.train), len(client.test)) == (10, 40)


def test_a_set_with_a_split_of_its_own(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    kind = torchvision.datasets.SVHN
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda path, md5: True)
    for part in ("train", "test"):
        labels = np.array([[1], [10], [3], [9], [1], [3]])
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": pixels, "y": labels})
    client = named_client(f"torchvision:SVHN?root={tmp_path}", cache_dir=tmp_path)
    assert client.train.ids[0].startswith("SVHN/train/")
    assert client.test.ids[0].startswith("SVHN/test/")
    assert client.classes == ["0", "1", "3", "9"]
    assert set(kind.split_list) == {"train", "test", "extra"}
    with pytest.raises(ValueError, match="Unknown value 'tst'"):
        named_client(f"torchvision:SVHN?root={tmp_path}&test_split=tst", cache_dir=tmp_path)


def test_a_set_without_parts_sets_a_fifth_aside(tmp_path):
    for number in range(5):
        make_folder(tmp_path / "images" / f"more{number}")
    make_folder(tmp_path / "images")
    spec = f"torchvision:ImageFolder?root={tmp_path}/images"
    client = named_client(spec, cache_dir=tmp_path)
    num = len(client.train) + len(client.test)
    assert len(client.test) == round(num / 5)
    assert not set(client.train.ids) & set(client.test.ids)
    assert named_client(spec, cache_dir=tmp_path).test.ids == client.test.ids
    with pytest.raises(ValueError, match="has no parts: leave test_split=x out"):
        named_client(f"{spec}&test_split=x", cache_dir=tmp_path)


def test_hugging_faces_splits_are_train_and_test(prints, tmp_path):
    client = named_client(f"hf:{prints}", cache_dir=tmp_path)
    assert client.train.ids[0] == "train/000000"
    assert client.test.ids[0] == "validation/000000"  # there is no test
    assert client.classes == ["bar", "beam"]
    other = named_client(f"hf:{prints}?test_split=unlabelled&id_column=key", cache_dir=tmp_path)
    assert other.test.ids[0] == "unlabelled-0"
    flat = named_client(f"hf:{tmp_path}/flat", cache_dir=tmp_path)
    assert (len(flat.train), len(flat.test)) == (16, 4)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("torchvision:MNISTT?root=R", "did you mean 'MNIST'"),
        ("torchvision:MNIST?root=/nowhere", "looked in '/nowhere'"),
        ("torchvision:MNIST?root=R&tset_split=test", "no option 'tset_split'"),
        ("torchvision:MNIST?root=R&test_split=val", "test_split=train and test, not val"),
        ("torchvision:", "does not say which"),
        ("hf:/nowhere", "does not exist"),
        ("hf:P?split=trian", "no split 'trian'"),
        ("hf:P?test_split=tset", "no split 'tset'"),
        ("hf:P?label_column=kind", "no column 'kind'"),
    ],
)
def test_mistakes_are_one_line(mnist, prints, tmp_path, spec, expected):
    spec = spec.replace("root=R", f"root={mnist}").replace("hf:P", f"hf:{prints}")
    with pytest.raises(ValueError, match=expected) as caught:
        named_client(spec, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_client_without_labels_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    data = datasets.Dataset.from_list([{"image": draw(0, rng)}] * 5)
    data.cast_column("image", datasets.Image()).save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(ValueError, match=r"no labels that are known; .* label_column=…"):
        named_client(f"hf:{tmp_path}/bare", cache_dir=tmp_path)


# --- the client and the pool are of the same data set ---


def test_what_the_client_gets_of_a_set_is_not_in_the_pool(mnist, tmp_path):
    spec = f"torchvision:MNIST?root={mnist}"
    scenario = opened(tmp_path, spec, spec, fraction=0.25)
    assert (len(scenario.client_train), len(scenario.client_test)) == (10, 10)
    assert len(scenario.pool) == 30
    check_nothing_is_on_two_sides(scenario)
    both = tmp_path / "pools.yaml"
    both.write_text(
        f"- {{name: other, images: data/FashionMNIST}}\n- {{name: mnist, images: '{spec}'}}\n"
    )
    for number in range(3):
        path = mnist / f"FashionMNIST/{number}.png"
        path.parent.mkdir(exist_ok=True)
        draw(number, np.random.default_rng(0)).save(path)
    scenario = opened(tmp_path, str(both), spec, size=4)
    assert len(scenario.pool) == 3 + 36
    kept = {name.removeprefix("mnist/") for name in scenario.pool.ids}
    assert not kept & set(scenario.client_train.ids)


def test_images_that_measure_are_not_in_the_pool_either(mnist, tmp_path):
    scenario = opened(
        tmp_path, f"torchvision:MNIST?root={mnist}&split=test", f"torchvision:MNIST?root={mnist}"
    )
    with pytest.raises(ValueError, match=r"none is left as pool: .*client\.fraction=0\.5"):
        len(scenario.pool)


def test_other_parts_of_the_set_stay_whole(mnist, tmp_path):
    client = f"torchvision:MNIST?root={mnist}&split=test"
    scenario = opened(tmp_path, f"torchvision:MNIST?root={mnist}", client)
    assert len(scenario.pool) == 40
    assert (len(scenario.client_train), len(scenario.client_test)) == (8, 2)


def test_rows_count_under_other_names_too(prints, tmp_path):
    scenario = opened(
        tmp_path, f"hf:{prints}?split=train&id_column=key", f"hf:{prints}", fraction=0.5
    )
    assert len(scenario.pool) == 10
    taken = {int(name.rpartition("/")[2]) for name in scenario.client_train.ids}
    left = {int(name.rpartition("-")[2]) for name in scenario.pool.ids}
    assert taken | left == set(range(20))
    assert not taken & left


def test_the_clients_folder_under_another_name_is_refused(tmp_path):
    folder = make_folder(tmp_path / "images")
    client = f"torchvision:ImageFolder?root={folder}"
    with pytest.raises(ValueError, match="overlap"):
        len(opened(tmp_path, str(folder), client).pool)


@pytest.mark.slow
def test_train_py_with_a_client_by_name(prints, tmp_path, capsys):
    argv = [
        *SMALL,
        "data=folder",
        f"data.pool=hf:{prints}",
        f"data.client=hf:{prints}",
        "client.size=8",
        "labels=public",
        "selection.size=10",
        "probe.num_clusters=3",
        "trainer.max_epochs=1",
        f"run_root={tmp_path}",
        "run_id=run",
    ]
    assert train.main(argv) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0 <= summary["simulation"]["test_accuracy"] <= 1
    assert train.main([*argv, "data.client=hf:nowhere", "run_id=other"]) == 2
    assert f"'{Path.cwd()}/nowhere' does not exist" in capsys.readouterr().err
