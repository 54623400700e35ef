"""A study's folder: which cells are done, which are running, and that no two studies share it.

Each cell's log is locked for as long as a process writes to it, also one whose study was killed:
the lock belongs to the open file, which the run of train.py inherits.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml  # type: ignore[import-untyped]

from ecos_pl.overrides import ConfigError, Setting
from ecos_pl.storage import read_json, write_json
from ecos_pl.study.cells import Cell, difference

State = Literal["done", "running", "begun", "missing"]


@dataclass(frozen=True)
class StudyFolder:
    """Where the runs of a study lie, with their logs, their cache and what is made of them.

    Attributes:
        root: The folder, which is the `run_root` of its runs.
    """

    root: Path

    def summary(self, cell: Cell) -> Mapping[str, Any] | None:
        """The summary of a cell that is done."""
        path = self.root / cell.run_id / "summary.json"
        return read_json(path) if path.is_file() else None

    def log(self, cell: Cell) -> Path:
        """The file with the cell's output."""
        return self.root / "logs" / f"{cell.run_id}.log"

    def state(self, cell: Cell) -> State:
        """Whether a cell is done, a process is at it, was at it, or none ever was."""
        if (self.root / cell.run_id / "summary.json").is_file():
            return "done"
        if not self.log(cell).exists():
            return "missing"
        descriptor = self.take(cell)
        if descriptor is None:
            return "running"
        os.close(descriptor)
        return "begun"

    def take(self, cell: Cell) -> int | None:
        """Open the cell's log to append, locked; None while another process has it.

        Returns:
            The file descriptor; the lock ends when it is closed everywhere.
        """
        path = self.log(cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def last_line(self, cell: Cell) -> str:
        """What the cell said last; its error, if it failed."""
        path = self.log(cell)
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().decode(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.strip() and not line.startswith("$ ")]
        return said[-1] if said else ""

    def check(self, cells: Sequence[Cell]) -> None:
        """Runs that are there have the settings that their cells have now.

        Raises:
            ConfigError: One has not, as after a default was changed.
        """
        for cell in cells:
            path = self.root / cell.run_id / "config.yaml"
            if not path.is_file():
                continue
            there = yaml.safe_load(path.read_text(encoding="utf-8"))
            if found := difference(there if isinstance(there, Mapping) else {}, cell.config):
                raise ConfigError(
                    f"{path.parent} was run with other settings ({found}): remove that folder, or "
                    "give the study another one with --out FOLDER"
                )

    def settings(self) -> list[Setting]:
        """Settings of the command line that its cells were run with."""
        path = self.root / "study.json"
        there = read_json(path)["settings"] if path.is_file() else {}
        return [Setting(key, value) for key, value in there.items()]

    def settle(self, study: str, overrides: Sequence[Setting], *, keep: bool) -> None:
        """Make this the folder of one study with these settings of the command line.

        Args:
            study: Its name.
            overrides: In any order; the last of each key counts.
            keep: Write them down, so that later calls must have the same.

        Raises:
            ConfigError: It belongs to another study, or to other settings.
        """
        given = {"study": study, "settings": {s.key: s.value for s in overrides}}
        path = self.root / "study.json"
        if not path.is_file():
            if keep:
                write_json(path, given)
            return
        there = read_json(path)
        if there == given:
            return
        if there["study"] != study:
            raise ConfigError(f"{self.root} holds the study {there['study']}: use --out FOLDER")
        was = " ".join(f"{key}={value}" for key, value in there["settings"].items()) or "none"
        now = " ".join(f"{setting.key}={setting.value}" for setting in overrides) or "none"
        raise ConfigError(
            f"{self.root} holds this study with other settings on the command line ({was} there, "
            f"{now} here): give the same, or --out FOLDER"
        )
