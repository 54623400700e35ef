"""Labels in rounds: through train.py on small images, stopped and broken off at every point."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch
from job_processes import nursery_in
from safetensors import safe_open
from test_jobs import PROBE, delivered, summary

import train
from ecos_pl.accounting import epsilon_of
from ecos_pl.client import Client
from ecos_pl.config_checks import check_rounds
from ecos_pl.config_files import load_config
from ecos_pl.coverage import coverage_release
from ecos_pl.images import scan_folder
from ecos_pl.label_rounds import LabelRound, share_changed
from ecos_pl.labeling import RoundPlan
from ecos_pl.ledger import Ledger
from ecos_pl.messages import MessageError
from ecos_pl.overrides import ConfigError
from ecos_pl.probe_result import ProbeResult
from ecos_pl.prototype_labeler import PrototypeLabeler
from ecos_pl.proxy_set import ProxySet

ROUNDS = [*PROBE, "labels.rounds=[1]", "labels.round_num_dims=4", "trainer.max_epochs=2"]
DELTA = 1e-5


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ledger(tmp_path, image_tree):
    """Opens the ledger of the only client that the runs of a test have had."""

    def opened() -> Ledger:
        (path,) = (tmp_path / "clients").rglob("ledger.sqlite")
        client = scan_folder(image_tree / "client" / "train").fingerprint
        return Ledger.open(path, client_id=client[:32])

    return opened


def test_a_round_relabels_and_is_paid_for(job, tmp_path, ledger):
    status, _, err = job("run", base=ROUNDS)
    assert (status, err) == (0, "")
    folder, found = tmp_path / "run", summary(tmp_path / "run")
    (one,) = found["rounds"]
    assert one["epoch"] == 1
    assert 0 <= one["changed"] <= 1
    assert 0 <= one["label_accuracy"] <= 1
    # The backbone travels to the client, and its bytes are counted.
    backbone = folder / "rounds/round1/backbone.safetensors"
    assert one["bytes_down"] > backbone.stat().st_size
    assert found["communication"]["round_trips"] == 3
    assert found["communication"]["bytes_down"] > one["bytes_down"]
    # ε is that of all three releases, as the client's own ledger says.
    assert len(ledger().entries()) == 3
    assert ledger().epsilon(DELTA) == pytest.approx(found["privacy"]["epsilon"], abs=1e-9)
    assert 5.8 < found["privacy"]["epsilon"] <= 6
    assert found["privacy"]["spent_by_this_run"] == found["privacy"]["epsilon"]
    # What the run leaves are the labels of the last round.
    labels = LabelRound.load(folder / "rounds/round1/labels.safetensors")
    assert torch.equal(ProxySet.load(folder).targets, labels.targets)

    status, seen, _ = job("run", base=ROUNDS)
    again = summary(folder)
    assert (status, seen) == (0, [])
    assert again["privacy"] == {**found["privacy"], "spent_by_this_run": 0}
    assert again["rounds"] == found["rounds"]
    assert again["communication"] == found["communication"]
    assert again["simulation"] == found["simulation"]
    assert torch.equal(ProxySet.load(folder).targets, labels.targets)


def test_the_backbone_is_the_averaged_one_without_its_head(job, tmp_path):
    job("run", base=ROUNDS, stop_at=[3])  # in the first batch after the round
    path = tmp_path / "run/rounds/round1/backbone.safetensors"
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    with safe_open(path, "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert not any(name.startswith("classifier") for name in state)
    averaged = checkpoint["state_dict"]
    assert all(
        torch.equal(tensor, averaged[f"model.net.{name}"].to(tensor.dtype))
        for name, tensor in state.items()
    )


@pytest.mark.parametrize("stops", [[1], [2], [3], [4], [2, 0, 0]])
def test_a_training_stopped_around_a_round_goes_on_as_if_it_had_not(job, tmp_path, stops, ledger):
    """In the epoch before, in its last batch, in the first batch after the round, later."""
    other = [f"run_root={tmp_path / 'other'}", f"probe.cache_dir={tmp_path / 'cache'}"]
    _, wanted, _ = job("run", base=ROUNDS)
    seen = []
    for stop in stops:
        status, part, _ = job("run", *other, base=ROUNDS, stop_at=[stop])
        assert status == 143
        seen += part
    status, part, err = job("run", *other, base=ROUNDS)
    assert (status, err) == (0, "")
    assert seen + part == wanted
    folders = tmp_path / "run", tmp_path / "other" / "run"
    assert delivered(folders[0]) == delivered(folders[1])
    assert summary(folders[0])["simulation"] == summary(folders[1])["simulation"]
    # The same questions: the answers of the first run were found in the cache.
    assert not (tmp_path / "other" / "clients").exists()
    assert len(ledger().entries()) == 3


def test_a_run_is_prolonged_without_another_question(job, tmp_path, ledger):
    job("run", base=ROUNDS)
    status, seen, err = job("run", "trainer.max_epochs=3", base=ROUNDS)
    assert (status, err) == (0, "")
    assert {epoch for epoch, _, _ in seen} == {2}
    assert len(summary(tmp_path / "run")["rounds"]) == 1
    assert len(ledger().entries()) == 3


@pytest.mark.parametrize(
    ("owner", "name", "num_released"),
    [
        (Client, "adopt", 2),  # the backbone is on its way
        (Client, "give", 2),  # the query has come
        (LabelRound, "save", 3),  # answered, but not written down
    ],
)
def test_a_round_broken_off_spends_nothing_twice(
    job, tmp_path, monkeypatch, ledger, owner, name, num_released
):
    calls = []

    def broken(self, *arguments):
        calls.append(self)
        # Client.give answers the counts and the first labels, too.
        if len(calls) <= (2 if name == "give" else 0):
            return original(self, *arguments)
        raise KeyboardInterrupt

    original = getattr(owner, name)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, broken)
        try:
            status, _, _ = job("run", base=ROUNDS)
        finally:
            signal.signal(signal.SIGINT, handler)
    assert status == 130
    assert len(ledger().entries()) == num_released
    backbone = (tmp_path / "run/rounds/round1/backbone.safetensors").read_bytes()
    status, _, err = job("run", base=ROUNDS)
    assert (status, err) == (0, "")
    assert len(ledger().entries()) == 3
    assert (tmp_path / "run/rounds/round1/backbone.safetensors").read_bytes() == backbone
    assert summary(tmp_path / "run")["privacy"]["epsilon"] <= 6


@pytest.mark.slow
def test_two_processes_do_one_round_together(data, tmp_path, ledger):
    argv = [*ROUNDS, *data, f"run_root={tmp_path}", "run_id=run", "task.batch_size=8"]
    argv += ["trainer.strategy=ddp", "trainer.devices=2"]
    with nursery_in(tmp_path) as nursery:
        jobs = nursery.ranks(argv, 2)
        assert [one.wait() for one in jobs] == [0, 0], [one.text() for one in jobs]
    found = summary(tmp_path / "run")
    assert len(found["rounds"]) == 1
    assert len(ledger().entries()) == 3
    labels = LabelRound.load(tmp_path / "run/rounds/round1/labels.safetensors")
    assert torch.equal(ProxySet.load(tmp_path / "run").targets, labels.targets)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["labels.rounds=[2]"], "not over before the training is"),
        (["labels.rounds=[2,1]"], "a list of epochs above 0, ascending"),
        (["labels.rounds=[0]"], "a list of epochs above 0, ascending"),
        (["labels.rounds=[a]"], "must be a list of whole numbers"),
        (["task.backbone=mobilenetv3_small_050"], "task.backbone must be it"),
        (["trainer.strategy=fsdp"], "leave out labels.rounds"),
        (["train_on=client"], "goes with task=self_labeling on the proxy set"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(job, overrides, words):
    status, _, err = job("run", *overrides, base=ROUNDS)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("task", ["distillation", "compression"])
def test_rounds_are_for_self_labelling(task):
    argv = ["labels.rounds=[1]", f"task={task}"]
    config = load_config([*argv, "task.teacher=model.safetensors"], config_dir=train.CONFIG_DIR)
    with pytest.raises(ConfigError, match="goes with task=self_labeling on the proxy set"):
        check_rounds(config)


@pytest.mark.parametrize("epochs", [(3,), (2, 4, 6)])
def test_all_releases_are_equally_noisy_and_fit_together(epochs):
    counts = coverage_release(5.0, 1.0)
    labeler = PrototypeLabeler(["a", "b"], rounds=RoundPlan(epochs))
    plan = labeler.plan([counts], max_epsilon=1.5, delta=DELTA, sample_rate=1.0)
    assert len(plan) == 1 + len(epochs)
    assert len(set(plan)) == 1
    assert 1.49 < epsilon_of([counts, *plan], DELTA) <= 1.5
    # Gaussians compose like one of less noise: k releases need √k times the noise of one.
    (one,) = PrototypeLabeler(["a", "b"]).plan(
        [counts], max_epsilon=1.5, delta=DELTA, sample_rate=1.0
    )
    ratio = plan[0].noise_multiplier / one.noise_multiplier
    assert ratio == pytest.approx(len(plan) ** 0.5, rel=2e-3)


def a_round(**changes):
    targets = torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    counts = coverage_release(5.0, 1.0)
    traffic = {"bytes_down": 7, "bytes_up": 5, "round_trips": 1}
    return replace(LabelRound(1, targets, torch.ones(2), [counts], 1, traffic, 0.5), **changes)


def test_a_round_survives_the_disk(tmp_path):
    path = tmp_path / "labels.safetensors"
    a_round().save(path)
    back = LabelRound.load(path)
    assert torch.equal(back.targets, a_round().targets)
    assert back.from_disk
    assert (back.releases, back.traffic) == (a_round().releases, a_round().traffic)
    whole = path.read_bytes()
    for content in (b"", whole[:-3], whole[: len(whole) // 2], b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a round of labels") as caught:
            LabelRound.load(path)
        assert "\n" not in str(caught.value)


def test_a_round_for_another_unit_is_refused(tmp_path, job):
    job("run", "labels.rounds=[]", base=ROUNDS)
    (folder,) = (tmp_path / "cache/probes").iterdir()
    fingerprint = json.loads((folder / "probe.json").read_text())["fingerprint"]
    result = ProbeResult.load(folder, fingerprint, from_disk=True)
    with pytest.raises(MessageError, match="different units"):
        result.with_round(a_round(max_per_unit=3))


def test_the_share_of_changed_labels():
    old = torch.eye(4)
    assert share_changed(old, old) == 0
    assert share_changed(old, old.flip(0)) == 1
