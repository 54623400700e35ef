"""ONNX files run on one CPU thread, as on a small device."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecos_pl.export import INPUT
from ecos_pl.extras import require

_NUM_WARM_UP = 10
_NUM_TIMED = 200


def open_session(path: Path) -> Any:
    """An ONNX Runtime session on one CPU thread."""
    require("compress", ["onnxruntime"])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def scores_of(session: Any, images: Tensor, batch_size: int = 64) -> Tensor:
    """Class scores [N, K] of images [N, 3, S, S] uint8."""
    parts = [
        session.run(None, {INPUT: part.numpy()})[0] for part in torch.split(images, batch_size)
    ]
    return torch.from_numpy(np.concatenate(parts))


def accuracy_of(session: Any, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> float | None:
    """Share of images whose highest score is their class; None without any.

    Args:
        session: From ``open_session``.
        batches: ``(images [B, 3, S, S] uint8, targets [B, K], weights [B])``; what has no weight
            does not count.
    """
    right = total = 0
    for images, targets, weights in batches:
        counts = weights > 0
        hits = scores_of(session, images).argmax(dim=1) == targets.argmax(dim=1)
        right, total = right + int(hits[counts].sum()), total + int(counts.sum())
    return right / total if total else None


def latencies_ms(sessions: Sequence[Any], image_size: int) -> list[float]:
    """Milliseconds of one image for each session, measured in turn within one process.

    The tenth percentile of 200 turns: other work on the machine can only add to a time, and it adds
    more to what needs more memory.
    """
    image = np.random.default_rng(0).integers(0, 256, (1, 3, image_size, image_size), np.uint8)
    seconds: list[list[float]] = [[] for _ in sessions]
    for _ in range(_NUM_WARM_UP + _NUM_TIMED):
        for session, times in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            session.run(None, {INPUT: image})
            times.append(time.perf_counter() - start)
    return [1000 * float(np.percentile(times[_NUM_WARM_UP:], 10)) for times in seconds]
