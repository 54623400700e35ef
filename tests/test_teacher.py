"""Teachers: frozen whatever happens around them, and of the client's classes or refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from ecos_pl.backbone import WeightsError
from ecos_pl.classifier import Classifier
from ecos_pl.model_file import save_model
from ecos_pl.teacher import FrozenTeacher, delivered_teacher, resized, timm_teacher

NAME = "test_efficientnet"
IMAGES = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)


def classifier(classes, image_size=32, backbone=NAME, seed=3):
    model = Classifier.create(
        classes, backbone=backbone, weights="random", image_size=image_size, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(model.net.get_classifier().weight, generator=generator)
    return model


class Student(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.layer, self.teacher = nn.Linear(2, 2), teacher


def test_a_module_that_holds_a_teacher_does_not_know_its_weights():
    teacher = FrozenTeacher(classifier(["a", "b"]))
    student = Student(teacher)
    assert set(student.state_dict()) == {"layer.weight", "layer.bias"}
    assert len(list(student.parameters())) == 2
    student.train()
    assert not any(module.training for module in teacher.model.modules())
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    assert copy.deepcopy(student).teacher is teacher  # as weight averaging copies it


def test_asking_changes_nothing_and_builds_no_graph():
    teacher = FrozenTeacher(classifier(["a", "b"]))
    before = teacher.fingerprint()
    scores, features = teacher(IMAGES)
    assert scores.shape == (5, 2)
    assert features.shape == (5, teacher.num_features)
    assert not scores.requires_grad
    assert teacher.fingerprint() == before
    assert torch.equal(teacher(IMAGES[:1])[0].argmax(), scores[0].argmax())


def test_the_fingerprint_is_that_of_the_answers():
    one, again = (FrozenTeacher(classifier(["a", "b"])) for _ in range(2))
    others = [
        FrozenTeacher(classifier(["b", "a"])),
        FrozenTeacher(classifier(["a", "b"], image_size=48)),
        FrozenTeacher(classifier(["a", "b"], seed=4)),
    ]
    assert one.fingerprint() == again.fingerprint()
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 4


@pytest.mark.parametrize(
    "backbone", [NAME, "lcnet_035", "resnet10t", "mobilenetv3_small_050", "test_vit"]
)
def test_scores_with_features_are_the_scores(backbone):
    model = classifier(["a", "b", "c"], backbone=backbone).eval()
    scores, features = model.with_features(IMAGES)
    assert torch.allclose(scores, model(IMAGES), atol=1e-5)
    assert features.shape == (5, model.num_features)
    assert torch.allclose(scores, model.net.get_classifier()(features), atol=1e-5)


def test_images_of_its_own_size_are_left_alone_and_others_resized():
    assert resized(IMAGES, 32) is IMAGES
    larger = resized(IMAGES, 48)
    assert larger.shape == (5, 3, 48, 48)
    assert 0 <= float(larger.min()) <= float(larger.max()) <= 255
    flat = torch.full((1, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.allclose(resized(flat, 20), torch.full((1, 3, 20, 20), 77.0))


# --- from a run before ---------------------------------------------------------------------------


def test_a_delivered_model_answers_in_the_clients_order_of_classes(tmp_path):
    model = classifier(["a", "b", "c"]).eval()
    save_model(tmp_path / "model.safetensors", model)
    teacher = delivered_teacher(tmp_path / "model.safetensors", ["c", "a", "b"])
    assert teacher.model.classes == ["c", "a", "b"]
    assert torch.allclose(teacher(IMAGES)[0], model(IMAGES)[:, [2, 0, 1]], atol=1e-5)
    same = delivered_teacher(tmp_path / "model.safetensors", ["a", "b", "c"])
    assert torch.equal(same(IMAGES)[0], model(IMAGES))


def test_other_classes_are_refused_in_one_line_that_names_both(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(path, classifier(["a", "b", "c"]))
    with pytest.raises(ValueError, match=r"task\.teacher") as caught:
        delivered_teacher(path, [f"digit {k}" for k in range(10)])
    text = str(caught.value)
    assert "3: a, b, c" in text
    assert "10: digit 0, digit 1, digit 2, digit 3, digit 4, …" in text
    assert "\n" not in text


def test_a_missing_or_damaged_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name in ("none.safetensors", "bad.safetensors"):
        with pytest.raises(ValueError, match=f"task.teacher: .*{name}"):
            delivered_teacher(tmp_path / name, ["a"])


# --- from timm -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory):
    def make(num_classes):
        torch.manual_seed(5)
        net = timm.create_model(NAME, num_classes=num_classes)
        nn.init.normal_(net.classifier.weight)
        path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
        save_file(net.state_dict(), path)
        return str(path), net.eval()

    return make


def test_an_imagenet_head_is_cut_down_to_the_clients_classes(weight_file):
    path, net = weight_file(1000)
    teacher = timm_teacher(NAME, path, 32, ["tiger_cat", "n01440764", "Tabby"])
    expected = net(teacher.model.normalise(IMAGES))[:, [282, 0, 281]]
    assert torch.allclose(teacher(IMAGES)[0], expected, atol=1e-4)
    assert teacher.model.classes == ["tiger_cat", "n01440764", "Tabby"]


def test_a_head_of_as_many_outputs_is_taken_in_the_clients_order(weight_file):
    path, net = weight_file(3)
    teacher = timm_teacher(NAME, path, 32, ["x", "y", "z"])
    assert torch.allclose(teacher(IMAGES)[0], net(teacher.model.normalise(IMAGES)), atol=1e-4)


@pytest.mark.parametrize(
    ("num_outputs", "classes", "words"),
    [
        (1000, ["tabby", "seven"], "(1000: tench, goldfish"),
        (1000, ["tabby", "crane"], "(2: tabby, crane)"),  # a bird and a machine
        (7, ["x", "y"], "(7: without names"),
    ],
)
def test_a_head_of_other_classes_is_refused(weight_file, num_outputs, classes, words):
    path, _ = weight_file(num_outputs)
    with pytest.raises(ValueError, match="tells other classes apart") as caught:
        timm_teacher(NAME, path, 32, classes)
    assert words in str(caught.value)


def test_weights_without_a_head_or_at_random_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="knows nothing"):
        timm_teacher(NAME, "random", 32, ["a"])
    state = timm.create_model(NAME, num_classes=0).state_dict()
    save_file(state, tmp_path / "headless.safetensors")
    with pytest.raises(WeightsError, match="holds no head"):
        timm_teacher(NAME, str(tmp_path / "headless.safetensors"), 32, ["a"])


def test_the_packaged_weights_bring_their_imagenet_head():
    teacher = timm_teacher("tf_efficientnet_lite0", "auto", 32, ["tench", "goldfish"])
    assert teacher(IMAGES)[0].shape == (5, 2)
    assert teacher.model.net.get_classifier().weight.shape == (2, 1280)
