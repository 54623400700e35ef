"""The client's program, from init to evaluate, as a person runs it."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ecos_pl.backbone import create_backbone
from ecos_pl.backbone_file import save_adapted
from ecos_pl.classifier import Classifier
from ecos_pl.client_cli import main
from ecos_pl.client_setup import open_client, open_ledger
from ecos_pl.envelope import new_key_file, read_key_file, seal, unseal
from ecos_pl.message_format import query_id_of
from ecos_pl.messages import CoverageAnswer, CoverageQuery, PrototypeAnswer, Refusal
from ecos_pl.model_file import save_model
from ecos_pl.remote_mailbox import ClientMailbox, RemoteMailbox
from tests.test_backbone_file import trained
from tests.test_client import SPEC, coverage_query, prototype_query

REPOSITORY = Path(__file__).parents[1]
ENCODER = ["--encoder", "mobilenetv3_small_050", "--weights", "random", "--image-size", "32"]
SERVE = ["--once", "--poll-seconds", "0.01"]


@pytest.fixture(scope="module")
def made(image_tree, tmp_path_factory):
    """A client's folder with its embeddings, and its images; to be copied, not used."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(image_tree / "client", folder / "images")
    client, images = folder / "client", folder / "images"
    command = ["init", str(client), "--data", str(images / "train")]
    assert main([*command, "--test", str(images / "test"), *ENCODER]) == 0
    open_client(client).embed()
    return folder


@pytest.fixture
def home(made, tmp_path):
    """A client of one's own: ``client``, ``images``, ``box``."""
    shutil.copytree(made, tmp_path / "home")
    (tmp_path / "home" / "box").mkdir()
    text = (tmp_path / "home" / "client" / "client.json").read_text()
    moved = text.replace(str(made), str(tmp_path / "home"))
    (tmp_path / "home" / "client" / "client.json").write_text(moved)
    return tmp_path / "home"


def run(*argv, capsys=None):
    status = main([str(part) for part in argv])
    out, err = capsys.readouterr() if capsys else ("", "")
    return status, out, err


def leave(home, payload, sender="cloud", key=None):
    """Put a query into the mailbox as the cloud does, and return its id."""
    path = home / "box" / "queries" / f"{query_id_of(payload)}.ecos"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(seal(payload, sender=sender, key=key))
    return query_id_of(payload)


def change_policy(home, line, other):
    path = home / "client" / "policy.yaml"
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, other))


def ask(home, payload, **options):
    return RemoteMailbox(
        str(home / "box"), sender="cloud", poll_s=0.01, max_poll_s=0.05, deadline_s=60, **options
    ).ask(payload)


# --- init ----------------------------------------------------------------------------------------


def test_init_makes_a_policy_a_ledger_and_a_mark(made):
    folder = made / "client"
    assert {path.name for path in folder.iterdir() if path.is_file()} == {
        "policy.yaml",
        "client.json",
        "ledger.sqlite",
    }
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (made / "images" / "train" / ".ecos-client").is_file()
    ledger, policy = open_ledger(folder)
    assert ledger.entries() == []
    assert policy.max_epsilon == 2.0
    assert policy.fingerprint == policy.encoder.fingerprint()


def test_images_that_have_a_ledger_get_no_second_one(home, capsys):
    command = ["init", home / "other", "--data", home / "images" / "train", *ENCODER]
    status, _, err = run(*command, capsys=capsys)
    assert status == 2
    assert "have a ledger already" in err
    assert not (home / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "does not exist"),
        (["--data", "IMAGES", "--delta", "2"], "delta must lie in"),
        (["--data", "IMAGES", "--max-per-person", "3"], "needs a CSV with a person column"),
        (["--data", "IMAGES", "--person-column", "who"], "needs a CSV file"),
        (["--data", "IMAGES", "--encoder", "mobilnet"], "mobilnet"),
        (["--data", "IMAGES", "--test", "nowhere"], "does not exist"),
    ],
)
def test_a_wrong_init_leaves_nothing_behind(image_tree, tmp_path, capsys, arguments, words):
    images = tmp_path / "images"
    shutil.copytree(image_tree / "client" / "test", images)
    arguments = [str(images) if part == "IMAGES" else part for part in arguments]
    encoder = [] if "--encoder" in arguments else ENCODER
    status, _, err = run("init", tmp_path / "client", *arguments, *encoder, capsys=capsys)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "client").exists()
    assert not (images / ".ecos-client").exists()


