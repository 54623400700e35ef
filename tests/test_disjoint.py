"""That no image is in two of client-train, client-test and pool, on sources made here."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import datamodules.disjoint as disjoint
from datamodules.client_draw import ClientDraw
from datamodules.disjoint import check_disjoint, client_facts
from datamodules.folder import folder_data
from datamodules.mixed_digits import mixed_digits
from datamodules.narrowed import narrowed
from datamodules.scenario import Scenario
from ecos_pl.images import PoolPart, UnreadableImage

PAIRS = ["client_train in client_test", "client_train in pool", "client_test in pool"]


class Pictures:
    """Images of one colour each; None is an unreadable one."""

    def __init__(self, name, colours, prefix=None):
        self.name, self.fingerprint = name, f"{name} {colours}"
        self.ids = [f"{prefix or name}/{k}" for k in range(len(colours))]
        self.labels, self.domains = ["a"] * len(colours), [None] * len(colours)
        self.colours, self.num_reads = colours, 0
        self.parts = [PoolPart(name, None, 0, len(colours), self.fingerprint)]

    def __len__(self):
        return len(self.ids)

    def read(self, index):
        self.num_reads += 1
        if self.colours[index] is None:
            raise UnreadableImage("broken")
        return Image.new("RGB", (3, 3), (self.colours[index],) * 3)


def scenario(train, test, pool, **options):
    pool, train, test = Pictures("pool", pool), Pictures("train", train), Pictures("test", test)
    return Scenario("x", pool, train, test, ["a"], **options)


def test_disjoint_parts_are_stated_so():
    found = check_disjoint(scenario([1, 2], [3], [4, 5, None, None]))
    assert found == {"same_ids": 0, "same_pixels": dict.fromkeys(PAIRS, 0)}


@pytest.mark.parametrize(
    ("train", "test", "pool", "words"),
    [
        ([1, 2], [3], [9, 2], "'train/1' in the client's training images and 'pool/1' in the pool"),
        ([1, 2], [3], [3], "'test/0' in the client's test images and 'pool/0' in the pool"),
        (
            [1, 2],
            [2],
            [9],
            "'train/1' in the client's training images and 'test/0' in the",
        ),
    ],
)
def test_a_picture_in_two_parts_is_one_line_with_an_example(train, test, pool, words):
    with pytest.raises(ValueError, match="same picture") as caught:
        check_disjoint(scenario(train, test, pool))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_repetitions_of_a_public_data_set_are_counted_and_said(caplog):
    found = check_disjoint(scenario([1, 1, 2], [3], [1, 5], repeats_allowed=True))
    assert found["same_pixels"] == dict(zip(PAIRS, [0, 2, 0], strict=True))
    assert "2 pictures are in two parts of the data set itself" in caplog.text


def test_the_same_id_with_the_same_pixels_is_refused_whatever_the_size(monkeypatch):
    monkeypatch.setattr(disjoint, "BUDGET", 1)
    two = scenario([1, 2], [3], [9, 2], repeats_allowed=True)
    found = check_disjoint(two)
    assert found["same_pixels"] == dict.fromkeys(PAIRS, None)
    same = replace(two, pool=Pictures("other", [9, 2], prefix="train"))
    with pytest.raises(ValueError, match="image 'train/1' is in the client's training images"):
        check_disjoint(same)


def test_the_same_id_with_other_pixels_is_another_image():
    same = replace(scenario([1], [3], [9]), pool=Pictures("other", [8], prefix="train"))
    assert check_disjoint(same)["same_pixels"] == dict.fromkeys(PAIRS, 0)


def test_results_and_the_pools_hashes_are_kept_and_nothing_of_the_client_is(tmp_path):
    first = scenario([1, 2], [3], [7, 8, 9])
    found = check_disjoint(first, tmp_path)
    num_reads = first.pool.num_reads
    assert check_disjoint(first, tmp_path) == found
    assert first.pool.num_reads == num_reads
    other = replace(first, client_train=Pictures("train", [4, 5, 6]))
    check_disjoint(other, tmp_path)  # another client: the pool's hashes were on disk
    assert first.pool.num_reads == num_reads + 3  # to guess how large its images are
    [hashes] = tmp_path.glob("pixel_hashes/*")
    assert len(np.load(hashes)) == 3
    for path in tmp_path.glob("simulation/*"):
        assert set(json.loads(path.read_text())["same_pixels"].values()) == {0}
    with pytest.raises(ValueError, match="same picture"):
        check_disjoint(replace(first, client_train=Pictures("train", [9])), tmp_path)


def test_a_client_trained_alone_needs_no_pool():
    first = scenario([1, 2], [3], [1])
    found = check_disjoint(first, with_pool=False)
    assert found["same_pixels"] == {PAIRS[0]: 0}
    assert first.pool.num_reads == 0


def test_the_shipped_benchmark_is_disjoint(tmp_path):
    found = check_disjoint(mixed_digits(), tmp_path)
    assert found["same_pixels"] == dict.fromkeys(PAIRS, 0)


def test_a_file_copied_into_the_pool_is_found(image_tree, tmp_path):
    pool = shutil.copytree(image_tree / "pool", tmp_path / "pool")
    shutil.copy(next((image_tree / "client" / "train").rglob("*.png")), pool / "copy.png")
    with pytest.raises(ValueError, match=r"'copy\.png' in the pool are the same picture"):
        check_disjoint(folder_data(pool, image_tree / "client"))


def test_facts_count_the_clients_images_by_class():
    whole = mixed_digits()
    part = narrowed(whole, ClientDraw(size=50, classes=("1", "7"), seed=4))
    facts = client_facts(part)
    assert facts["num_train"] == 50
    assert facts["domain"] == "mnist"
    assert set(facts["classes"]) == {"1", "7"}
    assert sum(train for train, _ in facts["classes"].values()) == 50
    for name, (train, test) in facts["classes"].items():
        assert train == part.client_train.labels.count(name)
        assert test == whole.client_test.labels.count(name)
