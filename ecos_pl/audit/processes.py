"""Does the noise repeat in another process, new or forked, where every seed is equal?"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ecos_pl.audit.checks import AuditFailure
from ecos_pl.audit.draws import LENGTH

_PROGRAM = ("-m", "ecos_pl.audit.draws")


def check_processes(program: Sequence[str] = _PROGRAM) -> None:
    """Two processes with equal seeds and their forked children draw four different noises.

    Args:
        program: What Python runs, twice; each line it prints is `LENGTH` noises and as many coins.
    """
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    started = [
        subprocess.Popen(
            [sys.executable, *program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        for _ in range(2)
    ]
    lines = [line for process in started for line in process.communicate()[0].splitlines()]
    if any(process.returncode for process in started) or len(lines) < 2:
        raise AuditFailure("a process that draws noise could not be run")
    draws = [np.array(line.split(), dtype=np.int64) for line in lines]
    for index, first in enumerate(draws):
        for second in draws[:index]:
            # Noise this wide is equal in two draws once in millions; 64 coins, once in 2^64.
            if (first[:LENGTH] == second[:LENGTH]).mean() > 0.1:
                raise AuditFailure("the noise repeats in another process")
            if (first[LENGTH:] == second[LENGTH:]).all():
                raise AuditFailure("the Poisson mask repeats in another process")