def test_a_folder_that_is_not_empty_is_kept(tmp_path, image_tree, capsys):
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "notes.txt").write_text("mine")
    command = ["init", tmp_path / "client", "--data", image_tree / "client" / "test", *ENCODER]
    status, _, err = run(*command, capsys=capsys)
    assert status == 2
    assert "not empty" in err
    assert [path.name for path in (tmp_path / "client").iterdir()] == ["notes.txt"]


def test_a_csv_with_persons_protects_persons(home, capsys):
    images = home / "images" / "train"
    rows = [
        f"train/{path.relative_to(images)},{path.parent.name},{number // 10}"
        for number, path in enumerate(sorted(images.rglob("*.png")))
    ]
    (home / "images" / "list.csv").write_text("path,label,who\n" + "\n".join(rows) + "\n")
    data = ["--data", home / "images" / "list.csv", "--person-column", "who"]
    persons = ["--max-per-person", "3", *ENCODER]
    status, out, _ = run("init", home / "other", *data, *persons, capsys=capsys)
    assert status == 0
    assert "120 images, 2 classes" in out
    payload = coverage_query()
    leave(home, payload)
    run("serve", home / "other", "--mailbox", home / "box", *SERVE)
    answer = CoverageAnswer.from_bytes(ask(home, payload))
    assert (answer.max_per_unit, answer.noise_std) == (3, 15.0)
    capsys.readouterr()
    _, out, _ = run("ledger", home / "other", capsys=capsys)
    assert "per person" in out
    policy = home / "other" / "policy.yaml"
    policy.write_text(policy.read_text().replace("max_per_person: 3", "max_per_person: null"))
    status, _, err = run("serve", home / "other", "--mailbox", home / "box", *SERVE, capsys=capsys)
    assert status == 2
    assert "max_per_person was 3 when the first answer was given" in err


def test_a_flat_folder_answers_counts_and_refuses_classes(home, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (home / "images" / "train").rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}-{path.name}")
    _, out, _ = run("init", home / "other", "--data", flat, *ENCODER, capsys=capsys)
    assert "carry no classes" in out
    leave(home, coverage_query())
    leave(home, prototype_query())
    run("serve", home / "other", "--mailbox", home / "box", *SERVE)
    assert CoverageAnswer.from_bytes(ask(home, coverage_query()))
    assert "carry no classes" in refusal(home, prototype_query())


def refusal(home, payload):
    """Why a query was refused, as the cloud reads it; it is not asked anew."""
    content = (home / "box" / "refusals" / f"{query_id_of(payload)}.ecos").read_bytes()
    return Refusal.from_bytes(unseal(content)[0]).reason


# --- serve ---------------------------------------------------------------------------------------


def test_queries_are_shown_answered_and_replayed(home, capsys):
    counts, means = coverage_query(), prototype_query()
    leave(home, counts, sender="lab-1")
    leave(home, means)
    status, out, _ = run("serve", home / "client", "--mailbox", home / "box", *SERVE, capsys=capsys)
    assert status == 0
    assert "from 'lab-1' (not signed)" in out
    assert "asks how many images lie near each of 4 centroids, noise 5" in out
    assert "asks the means of 2 classes, 3 numbers each, noise ratio 20" in out
    assert "costs ε 0.727: 0.000 spent before, 0.727 after, 1.273 left of 2" in out
    assert out.count("answered") == 2
    assert max(map(len, out.splitlines()[2:])) <= 80  # the mailbox's own name comes first
    first = ask(home, counts)
    assert CoverageAnswer.from_bytes(first).query_id == query_id_of(counts)
    assert PrototypeAnswer.from_bytes(ask(home, means))
    (home / "box" / "answers" / f"{query_id_of(counts)}.ecos").unlink()  # lost on its way
    _, out, _ = run("serve", home / "client", "--mailbox", home / "box", *SERVE, capsys=capsys)
    assert "the same answer again, at no cost" in out
    assert ask(home, counts) == first
    ledger, _ = open_ledger(home / "client")
    assert [entry.requester for entry in ledger.entries()] == ["lab-1", "cloud"]


