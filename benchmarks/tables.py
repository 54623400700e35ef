"""Runs of train.py side by side: mean ± std over seeds, as a Markdown table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ecos_pl.study.table import looked_up, mean_and_std

__all__ = ["DATA", "Summary", "looked_up", "mean_and_std", "print_table", "run_summary"]

HERE = Path(__file__).resolve().parents[1]
TORCHVISION = os.environ.get("TORCHVISION_DATA", HERE.parent / "shared" / "data")
DATA = {
    "mixed_digits": ["data=mixed_digits"],
    "mnist_fashion": ["data=mnist_fashion", f"data.root={TORCHVISION}"],
}
"""The data families that the scenarios are shown on, as settings of train.py; the folder that holds
torchvision's MNIST and FashionMNIST is ``TORCHVISION_DATA`` in the environment."""

Summary = Mapping[str, Any]


def run_summary(run_id: str, settings: Sequence[str], run_root: Path) -> Summary:
    """The summary of a run of train.py, which is done unless it is there; what it prints is shown.

    Args:
        run_id: Names the run; other settings need another name.
        settings: `key=value` each.
        run_root: Folder of the runs, which share one cache.

    Raises:
        subprocess.CalledProcessError: The run failed; it said why.
    """
    path = run_root / run_id / "summary.json"
    if not path.is_file():
        command = [sys.executable, str(HERE / "train.py"), *settings]
        command += [f"run_id={run_id}", f"run_root={run_root}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    summary: Summary = json.loads(path.read_text())
    return summary


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, each row as soon as it is there."""
    for cells in (header, ["---"] * len(header)):
        print("| " + " | ".join(cells) + " |", flush=True)
    for cells in rows:
        print("| " + " | ".join(cells) + " |", flush=True)
