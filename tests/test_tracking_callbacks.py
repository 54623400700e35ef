"""What the tracking callbacks compute and draw, called directly and against independent sums."""

from __future__ import annotations

import csv
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torchmetrics.functional.classification import multiclass_calibration_error

from callbacks.artifacts import _known_model
from callbacks.calibration import NUM_BINS, Calibration, ReliabilityBins, draw_calibration
from callbacks.communication import Communication, by_kind
from callbacks.confusion_matrix import ConfusionMatrix, class_rows, draw_confusion
from callbacks.embedding_map import EmbeddingMap, draw_map
from callbacks.logging_to import log_table
from callbacks.privacy_ledger import PrivacyLedger, epsilons
from callbacks.probed import Probed
from callbacks.rejected_images import RejectedImages, draw_rejected
from callbacks.run_timer import RunTimer
from callbacks.throughput import Throughput
from ecos_pl.accounting import epsilon_of
from ecos_pl.pool_sample import PoolSample
from ecos_pl.privacy import Release
from ecos_pl.probe_result import ProbeResult
from ecos_pl.storage import write_json
from tests.test_callbacks import (
    Linear,
    Pool,
    Probed40,
    Recorder,
    check_picture,
    make_result,
    make_trainer,
    stub_trainer,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning", "ignore:.*litlogger")

RELEASES = [
    Release("coverage_counts", 5.0, 1.0, one_coordinate=True),
    Release("prototypes", 5.0 * 4096, 4096.0),
    Release("prototypes", 6.0 * 4096, 4096.0),
]
EXCHANGES = [
    {"kind": "coverage", "bytes_down": 600, "bytes_up": 50},
    {"kind": "prototype", "bytes_down": 100, "bytes_up": 40},
    {"kind": "backbone", "bytes_down": 7000, "bytes_up": 0},
    {"kind": "prototype", "bytes_down": 100, "bytes_up": 40},
]


def sampled(num_clusters: int = 5, num_dims: int = 4, **changes: Any) -> ProbeResult:
    """The small probe of test_callbacks with all of its pool as the sample."""
    result = make_result(num_clusters)
    generator = torch.Generator().manual_seed(0)
    sample = PoolSample(
        torch.arange(40),
        torch.arange(40) * num_clusters // 40,
        torch.randn(40, num_dims, generator=generator).half(),
        torch.rand(40, generator=generator),
    )
    return replace(result, pool_sample=sample, **changes)


def found_in(result: ProbeResult, client_domain: str | None = "photo") -> Probed:
    return Probed(result, SimpleNamespace(pool=Pool(), client_domain=client_domain), {})


# --- what was not chosen ---------------------------------------------------------------------


def test_rejected_images_come_from_other_clusters_and_from_kept_ones() -> None:
    result = sampled()  # clusters 2, 3, 4 are kept; every third image is chosen
    figure = draw_rejected(found_in(result), 6)
    assert figure is not None
    [axes] = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert "2 clusters that were not kept: 10 images" in texts
    assert "3 kept clusters: 16 images passed over" in texts
    clusters = [int(text.split()[1]) for text in texts if text.startswith("cluster ")]
    assert sorted(set(clusters)) == [0, 1, 2, 3, 4]
    assert len(axes.images) == 12
    assert figure.get_suptitle() == "12 of 26 images that were not chosen"
    captions = texts[1 : texts.index("3 kept clusters: 16 images passed over")]
    assert captions[::2] == ["photo"] * 6


def test_where_all_were_chosen_nothing_was_rejected(tmp_path: Path) -> None:
    every = torch.arange(40)
    result = sampled()
    selection = replace(result.selection, indices=every, quotas=result.cluster_sizes)
    result = replace(result, selection=selection)
    RejectedImages(4).on_fit_start(stub_trainer(tmp_path, Probed40(result)), Linear())
    assert draw_rejected(found_in(make_result()), 4) is None  # a probe from before there were any
    assert not (tmp_path / "figures").exists()
    with pytest.raises(ValueError, match="at least 1"):
        RejectedImages(0)


# --- the map ---------------------------------------------------------------------------------


def test_the_map_shows_choice_and_domains(tmp_path: Path) -> None:
    result = sampled()
    figure = draw_map(found_in(result), result.pool_sample, "pca")  # type: ignore[arg-type]
    by_choice, by_domain = figure.axes
    sizes = [len(group.get_offsets()) for group in by_choice.collections]
    assert sizes == [26, 14]
    labels = [text.get_text() for text in by_domain.get_legend().get_texts()]
    assert labels == ["sketch (20)", "photo (20): client's domain (simulation)"]
    x, y = by_choice.collections[1].get_offsets().T
    points = result.pool_sample.points[result.indices]  # type: ignore[union-attr]
    assert np.allclose(x, points[:, 0])
    assert np.allclose(y, points[:, 1])
    EmbeddingMap().on_fit_start(stub_trainer(tmp_path, Probed40(result)), Linear())
    check_picture(tmp_path / "figures" / "embedding_map.png")


def test_a_pool_without_domains_has_one_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "domains", [None] * 40)
    result = sampled(num_dims=1)
    figure = draw_map(found_in(result, None), result.pool_sample, "pca")  # type: ignore[arg-type]
    assert len(figure.axes) == 1
    assert "principal components 1 and 2" in figure.get_suptitle()


