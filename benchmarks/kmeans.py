"""k-means against faiss-cpu and scikit-learn: same rows, same threads, one process each.

    OMP_NUM_THREADS=1 python benchmarks/kmeans.py      # the table: some ten minutes on one core
    python benchmarks/kmeans.py --full                 # every size; hours
    python benchmarks/kmeans.py --sizes 50000,64,100 --rows tree --seed 7
    python benchmarks/kmeans.py --memory               # peak memory against N, ours alone

Needs the extra ``bench`` (faiss-cpu, scikit-learn). A peer's seconds are wall time from rows in
memory (float32, from float16 values) to its centroids; faiss and Lloyd run 25 iterations at most.
Ours is one run: the time from the call until its centroids are within 0.1% of the peer's objective
(the inertia over all rows, by one program for all, outside the clock), over the peer's seconds.

Rows: ``overlap``, 1,000 Gaussian clusters whose spread is as large as their centres' distance;
``tree``, unit vectors as an encoder gives them: 30 groups of classes, of sizes by Zipf's law, each
of several modes, in a spectrum that falls as 1/i.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ROOT = Path(__file__).resolve().parent.parent
SIZES = [
    (n, d, r) for n in (50_000, 200_000, 1_000_000) for d in (64, 256) for r in (100, 1000, 10_000)
]
DEFAULT_SIZES = [
    (50_000, 64, 100),
    (50_000, 64, 1000),
    (50_000, 256, 100),
    (200_000, 64, 100),
    (200_000, 64, 1000),
    (200_000, 256, 100),
    (1_000_000, 64, 100),
]
SLACK = 1e-3
PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "faiss": ("faiss-cpu", "faiss", {"all_points": True}),
    "faiss_default": ("its default, 256 rows a cluster", "faiss", {"all_points": False}),
    "lloyd": ("scikit-learn KMeans", "lloyd", {}),
    "minibatch": ("MiniBatchKMeans", "minibatch", {}),
}


def main() -> None:
    """Print the table, or one run's result for the parent process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="*", help="N,d,R such as 50000,64,1000")
    parser.add_argument("--rows", nargs="*", default=["overlap", "tree"], choices=list(ROWS))
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--full", action="store_true", help="every size")
    parser.add_argument("--memory", action="store_true", help="peak memory of ours against N")
    parser.add_argument("--seed", type=int, default=0, help="of the rows and of every program")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one program, in a process of its own
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(**json.loads(arguments.run))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory:
            memory_table(Path(folder))
            return
        missing = [n for n in ("faiss", "sklearn") if importlib.util.find_spec(n) is None]
        if missing:
            sys.exit(f"{' and '.join(missing)} missing: pip install ecos-pl[bench]")
        sizes = SIZES if arguments.full else DEFAULT_SIZES
        if arguments.sizes:
            sizes = [tuple(map(int, size.split(","))) for size in arguments.sizes]
        time_table(sizes, arguments, Path(folder))


# --- rows ----------------------------------------------------------------------------------------


def overlap(num_rows: int, num_dims: int, seed: int) -> Array:
    """Rows [N, d] float16 of 1,000 clusters that overlap."""
    draw = np.random.default_rng(seed)
    centers = draw.standard_normal((1000, num_dims), np.float32)
    rows = np.empty((num_rows, num_dims), np.float16)
    for first in range(0, num_rows, 65_536):
        part = rows[first : first + 65_536]
        noise = draw.standard_normal(part.shape, np.float32)
        part[:] = (centers[draw.integers(1000, size=len(part))] + noise) / np.sqrt(2 * num_dims)
    return rows


def tree(num_rows: int, num_dims: int, seed: int) -> Array:
    """Rows [N, d] float16, unit vectors: groups, classes in them, modes in these."""
    draw = np.random.default_rng(seed)
    spectrum = (1 / np.sqrt(1 + np.arange(num_dims))).astype(np.float32)
    groups = 1.0 * draw.standard_normal((30, num_dims), np.float32)
    classes = groups[draw.integers(30, size=1000)]
    classes = classes + 0.7 * draw.standard_normal(classes.shape, np.float32)
    modes = np.repeat(classes, 8, axis=0)
    modes = modes + 0.5 * draw.standard_normal(modes.shape, np.float32)
    weights = 1 / (1 + np.arange(len(modes))) ** 0.7
    edges = np.cumsum(weights[draw.permutation(len(modes))])
    rows = np.empty((num_rows, num_dims), np.float16)
    for first in range(0, num_rows, 65_536):
        part = rows[first : first + 65_536]
        chosen = modes[np.searchsorted(edges, draw.random(len(part)) * edges[-1])]
        found = (chosen + 0.7 * draw.standard_normal(part.shape, np.float32)) * spectrum
        part[:] = found / np.linalg.norm(found, axis=1, keepdims=True)
    return rows


