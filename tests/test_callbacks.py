"""The callbacks: hooks called directly, then tiny real runs with each kind of logger."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from callbacks.chosen_images import ChosenImages, draw_chosen, draw_random, evenly_over_clusters
from callbacks.coverage_figure import CoverageFigure
from callbacks.probed import Probed
from callbacks.run_timer import RunTimer, num_images
from callbacks.sampling_statistics import SamplingStatistics
from callbacks.training_curves import TrainingCurves
from ecos_pl.images import UnreadableImage
from ecos_pl.probe_result import ProbeResult
from ecos_pl.proxy_set import ProxySet
from ecos_pl.selection import Selection

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*litlogger")

SIMULATION = {"purity": 0.75, "random_purity": 0.5, "label_accuracy": None}
CLASSES = ["cat", "$dog$", "猫 with a very long name"]


class Pool:
    """40 plain images; number 9 is damaged."""

    name, fingerprint = "pool", "00"
    ids: ClassVar = [f"{i}.png" for i in range(40)]
    labels: ClassVar = [CLASSES[i % 2] if i % 5 else None for i in range(40)]
    domains: ClassVar = ["photo" if i < 20 else "sketch" for i in range(40)]

    def __len__(self) -> int:
        return 40

    def read(self, index: int) -> Image.Image:
        if index == 9:
            raise UnreadableImage("cannot read image '9.png'")
        return Image.new("RGB", (30 + index, 20), (6 * index, 80, 255 - 6 * index))


def make_result(num_clusters: int = 5, *, asked: bool = True) -> ProbeResult:
    assignments = torch.arange(40) * num_clusters // 40
    indices = torch.arange(0, 40, 3)
    sizes, quotas = assignments.bincount(), assignments[indices].bincount(minlength=num_clusters)
    counts = torch.arange(num_clusters) * 10 - 4
    kept = counts >= 6.5 if asked else torch.ones(num_clusters, dtype=torch.bool)
    weights = torch.ones(len(indices))
    weights[0] = 0
    targets = torch.nn.functional.one_hot(indices % 3, 3) * 0.9 + 0.1 / 3
    proxy_set = ProxySet(
        ids=[Pool.ids[i] for i in indices.tolist()],
        clusters=assignments[indices],
        classes=CLASSES,
        targets=targets * weights[:, None],
        weights=weights,
        label_source="client_prototypes",
        provenance={},
    )
    return ProbeResult(
        proxy_set=proxy_set,
        unlabeled=torch.tensor([1, 2]),
        noisy_counts=counts if asked else None,
        cluster_sizes=sizes,
        selection=Selection(indices, quotas, kept, 6.5 if asked else 0.0, 2, 1),
        releases=[],
        privacy={
            "epsilon": 1.5,
            "delta": 1e-5,
            "relation": "add/remove",
            "unit": "sample",
            "accountant": "PLD",
        },
        spent_now=1.5,
        communication={"bytes_down": 700, "bytes_up": 90, "round_trips": int(asked)},
        seconds={"embed": 3.0, "cluster": 2.0, "ask": 1.0, "select": 0.1, "label": 0.2},
        num_unreadable=1,
        fingerprint="ab" * 32,
        from_disk=False,
    )


class Probed40(L.LightningDataModule):
    """Stands in for the ProxySamplingDataModule: 12 batches of 4 rows."""

    def __init__(self, result: ProbeResult | None, client_domain: str | None = "photo") -> None:
        super().__init__()
        self.probe_result, self.simulation = result, SIMULATION
        self.scenario = SimpleNamespace(pool=Pool(), client_domain=client_domain)

    def train_dataloader(self) -> Any:
        rows = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(rows, rows.argmax(dim=1)), batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


class Linear(L.LightningModule):
    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.layer, self.fail_at = torch.nn.Linear(3, 3), fail_at

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == self.fail_at:
            raise RuntimeError("the power went")
        loss = torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("train/loss", loss)
        self.log("train/learning_rate", 0.1)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.layer(batch[0])
        self.log("val/loss", torch.nn.functional.cross_entropy(logits, batch[1]))
        self.log("val/accuracy", (logits.argmax(dim=1) == batch[1]).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        accuracy = (self.layer(batch[0]).argmax(dim=1) == batch[1]).float().mean()
        self.log("simulation/test_accuracy", accuracy)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def all_callbacks() -> list[L.Callback]:
    return [
        SamplingStatistics(),
        CoverageFigure(),
        ChosenImages(12),
        TrainingCurves(),
        RunTimer(),
    ]


def make_trainer(folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    checkpointing = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    defaults: dict[str, Any] = {
        "logger": False,
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 3,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": checkpointing,
    }
    return L.Trainer(default_root_dir=folder, callbacks=callbacks, **{**defaults, **options})


def stub_trainer(folder: Path, datamodule: Any, **facts: Any) -> Any:
    """What the set-up hooks read of a trainer."""
    defaults = {"is_global_zero": True, "fast_dev_run": False, "loggers": [], "global_step": 0}
    return SimpleNamespace(
        default_root_dir=str(folder), datamodule=datamodule, **{**defaults, **facts}
    )


def check_picture(path: Path, min_width: int = 600) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.width >= min_width
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert colours is not None
    assert len(colours) > 20
    # Bars, lines and pictures: not nearly all of it is paper.
    assert max(number for number, _ in colours) < 0.99 * sum(number for number, _ in colours)


class Recorder(CSVLogger):
    """A CSVLogger that remembers what it got."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="csv")
        self.got: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.got.append((step, dict(metrics)))
        super().log_metrics(metrics, step)


