"""Transfer images: fixed views, weights, and the teacher's answers on disk."""

from __future__ import annotations

import pytest
import torch
from rank_processes import run_ranks
from torch.utils.data import DataLoader

from datamodules.folder import folder_data
from datamodules.proxy import LabelledImages
from datamodules.transfer import TransferImages, teacher_logits
from ecos_pl.classifier import Classifier
from ecos_pl.teacher import FrozenTeacher


@pytest.fixture
def source(image_tree):
    return folder_data(image_tree / "pool", image_tree / "client").pool


@pytest.fixture(scope="module")
def teacher():
    model = Classifier.create(
        ["a", "b"], backbone="test_efficientnet", weights="random", image_size=32, seed=3
    )
    torch.nn.init.normal_(model.net.get_classifier().weight)
    return FrozenTeacher(model)


def transfer(source, indices=(3, 1, 4, 150), augment="affine", **options):
    images = LabelledImages(
        source, list(indices), torch.eye(4, 2), torch.ones(len(indices)), 24, augment
    )
    return TransferImages(images, torch.tensor([1.0, 0.0, 0.5, 0.0]), **options)


def test_images_without_labels_count_and_unreadable_ones_do_not(source):
    broken = [i for i, name in enumerate(source.ids) if name.endswith("broken.png")]
    images = transfer(source, [3, 1, 4, *broken])
    weights = [(float(label), float(weight)) for _, _, label, weight, _ in images]
    assert weights == [(1, 1), (0, 1), (0.5, 1), (0, 0)]
    assert all(logits.shape == (0,) for *_, logits in images)


def test_fixed_views_are_always_the_same_and_differ_from_each_other(source):
    images, again = (transfer(source, num_views=3, seed=5) for _ in range(2))
    other = transfer(source, num_views=3, seed=6)
    state = torch.get_rng_state()
    views = [images.view(0, number)[0] for number in range(3)]
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)
    assert all(torch.equal(views[number], again.view(0, number)[0]) for number in range(3))
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], other.view(0, 0)[0])
    drawn = [images[0][0] for _ in range(40)]
    which = [[torch.equal(image, view) for view in views].index(True) for image in drawn]
    assert set(which) == {0, 1, 2}


def test_every_view_has_the_teachers_answer_to_it(source, teacher, tmp_path):
    images = transfer(source, num_views=3)
    images.logits = teacher_logits(teacher, images, "facts", tmp_path, batch_size=3)
    assert images.logits.shape == (4, 3, 2)
    for _ in range(5):
        views, _, _, _, logits = next(iter(DataLoader(images, 4)))
        assert torch.allclose(teacher(views)[0], logits, atol=1e-4)


def test_answers_are_read_again_and_more_views_only_add(source, teacher, tmp_path, monkeypatch):
    asked = []
    ask = FrozenTeacher.__call__

    def counted(self, images):
        asked.append(len(images))
        return ask(self, images)

    monkeypatch.setattr(FrozenTeacher, "__call__", counted)
    two = teacher_logits(teacher, transfer(source, num_views=2), "facts", tmp_path)
    assert sum(asked) == 8
    three = teacher_logits(teacher, transfer(source, num_views=3), "facts", tmp_path)
    assert sum(asked) == 12
    assert torch.equal(three[:, :2], two)
    again = teacher_logits(teacher, transfer(source, num_views=2), "facts", tmp_path)
    assert sum(asked) == 12
    assert torch.equal(again, two)
    for changed in ({"facts": "others"}, {"seed": 9}):
        images = transfer(source, num_views=1, seed=changed.get("seed", 0))
        teacher_logits(teacher, images, changed.get("facts", "facts"), tmp_path)
    assert sum(asked) == 20


def test_a_damaged_file_of_answers_is_named(source, teacher, tmp_path):
    teacher_logits(teacher, transfer(source, num_views=1), "facts", tmp_path)
    (path,) = tmp_path.rglob("view-*.safetensors")
    path.write_bytes(b"half")
    with pytest.raises(ValueError, match=r"view-0000\.safetensors cannot be read .*remove it"):
        teacher_logits(teacher, transfer(source, num_views=1), "facts", tmp_path)


SHARED = """
from torch.utils.data import TensorDataset
from datamodules.transfer import TransferImages, teacher_logits
from ecos_pl.classifier import Classifier
from ecos_pl.ranks import Ranks
from ecos_pl.teacher import FrozenTeacher
generator = torch.Generator().manual_seed(0)
views = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=generator)
model = Classifier.create("ab", backbone="test_efficientnet", weights="random", image_size=32)
torch.nn.init.normal_(model.net.get_classifier().weight, generator=generator)
images = TransferImages(TensorDataset(views, torch.eye(5, 2), torch.ones(5)), torch.ones(5),
                        num_views=2)
with Ranks.of_processes() as ranks:
    found = teacher_logits(FrozenTeacher(model), images, world_size, folder, ranks=ranks)
print([round(x, 3) for x in found.flatten().tolist()])
"""


@pytest.mark.slow
def test_ranks_share_the_asking(tmp_path):
    (alone,) = run_ranks(SHARED, 1, tmp_path)
    assert run_ranks(SHARED, 2, tmp_path) == [alone, alone]