ROWS: dict[str, Callable[[int, int, int], Array]] = {"overlap": overlap, "tree": tree}


# --- one run, in a process of its own ------------------------------------------------------------


def run(program: str, path: str, num_clusters: int, seed: int, **options: Any) -> dict[str, Any]:
    """Seconds and objective of one program on the rows of a file."""
    stored = np.load(path)  # float16, as our program keeps them
    if program == "ours":
        return run_ours(stored, num_clusters, seed, **options)
    rows = stored.astype(np.float32)
    fit = {"faiss": fit_faiss, "lloyd": fit_lloyd, "minibatch": fit_minibatch}[program]
    fit(rows[:2000], 10, seed, **options)  # libraries load what they need
    begin = time.perf_counter()
    centroids = fit(rows, num_clusters, seed, **options)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "objective": objective(stored, centroids)}


def fit_faiss(rows: Array, num_clusters: int, seed: int, *, all_points: bool) -> Array:
    import faiss

    found = faiss.Kmeans(
        rows.shape[1],
        num_clusters,
        niter=25,
        seed=seed + 1234,  # that of faiss is 1234
        max_points_per_centroid=len(rows) if all_points else 256,
        min_points_per_centroid=1,
    )
    found.train(rows)
    return found.centroids


def fit_lloyd(rows: Array, num_clusters: int, seed: int) -> Array:
    from sklearn.cluster import KMeans

    return KMeans(num_clusters, n_init=1, max_iter=25, random_state=seed).fit(rows).cluster_centers_


def fit_minibatch(rows: Array, num_clusters: int, seed: int) -> Array:
    from sklearn.cluster import MiniBatchKMeans

    found = MiniBatchKMeans(num_clusters, n_init=1, random_state=seed).fit(rows)
    return found.cluster_centers_


def run_ours(rows: Array, num_clusters: int, seed: int, *, targets: list[float]) -> dict[str, Any]:
    """Seconds until each target objective, null if never; seconds and objective at the end."""
    from ecos_pl import kmeans as program

    steps: list[tuple[float, Array]] = []  # when centroids were found, and these

    class Recorded(program.NearestCentroid):
        def __init__(self, centroids: Any) -> None:
            steps.append((time.perf_counter() - begin, centroids.numpy().copy()))
            super().__init__(centroids)

    begin = 0.0
    program.kmeans(rows[:2000], 10)
    program.NearestCentroid = Recorded  # type: ignore[misc]
    begin = time.perf_counter()
    program.kmeans(rows, num_clusters, seed=seed)
    seconds = time.perf_counter() - begin
    known = functools.cache(lambda step: objective(rows, steps[step][1]))
    last = len(steps) - 1
    reached = []
    for target in targets:  # objectives fall from step to step
        first = bisect.bisect_left(range(last), True, key=lambda i: known(i) <= target)
        reached.append(steps[first][0] if known(first) <= target else None)
    share = gemm_seconds(rows, num_clusters) / assign_seconds(rows, num_clusters)
    return {"seconds": seconds, "objective": known(last), "reached": reached, "share": share}


def objective(rows: Array, centroids: Array) -> float:
    """Sum over rows of the squared distance to the nearest centroid."""
    import torch

    from ecos_pl.nearest import NearestCentroid

    nearest = NearestCentroid(torch.from_numpy(np.ascontiguousarray(centroids, np.float32)))
    blocks = (torch.from_numpy(rows[i : i + 1024]).float() for i in range(0, len(rows), 1024))
    return sum(float(nearest(block)[1].sum(dtype=torch.float64)) for block in blocks)


