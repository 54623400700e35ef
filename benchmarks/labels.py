"""Label accuracy against ε, for each way in which the client can label under privacy.

python benchmarks/labels.py                          # on mixed_digits; the README's table
python benchmarks/labels.py --epsilons 1 --seeds 1   # one column, one seed

ε is that of everything the client releases: the coverage counts and the labels. The counts get
the part that leaves the labels 1.2 times the noise of the whole budget. Nothing is trained; probes
that were done are read from disk.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datamodules.mixed_digits import mixed_digits
from datamodules.proxy import ProxySamplingDataModule, TrainingView
from ecos_pl.accounting import calibrate_noise_multiplier
from ecos_pl.labeling import Labeler
from ecos_pl.probe import ProbePlan
from ecos_pl.prototype_labeler import PrototypeLabeler
from ecos_pl.table_labeler import TableLabeler
from ecos_pl.vote_labeler import VoteLabeler

LABELERS = {
    "client_prototypes": lambda classes: PrototypeLabeler(classes),
    "client_prototypes, final features": lambda classes: PrototypeLabeler(
        classes, features="final"
    ),
    "client_table": lambda classes: TableLabeler(classes),
    "client_knn": lambda classes: VoteLabeler(classes),
}
DELTA = 1e-5
LABEL_NOISE = 1.2
"""Noise of the labels ÷ noise of one release that takes the whole budget."""


def main() -> None:
    """Run what is missing and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labelers", nargs="+", choices=LABELERS, default=list(LABELERS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.5, 1, 2, 4])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--run-root", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    scenario = mixed_digits()
    columns = [(epsilon, count_noise(epsilon)) for epsilon in options.epsilons]
    header = ["labels", *(f"ε = {epsilon:g}" for epsilon, _ in columns)]
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    purities: dict[float, list[float]] = {epsilon: [] for epsilon in options.epsilons}
    for name in options.labelers:
        cells = []
        for epsilon, noise_std in columns:
            accuracies = []
            for seed in options.seeds:
                labeler = LABELERS[name](scenario.classes)
                found = probe(labeler, epsilon, noise_std, seed, options.run_root)
                accuracies.append(found["label_accuracy"])
                purities[epsilon].append(found["purity"])
            cells.append(mean_and_std(accuracies))
        print("| " + " | ".join([name, *cells]) + " |", flush=True)
    cells = [mean_and_std(purities[epsilon]) for epsilon, _ in columns]
    print("| " + " | ".join(["*purity of the set*", *cells]) + " |")
    cells = [f"{noise_std:g}" for _, noise_std in columns]
    print("| " + " | ".join(["*noise on the counts*", *cells]) + " |")


def count_noise(epsilon: float) -> float:
    """Noise on the counts that leaves labels LABEL_NOISE times that of the whole budget.

    Inverse squares of noise multipliers add up.
    """
    whole = calibrate_noise_multiplier(epsilon, DELTA)
    return round(whole / math.sqrt(1 - LABEL_NOISE**-2), 2)


def probe(
    labeler: Labeler, epsilon: float, noise_std: float, seed: int, run_root: Path
) -> dict[str, float]:
    """Purity and label accuracy of one probe."""
    plan = ProbePlan(noise_std=noise_std, max_epsilon=epsilon, delta=DELTA, seed=seed)
    datamodule = ProxySamplingDataModule(
        mixed_digits(), plan, labeler, TrainingView(), run_root=run_root, seed=seed
    )
    datamodule.setup("fit")
    return {k: v for k, v in datamodule.simulation.items() if v is not None}


def mean_and_std(values: list[float]) -> str:
    """As ``0.812 ± 0.004``."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


if __name__ == "__main__":
    main()