def test_a_spent_budget_is_refused_with_the_reason(home, capsys):
    change_policy(home, "max_epsilon: 2", "max_epsilon: 1")
    leave(home, coverage_query())
    leave(home, coverage_query(attempt=1))
    run("serve", home / "client", "--mailbox", home / "box", *SERVE, capsys=capsys)
    (refused,) = (home / "box" / "refusals").iterdir()
    reason = Refusal.from_bytes(unseal(refused.read_bytes())[0]).reason
    assert "over the limit of 1" in reason
    assert str(home) not in reason
    ledger, _ = open_ledger(home / "client")
    assert len(ledger.entries()) == 1
    # The client may change its mind; the cloud asks the same again.
    change_policy(home, "max_epsilon: 1", "max_epsilon: 2")
    refused.unlink()
    run("serve", home / "client", "--mailbox", home / "box", *SERVE, capsys=capsys)
    assert len(ledger.entries()) == 2


def test_the_number_of_answers_is_limited(home, capsys):
    change_policy(home, "max_queries: 20", "max_queries: 1")
    change_policy(home, "max_epsilon: 2", "max_epsilon: null")
    for attempt in range(3):
        leave(home, coverage_query(attempt=attempt))
    _, out, _ = run("serve", home / "client", "--mailbox", home / "box", *SERVE, capsys=capsys)
    assert out.count("refused") == 2
    assert "limit is 1 ever" in out


DAMAGE = {
    "truncated": lambda content: content[:-7],
    "flipped": lambda content: content[:-7] + bytes([content[-7] ^ 1]) + content[-6:],
    "empty": lambda content: b"",
    "foreign": lambda content: b"PK\x03\x04 not a message",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_query_is_refused_and_costs_nothing(home, capsys, damage):
    query_id = leave(home, coverage_query())
    path = home / "box" / "queries" / f"{query_id}.ecos"
    path.write_bytes(damage(path.read_bytes()))
    status, _, _ = run("serve", home / "client", "--mailbox", home / "box", *SERVE, capsys=capsys)
    assert status == 0
    ledger, _ = open_ledger(home / "client")
    assert ledger.entries() == []
    assert not (home / "box" / "answers").exists() or not list((home / "box/answers").iterdir())


def test_a_query_that_is_still_being_written_is_answered_when_it_is_whole(home):
    client = open_client(home / "client")
    query_id = leave(home, coverage_query())
    path = home / "box" / "queries" / f"{query_id}.ecos"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    from ecos_pl.client_serve import Person, serve

    stop, lines = threading.Event(), []

    class Writer(threading.Event):
        """Ends the loop at the third pause; the file becomes whole in the first."""

        pauses = 0

        def wait(self, timeout=None):
            self.pauses += 1
            path.write_bytes(whole)
            if self.pauses == 3:
                self.set()
            return self.is_set()

    stop = Writer()
    mailbox = ClientMailbox(str(home / "box"), sender="client")
    person = Person(lines.append)
    serve(client, mailbox, person, once=False, poll_s=0.01, signed=False, stop=stop)
    assert "          answered" in lines
    assert not any("refused" in line for line in lines)


def test_a_shared_key_keeps_others_out(home, tmp_path, capsys):
    new_key_file(tmp_path / "key")
    key = read_key_file(tmp_path / "key")
    leave(home, coverage_query(), key=key)
    leave(home, coverage_query(attempt=1))
    leave(home, coverage_query(attempt=2), key=b"another key entirely")
    command = ["serve", home / "client", "--mailbox", home / "box", "--key-file", tmp_path / "key"]
    _, out, _ = run(*command, *SERVE, capsys=capsys)
    assert "(signed)" in out
    assert CoverageAnswer.from_bytes(ask(home, coverage_query(), key=key))
    ledger, _ = open_ledger(home / "client")
    assert len(ledger.entries()) == 1
    assert "not signed, and this side was given a key" in out
    assert "signed with another key" in out


@pytest.mark.parametrize("says", ["y", "n", ""])
def test_a_policy_can_require_a_yes(home, capsys, monkeypatch, says):
    change_policy(home, "confirm: false", "confirm: true")
    leave(home, coverage_query())
    command = ["serve", home / "client", "--mailbox", home / "box", *SERVE]
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    status, _, err = run(*command, capsys=capsys)
    assert status == 2
    assert "no terminal is there" in err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: says)
    _, out, _ = run(*command, capsys=capsys)
    assert ("answered" in out) == (says == "y")
    ledger, _ = open_ledger(home / "client")
    assert len(ledger.entries()) == (says == "y")
    if says != "y":
        assert "said no" in refusal(home, coverage_query())


