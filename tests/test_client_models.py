"""Models that are delivered through a mailbox, as the client's side takes them."""

import pytest

from ecos_pl import client_models
from ecos_pl.backbone import create_backbone
from ecos_pl.classifier import Classifier
from ecos_pl.client_models import DeliveredModels
from ecos_pl.envelope import MessageError, seal
from ecos_pl.images import scan_folder
from ecos_pl.messages import Delivery, query_id_of
from ecos_pl.model_file import save_model
from ecos_pl.remote_mailbox import ClientMailbox, RemoteMailbox

KEY = b"k" * 32


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's file, as bytes."""
    path = tmp_path_factory.mktemp("model") / "m"
    net = create_backbone("mobilenetv3_small_050", "random", image_size=32, num_classes=2)
    save_model(path, Classifier(net, "mobilenetv3_small_050", 32, ["vertical", "horizontal"]))
    return path.read_bytes()


@pytest.fixture
def box(tmp_path):
    return tmp_path / "box"


def cloud(box, key=None):
    return RemoteMailbox(str(box), sender="cloud", key=key)


def deliver(box, content, file="model.safetensors", run_id="run", key=None):
    return cloud(box, key).deliver(content, file=file, run_id=run_id)


def reader(box, key=None):
    return ClientMailbox(str(box), sender="client", key=key)


@pytest.fixture
def models(tmp_path, image_tree):
    return DeliveredModels(tmp_path / "models", lambda: scan_folder(image_tree / "client" / "test"))


def test_a_delivery_is_written_once_and_both_parts_are_counted(box, model):
    mailbox = cloud(box, KEY)
    sizes = [mailbox.deliver(model, file="model.safetensors", run_id="a run") for _ in range(2)]
    files = {path: path.stat() for path in box.rglob("*.ecos")}
    assert len(files) == 2
    assert sizes == [sum(stat.st_size for stat in files.values())] * 2
    assert (mailbox.bytes_sent, mailbox.bytes_received) == (sizes[0], 0)
    deliver(box, model, run_id="a run", key=KEY)  # a run that was started again
    assert {path: path.stat().st_mtime_ns for path in box.rglob("*.ecos")} == {
        path: stat.st_mtime_ns for path, stat in files.items()
    }
    (note,) = reader(box, KEY).delivered_models()
    found = reader(box, KEY).read_delivery(note)
    assert (found.run_id, found.file, found.size) == ("a run", "model.safetensors", len(model))
    with pytest.raises(MessageError, match="signed with another key"):
        reader(box, b"o" * 32).read_delivery(note)


def test_a_new_model_is_kept_tried_and_told_of_once(box, model, models, tmp_path):
    assert list(models.try_new(reader(box))) == []
    deliver(box, model)
    before = {path: path.read_bytes() for path in box.rglob("*.ecos")}
    lines = list(models.try_new(reader(box)))
    assert lines[0] == "a model was delivered, of run run"
    assert lines[1].startswith("kept as models/")
    assert any(line.endswith("on 30 images") for line in lines)
    assert list(models.try_new(reader(box))) == []
    again = DeliveredModels(tmp_path / "models", None)  # a restarted client
    assert list(again.try_new(reader(box))) == []
    assert models.newest().read_bytes() == model
    assert {path: path.read_bytes() for path in box.rglob("*.ecos")} == before  # nothing is sent


def test_without_test_images_it_is_kept_and_said(box, model, tmp_path):
    deliver(box, model)
    models = DeliveredModels(tmp_path / "models", None)
    assert "no test images" in list(models.try_new(reader(box)))[-1]
    assert models.newest().read_bytes() == model


def test_what_cannot_be_used_is_told_of_once_and_stops_nothing(box, model, models):
    deliver(box, b"nonsense", file="model.onnx")
    deliver(box, b"more nonsense")
    lines = list(models.try_new(reader(box)))
    assert sum("it cannot be tried" in line for line in lines) == 2
    deliver(box, model, run_id="better")
    assert any("accuracy" in line for line in models.try_new(reader(box)))


