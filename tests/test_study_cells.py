"""Studies: the file, the grid, the names of cells, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps import utils as sweep_utils

from ecos_pl.config_files import (
    load_config,
)
from ecos_pl.overrides import (
    ConfigError,
    Setting,
)
from ecos_pl.study import cells as cells_module
from ecos_pl.study.cells import CONFIG_DIR, cells_of, difference
from ecos_pl.study.study_file import read_study

TEXT = """\
title: Two strategies
settings:
  labels: {num_dims: 8}
  trainer: {max_epochs: 2}
axes:
  seed: [1, 2]
blocks:
  - strategy:
      ECOS: {selection.strategy: ecos}
      random set: {selection: {strategy: random}, trainer.max_steps: 5}
    epsilon:
      0.5: {privacy.max_epsilon: 0.5, privacy.noise_std: 12.72}
      2: {privacy.max_epsilon: 2}
  - strategy: {true labels: {labels: public}, client alone: {train_on: client}}
"""


@pytest.fixture
def study(tmp_path):
    def read(text=TEXT, name="two.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return read_study(path)

    return read


def test_the_grid_is_what_one_writes_by_hand(study):
    cells = cells_of(study())
    wanted = [
        {"strategy": strategy, **({"epsilon": epsilon} if epsilon else {}), "seed": seed}
        for block in (
            [(s, e) for s in ("ECOS", "random set") for e in ("0.5", "2")],
            [("true labels", None), ("client alone", None)],
        )
        for seed in ("1", "2")
        for strategy, epsilon in block
    ]
    assert [dict(cell.labels) for cell in cells] == wanted
    cell = cells[2]  # random set, 0.5, seed 1
    assert cell.run_id.startswith("random_set-epsilon0.5-seed1-")
    assert cell.argv == (
        "labels.num_dims=8",
        "trainer.max_epochs=2",
        "seed=1",
        "selection.strategy=random",
        "trainer.max_steps=5",
        "privacy.max_epsilon=0.5",
        "privacy.noise_std=12.72",
    )
    assert cell.config == load_config(cell.argv, config_dir=CONFIG_DIR)
    assert (cell.config.seed, cell.config.privacy.noise_std) == (1, 12.72)
    assert cells[0].config.trainer.max_steps == -1
    assert len({cell.run_id for cell in cells}) == len(cells) == 12


def test_options_of_a_part_that_an_axis_replaces_are_dropped(study):
    cell = next(c for c in cells_of(study()) if c.labels["strategy"] == "true labels")
    assert cell.config.labels.name == "public"
    assert "labels.num_dims=8" not in cell.argv


def test_a_cells_name_tells_all_its_settings(study, tmp_path, monkeypatch):
    def names(text=TEXT, **settings):
        overrides = [Setting(key.replace("__", "."), value) for key, value in settings.items()]
        return {cell.run_id for cell in cells_of(study(text), overrides)}

    before = names()
    assert names() == before
    assert not names(task__batch_size="32") & before
    assert not names(TEXT.replace("max_epochs: 2", "max_epochs: 3")) & before
    # Another seed is another cell, and leaves those that are there.
    assert names(TEXT.replace("[1, 2]", "[1, 2, 3]")) > before
    # So does a change within the experiment that the study starts from.
    (tmp_path / "experiment").mkdir()
    experiment = tmp_path / "experiment" / "base.yaml"
    monkeypatch.setattr(cells_module, "CONFIG_DIR", tmp_path)
    text = TEXT.replace("settings:\n", "settings:\n  experiment: base\n")
    experiment.write_text("selection: {size: 50}")
    first = names(text)
    experiment.write_text("selection: {size: 51}")
    assert not names(text) & first


def test_the_command_line_counts_more_than_the_file(study):
    for cell in cells_of(study(), [Setting("trainer.max_epochs", "1")]):
        assert cell.config.trainer.max_epochs == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("selection.strategy: ecos", "selection.stratgy: ecos", "line 9: no option selection.str"),
        ("selection.strategy: ecos", "selection.strategy: ecso", "line 9: selection.strategy can"),
        ("max_epochs: 2", "max_epoch: 2", "line 4: no option trainer.max_epoch"),
        ("max_epochs: 2", "max_epochs: two", "line 4: trainer.max_epochs must be a whole number"),
        ("labels: public", "labels: publc", "line 14: no labels=publc; did you mean public?"),
        ("axes:\n", "axis:\n", "line 5: no key axis; did you mean axes?"),
        ("[1, 2]", "1", "line 6: axis seed has one value: write seed: [1]"),
        ("[1, 2]", "[1, 1]", "line 6: axis seed: values are words or numbers, each once"),
        ("[1, 2]", "[]", "line 6: axis seed has no values"),
        ("trainer.max_steps: 5", "seed: 5", "line 10: seed is set by axes seed and strategy"),
        ("title: Two", "title: 'Two", "not valid YAML"),
        ("trainer.max_steps", "privacy.max_epsilon", "is set by axes strategy and epsilon"),
        ("trainer.max_steps: 5", "run_id: me", "line 10: run_id is set by the study itself"),
        ("{privacy.max_epsilon: 2}", "0", "expected 'key: value'"),
        ("title: Two", "table: {rows: strategy}\ntitle: Two", "epsilon is neither in rows nor in"),
        ("title: Two", "table: {rows: [strateg]}\ntitle: Two", "did you mean strategy?"),
        ("title: Two", "table: {columns: [purty]}\ntitle: Two", "did you mean purity?"),
        ("title: Two", "figures: [{x: epsilon}]\ntitle: Two", "line 1: a figure needs y"),
        ("true labels: {labels: public}", "one: {labels: public}, b: {labels: public}", "the same"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(study, old, new, words):
    text = TEXT.replace(old, new)
    assert text != TEXT
    with pytest.raises(ConfigError) as caught:
        cells_of(study(text))
    assert words in str(caught.value)
    assert "two.yaml" in str(caught.value)


def test_what_an_axis_sets_cannot_be_set_on_the_command_line(study):
    with pytest.raises(ConfigError, match=r"line 6: axis seed sets seed; --only seed="):
        cells_of(study(), [Setting("seed", "3")])
    with pytest.raises(ConfigError, match="run_root is set by the study itself"):
        cells_of(study(), [Setting("run_root", "x")])


def test_lists_and_words_reach_train_as_they_were_written(study):
    text = 'settings: {logger: {name: wandb, tags: ["a b", c]}}\naxes: {seed: [1]}\n'
    [cell] = cells_of(study(text))
    assert cell.config.logger.tags == ["a b", "c"]
    with pytest.raises(ConfigError, match="cannot be written as arguments"):
        cells_of(study('settings: {logger: {name: wandb, group: "none"}}\naxes: {seed: [1]}\n'))


def test_options_of_another_version_are_no_difference(study):
    config = cells_of(study())[0].config
    there = {"seed": 1, "run_root": "elsewhere", "trainer": {"max_epochs": 2, "gone": 1}}
    assert difference(there, config) == ""
    there["trainer"]["max_epochs"] = 3
    assert difference(there, config) == "trainer.max_epochs=3 there, trainer.max_epochs=2 here"


@pytest.mark.parametrize(
    "path", sorted((CONFIG_DIR / "study").glob("*.yaml")), ids=lambda p: p.stem
)
def test_studies_that_are_shipped(path):
    assert len(path.read_text().splitlines()) <= 60
    cells = cells_of(read_study(path))
    assert {cell.labels["seed"] for cell in cells} == {"1", "2", "3"}


def test_the_noise_of_the_epsilon_study_is_what_the_accountant_says():
    from ecos_pl.accounting import calibrate_noise_multiplier, epsilon_of
    from ecos_pl.coverage import coverage_release

    shares = {}
    for cell in cells_of(read_study(CONFIG_DIR / "study" / "mnist_fashion.yaml")):
        if "epsilon" not in cell.labels:
            continue
        privacy = cell.config.privacy
        assert float(cell.labels["epsilon"]) == privacy.max_epsilon
        # What is left has 1.2 times the noise of the whole; inverse squares add up.
        whole = calibrate_noise_multiplier(privacy.max_epsilon, privacy.delta)
        left = (1 / whole**2 - 1 / privacy.noise_std**2) ** -0.5
        assert left / whole == pytest.approx(1.2, rel=0.01)
        counts = epsilon_of([coverage_release(privacy.noise_std, 1.0)], privacy.delta)
        shares[privacy.max_epsilon] = counts / privacy.max_epsilon
    assert len(shares) == 5
    assert max(shares.values()) - min(shares.values()) < 0.05


# --- W&B sweeps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((CONFIG_DIR / "sweep").glob("*.yaml")), ids=lambda p: p.stem
)
def test_sweeps_make_arguments_that_train_takes(path):
    """The agent's own expansion; every value of every parameter, one after the other."""
    sweep = yaml.safe_load(path.read_text())
    assert (CONFIG_DIR.parent / sweep["program"]).is_file()
    assert sweep["method"] in ("grid", "random", "bayes")
    first = {
        name: given["value"] if "value" in given else given["values"][0]
        for name, given in sweep["parameters"].items()
    }
    combinations = [first] + [
        {**first, name: value}
        for name, given in sweep["parameters"].items()
        for value in given.get("values", [])[1:]
    ]
    for values in combinations:
        command = sweep_utils.create_sweep_command(list(sweep["command"]))
        args = {"args": {name: {"value": value} for name, value in values.items()}}
        found = sweep_utils.create_sweep_command_args(args)
        found |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": ["train.py"]}
        argv = [word for part in command for word in found[part[2:-1]]]
        assert argv[:3] == ["/usr/bin/env", "python", "train.py"]
        config = load_config(argv[3:], config_dir=Path(CONFIG_DIR))
        assert config.logger.name == "wandb"
        assert config.seed == values["seed"]
        assert config.selection.size == values["selection.size"]
        assert config.labels.noise_multiplier is None
        assert config.trainer.deterministic is True
