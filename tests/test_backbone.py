import pickle
import shutil

import huggingface_hub.constants as hub_constants
import pytest
import torch
from huggingface_hub import hf_hub_url
from safetensors.torch import save_file

from ecos_pl import backbone
from ecos_pl.backbone import (
    PACKAGED,
    WeightsError,
    create_backbone,
    packaged_path,
    pixel_statistics,
    weights_hash,
    weights_path,
)

TINY = "mobilenetv3_small_050"


def values(state):
    return [v for k, v in state.items() if not k.endswith("num_batches_tracked")]


@pytest.fixture(scope="module")
def tiny():
    """A small network that no file or seed 0 gives."""
    return create_backbone(TINY, "random", image_size=32, num_classes=1000, seed=11)


@pytest.fixture
def tiny_file(tiny, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file({k: v.contiguous() for k, v in tiny.state_dict().items()}, path)
    return path


def refusal(*args, **kwargs):
    with pytest.raises(WeightsError) as caught:
        create_backbone(*args, **{"image_size": 32, **kwargs})
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- packaged ------------------------------------------------------------------------------------


def test_packaged_weights_are_those_of_the_file_in_order():
    file = torch.load(packaged_path(), map_location="cpu", weights_only=True)
    model = create_backbone(PACKAGED, image_size=48, num_classes=1000)
    found, expected = values(model.state_dict()), values(file)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))
    logits = model.eval()(torch.zeros(2, 3, 48, 48))
    assert logits.shape == (2, 1000)
    assert logits.isfinite().all()
    features = create_backbone(PACKAGED, "packaged", image_size=48)
    assert all(
        torch.equal(a, b) for a, b in zip(values(features.state_dict()), expected, strict=False)
    )


def test_a_fresh_head_follows_its_seed():
    one, again, other = (
        create_backbone(PACKAGED, image_size=48, num_classes=10, seed=seed) for seed in (1, 1, 2)
    )
    assert one.get_classifier().weight.shape == (10, 1280)
    assert torch.equal(one.get_classifier().weight, again.get_classifier().weight)
    assert not torch.equal(one.get_classifier().weight, other.get_classifier().weight)
    assert torch.equal(one.conv_stem.weight, other.conv_stem.weight)


def test_a_copy_of_the_packaged_file_gives_the_same_network(tmp_path):
    copy = tmp_path / "copy.pth"
    shutil.copy(packaged_path(), copy)
    one = create_backbone(PACKAGED, image_size=48).state_dict()
    other = create_backbone(PACKAGED, str(copy), image_size=48).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert weights_hash(PACKAGED, str(copy)) == weights_hash(PACKAGED, "auto")


def test_packaged_weights_of_another_architecture():
    assert f"exist for {PACKAGED} only, not for resnet18" in refusal("resnet18", "packaged")


def test_a_damaged_installation_is_noticed(monkeypatch, tiny_file):
    monkeypatch.setattr(backbone, "packaged_path", lambda: tiny_file)
    assert "not the expected EfficientNet-Lite0" in refusal(PACKAGED)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["random", "pretrained", "auto", "/no/such/file"])
def test_unknown_names_get_a_suggestion(weights):
    assert "did you mean resnet18?" in refusal("resnet_18", weights)
    assert "did you mean resnet18" in refusal("resnet18.a1_in1kk", weights)
    assert "did you mean" not in refusal("##", weights)


def test_pixel_statistics():
    assert pixel_statistics(PACKAGED) == ([0.5] * 3, [0.5] * 3)
    assert pixel_statistics("resnet18")[0] == pytest.approx([0.485, 0.456, 0.406])
    with pytest.raises(WeightsError, match="resnet18"):
        pixel_statistics("resnet_18")


# --- random --------------------------------------------------------------------------------------


def test_random_weights_follow_their_seed_and_no_global_generator():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = create_backbone(TINY, "random", image_size=32, seed=5).state_dict()
    create_backbone(PACKAGED, image_size=32, num_classes=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = create_backbone(TINY, "random", image_size=32, seed=5).state_dict()
    other = create_backbone(TINY, "random", image_size=32, seed=6).state_dict()
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not torch.equal(one["conv_stem.weight"], other["conv_stem.weight"])
    assert weights_path(TINY, "random") is None


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [0, 10, 1000])
def test_a_file_is_loaded(tiny, tiny_file, num_classes):
    model = create_backbone(TINY, str(tiny_file), image_size=32, num_classes=num_classes)
    expected = tiny.state_dict()
    for key, tensor in model.state_dict().items():
        if not key.startswith("classifier") or num_classes == 1000:
            assert torch.equal(tensor, expected[key]), key
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, num_classes or 1024)


@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_pickled_state_dicts_are_loaded(tiny, tmp_path, wrapping):
    state = tiny.state_dict()
    torch.save({wrapping: state, "epoch": 3} if wrapping else state, tmp_path / "tiny.pth")
    model = create_backbone(TINY, str(tmp_path / "tiny.pth"), image_size=32)
    assert torch.equal(model.state_dict()["conv_stem.weight"], state["conv_stem.weight"])