# --- setup hooks -----------------------------------------------------------------------------


def test_statistics_log_public_and_noisy_numbers_and_the_simulation(tmp_path: Path) -> None:
    logger = Recorder(tmp_path)
    trainer = stub_trainer(tmp_path, Probed40(make_result()), loggers=[logger])
    SamplingStatistics().on_fit_start(trainer, Linear())
    [(step, got)] = logger.got
    assert step == 0
    assert got == {
        "probe/proxy_size": 14,
        "probe/num_clusters": 5,
        "probe/kept_clusters": 3,
        "probe/threshold": 6.5,
        "probe/num_filled_up": 2,
        "probe/num_duplicates": 1,
        "probe/num_unreadable": 1,
        "probe/epsilon": 1.5,
        "probe/delta": 1e-5,
        "probe/bytes_down": 700,
        "probe/bytes_up": 90,
        "probe/round_trips": 1,
        "probe/seconds/embed": 3.0,
        "probe/seconds/cluster": 2.0,
        "probe/seconds/select": 0.1,
        "probe/seconds/label": 0.2,
        "simulation/purity": 0.75,
        "simulation/random_purity": 0.5,
    }


def test_no_time_of_the_client_is_logged(tmp_path: Path) -> None:
    result = make_result()
    result = replace(result, communication={**result.communication, "round_trips": 2})
    logger = Recorder(tmp_path)
    trainer = stub_trainer(tmp_path, Probed40(result), loggers=[logger])
    SamplingStatistics().on_fit_start(trainer, Linear())
    timed = {name for name in logger.got[0][1] if "seconds" in name}
    assert timed == {f"probe/seconds/{step}" for step in ("embed", "cluster", "select")}


@pytest.mark.parametrize("num_clusters", [1, 40])
def test_pictures_of_any_number_of_clusters(tmp_path: Path, num_clusters: int) -> None:
    trainer = stub_trainer(tmp_path, Probed40(make_result(num_clusters)))
    CoverageFigure().on_fit_start(trainer, Linear())
    check_picture(tmp_path / "figures" / "coverage.png", min_width=1200)
    if num_clusters == 1:
        ChosenImages(3).on_fit_start(trainer, Linear())
        check_picture(tmp_path / "figures" / "chosen.png")
    assert not list((tmp_path / "figures").glob(".*"))


def test_coverage_of_a_client_like_nothing_in_the_pool(tmp_path: Path) -> None:
    result = make_result()
    below = torch.full((5,), -7)
    none = replace(result.selection, kept=below > 0, quotas=torch.zeros(5, dtype=torch.int64))
    result = replace(result, noisy_counts=below, selection=none)
    CoverageFigure().on_fit_start(stub_trainer(tmp_path, Probed40(result)), Linear())
    check_picture(tmp_path / "figures" / "coverage.png")


