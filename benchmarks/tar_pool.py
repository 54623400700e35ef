"""A pool in WebDataset tar shards: time to index, to open and to read, and memory.

python benchmarks/tar_pool.py                     # 20,000 and 200,000 images, minutes
python benchmarks/tar_pool.py --sizes 5000        # a quick look

The shards lie in a temporary folder, which is removed. If the package webdataset is installed, it
reads the same shards in order, for comparison. Memory is the largest of any single process: the
one that does the work, or one of its helpers.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

IMAGE_SIZE = 48
NUM_READS = 20_000
NUM_WORKERS = 2
STAGES = ("imports", "index", "open", "random", "loader", "webdataset")


def make_shards(
    folder: Path, num_images: int, *, images_per_shard: int = 2000, seed: int = 0
) -> list[Path]:
    """Write JPEGs of 32 to 64 pixels into `folder/00000.tar` and so on.

    The pictures are those of mixed_digits' pool, each time turned, moved and coloured otherwise;
    their class and domain stand beside them in a `.json`, as `label` and `domain`.

    Args:
        folder: Made if it is not there.
        num_images: How many in all.
        images_per_shard: How many in each shard but the last.
        seed: Of the variations.

    Returns:
        The shards' paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_images, images_per_shard)
    shards = [folder / f"{number:05d}.tar" for number in range(len(starts))]
    rows = [range(start, min(start + images_per_shard, num_images)) for start in starts]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as workers:
        list(workers.map(_make_shard, shards, rows, repeat(seed)))
    return shards


def _make_shard(path: Path, numbers: range, seed: int) -> None:
    pool = _pool()
    rng = np.random.default_rng([seed, numbers.start])
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number in numbers:
            row = number * 4001 % len(pool)  # every domain in every shard
            facts = {"label": pool.labels[row], "domain": pool.domains[row]}
            _add(archive, f"{number:09d}.jpg", _varied(_picture(row), rng))
            _add(archive, f"{number:09d}.json", json.dumps(facts).encode())


@cache
def _pool() -> Any:
    from datamodules.mixed_digits import mixed_digits

    return mixed_digits().pool


@cache
def _picture(row: int) -> Image.Image:
    return _pool().read(row)


