import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from ecos_pl.backbone import WeightsError, create_backbone, packaged_path
from ecos_pl.encoder import Encoder, EncoderSpec, FeaturesError, describe, public_name
from ecos_pl.images import to_tensor

TINY = EncoderSpec("mobilenetv3_small_050", "random", 32)


def noise(num, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, size, size), generator=generator).to(torch.uint8)


@pytest.fixture(scope="module")
def lite():
    return Encoder(EncoderSpec())


@pytest.fixture(scope="module")
def tiny():
    return Encoder(TINY)


def test_dimensions_are_measured(lite, tiny):
    assert lite.num_dims == 1280
    assert tiny.num_dims == 1024
    assert tiny.backbone.num_features == 288  # what timm says
    assert tiny(noise(2, 32)).shape == (2, 1024)


def test_embeddings_are_unit_vectors(lite):
    found = lite(noise(5, 48))
    assert found.dtype == torch.float32
    assert torch.allclose(found.norm(dim=1), torch.ones(5), atol=1e-5)


def test_features_that_are_all_zero_stay_zero():
    encoder = Encoder(TINY)

    class Relu(nn.Module):
        def forward(self, pixels):
            return pixels.mean((2, 3)).clamp_min(0)

    encoder.backbone = Relu()
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    found = encoder(torch.cat([black, 255 - black]))
    assert found[0].tolist() == [0, 0, 0]
    assert float(found[1].norm()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_preprocessing_is_that_of_timm(name):
    size = 48
    encoder = Encoder(EncoderSpec(name, "auto" if "lite" in name else "random", size))
    config = resolve_model_data_config(encoder.backbone)
    config.update(input_size=(3, size, size), crop_pct=1.0, interpolation="bicubic")
    transform = create_transform(**config, is_training=False)
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    smooth = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    for side in (48, 100):
        image = Image.fromarray(smooth).resize((side, side), Image.Resampling.BICUBIC)
        encoder(to_tensor(image, size)[None])
        step = 1.5 / 255 / min(config["std"])  # one grey level and a half
        assert (seen[-1][0] - transform(image)).abs().max() < step
        assert (seen[-1][0] - transform(image)).abs().mean() < step / 5


def test_embedding_is_the_normalised_output_of_the_backbone(lite):
    images = noise(3, 48)
    features = create_backbone("tf_efficientnet_lite0", image_size=48).eval()(
        (images / 255 - 0.5) / 0.5
    )
    expected = features / features.norm(dim=1, keepdim=True)
    assert torch.allclose(lite(images), expected.detach(), atol=1e-5)


def test_it_stays_frozen_and_in_eval_mode(tiny):
    before = tiny(noise(4, 32))
    holder = nn.Sequential(tiny).train()
    assert not any(module.training for module in tiny.modules())
    assert tiny.train() is tiny
    assert not any(parameter.requires_grad for parameter in holder.parameters())
    assert torch.equal(tiny(noise(4, 32)), before)
    assert not before.requires_grad


def test_an_embedding_depends_on_its_own_image_alone(lite):
    images = noise(4, 48)
    alone = torch.cat([lite(image[None]) for image in images])
    assert (lite(images) - alone).abs().max() < 1e-5
    assert (lite(images.flip(0)).flip(0) - alone).abs().max() < 1e-5
    other = torch.cat([images[:1], torch.full_like(images[1:], 255)])
    assert (lite(other)[0] - alone[0]).abs().max() < 1e-5


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = Encoder(TINY)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(Encoder(TINY)(noise(2, 32)), one(noise(2, 32)))


def test_fingerprints_differ_where_embeddings_do(tmp_path):
    copy = tmp_path / "copy.pth"
    shutil.copy(packaged_path(), copy)
    spec = EncoderSpec()
    fingerprint = spec.fingerprint()
    assert len(fingerprint) == 64
    assert fingerprint == EncoderSpec().fingerprint()
    assert fingerprint == EncoderSpec(weights="packaged").fingerprint()
    assert fingerprint == EncoderSpec(weights=str(copy)).fingerprint()
    save_file({"a": torch.zeros(1)}, copy)
    others = [
        EncoderSpec(image_size=64),
        EncoderSpec(weights="random"),
        EncoderSpec(weights=str(copy)),
        TINY,
        EncoderSpec("mobilenetv3_small_075", str(copy), 48),
        EncoderSpec("mobilenetv3_small_050", str(copy), 48),
    ]
    assert len({fingerprint, *(other.fingerprint() for other in others)}) == 7


def test_a_copied_weight_file_embeds_alike(lite, tmp_path):
    copy = tmp_path / "copy.pth"
    shutil.copy(packaged_path(), copy)
    assert torch.equal(Encoder(EncoderSpec(weights=str(copy)))(noise(2, 48)), lite(noise(2, 48)))


def test_mistakes_are_told_when_the_encoder_is_made():
    with pytest.raises(WeightsError, match="no weight file"):
        Encoder(EncoderSpec(weights="/no/such/file"))
    with pytest.raises(WeightsError, match="did you mean"):
        EncoderSpec("resnet_18").fingerprint()


def test_description():
    assert describe(EncoderSpec()) == "tf_efficientnet_lite0 (auto) at 48 px"
    assert timm.is_model(EncoderSpec().name)


@pytest.mark.parametrize(
    ("name", "size"),
    [("tf_efficientnet_lite0", 48), ("mobilenetv3_small_050", 64), ("resnet18", 96)],
)
def test_grid_features_are_timms_last_map_of_stride_16(name, size):
    weights = "auto" if name == "tf_efficientnet_lite0" else "random"
    encoder = Encoder(EncoderSpec(name, weights, size, "grid"))
    images = noise(3, size)
    pixels = (images.float() - encoder.mean) / encoder.std
    maps = timm.create_model(name, features_only=True)  # timm's own way to the same maps
    missing, _ = maps.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert not [key for key in missing if "num_batches" not in key]
    with torch.inference_mode():
        (grid,) = [
            found
            for found, stride in zip(
                maps.eval()(pixels), maps.feature_info.reduction(), strict=True
            )
            if stride == 16
        ]
        cells = nn.functional.adaptive_avg_pool2d(grid, 3).flatten(1)
    expected = nn.functional.normalize(cells, dim=1)
    assert torch.allclose(encoder(images), expected, atol=1e-5)
    assert encoder.num_dims == 9 * grid.shape[1]


def test_a_transformer_has_a_grid_too():
    encoder = Encoder(EncoderSpec("vit_tiny_patch16_224", "random", 64, "grid"))
    assert encoder.num_dims == 9 * 192
    assert encoder(noise(2, 64)).shape == (2, 9 * 192)


def test_an_encoder_without_a_fine_map_says_what_to_take():
    with pytest.raises(FeaturesError, match="take features=final"):
        Encoder(EncoderSpec("vit_small_patch32_224", "random", 64, "grid"))
    with pytest.raises(FeaturesError, match="there are final, grid"):
        EncoderSpec(features="girds")


def test_features_are_in_the_key_and_the_public_name_and_not_in_the_fingerprint():
    final, grid = EncoderSpec(), EncoderSpec(features="grid")
    assert final.fingerprint() == grid.fingerprint()
    assert final.key != grid.key
    assert public_name(grid) == {
        "name": "tf_efficientnet_lite0",
        "image_size": 48,
        "features": "grid",
    }


def test_a_grid_embedding_depends_on_its_own_image_alone():
    encoder = Encoder(EncoderSpec(features="grid"))
    images = noise(6, 48)
    whole = encoder(images)
    images[1:] = 0
    assert torch.allclose(encoder(images)[0], whole[0], atol=1e-6)
