"""The annotation job, and the labels that come back, laid over a real probe's result."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rank_processes import run_ranks

from datamodules.folder import folder_data
from datamodules.proxy import ProxySamplingDataModule, TrainingView
from ecos_pl.annotation_job import JobTerms
from ecos_pl.labeling import NoLabels, PublicLabeler
from ecos_pl.labels_awaited import LabelsAwaited
from ecos_pl.outsourced_labels import OutsourcedLabels
from ecos_pl.ranks import ALONE
from ecos_pl.relabeling import FirstLabels
from tests.test_proxy_datamodule import PLAN

TERMS = JobTerms(batch_size=8)


@pytest.fixture(scope="module")
def scenario(image_tree):
    return folder_data(image_tree / "pool", image_tree / "client", client_domain="bars")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def make(scenario, root, labeler, relabeler=None):
    datamodule = ProxySamplingDataModule(
        scenario,
        PLAN,
        labeler,
        TrainingView(image_size=24, batch_size=8, unlabeled_ratio=2),
        relabeler=relabeler,
        run_root=Path(root),
        embed_workers=0,
    )
    datamodule.setup("fit")
    return datamodule


@pytest.fixture(scope="module")
def result(scenario, root):
    return make(scenario, root, NoLabels(scenario.classes, name="human")).probe_result


@pytest.fixture
def ask(scenario, result, tmp_path):
    def call(terms=TERMS, **options):
        outsourced = OutsourcedLabels(scenario.pool, tmp_path, terms, seed=1, **options)
        return outsourced.apply(result, ALONE)

    return call


@pytest.fixture
def job(ask, tmp_path):
    with pytest.raises(LabelsAwaited):
        ask()
    return tmp_path / "annotation"


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fill(path, num, label=lambda name: name.split("/")[1]):
    rows = rows_of(path)
    for row in rows[:num]:
        row["label"] = label(row["image_id"])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return rows[:num]


def test_the_probe_with_people_leaves_everything_unlabelled_and_costs_the_counts(result):
    assert not bool(result.proxy_set.weights.any())
    assert not bool(result.proxy_set.targets.any())
    assert result.communication["round_trips"] == 1
    assert result.proxy_set.labels == [None] * 60


def test_the_job_holds_every_image_once_in_files_that_people_can_open(job, result, scenario):
    rows, tasks = rows_of(job / "labels.csv"), json.loads((job / "tasks.json").read_text())
    assert {row["image_id"] for row in rows} == set(result.proxy_set.ids)
    assert len(rows) == len(tasks) == 60
    assert {row["label"] for row in rows} == {""}
    assert [int(row["batch"]) for row in rows] == [i // 8 + 1 for i in range(60)]
    cluster_of = dict(zip(result.proxy_set.ids, result.proxy_set.clusters.tolist(), strict=True))
    for row, task in zip(rows, tasks, strict=True):
        assert int(row["cluster"]) == cluster_of[row["image_id"]]
        assert set(task) == {"data"}
        assert task["data"] == {
            "image": f"/data/local-files/?d=annotation/{row['image']}",
            "image_id": row["image_id"],
            "cluster": int(row["cluster"]),
            "batch": int(row["batch"]),
            "order": task["data"]["order"],
            "job": row["job"],
        }
        with (
            Image.open(job / row["image"]) as ours,
            Image.open(scenario.pool.root / row["image_id"]) as theirs,
        ):
            assert ours.format == "PNG"
            assert ours.convert("RGB").tobytes() == theirs.convert("RGB").tobytes()
    assert [task["data"]["order"] for task in tasks] == list(range(1, 61))
    about = json.loads((job / "job.json").read_text())
    assert (about["num_images"], about["num_batches"]) == (60, 8)
    assert about["price_estimate"] == pytest.approx(60 * 0.05)
    assert about["probe_fingerprint"] == result.fingerprint
    assert "60 images in 8 batches" in (job / "README.md").read_text()


def test_the_interface_offers_every_class_and_other(job):
    view = ET.parse(job / "label_config.xml").getroot()
    assert view.tag == "View"
    assert view.find("Image").get("value") == "$image"
    choices = view.find("Choices")
    assert choices.get("toName") == view.find("Image").get("name")
    assert choices.get("choice") == "single"
    assert [one.get("value") for one in choices] == ["horizontal", "vertical", "other"]


def test_fewer_images_are_in_proportion_and_large_ones_are_shrunk(ask, tmp_path, result):
    with pytest.raises(LabelsAwaited, match="30 images in 4 batches"):
        ask(replace(TERMS, num_images=30, image_size=16))
    rows = rows_of(tmp_path / "annotation/labels.csv")
    assert len(rows) == 30
    for cluster, size in enumerate(result.proxy_set.clusters.bincount().tolist()):
        assert abs(sum(row["cluster"] == str(cluster) for row in rows) - size / 2) < 1
    with Image.open(tmp_path / "annotation" / rows[0]["image"]) as image:
        assert image.size == (16, 16)


def test_labels_weights_and_what_trains_without(job, ask, result):
    rows = fill(job / "labels.csv", 30)
    copy = job / "labels_ben.csv"
    copy.write_bytes((job / "labels.csv").read_bytes())
    fill(copy, 10, lambda name: "vertical")
    for_ben = {row["image_id"] for row in rows[:10]}
    relabelled = ask()
    proxy_set = relabelled.proxy_set
    assert (proxy_set.ids, proxy_set.label_source) == (result.proxy_set.ids, "human")
    places = dict(zip(proxy_set.ids, range(60), strict=True))
    for row in rows:
        place, said = places[row["image_id"]], row["label"]
        target, weight = proxy_set.targets[place], float(proxy_set.weights[place])
        differs = row["image_id"] in for_ben and said != "vertical"
        if said not in proxy_set.classes:  # "checks" or "shades", or one against one
            assert weight == 0
        elif differs:
            assert weight == 0.5
            assert target.tolist() == [0.5, 0.5]
        else:
            assert (weight, target.argmax()) == (1, proxy_set.classes.index(said))
    added = set(relabelled.unlabeled.tolist()) - set(result.unlabeled.tolist())
    answered = {places[row["image_id"]] for row in rows}
    assert added == {int(result.indices[place]) for place in range(60) if place not in answered}
    assert relabelled.unlabeled.tolist() == sorted(relabelled.unlabeled.tolist())
    assert proxy_set.provenance["labels"]["num_answers"] == 60  # ben's copy has 30 too


def test_labels_from_label_studio(job, ask):
    tasks = json.loads((job / "tasks.json").read_text())
    result = {"from_name": "label", "to_name": "image", "type": "choices"}
    export = [
        {
            "id": 100 + number,
            "data": task["data"],
            "annotations": [
                {
                    "id": 7 + number,
                    "completed_by": 1,
                    "was_cancelled": False,
                    "result": [{**result, "value": {"choices": ["vertical"]}}],
                }
            ],
            "predictions": [],
        }
        for number, task in enumerate(tasks[:9])
    ]
    (job / "project-1-at-2026-01-01-10-00-1a2b3c.json").write_text(json.dumps(export))
    proxy_set = ask().proxy_set
    assert int(proxy_set.weights.sum()) == 9
    assert set(proxy_set.labels) == {"vertical", None}


def test_a_job_is_written_once_and_answers_stay(job, ask, tmp_path):
    fill(job / "labels.csv", 3)
    before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    ask()
    ask()
    assert before == {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"holds another annotation job \(job-"):
        ask(replace(TERMS, num_images=12))
    assert not list(tmp_path.glob(".annotation*"))


def test_a_training_keeps_to_its_labels(job, ask, tmp_path):
    fill(job / "labels.csv", 20)
    ask()
    fill(job / "labels.csv", 25)
    ask()  # no training has begun
    kept = (tmp_path / "labels.json").read_bytes()
    ask(training_began=True)
    fill(job / "labels.csv", 26)
    with pytest.raises(ValueError, match="holds a training with other labels") as caught:
        ask(training_began=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "labels.json").read_bytes() == kept
    rows = rows_of(job / "labels.csv")[:25]  # the same labels in another file, another order
    (tmp_path / "again.csv").write_text(
        "id,label\n" + "".join(f"{r['image_id']},{r['label']}\n" for r in reversed(rows))
    )
    ask(training_began=True, returned=tmp_path / "again.csv")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda job: fill(job / "labels.csv", 3, lambda _: "other"), "no image with a class"),
        (
            lambda job: fill(job / "labels.csv", 3, lambda _: "zebra"),
            "3 of unknown classes ('zebra')",
        ),
        (
            lambda job: (job / "x.csv").write_text("image_id,label\nbars/none.png,vertical\n"),
            "x.csv, line 2: no image 'bars/none.png' in the proxy set",
        ),
        (
            lambda job: (job / "x.csv").write_text("job,id,label\njob-0,a,vertical\n"),
            "x.csv, line 2: labels of another annotation job (job-0; this is job-",
        ),
        (lambda job: (job / "job.json").unlink(), "annotation holds no annotation job"),
    ],
)
def test_a_mistake_in_labels_is_one_line(job, ask, break_it, words):
    break_it(job)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are below
        ask()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_returned_labels_must_be_there_and_need_no_job(ask, tmp_path, result):
    with pytest.raises(ValueError, match="there is no"):
        ask(returned=tmp_path / "none.csv")
    returned = tmp_path / "labels.csv"
    returned.write_text("id,label\nx,\n")
    with pytest.raises(ValueError, match=r"labels\.returned: no label in"):
        ask(returned=returned)
    returned.write_text(f"id,label\n{result.proxy_set.ids[0]},vertical\n")
    assert int(ask(returned=returned).proxy_set.weights.sum()) == 1
    assert not (tmp_path / "annotation").exists()


def test_a_trial_writes_nothing(ask, tmp_path, result):
    with pytest.raises(ValueError, match="writes no annotation job"):
        ask(is_trial=True)
    returned = tmp_path / "labels.csv"
    returned.write_text(f"id,label\n{result.proxy_set.ids[0]},vertical\n")
    ask(is_trial=True, returned=returned)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.csv"]


RANKS = """
from pathlib import Path
from datamodules.folder import folder_data
from ecos_pl.annotation_job import JobTerms
from ecos_pl.labels_awaited import LabelsAwaited
from ecos_pl.outsourced_labels import OutsourcedLabels
from ecos_pl.probe_result import ProbeResult
from ecos_pl.ranks import Ranks
tree, probe, fingerprint, folder = FACTS
pool = folder_data(Path(tree) / "pool", Path(tree) / "client").pool
result = ProbeResult.load(Path(probe), fingerprint, from_disk=True)
outsourced = OutsourcedLabels(pool, Path(folder), JobTerms(batch_size=8), seed=1)
with Ranks.of_processes() as ranks:
    try:
        labelled = outsourced.apply(result, ranks)
        print("labelled", int(labelled.proxy_set.weights.sum()), len(labelled.unlabeled))
    except LabelsAwaited:
        print("awaited")
