"""Measuring a proxy set's quality: seconds and peak memory against the sizes of pool and set.

    python benchmarks/proxy_quality.py                     # the table, minutes
    python benchmarks/proxy_quality.py --quick             # one small size
    python benchmarks/proxy_quality.py --sizes 120000,1500

Synthetic pools on memory maps (float16; 1,280 dimensions, 64 projected), 1,000 client images.
Each line is a process of its own; its peak memory is above that of the interpreter with torch and
this package loaded. Both sets are measured, the chosen one and a random one. The last column is
the time that the plain way takes for the covering radius alone, with the whole matrix of distances
(`torch.cdist`) in memory, as a multiple of all of ours; "-" where it would not fit into 4 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ecos_pl.compressed_pool import CompressedPool  # noqa: E402
from ecos_pl.projection import Projection  # noqa: E402
from ecos_pl.quality.measure import ProxyMeasures, Truth  # noqa: E402

SIZES = [(14_000, 1500), (120_000, 1500), (120_000, 20_000), (1_000_000, 1500)]
NUM_DIMS, FULL_DIMS, NUM_CLIENT, NUM_CLUSTERS = 64, 1280, 1000, 100
MAX_MATRIX_BYTES = 4e9


def main() -> None:
    """Print the table, or one line's result for the parent process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="*", help="N,S such as 120000,1500")
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
    print(f"{options.threads} threads, {options.device}\n")
    print("| pool | set | ours, s | peak, MB | plain radius ÷ ours |")
    print("| ---: | ---: | ---: | ---: | ---: |", flush=True)
    for num_rows, size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_pool(Path(folder), num_rows)
            command = [sys.executable, __file__, "--device", options.device]
            command += ["--threads", str(options.threads), "--one", folder, f"{num_rows},{size}"]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        ratio = "-" if found["plain"] is None else f"{found['plain'] / found['ours']:.2f}"
        print(
            f"| {num_rows:,} | {size:,} | {found['ours']:.1f} | {found['peak']:,.0f} | {ratio} |",
            flush=True,
        )


def write_pool(folder: Path, num_rows: int) -> None:
    """Unit rows in full, and their first dimensions."""
    rng = np.random.default_rng(0)
    shapes = {"full": (num_rows, FULL_DIMS), "projected": (num_rows, NUM_DIMS)}
    full, projected = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
        for name, shape in shapes.items()
    )
    for first in range(0, num_rows, 10_000):
        rows = rng.standard_normal((min(10_000, num_rows - first), FULL_DIMS), np.float32)
        rows /= np.sqrt(np.arange(1, FULL_DIMS + 1, dtype=np.float32))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        full[first : first + len(rows)] = rows
        projected[first : first + len(rows)] = rows[:, :NUM_DIMS]


def measured(folder: Path, num_rows: int, size: int, device: str) -> dict[str, float | None]:
    """Seconds of all measures, of the plain radius, and megabytes above the interpreter."""
    full = np.load(folder / "full.npy", mmap_mode="r")
    projected = np.load(folder / "projected.npy", mmap_mode="r")
    rng = np.random.default_rng(1)
    chosen = np.sort(rng.choice(num_rows, size, replace=False))
    client = torch.from_numpy(full[rng.choice(num_rows, NUM_CLIENT)].astype(np.float32))
    components = torch.eye(FULL_DIMS)[:NUM_DIMS]
    compressed = CompressedPool(
        Projection(torch.zeros(FULL_DIMS), components, torch.ones(NUM_DIMS)),
        projected,
        torch.zeros(NUM_CLUSTERS, NUM_DIMS),
        rng.integers(0, NUM_CLUSTERS, num_rows, np.int32),
    )
    before = _peak()
    start = time.perf_counter()
    measures = ProxyMeasures(full, compressed, 0.12, seed=1, device=device)
    measures.against_random(chosen, Truth(None, [], None, client))
    ours, peak = time.perf_counter() - start, _peak() - before
    plain = None
    if num_rows * size * 4 < MAX_MATRIX_BYTES:
        start = time.perf_counter()
        rows = torch.from_numpy(projected.astype(np.float32)).to(device)
        float(torch.cdist(rows, rows[torch.from_numpy(chosen)]).min(dim=1).values.max())
        plain = time.perf_counter() - start
    return {"ours": ours, "peak": peak, "plain": plain}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
