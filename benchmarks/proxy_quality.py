"""Measuring a proxy set's quality: seconds and peak memory against the sizes of pool and set.

    python benchmarks/proxy_quality.py                     # the table, minutes
    python benchmarks/proxy_quality.py --quick             # one small size
    python benchmarks/proxy_quality.py --sizes 120000,1500

Synthetic pools on memory maps (float16; 1,280 dimensions, 64 projected), 1,000 client images.
Each line is a process of its own; its peak memory is above that of the interpreter with torch and
this package loaded. Both sets are measured, the chosen one and a random one, for all measures that
need embeddings. The last column: how much longer the plain way takes for the pool's radius, with
the whole matrix of distances (`torch.cdist`) in memory; "-" where that has more than 4 GB.
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
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ecos_pl.compressed_pool import CompressedPool  # noqa: E402
from ecos_pl.projection import Projection  # noqa: E402
from ecos_pl.quality.measure import ProxyMeasures, Truth  # noqa: E402
from ecos_pl.quality.objective import NearestDistance  # noqa: E402
from ecos_pl.row_blocks import release_pages  # noqa: E402

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
    print("| pool | set | seconds | of a processor | peak, MB | plain radius ÷ ours |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for num_rows, size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_pool(Path(folder), num_rows)
            command = [sys.executable, __file__, "--device", options.device]
            command += ["--threads", str(options.threads), "--one", folder, f"{num_rows},{size}"]
            found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        ratio = "-" if found["ratio"] is None else f"{found['ratio']:.1f}"
        cells = [f"{num_rows:,}", f"{size:,}", f"{found['seconds']:.1f}"]
        cells += [f"{found['processor']:.1f}", f"{found['peak']:,.0f}", ratio]
        print("| " + " | ".join(cells) + " |", flush=True)


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
    """Seconds of all measures, megabytes above the interpreter, the plain radius over ours."""
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
    pool = SimpleNamespace(labels=[None] * num_rows)
    release_pages(full)
    Path("/proc/self/clear_refs").write_text("5")  # what there has been at most so far
    before = _memory("VmRSS")
    start, processor = time.perf_counter(), time.process_time()
    measures = ProxyMeasures(full, compressed, 0.12, seed=1, device=device)
    measures.against_random(chosen, Truth(pool, ["cat"], None, client))
    found: dict[str, float | None] = {
        "seconds": time.perf_counter() - start,
        "processor": time.process_time() - processor,
        "peak": _memory("VmHWM") - before,
        "ratio": None,
    }
    if num_rows * size * 4 < MAX_MATRIX_BYTES:
        rows = torch.from_numpy(projected.astype(np.float32)).to(device)
        centers = rows[torch.from_numpy(chosen).to(device)]
        radius = NearestDistance(rows)
        ours = _seconds(lambda: radius.update(centers))
        plain = _seconds(lambda: torch.cdist(rows, centers).min(dim=1))
        found["ratio"] = plain / ours
    return found


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _memory(name: str) -> float:
    """MB of this process, as Linux counts it: now (VmRSS), or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


if __name__ == "__main__":
    main()
