import csv
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ecos_pl.images import PoolPart
from ecos_pl.proxy_set import ProxySet, licence_summary, pool_names, pools_of

AWKWARD = ["a,b.png", 'say "hi"', "line\nbreak", "re\rturn", "both\r\n", "ünï/🦆\u2028", " ", ""]


def proxy_set(num=5, num_classes=3, **changes):
    generator = torch.Generator().manual_seed(num)
    targets = torch.rand(num, num_classes, generator=generator).softmax(1)
    fields = {
        "ids": [f"domain/class/{i}.png" for i in range(num)],
        "clusters": torch.arange(num) * 3,
        "classes": [f"class {k}" for k in range(num_classes)],
        "targets": targets,
        "weights": torch.rand(num, generator=generator) + 0.01,
        "label_source": "client_prototypes",
        "provenance": {"seed": 1, "privacy": {"epsilon": 1.98, "delta": 1e-5}, "none": None},
    }
    return ProxySet(**{**fields, **changes})


def assert_same(found, expected):
    assert list(found.ids) == list(expected.ids)
    assert list(found.classes) == list(expected.classes)
    for name in ("clusters", "targets", "weights"):
        value, other = getattr(found, name), getattr(expected, name)
        assert value.dtype == other.dtype
        assert value.shape == other.shape
        assert torch.equal(value, other)
    assert found.label_source == expected.label_source
    assert found.provenance == expected.provenance
    assert found.labels == expected.labels
    assert found.pools == (list(expected.pools) if expected.pools else None)


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
floats = st.floats(0, 1, width=32)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), ids=st.lists(texts, unique=True, max_size=6))
def test_round_trip(tmp_path, data, ids):
    num_classes = data.draw(st.integers(1, 3))
    n = len(ids)
    numbers = st.lists(floats, min_size=n * num_classes, max_size=n * num_classes)
    expected = ProxySet(
        ids=ids,
        clusters=torch.tensor(
            data.draw(st.lists(st.integers(0, 2**62), min_size=n, max_size=n)), dtype=torch.int64
        ),
        classes=data.draw(st.lists(texts, min_size=num_classes, max_size=num_classes)),
        targets=torch.tensor(data.draw(numbers)).reshape(n, num_classes),
        weights=torch.tensor(data.draw(st.lists(floats, min_size=n, max_size=n))),
        label_source=data.draw(texts),
        provenance=data.draw(st.dictionaries(texts, st.none() | st.integers() | texts, max_size=3)),
    )
    expected.save(tmp_path)
    assert_same(ProxySet.load(tmp_path), expected)


def test_awkward_names_survive(tmp_path):
    expected = proxy_set(len(AWKWARD), len(AWKWARD), ids=AWKWARD, classes=AWKWARD, pools=AWKWARD)
    expected.save(tmp_path)
    assert_same(ProxySet.load(tmp_path), expected)


def test_any_float32_survives(tmp_path):
    bits = torch.randint(0, 2**31 - 2**24, (400, 2), generator=torch.Generator().manual_seed(0))
    targets = bits.int().view(torch.float32)
    targets = torch.cat([targets, torch.tensor([[1e-45, 3.4028235e38], [0.1, 1 / 3]])])
    expected = proxy_set(402, 2, targets=targets)
    expected.save(tmp_path)
    assert torch.equal(ProxySet.load(tmp_path).targets, targets)


def test_an_image_without_a_label(tmp_path):
    expected = proxy_set(
        2, 2, targets=torch.tensor([[0.2, 0.8], [0, 0]]), weights=torch.tensor([1.0, 0])
    )
    assert expected.labels == ["class 1", None]
    expected.save(tmp_path)
    assert_same(ProxySet.load(tmp_path), expected)
    with (tmp_path / "proxy_set.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["class 1", ""]


def test_the_file_is_what_a_spreadsheet_expects(tmp_path):
    proxy_set(2, 2, weights=torch.tensor([0.5, 1]), clusters=torch.tensor([4, 9])).save(tmp_path)
    with (tmp_path / "proxy_set.csv").open(newline="") as file:
        header, first, second = csv.reader(file)
    assert header == ["id", "cluster", "label", "weight", "pool", "p(class 0)", "p(class 1)"]
    assert first[:2] == ["domain/class/0.png", "4"]
    assert float(first[3]) == 0.5
    assert first[4] == ""
    assert math.isclose(float(second[5]) + float(second[6]), 1, rel_tol=1e-6)
    about = json.loads((tmp_path / "proxy_set.json").read_text())
    assert about["provenance"]["privacy"] == {"epsilon": 1.98, "delta": 1e-5}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["proxy_set.csv", "proxy_set.json"]


def test_an_empty_set_survives(tmp_path):
    proxy_set(0).save(tmp_path)
    assert_same(ProxySet.load(tmp_path), proxy_set(0))


def test_duplicates_are_refused():
    with pytest.raises(ValueError, match="must not hold an image twice"):
        proxy_set(2, ids=["a", "a"])


@pytest.mark.parametrize(
    "changes",
    [
        {"ids": ["a"]},
        {"clusters": torch.arange(4)},
        {"weights": torch.ones(6)},
        {"pools": ["web"] * 4},
        {"targets": torch.ones(5, 2)},
        {"targets": torch.ones(5)},
        {"classes": ["a"]},
    ],
)
def test_columns_of_unequal_length_are_refused(changes):
    with pytest.raises(ValueError, match="equally long"):
        proxy_set(**changes)


def refusal(folder, name):
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        ProxySet.load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_truncation_of_the_table_is_refused(tmp_path):
    proxy_set().save(tmp_path)
    path = tmp_path / "proxy_set.csv"
    content = path.read_bytes()
    for length in [*range(0, len(content), 7), *range(len(content) - 12, len(content))]:
        path.write_bytes(content[:length])
        refusal(tmp_path, "proxy_set.csv")


@pytest.mark.parametrize("name", ["proxy_set.csv", "proxy_set.json"])
def test_a_missing_file_is_named(tmp_path, name):
    proxy_set().save(tmp_path)
    (tmp_path / name).unlink()
    refusal(tmp_path, name)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"classes": 3, "size": 5}'])
