"""Choosing the proxy set: seconds of each part and peak memory against N, R and size.

    python benchmarks/selection.py                   # the table, minutes
    python benchmarks/selection.py --quick           # one small size
    python benchmarks/selection.py --sizes 1000000,1000,10000

Synthetic pools on memory maps (float16; 64 projected of 256 dimensions), unit rows around 10,000
centres; one row in fifty is a near-duplicate of another. The client is in a tenth of the clusters,
noise std 5. Each line is a process of its own; its peak memory is above that of the interpreter
with torch and this package loaded. `select` is the whole call; the parts are run once more alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ecos_pl.count_smoothing import smooth_counts  # noqa: E402
from ecos_pl.densest_rows import densest_rows, densities  # noqa: E402
from ecos_pl.diverse_picks import diverse_picks  # noqa: E402
from ecos_pl.near_duplicates import DistinctRows  # noqa: E402
from ecos_pl.selection import CORE_SHARE, select, water_fill  # noqa: E402

SIZES = [
    (50_000, 1000, 1500),
    (200_000, 1000, 10_000),
    (1_000_000, 100, 10_000),
    (1_000_000, 1000, 1500),
    (1_000_000, 1000, 10_000),
    (1_000_000, 1000, 100_000),
    (1_000_000, 10_000, 10_000),
    (2_000_000, 1000, 10_000),
]
NUM_CENTERS, NUM_DIMS, FULL_DIMS, NOISE_STD = 10_000, 64, 256, 5.0
COLUMNS = ("smooth", "density", "regions", "picks", "duplicates", "select")


def main() -> None:
    """Print the table, or one line's result for the parent process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="*", help="N,R,size such as 1000000,1000,10000")
    parser.add_argument("--quick", action="store_true", help="one small size")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        folder, sizes = options.one
        print(json.dumps(measured(Path(folder), *map(int, sizes.split(",")), options.device)))
        return
    sizes = SIZES[:1] if options.quick else SIZES
    if options.sizes:
        sizes = [tuple(map(int, text.split(","))) for text in options.sizes]
    with tempfile.TemporaryDirectory() as folder:
        write_pool(Path(folder), max(num_rows for num_rows, _, _ in sizes))
        header = ["N", "R", "size", *(f"{name}, s" for name in COLUMNS), "peak, MB", "duplicates"]
        print(f"{options.threads} threads, {options.device}\n")
        print("| " + " | ".join(header) + " |\n" + "| ---: " * len(header) + "|", flush=True)
        for size in sizes:
            command = [sys.executable, __file__, "--device", options.device]
            command += ["--threads", str(options.threads)]
            command += ["--one", folder, ",".join(map(str, size))]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            cells = [f"{number:,}" for number in size]
            cells += [f"{found[name]:.2f}" for name in COLUMNS]
            cells += [f"{found['peak']:,.0f}", f"{found['num_duplicates']:,}"]
            print("| " + " | ".join(cells) + " |", flush=True)


def write_pool(folder: Path, num_rows: int) -> None:
    """Rows in full and in their first dimensions, their centres, and which one is whose."""
    rng = np.random.default_rng(0)
    spectrum = 1 / np.sqrt(np.arange(1, FULL_DIMS + 1))
    centers = rng.standard_normal((NUM_CENTERS, FULL_DIMS)) * spectrum
    owners = rng.integers(0, NUM_CENTERS, num_rows)
    full = np.lib.format.open_memmap(folder / "full.npy", "w+", np.float16, (num_rows, FULL_DIMS))
    few = np.lib.format.open_memmap(folder / "few.npy", "w+", np.float16, (num_rows, NUM_DIMS))
    for first in range(0, num_rows, 50_000):
        some = owners[first : first + 50_000]
        rows = centers[some] + 0.6 * rng.standard_normal((len(some), FULL_DIMS)) * spectrum
        copied = rng.integers(0, len(rows), (2, len(rows) // 50))
        rows[copied[0]] = rows[copied[1]] + 1e-3 * rng.standard_normal((len(rows) // 50, FULL_DIMS))
        some[copied[0]] = some[copied[1]]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        full[first : first + len(rows)] = rows
        few[first : first + len(rows)] = rows[:, :NUM_DIMS]
    full.flush()
    few.flush()
    np.save(folder / "owners.npy", owners.astype(np.int32))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True) * np.sqrt(1 + 0.6**2)
    np.save(folder / "centers.npy", centers[:, :NUM_DIMS].astype(np.float32))


def measured(folder: Path, num_rows: int, num_clusters: int, size: int, device: str) -> Any:
    """Seconds of `select` and of its parts, peak MB of `select`, near-duplicates it removed."""
    full = np.load(folder / "full.npy", mmap_mode="r")[:num_rows]
    few = np.load(folder / "few.npy", mmap_mode="r")[:num_rows]
    group = NUM_CENTERS // num_clusters
    assignments = torch.from_numpy(np.load(folder / "owners.npy")[:num_rows] // group)
    centroids = torch.from_numpy(
        np.load(folder / "centers.npy").reshape(num_clusters, group, NUM_DIMS).mean(axis=1)
    )
    sizes = torch.bincount(assignments, minlength=num_clusters)
    inside = centroids[:, 0] > centroids[:, 0].quantile(0.9)
    generator = torch.Generator().manual_seed(0)
    noise = NOISE_STD * torch.randn(num_clusters, generator=generator)
    counts = (torch.where(inside, 30.0, 0.0) + noise).round().long()
    seconds: dict[str, float] = {}

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        seconds[name] = time.perf_counter() - start
        return result

    before = peak_mb()
    chosen = timed(
        "select",
        lambda: select(
            counts,
            assignments,
            few,
            centroids,
            size=size,
            strategy="ecos",
            noise_std=NOISE_STD,
            generator=generator,
            full_embeddings=full,
            device=device,
        ),
    )
    peak = peak_mb() - before
    assert len(chosen.indices) == size
    density = timed("smooth", lambda: smooth_counts(counts, centroids, sizes, NOISE_STD))
    held = timed("density", lambda: densities(density, few, device=device))
    _, core = timed(
        "regions", lambda: densest_rows(held, counts, NOISE_STD, shares=(1.0, CORE_SHARE))
    )
    room = torch.bincount(assignments[core], minlength=num_clusters)
    shares = torch.zeros(num_clusters).index_add(0, assignments[core].long(), held[core])
    quotas = water_fill(shares, room, size)
    picks = timed(
        "picks",
        lambda: diverse_picks(
            few, assignments, centroids, quotas, candidates=core, device=device
        ).numpy(),
    )
    distinct = DistinctRows(few, full, 0.12, device=device)
    timed("duplicates", lambda: distinct(picks))
    return {**seconds, "peak": peak, "num_duplicates": chosen.num_duplicates}


def peak_mb() -> float:
    """Most memory this process has had, in MB; as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    main()
