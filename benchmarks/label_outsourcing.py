"""Accuracy against the number of images that people label: ECOS beside a random set, and a figure.

python benchmarks/label_outsourcing.py                       # finished runs are read, not redone
python benchmarks/label_outsourcing.py --sizes 50 1000 --seeds 1 --data mnist_fashion

The pool's own annotations play the annotators (`labels=public labels.num_images=N`). Both proxy
sets have the same size; of each, the first N images in the order of `labels=human` get labels, and
the others train without (FixMatch), all for the same number of steps. An image of no class of the
client's takes up one of the N answers all the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
from tables import DATA, Summary, looked_up, mean_and_std, print_table, run_summary

matplotlib.use("agg")
from matplotlib import pyplot as plt

LINES = {
    "ecos": ("ECOS", "#1b7837"),
    "random": ("random set", "#777777"),
    "oracle": ("the client's domain, at random (oracle)", "#2166ac"),
}
PROXY_SET = 2000
"""Images in the proxy set, or as many as are to be labelled, if more."""

STEPS = 200
"""Of every run: six passes over ECOS's unlabelled part, less than one over that of a random set."""

Found = dict[str, dict[int, list[Summary]]]  # strategy → number of labels → a summary a seed


def main() -> None:
    """Run what is missing; print the table as Markdown and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="mixed_digits")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=["ecos", "random"])
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[50, 100, 250, 500, 1000, 2000], help="labels"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--run-root", type=Path, default=Path("runs/label_outsourcing"))
    parser.add_argument(
        "--settings",
        nargs="*",
        default=[],
        help="more of train.py's key=value, with a --run-root of their own",
    )
    options = parser.parse_args()
    found: Found = {line: {} for line in options.lines}
    print_table(
        ["images labelled", *(LINES[line][0] for line in options.lines)], _rows(options, found)
    )
    figure = options.run_root / f"label_outsourcing-{options.data}.png"
    _draw(found, figure)
    print(f"figure: {figure}", file=sys.stderr)


def _rows(options: argparse.Namespace, found: Found) -> Iterator[list[str]]:
    for size in options.sizes:
        cells = []
        for line in options.lines:
            found[line][size] = [
                run_summary(
                    f"{options.data}-{line}-{size}-{seed}",
                    [*_settings(options.data, line, size, options.sizes, seed), *options.settings],
                    options.run_root,
                )
                for seed in options.seeds
            ]
            cells.append(mean_and_std(_accuracies(found[line][size]), "{:.3f}"))
        yield [f"{size:,}", *cells]


def _settings(data: str, line: str, size: int, sizes: Sequence[int], seed: int) -> list[str]:
    return [
        *DATA[data],
        f"seed={seed}",
        f"selection.strategy={line}",
        f"selection.size={max(PROXY_SET, *sizes)}",
        "labels=public",
        f"labels.num_images={size}",
        "task.method=fixmatch",
        "task.unlabeled_ratio=1",
        "trainer.max_epochs=-1",
        f"trainer.max_steps={STEPS}",
    ]


def _accuracies(summaries: Sequence[Summary]) -> list[float]:
    return [looked_up(summary, "simulation.test_accuracy") for summary in summaries]


def _draw(found: Found, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for line, by_size in found.items():
        title, color = LINES[line]
        sizes = sorted(by_size)
        means = [statistics.mean(_accuracies(by_size[size])) for size in sizes]
        axes.plot(sizes, means, "o-", color=color, label=title, markersize=4)
        for size in sizes:
            values = _accuracies(by_size[size])
            axes.plot([size] * len(values), values, "_", color=color, alpha=0.6)
    axes.set_xscale("log")
    ticks = sorted({size for by_size in found.values() for size in by_size})
    axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
    axes.minorticks_off()
    axes.set_xlabel("images labelled by people")
    axes.set_ylabel("accuracy on the client's test images")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
