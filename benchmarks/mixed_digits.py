"""The README's table: ECOS on mixed_digits beside its baselines, mean ± std over seeds.

python benchmarks/mixed_digits.py                 # everything; finished runs are read, not redone
python benchmarks/mixed_digits.py --lines ecos random --seeds 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
LINES = {
    "ecos": ("ECOS, labels from the client", "mixed_digits"),
    "random": ("random set, labels from the client", "random"),
    "whole_pool": ("the whole pool, labels from the client", "whole_pool"),
    "local": ("the client alone, on its own images", "local"),
    "public_labels": ("ECOS set, true labels", "public_labels"),
}
COLUMNS = (
    ("images", "proxy", "size", "{:,.0f}"),
    ("ε", "privacy", "epsilon", "{:.2f}"),
    ("purity", "simulation", "purity", "{:.3f}"),
    ("label accuracy", "simulation", "label_accuracy", "{:.3f}"),
    ("test accuracy", "simulation", "test_accuracy", "{:.3f}"),
    ("seconds", "seconds", "total", "{:.0f}"),
)


def main() -> None:
    """Run what is missing and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--run-root", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    rows = []
    for line in options.lines:
        title, experiment = LINES[line]
        found = [_summary(experiment, seed, options.run_root) for seed in options.seeds]
        rows.append([title, *(_cell(found, *column[1:]) for column in COLUMNS)])
    header = ["", *(column[0] for column in COLUMNS)]
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(cells) + " |")


def _summary(experiment: str, seed: int, run_root: Path) -> dict:
    run_id = f"{experiment}-{seed}"
    path = run_root / run_id / "summary.json"
    if not path.is_file():
        command = [sys.executable, str(HERE / "train.py"), f"experiment={experiment}"]
        command += [f"seed={seed}", f"run_id={run_id}", f"run_root={run_root}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return json.loads(path.read_text())


def _cell(found: list[dict], group: str, key: str, form: str) -> str:
    values = [summary[group][key] for summary in found if summary[group][key] is not None]
    if not values:
        return "–"
    mean = form.format(statistics.mean(values))
    if len(values) == 1 or key in ("size", "epsilon", "total"):
        return mean
    return f"{mean} ± {form.format(statistics.stdev(values))}"


if __name__ == "__main__":
    main()