def test_the_baselines_have_no_coverage(tmp_path: Path) -> None:
    logger = Recorder(tmp_path)
    trainer = stub_trainer(tmp_path, Probed40(make_result(asked=False), None), loggers=[logger])
    for callback in (SamplingStatistics(), CoverageFigure(), ChosenImages(5)):
        callback.on_fit_start(trainer, Linear())
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "chosen.png",
        "random.png",
    ]
    assert logger.got[0][1]["probe/kept_clusters"] == 5


@pytest.mark.parametrize(
    "facts", [{"is_global_zero": False}, {"fast_dev_run": 1}, {"datamodule": None}, {"result": 0}]
)
def test_nothing_to_do(tmp_path: Path, facts: dict[str, Any]) -> None:
    logger = Recorder(tmp_path / "log")
    datamodule = Probed40(None if "result" in facts else make_result())
    trainer = stub_trainer(tmp_path, datamodule, loggers=[logger])
    vars(trainer).update(facts)
    for callback in (SamplingStatistics(), CoverageFigure(), ChosenImages()):
        callback.on_fit_start(trainer, Linear())
    assert not logger.got
    assert not (tmp_path / "figures").exists()


def test_once_for_each_probe(tmp_path: Path) -> None:
    logger, datamodule = Recorder(tmp_path), Probed40(make_result())
    trainer = stub_trainer(tmp_path, datamodule, loggers=[logger])
    callback = SamplingStatistics()
    callback.on_fit_start(trainer, Linear())
    callback.on_test_start(trainer, Linear())
    assert len(logger.got) == 1
    resumed = SamplingStatistics()
    resumed.load_state_dict(callback.state_dict())
    resumed.on_fit_start(trainer, Linear())
    assert len(logger.got) == 1
    datamodule.probe_result = replace(make_result(), fingerprint="cd" * 32)
    callback.on_test_start(trainer, Linear())
    assert len(logger.got) == 2


# --- which images are shown ------------------------------------------------------------------


def test_rows_are_even_over_clusters() -> None:
    clusters = torch.tensor([7, 2, 2, 7, 7, 2, 2, 2, 9, 2])
    rows = evenly_over_clusters(clusters, 6)
    assert clusters[rows].tolist() == [2, 2, 2, 7, 7, 9]
    assert len(set(rows)) == 6
    assert sorted(evenly_over_clusters(clusters, 99)) == list(range(10))
    assert clusters[evenly_over_clusters(clusters, 2)].tolist() == [2, 7]
    assert evenly_over_clusters(torch.empty(0, dtype=torch.int64), 4) == []


def _shown(client_domain: str | None) -> Any:
    scenario = SimpleNamespace(pool=Pool(), client_domain=client_domain)
    return draw_chosen(Probed(make_result(), scenario, {}), 14)


def test_captions_legend_and_damaged_images() -> None:
    figure = _shown("photo")
    [axes] = figure.axes
    captions = [text.get_text() for text in axes.texts]
    assert len(axes.images) == 13  # one of 14 cannot be read
    assert "no label" in captions
    assert "cat · 93 %" in captions
    green = [line for line in axes.lines if line.get_linewidth() > 2]
    assert len(green) == 6  # 0, 3, 6, 12, 15, 18 of the first 20
    assert "simulation: green = client's domain (photo)" in figure.get_supxlabel()


def test_without_a_known_domain_no_colour_tells() -> None:
    figure = _shown(None)
    assert {line.get_linewidth() for line in figure.axes[0].lines} == {0.8}
    assert figure.get_supxlabel() == ""


def test_a_random_sample_of_the_pool_beside_it() -> None:
    found = Probed(make_result(), SimpleNamespace(pool=Pool(), client_domain="photo"), {})
    figure = draw_random(found, 39)
    [axes] = figure.axes
    assert len(axes.images) == 39  # all but the damaged one
    texts = [text.get_text() for text in axes.texts]
    names = [name or "" for i, name in enumerate(Pool.labels) if i != 9]
    assert sorted(texts[::2]) == sorted(names)
    assert texts[1::2].count("photo") == 19
    assert len([line for line in axes.lines if line.get_linewidth() > 2]) == 19
    assert figure.get_suptitle() == (
        "39 of 40 images of the pool, drawn at random\nits own label and its domain"
    )
    again = draw_random(found, 7)
    assert [text.get_text() for text in again.axes[0].texts] == texts[:14]


@pytest.mark.parametrize("number", [0, -1])
def test_number_of_images_is_checked(number: int) -> None:
    with pytest.raises(ValueError, match="num_images must be at least 1"):
        ChosenImages(number)


