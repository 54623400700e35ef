"""Make datamodules/assets/mixed_digits.npz from torchvision's folders of MNIST and Fashion-MNIST.

python scripts/make_mixed_digits.py --root ../shared/data
"""

import argparse
import hashlib
import io
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.uint8]]

ASSET = Path(__file__).parents[1] / "datamodules/assets/mixed_digits.npz"
SEED = 2210_12575  # arXiv number of the ECOS paper
MNIST_TRAIN_PARTS = {"pool": 2000, "blend": 3000, "client_train": 1000}
CLIENT_TEST_SIZE = 2000  # from MNIST's test split: other writers than its training split
FASHION_SIZE = 5000


def main(argv: list[str] | None = None) -> int:
    """Read the folders, draw the parts, write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of MNIST/raw and so on")
    parser.add_argument("--out", type=Path, default=ASSET, help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        content = npz_bytes(draw_parts(args.root))
        write_atomically(args.out, content)
    except (OSError, ValueError) as error:
        print(f"make_mixed_digits: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
    return 0


def draw_parts(root: Path) -> dict[str, Array]:
    """Disjoint random parts, each sorted by class: `<part>_images` [n, 28, 28], `<part>_labels`."""
    rng = np.random.default_rng(SEED)
    parts: dict[str, Array] = {}

    def draw(folder: str, split: str, sizes: dict[str, int]) -> None:
        images = read_idx(root / folder / "raw" / f"{split}-images-idx3-ubyte")
        labels = read_idx(root / folder / "raw" / f"{split}-labels-idx1-ubyte")
        order = rng.permutation(len(images))
        for part, size in sizes.items():
            rows, order = np.sort(order[:size]), order[size:]
            rows = rows[np.argsort(labels[rows], kind="stable")]
            parts[f"{part}_images"], parts[f"{part}_labels"] = images[rows], labels[rows]

    draw("MNIST", "train", MNIST_TRAIN_PARTS)
    draw("MNIST", "t10k", {"client_test": CLIENT_TEST_SIZE})
    draw("FashionMNIST", "train", {"fashion": FASHION_SIZE})
    return parts


def read_idx(path: Path) -> Array:
    """Read an idx file of unsigned bytes: magic 0, 0, 8, rank; big-endian sizes; the bytes."""
    if not path.is_file():
        raise ValueError(
            f"{str(path)!r} is missing: --root must hold torchvision's MNIST/raw, FashionMNIST/raw"
        )
    content = path.read_bytes()
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"{str(path)!r} is not an idx file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    if len(content) != start + int(shape.prod()):
        raise ValueError(f"{str(path)!r} is truncated: its header says {shape.tolist()}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def npz_bytes(arrays: dict[str, Array]) -> bytes:
    """`numpy.savez_compressed`, but the same arrays give the same bytes at any time of day."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.create_system = 3  # Unix, wherever this runs
            data = io.BytesIO()
            np.lib.format.write_array(data, array, allow_pickle=False)
            archive.writestr(member, data.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=7)
    return buffer.getvalue()


def write_atomically(path: Path, content: bytes) -> None:
    """Write aside, then rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(content)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
