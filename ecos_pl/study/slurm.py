"""A study as a SLURM job array: one task for each cell that is missing."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ecos_pl.overrides import ConfigError
from ecos_pl.storage import write_bytes
from ecos_pl.study.cells import REPOSITORY, Cell
from ecos_pl.study.folder import StudyFolder
from ecos_pl.study.running import command_of

_OPTIONS = (
    "--job-name=ecos-study",
    "--nodes=1",
    "--ntasks-per-node=1",
    "--gpus-per-node=1",
    "--cpus-per-task=8",
    "--time=08:00:00",
    "--signal=USR1@120",
    "--requeue",
    "--open-mode=append",
)
_PATIENCE_S = 5.0  # --list, too, holds a cell for a moment


def write_script(
    cells: Sequence[Cell],
    folder: StudyFolder,
    arguments: Sequence[str],
    *,
    options: Sequence[str] = (),
    at_once: int | None = None,
) -> Path:
    """Write the array's script into the study's folder.

    Args:
        cells: Those that are missing.
        folder: Of the study, on a disk that all nodes see.
        arguments: Of `python -m ecos_pl.study`, but for `--cell`.
        options: Of sbatch, as in `--partition=gpu`; they count more than the script's own.
        at_once: Tasks that run at a time; None: as many as SLURM likes.
    """
    logs = folder.root.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    limit = f"%{at_once}" if at_once else ""
    lines = [
        "#!/bin/bash",
        f"# {len(cells)} cells of a study, one task each. From anywhere: sbatch THIS-FILE",
        "# Two minutes before its time is up SLURM signals the task; the run then saves itself,",
        "# puts itself back into the queue, and goes on there. What is done by then ends at once.",
        *(f"#SBATCH {option}" for option in _OPTIONS),
        f"#SBATCH --array=1-{len(cells)}{limit}",
        f"#SBATCH --output={shlex.quote(f'{logs}/slurm-%A_%a.out')}",
        *(f"#SBATCH {option}" for option in options),
        "set -euo pipefail",
        f"cd {shlex.quote(os.getcwd())}",
        f'export PYTHONPATH={shlex.quote(str(REPOSITORY))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
        "# Since SLURM 22.05 srun no longer takes this over from sbatch.",
        'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',
        "cells=(",
        *(f"    {cell.run_id}" for cell in cells),
        ")",
        f"exec srun --kill-on-bad-exit=1 {shlex.quote(sys.executable)} -m ecos_pl.study \\",
        f'    {shlex.join(arguments)} --cell "${{cells[SLURM_ARRAY_TASK_ID - 1]}}"',
    ]
    path = folder.root / "slurm.sbatch"
    write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path


def submit(script: Path) -> str:
    """Hand the script to sbatch, and return what that says.

    Raises:
        ConfigError: There is no sbatch, or it refuses.
    """
    try:
        done = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(f"--submit: sbatch cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ConfigError(f"--submit: sbatch refuses {script}: {done.stderr}")
    return done.stdout.strip()


def become(cell: Cell, folder: StudyFolder) -> None:
    """Turn this process into the run of a cell: signals then reach that directly.

    Returns:
        If the cell is done; otherwise not at all.

    Raises:
        ConfigError: Another process is running the cell.
    """
    if folder.state(cell) == "done":
        return
    # Of several tasks that share one run the first holds the lock for all.
    if os.environ.get("SLURM_PROCID", "0") == "0":
        end = time.monotonic() + _PATIENCE_S
        while (descriptor := folder.take(cell)) is None:
            if time.monotonic() > end:
                raise ConfigError(f"another process is running {cell.run_id}")
            time.sleep(0.2)
        os.set_inheritable(descriptor, True)
    sys.stdout.flush()
    command = command_of(cell, folder.root)
    os.execv(command[0], command)