# --- whole runs ------------------------------------------------------------------------------


def test_fit_and_test(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, all_callbacks(), logger=CSVLogger(tmp_path, name="csv"))
    module, datamodule = Linear(), Probed40(make_result())
    trainer.fit(module, datamodule)
    for name in ("coverage", "chosen", "random", "training"):
        check_picture(tmp_path / "figures" / f"{name}.png")
    untested = (tmp_path / "figures" / "training.png").read_bytes()
    chosen = (tmp_path / "figures" / "chosen.png").stat().st_mtime_ns
    trainer.test(module, datamodule, verbose=False)
    assert (tmp_path / "figures" / "training.png").read_bytes() != untested
    assert (tmp_path / "figures" / "chosen.png").stat().st_mtime_ns == chosen

    curves, timer = trainer.callbacks[3], trainer.callbacks[4]
    assert isinstance(timer, RunTimer)
    steps = {name: [step for step, _ in points] for name, points in curves.state_dict().items()}
    assert steps == {
        "train/loss": [3, 6, 9, 12],
        "train/learning_rate": [3, 6, 9, 12],
        "val/loss": [12],
        "val/accuracy": [12],
    }
    assert timer.fit_seconds > 0
    assert timer.test_seconds > 0
    assert timer.seconds_per_step is not None
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    for name in ("probe/epsilon", "simulation/purity", "time/fit_seconds", "time/test_seconds"):
        assert sum(bool(row[name]) for row in rows) == 1


def test_without_a_probe_only_training_is_drawn(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, all_callbacks())
    trainer.fit(Linear(), Probed40(None))
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["training.png"]


def test_a_test_alone_shows_the_probe_but_no_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, all_callbacks())
    trainer.test(Linear(), Probed40(make_result()), verbose=False)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "coverage.png",
        "chosen.png",
        "random.png",
    }


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, all_callbacks(), fast_dev_run=True)
    trainer.fit(Linear(), Probed40(make_result()))
    assert not list(tmp_path.iterdir())


class Rank1(SingleDeviceStrategy):
    @property
    def is_global_zero(self) -> bool:
        return False


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, all_callbacks(), strategy=Rank1(torch.device("cpu")))
    trainer.fit(Linear(), Probed40(make_result()))
    trainer.test(Linear(), Probed40(make_result()), verbose=False)
    assert not list(tmp_path.iterdir())
    assert trainer.callbacks[3].state_dict()  # read there too: epoch metrics are collective


def test_resumed_curves_and_times_are_whole(tmp_path: Path) -> None:
    first, curves, timer = ModelCheckpoint(tmp_path, "first"), TrainingCurves(), RunTimer()
    trainer = make_trainer(tmp_path, [curves, timer, first], log_every_n_steps=50)
    trainer.fit(Linear(), Probed40(None))
    checkpoint = torch.load(first.best_model_path, weights_only=True)
    assert [step for step, _ in checkpoint["callbacks"]["TrainingCurves"]["train/loss"]] == [12]

    again, later = TrainingCurves(), RunTimer()
    options = {"max_epochs": 3, "log_every_n_steps": 50}
    resumed = make_trainer(tmp_path, [again, later, ModelCheckpoint(tmp_path, "again")], **options)
    with pytest.raises(RuntimeError, match="the power went"):
        resumed.fit(Linear(fail_at=30), Probed40(None), ckpt_path=first.best_model_path)
    check_picture(tmp_path / "figures" / "training.png")
    state = again.state_dict()
    assert state["val/loss"][0] == curves.state_dict()["val/loss"][0]
    assert [step for step, _ in state["train/loss"]] == [12, 24]
    assert later.fit_seconds > checkpoint["callbacks"]["RunTimer"]["fit_seconds"]

    # The best checkpoint has a shorter past than the run that tests it.
    seconds = later.fit_seconds
    resumed.test(Linear(), Probed40(None), ckpt_path=first.best_model_path, verbose=False)
    assert again.state_dict() == state
    assert later.fit_seconds == seconds

    # Resumed in the same process: what was seen after the checkpoint comes again, once.
    resumed.fit(Linear(), Probed40(None), ckpt_path=first.best_model_path)
    assert [step for step, _ in again.state_dict()["val/loss"]] == [12, 24, 36]


