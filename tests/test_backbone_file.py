import json

import pytest
import torch
from safetensors.torch import load, save

from ecos_pl.backbone import backbone_names, create_backbone
from ecos_pl.backbone_file import backbone_bytes, read_backbone, save_adapted
from ecos_pl.encoder import Encoder, EncoderSpec, describe, public_name

NAME = "mobilenetv3_small_050"
BASE = EncoderSpec(NAME, "random", 32)


def trained(name=NAME, num_classes=3, seed=7, size=32):
    """A network whose weights and statistics have all moved."""
    net = create_backbone(name, "random", image_size=size, num_classes=num_classes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                tensor += 0.01 * torch.rand(tensor.shape, generator=generator)
    return net.eval()


@pytest.mark.parametrize(
    ("name", "size"), [(NAME, 32), ("test_efficientnet", 32), ("resnet18", 32), ("test_vit", 160)]
)
def test_the_encoder_is_that_of_the_rounded_backbone(tmp_path, name, size):
    net = trained(name, size=size)
    spec = save_adapted(net, EncoderSpec(name, "random", size), tmp_path / "b.safetensors")
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8)
    got = Encoder(spec)(images)
    with torch.no_grad():
        for tensor in net.parameters():
            if tensor.ndim > 1:
                tensor.copy_(tensor.half().float())
    net.reset_classifier(0)
    reference = Encoder(EncoderSpec(name, "random", size))
    reference.backbone = net.eval().to(memory_format=torch.channels_last)
    assert torch.equal(got, reference(images))
    assert {p.dtype for p in Encoder(spec).backbone.parameters()} == {torch.float32}


def test_kernels_take_half_the_bytes_and_the_head_stays_behind(tmp_path):
    net = trained(num_classes=1000)
    content = backbone_bytes(net, NAME)
    name, state = read_backbone(content)
    assert name == NAME
    assert set(state) == set(backbone_names(NAME))
    assert not any(key.startswith("classifier") for key in state)
    matrices = [t for t in state.values() if t.ndim > 1]
    assert {t.dtype for t in matrices} == {torch.float16}
    assert {t.dtype for t in state.values() if t.ndim == 1} == {torch.float32}
    full = sum(4 * t.numel() for t in state.values())
    assert 0.5 * full < len(content) < 0.6 * full


def test_equal_weights_give_equal_bytes_whatever_the_head_and_the_layout():
    content = backbone_bytes(trained(), NAME)
    assert backbone_bytes(trained().to(memory_format=torch.channels_last), NAME) == content
    other_head = trained()
    torch.nn.init.ones_(other_head.get_classifier().weight)
    assert backbone_bytes(other_head, NAME) == content
    assert backbone_bytes(trained(seed=8), NAME) != content


def test_both_sides_come_to_one_fingerprint_and_no_path_travels(tmp_path):
    spec = save_adapted(trained(), BASE, tmp_path / "cloud.safetensors")
    copy = tmp_path / "elsewhere" / "kept.safetensors"
    copy.parent.mkdir()
    copy.write_bytes((tmp_path / "cloud.safetensors").read_bytes())
    there = EncoderSpec(NAME, str(copy), 32, adapted=True)
    assert there.fingerprint() == spec.fingerprint() != BASE.fingerprint()
    assert public_name(there) == public_name(spec)
    assert set(public_name(spec)) == {"name", "image_size", "features", "model"}
    assert set(public_name(BASE)) == {"name", "image_size", "features"}
    for text in (describe(spec), str(public_name(spec))):
        assert str(tmp_path) not in text
    assert describe(spec) == f"{NAME} (trained further) at 32 px"
    weights = EncoderSpec(NAME, str(copy), 32)
    assert describe(weights) == f"{NAME} (kept.safetensors) at 32 px"


def test_what_cannot_be_sent_says_why():
    with pytest.raises(ValueError, match="the network is no resnet18: it has no conv1"):
        backbone_bytes(trained(), "resnet18")
    for value in (float("nan"), 1e6):
        net = trained()
        with torch.no_grad():
            net.conv_stem.weight[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"conv_stem.weight is not finite in torch\.float16"):
            backbone_bytes(net, NAME)


CONTENT = backbone_bytes(trained(), NAME)
HEADER = {"ecos_backbone": json.dumps({"format": "ecos_pl backbone 1", "backbone": NAME})}


def changed(**tensors):
    return save({**load(CONTENT), **tensors}, HEADER)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no file of a backbone"),
        (CONTENT[:-1], "no file of a backbone"),
        (b"\x80\x04pickle", "no file of a backbone"),
        (save(load(CONTENT)), "no file of a backbone"),
        (save(load(CONTENT), {"ecos_backbone": "[1]"}), "no file of a backbone"),
        (save(load(CONTENT), {"ecos_backbone": '{"format": 1, "backbone": "x"}'}), "it is no"),
        (changed(x=torch.tensor([float("inf")])), "x holds a value that is not finite"),
        (changed(x=torch.zeros(2, dtype=torch.float64)), "x is of type torch.float64"),
    ],
)
def test_other_files_are_refused_in_one_line(content, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_backbone(content)
    assert "\n" not in str(caught.value)
