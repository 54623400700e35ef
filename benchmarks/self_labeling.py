"""Self-labelling: test accuracy of each method on each set of images, mean ± std over seeds.

python benchmarks/self_labeling.py                        # all of it; finished runs are read
python benchmarks/self_labeling.py --data mnist_fashion
python benchmarks/self_labeling.py --lines ecos random local_head --methods supervised --seeds 1

All sets but the client's own are trained on for the same number of steps. Where every image has a
label there is nothing for fixmatch and flexmatch to add: "–".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tables import DATA, looked_up, mean_and_std, print_table, run_summary

_AS_MANY_STEPS = "trainer.max_steps=126"  # 21 batches a pass over 1,350 images, 6 passes
LINES = {
    "ecos": ("ECOS, labels from the client", []),
    "rounds": ("ECOS, labels from the client in two rounds", ["labels.rounds=[3]"]),
    "rounds_2": (
        "ECOS, labels in two rounds, ε = 2",
        ["labels.rounds=[3]", "privacy.max_epsilon=2"],
    ),
    "ecos_2": ("ECOS, labels in one release, ε = 2", ["privacy.max_epsilon=2"]),
    "final": ("ECOS, one release in the last layer's features", ["labels.features=final"]),
    "final_rounds": (
        "the same in two rounds",
        ["labels.features=final", "labels.rounds=[3]", "labels.round_features=final"],
    ),
    "random": ("random set, labels from the client", ["selection.strategy=random"]),
    "whole_pool": (
        "the whole pool, labels from the client",
        ["selection.strategy=all", _AS_MANY_STEPS],
    ),
    "oracle": ("oracle's set, labels from the client", ["selection.strategy=oracle"]),
    "public_labels": ("ECOS, true labels", ["labels=public"]),
    "oracle_public": (
        "oracle's set, true labels",
        ["selection.strategy=oracle", "labels=public"],
    ),
    "local_head": (
        "the client alone, a linear head on the frozen encoder",
        [
            "train_on=client",
            "task.freeze_backbone=true",
            "task.augment=none",
            "task.label_smoothing=0",
            "task.learning_rate=0.01",
            "trainer.max_epochs=30",
        ],
    ),
    "local": ("the client alone, the whole network", ["train_on=client"]),
}
METHODS = {
    "supervised": ["task.method=supervised"],
    "fixmatch": ["task.method=fixmatch", "task.unlabeled_ratio=1"],
    "fixmatch_average": [
        "task.method=fixmatch",
        "task.unlabeled_ratio=1",
        "task.pseudo_labels_from=average",
    ],
    "flexmatch": ["task.method=flexmatch", "task.unlabeled_ratio=1"],
}
ALL_LABELLED = ("whole_pool", "local_head", "local")


def main() -> None:
    """Run what is missing and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=DATA, default="mixed_digits")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--run-root", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    header = ["", "ε", "label accuracy", *options.methods, *(f"{m}, s" for m in options.methods)]
    print_table(header, (_row(line, options) for line in options.lines))


def _row(line: str, options: argparse.Namespace) -> list[str]:
    title, settings = LINES[line]
    accuracies, seconds, found = [], [], []
    for method in options.methods:
        runs = []
        if method == "supervised" or line not in ALL_LABELLED:
            for seed in options.seeds:
                chosen = [*DATA[options.data], *METHODS[method], *settings, f"seed={seed}"]
                run_id = f"{options.data}-{line}-{method}-{seed}"
                runs.append(run_summary(run_id, chosen, options.run_root))
        accuracy = [looked_up(run, "simulation.test_accuracy") for run in runs]
        accuracies.append(mean_and_std(accuracy, "{:.3f}"))
        took = [looked_up(run, "seconds.total") for run in runs]
        seconds.append(mean_and_std(took, "{:.0f}", spread=False))
        found = found or runs  # which images and labels is the same for all methods
    epsilon = mean_and_std([looked_up(r, "privacy.epsilon") for r in found], "{:.2f}", spread=False)
    labels = mean_and_std([looked_up(r, "simulation.label_accuracy") for r in found], "{:.3f}")
    return [title, epsilon, labels, *accuracies, *seconds]


if __name__ == "__main__":
    main()