def test_an_interrupt_draws_and_a_failing_drawing_hides_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    curves = TrainingCurves()
    curves.load_state_dict({"train/loss": [[1, 2.0], [2, float("nan")], [3, float("inf")]]})
    state = SimpleNamespace(fn="fit")
    trainer = stub_trainer(tmp_path, None, state=state)
    curves.on_exception(trainer, Linear(), KeyboardInterrupt())
    check_picture(tmp_path / "figures" / "training.png")
    (tmp_path / "file").write_text("")
    trainer = stub_trainer(tmp_path / "file", None, state=state)
    curves.on_exception(trainer, Linear(), RuntimeError("the real one"))
    assert "training.png could not be written" in caplog.text


def test_images_in_a_batch() -> None:
    images = torch.zeros(4, 3, 8, 8)
    assert num_images((images, torch.zeros(4, 10), torch.zeros(4))) == 4
    views = (torch.zeros(28, 3, 8, 8), torch.zeros(28, 3, 8, 8))
    assert num_images({"labelled": (images, torch.zeros(4)), "unlabelled": views}) == 32
    assert num_images(None) == 0
    assert num_images(torch.tensor(1)) == 0


def test_timer_leaves_out_warm_up_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("callbacks.run_timer.perf_counter", lambda: now)
    timer, trainer = RunTimer(), SimpleNamespace(world_size=2, is_global_zero=False)
    timer.on_fit_start(trainer, Linear())  # type: ignore[arg-type]
    assert timer.seconds_per_step is None
    assert timer.images_per_second is None
    for batch, seconds in enumerate([50.0, 9.0, 9.0, 2.0, 4.0, 100.0, 2.0]):
        if seconds == 100.0:
            timer.on_validation_end(trainer, Linear())  # type: ignore[arg-type]
        now += seconds
        timer.on_train_batch_end(trainer, Linear(), None, torch.zeros(3, 1), batch)  # type: ignore[arg-type]
    timer.on_fit_end(trainer, Linear())  # type: ignore[arg-type]
    now += 1000.0
    assert timer.seconds_per_step == 2.0
    assert timer.images_per_second == pytest.approx(3 * 2 * 3 / 8)
    assert timer.fit_seconds == 176.0


# --- W&B -------------------------------------------------------------------------------------


@pytest.fixture
def _quiet_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for folder in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(folder, str(tmp_path / "wandb_home"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    # Nobody is there to answer.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("W&B asks for input"))
    yield
    wandb.finish()


@pytest.mark.usefixtures("_quiet_wandb")
def test_wandb_offline_gets_tables_histogram_and_pictures(tmp_path: Path) -> None:
    logger = WandbLogger(mode="offline", save_dir=tmp_path, project="test")
    trainer = make_trainer(tmp_path / "run", all_callbacks(), logger=logger)
    trainer.fit(Linear(), Probed40(make_result()))
    summary = dict(logger.experiment.summary)
    wandb.finish()
    media = next(tmp_path.glob("wandb/offline-run-*/files/media"))
    pictures = {path.name.rsplit("_", 2)[0] for path in (media / "images/figures").iterdir()}
    assert pictures == {"coverage", "chosen", "random", "training"}
    contents = [json.loads(path.read_text()) for path in media.rglob("*.json")]
    columns = {tuple(table["columns"]): table["data"] for table in contents}
    assert len(columns[("cluster", "size", "quota", "kept", "noisy count")]) == 5
    domains = columns[("domain", "chosen images", "pool images")]
    assert domains == [["photo", 7, 20], ["sketch", 7, 20]]
    assert ("class", "chosen images", "pool images") in columns
    assert summary["probe/epsilon"] == 1.5
    assert summary["probe/quotas"]["_type"] == "histogram"


@pytest.mark.usefixtures("_quiet_wandb")
def test_wandb_disabled(tmp_path: Path) -> None:
    # As WANDB_MODE=disabled, which W&B reads only once in a process.
    logger = WandbLogger(mode="disabled", save_dir=tmp_path / "log", project="test")
    trainer = make_trainer(tmp_path / "run", all_callbacks(), logger=logger)
    trainer.fit(Linear(), Probed40(make_result()))
    check_picture(tmp_path / "run" / "figures" / "training.png")
    assert not list(tmp_path.rglob("offline-run*"))
