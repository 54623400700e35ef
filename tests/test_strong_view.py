import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from datamodules import strong_view as module
from datamodules.strong_view import OPERATIONS, cutout, strong_view

# The table of RandAugment's transformations in the appendix of the FixMatch paper.
PAPER = {
    "autocontrast": (0, 0),
    "brightness": (0.05, 0.95),
    "color": (0.05, 0.95),
    "contrast": (0.05, 0.95),
    "equalize": (0, 0),
    "identity": (0, 0),
    "posterize": (4, 8),
    "rotate": (-30, 30),
    "sharpness": (0.05, 0.95),
    "shear_x": (-0.3, 0.3),
    "shear_y": (-0.3, 0.3),
    "solarize": (0, 1),
    "translate_x": (-0.3, 0.3),
    "translate_y": (-0.3, 0.3),
}


@pytest.fixture
def image():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8, generator=generator)


def test_operations_and_ranges_are_the_papers():
    ours = {name: (low, high) for name, (_, low, high) in OPERATIONS.items()}
    assert ours.pop("posterize") == (4, 9)  # 4 to 8 bits, cut to whole ones
    assert ours == {name: span for name, span in PAPER.items() if name != "posterize"}


def test_operations_do_what_their_names_say(image):
    picture = F.to_pil_image(image)

    def after(name, strength):
        return F.pil_to_tensor(OPERATIONS[name][0](picture, strength))

    assert torch.equal(after("identity", 0), image)
    assert torch.allclose(after("brightness", 0.5).float(), image.float() / 2, atol=1)
    assert (after("color", 0.05).float().std(dim=0) < 10).all()  # nearly grey
    assert after("contrast", 0.05).float().std() < 5
    assert torch.equal(after("posterize", 4.9), image & 0xF0)
    assert torch.equal(after("posterize", 8.99), image)
    assert torch.equal(after("solarize", 0.5), torch.where(image < 128, image, 255 - image))
    assert torch.equal(after("translate_x", 0.25)[:, :, :24], image[:, :, 8:])
    assert torch.equal(after("translate_y", -0.25)[:, 8:], image[:, :24])
    assert (after("translate_x", 0.25)[:, :, 24:] == 127).all()
    assert torch.equal(after("shear_x", 0.25)[:, 0], image[:, 0])  # the first row stays
    assert torch.equal(after("shear_y", 0.25)[:, :, 0], image[:, :, 0])
    assert after("equalize", 0).float().mean() == pytest.approx(127.5, abs=15)
    assert after("autocontrast", 0).max() == 255


def test_rotate_turns_about_the_middle():
    bar = torch.zeros(3, 33, 33, dtype=torch.uint8)
    bar[:, :, 16] = 255
    turned = F.pil_to_tensor(OPERATIONS["rotate"][0](F.to_pil_image(bar), 30))[0]
    rows, columns = torch.nonzero(turned == 255).float().T
    slope = float(((columns - 16) * (rows - 16)).sum() / (rows - 16).square().sum())
    assert abs(slope) == pytest.approx(np.tan(np.pi / 6), abs=0.08)


def test_no_operation_mirrors():
    """Red stays left of green, and above blue, at both ends of every range that moves pixels."""
    marks = torch.zeros(3, 32, 32, dtype=torch.uint8)
    marks[0, 10:13, 10:13] = marks[1, 10:13, 19:22] = marks[2, 19:22, 10:13] = 255
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        operation, low, high = OPERATIONS[name]
        for strength in (low, high):
            moved = F.pil_to_tensor(operation(F.to_pil_image(marks), strength))
            red, green, blue = (torch.nonzero(one == 255).float().mean(dim=0) for one in moved)
            for other, axis in ((green, 1), (blue, 0)):
                assert other.isnan().any() or red.isnan().any() or red[axis] < other[axis], name


def test_cutout_is_a_grey_square_of_half_the_side_at_most(image):
    torch.manual_seed(0)
    areas = []
    for _ in range(300):
        changed = (cutout(image, 16) != image).any(dim=0)
        rows, columns = changed.any(dim=1).sum(), changed.any(dim=0).sum()
        assert rows <= 16
        assert columns <= 16
        areas.append(int(rows * columns))
    assert max(areas) == 256
    assert min(areas) < 150  # cut at the border
    where = cutout(torch.zeros(3, 32, 32, dtype=torch.uint8), 16)
    assert set(where.unique().tolist()) == {0, 127}


def test_strengths_are_uniform_and_operations_applied_half_the_time(image, monkeypatch):
    seen = []

    def note(name, low, high):
        def operation(picture, strength):
            seen.append((name, (strength - low) / (high - low)))
            return picture

        return operation, low, high

    monkeypatch.setattr(module, "OPERATIONS", {str(k): note(str(k), -2.0, 3.0) for k in range(14)})
    torch.manual_seed(0)
    for _ in range(3000):
        strong_view(image)
    assert len(seen) == pytest.approx(3000, rel=0.05)  # two of probability one half
    strengths = np.sort([strength for _, strength in seen])
    gap = np.abs(strengths - (np.arange(len(seen)) + 0.5) / len(seen)).max()
    assert gap < 1.63 / np.sqrt(len(seen))  # Kolmogorov and Smirnov's test, at 1%
    counts = np.unique([name for name, _ in seen], return_counts=True)[1]
    assert len(counts) == 14
    assert counts.max() < 1.35 * counts.min() + 60


def test_the_same_seed_gives_the_same_view(image):
    views = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        views.append(torch.stack([strong_view(image) for _ in range(5)]))
    assert torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])
    assert views[0].dtype == torch.uint8
    assert isinstance(F.to_pil_image(views[0][0]), Image.Image)