def test_a_model_that_cannot_run_stops_nothing(box, models, tmp_path):
    net = create_backbone("test_vit", "random", image_size=160, num_classes=2)
    save_model(tmp_path / "m", Classifier(net, "test_vit", 33, ["vertical", "horizontal"]))
    deliver(box, (tmp_path / "m").read_bytes())
    assert list(models.try_new(reader(box)))[-1].startswith("it cannot be tried: ")


def test_a_model_that_comes_later_or_damaged_is_looked_at_again(box, model, models):
    deliver(box, model)
    (path,) = (box / "models").iterdir()
    whole = path.read_bytes()
    for content in (None, whole[:-5], seal(b"another", sender="cloud")):
        path.unlink() if content is None else path.write_bytes(content)
        assert list(models.try_new(reader(box))) == []
        with pytest.raises(MessageError):
            models.newest(reader(box))
    path.write_bytes(whole)
    assert len(list(models.try_new(reader(box)))) > 2


def test_a_kept_file_that_is_damaged_is_fetched_again(box, model, models):
    deliver(box, model)
    path = models.newest(reader(box))
    path.write_bytes(b"half")
    assert models.newest(reader(box)) == path
    assert path.read_bytes() == model


def test_the_newest_is_the_one_delivered_last_and_few_are_kept(box, models, tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(client_models, "MAX_KEPT", 2)
    for number in range(4):
        deliver(box, b"model %d" % number, run_id=f"run {number}")
        for age, note in enumerate(reader(box).delivered_models()):
            path = box / "deliveries" / f"{note}.ecos"
            if path.stat().st_mtime > 2000:
                os.utime(path, (1000 + number, 1000 + number + age))
    assert models.newest(reader(box)).read_bytes() == b"model 3"
    list(models.try_new(reader(box)))
    kept = {path.read_bytes() for path in (tmp_path / "models").iterdir()}
    assert kept == {b"model 2", b"model 3"}
    restarted = DeliveredModels(tmp_path / "models", None)
    assert list(restarted.try_new(reader(box))) == []


def test_where_nothing_was_delivered_it_says_so(box, models):
    with pytest.raises(ValueError, match="no model was delivered yet at"):
        models.newest(reader(box))
    with pytest.raises(ValueError, match="name one with --model"):
        models.newest()


GOOD = {"run_id": "run", "file": "model.int8.onnx", "size": 3, "sha256": "0f" * 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": ""},
        {"run_id": "a\x1b[31m"},
        {"run_id": "x" * 201},
        {"file": "../model.onnx"},
        {"file": "a/model.onnx"},
        {"file": ".onnx"},
        {"file": "model.pth"},
        {"file": "model.onnx\n"},
        {"size": 0},
        {"sha256": "0f" * 31},
        {"sha256": "0F" * 32},
    ],
)
def test_odd_notes_are_refused(changes):
    assert Delivery.from_bytes(Delivery(**GOOD).to_bytes()) == Delivery(**GOOD)
    with pytest.raises(MessageError):
        Delivery(**{**GOOD, **changes})


def test_a_note_that_lies_about_its_model_keeps_nothing(box, models, tmp_path):
    mailbox = cloud(box)
    mailbox.deliver(b"content", file="model.onnx", run_id="run")
    (path,) = (box / "deliveries").iterdir()
    path.unlink()
    good = Delivery(run_id="r", file="m.onnx", size=8, sha256=query_sha(b"content"))
    note = good.to_bytes()
    path.with_name(f"{query_id_of(note)}.ecos").write_bytes(seal(note, sender="cloud"))
    with pytest.raises(MessageError, match="not the one that was announced"):
        models.newest(reader(box))
    assert not list(tmp_path.glob("models/*"))


def query_sha(content):
    import hashlib

    return hashlib.sha256(content).hexdigest()
