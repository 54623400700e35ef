"""What a network costs where it runs: parameters, bytes, multiply-adds, time per image."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

_NUM_WARM_UP = 5
_NUM_TIMED = 30


def parameter_count(net: nn.Module) -> int:
    """Number of weights, each counted once however many names it has; no buffers."""
    return sum(weight.numel() for weight in net.parameters())


def size_mb(net: nn.Module) -> float:
    """Bytes of the state dict (weights and buffers that are saved), in units of 10⁶ bytes."""
    state: dict[str, Tensor] = net.state_dict()
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values()) / 1e6


def macs(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of one image in eval mode: convolutions and matrix products.

    As the field counts them: what adds or scales element by element (batch norm, activations) is
    left out.

    Args:
        model: A network, or a `Classifier`; on any device.
        image_size: Side of the input in pixels.
    """
    image = _images(model, 1, image_size)
    # The plain attention is made of matrix products, which are counted everywhere.
    with _evaluated(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(image)
    flops: int = counter.get_total_flops()
    return flops // 2  # it counts a multiply-add as two operations


def latency_ms(
    model: Callable[[Tensor], Any],
    image_size: int,
    device: torch.device | str,
    batch_size: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Milliseconds of one forward pass: the median of 30, after 5 to warm up.

    On a CPU one thread computes, as on a small device, and so that figures of different machines
    say the same thing.

    Args:
        model: A network, which is moved to the device; or any function of images, run as it is.
        image_size: Side of the images in pixels.
        device: Where the images lie.
        batch_size: Images a pass.
        dtype: Of the images; a delivered ONNX file may want ``torch.uint8``.
    """
    device = torch.device(device)
    images = torch.zeros(batch_size, 3, image_size, image_size, device=device).to(dtype)
    quiet: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if isinstance(model, nn.Module):
        model.to(device)
        quiet = _evaluated(model)
    seconds = []
    with _one_thread(device), torch.inference_mode(), quiet:
        for _ in range(_NUM_WARM_UP + _NUM_TIMED):
            _wait(device)
            start = time.perf_counter()
            model(images)
            _wait(device)
            seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds[_NUM_WARM_UP:])


def _images(model: nn.Module, batch_size: int, image_size: int) -> Tensor:
    like = next(model.parameters())
    return torch.zeros(batch_size, 3, image_size, image_size, device=like.device, dtype=like.dtype)


@contextlib.contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every submodule then has the mode back that it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