def test_umap_is_named_in_the_title() -> None:
    pytest.importorskip("umap")
    result = sampled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure = draw_map(found_in(result), result.pool_sample, "umap")  # type: ignore[arg-type]
    assert figure.get_suptitle().endswith("UMAP")
    assert np.isfinite(figure.axes[0].collections[0].get_offsets()).all()


# --- privacy and communication ---------------------------------------------------------------


def _rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "tables" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_ledger_grows_with_each_round_and_counts_none_twice(tmp_path: Path) -> None:
    logger = Recorder(tmp_path / "log")
    datamodule = Probed40(sampled(releases=RELEASES[:2]))
    trainer = stub_trainer(tmp_path, datamodule, loggers=[logger])
    ledger = PrivacyLedger(max_epsilon=2.0)
    ledger.on_fit_start(trainer, Linear())
    ledger.on_train_epoch_start(trainer, Linear())
    datamodule.probe_result = sampled(releases=RELEASES)
    trainer.global_step = 30
    ledger.on_train_epoch_start(trainer, Linear())
    ledger.on_test_start(trainer, Linear())
    expected = [epsilon_of(RELEASES[:n], 1e-5) for n in (1, 2, 3)]
    assert epsilons(RELEASES, 1e-5) == expected
    assert expected[0] < expected[1] < expected[2]
    assert logger.got == [
        (0, {"privacy/epsilon": expected[1], "privacy/num_releases": 2}),
        (30, {"privacy/epsilon": expected[2], "privacy/num_releases": 3}),
    ]
    rows = _rows(tmp_path, "privacy_releases")
    assert [row["what"] for row in rows] == ["coverage counts", "prototypes", "prototypes"]
    assert [float(row["noise multiplier"]) for row in rows] == [5.0, 5.0, 6.0]
    check_picture(tmp_path / "figures" / "privacy_ledger.png")

    # Resumed: the probe is there with its first releases, then the rounds are laid over it again.
    resumed = PrivacyLedger(max_epsilon=2.0)
    resumed.load_state_dict(ledger.state_dict())
    for releases in (RELEASES[:2], RELEASES):
        datamodule.probe_result = sampled(releases=releases)
        resumed.on_fit_start(trainer, Linear())
    assert len(logger.got) == 2


