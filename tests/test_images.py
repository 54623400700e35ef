import contextlib
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from ecos_pl.images import (
    PoolPart,
    UnreadableImage,
    decode_image,
    list_folder,
    read_image,
    scan_folder,
    to_tensor,
    upright_rgb,
)

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.stack([RAMP, 255 - RAMP, RAMP.T], axis=-1)
ALPHA = RAMP.T.copy()


def read_array(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(levels)[:, :, None], 3, axis=2).astype(int)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[:, :, None] / 255
    return colour * share + 255 * (1 - share)


# --- decoding ---


def test_rgb_and_grey_come_back_as_they_are(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "rgb.png")
    Image.fromarray(RAMP).save(tmp_path / "grey.png")
    assert (read_array(tmp_path / "rgb.png") == RGB).all()
    assert (read_array(tmp_path / "grey.png") == grey(RAMP)).all()


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(RAMP > 100).save(tmp_path / "x.png")
    assert (read_array(tmp_path / "x.png") == grey((RAMP > 100) * 255)).all()


def test_palette(tmp_path: Path) -> None:
    image = Image.new("P", (16, 16))
    image.putdata(RAMP.ravel().tolist())
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    image.putpalette(colours.tobytes())
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=7)
    assert (read_array(tmp_path / "opaque.png") == colours[RAMP]).all()
    colours[7] = 255
    assert (read_array(tmp_path / "clear.png") == colours[RAMP]).all()


def test_palette_with_alpha_per_colour(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putdata([0, 1])
    image.putpalette([0, 0, 0, 0, 0, 0])
    image.save(tmp_path / "x.png", transparency=bytes([255, 51]))
    assert read_array(tmp_path / "x.png")[0].tolist() == [[0] * 3, [204] * 3]


def test_alpha_shows_a_white_page(tmp_path: Path) -> None:
    Image.fromarray(np.dstack([RGB, ALPHA])).save(tmp_path / "rgba.png")
    Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(ALPHA)]).save(tmp_path / "la.png")
    assert np.abs(read_array(tmp_path / "rgba.png") - on_white(RGB, ALPHA)).max() <= 1
    assert np.abs(read_array(tmp_path / "la.png") - on_white(grey(RAMP), ALPHA)).max() <= 1


def test_one_transparent_grey_level_or_colour(tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "grey.png", transparency=3)
    Image.fromarray(RGB).save(tmp_path / "rgb.png", transparency=tuple(RGB[0, 0].tolist()))
    assert (read_array(tmp_path / "grey.png") == grey(np.where(RAMP == 3, 255, RAMP))).all()
    assert read_array(tmp_path / "rgb.png")[0, 0].tolist() == [255, 255, 255]
    assert (read_array(tmp_path / "rgb.png")[1:] == RGB[1:]).all()


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    levels = RAMP.astype(np.uint16) * 257
    Image.fromarray(levels).save(tmp_path / "x.png")
    Image.fromarray(levels).save(tmp_path / "x.tif")
    (tmp_path / "big_endian.png").write_bytes(png_16_bit(levels))
    with Image.open(tmp_path / "x.tif") as image:
        assert image.mode.startswith("I;16")
    for name in ("x.png", "x.tif", "big_endian.png"):
        assert (read_array(tmp_path / name) == grey(RAMP)).all()


