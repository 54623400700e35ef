"""One table: a teacher, the same in 8 bits, and pruned on the ECOS set or on another set.

python benchmarks/compression.py                 # everything; finished runs are read, not redone
python benchmarks/compression.py --lines int8 ecos random --seeds 1
python benchmarks/compression.py --data mnist_fashion
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tables import DATA, Summary, looked_up, mean_and_std, print_table, run_summary

LINES = {
    "int8": ("int8 alone, ECOS set", ["task.target.sparsity=0", "trainer.max_epochs=0"]),
    "ecos": ("pruned + int8, ECOS set", []),
    "random": ("pruned + int8, random set", ["selection.strategy=random"]),
    "oracle": ("pruned + int8, oracle's set", ["selection.strategy=oracle", "labels=public"]),
    "whole_pool": (
        "pruned + int8, whole pool, as many steps",
        ["selection.strategy=all", "trainer.max_steps=210", "task.num_prunings=2"],
    ),
}
COLUMNS = (
    ("test accuracy", "student.accuracy", "{:.3f}"),
    ("drop, points", "accuracy_drop", "{:.1f}"),
    ("MB", "student.size_mb", "{:.2f}"),
    ("smaller", "size_ratio", "{:.1f}x"),
    ("ms an image", "student.latency_ms", "{:.2f}"),
    ("faster", "latency_ratio", "{:.1f}x"),
)
TEACHER = [
    "experiment=whole_pool",
    "labels=public",
    "task.backbone=resnet18",
    "task.weights=random",
    "task.learning_rate=2e-3",
    "trainer.max_epochs=-1",
    "trainer.max_steps=1008",
]
"""A general model of the cloud's: trained on the whole labelled pool, whoever the client is.

As many steps on every pool: 8 passes over that of mixed_digits.
"""


def main() -> None:
    """Run what is missing and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--data", choices=DATA, default="mixed_digits")
    parser.add_argument("--run-root", type=Path, default=Path("runs/compression"))
    options = parser.parse_args()
    data, root = DATA[options.data], options.run_root / options.data
    run_summary("teacher", [*TEACHER, *data], root)
    found: dict[str, list[Summary]] = {
        line: [
            run_summary(
                f"{line}-{seed}",
                [
                    "experiment=compression",
                    f"task.teacher={root / 'teacher' / 'model.safetensors'}",
                    *data,
                    *LINES[line][1],
                    f"seed={seed}",
                ],
                root,
            )
            for seed in options.seeds
        ]
        for line in options.lines
    }
    rows = [_teacher_row([one for runs in found.values() for one in runs])]
    rows += [[LINES[line][0], *_cells(runs)] for line, runs in found.items()]
    print_table(["", *(name for name, _, _ in COLUMNS)], rows)


def _cells(runs: Sequence[Summary]) -> list[str]:
    return [
        mean_and_std(
            (
                value if value is None or key != "accuracy_drop" else 100 * value
                for value in (looked_up(run, f"compression.{key}") for run in runs)
            ),
            form,
        )
        for _, key, form in COLUMNS
    ]


def _teacher_row(runs: Sequence[Summary]) -> list[str]:
    """One file for all runs, timed anew in each."""
    cells = ["the teacher, float32"]
    for _, key, form in COLUMNS:
        place = key.replace("student", "teacher")
        same = place == key  # a comparison with itself
        values = [looked_up(run, f"compression.{place}") for run in runs]
        cells.append("–" if same else mean_and_std(values, form, spread="latency" in key))
    return cells


if __name__ == "__main__":
    main()