def gemm_seconds(rows: Array, num_clusters: int) -> float:
    """The bare matrix products of all blocks of rows and the centroids: the limit of assignment."""
    import torch

    from ecos_pl.nearest import block_rows

    block = torch.randn(block_rows(num_clusters, "cpu"), rows.shape[1])
    centroids = torch.randn(rows.shape[1], num_clusters)
    out = torch.empty(len(block), num_clusters)

    def products() -> None:
        for _ in range(-(-len(rows) // len(block))):
            torch.mm(block, centroids, out=out)

    return (
        min(timeit.repeat(products, number=1, repeat=3))
        * len(rows)
        / (-(-len(rows) // len(block)) * len(block))
    )


def assign_seconds(rows: Array, num_clusters: int) -> float:
    """`assign` of all rows, from float16 to cluster numbers."""
    import torch

    from ecos_pl.nearest import assign

    centroids = torch.from_numpy(rows[:: len(rows) // num_clusters][:num_clusters]).float()
    return min(timeit.repeat(lambda: assign(rows, centroids), number=1, repeat=3))


# --- tables --------------------------------------------------------------------------------------


def time_table(sizes: list[Any], arguments: argparse.Namespace, folder: Path) -> None:
    """A Markdown table, one line a size."""
    peers = [PEERS[peer][0] for peer in arguments.peers]
    columns = ["rows", "N × d", "R", *(f"{peer}: s, ours ÷ it" for peer in peers)]
    columns += ["ours to the end: s, objective ÷ the first's", "assignment GFLOPS ÷ GEMM's"]
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for kind in arguments.rows:
        for num_rows, num_dims, num_clusters in sizes:
            path = folder / f"{kind}-{num_rows}-{num_dims}.npy"
            if not path.exists():
                np.save(path, ROWS[kind](num_rows, num_dims, arguments.seed))
            cells = [kind, f"{num_rows:,} × {num_dims}", f"{num_clusters:,}"]
            cells += results(path, num_clusters, arguments)
            print("| " + " | ".join(cells) + " |", flush=True)


def results(path: Path, num_clusters: int, arguments: argparse.Namespace) -> list[str]:
    """The cells of one size."""

    def of(program: str, **options: Any) -> dict[str, Any]:
        return apart(program, path, num_clusters, seed=arguments.seed, **options)

    theirs = [of(PEERS[peer][1], **PEERS[peer][2]) for peer in arguments.peers]
    ours = of("ours", targets=[(1 + SLACK) * found["objective"] for found in theirs])
    cells = []
    for found, seconds in zip(theirs, ours["reached"], strict=True):
        above = ours["objective"] / found["objective"] - 1
        ratio = f"never: +{above:.2%}" if seconds is None else f"{seconds / found['seconds']:.2f}"
        cells.append(f"{found['seconds']:.2f}, **{ratio}**")
    scale = theirs[0]["objective"] if theirs else ours["objective"]
    cells.append(f"{ours['seconds']:.2f}, {ours['objective'] / scale:.4f}")
    cells.append(f"{ours['share']:.2f}")
    return cells


def apart(program: str, path: Path, num_clusters: int, **options: Any) -> dict[str, Any]:
    """One run in a process of its own: two OpenMP libraries in one would disturb each other."""
    asked = {"program": program, "path": str(path), "num_clusters": num_clusters, **options}
    found = subprocess.run(
        [sys.executable, __file__, "--run", json.dumps(asked)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


MEMORY_RUN = """
import resource, sys
import numpy as np, torch
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
torch.ones(8, 8) @ torch.ones(8, 8)
from ecos_pl.kmeans import kmeans
before = peak()
rows = np.load(sys.argv[1], mmap_mode="r")
found = kmeans(rows, int(sys.argv[2]), num_iters=2)
print(before, peak())
"""


def memory_table(folder: Path) -> None:
    """Peak memory of a k-means of a float16 memory map, as a Markdown table."""
    print("| rows × 64, float16 memory map | file, MB | R | peak above Python with torch, MB |")
    print("|---|---|---|---|")
    for num_rows in (50_000, 200_000, 500_000, 1_000_000, 2_000_000):
        path = folder / "rows.npy"
        np.save(path, tree(num_rows, 64, 0))
        for num_clusters in (100, 1000):
            found = subprocess.run(
                [sys.executable, "-c", MEMORY_RUN, str(path), str(num_clusters)],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            )
            before, after = map(float, found.stdout.split())
            size = num_rows * 128 / 1e6
            print(
                f"| {num_rows:,} | {size:.0f} | {num_clusters} | {after - before:.0f} |", flush=True
            )


if __name__ == "__main__":
    main()
