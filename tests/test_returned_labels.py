"""Label files of every kind, and what becomes of their answers."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ecos_pl.annotator_votes import Answer, count_votes, other_word
from ecos_pl.label_studio import label_config
from ecos_pl.returned_labels import read_answers

JOB = "job-0123456789ab"
CLASSES = ["cat", "dog", "owl"]


def plain(answers):
    return [(a.image_id, a.annotator, a.label) for a in answers]


# --- Label Studio --------------------------------------------------------------------------------


def annotation(label, who=1, minute=0, **more):
    """One of an export, with the keys of Label Studio 1.x."""
    choices = [label] if isinstance(label, str) else label
    result = {
        "id": "Dx_aB91ISN",
        "type": "choices",
        "value": {"choices": choices},
        "origin": "manual",
        "to_name": "image",
        "from_name": "label",
    }
    return {
        "id": 41,
        "completed_by": who,
        "result": [result] if choices else [],
        "was_cancelled": False,
        "ground_truth": False,
        "created_at": f"2026-01-02T10:{minute:02d}:00.000000Z",
        "updated_at": f"2026-01-02T10:{minute:02d}:30.000000Z",
        "draft_created_at": None,
        "lead_time": 4.288,
        "prediction": {},
        "result_count": 1,
        "unique_id": "b2b9b6b7-4c0b-4a0a-9f0e-5d0a6b6f6b7c",
        "import_id": None,
        "last_action": None,
        "bulk_created": False,
        "task": 12,
        "project": 3,
        "updated_by": who,
        "parent_prediction": None,
        "parent_annotation": None,
        "last_created_by": None,
        **more,
    }


def task(image_id, *annotations, job=JOB, **more):
    return {
        "id": 12,
        "annotations": list(annotations),
        "file_upload": "abcdef12-tasks.json",
        "drafts": [],
        "predictions": [],
        "data": {
            "image": "/data/local-files/?d=annotation/images/batch_0001/000001.png",
            "image_id": image_id,
            "cluster": 4,
            "batch": 1,
            "order": 1,
            "job": job,
        },
        "meta": {},
        "created_at": "2026-01-01T09:00:00.000000Z",
        "updated_at": "2026-01-02T10:00:00.000000Z",
        "inner_id": 1,
        "total_annotations": len(annotations),
        "cancelled_annotations": 0,
        "total_predictions": 0,
        "comment_count": 0,
        "unresolved_comment_count": 0,
        "last_comment_updated_at": None,
        "project": 3,
        "updated_by": 1,
        "comment_authors": [],
        **more,
    }


def json_min(tasks):
    """What Label Studio's converter makes of tasks: the task's number takes the key ``id``."""
    records = []
    for one in tasks:
        for given_one in one["annotations"]:
            if given_one["was_cancelled"]:
                continue
            record = {**one["data"], "id": one["id"]}
            for result in given_one["result"]:
                choices = result["value"]["choices"]
                record["label"] = choices[0] if len(choices) == 1 else {"choices": choices}
            who = given_one["completed_by"]
            record["annotator"] = who["email"] if isinstance(who, dict) else who
            record["annotation_id"] = given_one["id"]
            for key in ("created_at", "updated_at", "lead_time"):
                record[key] = given_one[key]
            records.append(record)
    return records


def label_studios_csv(tasks):
    records = json_min(tasks)
    columns = sorted({key for record in records for key in record})
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


BEN = {"id": 2, "email": "ben@example.org", "first_name": "Ben", "last_name": ""}
TASKS = [
    task("a/1.png", annotation("cat"), annotation("dog", BEN)),
    task("a/2.png", annotation("owl", was_cancelled=True), annotation("dog", 3)),
    task("a/3.png"),
    task("ü, 4.png", annotation([], 3), annotation("other", 1)),
]
GIVEN = [
    ("a/1.png", "1", "cat"),
    ("a/1.png", "ben@example.org", "dog"),
    ("a/2.png", "3", "dog"),
    ("ü, 4.png", "1", "other"),
]


@pytest.mark.parametrize("form", ["json", "one task", "json_min", "csv"])
def test_every_export_of_label_studio_says_the_same(tmp_path, form):
    file = tmp_path / ("x.csv" if form == "csv" else "x.json")
    wanted = GIVEN[:2] if form == "one task" else GIVEN
    if form == "csv":
        file.write_text(label_studios_csv(TASKS), encoding="utf-8")
    else:
        made = {"json": TASKS, "one task": TASKS[0], "json_min": json_min(TASKS)}
        file.write_text(json.dumps(made[form]))
    assert plain(read_answers(file, JOB)) == wanted


def test_later_annotations_of_one_annotator_come_last_whatever_the_order_of_the_export(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps([task("a", annotation("dog", 1, 40), annotation("cat", 1, 10))]))
    answers = read_answers(file, JOB)
    assert [answer.label for answer in answers] == ["cat", "dog"]
    votes = count_votes(answers, ["a"], CLASSES, "other")
    assert votes.targets.tolist() == [[0, 1, 0]]
    assert votes.num_repeated == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([task("a", annotation(["cat", "dog"]))], "task 12: not one choice but ['cat', 'dog']"),
        ([task("a", annotation("cat"), job="job-x")], "labels of another annotation job (job-x;"),
        ([{"id": 5, "data": {"image": "x"}, "annotations": []}], "task 5: no image_id"),
        (["cat"], "not an export of Label Studio's"),
        (
            [task("a", {**annotation("cat"), "result": [{"from_name": "tag", "value": {}}]})],
            "nothing answers 'label'",
        ),
    ],
)
def test_an_export_that_cannot_be_used_is_one_line(tmp_path, content, words):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are below
        read_answers(file, JOB)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.lists(st.text("<>&\"'ab ü", min_size=1).map(str.strip).filter(bool), unique=True))
def test_class_names_survive_the_interface(names):
    view = ET.fromstring(label_config(names, "other"))
    assert [one.get("value") for one in view.iter("Choice")] == [*names, "other"]


# --- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_tables_of_any_spreadsheet(tmp_path, delimiter, mark, end):
    rows = [["id", "label", "annotator"], ["x", "cat", "ann"], ["x", " dog ", ""], ["y", "", "ben"]]
    text = end.join(delimiter.join(row) for row in rows) + end
    (tmp_path / "t.csv").write_bytes((mark + text).encode())
    whole = str(tmp_path / "t.csv")
    assert plain(read_answers(tmp_path / "t.csv", JOB)) == [
        ("x", "ann", "cat"),
        ("x", whole, "dog"),
    ]


@settings(max_examples=50)
@given(st.dictionaries(st.text(min_size=1).map(str.strip).filter(bool), st.sampled_from(CLASSES)))
def test_any_id_comes_back_from_a_table(tmp_path_factory, labels):
    labels = {k: v for k, v in labels.items() if k.isprintable()}
    file = tmp_path_factory.mktemp("tables") / "t.csv"
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["job", "image_id", "label"])
        writer.writerows([JOB, name, label] for name, label in labels.items())
    assert {a.image_id: a.label for a in read_answers(file, JOB)} == labels


def test_a_folder_is_read_in_the_order_of_names_without_the_jobs_own_files(tmp_path):
    for name in ("b.csv", "a.csv", ".hidden.csv"):
        (tmp_path / name).write_text(f"id,label\nx,{name}\n")
    for name in ("job.json", "tasks.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("")
    assert [answer.label for answer in read_answers(tmp_path, JOB)] == ["a.csv", "b.csv"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"id,name\na,b\n", "has no column 'label' (its columns: id, name)"),
        (b"name,label\na,b\n", "has no column 'id'"),
        (b"", "has no column 'id' (its columns: none)"),
        (b"id,label\n,cat\n", "line 2: a label without id"),
        (b"job,id,label\njob-0,a,cat\n", "line 2: labels of another annotation job (job-0;"),
        (b'id,label\n"a,cat\n', "unexpected end of data"),
        (b"id,label\n\xff,cat\n", "it is not UTF-8 text"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, content, words):
    file = tmp_path / "t.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are below
        read_answers(file, JOB)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("[{")
    with pytest.raises(ValueError, match=r"x\.json is not JSON"):
        read_answers(tmp_path / "x.json", JOB)
    (tmp_path / "x.txt").write_text("id,label\n")
    with pytest.raises(ValueError, match=r"ends in \.csv or \.json"):
        read_answers(tmp_path / "x.txt", JOB)
    with pytest.raises(ValueError, match="there is no"):
        read_answers(tmp_path / "none.csv", JOB)


# --- votes ---------------------------------------------------------------------------------------


def answers_of(**labels):
    """Several annotators' labels of each image, separated by commas."""
    return [
        Answer(image_id, f"annotator {who}", label, "here")
        for image_id, text in labels.items()
        for who, label in enumerate(text.split(","))
    ]