def test_an_encoder_that_cannot_be_loaded_is_refused_and_the_client_goes_on(
    home, capsys, monkeypatch
):
    fingerprint = open_ledger(home / "client")[1].fingerprint
    change_policy(home, f"fingerprint: {fingerprint}", "fingerprint: null")
    change_policy(home, "encoder: mobilenetv3_small_050", "encoder: ask")
    change_policy(home, "image_size: 32", "image_size: null")
    query = CoverageQuery.from_bytes(coverage_query())
    unknown = {**query.encoder, "name": "no_such_network"}
    payload = dataclasses.replace(query, encoder=unknown).to_bytes()
    leave(home, payload)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    command = ["serve", home / "client", "--mailbox", home / "box", *SERVE]
    status, _, _ = run(*command, capsys=capsys)
    assert status == 0
    assert refusal(home, payload) == "this client cannot load the encoder no_such_network"
    assert open_ledger(home / "client")[0].entries() == []


def test_sigterm_ends_it_cleanly_and_it_answers_while_it_runs(home):
    command = [sys.executable, "-m", "ecos_pl.client_cli", "serve", str(home / "client")]
    command += ["--mailbox", str(home / "box"), "--poll-seconds", "0.05"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert CoverageAnswer.from_bytes(ask(home, coverage_query()))
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.endswith("stopped\n")
    assert len(open_ledger(home / "client")[0].entries()) == 1


@pytest.fixture
def adapted(tmp_path):
    """A query for a backbone that the cloud has trained further, and its file."""
    from tests.test_adapted_encoders import query_for

    spec = save_adapted(trained(), SPEC, tmp_path / "round1.safetensors")
    return query_for(spec, noise_std=5.0), Path(spec.weights).read_bytes()


def send(home, model, **options):
    RemoteMailbox(str(home / "box"), sender="cloud", **options).send_model(model)


ADAPTED = [*SERVE, "--adapted-seconds", "0.01"]


def test_a_backbone_that_the_cloud_trained_is_fetched_told_of_and_kept(home, capsys, adapted):
    query, model = adapted
    send(home, model)
    leave(home, query)
    status, out, _ = run(
        "serve", home / "client", "--mailbox", home / "box", *ADAPTED, capsys=capsys
    )
    assert status == 0
    assert "with a backbone that the cloud has trained further (0.9 MB)" in out
    assert "costs ε 0.727" in out
    assert max(map(len, out.splitlines()[2:])) <= 80
    assert CoverageAnswer.from_bytes(ask(home, query))
    shutil.rmtree(home / "box" / "models")  # kept: the next query needs no new download
    again = dataclasses.replace(CoverageQuery.from_bytes(query), attempt=1).to_bytes()
    leave(home, again)
    run("serve", home / "client", "--mailbox", home / "box", *ADAPTED, capsys=capsys)
    assert CoverageAnswer.from_bytes(ask(home, again))


def test_a_policy_without_trained_backbones_says_so(home, capsys, adapted):
    query, model = adapted
    change_policy(home, "adapted_encoders: true", "adapted_encoders: false")
    send(home, model)
    leave(home, query)
    run("serve", home / "client", "--mailbox", home / "box", *ADAPTED, capsys=capsys)
    assert "allows no encoder that the cloud has trained further" in refusal(home, query)
    assert open_ledger(home / "client")[0].entries() == []


def test_init_can_forbid_trained_backbones(home, tmp_path, capsys):
    shutil.copytree(home / "images" / "test", tmp_path / "images")
    command = ["init", tmp_path / "c", "--data", tmp_path / "images", *ENCODER]
    assert run(*command, "--no-adapted-encoders", capsys=capsys)[0] == 0
    assert not open_ledger(tmp_path / "c")[1].adapted_encoders


def test_a_model_that_does_not_come_whole_is_refused_and_the_client_goes_on(home, capsys, adapted):
    query, model = adapted
    leave(home, query)
    _, out, _ = run("serve", home / "client", "--mailbox", home / "box", *ADAPTED, capsys=capsys)
    assert "its model is not in the mailbox yet" in out
    assert "not in the mailbox" in refusal(home, query)
    send(home, model)
    (path,) = (home / "box" / "models").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    (home / "box" / "refusals" / f"{query_id_of(query)}.ecos").unlink()
    leave(home, coverage_query())
    run("serve", home / "client", "--mailbox", home / "box", *ADAPTED, capsys=capsys)
    assert "SHA-256 differs" in refusal(home, query)
    assert CoverageAnswer.from_bytes(ask(home, coverage_query()))


def test_a_model_may_come_after_its_query(home, adapted):
    """As in folders that are synchronised file by file, the small ones first."""
    from ecos_pl.client_serve import Person, serve

    query, model = adapted
    leave(home, query)
    lines = []

    class Writer(threading.Event):
        """The model comes in the second pause; the loop ends in the sixth."""

        pauses = 0

        def wait(self, timeout=None):
            self.pauses += 1
            if self.pauses == 2:
                send(home, model)
            if self.pauses == 6:
                self.set()
            return self.is_set()

    mailbox = ClientMailbox(str(home / "box"), sender="client")
    options = {"poll_s": 0.01, "adapted_s": 0.01, "signed": False, "stop": Writer()}
    client = open_client(home / "client")
    serve(client, mailbox, Person(lines.append), once=False, **options)
    assert "          answered" in lines
    assert sum("query" in line and "from" in line for line in lines) == 1
    assert not any("refused" in line for line in lines)


@pytest.mark.parametrize("is_refused", [False, True])
def test_replies_to_trained_backbones_leave_on_the_slow_schedule(home, adapted, is_refused):
    """What is replied tells nothing of how long embedding took: also a refusal after it."""
    from ecos_pl.client_serve import Person, serve

    query, model = adapted
    if is_refused:  # its projection does not fit, which shows after embedding only
        narrow = CoverageQuery.from_bytes(query)
        half = {"mean": narrow.mean[:7], "components": narrow.components[:, :7].contiguous()}
        query = dataclasses.replace(narrow, **half).to_bytes()
    send(home, model)
    leave(home, query)
    leave(home, coverage_query())
    waits = []

    class Waits(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    mailbox = ClientMailbox(str(home / "box"), sender="client")
    client = open_client(home / "client")
    options = {"once": True, "poll_s": 1.0, "adapted_s": 500.0, "signed": False, "stop": Waits()}
    serve(client, mailbox, Person(lambda line: None), **options)
    slow, quick = sorted(waits, reverse=True)
    assert 300 < slow < 500
    assert quick <= 1
    assert (home / "box" / "refusals").exists() == is_refused


# --- the ledger, messages, evaluation ------------------------------------------------------------


def test_the_ledger_is_told_in_words(home, capsys):
    _, out, _ = run("ledger", home / "client", capsys=capsys)
    assert "ε = 0.00 at δ = 1e-05, per sample, add/remove, PLD accountant" in out
    leave(home, coverage_query(), sender="a hospital far away")
    leave(home, prototype_query())
    run("serve", home / "client", "--mailbox", home / "box", *SERVE, capsys=capsys)
    status, out, _ = run("ledger", home / "client", capsys=capsys)
    assert status == 0
    assert "counts, noise 5" in out
    assert "class means, noise 20" in out
    assert "a hospital far" in out
    assert time.strftime("%Y-", time.gmtime()) in out
    assert "18 of 20 answers" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda path: path.unlink(), "there is no ledger"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "damaged"),
        (lambda path: path.write_bytes(b"\0" * 4096), "ledger"),
    ],
)
def test_a_broken_ledger_stops_everything(home, capsys, break_it, words):
    leave(home, coverage_query())
    break_it(home / "client" / "ledger.sqlite")
    for command in (
        ["ledger", home / "client"],
        ["serve", home / "client", "--mailbox", home / "box", *SERVE],
    ):
        status, _, err = run(*command, capsys=capsys)
        assert status == 2
        assert words in err
        assert err.count("\n") == 1
    assert not (home / "box" / "answers").exists()


