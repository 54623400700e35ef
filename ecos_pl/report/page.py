"""The sections in order, and the page that they make."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
import yaml  # type: ignore[import-untyped]

from ecos_pl.accounting import round_up
from ecos_pl.report.asked import asked
from ecos_pl.report.blocks import Block, Fact, Facts, Files, Section, Source, Table, Text
from ecos_pl.report.choice import chosen
from ecos_pl.report.cost import cost
from ecos_pl.report.opening import opening
from ecos_pl.report.outcome import model, result, training
from ecos_pl.report.pictures import Figures
from ecos_pl.report.quality import quality
from ecos_pl.report.run_record import RunRecord, read_run
from ecos_pl.report.settings import command, differences, in_words, printable
from ecos_pl.report.words import data_size, percent
from ecos_pl.storage import write_bytes

NAME = "report.html"

_FILES = {
    "config.yaml": "every option of the run",
    "summary.json": "the numbers of this page",
    "proxy_set.csv": "the chosen images: name, region, label",
    "proxy_set.json": "where the chosen images come from",
    "labels.json": "how many answers people gave",
    "model.safetensors": "the trained network",
    "model.int8.onnx": "the compressed network, 8 bits",
    "model.onnx": "the compressed network, 32 bits",
    "model.pt2": "the compressed network, for PyTorch",
    "CARD.md": "what the compressed network is, and how to run it",
    "compression.json": "what the compression came to",
    "pruning_plan.json": "how much of each layer was removed",
}

_WORDS = [
    ("client", "whose private images the network is for; they never leave it"),
    ("pool", "the large collection of public images"),
    ("proxy set", "the public images chosen to stand in for the client's"),
    ("encoder", "a public network that turns images into numbers, alike for similar images"),
    ("cluster, region", "a group of similar public images"),
    ("ε (epsilon)", "how much the client's answers can reveal about one image: 0 is nothing"),
    ("domain", "a kind of images, such as one camera's or one collection's"),
    ("purity", "the share of the chosen images that are of the client's domain"),
    ("accuracy", "the share of images that the network names correctly"),
    ("simulation", "measured with what a real client would keep to itself"),
]


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a finished run, whole or not at all.

    Raises:
        ValueError: The folder holds no finished run, or a damaged file.
    """
    page = report_html(folder)
    write_bytes(folder / NAME, page.encode())
    return folder / NAME


def report_html(folder: Path) -> str:
    """The page: a pure function of the folder, without a clock.

    Raises:
        ValueError: As `write_report`.
    """
    record = read_run(folder)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ecos_pl.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    try:
        return environment.get_template("page.html.jinja").render(
            run_id=record.fact("run_id") or folder.name,
            opening=opening(record),
            is_simulated=record.is_simulated,
            highlights=highlights(record),
            sections=[section for section in sections(record) if section.blocks],
            words=_WORDS if record.is_simulated else _WORDS[:-1],
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"{folder / 'summary.json'} is not the summary of a run ({type(error).__name__}: "
            f"{error})"
        ) from error


def highlights(record: RunRecord) -> list[Fact]:
    """The few numbers that most readers look for."""
    known, found = record.fact("simulation") or {}, []
    if record.has_proxy_set:
        found.append(Fact("images chosen", f"{record.fact('proxy', 'size'):,}"))
        epsilon = round_up(record.epsilon) if record.epsilon else "0"
        found.append(Fact("privacy loss ε", epsilon if record.is_private else "not private"))
        sent = record.fact("communication") or {}
        found.append(Fact("sent by the client", data_size(sent.get("bytes_up") or 0)))
    if known.get("purity") is not None:
        found.append(Fact("purity", percent(known["purity"]), simulated=True))
    if known.get("test_accuracy") is not None:
        found.append(Fact("test accuracy", percent(known["test_accuracy"]), simulated=True))
    size = record.fact("compression", "student", "size_mb") or record.fact("model", "size_mb")
    if size:
        found.append(Fact("the model's size", f"{size:.1f} MB"))
    return found


def sections(record: RunRecord) -> list[Section]:
    """All sections; those without blocks have nothing to say about this run."""
    figures = Figures(record.folder / "figures")
    return [
        Section("asked", "What was asked", asked(record)),
        Section("cost", "What it cost", cost(record, figures)),
        Section("chosen", "What was chosen", chosen(record, figures)),
        Section("quality", "How good the choice is", quality(record)),
        Section("training", "How the training went", training(record, figures)),
        Section("result", "The result", result(record, figures)),
        Section("model", "The network", model(record)),
        Section("figures", "More figures", figures.rest()),
        Section("config", "Configuration", _config(record)),
        Section("again", "How to reproduce it", _again(record)),
    ]


def _config(record: RunRecord) -> list[Block]:
    config = printable(record.config)
    rows = [
        (key, in_words(value), "–" if key == "run_id" else in_words(default))
        for key, (value, default) in differences(config).items()
    ]
    whole = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    blocks: list[Block] = [Source("The whole configuration (config.yaml)", whole)]
    if rows:
        header = ["option", "this run", "default"]
        note = "What is not listed is as it is by default."
        blocks.insert(0, Table("What differs from the defaults", header, rows, note, words=[1, 2]))
    return blocks


def _again(record: RunRecord) -> list[Block]:
    text = "The same command in the same place reads what is there, and redoes nothing."
    if record.epsilon:
        text += (
            " The client is not asked again, and no privacy is spent twice. Elsewhere it is asked "
            "anew: that spends privacy, and its new random noise makes the result differ a little."
        )
    blocks: list[Block] = [
        Source("Command", command(printable(record.config)), open=True),
        Text(text),
    ]
    if versions := _environment(record):
        blocks.append(versions)
    return [*blocks, Files(_files(record.folder))]


def _environment(record: RunRecord) -> Facts | None:
    found = record.fact("environment")
    if not found:
        return None
    rows = [("python", found["python"]), *found["packages"].items()]
    rows += [("system", found["platform"]), ("device", found["device"])]
    if found["num_processes"] > 1:
        rows.append(("processes", f"{found['num_processes']:,}"))
    return Facts([Fact(name, str(value)) for name, value in rows], "Environment")


def _files(folder: Path) -> Sequence[tuple[str, str, str]]:
    """Names, meanings and sizes of the files that are there."""
    paths = [folder / name for name in _FILES if (folder / name).is_file()]
    return [(path.name, _FILES[path.name], data_size(path.stat().st_size)) for path in paths]
