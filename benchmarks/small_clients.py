"""Purity of the proxy set against the client's size and ε: one table, one figure.

python benchmarks/small_clients.py --out runs/small_clients

Pool and client are those of mixed_digits; a client of more than 1,000 images takes further MNIST
images from torchvision's folders under --root (left out if they are absent). Only the counts are
released: δ = 1e-5, noise as `accounting.calibrate_noise_multiplier` gives it. To be quick and
repeatable the noise is rounded N(0, σ²) from a seeded generator, not the client's secure discrete
Gaussian of the same σ. Each repeat draws its own client and noise; k-means has three seeds. A
repeat has the same seed in every cell: neighbouring cells are not independent.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HERE), str(HERE / "scripts")]

import make_mixed_digits  # noqa: E402

from callbacks.figures import BLUE, DARK, DPI, GREEN, ORANGE, new_figure, plain_axes  # noqa: E402
from datamodules.mixed_digits import mixed_digits  # noqa: E402
from ecos_pl.accounting import calibrate_noise_multiplier  # noqa: E402
from ecos_pl.coverage import coverage_counts  # noqa: E402
from ecos_pl.embedding_bank import build_bank  # noqa: E402
from ecos_pl.encoder import Encoder, EncoderSpec  # noqa: E402
from ecos_pl.images import to_tensor  # noqa: E402
from ecos_pl.kmeans import kmeans  # noqa: E402
from ecos_pl.nearest import assign  # noqa: E402
from ecos_pl.projection import fit_pca  # noqa: E402
from ecos_pl.selection import default_num_clusters, select  # noqa: E402

DELTA, SIZE, NUM_DIMS, CLUSTER_SEEDS = 1e-5, 1500, 64, (1, 2, 3)
SIZES, EPSILONS, NOISES = (
    (100, 200, 500, 1000, 2000, 5000),
    (0.25, 0.5, 1, 2, 4),
    (5, 8, 10, 12, 15),
)

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Outcome:
    """Of one proxy set: its share in the domain, classes with 50 proxies, largest class share."""

    purity: float
    num_classes: int
    largest: float


class Bench:
    """The pool, embedded and clustered, and the client's images to draw from."""

    def __init__(self, run_root: Path, data_root: Path) -> None:
        scenario, spec = mixed_digits(), EncoderSpec()
        encoder = Encoder(spec)
        name = f"{scenario.pool.fingerprint[:16]}-{spec.key}"
        bank = build_bank(
            run_root / "cache" / "embeddings" / name,
            scenario.pool,
            encoder,
            image_size=spec.image_size,
        )
        self.projection = fit_pca(bank, NUM_DIMS).rounded()
        chunks = [torch.from_numpy(np.array(rows)) for _, rows in bank.chunks()]
        self.pool = torch.cat([self.projection(rows) for rows in chunks])
        self.full = bank
        self.labels = np.array(scenario.pool.labels)
        self.relevant = np.array(scenario.pool.domains) == scenario.client_domain
        self._clusters: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

        def embed(images: Sequence[Image.Image]) -> Rows:
            parts = []
            for first in range(0, len(images), 256):
                tensors = [to_tensor(im, spec.image_size) for im in images[first : first + 256]]
                parts.append(self.projection(encoder(torch.stack(tensors))).numpy())
            return np.concatenate(parts)

        client = scenario.client_train
        self.small = embed([client.read(i) for i in range(len(client))])
        others = further_digits(data_root, max(SIZES) - len(self.small))
        self.large = np.concatenate([self.small, embed(others)]) if others else self.small

    def client(self, num_images: int, seed: int) -> Rows:
        """A random client of so many images."""
        rows = self.small if num_images <= len(self.small) else self.large
        order = np.random.default_rng([1, seed]).permutation(len(rows))
        return rows[order[:num_images]]

    def clusters(self, number: int, repeat: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Centroids as they travel, and the pool's assignments."""
        key = (number, CLUSTER_SEEDS[repeat % len(CLUSTER_SEEDS)])
        if key not in self._clusters:
            centroids = kmeans(self.pool, number, seed=key[1]).centroids.half().float()
            self._clusters[key] = centroids, assign(self.pool, centroids)
        return self._clusters[key]

    def outcome(self, rows: Rows, noise_std: float, number: int, repeat: int) -> Outcome:
        """Choose a proxy set for a client's rows under noise."""
        centroids, assignments = self.clusters(number, repeat)
        counts = coverage_counts(torch.from_numpy(rows), centroids)
        generator = np.random.default_rng([2, repeat])
        noise = np.rint(generator.normal(0, noise_std, number)).astype(np.int64)
        chosen = select(
            counts + torch.from_numpy(noise),
            assignments,
            self.pool,
            centroids,
            size=SIZE,
            strategy="ecos",
            noise_std=noise_std,
            generator=torch.Generator(),
            full_embeddings=self.full,
        ).indices.numpy()
        inside = chosen[self.relevant[chosen]]
        _, found = np.unique(self.labels[inside], return_counts=True)
        largest = found.max() / len(inside) if len(inside) else 1.0
        return Outcome(len(inside) / len(chosen), int((found >= 50).sum()), float(largest))

    def outcomes(
        self, num_images: int, noise_std: float, number: int, repeats: int
    ) -> list[Outcome]:
        """Of several clients, clusterings and noises."""
        return [
            self.outcome(self.client(num_images, repeat), noise_std, number, repeat)
            for repeat in range(repeats)
        ]


def further_digits(data_root: Path, number: int) -> list[Image.Image]:
    """MNIST training images that mixed_digits left out; none if the folder is absent."""
    folder = data_root / "MNIST" / "raw"
    if not folder.is_dir():
        return []
    images = make_mixed_digits.read_idx(folder / "train-images-idx3-ubyte")
    # mixed_digits draws its MNIST parts first of all, in this order.
    order = np.random.default_rng(make_mixed_digits.SEED).permutation(len(images))
    first = sum(make_mixed_digits.MNIST_TRAIN_PARTS.values())
    return [
        Image.fromarray(images[i]).convert("RGB") for i in np.sort(order[first : first + number])
    ]


def cell(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As Markdown."""
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(cells) + " |")
    print(flush=True)


def main() -> None:
    """Print the tables, draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for small_clients.png")
    parser.add_argument("--root", type=Path, default=HERE.parent / "shared" / "data")
    parser.add_argument("--run-root", type=Path, default=HERE / "runs" / "benchmark")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error("--repeats must be at least 2")
    bench = Bench(options.run_root, options.root)
    sizes = [size for size in SIZES if size <= len(bench.large)]
    pool_size, repeats = len(bench.pool), options.repeats

    noise = {
        epsilon: calibrate_noise_multiplier(epsilon, DELTA, one_coordinate=True)
        for epsilon in EPSILONS
    }
    number = {epsilon: default_num_clusters(pool_size, noise[epsilon]) for epsilon in EPSILONS}
    noisy: dict[tuple[int, float], list[Outcome]] = {}
    exact: dict[tuple[int, float], list[Outcome]] = {}
    rows, details = [], []
    for size in sizes:
        for epsilon in EPSILONS:
            noisy[size, epsilon] = bench.outcomes(size, noise[epsilon], number[epsilon], repeats)
            exact[size, epsilon] = bench.outcomes(size, 0.0, number[epsilon], repeats)
        purity = {epsilon: [o.purity for o in noisy[size, epsilon]] for epsilon in EPSILONS}
        best = max(statistics.mean(o.purity for o in exact[size, e]) for e in EPSILONS)
        same = [o.purity for o in exact[size, 1]]
        cells = [cell(purity[epsilon]) for epsilon in EPSILONS]
        rows.append([f"{size:,}", *cells, cell(same), f"{best:.3f}"])
        details.append(
            [
                f"{size:,}",
                *(f"{statistics.mean(purity[e]) / best:.0%}" for e in EPSILONS),
                f"{statistics.mean(o.num_classes for o in noisy[size, 1]):.1f}",
                f"{statistics.mean(o.largest for o in noisy[size, 1]):.2f}",
            ]
        )
        print(f"client of {size} images done", file=sys.stderr, flush=True)
    print(f"Purity of {SIZE} proxies, mean ± std over {repeats} clients and noises:\n")
    columns = [f"ε = {e:g} (std {noise[e]:.2f}, R = {number[e]})" for e in EPSILONS]
    print_table(["client images", *columns, "no noise, R of ε = 1", "no noise, best R"], rows)
    print("Share of the best noiseless purity; at ε = 1 also the classes:\n")
    header = [f"ε = {e:g}" for e in EPSILONS] + ["classes with ≥ 50 proxies", "largest class"]
    print_table(["client images", *header], details)

    print("1,000 images, by the noise on each count:\n")
    rows = []
    for std in NOISES:
        clusters = default_num_clusters(pool_size, std)
        found = bench.outcomes(1000, std, clusters, repeats)
        classes = statistics.mean(o.num_classes for o in found)
        purity_cell = cell([o.purity for o in found])
        rows.append([f"{std}", f"{clusters}", purity_cell, f"{classes:.1f}"])
    print_table(["noise std", "R", "purity", "classes with ≥ 50 proxies"], rows)

    options.out.mkdir(parents=True, exist_ok=True)
    draw(noisy, exact, sizes, options.out / "small_clients.png", float(bench.relevant.mean()))


def draw(
    noisy: dict[tuple[int, float], list[Outcome]],
    exact: dict[tuple[int, float], list[Outcome]],
    sizes: Sequence[int],
    path: Path,
    chance: float,
) -> None:
    """Purity over ε, a panel for each client size."""
    figure = new_figure(1500, 800)
    panels = figure.subplots(2, -(-len(sizes) // 2), sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(sizes) :]:
        axes.set_visible(False)
    for axes, size in zip(panels.flat, sizes, strict=False):
        means = [statistics.mean(o.purity for o in noisy[size, e]) for e in EPSILONS]
        spread = [statistics.stdev(o.purity for o in noisy[size, e]) for e in EPSILONS]
        clean = [statistics.mean(o.purity for o in exact[size, e]) for e in EPSILONS]
        axes.plot(EPSILONS, clean, color=GREEN, linewidth=1.2, label="true counts, same R")
        goal = [0.9 * value for value in clean]
        axes.plot(EPSILONS, goal, color=GREEN, linewidth=1, linestyle=":", label="90% of that")
        low = [m - s for m, s in zip(means, spread, strict=True)]
        high = [min(1.0, m + s) for m, s in zip(means, spread, strict=True)]
        axes.fill_between(EPSILONS, low, high, color=BLUE, alpha=0.2, linewidth=0)
        axes.plot(EPSILONS, means, color=BLUE, marker="o", markersize=4, label="ECOS, mean ± std")
        axes.axhline(chance, color=ORANGE, linewidth=1, linestyle="--", label="random sampling")
        axes.set_title(f"{size:,} client images", fontsize=9, color=DARK)
        axes.set_xscale("log", base=2)
        axes.set_xticks(EPSILONS, [f"{e:g}" for e in EPSILONS])
        axes.set_ylim(0, 1.02)
        plain_axes(axes)
    for axes in panels[-1]:
        axes.set_xlabel("ε of the counts", fontsize=9)
    for axes in panels[:, 0]:
        axes.set_ylabel("purity", fontsize=9)
    panels.flat[0].legend(fontsize=7, frameon=False, loc="center right")
    figure.suptitle(f"Share of {SIZE:,} proxies in the client's domain (mixed_digits)", fontsize=10)
    figure.savefig(path, dpi=DPI)


if __name__ == "__main__":
    main()
