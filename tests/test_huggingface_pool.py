"""Against `datasets` itself, on what it writes: saved folders, parquet files, image folders."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
import socket

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datamodules.huggingface_pool import huggingface_pool
from ecos_pl.image_reader import SourceDataset
from ecos_pl.images import UnreadableImage

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family != socket.AF_UNIX:  # which DataLoader's workers use
            raise AssertionError("no network in tests")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


def pixels(number):
    return np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def encoded(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def table(num=9, first=0, **columns):
    rows = {
        "image": [
            {"bytes": encoded(Image.fromarray(pixels(first + i))), "path": f"{i}.png"}
            for i in range(num)
        ],
        "label": [i % 3 for i in range(num)],
        **columns,
    }
    features = datasets.Dataset.from_dict(rows).features
    features["image"] = datasets.Image()
    features["label"] = datasets.ClassLabel(names=NAMES)
    return datasets.Dataset.from_dict(rows, features=features)


def check(pool, num=9, first=0, prefix=""):
    assert len(pool) == num
    assert list(pool.ids) == [f"{prefix}{i:06d}" for i in range(num)]
    assert list(pool.labels) == [NAMES[i % 3] for i in range(num)]
    assert [pool.labels[i] for i in range(num)] == list(pool.labels)
    assert list(pool.domains) == [None] * num
    for i in range(num):
        assert (np.asarray(pool.read(i)) == pixels(first + i)).all()


def test_a_saved_data_set_in_several_files(tmp_path):
    table().save_to_disk(tmp_path / "prints", num_shards=4)
    pool = huggingface_pool(tmp_path / "prints", {}, cache_dir=tmp_path / "c", licence="CC0-1.0")
    check(pool)
    (part,) = pool.parts
    assert (part.name, part.licence, part.start, part.stop) == ("prints", "CC0-1.0", 0, 9)
    assert not (tmp_path / "c").exists()  # read in place


def test_saved_splits(tmp_path):
    both = datasets.DatasetDict({"train": table(), "test": table(4, first=100)})
    both.save_to_disk(tmp_path / "prints")
    check(huggingface_pool(tmp_path / "prints", {}, cache_dir=tmp_path), prefix="train/")
    pool = huggingface_pool(tmp_path / "prints", {"split": "test"}, cache_dir=tmp_path)
    check(pool, 4, 100, "test/")
    assert pool.parts[0].name == "prints/test"


def test_parquet_files_laid_out_as_on_the_hub(tmp_path):
    (tmp_path / "prints/data").mkdir(parents=True)
    table(5).to_parquet(tmp_path / "prints/data/train-00000-of-00002.parquet")
    rest = table(9).select(range(5, 9))
    rest.to_parquet(tmp_path / "prints/data/train-00001-of-00002.parquet")
    table(2, first=50).to_parquet(tmp_path / "prints/data/validation-00000-of-00001.parquet")
    cache = tmp_path / "cache"
    check(huggingface_pool(tmp_path / "prints", {}, cache_dir=cache), prefix="train/")
    pool = huggingface_pool(tmp_path / "prints", {"split": "validation"}, cache_dir=cache)
    check(pool, 2, 50, "validation/")
    assert list(cache.iterdir()) == [cache / "huggingface"]


def test_changed_parquet_files_are_another_pool(tmp_path):
    folder = tmp_path / "prints"
    folder.mkdir()
    table().to_parquet(folder / "x.parquet")
    first = huggingface_pool(folder, {}, cache_dir=tmp_path / "c")
    same = huggingface_pool(folder, {}, cache_dir=tmp_path / "c")
    assert same.fingerprint == first.fingerprint
    table(9, first=30).to_parquet(folder / "x.parquet")
    second = huggingface_pool(folder, {}, cache_dir=tmp_path / "c")
    check(second, 9, 30, "train/")  # not what the cache still holds
    assert second.fingerprint != first.fingerprint


def test_parquet_of_others_with_bytes_alone(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    rows = [encoded(Image.fromarray(pixels(i))) for i in range(3)]
    columns = {"jpg": rows, "key": ["a/1", "b", "ü 3"], "kind": ["x", None, "y"]}
    pq.write_table(pa.table(columns), folder / "0.parquet")
    options = {"image_column": "jpg", "id_column": "key", "label_column": "kind"}
    pool = huggingface_pool(folder, options, cache_dir=tmp_path / "c")
    assert list(pool.ids) == ["a/1", "b", "ü 3"]
    assert list(pool.labels) == ["x", None, "y"]
    assert (np.asarray(pool.read(2)) == pixels(2)).all()
    with pytest.raises(ValueError, match="choose one with image_column"):
        huggingface_pool(folder, {}, cache_dir=tmp_path / "c")


def test_an_image_folder(tmp_path):
    folder = tmp_path / "prints"
    for number, name in enumerate(("ant/1.png", "bee/2 .png", "cow/ü.png")):
        (folder / "train" / name).parent.mkdir(parents=True)
        Image.fromarray(pixels(number)).save(folder / "train" / name)
    pool = huggingface_pool(folder, {}, cache_dir=tmp_path / "c")
    check(pool, 3, prefix="train/")
    size = sum(file.stat().st_size for file in (tmp_path / "c").rglob("*.arrow"))
    assert size < 10_000  # paths, not images
    os.utime(folder / "train/ant/1.png", ns=(1, 1))
    again = huggingface_pool(folder, {}, cache_dir=tmp_path / "c")
    assert again.fingerprint != pool.fingerprint


def test_an_image_folder_with_metadata(tmp_path):
    folder = tmp_path / "prints"
    folder.mkdir()
    lines = []
    for number in range(3):
        Image.fromarray(pixels(number)).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "artist": f"a{number % 2}", "key": f"k{number}"}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    options = {"domain_column": "artist", "id_column": "key"}
    pool = huggingface_pool(folder, options, cache_dir=tmp_path / "c")
    assert list(zip(pool.ids, pool.domains, pool.labels, strict=True)) == [
        ("k0", "a0", None),
        ("k1", "a1", None),
        ("k2", "a0", None),
    ]
    assert (np.asarray(pool.read(1)) == pixels(1)).all()


def test_images_are_read_as_a_folder_pool_reads_them(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = [
        encoded(Image.new("RGB", (8, 4), "red"), exif=exif),
        encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))),
        b"",
        b"no image",
        encoded(Image.fromarray(pixels(0)))[:60],
    ]
    stored = [{"bytes": row, "path": None} for row in rows]
    stored += [None, {"bytes": None, "path": "missing.png"}]
    stored += [{"bytes": None, "path": "https://example.org/x.png"}]
    # As pandas would write them: without the notes by which `datasets` knows an image.
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    (tmp_path / "x").mkdir()
    pq.write_table(pa.table({"image": pa.array(stored, kind)}), tmp_path / "x/0.parquet")
    pool = huggingface_pool(tmp_path / "x", {}, cache_dir=tmp_path)
    assert pool.read(0).size == (4, 8)
    assert pool.read(1).getpixel((0, 0)) == (255, 255, 255)
    reasons = ["empty", "not an image", "cannot read", "row holds none", "No such", "elsewhere"]
    for index, reason in enumerate(reasons, 2):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            pool.read(index)
        assert "\n" not in str(caught.value)
        assert f"row {index}" in str(caught.value) or "missing.png" in str(caught.value)


def test_labels_of_all_kinds(tmp_path):
    data = table(4, text=["x", "", None, "x"], number=[3, 1, None, 3])
    data.cast_column("label", datasets.Value("int64")).save_to_disk(tmp_path / "x")
    labels = {}
    for name in ("label", "text", "number"):
        options = {"label_column": name}
        pool = huggingface_pool(tmp_path / "x", options, cache_dir=tmp_path)
        labels[name] = list(pool.labels)
    assert labels == {
        "label": ["0", "1", "2", "0"],
        "text": ["x", "", None, "x"],
        "number": ["3", "1", None, "3"],
    }
    pool = huggingface_pool(tmp_path / "x", {}, cache_dir=tmp_path)
    assert list(pool.labels) == labels["label"]  # a column called so
    with pytest.raises(ValueError, match="names no image in row 1"):
        huggingface_pool(tmp_path / "x", {"id_column": "text"}, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="names no image in row 2"):
        huggingface_pool(tmp_path / "x", {"id_column": "number"}, cache_dir=tmp_path)


def test_a_class_number_below_zero_is_no_class(tmp_path):
    rows = {"image": [None, None], "label": [-1, 2]}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "x")
    pool = huggingface_pool(tmp_path / "x", {}, cache_dir=tmp_path)
    assert list(pool.labels) == [None, "cow"]


def test_rows_chosen_before_saving(tmp_path):
    table().filter(lambda row: row["label"] == 1).save_to_disk(tmp_path / "x")
    pool = huggingface_pool(tmp_path / "x", {}, cache_dir=tmp_path)
    assert len(pool) == 3
    assert (np.asarray(pool.read(1)) == pixels(4)).all()


def test_pickled_it_is_its_paths(tmp_path):
    table(300).save_to_disk(tmp_path / "x", num_shards=3)
    pool = huggingface_pool(tmp_path / "x", {}, cache_dir=tmp_path)
    pool.read(200)
    content = pickle.dumps(pool)
    assert len(content) < 5000
    check(pickle.loads(content), 300)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read(tmp_path, method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    table().save_to_disk(tmp_path / "x")
    dataset = SourceDataset(huggingface_pool(tmp_path / "x", {}, cache_dir=tmp_path), range(9), 16)
    expected = [dataset[i][1] for i in range(9)]
    loader = DataLoader(dataset, 4, num_workers=1, multiprocessing_context=method)
    found = torch.cat([images for _, images in loader])
    assert (found == torch.stack(expected)).all()


def test_nothing_is_written_beside_the_data_or_in_the_users_cache(tmp_path, monkeypatch):
    folder = tmp_path / "prints"
    folder.mkdir()
    table().to_parquet(folder / "x.parquet")
    elsewhere = tmp_path / "users cache"
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        if hasattr(datasets.config, name):
            monkeypatch.setattr(datasets.config, name, str(elsewhere))
    huggingface_pool(folder, {}, cache_dir=tmp_path / "c")
    assert not elsewhere.exists()
    assert [path.name for path in folder.iterdir()] == ["x.parquet"]


@pytest.mark.parametrize("name", ["a b", "ü🦆", "50% of #1", "[x]", "a*", "{x,y}", "what?", "x=1"])
@pytest.mark.parametrize("kind", ["saved", "parquet", "imagefolder"])
def test_odd_folder_names(tmp_path, name, kind):
    folder = tmp_path / name
    folder.mkdir()
    if kind == "saved":
        table(2).save_to_disk(folder)
    elif kind == "parquet":
        table(2).to_parquet(folder / "train.parquet")
    else:
        for number, label in enumerate(NAMES[:2]):
            (folder / label).mkdir()
            Image.fromarray(pixels(number)).save(folder / label / "x.png")
    if kind != "saved" and set(name) & set("*?["):  # would match other folders, or nothing
        with pytest.raises(ValueError, match="rename it"):
            huggingface_pool(folder, {}, cache_dir=tmp_path / "c")
        return
    pool = huggingface_pool(folder, {}, cache_dir=tmp_path / "c")
    check(pool, 2, prefix="" if kind == "saved" else "train/")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    table().save_to_disk(root / "one")
    datasets.DatasetDict({"a": table(), "b": table()}).save_to_disk(root / "two")
    data = table(3, other=[1.5, 2.5, 3.5], second=[None, None, b"x"])
    data.cast_column("second", datasets.Image()).save_to_disk(root / "many")
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    (root / "damaged").mkdir()
    (root / "damaged/x.parquet").write_bytes(b"PAR1 no")
    shutil.copytree(root / "one", root / "cut")
    for path in (root / "cut").glob("*.arrow"):
        path.write_bytes(path.read_bytes()[:50])
    (root / "lost").mkdir()
    shutil.copy(root / "one/state.json", root / "lost")
    datasets.Dataset.from_dict({"image": [], "label": []}).save_to_disk(root / "none")
    return root


REFUSED = [
    ("nowhere", {}, "does not exist"),
    ("file", {}, "is a file"),
    ("empty", {}, "holds no Hugging Face data set"),
    ("damaged", {}, "cannot open"),
    ("cut", {}, "cannot open"),
    ("lost", {}, "cannot open"),
    ("none", {}, "cannot open"),  # `datasets` cannot read what it saved of no rows
    ("one", {"split": "train"}, "has no splits"),
    ("two", {}, "several splits: choose one with split=…"),
    ("two", {"split": "c"}, "no split 'c'"),
    ("one", {"spilt": "a"}, "did you mean 'split'"),
    ("one", {"trust_remote_code": "true"}, "no option 'trust_remote_code'"),
    ("one", {"image_column": "imgae"}, "did you mean 'image'"),
    ("one", {"image_column": "label"}, "holds no images but int64"),
    ("one", {"label_column": "image"}, "holds no names but struct"),
    ("one", {"id_column": "label"}, "twice: ids must be unique"),
    ("many", {}, r"several columns of images \(image, second\)"),
    ("many", {"image_column": "image", "label_column": "other"}, "holds no names but double"),
]


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED)
def test_refusals_are_one_line(layouts, tmp_path, name, options, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        huggingface_pool(layouts / name, options, cache_dir=tmp_path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
