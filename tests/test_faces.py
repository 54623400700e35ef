"""Readers of CelebA, UTKFace and Tiny-ImageNet, on small folders in the official layouts."""

import logging
import pickle
import shutil

import numpy as np
import pytest

from datamodules.celeba import celeba, persons
from datamodules.tiny_imagenet import tiny_imagenet
from datamodules.utkface import utkface
from ecos_pl.images import UnreadableImage, read_image
from tests.miniatures import (
    UTKFACE_NAMES,
    UTKFACE_ODD_NAMES,
    make_celeba,
    make_tiny_imagenet,
    make_utkface,
)


def check_one_line(error, *expected):
    assert "\n" not in str(error.value)
    for text in expected:
        assert text in str(error.value)


# --- CelebA ---


@pytest.fixture
def faces(tmp_path):
    return make_celeba(tmp_path / "data")


def test_celeba_has_the_official_parts_and_the_attribute_as_label(faces, tmp_path):
    for number, part in enumerate(("train", "valid", "test")):
        source = celeba(faces, part, cache_dir=tmp_path / "cache")
        numbers = range(20 * number + 1, 20 * number + 21)
        assert list(source.ids) == [f"{i:06d}.jpg" for i in numbers]
        assert list(source.labels) == ["male" if i % 2 == 0 else "female" for i in numbers]
        assert source.parts[0].name == f"CelebA/{part}"
        first = faces / "celeba/img_align_celeba" / source.ids[0]
        assert (np.asarray(source.read(0)) == np.asarray(read_image(first))).all()
    smiling = celeba(faces, "train", "Smiling", cache_dir=tmp_path / "cache")
    expected = ["Smiling" if i % 3 == 0 else "not_Smiling" for i in range(1, 21)]
    assert list(smiling.labels) == expected
    assert pickle.loads(pickle.dumps(smiling)).read(3).size == (12, 12)


def test_celebas_fingerprint_covers_part_target_and_files(faces, tmp_path):
    def of(part="train", target="Male"):
        return celeba(faces, part, target, cache_dir=tmp_path / "cache").fingerprint

    assert of() == of() != of("valid") != of("valid", "Smiling")
    before = of()
    path = faces / "celeba/img_align_celeba/000001.jpg"
    path.write_bytes(path.read_bytes() + b"\0")
    assert of() != before


def test_persons_are_known_where_the_list_is(faces, tmp_path):
    assert list(persons(faces).values())[:4] == [1, 1, 2, 2]
    (faces / "celeba/identity_CelebA.txt").unlink()
    assert persons(faces) is None


def cut(path, lines):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (shutil.rmtree, ["CelebA is missing: looked for", "/celeba'"]),
        (lambda b: shutil.rmtree(b / "img_align_celeba"), ["/img_align_celeba'", "unzip"]),
        (lambda b: (b / "img_align_celeba/000003.jpg").unlink(), ["1 of 20 images", "000003.jpg"]),
        (lambda b: (b / "list_attr_celeba.txt").unlink(), ["looked for", "list_attr_celeba.txt"]),
        (lambda b: cut(b / "list_attr_celeba.txt", 30), ["28 images, not the 60"]),
        (lambda b: cut(b / "list_attr_celeba.txt", 0), ["is empty"]),
        (lambda b: cut(b / "list_attr_celeba.txt", 1), ["line 1"]),
        (lambda b: cut(b / "list_eval_partition.txt", 30), ["60 and 30", "half-downloaded"]),
        (
            lambda b: (b / "list_attr_celeba.txt").write_text("<html>too many downloads</html>\n"),
            ["line 1: '<html>too many downloads</html>' is not the number of images"],
        ),
        (
            lambda b: (b / "list_eval_partition.txt").write_bytes(b"PK\x03\x04\xff\xfe"),
            ["it is no text"],
        ),
    ],
)
def test_celeba_that_is_not_whole_is_one_line(faces, tmp_path, break_it, expected):
    break_it(faces / "celeba")
    with pytest.raises(ValueError, match="CelebA") as caught:
        celeba(faces, "train", cache_dir=tmp_path / "cache")
    check_one_line(caught, "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html", *expected)


def test_an_attribute_that_is_none_names_the_nearest(faces, tmp_path):
    with pytest.raises(
        ValueError, match="no attribute 'Smilling': did you mean 'Smiling'"
    ) as error:
        celeba(faces, "train", "Smilling", cache_dir=tmp_path / "cache")
    check_one_line(error)


