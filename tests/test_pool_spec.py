import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.deferred_pool import DeferredPool
from datamodules.pool_spec import embeddings_of, folders_of, open_pool, read_pool_file
from ecos_pl.images import scan_folder
from ecos_pl.proxy_set import licence_summary, pools_of

ROOT = Path(__file__).parents[1]


def png(shade):
    buffer = io.BytesIO()
    Image.new("L", (28, 28), shade).save(buffer, "png")
    return buffer.getvalue()


def make_folder(folder, *names):
    for shade, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(shade))
    return folder


def make_shard(path, *keys, first=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for shade, key in enumerate(keys, first):
            member = tarfile.TarInfo(f"{key}.png")
            member.size = len(png(shade))
            tar.addfile(member, io.BytesIO(png(shade)))


def make_mnist(root, num=4):
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    head = bytes([0, 0, 8])
    pixels = np.zeros((num, 28, 28), np.uint8) + np.arange(num, dtype=np.uint8)[:, None, None]
    size = num.to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
    (raw / "train-images-idx3-ubyte").write_bytes(head + b"\3" + size + pixels.tobytes())
    labels = bytes(range(num))
    (raw / "train-labels-idx1-ubyte").write_bytes(head + b"\1" + size[:4] + labels)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes((raw / name.replace("t10k", "train")).read_bytes())


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The present folder, with one pool of each kind."""
    datasets = pytest.importorskip("datasets")
    make_folder(tmp_path / "photos", "a/cat/0.png", "a/cat/1.png")
    make_shard(tmp_path / "shards/000.tar", "x", "y")
    make_shard(tmp_path / "shards/001.tar", "z", first=2)
    make_mnist(tmp_path / "data")
    saved = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(0), "path": None}]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    saved.save_to_disk(tmp_path / "prints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shades(pool):
    return [pool.read(i).getpixel((0, 0))[0] for i in range(len(pool))]


@pytest.mark.parametrize(
    ("spec", "num"),
    [
        ("photos", 2),
        ("photos/", 2),
        ("shards", 3),
        ("shards/000.tar", 2),
        ("shards/{000..001}.tar", 3),
        ("shards/00?.tar", 3),
        ("shards/000.tar::shards/001.tar", 3),
        ("torchvision:MNIST", 4),
        ("torchvision:MNIST?split=test", 4),
        ("hf:prints", 1),
    ],
)
def test_every_kind_from_a_word(here, spec, num):
    pool = open_pool(spec, cache_dir=here / "cache", licence="CC-BY-4.0")
    assert len(pool) == len(pool.ids) == len(pool.labels) == len(pool.domains) == num
    assert shades(pool) == list(range(num))
    (part,) = pool.parts
    assert (part.licence, part.start, part.stop) == ("CC-BY-4.0", 0, num)
    assert part.fingerprint == pool.fingerprint
    assert open_pool(spec, cache_dir=here / "cache").parts[0].licence is None
    assert embeddings_of(spec) == {}


def test_a_folder_pool_is_the_same_as_its_scan(here):
    pool = open_pool("photos", cache_dir=here / "cache")
    expected = scan_folder(here / "photos")
    assert list(pool.ids) == list(expected.ids)
    assert pool.fingerprint == expected.fingerprint


def test_absolute_paths_and_home(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    for spec in (str(here / "photos"), "~/photos", "hf:~/prints", "torchvision:MNIST?root=~/data"):
        assert len(open_pool(spec, cache_dir=here / "cache")) > 0


POOL_FILE = """\
- name: web           # a comment
  licence: CC-BY-4.0
  images: ../photos
- name: shards
  license: "all rights reserved:
    the museum"
  images: ../shards/{000..001}.tar
  embeddings: made/shards.npy
- {name: digits, images: "torchvision:MNIST", options: {root: ../data, train: true}}
- name: prints
  licence:
  images: hf:../prints
"""


def write_pools(here, text=POOL_FILE):
    folder = here / "lists"
    (folder / "made").mkdir(parents=True, exist_ok=True)
    np.save(folder / "made/shards.npy", np.zeros(3))
    (folder / "pools.yaml").write_text(text)
    return folder / "pools.yaml"


def test_a_pool_file(here):
    path = write_pools(here)
    pool = open_pool("lists/pools.yaml", cache_dir=here / "cache")
    assert [(part.name, part.licence, part.start, part.stop) for part in pool.parts] == [
        ("web", "CC-BY-4.0", 0, 2),
        ("shards", "all rights reserved: the museum", 2, 5),
        ("digits", None, 5, 9),
        ("prints", None, 9, 10),
    ]
    assert shades(pool) == [0, 1, 0, 1, 2, 0, 1, 2, 3, 0]
    assert pool.ids[0] == "web/a/cat/0.png"
    assert pool.ids[8] == "digits/MNIST/train/000003"
    assert list(pool.labels) == ["cat", "cat", None, None, None, *"0123", None]
    assert list(pool.domains)[:2] == ["a", "a"]
    assert pool.domains[8] == "digits"
    assert embeddings_of(str(path)) == {"shards": here / "lists/made/shards.npy"}
    filled = open_pool(str(path), cache_dir=here / "cache", licence="MIT")
    assert [part.licence for part in filled.parts][2:] == ["MIT", "MIT"]
    assert filled.fingerprint == pool.fingerprint


def test_folders_that_a_client_must_not_lie_in(here):
    assert folders_of(str(write_pools(here))) == [here / "photos", here / "prints"]
    assert folders_of("photos/") == [here / "photos"]
    assert folders_of("hf:prints?split=train") == [here / "prints"]
    for spec in ("shards", "shards/*.tar", "torchvision:MNIST", "nowhere"):
        assert folders_of(spec) == []


def test_the_manifest_of_a_pool_file(here):
    pool = open_pool(str(write_pools(here)), cache_dir=here / "cache")
    entries = pools_of(pool.parts, np.array([0, 3, 4, 8]))
    assert [(e["name"], e["num_images"], e["num_chosen"]) for e in entries] == [
        ("web", 2, 1),
        ("shards", 3, 2),
        ("digits", 4, 1),
        ("prints", 1, 0),
    ]
    assert licence_summary(entries) == (
        "all rights reserved: the museum: 2, CC-BY-4.0: 1, unknown: 1"
    )


def test_deferred_it_opens_later(here):
    pool = DeferredPool(lambda: open_pool("later", cache_dir=here / "cache"))
    with pytest.raises(ValueError, match="does not exist"):
        len(pool)
    (here / "photos").rename(here / "later")
    assert shades(pool) == [0, 1]


REFUSED_WORDS = [
    ("", "no pool is named"),
    ("nowhere", "does not exist"),
    ("nowhere.tar", "no shard"),
    ("nowhere.yaml", "no pool file"),
    ("s3://bucket/x", "mounted"),
    ("torchvison:MNIST", "did you mean torchvision:MNIST"),
    ("HF:prints", "did you mean hf:prints"),
    ("hf:", "does not say which"),
    ("torchvision:MNIST?split", "expected option=value|no data set"),
    ("torchvision:MNIST?root=data&root=x", "'root' is given twice"),
    ("torchvision:MNIST?root=data&split", "expected option=value"),
    ("hf:nowhere", "does not exist"),
]


@pytest.mark.parametrize(("spec", "reason"), REFUSED_WORDS)
def test_words_are_refused_in_one_line(here, spec, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        open_pool(spec, cache_dir=here / "cache")
    assert "\n" not in str(caught.value)


REFUSED_FILES = [
    ("", "must be a list"),
    ("name: a\nimages: b", "must be a list"),
    ("- a\n- b", "line 1: expected a pool"),
    ("- {name: a, images: ../photos}\n- [", "line 2|line 3"),
    ("- {name: a, images: ../photos}\n- {nmae: b, images: c}", "line 2: unknown key 'nmae': did"),
    ("- {name: a, images: ../photos, colour: red}", "unknown key 'colour': a pool has name"),
    ("- {images: ../photos}", "needs a value for 'name'"),
    ("- {name: a}", "needs a value for 'images'"),
    ("- {name: a, images: }", "needs a value for 'images'"),
    ("- {name: a, images: [x, y]}", "images must be one text"),
    ("- {name: a, name: b, images: x}", "'name' stands there twice"),
    ("- {name: a, images: x, licence: y, license: z}", "either licence or license"),
    ("- {name: a, images: ../photos, options: 3}", "options must be written"),
    ("- {name: a, images: ../photos, options: {x: 1}}", r"takes no options \(x\)"),
    ("- {name: a, images: other.yaml}", "cannot list another one"),
    ("- {name: a, images: ../photos, embeddings: no.npy}", "no.npy' are not there"),
    ("- {name: a/b, images: ../photos}", "without a slash"),
    ("- {name: a, images: ../photos}\n- {name: a, images: ../shards}", "two pools are called 'a'"),
    ("- {name: a, images: ../photos}\n- {name: b, images: ../photos/}", "hold the same images"),
    ("- {name: a, images: photos}", "pool 'a': .*lists/photos' does not exist"),
    ("- {name: a, images: 'torchvision:MNIST'}", "lists/data"),
    ("- {name: a, images: 'hf:../prints?split=x', options: {split: x}}", "given twice"),
    ("- {name: a, images: 'hf:../prints', options: {spilt: x}}", "did you mean 'split'"),
]


@pytest.mark.parametrize(("text", "reason"), REFUSED_FILES)
def test_pool_files_are_refused_in_one_line(here, text, reason):
    path = write_pools(here, text)
    with pytest.raises(ValueError, match=reason) as caught:
        open_pool(str(path), cache_dir=here / "cache")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(here):
    path = write_pools(here)
    path.write_bytes(gzip.compress(b"x"))
    with pytest.raises(ValueError, match="cannot read pool file") as caught:
        open_pool(str(path), cache_dir=here / "cache")
    assert "\n" not in str(caught.value)


def test_words_that_yaml_would_turn_into_something_else(here):
    text = "- {name: no, licence: 1.0, images: ../photos}\n- {name: 007, images: ../shards}\n"
    entries = read_pool_file(write_pools(here, text))
    assert [(entry.name, entry.licence) for entry in entries] == [("no", "1.0"), ("007", None)]


def test_images_count_before_shards_beside_them(here):
    make_shard(here / "photos/a/cat/extra.tar", "x")
    make_shard(here / "mixed/sub/deep/0.tar", "x")
    assert len(open_pool("photos", cache_dir=here / "c")) == 2
    assert len(open_pool("mixed", cache_dir=here / "c")) == 1


def test_options_in_an_address_may_be_escaped(here):
    (here / "my data").mkdir()
    (here / "data/MNIST").rename(here / "my data/MNIST")
    pool = open_pool("torchvision:MNIST?root=my%20data", cache_dir=here / "c")
    assert len(pool) == 4
