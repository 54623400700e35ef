"""Run a script as the ranks of one gloo world: real processes, as many as asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PREAMBLE = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
if world_size > 1:
    store = dist.FileStore(str(folder / f"store{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
"""
"""Comes before the script, which finds `rank`, `world_size` and `folder` (argument 3) defined."""


def start_ranks(script: str, world_size: int, folder: Path) -> list[subprocess.Popen[str]]:
    """Start the processes; whoever calls this also ends them."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + script, str(rank), str(world_size), str(folder)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def end(processes: list[subprocess.Popen[str]], timeout_s: float = 180) -> list[tuple[str, str]]:
    """Wait for all processes, and end those that do not; their (stdout, stderr)."""
    try:
        return [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_ranks(script: str, world_size: int, folder: Path, timeout_s: float = 180) -> list[str]:
    """Run the script in every rank; their outputs, if all of them succeed."""
    processes = start_ranks(script, world_size, folder)
    outputs = end(processes, timeout_s)
    for process, (_, log) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, log
    return [output for output, _ in outputs]
