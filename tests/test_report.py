"""The report of a run: facts, form, escaping, and what it makes of every kind of run folder."""

from __future__ import annotations

import base64
import csv
import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from ecos_pl.accounting import epsilon_of
from ecos_pl.composition import composition
from ecos_pl.config_files import (
    experiments_in,
    load_config,
    to_dict,
    to_yaml,
)
from ecos_pl.environment import environment_facts
from ecos_pl.privacy import Release
from ecos_pl.report import report_html, write_report
from ecos_pl.report.__main__ import main
from ecos_pl.report.curves import read_points, ticks
from ecos_pl.report.settings import command, differences
from ecos_pl.report.words import data_size, duration, percent
from tests.test_train import SMALL

CONFIGS = Path(train.__file__).parent / "configs"
VOID = {"meta", "link", "img", "br", "line", "circle", "polyline"}
EVIL = "<script>alert('x')</script>&\"</td>"


class Page(HTMLParser):
    """A page read strictly: every tag closed in order, every attribute kept."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        assert tag in VOID
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def sections(self) -> list[str]:
        return [attributes["id"] for attributes in self.all("section")]


def page_of(folder: Path) -> Page:
    return Page(report_html(folder))


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path / "copy"


def change(path: Path, **facts: Any) -> None:
    """Lay facts over a JSON file; a mapping joins the one that is there."""
    found = json.loads(path.read_text())
    for key, value in facts.items():
        joins = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = {**found[key], **value} if joins else value
    path.write_text(json.dumps(found))


def reconfigure(folder: Path, *overrides: str) -> None:
    """Give the run another config, made by the real loader."""
    argv = ["data.pool=pool", "data.client=client", "data=folder", *overrides]
    (folder / "config.yaml").write_text(to_yaml(load_config(argv, config_dir=CONFIGS)))


# --- the page of a real run ------------------------------------------------------------------


def test_train_leaves_a_report_of_its_folder(finished: Path) -> None:
    assert (finished / "report.html").read_text() == report_html(finished)


def test_the_page_is_well_formed_and_self_contained(finished: Path) -> None:
    page = page_of(finished)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert not {name for name in attributes if name.startswith("on")}
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/png;base64,"), tag
        for name in ("aria-labelledby",):
            assert attributes.get(name, ids[0]) in ids
    for link in page.all("a"):
        where = link["href"]
        if where.startswith("#"):
            assert where[1:] in ids
        elif not where.startswith("https://arxiv.org/"):
            assert (finished / where).is_file()
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert not page.all("script")
    assert "@import" not in report_html(finished)
    assert "url(" not in report_html(finished)


def test_the_page_is_accessible(finished: Path) -> None:
    page = page_of(finished)
    assert page.all("html") == [{"lang": "en"}]
    assert all(len(image["alt"]) > 20 for image in page.all("img"))
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - level <= 1 for level, later in pairwise(levels))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.all("svg"))
    assert len(page.all("table")) == len(page.all("caption"))


def test_colours_have_contrast() -> None:
    css = (Path(train.__file__).parent / "ecos_pl/report/page.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6});", css))

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for ink, paper in (("ink", "paper"), ("ink", "bar"), ("soft", "paper"), ("sim", "sim-tint")):
        dark, light = sorted((luminance(colours[ink]), luminance(colours[paper])))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper)  # WCAG 2 AA


def test_facts_are_those_of_the_summary(finished: Path) -> None:
    text, summary = page_of(finished).text, json.loads((finished / "summary.json").read_text())
    proxy, known, sent = (summary[k] for k in ("proxy", "simulation", "communication"))
    assert "was trained on 60 public images" in text
    assert "a public collection of 261 images" in text
    assert f"{proxy['kept_clusters']} of 8 groups" in text
    assert f"Privacy loss ε {summary['privacy']['epsilon']:.2f}"[:-1] in text
    assert "δ 1e-05" in text
    assert "Sent to the client " + data_size(sent["bytes_down"]) in text
    assert "Sent by the client " + data_size(sent["bytes_up"]) in text
    assert "Messages 4 2 questions, each answered once" in text
    assert f"Purity {percent(known['purity'])} simulation" in text
    assert f"Purity of a random choice {percent(known['random_purity'])} simulation" in text
    assert f"Test accuracy {percent(known['test_accuracy'], 2)} simulation" in text
    assert f"Parameters {summary['model']['parameters']:,}" in text
    assert f"training {duration(summary['seconds']['fit'])}" in text
    assert f"torch {torch.__version__.partition('+')[0]}" in text
    for name, row in known["chosen_domains"].items():
        by_chance = 60 * row["pool"] / 261
        assert f"{name} {row['chosen']} {row['pool']} {by_chance:,.0f}" in text
    with (finished / "proxy_set.csv").open() as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    for name in ("vertical", "horizontal"):
        assert f"{name} {labels.count(name)}" in text
    for one in summary["releases"]:
        assert f"{one['noise_std'] / one['sensitivity']:.3g}×" in text


def test_the_summary_prices_each_release(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    facts = [dict(one) for one in summary["releases"]]
    alone = [one.pop("epsilon") for one in facts]
    releases = [Release(**one) for one in facts]
    assert [one.kind for one in releases] == ["coverage_counts", "prototypes"]
    assert alone == [epsilon_of([one], 1e-5) for one in releases]
    assert epsilon_of(releases, 1e-5) == pytest.approx(summary["privacy"]["epsilon"], rel=1e-6)
    assert max(alone) < summary["privacy"]["epsilon"] < sum(alone)


def test_every_figure_is_there_once(finished: Path) -> None:
    sources = [image["src"].partition(",")[2] for image in page_of(finished).all("img")]
    shown = [base64.b64decode(source) for source in sources]
    files = [path.read_bytes() for path in (finished / "figures").glob("*.png")]
    assert len(files) >= 4
    assert sorted(shown) == sorted(files)


def test_the_bytes_depend_on_the_folder_alone(finished: Path, folder: Path) -> None:
    copied = write_report(folder).read_bytes()
    assert copied == (finished / "report.html").read_bytes()
    assert write_report(folder).read_bytes() == copied


# --- hostile names ---------------------------------------------------------------------------


def test_names_are_never_markup(folder: Path, tmp_path: Path) -> None:
    harmless = _renamed(shutil.copytree(folder, tmp_path / "harmless"), "harmless")
    evil = _renamed(folder, EVIL)
    assert not evil.all("script")
    assert [tag for tag, _ in evil.tags] == [tag for tag, _ in harmless.tags]
    assert evil.texts.count(EVIL) == harmless.texts.count("harmless") >= 9


def _renamed(folder: Path, name: str) -> Page:
    """The page after whatever can be named was given that name."""
    with (folder / "proxy_set.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (folder / "proxy_set.csv").open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "label": name} for row in rows)
    change(folder / "proxy_set.json", classes=[name])
    summary = json.loads((folder / "summary.json").read_text())
    change(
        folder / "summary.json",
        run_id=name,
        proxy={
            "pools": [{**one, "name": name, "licence": name} for one in summary["proxy"]["pools"]]
        },
        environment={"device": name},
        model={"backbone": name},
        simulation={"chosen_domains": {name: {"chosen": 1, "pool": 2}}},
        quality={name: {"proxy_set": 1.0, "random": 0.5}},
    )
    reconfigure(folder, f"run_id={name}")
    (folder / "CARD.md").write_text(name)
    return page_of(folder)


# --- other kinds of runs ---------------------------------------------------------------------


def test_without_metrics_the_picture_stands_in(folder: Path) -> None:
    assert page_of(folder).all("svg")
    shutil.rmtree(folder / "metrics")
    page = page_of(folder)
    assert not page.all("svg")
    assert "figures" not in page.sections  # it has moved to the training
    assert "training" in page.sections
    (folder / "figures" / "training.png").unlink()
    assert "training" not in page_of(folder).sections


def test_a_file_that_is_no_picture_is_not_shown(folder: Path) -> None:
    (folder / "figures" / "notes.png").write_bytes(b"<svg onload=alert(1)>")
    assert len(page_of(folder).all("img")) == len(list((folder / "figures").glob("*.png"))) - 1


def test_a_run_of_the_client_alone(folder: Path) -> None:
    reconfigure(folder, "train_on=client")
    for file in ("proxy_set.csv", "proxy_set.json", "figures/chosen.png", "figures/random.png"):
        (folder / file).unlink()
    (folder / "figures/coverage.png").unlink()
    summary = json.loads((folder / "summary.json").read_text())
    del summary["releases"]
    summary["proxy"] = {"size": 0, "num_clusters": 0, "kept_clusters": 0}
    summary["privacy"] |= {"epsilon": 0.0, "delta": None}
    summary["communication"] = {"bytes_down": 0, "bytes_up": 0, "round_trips": 0}
    summary["simulation"] = {"purity": None, "test_accuracy": 0.9}
    summary["quality"] = {}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = page_of(folder)
    assert not {"chosen", "quality"} & set(page.sections)
    assert "on the client's own images" in page.text
    assert "Nothing was sent or revealed" in page.text
    assert "90.00%" in page.text


def test_a_run_that_asked_nothing(folder: Path) -> None:
    reconfigure(folder, "selection.strategy=random", "labels=public")
    change(
        folder / "summary.json",
        releases=[],
        privacy={"epsilon": 0.0},
        communication={"bytes_down": 0, "bytes_up": 0, "round_trips": 0},
    )
    text = page_of(folder).text
    assert "The client was asked nothing" in text
    assert "drawn at random" in text
    assert "Sent by the client" not in text


def test_a_choice_that_is_not_private_says_so(folder: Path) -> None:
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("strategy: ecos", "strategy: mak"))
    change(
        folder / "summary.json",
        releases=[],
        privacy={"epsilon": None},
        communication={"bytes_down": 0, "bytes_up": 0, "round_trips": 0},
    )
    text = page_of(folder).text
    assert "This is not private" in text
    assert "no ε can be stated" in text
    assert "The client was asked nothing" not in text
    assert "ε = 0" not in text


def test_figures_of_known_names_stand_where_they_belong(folder: Path) -> None:
    names = ("rejected", "embedding_map", "privacy_ledger", "confusion_matrix", "calibration")
    for name in (*names, "of_somebody"):
        shutil.copy(folder / "figures/chosen.png", folder / f"figures/{name}.png")
    (folder / "figures/training.png").unlink()
    html = report_html(folder)
    [last] = html.split('<section id="figures"')[1:]
    assert last.partition("</section>")[0].count("<img") == 1
    assert "<b>Of somebody</b>" in last
    assert html.count("<img") == len(list((folder / "figures").glob("*.png")))


def test_a_real_client_shows_no_simulation_and_no_times_of_its_own(folder: Path) -> None:
    reconfigure(folder, "client=mailbox", "client.url=sftp://ann:geheim@host/box?token=abc123")
    for figure in ("confusion_matrix", "calibration"):  # there is no test
        (folder / f"figures/{figure}.png").unlink()
    measured = json.loads((folder / "summary.json").read_text())["simulation"]["quality"]
    change(
        folder / "summary.json",
        simulation={
            "quality": {name: {"proxy_set": None, "random": None} for name in measured},
            "class_accuracy": None,
            "client": None,
            "purity": None,
            "random_purity": None,
            "label_accuracy": None,
            "test_accuracy": None,
            "chosen_domains": None,
            "chosen_classes": None,
        },
        seconds={"ask": 4321.0, "label": 8765.0},
        delivered={"model.safetensors": 13_000_000},
    )
    (folder / "metrics" / "version_0" / "metrics.csv").unlink()
    html = report_html(folder)
    page = Page(html)
    assert "simulation" not in page.text
    assert "is simulated" not in page.text
    assert duration(4321.0) not in page.text
    assert duration(8765.0) not in page.text
    assert "its own matter" in page.text
    assert "the finished model (13.0 MB)" in page.text
    assert "geheim" not in html
    assert "abc123" not in html
    assert "sftp://host/box" in page.text


def test_rounds_and_quality_have_tables(folder: Path) -> None:
    reconfigure(folder, "labels.rounds=[1]")
    summary = json.loads((folder / "summary.json").read_text())
    one = {"epoch": 1, "changed": 0.147, "label_accuracy": 0.893, "bytes_down": 7_105_600}
    change(
        folder / "summary.json",
        rounds=[one],
        releases=[*summary["releases"], summary["releases"][1]],
        quality={"near_duplicate_rate": {"proxy_set": 0.0123, "random": 0.2}},
        simulation={
            "quality": {"distance": {"proxy_set": 0.5, "random": None}},
            "class_accuracy": {"vertical": 0.75, "horizontal": 1.0},
        },
    )
    text = page_of(folder).text
    assert "1 1 14.7% 89.3%" in text
    assert "ask again in its terms (7.1 MB)" in text
    assert text.count("once more, now as the network trained so far sees them") == 2
    assert "near duplicate rate 0.012 0.200 share of images that look like another one" in text
    assert "distance 0.500 –" in text
    assert "Test accuracy by class simulation class accuracy vertical 75.0%" in text


def test_a_student_stands_beside_its_teacher(folder: Path) -> None:
    reconfigure(folder, "task=distillation", "labels=none")
    size = {"backbone": "big", "image_size": 48, "parameters": 4000, "size_mb": 8.0, "macs": 900}
    change(
        folder / "summary.json",
        teacher={**size, "latency_ms": 3.0, "test_accuracy": 0.9845},
        model={**size, "backbone": "small", "parameters": 1000, "latency_ms": 1.5},
    )
    text = page_of(folder).text
    assert "A small network that tells 2 classes of images apart was taught by a larger one" in text
    assert "network big small" in text
    assert "parameters 4,000 1,000 4.0× fewer" in text
    assert "time for an image 3.00 ms 1.50 ms 2.0× faster" in text
    assert "The teacher's test accuracy 98.45%" in text
    assert "Labelled images" not in text


def test_a_compression_shows_ratios_files_and_card(folder: Path) -> None:
    reconfigure(folder, "task=compression", "task.teacher=teacher.safetensors")
    size = {"backbone": "resnet18", "image_size": 48, "macs": 100, "latency_ms": 4.0}
    facts = {"size_mb": 2.8, "latency_ms": 0.4, "max_deviation": 0.5, "agreement": 0.9975}
    compression = {
        "target": {"name": "sparsity", "value": 0.75, "reached": 0.76},
        "size_ratio": 16.0,
        "latency_ratio": 10.0,
        "accuracy_drop": 0.0025,
        "teacher": {**size, "parameters": 11_000_000, "size_mb": 44.8, "accuracy": 0.987},
        "student": {**size, "parameters": 2_750_000, "size_mb": 2.8, "accuracy": 0.9845},
        "files": {"model.int8.onnx": facts, "model.pt2": {**facts, "latency_ms": None}},
    }
    change(folder / "summary.json", compression=compression)
    (folder / "CARD.md").write_text("# A card\n<b>bold</b>\n")
    text = page_of(folder).text
    assert "A trained network that tells 2 classes of images apart was made smaller" in text
    assert "parameters 11,000,000 2,750,000 4.0× fewer" in text
    assert "size 44.80 MB 2.80 MB 16.0× smaller" in text
    assert "test accuracy (simulation) 98.70% 98.45% 0.25 points lower" in text
    assert "sparsity 0.75" in text
    assert "reached 0.76" in text
    assert "model.pt2 2.80 – 0.5 99.75%" in text
    assert "# A card <b>bold</b>" in text


@pytest.mark.parametrize(
    ("repeats", "said"),
    [
        ({"client_train in pool": 0}, "images, and the pool, have no picture in common"),
        ({"client_train in pool": None}, "have no image's name in common"),
        ({"client_train in pool": 2}, "share no image, but 2 pictures under two names"),
        ({"client_train in client_test": 0}, "its training and test images have no picture"),
    ],
)
def test_it_states_what_the_client_does_not_share(
    folder: Path, repeats: dict[str, int | None], said: str
) -> None:
    disjoint = {"same_ids": 0, "same_pixels": repeats}
    change(folder / "summary.json", simulation={"client": {"disjoint": disjoint}})
    assert said in page_of(folder).text


@pytest.mark.parametrize("name", ["ecos", "a_new_strategy"])
def test_runs_from_before_keep_their_questions(folder: Path, name: str) -> None:
    reconfigure(folder, "labels=client_table")
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("strategy: ecos", f"strategy: {name}"))
    change(folder / "summary.json", releases=None, environment=None)
    text = page_of(folder).text
    assert ("how many of its images lie in each of 8 regions" in text) == (name == "ecos")
    assert "how many of its images of each class lie in each region" in text
    assert "ε alone" not in text
    assert "Environment" not in text


@pytest.mark.slow
def test_labels_from_people_with_their_price(
    image_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["data=folder", f"data.pool={image_tree}/pool", f"data.client={image_tree}/client"]
    people = ["labels=human", "labels.price_per_label=0.25", "labels.annotators=2"]
    argv = [*SMALL, *data, *people, f"run_root={tmp_path}", "run_id=people"]
    assert train.main(argv) == 0
    folder = tmp_path / "people"
    assert not (folder / "report.html").exists()  # it waits, and leaves no half report
    assert main([str(folder)]) == 2
    assert "has not ended" in capsys.readouterr().err
    table = folder / "annotation" / "labels.csv"
    with table.open() as file:
        rows = list(csv.DictReader(file))
    for place, row in enumerate(rows):
        row["label"] = "other" if place < 7 else "vertical" if place < 50 else ""
    with table.open("w") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert train.main(argv) == 0
    text = page_of(folder).text
    assert "Labelled images 43 of 60 labels given by people" in text
    assert "Answers by people 50 7 of them 'none of the classes'; 7 images left out" in text
    assert "Price of the answers 12.50 50 answers at 0.25 each" in text
    assert "Price of the whole job 30.00 60 images by 2 annotators" in text
    assert "What 43 of the images show was told by people" in text


# --- config and command ----------------------------------------------------------------------

OVERRIDES = [
    ["labels.rounds=[2,4]", "seed=7", "run_id=a b's"],
    ["data=folder", "data.pool=a/{00..99}.tar", "data.client=my images", "task.augment=none"],
    ["trainer.precision=bf16-mixed", "privacy.delta=1e-7", "task.ema_decay=null"],
    ["logger=wandb", "logger.tags=[a b,c]", "logger.mode=offline"],
    ["task=compression", "task.teacher=t", "task.target.size_mb=1.5", "run_id=no"],
    ["client=mailbox", "client.url=s3://box/place", "trainer.limit_train_batches=10"],
    *([f"experiment={name}"] for name in sorted(experiments_in(CONFIGS))),
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_the_command_shown_is_the_run(overrides: list[str]) -> None:
    named = " ".join(overrides)
    if "experiment=" in named:
        file = experiments_in(CONFIGS)[named.partition("=")[2]].read_text()
        overrides = [*overrides, *(["data.pool=a", "data.client=b"] if "folder" in file else [])]
        overrides = [*overrides, *(["task.teacher=c"] if "add task.teacher=" in file else [])]
    config = to_dict(load_config(overrides, config_dir=CONFIGS))
    python, script, *argv = shlex.split(command(config))
    assert [python, script] == ["python", "train.py"]
    again = to_dict(load_config(argv, config_dir=CONFIGS))
    assert again == {**config, "experiment": None}
    assert len(argv) == len(differences(config))
    assert command(again) == command(config)


def test_parts_come_first_and_defaults_are_left_out() -> None:
    config = to_dict(load_config(["seed=3", "labels=public"], config_dir=CONFIGS))
    assert differences(config) == {"labels": ("public", "client_prototypes"), "seed": (3, 1)}


def test_the_config_of_another_version_is_shown_all_the_same() -> None:
    config = to_dict(load_config([], config_dir=CONFIGS))
    config["task"] = {"name": "of_later", "speed": 3}
    config["selection"]["new"] = None
    del config["trainer"]["max_epochs"]
    found = differences(config)
    assert found == {"task": ("of_later", "self_labeling"), "task.speed": (3, None)}


# --- mistakes --------------------------------------------------------------------------------


def test_no_run_no_report(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report.html").unlink()
    cases = [(tmp_path / "nowhere", "no config.yaml")]
    for name, file, content, words in (
        ("empty", None, "", "no config.yaml"),
        ("unfinished", "summary.json", None, "has not ended"),
        ("damaged", "summary.json", "{", "cannot be read as JSON"),
        ("list", "summary.json", "[]", "holds no JSON object"),
        ("foreign", "summary.json", '{"proxy": {"size": 5}}', "is not the summary of a run"),
        ("yaml", "config.yaml", "a: [", "cannot be read as YAML"),
    ):
        place = tmp_path / name
        if file is None:
            place.mkdir()
        else:
            shutil.copytree(folder, place)
            (place / file).unlink() if content is None else (place / file).write_text(content)
        cases.append((place, words))
    for place, words in cases:
        assert main([str(place)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert words in err
        assert err.count("\n") == 1
        assert not list(place.glob("*report.html*"))
    assert main([str(tmp_path / "nowhere"), str(folder)]) == 2  # the other one is done
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"


def test_a_report_stays_whole_when_a_new_one_fails(folder: Path) -> None:
    before = (folder / "report.html").read_bytes()
    (folder / "summary.json").write_text("{}")
    change(folder / "summary.json", proxy={"size": 5})
    with pytest.raises(ValueError, match=r"summary\.json"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == before


# --- curves and other small parts ------------------------------------------------------------


def test_a_resumed_run_has_one_curve(tmp_path: Path) -> None:
    files = {
        "version_0": "step,train/loss,val/loss\n9,2.0,\n19,1.5,\n29,1.2,\n29,,1.1\n39,nan,\n",
        "version_1": "step,train/loss\n29,1.0\n39,0.8\n",
        "version_2": "step,simulation/test_accuracy\n39,0.9\n",
        "version_10": "step,train/loss\n49,0.7\n",
    }
    for name, text in files.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(text)
    points = read_points(tmp_path, ["train/loss", "val/loss", "val/accuracy"])
    assert points["train/loss"] == [(9, 2.0), (19, 1.5), (29, 1.0), (39, 0.8), (49, 0.7)]
    assert points["val/loss"] == [(29, 1.1)]
    assert points["val/accuracy"] == []


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.5, 0.5), (3e-7, 4e-7), (-2, 9), (0, 123456), (99.9, 100), (0, 0)]
)
def test_ticks_span_the_range_in_equal_round_steps(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    step = found[1] - found[0]
    assert found[0] <= low + 1e-6 * step
    assert found[-1] >= high - 1e-6 * step
    assert [b - a for a, b in pairwise(found)] == pytest.approx([step] * (len(found) - 1))


def test_composition_counts_unknown_names_and_gives_up_on_too_many() -> None:
    assert composition(["a", None, "a"], [0, 1]) == {
        "a": {"chosen": 1, "pool": 2},
        "(unknown)": {"chosen": 1, "pool": 1},
    }
    assert composition([None, None], [0]) is None
    assert composition([str(number) for number in range(1001)], [0]) is None


def test_the_environment_names_versions_but_no_machine() -> None:
    import platform

    facts = environment_facts(torch.device("cpu"), 2)
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert facts["device"] == "CPU"
    assert platform.node() not in json.dumps(facts)