"""


@pytest.mark.slow
def test_all_ranks_wait_together_and_go_on_together(image_tree, root, result, tmp_path):
    probe = root / "cache/probes" / result.fingerprint[:16]
    facts = [str(path) for path in (image_tree, probe)] + [result.fingerprint, str(tmp_path)]
    code = RANKS.replace("FACTS", repr(facts))
    (tmp_path / "first").mkdir()
    assert run_ranks(code, 2, tmp_path / "first") == ["awaited\n"] * 2
    fill(tmp_path / "annotation/labels.csv", 20, lambda name: "vertical")
    labelled = f"labelled 20 {len(result.unlabeled) + 40}\n"
    assert run_ranks(code, 2, tmp_path) == [labelled] * 2


# --- labels=public labels.num_images=N -----------------------------------------------------------


def test_first_labels_keep_the_selection_and_train_on_the_rest_unlabelled(scenario, root):
    labeler = PublicLabeler(scenario.classes)
    whole = make(scenario, root, labeler).probe_result
    some = make(scenario, root, labeler, FirstLabels(25, seed=1))
    result = some.probe_result
    assert result.from_disk  # the same probe
    assert result.proxy_set.ids == whole.proxy_set.ids
    labelled = result.proxy_set.weights > 0
    assert 0 < int(labelled.sum()) <= 25
    assert torch.equal(result.proxy_set.targets[labelled], whole.proxy_set.targets[labelled])
    assert not bool(result.proxy_set.targets[~labelled].any())
    added = set(result.unlabeled.tolist()) - set(whole.unlabeled.tolist())
    assert len(added) == 60 - 25  # not those of no class of the client's
    assert added <= set(result.indices[~labelled].tolist())
    rows, held_out = some._split(result)
    assert len(rows) + len(held_out) == int(labelled.sum())
    views = some.train_dataloader().iterables["unlabelled"].dataset.dataset
    assert added <= set(views.indices)
    more = make(scenario, root, labeler, FirstLabels(40, seed=1)).probe_result
    assert bool((more.proxy_set.weights >= result.proxy_set.weights).all())


def test_first_labels_of_no_class_are_an_error(result):
    with pytest.raises(ValueError, match=r"num_images=5: none of these images"):
        FirstLabels(5, seed=0).apply(result, ALONE)
