"""A study's table, CSV, Parquet and figures, against hand computation."""

from __future__ import annotations

import csv
import statistics

import pyarrow.parquet as pq
import pytest
from PIL import Image

from ecos_pl.storage import write_json
from ecos_pl.study import results
from ecos_pl.study.cells import cells_of
from ecos_pl.study.figures import lines_of, write_figure
from ecos_pl.study.folder import StudyFolder
from ecos_pl.study.nodes import as_number
from ecos_pl.study.report import write_report
from ecos_pl.study.results import tidy_rows
from ecos_pl.study.study_file import read_study
from ecos_pl.study.table import markdown_table

TEXT = """\
title: Made up
axes: {seed: [1, 2, 3]}
blocks:
  - strategy: {ECOS: {selection.strategy: ecos}, random set: {selection.strategy: random}}
    epsilon: {0.5: {privacy.max_epsilon: 0.5, privacy.noise_std: 13}, 4: {privacy.max_epsilon: 4}}
  - strategy: {client alone: {train_on: client}}
table:
  rows: [epsilon, strategy]
  best_within: epsilon
  reference: client alone
  columns:
    - test accuracy
    - {title: s, fact: seconds.total, form: "{:.1f}", best: lowest, spread: false}
    - {title: unit, fact: privacy.unit}
figures:
  - {x: epsilon, y: [simulation.test_accuracy, communication.bytes_up], lines: strategy}
  - {x: strategy, y: simulation.test_accuracy, lines: epsilon}
"""


def facts(cell):
    """Numbers that tell cells apart; the random set is as good as ECOS at ε = 4."""
    seed, epsilon = int(cell.labels["seed"]), float(cell.labels.get("epsilon", 0))
    is_random = cell.labels["strategy"] == "random set"
    accuracy = 0.8 + 0.01 * seed + 0.02 * epsilon - 0.1 * (is_random and epsilon < 1)
    return {
        "run_id": cell.run_id,
        "seed": seed,
        "simulation": {"test_accuracy": accuracy, "purity": None},
        "seconds": {"total": 10 * seed + (5 if is_random else 0)},
        "privacy": {"unit": "sample"},
        "communication": {"bytes_up": 100},
        "rounds": [{"changed": 0.25}] if is_random else [],
    }


@pytest.fixture
def made_up(tmp_path):
    path = tmp_path / "made_up.yaml"
    path.write_text(TEXT)
    study = read_study(path)
    return study, [(cell, facts(cell)) for cell in cells_of(study)]


def test_the_table_against_hand_computation(made_up):
    study, found = made_up
    spread = f"{statistics.stdev([0.81, 0.82, 0.83]):.3f}"
    assert spread == "0.010"
    assert markdown_table(found, study.table) == [
        "| epsilon | strategy | test accuracy | s | unit |",
        "| --- | --- | ---: | ---: | ---: |",
        "| 0.5 | ECOS | **0.830 ± 0.010** | **20.0** | sample |",
        "| 0.5 | random set | 0.730 ± 0.010 | 25.0 | sample |",
        "| 4 | ECOS | **0.900 ± 0.010** | **20.0** | sample |",
        "| 4 | random set | **0.900 ± 0.010** | 25.0 | sample |",
        "| – | client alone | 0.820 ± 0.010 | 20.0 | sample |",
    ]


def test_missing_cells_are_told(made_up):
    study, found = made_up
    some = [(cell, None if cell.labels["seed"] == "3" else one) for cell, one in found]
    some[0] = (some[0][0], None)
    lines = markdown_table(some, study.table)
    assert lines[2] == "| 0.5 (1 of 3 runs) | ECOS | **0.830** | **20.0** | sample |"
    assert lines[3].startswith("| 0.5 (2 of 3 runs) | random set | 0.725 ± 0.007 |")
    ecos = [(cell, one if cell.labels["strategy"] == "ECOS" else None) for cell, one in found]
    assert [line.split(" | ")[1] for line in markdown_table(ecos, study.table)[2:]] == 2 * ["ECOS"]


