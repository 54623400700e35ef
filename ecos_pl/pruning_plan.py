"""How much to prune for a target as a user thinks of it: size, latency, multiply-adds, sparsity.

All layers keep the same share of their channels, so that share is found before anything is
trained, on copies: a target that cannot be reached is known at once.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecos_pl.channels import fit_shapes
from ecos_pl.classifier import Classifier
from ecos_pl.export import exported, write_onnx
from ecos_pl.model_size import macs, parameter_count
from ecos_pl.onnx_run import latencies_ms, open_session
from ecos_pl.pruning import PruningError, pruned_copy
from ecos_pl.quantization import Recipe, quantise

NUM_SHARES = 64
"""Shares of channels that are told apart: 1/64, 2/64, …, 1."""

LATENCY_MARGIN = 0.05
"""By which share a candidate must be faster than asked: times vary from one measurement to the
next, and a search among candidates ends at one whose time came out low."""

_UNITS = {"size_mb": " MB", "latency_ms": " ms", "macs": " multiply-adds", "sparsity": ""}


@dataclass(frozen=True)
class Target:
    """What a compressed model must not exceed (of ``sparsity``: must reach).

    Attributes:
        name: ``size_mb``, ``latency_ms``, ``macs`` or ``sparsity``.
        value: In that unit.
    """

    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"


@dataclass(frozen=True)
class PruningPlan:
    """What a target comes to.

    Attributes:
        keep: Share of the channels that stay.
        expected: What the target's quantity will then be.
    """

    keep: float
    expected: float


def plan_pruning(
    model: Classifier, target: Target, done: Callable[[int], None] = lambda num: None
) -> PruningPlan:
    """The largest share of channels with which a model meets a target.

    Args:
        model: What will be pruned; it stays as it is.
        target: Size and latency are measured on each candidate's int8 file; latency as that of the
            delivered file will be, in turn with the unpruned float model, whose weights push
            those of the candidate out of the caches.
        done: Told after each candidate.

    Raises:
        PruningError: The target is out of reach, and the text says what is within; or the network
            does not work with fewer channels.
    """
    with contextlib.ExitStack() as stack:
        beside = []
        if target.name == "latency_ms":
            unpruned = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "float.onnx"
            write_onnx(unpruned, model, exported(copy.deepcopy(model).eval()))
            beside = [open_session(unpruned)]

        def cost(share: int) -> float:
            found = _measure(model, target.name, share / NUM_SHARES, beside)
            done(1)
            return found

        return _searched(model, target, cost)


def _searched(model: Classifier, target: Target, cost: Callable[[int], float]) -> PruningPlan:
    sign = -1 if target.name == "sparsity" else 1
    limit = target.value * (1 - LATENCY_MARGIN if target.name == "latency_ms" else 1)

    def meets(found: float) -> bool:
        return sign * found <= sign * limit

    found = cost(NUM_SHARES)
    if meets(found):
        return PruningPlan(1.0, found)
    _check_rebuilt(model)
    fewest = cost(1)
    if not meets(fewest):
        unit = _UNITS[target.name]
        raise PruningError(
            f"task.target.{target} is out of reach of {model.backbone}: pruned to a few channels "
            f"a layer it comes to {fewest:.3g}{unit} (unpruned: {found:.3g}{unit})"
            + (
                f"; times vary, and a margin of {LATENCY_MARGIN:.0%} is kept"
                if target.name == "latency_ms"
                else ""
            )
        )
    low, high, reached = 1, NUM_SHARES, fewest  # low meets the target, high does not
    while high - low > 1:
        middle = (low + high) // 2
        found = cost(middle)
        if meets(found):
            low, reached = middle, found
        else:
            high = middle
    return PruningPlan(low / NUM_SHARES, reached)


def _check_rebuilt(model: Classifier) -> None:
    """Refuse a network that does not run pruned, or would not come back from its file."""
    size = model.image_size
    images = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    try:
        smaller, again = pruned_copy(model, 0.5), copy.deepcopy(model).eval()
        state = smaller.net.state_dict()
        fit_shapes(again.net, state)
        again.net.load_state_dict(state)
        with torch.no_grad():
            same = torch.allclose(smaller(images), again(images), rtol=1e-3, atol=1e-3)
    except (RuntimeError, IndexError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise PruningError(
            f"{model.backbone} does not run with fewer channels: {reason}"
        ) from error
    if not same:
        raise PruningError(f"{model.backbone} is another network with fewer channels")


def _measure(model: Classifier, name: str, keep: float, beside: Sequence[Any]) -> float:
    smaller = pruned_copy(model, keep)
    if name == "sparsity":
        return 1 - parameter_count(smaller) / parameter_count(model)
    if name == "macs":
        return float(macs(smaller.net, model.image_size))
    size = model.image_size
    images = torch.randint(
        0, 256, (8, 3, size, size), generator=torch.Generator().manual_seed(0)
    ).byte()
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        write_onnx(plain, smaller, exported(smaller))
        quantise(plain, small, smaller, images, Recipe("minmax"))
        if name == "size_mb":
            return small.stat().st_size / 1e6
        return latencies_ms([*beside, open_session(plain), open_session(small)], size)[-1]
