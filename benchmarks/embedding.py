"""Embedding a pool, from its files to its bank, against the bare forward pass on preloaded tensors.

python benchmarks/embedding.py                                # on this CPU, about five minutes
python benchmarks/embedding.py --device cuda --images 65536 --workers 0 4 16

The pools: images of mixed_digits, some of them drawn as they are read; and a folder of JPEGs of
128 px, made for this. Every repeat measures every line, in turn; the table gives medians. The
ratio is that of one repeat, so that what slows the machine down for a while slows both, and to the
faster forward pass where there are two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.mixed_digits import mixed_digits
from ecos_pl.embedding_bank import CPU_BATCH, build_bank
from ecos_pl.encoder import Encoder, EncoderSpec, describe
from ecos_pl.images import ImageSource, SomeImages, scan_folder, to_tensor

JPEG_SIDE = 128
BY_THREADS = "forward pass, a batch per thread"


def main() -> None:
    """Measure and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--encoder", default="tf_efficientnet_lite0")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.images -= options.images % options.batch_size
    spec = EncoderSpec(options.encoder, image_size=options.image_size)
    encoder = Encoder(spec).to(options.device)
    with tempfile.TemporaryDirectory() as folder:
        pools = {
            "mixed_digits": repeated(mixed_digits().pool, options.images),
            f"JPEGs of {JPEG_SIDE} px": jpegs(Path(folder), options.images),
        }
        batch = preload(pools["mixed_digits"], options)
        encoder(batch)  # the first pass chooses its kernels
        lines = {"forward pass": partial(forward, batch, encoder, options)}
        if options.device == "cpu":
            lines[BY_THREADS] = partial(forward_by_threads, batch, encoder, options)
        for name, pool in pools.items():
            for num_workers in options.workers:
                line = partial(embed, pool, encoder, num_workers, options)
                lines[f"{name}, {num_workers} workers"] = line
        found = [
            {name: measured(work, options) for name, work in lines.items()}
            for _ in range(options.repeats)
        ]
    threads = torch.get_num_threads()
    print(f"{describe(spec)} on {options.device}, {threads} threads, {options.images:,} images\n")
    print("| | images/s | CPU ms per image | ÷ forward pass |")
    print("| --- | --- | --- | --- |")
    for name in lines:
        rate, cpu, ratio = (
            statistics.median(values)
            for values in (
                [repeat[name][0] for repeat in found],
                [repeat[name][1] for repeat in found],
                [repeat[name][0] / bare(repeat) for repeat in found],
            )
        )
        print(f"| {name} | {rate:,.0f} | {cpu:.2f} | {ratio:.2f} |")


def measured(work: Callable[[], object], options: argparse.Namespace) -> tuple[float, float]:
    """Images per second; milliseconds of processors, this process' and its readers', per image."""
    start, before = time.perf_counter(), sum(os.times()[:4])
    work()
    if options.device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds, busy = time.perf_counter() - start, sum(os.times()[:4]) - before
    return options.images / seconds, 1000 * busy / options.images


def forward(batch: torch.Tensor, encoder: Encoder, options: argparse.Namespace) -> None:
    for _ in range(options.images // options.batch_size):
        encoder(batch)


def forward_by_threads(batch: torch.Tensor, encoder: Encoder, options: argparse.Namespace) -> None:
    """Each thread embeds batches of its own, as `build_bank` has it on a CPU."""
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(encoder, [batch[:CPU_BATCH]] * (options.images // CPU_BATCH)))
    torch.set_num_threads(num_threads)


def bare(repeat: dict[str, tuple[float, float]]) -> float:
    """Images per second of the forward pass alone, the faster way."""
    return max(rate for name, (rate, _) in repeat.items() if name.startswith("forward pass"))


def embed(
    pool: ImageSource, encoder: Encoder, num_workers: int, options: argparse.Namespace
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        build_bank(
            Path(folder) / "bank",
            pool,
            encoder,
            image_size=options.image_size,
            batch_size=options.batch_size,
            num_workers=num_workers,
            device=options.device,
            title=None,
        )


def preload(pool: ImageSource, options: argparse.Namespace) -> torch.Tensor:
    """One batch, on the device."""
    images = [to_tensor(pool.read(i), options.image_size) for i in range(options.batch_size)]
    return torch.stack(images).to(options.device)


def repeated(pool: ImageSource, num_images: int) -> ImageSource:
    """So many of the pool's images in random order, some of them again where it is too small."""
    rows = np.random.default_rng(0).permutation(max(num_images, len(pool)))[:num_images]
    return SomeImages(pool, rows % len(pool))


def jpegs(folder: Path, num_images: int) -> ImageSource:
    """A folder of smooth noise, as JPEGs of some 4 kB."""
    rng = np.random.default_rng(0)
    for number in range(num_images):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        image = coarse.resize((JPEG_SIDE, JPEG_SIDE), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:07d}.jpg", quality=90)
    return scan_folder(folder)


if __name__ == "__main__":
    main()
