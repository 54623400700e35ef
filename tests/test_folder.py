from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.folder import folder_data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in [
        *("pool/photo/cat/1.png", "pool/photo/dog/2.png", "pool/sketch/cat/3.png", "pool/4.png"),
        *("client/train/dog/a.png", "client/train/cat/b.png", "client/test/cat/c.png"),
    ]:
        add_image(tmp_path / name)
    return tmp_path


def add_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(path)


def test_pool_and_client(root: Path) -> None:
    data = folder_data(root / "pool", root / "client", "photo")
    assert data.name == "folder"
    assert data.pool.ids == ["4.png", "photo/cat/1.png", "photo/dog/2.png", "sketch/cat/3.png"]
    assert data.pool.domains == [None, "photo", "photo", "sketch"]
    assert data.pool.labels == [None, "cat", "dog", "cat"]
    assert data.classes == ["cat", "dog"]
    assert data.client_train.labels == ["cat", "dog"]
    assert data.client_test.ids == ["cat/c.png"]
    assert data.client_domain == "photo"
    assert data.client_test.read(0).getpixel((0, 0)) == (9, 9, 9)
    assert folder_data(root / "pool", root / "client").client_domain is None


def refusal(root: Path, pool: str = "pool", client: str = "client", **options: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each caller checks the message
        folder_data(root / pool, root / client, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_folders(root: Path) -> None:
    assert "pool folder" in refusal(root, pool="nowhere")
    assert "client folder" in refusal(root, client="nowhere")
    (root / "client/test").rename(root / "client/tset")
    assert "client/test' is missing" in refusal(root)
    (root / "client/train").rename(root / "client/trian")
    assert "client/train' is missing" in refusal(root)


def test_images_outside_class_folders(root: Path) -> None:
    add_image(root / "client/train/x.png")
    assert "expected train/CLASS/x.png" in refusal(root)
    (root / "client/train/x.png").unlink()
    add_image(root / "client/test/cat/young/x.png")
    assert "'cat/young/x.png'" in refusal(root)


def test_no_images(root: Path) -> None:
    (root / "client/train/cat/b.png").unlink()
    (root / "client/train/dog/a.png").unlink()
    assert "no images below" in refusal(root)


def test_class_that_is_only_tested(root: Path) -> None:
    add_image(root / "client/test/emu/x.png")
    assert "class 'emu'" in refusal(root)


@pytest.mark.parametrize(
    ("pool", "client"),
    [("pool", "pool"), ("client/train", "client"), ("pool", "pool/photo"), ("link", "client")],
)
def test_pool_and_client_must_lie_apart(root: Path, pool: str, client: str) -> None:
    (root / "link").symlink_to(root / "client/train")
    assert "overlap" in refusal(root, pool=pool, client=client)


def test_client_domain_must_occur(root: Path) -> None:
    assert "did you mean 'sketch'?" in refusal(root, client_domain="skech")
    assert "it has photo, sketch" in refusal(root, client_domain="qqq")
    add_image(root / "plain/cat/x.png")
    assert "no domains" in refusal(root, pool="plain", client_domain="photo")
