"""client.domain, .size, … through train.py: another client is never answered for by the first."""

from __future__ import annotations

import json

import pytest
import yaml

import train
from tests.digit_fixtures import make_digits5
from tests.test_train import SMALL

FEW = ["probe.num_clusters=5", "selection.size=40", "labels.num_dims=6", "labels.num_views=2"]


@pytest.fixture
def run(tmp_path, capsys):
    def call(run_id, *overrides):
        argv = [*SMALL, *FEW, "trainer.max_epochs=1", f"run_root={tmp_path}/runs"]
        status = train.main([*argv, f"run_id={run_id}", *overrides])
        path = tmp_path / "runs" / run_id / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else None
        return status, summary, capsys.readouterr().err

    return call


@pytest.mark.slow
def test_another_client_is_asked_anew_and_the_same_one_is_not(run, data, tmp_path):
    _, first, err = run("a", *data, "client.size=30")
    assert first is not None, err
    _, other, _ = run("b", *data, "client.size=40")
    _, seeded, _ = run("c", *data, "client.size=30", "client.seed=1")
    _, again, _ = run("d", *data, "client.size=30")
    runs = (first, other, seeded)
    assert len({one["proxy"]["fingerprint"] for one in runs}) == 3
    assert all(one["privacy"]["spent_by_this_run"] > 0 for one in runs)
    assert len(list((tmp_path / "runs" / "clients").iterdir())) == 3
    assert again["proxy"]["from_disk"]
    assert again["privacy"]["spent_by_this_run"] == 0
    assert [one["simulation"]["client"]["num_train"] for one in runs] == [30, 40, 30]
    shared = {one["proxy"]["pools"][0]["fingerprint"] for one in runs}
    assert len(shared) == 1  # and with it the pool's embeddings
    assert again["simulation"]["client"] == first["simulation"]["client"]
    assert set(first["simulation"]["client"]["disjoint"]["same_pixels"].values()) == {0}


@pytest.mark.slow
def test_a_domain_of_five_is_the_client_and_the_rest_is_the_pool(run, tmp_path):
    root = make_digits5(tmp_path / "data")
    options = [f"data.root={root}", "client.domain=svhn", "client.fraction=0.5"]
    status, summary, err = run("digits", "data=digits5", *options)
    assert status == 0, err
    client = summary["simulation"]["client"]
    assert client["domain"] == "svhn"
    assert (client["num_train"], client["num_test"]) == (15, 20)
    assert {pool["name"]: pool["num_images"] for pool in summary["proxy"]["pools"]} == {
        "mnist": 30,
        "svhn": 15,
        "usps": 30,
        "synth_digits": 30,
        "mnist_m": 30,
    }
    assert summary["simulation"]["random_purity"] == pytest.approx(15 / 135, abs=1e-6)
    alone = ["train_on=client", "client.classes=[1,7]", "client.imbalance=1"]
    status, summary, err = run("alone", "data=digits5", f"data.root={root}", *alone)
    assert status == 0, err
    assert set(summary["simulation"]["client"]["classes"]) == {"1", "7"}


def test_the_clients_seed_may_follow_the_runs(tmp_path, capsys):
    assert train.main(["seed=7", "client.seed=${seed}", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["client"]["seed"] == 7


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["client.domain=mnist"], "data=mixed_digits has one client"),
        (["client.size=1001"], "the client has 1000 images"),
        (["client.size=10", "client.fraction=0.5"], "give one"),
        (["client.classes=[1,x]"], "client.classes: no class 'x'"),
        (["client.fraction=1.5"], "client.fraction must be above 0 and at most 1"),
        (["client.imbalance=0"], "client.imbalance must be above 0"),
        (["client=mailbox", "client.url=x", "client.size=3"], "client.size is an option of"),
        (["data=digits5", "data.root=/nowhere"], "no mnist in '/nowhere'"),
        (["data=digits5", "data.domains=[mnits]"], "did you mean mnist?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(run, overrides, words):
    status, _, err = run("mistake", *overrides)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1, err
