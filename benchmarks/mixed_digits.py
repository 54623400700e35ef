"""The README's table: ECOS on mixed_digits beside its baselines, mean ± std over seeds.

python benchmarks/mixed_digits.py                 # everything; finished runs are read, not redone
python benchmarks/mixed_digits.py --lines ecos random --seeds 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tables import looked_up, mean_and_std, print_table, run_summary

LINES = {
    "ecos": ("ECOS, labels from the client", "mixed_digits"),
    "random": ("random set, labels from the client", "random"),
    "whole_pool": ("the whole pool, labels from the client", "whole_pool"),
    "local": ("the client alone, on its own images", "local"),
    "public_labels": ("ECOS set, true labels", "public_labels"),
}
COLUMNS = (  # title, place in summary.json, form, whether it varies over seeds
    ("images", "proxy.size", "{:,.0f}", False),
    ("ε", "privacy.epsilon", "{:.2f}", False),
    ("purity", "simulation.purity", "{:.3f}", True),
    ("label accuracy", "simulation.label_accuracy", "{:.3f}", True),
    ("test accuracy", "simulation.test_accuracy", "{:.3f}", True),
    ("seconds", "seconds.total", "{:.0f}", False),
)


def main() -> None:
    """Run what is missing and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--run-root", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    rows = (_row(line, options.seeds, options.run_root) for line in options.lines)
    print_table(["", *(column[0] for column in COLUMNS)], rows)


def _row(line: str, seeds: list[int], run_root: Path) -> list[str]:
    title, experiment = LINES[line]
    found = [
        run_summary(f"{experiment}-{n}", [f"experiment={experiment}", f"seed={n}"], run_root)
        for n in seeds
    ]
    cells = (
        mean_and_std([looked_up(summary, place) for summary in found], form, spread=varies)
        for _, place, form, varies in COLUMNS
    )
    return [title, *cells]


if __name__ == "__main__":
    main()
