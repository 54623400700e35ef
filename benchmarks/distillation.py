"""A small student of a public teacher, on the ECOS set and beside it: mean ± std over seeds.

python benchmarks/distillation.py                          # on mixed_digits
python benchmarks/distillation.py --data mnist_fashion     # 120,000 pool images
python benchmarks/distillation.py --lines ecos random --seeds 1

All students take equally many steps, but for the client alone, whose 1,000 images it passes over
as often. Finished runs are read, not redone; the teacher is trained once, for all of them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tables import DATA, Summary, looked_up, mean_and_std, print_table, run_summary

EXPERIMENT = "experiment=distillation"
PASSES, STEPS_A_PASS = 60, 21
LINES = {
    "ecos": ("student on the ECOS set", [EXPERIMENT]),
    "ecos_drawn": (
        "student on the ECOS set, diverse among twice as many",
        [EXPERIMENT, "selection.candidates_per_pick=2"],
    ),
    "random": ("student on a random set", [EXPERIMENT, "selection.strategy=random"]),
    "whole_pool": (
        "student on the whole pool",
        [
            EXPERIMENT,
            "selection.strategy=all",
            "trainer.max_epochs=-1",
            f"trainer.max_steps={PASSES * STEPS_A_PASS}",
            "task.num_views=null",  # it sees no image often enough for fixed views to be reused
        ],
    ),
    "oracle": (
        "student on the client's domain (oracle)",
        [EXPERIMENT, "selection.strategy=oracle"],
    ),
    "local": (
        "the client alone, without a teacher",
        [
            "experiment=local",
            "task.backbone=lcnet_035",
            "task.weights=random",
            "task.image_size=32",
            "task.learning_rate=4e-3",
            f"trainer.max_epochs={PASSES}",
        ],
    ),
}
COLUMNS = (  # title, place in summary.json, form, whether it varies over seeds
    ("images", "proxy.size", "{:,.0f}", False),
    ("ε", "privacy.epsilon", "{:.2f}", False),
    ("purity", "simulation.purity", "{:.3f}", True),
    ("test accuracy", "simulation.test_accuracy", "{:.3f}", True),
    ("parameters", "model.parameters", "{:,.0f}", False),
    ("multiply-adds", "model.macs", "{:,.0f}", False),
    ("ms an image", "model.latency_ms", "{:.2f}", False),
    ("seconds", "seconds.total", "{:.0f}", False),
)


def main() -> None:
    """Run what is missing and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="mixed_digits")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--run-root", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    found = {line: runs(line, options) for line in options.lines}
    teachers = [one for summaries in found.values() for one in summaries if "teacher" in one]
    rows = [[title_of(line), *cells(summaries)] for line, summaries in found.items()]
    if teachers:
        rows.insert(0, ["teacher, on the public pool's labels", *teacher_cells(teachers[0])])
    print_table(["", *(column[0] for column in COLUMNS)], rows)


def title_of(line: str) -> str:
    return LINES[line][0]


def runs(line: str, options: argparse.Namespace) -> list[Summary]:
    """A line's runs, one for each seed."""
    _, settings = LINES[line]
    return [
        run_summary(
            f"distillation-{options.data}-{line}-{seed}",
            [*settings, *DATA[options.data], f"seed={seed}"],
            options.run_root,
        )
        for seed in options.seeds
    ]


def cells(summaries: list[Summary]) -> list[str]:
    return [
        mean_and_std([looked_up(summary, place) for summary in summaries], form, spread=varies)
        for _, place, form, varies in COLUMNS
    ]


def teacher_cells(summary: Summary) -> list[str]:
    """The teacher's line, from any student's summary: they share it."""
    facts = {
        **{f"model.{name}": value for name, value in summary["teacher"].items()},
        "simulation.test_accuracy": summary["teacher"].get("test_accuracy"),
        "privacy.epsilon": 0.0,
    }
    return [mean_and_std([facts.get(place)], form) for _, place, form, _ in COLUMNS]


if __name__ == "__main__":
    main()