def png_16_bit(levels: np.ndarray) -> bytes:
    """A grey PNG written by hand, so that not only Pillow's own files are tried."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    height, width = levels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_32_bit_integers(tmp_path: Path) -> None:
    sixteen = RAMP.astype(np.int32) * 257
    Image.fromarray(sixteen).save(tmp_path / "sixteen.tif")
    Image.fromarray(sixteen * 1000 - 5).save(tmp_path / "more.tif")
    with Image.open(tmp_path / "more.tif") as image:
        assert image.mode == "I"
    assert (read_array(tmp_path / "sixteen.tif") == grey(RAMP)).all()
    assert (read_array(tmp_path / "more.tif") == grey(RAMP)).all()  # own range stretched


@pytest.mark.parametrize(("scale", "shift"), [(1 / 255, 0), (1, 0), (40, -70)])
def test_floats(tmp_path: Path, scale: float, shift: float) -> None:
    Image.fromarray((RAMP * np.float32(scale) + shift).astype(np.float32)).save(tmp_path / "x.tif")
    assert (read_array(tmp_path / "x.tif") == grey(RAMP)).all()


def test_floats_not_finite_are_black(tmp_path: Path) -> None:
    levels = np.array([[0.5, np.nan, np.inf, 1.0]], dtype=np.float32)
    Image.fromarray(levels).save(tmp_path / "x.tif")
    assert read_array(tmp_path / "x.tif")[0, :, 0].tolist() == [128, 0, 0, 255]


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    assert np.abs(read_array(tmp_path / "red.jpg") - [255, 0, 0]).max() <= 3


def test_exif_orientation_is_undone(tmp_path: Path) -> None:
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :16, 0] = 255  # red on the left; orientation 6 turns left to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "x.jpg", exif=exif, quality=100, subsampling=0)
    upright = read_array(tmp_path / "x.jpg")
    assert upright.shape == (32, 16, 3)
    assert upright[:15, :, 0].min() > 250
    assert upright[17:].max() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_equals_pillow(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB[:, :9]).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert (read_array(tmp_path / "x.png") == expected).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_no_obstacle(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.jpg", exif=b"Exif\0\0MM\0*\0\0\xff\xff")
    assert read_array(tmp_path / "x.jpg").shape == (16, 16, 3)


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "header.jpg").write_bytes(whole[:10])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image\nat all")
    Image.fromarray(noise).save(tmp_path / "broken.png")
    broken = bytearray((tmp_path / "broken.png").read_bytes())
    broken[60:80] = bytes(20)
    (tmp_path / "broken.png").write_bytes(broken)
    (tmp_path / "folder.png").mkdir()
    reasons = {
        "truncated.jpg": "truncated",
        "header.jpg": "cannot read",
        "empty.png": "empty",
        "text.png": "not an image",
        "broken.png": "cannot read",
        "missing.png": "No such file",
        "folder.png": "Is a directory",
    }
    for name, reason in reasons.items():
        with pytest.raises(UnreadableImage, match=reason) as caught:
            read_image(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # whole.jpg has 4,096
    with pytest.raises(UnreadableImage, match="bomb"):
        read_image(tmp_path / "whole.jpg")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
def test_any_cut_of_a_file_is_read_or_refused(tmp_path: Path) -> None:
    for kind in ("png", "jpg", "gif", "tif", "bmp", "webp"):
        path = tmp_path / f"x.{kind}"
        Image.fromarray(RGB).save(path)
        content = path.read_bytes()
        for end in range(0, len(content), max(1, len(content) // 40)):
            path.write_bytes(content[:end])
            with contextlib.suppress(UnreadableImage):  # any other exception fails the test
                assert read_image(path).size == (16, 16)


def test_bytes_are_decoded_as_files_are(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(np.dstack([RGB, ALPHA])).save(path)
    content = path.read_bytes()
    assert (np.asarray(decode_image(content, "x")) == read_array(path)).all()
    with Image.open(path) as image:
        assert (np.asarray(upright_rgb(image)) == read_array(path)).all()
    for damaged, reason in (
        (b"", "empty"),
        (content[: len(content) // 2], "cannot read"),
        (b"text", "not an"),
    ):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            decode_image(damaged, "0.tar/x.png")
        assert "'0.tar/x.png'" in str(caught.value)
        assert "\n" not in str(caught.value)


# --- tensors ---


@pytest.mark.parametrize("size", [(28, 28), (8, 8), (100, 37), (37, 100), (33, 32), (500, 333)])
@pytest.mark.parametrize("image_size", [48, 31])
def test_to_tensor_equals_torchvision(size: tuple[int, int], image_size: int) -> None:
    # Mid greys: where bicubic overshoot is clipped, the order of Pillow's passes shows.
    pixels = np.random.default_rng(0).integers(64, 192, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    resized = reference.resize(image, [image_size], InterpolationMode.BICUBIC, antialias=True)
    expected = reference.pil_to_tensor(reference.center_crop(resized, [image_size]))
    tensor = to_tensor(image, image_size)
    assert tensor.shape == (3, image_size, image_size)
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    assert (tensor.int() - expected.int()).abs().max() <= (0 if size[0] == size[1] else 2)


def test_to_tensor_keeps_pixels_of_the_right_size_and_channel_order() -> None:
    assert (to_tensor(Image.fromarray(RGB), 16).permute(1, 2, 0).numpy() == RGB).all()


def test_to_tensor_of_a_thin_strip() -> None:
    strip = Image.new("RGB", (20_000, 1), (10, 20, 30))
    for image in (strip, strip.transpose(Image.Transpose.ROTATE_90)):
        tensor = to_tensor(image, 64)
        assert tensor.flatten(1).amin(1).tolist() == [10, 20, 30]
        assert tensor.flatten(1).amax(1).tolist() == [10, 20, 30]


# --- folders ---


def make_images(root: Path, *relative: str) -> None:
    for i, name in enumerate(relative):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * i)  # scanning does not decode


def test_scan_finds_classes_and_domains(tmp_path: Path) -> None:
    make_images(
        tmp_path,
        *("b/x.png", "a/cat/2.JPG", "a/cat/10.jpeg", "flat.webp", "deep/er/a/dog/x.TIFF"),
        *("a/cat/notes.txt", ".hidden.png", ".cache/x.png", "a/.git/x.png", "folder.png/x.gif"),
    )
    source = scan_folder(tmp_path)
    assert list(zip(source.ids, source.domains, source.labels, strict=True)) == [
        ("a/cat/10.jpeg", "a", "cat"),
        ("a/cat/2.JPG", "a", "cat"),
        ("b/x.png", None, "b"),
        ("deep/er/a/dog/x.TIFF", "a", "dog"),
        ("flat.webp", None, None),
        ("folder.png/x.gif", None, "folder.png"),
    ]
    assert len(source) == len(set(source.ids)) == 6
    assert source.name == str(tmp_path)


def test_a_folder_stands_among_files_where_its_paths_sort(tmp_path: Path) -> None:
    make_images(tmp_path, "a.png", "a/x.png", "a0.png", "b.png", "b.png.png", "c/x.png", "a-/x.png")
    entries = list_folder(str(tmp_path))
    names = [[e.name for e in run] if isinstance(run, list) else run for run in entries.in_order()]
    assert names == ["a-", ["a.png"], "a", ["a0.png", "b.png", "b.png.png"], "c"]
    assert not entries.has_dead_links
    assert scan_folder(tmp_path).ids == sorted(scan_folder(tmp_path).ids)


def test_a_folder_is_one_part(tmp_path: Path) -> None:
    make_images(tmp_path / "pool", "a/x.png", "a/y.png")
    source = scan_folder(tmp_path / "pool")
    assert source.parts == [PoolPart("pool", None, 0, 2, source.fingerprint)]


def test_scan_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    make_images(tmp_path, "pool/a/x.png", "elsewhere/y.png")
    pool = tmp_path / "pool"
    (pool / "a/up").symlink_to(pool)
    (pool / "self").symlink_to(pool / "self")
    (pool / "dead.png").symlink_to(pool / "nothing.png")
    (pool / "b").symlink_to(tmp_path / "elsewhere")
    (pool / "z.png").symlink_to(pool / "a/x.png")
    os.mkfifo(pool / "pipe.png")
    assert scan_folder(pool).ids == ["a/x.png", "b/y.png", "z.png"]


def test_fingerprint_follows_the_files(tmp_path: Path) -> None:
    make_images(tmp_path / "pool", "a/x.png", "a/y.png")
    pool = tmp_path / "pool"
    first = scan_folder(pool)
    assert scan_folder(pool) == first
    assert len(bytes.fromhex(first.fingerprint)) == 32
    shutil.copytree(pool, tmp_path / "copy")  # keeps times
    assert scan_folder(tmp_path / "copy").fingerprint == first.fingerprint
    (pool / "notes.txt").write_text("not part of the pool")
    assert scan_folder(pool).fingerprint == first.fingerprint
    seen = {first.fingerprint}
    os.utime(pool / "a/x.png", ns=(1, 1))
    seen.add(scan_folder(pool).fingerprint)
    (pool / "a/y.png").rename(pool / "a/z.png")
    seen.add(scan_folder(pool).fingerprint)
    (pool / "a/z.png").unlink()
    seen.add(scan_folder(pool).fingerprint)
    assert len(seen) == 4


def test_source_reads_after_pickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(RGB).save(tmp_path / "a/x.png")
    monkeypatch.chdir(tmp_path)
    source = pickle.loads(pickle.dumps(scan_folder(Path("."))))
    monkeypatch.chdir("/")
    assert (np.asarray(source.read(0)) == RGB).all()
    assert "1 images" in repr(source)


def test_scan_refuses_in_one_line(tmp_path: Path) -> None:
    make_images(tmp_path, "file.png", "empty/notes.txt")
    for folder, reason in [
        ("missing", "does not exist"),
        ("file.png", "is a file"),
        ("empty", "no images below"),
    ]:
        with pytest.raises(ValueError, match=reason) as caught:
            scan_folder(tmp_path / folder)
        assert folder in str(caught.value)
        assert "\n" not in str(caught.value)


def test_scan_refuses_names_that_are_not_utf_8(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    with pytest.raises(ValueError, match="not UTF-8"):
        scan_folder(tmp_path)