def test_bytes_are_told_by_kind_and_sum_up(tmp_path: Path) -> None:
    result = sampled(exchanges=EXCHANGES)
    assert by_kind(result) == [
        ["coverage", 1, 600, 50],
        ["prototype", 2, 200, 80],
        ["backbone", 1, 7000, 0],
    ]
    logger = Recorder(tmp_path / "log")
    trainer = stub_trainer(tmp_path, Probed40(result), loggers=[logger])
    Communication().on_fit_start(trainer, Linear())
    [(_, got)] = logger.got
    assert got["communication/prototype/bytes_down"] == 200
    down = sum(value for name, value in got.items() if name.endswith("bytes_down"))
    assert down == sum(exchange["bytes_down"] for exchange in EXCHANGES)
    assert [row["kind"] for row in _rows(tmp_path, "communication_by_kind")][-1] == "backbone"


def test_where_nothing_was_asked_nothing_is_told(tmp_path: Path) -> None:
    logger = Recorder(tmp_path / "log")
    trainer = stub_trainer(tmp_path, Probed40(make_result(asked=False)), loggers=[logger])
    for callback in (PrivacyLedger(1.0), Communication(), EmbeddingMap(), RejectedImages()):
        callback.on_fit_start(trainer, Linear())
    assert not logger.got
    assert not (tmp_path / "figures").exists()


# --- throughput ------------------------------------------------------------------------------


def test_throughput_is_logged_by_interval_without_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr("callbacks.throughput.perf_counter", lambda: now)
    logger = Recorder(tmp_path)
    trainer = stub_trainer(tmp_path, None, loggers=[logger], log_every_n_steps=2, world_size=3)
    module, callback = Linear(), Throughput()
    callback.on_train_start(trainer, module)
    callback.on_train_epoch_start(trainer, module)
    for step, seconds in enumerate([50.0, 2.0, 4.0, 4.0, 100.0, 1.0], 1):
        if seconds == 100.0:
            callback.on_validation_end(trainer, module)
        now += seconds
        trainer.global_step = step
        for half in (False, True):  # two batches a step: the second finds the step logged
            if not half or seconds == 4.0:
                callback.on_train_batch_end(trainer, module, None, torch.zeros(8, 1), 0)
    assert [(step, list(got)) for step, got in logger.got] == [
        (step, ["throughput/images_per_second"]) for step in (2, 4, 6)
    ]
    rates = [got["throughput/images_per_second"] for _, got in logger.got]
    assert rates == [8 * 3 / 2.0, pytest.approx(8 * 3 * 3 / 8.0), pytest.approx(8 * 3 * 2 / 1.0)]


# --- tests of the model ----------------------------------------------------------------------


