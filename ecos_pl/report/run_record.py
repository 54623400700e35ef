"""What a run folder says about its run."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from ecos_pl.storage import read_json


@dataclass(frozen=True)
class RunRecord:
    """The files of a finished run, read.

    Attributes:
        folder: The run's.
        summary: ``summary.json``.
        config: ``config.yaml``.
        manifest: ``proxy_set.json``; empty without a proxy set.
        labels: Chosen images by label, from ``proxy_set.csv``; "" for those without.
        answers: ``labels.json``, where people labelled.
        job: ``annotation/job.json``, where this run wrote one.
        card: Text of ``CARD.md``, where the model was compressed.
    """

    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    manifest: dict[str, Any]
    labels: Counter[str]
    answers: dict[str, Any]
    job: dict[str, Any]
    card: str

    def option(self, key: str) -> Any:
        """An option of the config by its dotted key, such as ``selection.strategy``, or None."""
        found: Any = self.config
        for name in key.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        return found

    def fact(self, *keys: str) -> Any:
        """A fact of the summary, or None where this run has none."""
        found: Any = self.summary
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    @property
    def is_simulated(self) -> bool:
        """The client was played by a data set: what only a client knows can be measured."""
        return bool(self.option("client.name") != "mailbox")

    @property
    def has_proxy_set(self) -> bool:
        """Public images were chosen; else the client trained alone."""
        return bool(self.fact("proxy", "size"))

    @property
    def classes(self) -> list[str]:
        """Names of the classes, as far as the folder tells."""
        return list(self.manifest.get("classes", ()))

    @property
    def pool_size(self) -> int:
        """Images in the public pool; 0 if unknown."""
        return sum(pool["num_images"] for pool in self.fact("proxy", "pools") or ())

    @property
    def is_private(self) -> bool:
        """There is an ε; a selection that reads the client's images has none."""
        return not self.has_proxy_set or self.fact("privacy", "epsilon") is not None

    @property
    def epsilon(self) -> float:
        """What all answers of the client together cost; 0 without any, and where not private."""
        return float(self.fact("privacy", "epsilon") or 0.0)


def read_run(folder: Path) -> RunRecord:
    """Read a finished run.

    Raises:
        ValueError: The folder holds no run, or one that has not ended, or a damaged file.
    """
    config, summary = folder / "config.yaml", folder / "summary.json"
    if not config.is_file():
        raise ValueError(f"{folder} is no folder of a run: there is no config.yaml")
    if not summary.is_file():
        raise ValueError(
            f"the run in {folder} has not ended: there is no summary.json; "
            f"python train.py --config {config} goes on"
        )
    return RunRecord(
        folder=folder,
        summary=_mapping(summary),
        config=_yaml(config),
        manifest=_mapping(folder / "proxy_set.json"),
        labels=_labels(folder / "proxy_set.csv"),
        answers=_mapping(folder / "labels.json"),
        job=_mapping(folder / "annotation" / "job.json"),
        card=_text(folder / "CARD.md"),
    )


def _mapping(path: Path) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no config")
    return found


def _labels(path: Path) -> Counter[str]:
    if not path.is_file():
        return Counter()
    with path.open(newline="", encoding="utf-8") as file:
        return Counter(row.get("label") or "" for row in csv.DictReader(file))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