def test_a_missing_file():
    assert refusal(TINY, "/no/such/file.pth").startswith("no weight file at /no/such/file.pth")
    assert "auto, packaged, pretrained, random or a file" in refusal(TINY, "pretained")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"PK\x03\x04" + b"\0" * 50])
def test_garbage_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert refusal(TINY, str(path)).startswith(f"{path} is not a readable weight file")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_pickle_is_not_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    for write in (torch.save, lambda value, where: where.write_bytes(pickle.dumps(value))):
        write({"conv_stem.weight": Evil()}, path)
        assert "is not a readable weight file" in refusal(TINY, str(path))
        assert not marker.exists()


def test_something_else_than_a_state_dict(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    assert "holds no state dict" in refusal(TINY, str(tmp_path / "list.pth"))
    torch.save({"a": 3}, tmp_path / "dict.pth")
    assert "holds no state dict" in refusal(TINY, str(tmp_path / "dict.pth"))


@pytest.mark.parametrize("num_classes", [0, 10, 1000])
def test_weights_of_another_architecture_are_refused(tiny_file, num_classes):
    for name in ("resnet10t", PACKAGED, "mobilenetv3_small_075"):
        reason = refusal(name, str(tiny_file), num_classes=num_classes)
        assert f"does not hold weights of {name}" in reason


@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize(
    "absent", ["conv_stem.weight", "blocks.0.0.bn1.running_mean", "bn1.weight"]
)
def test_a_file_without_one_of_the_weights_is_refused(tiny, tmp_path, absent, num_classes):
    """timm would leave it at random without a word: the encoder would not be what it claims."""
    state = {k: v.contiguous() for k, v in tiny.state_dict().items() if k != absent}
    if absent == "bn1.weight":  # the only one of this architecture has another name
        state = {k: v for k, v in state.items() if k != "blocks.0.0.bn1.weight"}
    save_file(state, tmp_path / "part.safetensors")
    reason = refusal(TINY, str(tmp_path / "part.safetensors"), num_classes=num_classes)
    assert f"does not hold weights of {TINY}: it has no" in reason


def test_weights_hash(tiny_file, tmp_path):
    copy = tmp_path / "elsewhere.safetensors"
    shutil.copy(tiny_file, copy)
    assert weights_hash(TINY, str(copy)) == weights_hash(TINY, str(tiny_file))
    assert weights_hash(TINY, "random") == weights_hash(TINY, "random")
    others = {weights_hash(TINY, str(tiny_file)), weights_hash(TINY, "random")}
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert len({*others, weights_hash(TINY, str(copy)), weights_hash(PACKAGED, "auto")}) == 4


# --- vision transformers -------------------------------------------------------------------------


def test_a_transformer_gets_its_image_size(tmp_path):
    name = "vit_tiny_patch16_224"
    model = create_backbone(name, "random", image_size=48)
    assert model.eval()(torch.zeros(1, 3, 48, 48)).shape == (1, 192)
    assert model.pos_embed.shape[1] == 1 + 3 * 3
    full = create_backbone(name, "random", image_size=224, num_classes=1000, seed=3)
    save_file({k: v.contiguous() for k, v in full.state_dict().items()}, tmp_path / "v.safetensors")
    small = create_backbone(name, str(tmp_path / "v.safetensors"), image_size=48)
    assert small.pos_embed.shape[1] == 10  # resampled from 197
    assert torch.equal(small.blocks[3].attn.qkv.weight, full.blocks[3].attn.qkv.weight)


# --- the hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_out_of_reach_is_told_quickly(monkeypatch, tmp_path, offline):
    """Offline by setting, or with nobody listening: port 9 of this machine."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert hf_hub_url("a/b", "c").startswith("http://127.0.0.1:9/a/b/")
    retried: list[str] = []  # this call alone goes on for most of a minute: it must not be reached
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: retried.append(names[1]))
    reason = refusal("resnet10t", "pretrained")
    assert not retried
    assert "resnet10t" in reason
    assert f"give a weight file, weights=random, or name={PACKAGED}" in reason
    assert refusal("resnet10t") == reason  # auto


def test_a_file_in_the_hub_cache_is_used(monkeypatch, tmp_path, tiny, tiny_file):
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "models--timm--mobilenetv3_small_050.lamb_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    shutil.copy(tiny_file, folder / "snapshots" / "abc" / "model.safetensors")
    model = create_backbone(TINY, "pretrained", image_size=32)
    found = model.state_dict()["conv_stem.weight"]
    assert torch.equal(found, tiny.state_dict()["conv_stem.weight"])


def test_an_architecture_without_pretrained_weights():
    assert "give weights=random or =FILE" in refusal("botnet50ts_256", "pretrained")