def answers(num_images: int = 300, num_classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(num_classes, (num_images,), generator=generator)
    logits = torch.randn(num_images, num_classes, generator=generator)
    logits[torch.arange(num_images), classes] += 1.2
    classes[::17] = -1  # left out
    return logits, classes


class Answering(Linear):
    """Answers with what ``answers`` gives, in batches."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SimpleNamespace(classes=["cat", "$dog$", "猫", "a class with a long name"])

    def test_step(self, batch: Any, batch_idx: int) -> Any:
        logits, classes = answers()
        rows = slice(25 * batch_idx, 25 * batch_idx + 25)
        return {"logits": logits[rows], "classes": classes[rows]}


def test_a_test_leaves_matrix_table_and_calibration(tmp_path: Path) -> None:
    logger = Recorder(tmp_path / "log")
    trainer = make_trainer(tmp_path, [ConfusionMatrix(), Calibration()], logger=logger)
    for _ in range(2):  # a second test begins anew
        trainer.test(Answering(), Probed40(None), verbose=False)
    logits, classes = answers()
    counted = classes >= 0
    got = {name: value for _, row in logger.got for name, value in row.items()}
    expected = multiclass_calibration_error(
        logits.softmax(dim=1)[counted], classes[counted], num_classes=4, n_bins=NUM_BINS
    )
    assert got["simulation/calibration_error"] == pytest.approx(float(expected), abs=1e-6)
    right = (logits.argmax(dim=1) == classes)[counted]
    shares = [float(right[classes[counted] == k].float().mean()) for k in range(4)]
    assert got["simulation/mean_class_accuracy"] == pytest.approx(sum(shares) / 4, abs=1e-5)
    assert got["simulation/worst_class_accuracy"] == pytest.approx(min(shares), abs=1e-5)
    rows = _rows(tmp_path, "simulation_classes")
    assert [float(row["accuracy"]) for row in rows] == pytest.approx(shares, abs=1e-5)
    assert sum(int(row["test images"]) for row in rows) == int(counted.sum())
    for name in ("confusion_matrix", "calibration"):
        check_picture(tmp_path / "figures" / f"{name}.png")


def test_class_rows_agree_with_scikit_learn() -> None:
    logits, classes = answers()
    counted = classes >= 0
    matrix = torch.from_numpy(confusion_matrix(classes[counted], logits.argmax(dim=1)[counted]))
    matrix[2] = 0  # a class without test images
    matrix[:, 3] = 0  # one that is never predicted
    rows = class_rows(matrix, ["a", "b", "c", "d"])
    assert rows[2][1:3] == [0, None]
    assert rows[2][4] is None
    assert rows[3][2:4] == [0.0, None]
    assert rows[0][2] == pytest.approx(int(matrix[0, 0]) / int(matrix[0].sum()), abs=1e-6)
    worst = int(torch.tensor([matrix[0, 1], matrix[0, 2], matrix[0, 3]]).argmax()) + 1
    assert rows[0][4] == "abcd"[worst]
    draw_confusion(torch.eye(100, dtype=torch.int64), [f"class {n}" for n in range(100)])


def test_bins_give_the_error_that_torchmetrics_gives() -> None:
    logits, classes = answers(2000)
    bins = ReliabilityBins()
    for rows in torch.arange(2000).split(300):
        bins.update(logits[rows].softmax(dim=1), classes[rows])
    counts, right, confidence = bins.compute()
    assert int(counts.sum()) == int((classes >= 0).sum())
    error = float((right - confidence).abs().sum() / counts.sum())
    expected = multiclass_calibration_error(
        logits.softmax(dim=1), classes, num_classes=4, n_bins=NUM_BINS, ignore_index=-1
    )
    assert error == pytest.approx(float(expected), abs=1e-5)
    edge = ReliabilityBins()
    edge.update(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert edge.compute()[:, -1].tolist() == [1.0, 0.0, 1.0]
    assert "points above its accuracy" in draw_calibration(edge.compute(), 1.0).get_suptitle()


def test_modules_that_tell_nothing_are_left_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [ConfusionMatrix(), Calibration()])
    trainer.test(Linear(), Probed40(None), verbose=False)
    assert not list(tmp_path.iterdir())


# --- the rest --------------------------------------------------------------------------------


def test_a_table_is_kept_as_a_file(tmp_path: Path) -> None:
    rows = [["a,b", None, 0.5], ["ü\n", 2, 1.0]]
    log_table(stub_trainer(tmp_path, None), "some/table", ["name", "n", "share"], rows)
    with (tmp_path / "tables" / "some_table.csv").open(newline="", encoding="utf-8") as file:
        read = list(csv.reader(file))
    assert read == [["name", "n", "share"], ["a,b", "", "0.5"], ["ü\n", "2", "1.0"]]


def test_a_model_of_an_earlier_run_is_known_by_that_run(tmp_path: Path) -> None:
    file = tmp_path / "earlier" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    facts = _known_model(file)
    assert facts["file"] == "earlier/model.safetensors"  # no path of this machine
    assert "artifact" not in facts
    write_json(file.parent / "summary.json", {"run_id": "first"})
    assert _known_model(file)["artifact"] == "model-first:latest"
    assert len(facts["sha256"]) == 64


def test_drawing_does_not_count_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("callbacks.run_timer.perf_counter", lambda: now)
    timer = RunTimer()
    trainer: Any = SimpleNamespace(is_global_zero=False)
    timer.on_fit_start(trainer, Linear())
    now += 5.0
    timer.on_train_end(trainer, Linear())
    now += 30.0  # others draw
    timer.on_fit_end(trainer, Linear())
    assert timer.fit_seconds == 5.0
