"""Cloud and client as programs of their own: train.py on one side, ecos-client on the other."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from callbacks.from_config import shown
from ecos_pl.client_cli import main as client_main
from ecos_pl.client_setup import open_ledger
from ecos_pl.encoder import EncoderSpec
from ecos_pl.envelope import unseal
from ecos_pl.images import scan_folder
from ecos_pl.mailbox import InProcessMailbox
from ecos_pl.message_format import query_id_of
from ecos_pl.probe import Probe, ProbePlan
from ecos_pl.prototype_labeler import PrototypeLabeler
from tests.test_train import REPOSITORY, SMALL

ENCODER = ["--encoder", "mobilenetv3_small_050", "--weights", "random", "--image-size", "32"]
MARKER = "zebra-4711"
"""Planted wherever the client could give itself away: paths, file contents, the client's name."""


@pytest.fixture(scope="module")
def parties(image_tree, tmp_path_factory):
    """One real walk: the client serves in a process of its own while train.py waits and trains."""
    root = tmp_path_factory.mktemp("parties")
    private = root / f"private-{MARKER}"
    shutil.copytree(image_tree / "client", private / "images")
    for path in (private / "images").rglob("*.png"):
        with path.open("ab") as file:  # after the picture's end: decoders do not mind
            file.write(MARKER.encode())
        path.rename(path.with_name(f"{MARKER}-{path.name}"))
    (private / "images" / "train" / "vertical" / f"{MARKER}.png").write_bytes(b"broken")
    client, images = private / "client", private / "images"
    command = ["init", str(client), "--data", str(images / "train"), *ENCODER]
    command += ["--test", str(images / "test"), "--max-epsilon", "6", "--min-noise-std", "2"]
    assert client_main([*command, "--min-noise-multiplier", "0.5"]) == 0
    assert client_main(["key", str(root / "key")]) == 0
    serve = [sys.executable, "-m", "ecos_pl.client_cli", "serve", str(client)]
    serve += ["--mailbox", str(root / "box"), "--key-file", str(root / "key")]
    serve += ["--adapted-seconds", "0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = (private / "serve.log").open("wb")
    with subprocess.Popen(
        [*serve, "--poll-seconds", "0.1"], cwd=REPOSITORY, env=environment, stdout=out, stderr=out
    ) as server:
        tracking = ["logger=wandb", "logger.mode=offline"]
        status = train.main(command_line(root, image_tree, *tracking))
        deadline = time.monotonic() + 60
        while "on 30 images" not in (private / "serve.log").read_text():
            assert time.monotonic() < deadline, (private / "serve.log").read_text()
            time.sleep(0.1)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0, (private / "serve.log").read_text()
    assert status == 0
    return root


def command_line(root, image_tree, *overrides):
    return [
        *SMALL,
        "data=folder",
        f"data.pool={image_tree}/pool",
        "data.classes=[horizontal,vertical]",
        "data.client_domain=bars",
        "client=mailbox",
        f"client.url={root / 'box'}",
        f"client.key_file={root / 'key'}",
        "client.poll_seconds=0.1",
        "client.deadline_hours=0.05",
        "client.sender=the-lab",
        "labels.num_dims=6",
        "labels.num_views=2",
        f"run_root={root / 'runs'}",
        "run_id=run",
        *overrides,
    ]


@pytest.mark.slow
def test_the_run_is_whole_though_the_clients_images_are_elsewhere(parties):
    summary = json.loads((parties / "runs/run/summary.json").read_text())
    assert summary["simulation"]["purity"] > 0.7
    assert summary["simulation"]["test_accuracy"] is None  # the test images are the client's
    assert 5.8 < summary["privacy"]["epsilon"] <= 6
    sizes = summary["communication"]
    queries = list((parties / "box" / "queries").iterdir())
    answers = list((parties / "box" / "answers").iterdir())
    assert sizes["round_trips"] == len(queries) == len(answers) == 2
    delivered = [*(parties / "box" / "models").iterdir(), *(parties / "box/deliveries").iterdir()]
    assert len(delivered) == 2
    num_bytes = sum(path.stat().st_size for path in delivered)
    assert summary["delivered"] == {"model.safetensors": num_bytes}
    assert sizes["bytes_down"] == sum(path.stat().st_size for path in queries) + num_bytes
    assert sizes["bytes_up"] == sum(path.stat().st_size for path in answers)


@pytest.mark.slow
def test_the_clients_ledger_says_what_the_cloud_says(parties):
    ledger, policy = open_ledger(parties / f"private-{MARKER}" / "client")
    summary = json.loads((parties / "runs/run/summary.json").read_text())
    assert ledger.epsilon(policy.delta) == pytest.approx(summary["privacy"]["epsilon"], abs=1e-6)
    assert {entry.requester for entry in ledger.entries()} == {"the-lab"}


@pytest.mark.slow
def test_the_delivered_model_runs_on_the_clients_side(parties, capsys):
    """As serve fetched it, as it lies in the mailbox, and as a file: one model, one accuracy."""
    client = parties / f"private-{MARKER}" / "client"
    model = parties / "runs" / "run" / "model.safetensors"
    (kept,) = (client / "models").iterdir()
    assert kept.read_bytes() == model.read_bytes()
    log = (client.parent / "serve.log").read_text()
    assert "a model was delivered, of run run" in log
    mailbox = ["--mailbox", str(parties / "box"), "--key-file", str(parties / "key")]
    for source in ([], mailbox, ["--model", str(model)]):
        assert client_main(["evaluate", str(client), *source]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "accuracy" in line]
        assert lines[0].endswith("on 30 images")
        assert lines[0] in log
    assert not list((parties / "runs").rglob("*test_accuracy*"))


@pytest.mark.slow
def test_nothing_private_is_in_the_mailbox_or_on_the_clouds_side(parties):
    """Names, contents and folders of the client, its true counts, its number of images."""
    seen = 0
    for folder in (parties / "box", parties / "runs"):
        for path in folder.rglob("*"):
            assert MARKER not in path.name
            assert "secret" not in path.name
            if not path.is_file():
                continue
            seen += 1
            content = path.read_bytes()
            for secret in (MARKER, "secret-", "private-"):
                for encoding in ("utf-8", "utf-16-le"):
                    assert secret.encode(encoding) not in content, (secret, path)
            if path.suffix in (".json", ".yaml"):
                words = content.decode().replace(",", " ").replace(":", " ").split()
                assert not {"120", "121"} & set(words), path  # readable images, all images
    figures = {path.stem for path in (parties / "runs/run/figures").iterdir()}
    assert "privacy_ledger" in figures
    assert not {"confusion_matrix", "calibration"} & figures  # the test images are the client's
    assert seen > 25  # config, summary, checkpoints, figures, W&B, caches, messages
    log = (parties / f"private-{MARKER}" / "serve.log").read_text()
    assert "120" not in log
    assert "121" not in log


@pytest.mark.slow
def test_a_run_that_ended_before_its_delivery_delivers_when_called_again(
    parties, image_tree, capsys
):
    """Killed in between: the training is on disk, the model is not in the mailbox."""
    tracking = ["logger=wandb", "logger.mode=offline"]
    box, summary_path = parties / "box", parties / "runs/run/summary.json"
    (model,), (note,) = (list((box / name).iterdir()) for name in ("models", "deliveries"))
    before, summary = (model.read_bytes(), note.read_bytes()), json.loads(summary_path.read_text())
    model.unlink()
    note.unlink()
    summary_path.unlink()
    capsys.readouterr()
    assert train.main(command_line(parties, image_tree, *tracking)) == 0
    assert "delivered" in capsys.readouterr().out
    assert (model.read_bytes(), note.read_bytes()) == before
    again = json.loads(summary_path.read_text())
    for part in ("communication", "delivered"):
        assert again[part] == summary[part]
    times = model.stat().st_mtime_ns, note.stat().st_mtime_ns
    assert train.main(command_line(parties, image_tree, *tracking)) == 0
    assert (model.stat().st_mtime_ns, note.stat().st_mtime_ns) == times


@pytest.mark.slow
def test_a_second_run_asks_nobody_and_delivers_only_if_wanted(parties, image_tree):
    shutil.rmtree(parties / "runs" / "run")
    notes = sorted((parties / "box" / "deliveries").iterdir())
    short = ["trainer.max_epochs=1", "client.deliver=false"]
    assert train.main(command_line(parties, image_tree, *short)) == 0
    summary = json.loads((parties / "runs/run/summary.json").read_text())
    assert summary["proxy"]["from_disk"]
    assert summary["privacy"]["spent_by_this_run"] == 0
    assert "delivered" not in summary
    assert sorted((parties / "box" / "deliveries").iterdir()) == notes
    assert train.main(command_line(parties, image_tree, "trainer.max_epochs=1")) == 0
    assert len(list((parties / "box" / "deliveries").iterdir())) == len(notes) + 1


@pytest.mark.slow
def test_a_mailbox_that_cannot_take_the_model_loses_nothing(
    parties, image_tree, capsys, caplog, monkeypatch
):
    from ecos_pl import envelope

    shutil.rmtree(parties / "runs" / "run")
    arguments = command_line(parties, image_tree, "trainer.max_epochs=1")
    moved = (parties / "box" / "models").rename(parties / "box" / "aside")
    (parties / "box" / "models").write_bytes(b"a file where the folder should be")
    assert train.main(arguments) == 2
    err = capsys.readouterr().err
    assert "the same command delivers it" in err
    assert (parties / "runs/run/summary.json").is_file()
    assert (parties / "runs/run/model.safetensors").is_file()
    (parties / "box" / "models").unlink()
    moved.rename(parties / "box" / "models")
    monkeypatch.setattr(envelope, "MAX_BYTES", 1_000_000)
    assert train.main(arguments) == 0
    assert "too large for a mailbox" in caplog.text
    assert "delivered" not in json.loads((parties / "runs/run/summary.json").read_text())


@pytest.mark.slow
def test_the_same_answers_give_the_same_proxy_set_in_one_process(parties, image_tree, tmp_path):
    """Answer files of the mailbox, replayed to a probe that knows nothing of mailboxes."""
    replies = {}
    for path in (parties / "box" / "answers").iterdir():
        replies[path.stem] = unseal(path.read_bytes())[0]
    plan = ProbePlan(
        encoder=EncoderSpec("mobilenetv3_small_050", "random", 32),
        num_clusters=8,
        num_dims=8,
        size=60,
        duplicate_distance=0.0,
        noise_std=2.0,
        max_epsilon=6.0,
    )
    client = SimpleNamespace(answer=lambda query: replies[query_id_of(query)])
    mailbox = InProcessMailbox(lambda: client, client_id="x")
    labeler = PrototypeLabeler(["horizontal", "vertical"], num_dims=6, num_views=2)
    result = Probe(
        scan_folder(image_tree / "pool"),
        plan,
        labeler,
        lambda fingerprint: mailbox,
        tmp_path / "cache",
        client_id="x",
        batch_size=64,
    ).run()
    result.proxy_set.save(tmp_path)
    (kept,) = (parties / "runs" / "cache" / "probes").iterdir()
    assert (tmp_path / "proxy_set.csv").read_bytes() == (kept / "proxy_set.csv").read_bytes()


def test_without_a_client_the_cloud_gives_up_at_its_deadline_and_says_how_to_go_on(
    image_tree, tmp_path, capsys
):
    (tmp_path / "key").write_text("k" * 32)
    arguments = command_line(tmp_path, image_tree, "client.deadline_hours=0.0001")
    assert train.main(arguments) == 2
    err = capsys.readouterr().err
    assert "no answer from the client since" in err
    assert "the same command goes on waiting" in err
    assert len(list((tmp_path / "box" / "queries").iterdir())) == 1
    assert train.main(arguments) == 2  # asked again, the query is not written twice
    assert len(list((tmp_path / "box" / "queries").iterdir())) == 1


@pytest.mark.slow
def test_a_client_killed_again_and_again_charges_each_answer_once(image_tree, tmp_path):
    """SIGKILL at random moments of serving: in the end all is answered, and nothing paid twice."""
    from tests.test_client import coverage_query
    from tests.test_client_cli import leave

    home = tmp_path
    shutil.copytree(image_tree / "client" / "train", home / "images")
    client = home / "client"
    command = ["init", str(client), "--data", str(home / "images"), *ENCODER]
    assert client_main([*command, "--max-epsilon", "100", "--max-queries", "100"]) == 0
    (home / "box").mkdir()
    wanted = {leave(home, coverage_query(attempt=attempt)) for attempt in range(4)}
    serve = [sys.executable, "-m", "ecos_pl.client_cli", "serve", str(client)]
    serve += ["--mailbox", str(home / "box"), "--poll-seconds", "0.05"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    sent: dict[str, bytes] = {}
    for _ in range(4):
        with subprocess.Popen(
            serve, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL
        ) as process:
            # Until something new was sent, then a random moment later.
            deadline = time.monotonic() + 120
            answered = answers(home)
            while len(answered) == len(sent) < len(wanted) and time.monotonic() < deadline:
                time.sleep(0.02)
                answered = answers(home)
            time.sleep(random.random() * 0.1)
            process.kill()
        for name, content in answers(home).items():
            assert sent.setdefault(name, content) == content
        ledger, _ = open_ledger(client)
        charged = {entry.query_id for entry in ledger.entries()}
        assert set(sent) <= charged
        if set(sent) == wanted:
            break
    # What was charged and not yet drawn when it was killed is refused, and stays charged.
    assert client_main(["serve", str(client), "--mailbox", str(home / "box"), "--once"]) == 0
    refused = home / "box" / "refusals"
    lost = {path.stem for path in refused.iterdir()} if refused.exists() else set()
    assert set(answers(home)) | lost == wanted
    entries = open_ledger(client)[0].entries()
    assert sorted(entry.query_id for entry in entries) == sorted(wanted)
    assert {entry.query_id for entry in entries if not entry.answered} == lost


def answers(home: Path) -> dict[str, bytes]:
    """Whole answers in the mailbox by id."""
    folder = home / "box" / "answers"
    paths = folder.glob("*.ecos") if folder.exists() else ()
    return {path.stem: path.read_bytes() for path in paths}


def test_a_mailboxs_password_is_not_logged():
    config = train.load_config(
        ["client=mailbox", "client.url=sftp://me:hunter2@host/box"], config_dir=train.CONFIG_DIR
    )
    assert "hunter2" not in str(shown(config))
    assert shown(config)["client"]["url"].endswith("host/box")