def test_votes_become_shares_and_agreement():
    given_answers = answers_of(
        a="cat", b="cat,cat,cat", c="cat,dog", d="dog,owl,dog", e="other", f="cat,other",
        g="cat,cat,other", h="catt", i="CAT , Dog",
    )  # fmt: skip
    votes = count_votes(given_answers, list("abcdefghij"), CLASSES, "other")
    assert votes.weights.tolist() == pytest.approx([1, 1, 0.5, 2 / 3, 0, 0, 2 / 3, 0, 0.5, 0])
    assert votes.targets[2].tolist() == [0.5, 0.5, 0]
    assert votes.targets[3].tolist() == pytest.approx([0, 2 / 3, 1 / 3])
    assert votes.targets[6].tolist() == [1, 0, 0]
    assert votes.answered.tolist() == [True] * 9 + [False]
    assert (votes.num_answers, votes.num_other, dict(votes.unknown)) == (18, 3, {"catt": 1})
    assert votes.line() == (
        "6 of 10 images, 2.0 annotators each, 3 'other', 1 of unknown classes ('catt'); "
        "3 images left out"
    )


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcd"), st.sampled_from("xyz"), st.sampled_from([*CLASSES, "other"])
        )
    )
)
def test_votes_against_plain_counting(given_answers):
    answers = [Answer(*answer, "here") for answer in given_answers]
    votes = count_votes(answers, list("abcd"), CLASSES, "other")
    last = {answer[:2]: answer[2] for answer in given_answers}
    for row, image_id in enumerate("abcd"):
        counts = Counter(label for (name, _), label in last.items() if name == image_id)
        against = counts.pop("other", 0)
        best = max(counts.values(), default=0)
        total = sum(counts.values())
        has_label = best > against
        assert float(votes.weights[row]) == pytest.approx(
            best / (total + against) if has_label else 0
        )
        wanted = [counts[name] / total if has_label else 0 for name in CLASSES]
        assert votes.targets[row].tolist() == pytest.approx(wanted)
    assert votes.num_answers + votes.num_repeated == len(answers)
    assert votes.targets.dtype == votes.weights.dtype == torch.float32


def test_case_counts_only_where_it_tells_classes_apart():
    votes = count_votes(answers_of(a="A", b="b", c="B"), list("abc"), ["a", "A", "b"], "other")
    assert votes.targets.argmax(dim=1).tolist() == [1, 2, 2]
    votes = count_votes(answers_of(a="a"), ["a"], ["A", "á"], "other")
    assert votes.targets[0].tolist() == [1, 0]


def test_an_unknown_image_is_named_with_its_file():
    answer = Answer("nowhere.png", "ann", "cat", "labels.csv, line 3")
    with pytest.raises(ValueError, match=r"labels\.csv, line 3: no image 'nowhere\.png'"):
        count_votes([answer], ["a"], CLASSES, "other")


def test_the_word_for_no_class_is_none():
    assert other_word(CLASSES) == "other"
    assert other_word(["Other", "x"]) == "none of these"
