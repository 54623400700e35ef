"""What whole runs leave with W&B and TensorBoard: all that is to be looked at, nothing private."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import wandb

import callbacks
import train
from callbacks.choose import choose_callbacks, switchable
from callbacks.loggers import _has_key
from callbacks.run_timer import RunTimer
from ecos_pl import coverage
from ecos_pl.config import CallbacksOptions
from tests.conftest import draw
from tests.test_train import SMALL
from tests.wandb_log import OfflineRun, read_run

NUM_PRIVATE = 97
"""The client's images: more than a quota can be, and no size of a cluster here."""
MARKER = "okapi-2718"
"""In the names and contents of the client's images."""
FIGURES = {
    "coverage",
    "chosen",
    "random",
    "rejected",
    "embedding_map",
    "privacy_ledger",
    "training",
    "confusion_matrix",
    "calibration",
}
TABLES = {
    "probe/clusters",
    "simulation/chosen_domains",
    "simulation/chosen_classes",
    "privacy/releases",
    "communication/by_kind",
    "simulation/classes",
    "quality/against_random",
    "simulation/quality/against_random",
}
HISTOGRAMS = {
    "probe/quotas",
    "probe/noisy_counts",
    "probe/distance_of_chosen",
    "probe/distance_of_others",
}


def _client(folder: Path) -> None:
    rng = np.random.default_rng(5)
    for part, sizes in (("train", (50, NUM_PRIVATE - 50)), ("test", (15, 11))):
        for kind, name in enumerate(("vertical", "horizontal")):
            (folder / part / name).mkdir(parents=True)
            for number in range(sizes[kind]):
                path = folder / part / name / f"{MARKER}-{number}.png"
                draw(kind, rng).save(path)
                with path.open("ab") as file:  # behind the picture's end
                    file.write(MARKER.encode())


@pytest.fixture(scope="module")
def place(image_tree, tmp_path_factory):
    """A folder for runs that share one probe, and a W&B that asks nobody and stays in it."""
    root = tmp_path_factory.mktemp("tracking")
    _client(root / "client")
    counted: list[list[int]] = []
    nearest = coverage.nearest_centroids

    def watched(embeddings: Any, centroids: Any) -> Any:
        bins = nearest(embeddings, centroids)
        counted.append(np.bincount(bins, minlength=len(centroids)).tolist())
        return bins

    with pytest.MonkeyPatch.context() as patch:
        for folder in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
            patch.setenv(folder, str(root / "wandb_home"))
        for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(root / "no.netrc"))
        patch.setattr("builtins.input", lambda *_: pytest.fail("W&B asks for input"))
        patch.setattr(coverage, "nearest_centroids", watched)
        yield SimpleNamespace(root=root, image_tree=image_tree, counted=counted)
    wandb.finish()


def call(place: Any, run_id: str, *overrides: str) -> int:
    data = ["data=folder", f"data.pool={place.image_tree}/pool", "data.client_domain=bars"]
    data += [f"data.client={place.root}/client", f"run_root={place.root}/runs", f"run_id={run_id}"]
    return train.main([*SMALL, *data, "labels.num_dims=6", "labels.num_views=2", *overrides])


WANDB = ["logger=wandb", "logger.mode=offline", "logger.group=seeds", "logger.tags=[a,b]"]


@pytest.fixture(scope="module")
def tracked(place):
    """One run with W&B offline, and its folder as W&B left it."""
    assert call(place, "tracked", *WANDB) == 0
    (folder,) = (place.root / "runs/tracked/wandb").glob("offline-run-*")
    return SimpleNamespace(
        run=read_run(folder), folder=folder, runs=place.root / "runs/tracked", place=place
    )


def _names(run: OfflineRun, kind: str) -> set[str]:
    """Names under which media of a kind were logged."""
    return {
        name.removesuffix("._type")
        for row in run.history
        for name, value in row.items()
        if name.endswith("._type") and value == kind
    } | {
        name
        for row in run.history
        for name, value in row.items()
        if isinstance(value, dict) and value.get("_type") == kind
    }


# --- W&B -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wandb_gets_images_tables_and_histograms(tracked):
    run = tracked.run
    assert _names(run, "images/separated") == {f"figures/{name}" for name in FIGURES}
    assert _names(run, "table-file") == TABLES
    assert _names(run, "histogram") == HISTOGRAMS
    pictures = list(tracked.folder.rglob("media/images/**/*.png"))
    assert len(pictures) == len(FIGURES) + 1  # the curves before and after the test
    for name in ("probe/epsilon", "simulation/purity", "communication/coverage/bytes_down"):
        assert len(run.logged(name)) == 1
    for name in ("privacy/epsilon", "simulation/calibration_error", "simulation/test_accuracy"):
        assert len(run.logged(name)) == 1


