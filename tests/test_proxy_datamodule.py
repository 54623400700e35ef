import pickle

import lightning as L
import pytest
import torch

from datamodules.folder import folder_data
from datamodules.local import LocalDataModule
from datamodules.proxy import ProxySamplingDataModule, TrainingView
from datamodules.views import make_view
from ecos_pl.encoder import EncoderSpec
from ecos_pl.labeling import PublicLabeler
from ecos_pl.probe import ProbePlan

PLAN = ProbePlan(
    encoder=EncoderSpec("mobilenetv3_small_050", "random", 32),
    num_clusters=8,
    num_dims=8,
    size=60,
    duplicate_distance=0.0,
    noise_std=1.0,
    max_epsilon=9.0,
)


@pytest.fixture
def scenario(image_tree):
    return folder_data(image_tree / "pool", image_tree / "client", client_domain="bars")


def make(scenario, tmp_path, **view):
    view = TrainingView(image_size=24, batch_size=8, **view)
    labeler = PublicLabeler(scenario.classes)
    return ProxySamplingDataModule(
        scenario, PLAN, labeler, view, run_root=tmp_path, embed_workers=0
    )


def test_setup_runs_the_probe_once_for_all_stages(scenario, tmp_path):
    datamodule = make(scenario, tmp_path)
    state = torch.get_rng_state()
    datamodule.setup("fit")
    assert torch.equal(state, torch.get_rng_state())
    result = datamodule.probe_result
    datamodule.setup("test")
    assert datamodule.probe_result is result
    again = make(scenario, tmp_path)
    again.setup("test")
    assert again.probe_result.from_disk
    assert again.simulation == datamodule.simulation
    assert datamodule.simulation["random_purity"] == pytest.approx(100 / 261)


def test_a_process_that_is_started_afresh_gets_what_was_found(scenario, tmp_path):
    datamodule = make(scenario, tmp_path)
    datamodule.setup("fit")
    there = pickle.loads(pickle.dumps(datamodule))
    assert torch.equal(there.probe_result.indices, datamodule.probe_result.indices)
    ours, theirs = (next(iter(one.train_dataloader()))[1] for one in (datamodule, there))
    assert torch.equal(ours, theirs)


def test_held_out_and_training_images_are_disjoint_and_all_labelled(scenario, tmp_path):
    datamodule = make(scenario, tmp_path, val_fraction=0.25)
    datamodule.setup("fit")
    result = datamodule.probe_result
    train_rows, held_out = datamodule._split(result)
    labelled = int((result.proxy_set.weights > 0).sum())
    assert len(train_rows) + len(held_out) == labelled
    assert len(held_out) == labelled // 4
    assert not set(train_rows.tolist()) & set(held_out.tolist())
    images, targets, weights = next(iter(datamodule.train_dataloader()))
    assert images.shape == (8, 3, 24, 24)
    assert images.dtype == torch.uint8
    assert torch.allclose(targets.sum(1), torch.ones(8))
    assert bool((weights > 0).all())
    assert sum(len(batch[0]) for batch in datamodule.val_dataloader()) == len(held_out)
    assert sum(len(batch[0]) for batch in datamodule.test_dataloader()) == 30


def test_unlabelled_batches_come_from_kept_clusters_in_two_views(scenario, tmp_path):
    datamodule = make(scenario, tmp_path, unlabeled_ratio=2)
    datamodule.setup("fit")
    result = datamodule.probe_result
    kept = set(torch.nonzero(result.selection.kept).flatten().tolist())
    assert kept
    assert len(result.unlabeled) > 0
    loader = datamodule.train_dataloader()
    batch, _, _ = next(iter(loader))
    weak, strong, rows = batch["unlabelled"]
    assert len(rows.unique()) == 16
    assert len(batch["labelled"][0]) == 8
    assert weak.shape == strong.shape == (16, 3, 24, 24)
    assert not torch.equal(weak, strong)


def test_class_shares_are_those_of_the_labels_trained_on(scenario, tmp_path):
    datamodule = make(scenario, tmp_path)
    datamodule.setup("fit")
    classes = [
        int(target.argmax()) for batch in datamodule.train_dataloader() for target in batch[1]
    ]
    rows, _ = datamodule._split(datamodule.probe_result)
    assert len(rows) - 8 < len(classes) <= len(rows)  # what is left over waits
    counts = [0, 0]
    for row in rows.tolist():
        counts[int(datamodule.probe_result.proxy_set.targets[row].argmax())] += 1
    assert datamodule.class_shares.tolist() == pytest.approx([c / len(rows) for c in counts])
    local = LocalDataModule(scenario, TrainingView(image_size=24, batch_size=8))
    assert local.class_shares.tolist() == [0.5, 0.5]


def test_an_image_that_vanished_weighs_nothing(image_tree, tmp_path):
    import shutil

    shutil.copytree(image_tree, tmp_path / "tree")
    scenario = folder_data(tmp_path / "tree/pool", tmp_path / "tree/client")
    datamodule = make(scenario, tmp_path)
    datamodule.setup("fit")
    victim = scenario.pool.ids[int(datamodule.probe_result.indices[0])]
    (tmp_path / "tree" / "pool" / victim).unlink()
    rows = torch.tensor([0])
    _, _, weight = datamodule._labelled(datamodule.probe_result, rows, "none")[0]
    assert float(weight) == 0


def test_loaders_before_setup_say_what_to_do(scenario, tmp_path):
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        make(scenario, tmp_path).train_dataloader()


def test_the_local_baseline_serves_the_clients_images(scenario):
    datamodule = LocalDataModule(scenario, TrainingView(image_size=24, batch_size=8))
    batches = list(datamodule.train_dataloader())
    assert sum(len(batch[0]) for batch in batches) == 120
    assert isinstance(datamodule, L.LightningDataModule)
    assert datamodule.probe_result is None


def test_views_are_drawn_per_image_and_keep_the_shape():
    torch.manual_seed(0)
    image = torch.arange(3 * 32 * 32).reshape(3, 32, 32).remainder(251).to(torch.uint8)
    assert make_view("none", 32)(image) is image
    names = ("crop", "crop_flip", "affine", "affine_flip")
    views = [make_view(name, 32) for name in names] + [make_view("affine", 32, strong=True)]
    for view in views:
        drawn = [view(image) for _ in range(12)]
        assert all(one.shape == image.shape and one.dtype == torch.uint8 for one in drawn)
        assert len({one.numpy().tobytes() for one in drawn}) > 3


def test_crop_never_mirrors():
    torch.manual_seed(0)
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, 8:14] = 200  # left of the middle
    view = make_view("crop", 32)
    assert all(view(image)[:, :, :16].sum() > view(image)[:, :, 20:].sum() for _ in range(20))