def test_a_damaged_json_is_refused(tmp_path, content):
    proxy_set().save(tmp_path)
    (tmp_path / "proxy_set.json").write_text(content)
    refusal(tmp_path, "proxy_set")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("class/1.png", "class/0.png"),
        lambda text: text.replace('"domain/class/1.png",3', '"domain/class/1.png",three'),
        lambda text: text.replace("p(class 1)", "p(class 9)"),
        lambda text: text + text.splitlines()[-1] + "\n",
        lambda text: text[:-1] + ",0.5\n",
        lambda text: text[:-1] + "0" * 140_000 + "\n",
        lambda text: text[:-1] + '"\n',
    ],
)
def test_a_damaged_table_is_refused(tmp_path, damage):
    proxy_set().save(tmp_path)
    path = tmp_path / "proxy_set.csv"
    text = path.read_text()
    assert damage(text) != text
    path.write_bytes(damage(text).encode())
    refusal(tmp_path, "proxy_set.csv")


def test_the_two_files_must_belong_together(tmp_path):
    proxy_set(5).save(tmp_path)
    table = (tmp_path / "proxy_set.csv").read_bytes()
    proxy_set(4).save(tmp_path)
    (tmp_path / "proxy_set.csv").write_bytes(table)
    assert "5 rows, proxy_set.json says 4" in refusal(tmp_path, "proxy_set.csv")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    proxy_set().save(tmp_path)
    before = (tmp_path / "proxy_set.json").read_text()
    with pytest.raises(ValueError, match="JSON compliant"):
        proxy_set(provenance={"epsilon": math.nan}).save(tmp_path)
    assert (tmp_path / "proxy_set.json").read_text() == before


# --- where the images come from ---

PARTS = [
    PoolPart("web", "CC-BY-4.0", 0, 10, "f1", "web/"),
    PoolPart("own", None, 10, 11, "f2", "own/"),
    PoolPart("museum", "all rights reserved", 11, 400, "f3", "museum/"),
    PoolPart("scans", "CC-BY-4.0", 400, 402, "f4", "scans/"),
]


def test_the_manifest_lists_every_pool():
    chosen = np.array([401, 0, 9, 10, 400, 1])
    assert pool_names(PARTS, chosen) == ["scans", "web", "web", "own", "scans", "web"]
    assert pool_names(PARTS, chosen.tolist()) == pool_names(PARTS, chosen)
    pools = pools_of(PARTS, chosen)
    assert pools == [
        {"name": "web", "licence": "CC-BY-4.0", "fingerprint": "f1"}
        | {"num_images": 10, "num_chosen": 3},
        {"name": "own", "licence": "unknown", "fingerprint": "f2"}
        | {"num_images": 1, "num_chosen": 1},
        {"name": "museum", "licence": "all rights reserved", "fingerprint": "f3"}
        | {"num_images": 389, "num_chosen": 0},
        {"name": "scans", "licence": "CC-BY-4.0", "fingerprint": "f4"}
        | {"num_images": 2, "num_chosen": 2},
    ]
    assert licence_summary(pools) == "CC-BY-4.0: 5, unknown: 1"
    assert licence_summary(pools_of(PARTS, [])) == ""


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.data())
def test_pool_names_equal_a_plain_search(sizes, data):
    starts = [sum(sizes[:k]) for k in range(len(sizes) + 1)]
    parts = [PoolPart(str(k), None, starts[k], starts[k + 1], "") for k in range(len(sizes))]
    chosen = data.draw(st.lists(st.integers(0, starts[-1] - 1)))
    expected = [p.name for row in chosen for p in parts if p.start <= row < p.stop]
    assert pool_names(parts, chosen) == expected
    assert sum(pool["num_chosen"] for pool in pools_of(parts, chosen)) == len(chosen)


def test_pools_survive_and_must_match_the_manifest(tmp_path):
    chosen = [0, 10, 401]
    provenance = {"pools": pools_of(PARTS, chosen)}
    fields = {"pools": pool_names(PARTS, chosen), "provenance": provenance}
    expected = proxy_set(3, **fields)
    expected.save(tmp_path)
    assert_same(ProxySet.load(tmp_path), expected)
    with pytest.raises(ValueError, match="not those of the manifest"):
        proxy_set(3, **{**fields, "pools": ["web", "own", "own"]})
    path = tmp_path / "proxy_set.csv"
    path.write_bytes(path.read_bytes().replace(b'"own"', b'"web"'))
    assert "not those of the manifest" in refusal(tmp_path, "proxy_set.csv")