def test_a_ledger_from_elsewhere_is_noticed(home, image_tree, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(image_tree / "client" / "test", other / "images")
    run("init", other / "client", "--data", other / "images", *ENCODER, capsys=capsys)
    shutil.copy(other / "client" / "ledger.sqlite", home / "client" / "ledger.sqlite")
    status, _, err = run("ledger", home / "client", capsys=capsys)
    assert status == 2
    assert "belongs to" in err
    # The whole folder moved over to other images:
    text = (other / "client" / "client.json").read_text()
    (other / "client" / "client.json").write_text(
        text.replace(str(other / "images"), str(home / "images" / "train"))
    )
    status, _, err = run("ledger", other / "client", capsys=capsys)
    assert status == 2
    assert "belong to another ledger" in err
    (home / "images" / "train" / ".ecos-client").unlink()
    status, _, err = run("ledger", home / "client", capsys=capsys)
    assert "mark of this client's ledger is missing" in err


def test_any_message_is_shown_in_words(home, capsys):
    query_id = leave(home, coverage_query(), sender="lab")
    path = home / "box" / "queries" / f"{query_id}.ecos"
    status, out, _ = run("inspect", path, capsys=capsys)
    assert status == 0
    assert "sealed, whole, not signed, from 'lab'" in out
    assert "coverage_query (version 2)" in out
    assert "centroids            4 × 3 float16" in out
    assert query_id in out
    path.write_bytes(path.read_bytes()[:-1])
    status, _, err = run("inspect", path, capsys=capsys)
    assert status == 2
    assert "SHA-256 differs" in err
    assert run("inspect", home / "none", capsys=capsys)[0] == 2


def test_a_delivered_model_is_tried_on_the_clients_own_images(home, capsys, tmp_path):
    net = create_backbone("mobilenetv3_small_050", "random", image_size=32, num_classes=2).eval()
    head = net.get_classifier()
    torch.nn.init.zeros_(head.weight)
    head.bias.data = torch.tensor([0.0, 1.0])  # always says the second class
    model = Classifier(net, "mobilenetv3_small_050", 32, ["vertical", "horizontal"])
    save_model(tmp_path / "model.safetensors", model)
    (home / "images" / "test" / "vertical" / "secret-000.png").write_bytes(b"broken")
    before = sorted(path for path in home.rglob("*") if path.is_file())
    command = ["evaluate", home / "client", "--model", tmp_path / "model.safetensors"]
    status, out, _ = run(*command, capsys=capsys)
    assert status == 0
    assert "accuracy 0.5172 on 29 images" in out
    assert "horizontal           1.0000 (15)" in out
    assert sorted(path for path in home.rglob("*") if path.is_file()) == before
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    status, _, err = run(*command, capsys=capsys)
    assert status == 2
    assert "cannot be read as a delivered model" in err


def test_a_model_of_other_classes_says_so(home, capsys, tmp_path):
    net = create_backbone("mobilenetv3_small_050", "random", image_size=32, num_classes=2)
    save_model(tmp_path / "m", Classifier(net, "mobilenetv3_small_050", 32, ["cat", "dog"]))
    status, _, err = run("evaluate", home / "client", "--model", tmp_path / "m", capsys=capsys)
    assert status == 2
    assert "no test image is of a class that the model knows (cat, dog)" in err


def test_help_tells_what_there_is(capsys):
    for command in ([], ["init"], ["serve"], ["ledger"], ["inspect"], ["evaluate"], ["key"]):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
        assert "usage: ecos-client" in capsys.readouterr().out


@pytest.mark.slow
def test_it_needs_neither_lightning_nor_wandb_nor_omegaconf_nor_a_pool(home):
    leave(home, coverage_query())
    leave(home, prototype_query())
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "wandb", "omegaconf", "datamodules", "callbacks"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from ecos_pl.client_cli import main
assert main(["serve", {str(home / "client")!r}, "--mailbox", {str(home / "box")!r}, "--once",
             "--poll-seconds", "0.01"]) == 0
assert main(["ledger", {str(home / "client")!r}]) == 0
unwanted = ("timm.optim", "timm.scheduler", "timm.loss", "ecos_pl.probe", "ecos_pl.selection")
assert not set(unwanted) & set(sys.modules), set(unwanted) & set(sys.modules)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert len(list((home / "box" / "answers").iterdir())) == 2


def test_a_query_keeps_its_name(home):
    """The same question has the same id, whoever asks and however it is sealed."""
    content = coverage_query()
    assert CoverageQuery.from_bytes(content).to_bytes() == content
    assert leave(home, content, sender="a") == leave(home, content, sender="b", key=b"k" * 32)
