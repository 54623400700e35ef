"""All measures of a proxy set on a small real pool, against other libraries; then the callback."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from scipy.spatial.distance import cdist

import callbacks.proxy_quality as proxy_quality
from callbacks.proxy_quality import ProxyQuality, read_quality
from datamodules.folder import folder_data, remote_client_data
from datamodules.proxy import ProxySamplingDataModule, TrainingView
from ecos_pl.embedding_bank import EmbeddingBank
from ecos_pl.encoder import Encoder, EncoderSpec
from ecos_pl.images import to_tensor
from ecos_pl.labeling import PublicLabeler
from ecos_pl.pool_embeddings import pool_embeddings
from ecos_pl.probe import ProbePlan
from ecos_pl.quality import client_images, measure
from ecos_pl.quality.client_images import client_embeddings
from ecos_pl.quality.measure import PUBLIC, SIMULATED, ProxyMeasures, Truth, composition

SPEC = EncoderSpec("mobilenetv3_small_050", "random", 32)
PLAN = ProbePlan(
    encoder=SPEC,
    num_clusters=8,
    num_dims=8,
    size=60,
    duplicate_distance=0.0,
    noise_std=1.0,
    max_epsilon=9.0,
)
IDS = [f"{number}" for number in range(6)]


class Pool:
    """Six images of which a benchmark knows classes and domains."""

    name, fingerprint, ids = "pool", "00", IDS
    labels = ("cat", "cat", "dog", "cow", None, "cat")
    domains = ("photo", "sketch", "photo", "photo", None, "sketch")

    def __len__(self):
        return 6

    def read(self, index):
        raise AssertionError(f"image {index} need not be read")


@pytest.fixture
def scenario(image_tree):
    return folder_data(image_tree / "pool", image_tree / "client", client_domain="bars")


@pytest.fixture(scope="module")
def probed_once(image_tree, tmp_path_factory):
    """A folder whose cache holds a probe, but nothing measured yet."""
    folder = tmp_path_factory.mktemp("probed")
    probe(folder_data(image_tree / "pool", image_tree / "client", client_domain="bars"), folder)
    return folder


@pytest.fixture
def datamodule(scenario, probed_once, tmp_path):
    shutil.copytree(probed_once / "cache", tmp_path / "cache")
    found = probe(scenario, tmp_path)
    assert found.probe_result.from_disk
    return found


def probe(scenario, tmp_path, plan=PLAN, seed=1):
    view = TrainingView(image_size=24, batch_size=8)
    made = ProxySamplingDataModule(
        scenario,
        plan,
        PublicLabeler(scenario.classes),
        view,
        run_root=tmp_path,
        embed_workers=0,
        seed=seed,
    )
    made.setup("fit")
    return made


class Recorder(CSVLogger):
    def __init__(self, folder):
        super().__init__(folder, name="csv")
        self.got = []

    def log_metrics(self, metrics, step=None):
        self.got.append((step, dict(metrics)))


def set_up(datamodule, logger, callback=None, **facts):
    """Call the hook as Lightning does before training."""
    trainer = SimpleNamespace(
        datamodule=datamodule,
        is_global_zero=True,
        fast_dev_run=False,
        loggers=[logger],
        global_step=7,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        default_root_dir=Path(logger.save_dir) / "run",
    )
    vars(trainer).update(facts)
    (callback or ProxyQuality()).on_fit_start(trainer, L.LightningModule())


# --- what is measured ------------------------------------------------------------------------


def test_measures_are_those_of_scipy_on_a_real_probe(datamodule, scenario, monkeypatch):
    monkeypatch.setattr(measure, "CHUNK_ROWS", 16)
    bank, compressed = datamodule.pool_on_disk()
    client = client_embeddings(scenario.client_test, SPEC, seed=1)
    near = float(torch.cdist(client, client).median()) / 2
    measures = ProxyMeasures(bank, compressed, near, seed=1)
    truth = Truth(scenario.pool, scenario.classes, "bars", client)
    chosen = datamodule.probe_result.indices.numpy()
    public, simulated = measures.against_random(chosen, truth)
    assert tuple(public) == PUBLIC
    assert tuple(simulated) == SIMULATED

    readable = np.setdiff1d(np.arange(261), bank.unreadable())
    full, projected = bank[np.arange(261)].astype(float), compressed.projected[np.arange(261)]
    low = compressed.projection(client).double().numpy()
    for which, rows in (("proxy_set", chosen), ("random", measures.random_set(60))):
        assert len(set(rows.tolist()) & set(readable.tolist())) == 60
        to_pool = cdist(projected[readable], projected[rows]).min(axis=1)
        both = np.concatenate([projected[rows].astype(float), low])
        among = cdist(full[rows], full[rows]) + 9 * np.eye(60)
        clusters = compressed.assignments[rows]
        expected = {
            "pool_distance": to_pool.mean(),
            "pool_radius": to_pool.max(),
            "cluster_coverage": len(set(clusters.tolist())) / 8,
            "near_duplicate_rate": (among.min(axis=1) <= near).mean(),
            "client_distance": cdist(client, full[rows]).min(axis=1).mean(),
            "joint_radius": cdist(projected[readable], both).min(axis=1).max(),
            "purity": np.mean([scenario.pool.domains[row] == "bars" for row in rows]),
        }
        for name, value in expected.items():
            found = (public | simulated)[name][which]
            assert found == pytest.approx(value, rel=1e-4, abs=1e-6), (name, which)
    assert 0 < public["near_duplicate_rate"]["random"] < 1


def test_the_probe_beats_the_random_set(datamodule):
    set_up(datamodule, Recorder(datamodule.run_root))
    found = read_quality(datamodule)["simulation"]
    for name, sign in (("purity", 1), ("client_distance", -1), ("kernel_distance", -1)):
        assert sign * found[name]["proxy_set"] > sign * found[name]["random"], name


def test_the_random_set_depends_on_the_seed_alone(datamodule):
    bank, compressed = datamodule.pool_on_disk()
    drawn = [ProxyMeasures(bank, compressed, 0, seed).random_set(60) for seed in (1, 1, 2)]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert (np.diff(drawn[0]) > 0).all()
    strategy = torch.randperm(260, generator=torch.Generator().manual_seed(1))[:60]
    assert set(strategy.tolist()) != set(drawn[0].tolist())


def test_large_sets_are_measured_on_samples(datamodule, scenario, monkeypatch):
    monkeypatch.setattr(measure, "MAX_SET_IMAGES", 40)
    monkeypatch.setattr(measure, "MAX_POOL_IMAGES", 100)
    monkeypatch.setattr(measure, "MIN_DUPLICATE_IMAGES", 30)
    monkeypatch.setattr(measure, "DUPLICATE_DISTANCES", 1)
    bank, compressed = datamodule.pool_on_disk()
    client = client_embeddings(scenario.client_test, SPEC, seed=1)
    truth = Truth(scenario.pool, scenario.classes, "bars", client)
    measures = ProxyMeasures(bank, compressed, 0.05, seed=1)
    assert len(measures._pool_sample(60)) == 100
    public, simulated = measures.against_random(datamodule.probe_result.indices.numpy(), truth)
    rate = public["near_duplicate_rate"]["random"]
    assert rate * 30 == pytest.approx(round(rate * 30), abs=1e-4)
    assert 0 <= simulated["precision"]["proxy_set"] <= 1
    assert simulated["precision"]["proxy_set"] * 40 == pytest.approx(
        round(simulated["precision"]["proxy_set"] * 40), abs=1e-4
    )


def test_composition_of_a_set_that_is_known():
    truth = Truth(Pool(), ["cat", "dog"], "photo", None)
    values = composition(truth, np.array([0, 1, 2, 3]))
    entropy = -(2 / 3 * np.log2(2 / 3) + 1 / 3 * np.log2(1 / 3))
    assert values == pytest.approx(
        {
            "purity": 0.75,
            "class_share": 0.75,
            "class_coverage": 1.0,
            "class_coverage_10": 1.0,
            "class_entropy": entropy,
        },
        rel=1e-5,
    )
    only_cats = composition(truth, np.array([0, 1, 5] * 20))  # each class should have 3 of 60
    assert only_cats["class_coverage"] == only_cats["class_coverage_10"] == 0.5
    few_dogs = composition(truth, np.array([0, 1, 5] * 20 + [2, 2]))
    assert (few_dogs["class_coverage"], few_dogs["class_coverage_10"]) == (1.0, 0.5)


def test_what_the_pool_does_not_know_is_none():
    values = composition(Truth(Pool(), ["cat"], None, None), np.array([4]))
    assert set(values.values()) == {None}
    known = composition(Truth(Pool(), ["bird"], None, None), np.array([0, 4]))
    assert known["class_share"] == known["class_coverage"] == 0
    assert known["class_entropy"] is None


def test_a_client_of_few_test_images_has_distances_but_no_manifold(datamodule, scenario):
    client = client_embeddings(scenario.client_test, SPEC, seed=1)[:4]
    bank, compressed = datamodule.pool_on_disk()
    truth = Truth(scenario.pool, scenario.classes, None, client)
    chosen = datamodule.probe_result.indices.numpy()
    _, simulated = ProxyMeasures(bank, compressed, 0, 1).against_random(chosen, truth)
    assert simulated["client_distance"]["random"] > 0
    for name in ("purity", "kernel_distance", "precision"):
        assert simulated[name] == {"proxy_set": None, "random": None}


def test_test_images_are_embedded_as_the_pool_is(scenario, image_tree, monkeypatch):
    (image_tree / "client/test/vertical/secret-zzz.png").write_bytes(b"damaged")
    try:
        scenario = folder_data(image_tree / "pool", image_tree / "client")
        found = client_embeddings(scenario.client_test, SPEC, seed=1)
    finally:
        (image_tree / "client/test/vertical/secret-zzz.png").unlink()
    test = folder_data(image_tree / "pool", image_tree / "client").client_test
    pixels = torch.stack([to_tensor(test.read(row), 32) for row in range(30)])
    assert torch.allclose(found, Encoder(SPEC)(pixels), atol=1e-3)
    monkeypatch.setattr(client_images, "MAX_CLIENT_IMAGES", 10)
    sample = client_embeddings(test, SPEC, seed=1)
    assert sample.shape == (10, found.shape[1])
    assert torch.cdist(sample, found).min(dim=1).values.max() < 1e-2


# --- the callback ----------------------------------------------------------------------------


def test_loggers_get_both_groups_once_for_each_probe(datamodule, tmp_path):
    logger, callback = Recorder(tmp_path), ProxyQuality()
    for _ in range(2):
        set_up(datamodule, logger, callback)
    [(step, got)] = logger.got
    assert step == 7
    quality = read_quality(datamodule)
    for group, prefix in (("quality", "quality"), ("simulation", "simulation/quality")):
        for name, values in quality[group].items():
            assert got.get(f"{prefix}/{name}") == values["proxy_set"]
            assert got.get(f"{prefix}/random/{name}") == values["random"]
    assert quality["quality"]["near_duplicate_rate"]["random"] is None  # the plan names no distance
    assert "quality/near_duplicate_rate" not in got


def test_wandb_gets_tables_of_both(datamodule, tmp_path, monkeypatch):
    for folder in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(folder, str(tmp_path / "wandb_home"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = WandbLogger(mode="offline", save_dir=tmp_path, project="test")
    try:
        set_up(datamodule, logger)
        summary = dict(logger.experiment.summary)
    finally:
        wandb.finish()
    quality = read_quality(datamodule)
    assert summary["quality/pool_radius"] == quality["quality"]["pool_radius"]["proxy_set"]
    media = next(tmp_path.glob("wandb/offline-run-*/files/media"))
    tables = [json.loads(path.read_text()) for path in media.rglob("*.json")]
    assert {tuple(table["columns"]) for table in tables} == {("metric", "proxy set", "random")}
    found = {row[0]: row[1:] for table in tables for row in table["data"]}
    expected = {**quality["quality"], **quality["simulation"]}
    assert found == {name: [*values.values()] for name, values in expected.items()}


def test_another_process_reads_what_was_measured(datamodule, scenario, tmp_path, monkeypatch):
    first, again = Recorder(tmp_path), Recorder(tmp_path)
    set_up(datamodule, first)
    with monkeypatch.context() as patch:
        patch.setattr(proxy_quality, "_measure", lambda *_: pytest.fail("measured twice"))
        set_up(probe(scenario, tmp_path), again)
    assert again.got == first.got
    set_up(probe(scenario, tmp_path, seed=2), again)  # another random set
    assert again.got[1] != again.got[0]


def test_the_training_draws_the_same_numbers_with_and_without(datamodule, tmp_path):
    torch.manual_seed(3)
    state, other = torch.get_rng_state(), random.getstate()
    set_up(datamodule, Recorder(tmp_path))
    assert read_quality(datamodule)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == other


def test_nothing_of_the_clients_images_is_written(datamodule, scenario, tmp_path):
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    set_up(datamodule, Recorder(tmp_path))
    new = {path for path in tmp_path.rglob("*") if path.is_file()} - files
    places = {path.parent.relative_to(tmp_path).as_posix() for path in new}
    assert places == {"cache/quality", "run/tables"}
    for path in new:
        text = path.read_text()
        assert "secret" not in text
        assert len(text) < 4000


@pytest.mark.parametrize("facts", [{"is_global_zero": False}, {"fast_dev_run": 1}])
def test_other_ranks_and_dry_runs_measure_nothing(datamodule, tmp_path, facts):
    logger = Recorder(tmp_path)
    set_up(datamodule, logger, **facts)
    assert not logger.got
    assert read_quality(datamodule) == {}


def test_without_a_probe_there_is_no_quality(tmp_path):
    logger = Recorder(tmp_path)
    set_up(SimpleNamespace(probe_result=None), logger)
    set_up(None, logger)
    assert not logger.got
    assert read_quality(SimpleNamespace(probe_result=None)) == {}


def test_of_a_client_elsewhere_only_the_public_measures_are_known(
    datamodule, scenario, image_tree, tmp_path
):
    datamodule.scenario = remote_client_data(image_tree / "pool", scenario.classes, "bars")
    logger = Recorder(tmp_path)
    set_up(datamodule, logger)
    assert logger.got[0][1]["quality/cluster_entropy"] > 0
    assert not any(name.startswith("simulation") for name in logger.got[0][1])
    simulated = read_quality(datamodule)["simulation"]
    assert simulated == {name: {"proxy_set": None, "random": None} for name in SIMULATED}


def test_an_emptied_cache_is_a_warning_and_the_run_goes_on(datamodule, tmp_path, caplog):
    chunk = next((tmp_path / "cache" / "embeddings").rglob("rows_*.npy"))
    chunk.unlink()
    logger = Recorder(tmp_path)
    set_up(datamodule, logger)
    assert "embeddings are gone from the cache" in caplog.text
    assert not logger.got
    assert read_quality(datamodule) == {}


def test_a_finished_bank_opens_without_its_encoder(datamodule, scenario, tmp_path):
    found = pool_embeddings(scenario.pool, SPEC, tmp_path / "cache")
    assert found.key == datamodule.pool_on_disk()[0].key
    assert found.shape == (261, Encoder(SPEC).num_dims)
    assert len(found.unreadable()) == 1
    assert pool_embeddings(scenario.pool, replace(SPEC, image_size=64), tmp_path / "cache") is None
    assert EmbeddingBank.finished(tmp_path / "nowhere") is None