def test_a_damaged_face_is_found_when_it_is_read(faces, tmp_path):
    path = faces / "celeba/img_align_celeba/000002.jpg"
    path.write_bytes(path.read_bytes()[:100])
    source = celeba(faces, "train", cache_dir=tmp_path / "cache")
    with pytest.raises(UnreadableImage, match=r"000002\.jpg"):
        source.read(1)


# --- UTKFace ---


def test_utkface_reads_the_gender_in_a_name_and_counts_odd_names(tmp_path, caplog):
    root = make_utkface(tmp_path / "data")
    with caplog.at_level(logging.WARNING):
        source = utkface(root, cache_dir=tmp_path / "cache")
    gender = {"0": "male", "1": "female"}
    assert list(source.ids) == sorted(UTKFACE_NAMES)
    assert list(source.labels) == [gender[name.split("_")[1]] for name in source.ids]
    (record,) = caplog.records
    assert "2 of 6 images are left out" in record.getMessage()
    assert all(name in record.getMessage() for name in UTKFACE_ODD_NAMES)
    assert source.read(0).mode == "RGB"


def test_utkface_that_is_missing_or_something_else_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="looked for") as caught:
        utkface(tmp_path, cache_dir=tmp_path / "cache")
    check_one_line(caught, f"{tmp_path}/UTKFace", "https://susanqq.github.io/UTKFace/")
    root = make_utkface(tmp_path / "data")
    for name in UTKFACE_NAMES:
        (root / "UTKFace" / name).unlink()
    with pytest.raises(ValueError, match="no image in") as caught:
        utkface(root, cache_dir=tmp_path / "cache")
    check_one_line(caught, UTKFACE_ODD_NAMES[0], "https://susanqq.github.io/UTKFace/")


# --- Tiny-ImageNet ---


def test_tiny_imagenet_has_two_parts_with_words(tmp_path):
    root = make_tiny_imagenet(tmp_path / "data")
    train = tiny_imagenet(root, "train", cache_dir=tmp_path / "cache")
    assert train.ids[0] == "n01443537/images/n01443537_0.JPEG"
    assert list(train.labels) == [
        *["n01443537 goldfish"] * 3,
        *["n01629819 European fire salamander"] * 3,
    ]
    val = tiny_imagenet(root, "val", cache_dir=tmp_path / "cache")
    assert list(val.ids) == [f"images/val_{i}.JPEG" for i in range(4)]
    assert [label.split()[0] for label in val.labels] == ["n01443537", "n01629819"] * 2
    path = root / "tiny-imagenet-200/val/images/val_2.JPEG"
    assert (np.asarray(val.read(2)) == np.asarray(read_image(path))).all()
    (root / "tiny-imagenet-200/words.txt").unlink()
    assert tiny_imagenet(root, "val", cache_dir=tmp_path / "cache").labels[0] == "n01443537"


@pytest.mark.parametrize(
    ("break_it", "split", "expected"),
    [
        (shutil.rmtree, "train", "looked for"),
        (lambda b: (b / "wnids.txt").unlink(), "train", "wnids.txt is missing"),
        (lambda b: shutil.rmtree(b / "train/n01629819"), "train", "1 of the 2 classes"),
        (lambda b: shutil.rmtree(b / "val"), "val", "the val part of Tiny-ImageNet is missing"),
        (lambda b: (b / "val/val_annotations.txt").unlink(), "val", "val_annotations.txt"),
        (lambda b: (b / "val/images/val_1.JPEG").unlink(), "val", "1 of 4 images"),
        (
            lambda b: (b / "val/val_annotations.txt").write_text("val_0.JPEG\tn014"),
            "val",
            r"line 1: 'val_0\.JPEG\\tn014' is not",
        ),
    ],
)
def test_tiny_imagenet_that_is_not_whole_is_one_line(tmp_path, break_it, split, expected):
    root = make_tiny_imagenet(tmp_path / "data")
    break_it(root / "tiny-imagenet-200")
    with pytest.raises(ValueError, match=expected) as caught:
        tiny_imagenet(root, split, cache_dir=tmp_path / "cache")
    check_one_line(caught, "http://cs231n.stanford.edu/tiny-imagenet-200.zip", str(root))