def _varied(picture: Image.Image, rng: np.random.Generator) -> bytes:
    side, margin = int(rng.integers(32, 65)), rng.uniform(0, 0.15, 4)
    width, height = picture.size
    left, top = margin[0] * width, margin[1] * height
    box = (left, top, width - margin[2] * width, height - margin[3] * height)
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR, box=box))
    tint = rng.uniform(0.6, 1.0, 3).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray((pixels * tint).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


# --- what is measured: each stage in a process of its own ----------------------------------------


def imports(shards: str, cache: Path) -> dict[str, Any]:
    """What the interpreter takes with everything loaded."""
    import datamodules.tar_shards  # noqa: F401

    return {}


def index(shards: str, cache: Path) -> dict[str, Any]:
    from datamodules.tar_shards import open_tar_shards

    start = time.perf_counter()
    pool = open_tar_shards(shards, cache_dir=cache)
    return {"seconds": time.perf_counter() - start, "images": len(pool)}


def open_again(shards: str, cache: Path) -> dict[str, Any]:
    from datamodules.tar_shards import open_tar_shards

    start = time.perf_counter()
    pool = open_tar_shards(shards, cache_dir=cache)
    first, last = pool.ids[0], pool.ids[-1]
    return {"seconds": time.perf_counter() - start, "ids": [first, last]}


def random_reads(shards: str, cache: Path) -> dict[str, Any]:
    from datamodules.tar_shards import open_tar_shards

    pool = open_tar_shards(shards, cache_dir=cache)
    rows = np.random.default_rng(0).integers(0, len(pool), NUM_READS).tolist()
    start = time.perf_counter()
    for row in rows:
        pool.read_bytes(row)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    for row in rows:
        pool.read(row)
    return {"bytes": NUM_READS / seconds, "decoded": NUM_READS / (time.perf_counter() - start)}


def loader(shards: str, cache: Path) -> dict[str, Any]:
    import torch
    from torch.utils.data import DataLoader

    from datamodules.tar_shards import open_tar_shards
    from ecos_pl.images import to_tensor

    class Pixels(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self) -> None:
            self.pool = open_tar_shards(shards, cache_dir=cache)

        def __len__(self) -> int:
            return len(self.pool)

        def __getitem__(self, row: int) -> torch.Tensor:
            return to_tensor(self.pool.read(row), IMAGE_SIZE)

    return _rate(DataLoader(Pixels(), 256, num_workers=NUM_WORKERS))


def webdataset_loader(shards: str, cache: Path) -> dict[str, Any]:
    import webdataset as wds
    from torch.utils.data import DataLoader

    from ecos_pl.images import decode_image, to_tensor

    def pixels(sample: dict[str, Any]) -> Any:
        return to_tensor(decode_image(sample["jpg"], sample["__key__"]), IMAGE_SIZE)

    paths = [str(path) for path in sorted(Path(shards).glob("*.tar"))]
    dataset = wds.WebDataset(paths, shardshuffle=False, empty_check=False).map(pixels)
    return _rate(DataLoader(dataset, 256, num_workers=NUM_WORKERS))


def _rate(batches: Any) -> dict[str, Any]:
    start = time.perf_counter()
    num_images = sum(len(batch) for batch in batches)
    return {"rate": num_images / (time.perf_counter() - start), "images": num_images}


FUNCTIONS = dict(
    zip(
        STAGES,
        (imports, index, open_again, random_reads, loader, webdataset_loader),
        strict=True,
    )
)


def _megabytes(who: int) -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit / 1e6


def _in_own_process(stage: str, shards: Path, cache: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--stage", stage, str(shards), str(cache)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _lines(num_images: int, work: Path) -> Iterator[tuple[str, str, float | None]]:
    """Yield (what, value, megabytes above the imports) for one pool."""
    start = time.perf_counter()
    shards, cache = work / f"shards-{num_images}", work / f"cache-{num_images}"
    paths = make_shards(shards, num_images)
    total = sum(path.stat().st_size for path in paths)
    seconds = time.perf_counter() - start
    yield f"(made: {len(paths)} shards, {total / 1e6:,.0f} MB)", f"{seconds:.1f} s", None
    base = _in_own_process("imports", shards, cache)["megabytes"]
    for stage in STAGES[1:]:
        if stage == "webdataset" and find_spec("webdataset") is None:
            continue
        found = _in_own_process(stage, shards, cache)
        assert found.get("images", num_images) == num_images, found
        memory = found["megabytes"] - base
        if stage == "index":
            yield "build the index", f"{found['seconds']:.2f} s", memory
            size = sum(path.stat().st_size for path in cache.glob("pools/tar-?*/*/*"))
            yield "index and pieces on disk", f"{size / num_images:.0f} bytes per image", None
        elif stage == "open":
            yield "open it again", f"{found['seconds'] * 1000:.1f} ms", memory
        elif stage == "random":
            yield "random reads, bytes", f"{found['bytes']:,.0f} per s", memory
            yield "random reads, decoded", f"{found['decoded']:,.0f} per s", memory
        elif stage == "loader":
            title = f"in order, {NUM_WORKERS} DataLoader workers"
            yield title, f"{found['rate']:,.0f} images per s", memory
        else:
            title = f"in order, webdataset, {NUM_WORKERS} workers"
            yield title, f"{found['rate']:,.0f} images per s", memory


def main() -> None:
    """Measure each pool size and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[20_000, 200_000])
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage, shards, cache = options.stage
        found = FUNCTIONS[stage](shards, Path(cache))
        found["megabytes"] = max(map(_megabytes, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
        print(json.dumps(found))
        return
    print("| images | what | | MB above the imports |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for num_images in options.sizes:
            for what, value, megabytes in _lines(num_images, Path(work)):
                memory = "" if megabytes is None else f"{megabytes:,.0f}"
                print(f"| {num_images:,} | {what} | {value} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
