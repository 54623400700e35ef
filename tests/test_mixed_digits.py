import hashlib
import importlib.util
import inspect
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits, load_sample_images

from datamodules.mixed_digits import ASSET, DIGITS, FONTS, GARMENTS, _font, mixed_digits
from ecos_pl.images import ImageSource

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/make_mixed_digits.py"
TORCHVISION_DATA = ROOT.parent / "shared/data"


def sources() -> dict[str, ImageSource]:
    scenario = mixed_digits()
    return {
        "pool": scenario.pool,
        "client_train": scenario.client_train,
        "client_test": scenario.client_test,
    }


def pixel_hash(source: ImageSource, step: int = 23) -> str:
    digest = hashlib.sha256()
    for i in range(0, len(source), step):
        digest.update(source.read(i).tobytes())
    return digest.hexdigest()


def test_counts() -> None:
    scenario = mixed_digits()
    assert Counter(scenario.pool.domains) == {
        "mnist": 2000,
        "mnist_photo": 3000,
        "uci": 1797,
        "font": 2200,
        "fashion": 5000,
    }
    assert len(scenario.client_train) == 1000
    assert len(scenario.client_test) == 2000
    assert scenario.client_domain == "mnist"
    assert scenario.classes == [*"0123456789"]


def test_asset_is_small() -> None:
    assert ASSET.stat().st_size <= 4_000_000


def test_ids_say_domain_and_class() -> None:
    for name, source in sources().items():
        assert source.name == f"mixed_digits/{name}"
        assert len(set(source.ids)) == len(source) == len(source.labels) == len(source.domains)
        parts = [identifier.split("/") for identifier in source.ids]
        assert [domain for domain, _, _ in parts] == list(source.domains)
        assert [label for _, label, _ in parts] == list(source.labels)
        assert all(len(number) == 5 and number.isdigit() for _, _, number in parts)
        for domain, label in zip(source.domains, source.labels, strict=True):
            assert label in (GARMENTS if domain == "fashion" else DIGITS)
    ids = [identifier for source in sources().values() for identifier in source.ids]
    assert len(set(ids)) == len(ids)  # across the parts too


def test_every_domain_has_every_class() -> None:
    for source in sources().values():
        counts = Counter(zip(source.domains, source.labels, strict=True))
        assert len(counts) == 10 * len(set(source.domains))
        assert min(counts.values()) >= 0.07 * min(Counter(source.domains).values())


def test_no_mnist_image_is_in_two_parts() -> None:
    with np.load(ASSET) as arrays:
        rows = [
            image.tobytes()
            for part in ("pool", "blend", "client_train", "client_test")
            for image in arrays[f"{part}_images"]
        ]
    assert len(rows) == 8000
    assert len(set(rows)) == 8000


def test_images_are_rgb_at_their_own_size() -> None:
    pool = mixed_digits().pool
    for index in range(0, len(pool), 97):
        image = pool.read(index)
        assert image.mode == "RGB"
        assert image.size == ((8, 8) if pool.domains[index] == "uci" else (28, 28))


def test_sources_read_what_the_files_hold() -> None:
    pool, client = mixed_digits().pool, mixed_digits().client_train
    with np.load(ASSET) as arrays:
        assert (np.asarray(client.read(5))[:, :, 1] == arrays["client_train_images"][5]).all()
        fashion = arrays["fashion_images"][-1]
    assert (np.asarray(pool.read(len(pool) - 1))[:, :, 2] == fashion).all()
    digits = load_digits()
    first = pool.domains.index("uci")
    assert pool.labels[first : first + 1797] == [str(digit) for digit in digits.target]
    for i in (0, 1, 1796):
        grey = np.asarray(pool.read(first + i))[:, :, 0]
        assert np.abs(grey - digits.images[i] * 255 / 16).max() <= 0.5


def test_photo_shows_through_where_there_is_no_ink() -> None:
    pool = mixed_digits().pool
    with np.load(ASSET) as arrays:
        digit = arrays["blend_images"][0]
    blended = np.asarray(pool.read(pool.domains.index("mnist_photo"))).astype(int)
    patches = [
        photo[top : top + 28, left : left + 28].astype(int)
        for photo in load_sample_images().images
        for top, left in np.argwhere((photo[:400, :613] == blended[0, 0]).all(axis=2))
    ]
    patch = next(patch for patch in patches if (patch == blended)[digit == 0].all())
    assert (blended == np.abs(patch - digit[:, :, None].astype(int))).all()


def test_every_font_has_ten_different_digits() -> None:
    for name in FONTS:
        glyphs = {bytes(_font(name, 40).getmask(digit)) for digit in DIGITS}
        assert len(glyphs) == 10, name


def test_font_digits_are_legible() -> None:
    pool = mixed_digits().pool
    for index in range(len(pool)):
        if pool.domains[index] == "font" and index % 5 == 0:
            grey = np.asarray(pool.read(index).convert("L")).astype(int)
            assert np.ptp(grey) >= 60  # ink differs from paper
            edge = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
            assert np.ptp(edge) <= 10  # and lies within the picture


def test_same_pixels_in_this_process_pickled_and_in_another() -> None:
    code = (  # without this file's imports, which take seconds
        "import hashlib\n"
        "from datamodules.mixed_digits import mixed_digits\n"
        f"{inspect.getsource(pixel_hash).replace('ImageSource', 'object')}\n"
        "data = mixed_digits()\n"
        "for source in (data.pool, data.client_train, data.client_test):\n"
        "    print(pixel_hash(source))\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for source, expected in zip(sources().values(), other.stdout.split(), strict=True):
        pickled = pickle.dumps(source)
        assert len(pickled) < 1000
        assert pixel_hash(source) == expected
        assert pixel_hash(pickle.loads(pickled)) == expected


def test_fingerprints_differ_by_part_and_stay() -> None:
    first = [source.fingerprint for source in sources().values()]
    assert len(set(first)) == 3
    assert first == [source.fingerprint for source in sources().values()]


# --- the script ---


@pytest.mark.skipif(not TORCHVISION_DATA.is_dir(), reason="needs torchvision's folders")
def test_script_reproduces_the_asset(tmp_path: Path) -> None:
    out = tmp_path / "again.npz"
    result = run_script("--root", str(TORCHVISION_DATA), "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert out.read_bytes() == ASSET.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.npz"]


def test_script_names_what_is_missing(tmp_path: Path) -> None:
    result = run_script("--root", str(tmp_path), "--out", str(tmp_path / "x.npz"))
    assert result.returncode == 2
    assert "train-images-idx3-ubyte' is missing" in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_script_refuses_what_is_no_idx_file(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_mixed_digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    path = tmp_path / "idx"
    good = b"\0\0\x08\x02" + b"\0\0\0\x02" + b"\0\0\0\x03" + bytes(range(6))
    path.write_bytes(good)
    assert script.read_idx(path).tolist() == [[0, 1, 2], [3, 4, 5]]
    for content, reason in [(b"", "not an idx"), (b"GIF89a", "not an idx"), (good[:-1], "trunc")]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=reason):
            script.read_idx(path)


def run_script(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False
    )