@pytest.mark.slow
def test_wandb_knows_the_run_by_a_stable_name_and_its_config_as_plain_data(tracked):
    run = tracked.run
    assert run.run.run_id == run.run.display_name == "tracked"
    assert (run.run.project, run.run.run_group) == ("ecos", "seeds")
    assert (list(run.run.tags), run.run.job_type) == (["a", "b"], "self_labeling")
    assert run.config["selection"]["size"] == 60
    assert run.config["data"]["name"] == "folder"
    assert run.config["callbacks"]["artifacts"] is True


@pytest.mark.slow
def test_proxy_set_and_model_are_artifacts_that_name_each_other(tracked):
    found = {record.name: record for record in tracked.run.artifacts}
    proxy_set, model = found["proxy_set-tracked"], found["model-tracked"]
    assert (proxy_set.type, model.type) == ("dataset", "model")
    assert "latest" in proxy_set.aliases
    assert {"latest", "delivered"} <= set(model.aliases)
    files = {entry.path for entry in proxy_set.manifest.contents}
    assert files == {"proxy_set.csv", "proxy_set.json"}
    assert [entry.path for entry in model.manifest.contents] == ["model.safetensors"]
    told, summary = (
        json.loads(model.metadata),
        json.loads((tracked.runs / "summary.json").read_text()),
    )
    alias = told["proxy_set"]["artifact"].removeprefix("proxy_set-tracked:")
    assert alias in proxy_set.aliases
    about = json.loads(proxy_set.metadata)
    assert told["proxy_set"]["fingerprint"] == about["fingerprint"]
    assert about["fingerprint"] == summary["proxy"]["fingerprint"]
    assert about["privacy"]["epsilon"] == told["privacy"]["epsilon"]
    assert told["run_id"] == "tracked"


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [n for key, one in value.items() if "noisy" not in str(key) for n in _numbers(one)]
    if isinstance(value, list):
        return [n for one in value for n in _numbers(one)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@pytest.mark.slow
def test_nothing_private_is_in_what_wandb_would_upload(tracked):
    """Names and contents of the client's images, their number, their true counts, their times."""
    root, run = tracked.place.root, tracked.run
    places = (tracked.folder.parent, root / "wandb_home")
    paths = [path for where in places for path in where.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) > 1_000_000  # the model is there
    for path in paths:
        for encoding in ("utf-8", "utf-16-le"):
            assert MARKER.encode(encoding) not in path.read_bytes(), path
        assert MARKER not in path.name
    assert not [path for path in paths if path.name == "output.log" and path.stat().st_size]

    tables = [json.loads(path.read_text()) for path in paths if path.name.endswith(".table.json")]
    assert len(tables) >= len(TABLES)
    told = [run.history, run.config, [json.loads(a.metadata or "{}") for a in run.artifacts]]
    for table in tables:
        shown = [place for place, name in enumerate(table["columns"]) if "noisy" not in name]
        told.append([[row[place] for place in shown] for row in table["data"]])
    numbers = _numbers(told)
    assert len(numbers) > 300
    assert NUM_PRIVATE not in numbers
    assert NUM_PRIVATE + 26 not in numbers  # all of the client's, with those of its test

    (truth,) = [counts for counts in tracked.place.counted if sum(counts) == NUM_PRIVATE]
    columns = [list(column) for table in tables for column in zip(*table["data"], strict=True)]
    assert [0] * len(truth) != truth
    assert truth not in columns
    assert sorted(truth) not in [sorted(c) for c in columns if all(isinstance(v, int) for v in c)]
    names = {name for row in run.history for name in row}
    assert "probe/seconds/embed" in names
    assert not {"probe/seconds/ask", "probe/seconds/label"} & names


@pytest.mark.slow
def test_the_same_command_again_logs_no_probe_again(tracked):
    """As after a resume: what was shown is in the checkpoint. The test is done anew."""
    before = set(tracked.folder.parent.glob("offline-run-*"))
    assert call(tracked.place, "tracked", *WANDB) == 0
    (folder,) = set(tracked.folder.parent.glob("offline-run-*")) - before
    again = read_run(folder)
    assert again.run.run_id == "tracked"
    names = {name.partition(".")[0] for row in again.history for name in row}
    assert not [name for name in names if name.startswith(("probe/", "privacy/", "communic"))]
    pictures = {name.removeprefix("figures/") for name in names if name.startswith("figures/")}
    assert pictures == {"training", "confusion_matrix", "calibration"}
    (accuracy,) = tracked.run.logged("simulation/test_accuracy")
    assert again.logged("simulation/test_accuracy") == [accuracy]


@pytest.mark.slow
def test_disabled_and_with_all_callbacks_off_only_the_run_itself_is_left(tracked, capsys):
    names = [f.name for f in dataclasses.fields(CallbacksOptions) if f.type in (bool, "bool")]
    off = [f"callbacks.{name}=false" for name in names]
    status = call(tracked.place, "quiet", "logger=wandb", "logger.mode=disabled", *off)
    assert status == 0
    folder = tracked.place.root / "runs/quiet"
    left = {path.name for path in folder.iterdir()}
    assert left - {"wandb"} == {
        "config.yaml",
        "checkpoints",
        "model.safetensors",
        "proxy_set.csv",
        "proxy_set.json",
        "summary.json",
    }
    assert not list(folder.rglob("*.wandb"))
    first = json.loads((tracked.runs / "summary.json").read_text())
    quiet = json.loads((folder / "summary.json").read_text())
    for told in ("quality", "class_accuracy"):  # by callbacks
        first["simulation"].pop(told)
        quiet["simulation"].pop(told, None)
    assert quiet["simulation"] == first["simulation"]  # what is told changes nothing
    assert quiet["seconds"]["fit"] > 0


def test_without_a_key_wandb_ends_in_one_line_before_anything_is_asked(place, capsys):
    assert call(place, "keyless", "logger=wandb", "privacy.noise_std=3") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in ("logger.mode=offline", "wandb login", "WANDB_API_KEY"):
        assert words in error
    folder = place.root / "runs" / "keyless"
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    assert not (place.root / "runs" / "cache").exists() or place.counted


def test_a_key_is_found_where_wandb_looks(place, monkeypatch, tmp_path):
    assert not _has_key()
    host = wandb.setup().settings.base_url.split("//")[1].split("/")[0]
    (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password {40 * 'a'}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert _has_key()
    (tmp_path / "netrc").write_text("machine elsewhere.example\n  login user\n  password b\n")
    assert not _has_key()
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    assert _has_key()


# --- TensorBoard -----------------------------------------------------------------------------


@pytest.mark.slow
def test_tensorboard_gets_scalars_images_histograms_tables_and_the_config(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = ["logger=tensorboard", "trainer.log_every_n_steps=2"]
    assert call(place, "board", *logged, "trainer.max_epochs=1") == 0
    assert call(place, "board", *logged, "trainer.max_epochs=2", "callbacks.throughput=false") == 0
    events = EventAccumulator(
        str(place.root / "runs/board/tensorboard"), {"images": 0, "histograms": 0, "tensors": 0}
    ).Reload()
    tags = events.Tags()
    assert {f"figures/{name}" for name in FIGURES} == set(tags["images"])
    assert set(tags["histograms"]) == HISTOGRAMS
    texts = {name.removesuffix("/text_summary") for name in tags["tensors"]}
    assert texts >= {*TABLES, "config"}
    assert {"probe/epsilon", "val/accuracy", "train/loss"} <= set(tags["scalars"])
    rates = events.Scalars("throughput/images_per_second")
    assert [event.step for event in rates] == [2]  # of three in the first epoch; then it was off
    assert all(event.value > 0 for event in rates)
    assert len(events.Scalars("probe/epsilon")) == 1  # also after the resume
    assert len(events.Images("figures/chosen")) == 1
    (text,) = events.Tensors("config/text_summary")
    assert '"size": 60' in text.tensor_proto.string_val[0].decode()
    assert [event.step for event in events.Scalars("val/accuracy")] == [2, 5]
    assert "_hparams_/experiment" in tags[
        "tensors"
    ] or "_hparams_/experiment" in events.PluginTagToContent("hparams")


def test_without_tensorboard_one_line_says_how_to_get_it(place, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorboard", None)
    assert call(place, "boardless", "logger=tensorboard") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert 'pip install -e ".[tensorboard]"' in error


# --- switches --------------------------------------------------------------------------------

NEEDED = {"label_rounds", "run_timer", "stop_and_resume", "weight_averaging"}
NO_CALLBACK = {"report"}  # written when all is over
HELPERS = {
    "choose",
    "figures",
    "findings",
    "from_config",
    "image_grid",
    "launched_processes",
    "logging_to",
    "loggers",
    "probed",
    "shows_probe",
}


def test_every_callback_has_a_switch_of_its_file_name():
    files = {path.stem for path in Path(callbacks.__file__).parent.glob("*.py")} - {"__init__"}
    switches = {f.name for f in dataclasses.fields(CallbacksOptions) if isinstance(f.default, bool)}
    switches -= NO_CALLBACK
    assert files - NEEDED - HELPERS == switches == set(switchable({}, max_epsilon=1.0))


@pytest.mark.parametrize("name", sorted(switchable({}, max_epsilon=1.0)))
def test_a_switch_turns_off_that_one_alone(name, tmp_path):
    available = switchable({}, max_epsilon=1.0)

    def chosen(**changes: bool) -> list[str]:
        made = choose_callbacks(
            available,
            {**dict.fromkeys(available, True), **changes},
            timer=RunTimer(),
            checkpoints=tmp_path,
            ema_decay=0.9,
            logs=True,
            shows_progress=False,
        )
        return [type(callback).__name__ for callback in made]

    every, without = chosen(), chosen(**{name: False})
    assert len(every) == len(without) + 1
    (gone,) = set(every) - set(without)
    assert gone.lower() == name.replace("_", "")


def test_umap_that_is_missing_is_one_line(place, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    assert call(place, "mapless", "callbacks.map_method=umap") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert 'pip install -e ".[umap]"' in error