def test_the_tidy_table_has_everything_once(made_up, tmp_path):
    _, found = made_up
    rows = tidy_rows(found)
    assert len(rows) == len(found) == 15
    cell, summary = found[1]
    assert rows[1] == {
        "run_id": cell.run_id,
        "strategy": "ECOS",
        "epsilon": 4,
        "seed": 1,
        "config.privacy.max_epsilon": "4",
        "config.privacy.noise_std": None,
        "config.seed": "1",
        "config.selection.strategy": "ecos",
        "config.train_on": None,
        "simulation.test_accuracy": summary["simulation"]["test_accuracy"],
        "simulation.purity": None,
        "seconds.total": 10,
        "privacy.unit": "sample",
        "communication.bytes_up": 100,
        "rounds.0.changed": None,
    }
    results.write_csv(rows, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [list(row) for row in read] == [list(row) for row in rows]
    assert [row["epsilon"] for row in read[:3]] == ["0.5", "4", "0.5"]
    assert results.write_parquet(rows, tmp_path / "results.parquet")
    table = pq.read_table(tmp_path / "results.parquet")
    assert table.column("epsilon").to_pylist()[:3] == [0.5, 4.0, 0.5]
    assert table.column("rounds.0.changed").to_pylist()[2] == 0.25
    assert str(table.schema.field("seconds.total").type) == "int64"


def test_lines_hold_what_belongs_together(made_up):
    study, found = made_up
    lines = lines_of(found, study.figures[0], "simulation.test_accuracy", ["seed"])
    assert list(lines) == ["ECOS", "random set", "client alone"]
    assert lines["ECOS"].points["0.5"] == pytest.approx([0.82, 0.83, 0.84])
    assert lines["ECOS"].level == []
    assert lines["client alone"].points == {}
    assert lines["client alone"].level == pytest.approx([0.81, 0.82, 0.83])
    # Without the axis of lines, cells that differ in it are not mixed up.
    alone = read_study(study.path).figures[0]
    alone = type(alone)("a", "strategy", alone.y)
    assert list(lines_of(found, alone, alone.y[0], ["seed"])[""].points) == ["client alone"]


def test_figures_are_pictures(made_up, tmp_path):
    study, found = made_up
    for form in study.figures:
        path = write_figure(found, form, study.table.over, tmp_path)
        with Image.open(path) as image:
            assert image.width > 500
            assert len(image.convert("RGB").resize((99, 99)).getcolors(99 * 99)) > 20
    nothing = [(cell, None) for cell, _ in found]
    assert write_figure(nothing, study.figures[0], study.table.over, tmp_path) is None


def test_the_report_of_what_is_there(made_up, tmp_path, capsys, monkeypatch):
    study, found = made_up
    folder = StudyFolder(tmp_path / "out")
    cells = [cell for cell, _ in found]
    write_report(study, cells, folder)
    assert capsys.readouterr().err == "none of 15 cells is done: nothing to show\n"
    for cell, summary in found[:4]:
        write_json(folder.root / cell.run_id / "summary.json", summary)
    write_report(study, cells, folder)
    out, err = capsys.readouterr()
    assert "4 of 15 cells are done." in out
    written = (folder.root / "results.md").read_text()
    assert written.startswith(out.rstrip("\n"))
    assert "![figures/test_accuracy-epsilon.png](figures/test_accuracy-epsilon.png)" in written
    for name in ("results.parquet", "results.csv", "figures/test_accuracy-epsilon.png"):
        assert (folder.root / name).is_file()
        assert name in err
    monkeypatch.setattr(results.importlib.util, "find_spec", lambda name: None)
    write_report(study, cells, folder)
    assert "results.parquet is left out: pyarrow is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"), [("3", 3), ("0.25", 0.25), ("1e-3", 1e-3), ("a", None)]
)
def test_labels_that_are_numbers(text, number):
    assert as_number(text) == number
