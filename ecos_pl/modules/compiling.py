"""A training pass through ``torch.compile`` where that works, and a warning where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

Pass = Callable[[Tensor], Any]


class CompiledPass:
    """What a training step calls on its images: compiled, if that works for these.

    Whether it does shows only in a whole pass, there and back: a compiler may be missing, and what
    it makes may fail on a device in the gradients alone (PyTorch's issue 171622: convolutions in
    channels-last over maps of one pixel). A run must not die in its first step for want of speed,
    so the first images are tried; what the trial changed is put back, and training goes on with
    what works. Passes without gradients stay as they are: batches of other sizes would have to be
    compiled too.

    Where a strategy shards the weights there is no trial, since a pass of its own would disturb the
    strategy; whether there is a compiler at all is then found out on something small.

    Args:
        function: Images [B, 3, S, S] uint8 to a tensor, or to several; None among them are allowed.
        module: Whose weights it uses, on its device and with its trainer.
    """

    def __init__(self, function: Pass, module: L.LightningModule) -> None:
        self._function, self._module = function, module
        self._call: Pass | None = None

    def __call__(self, images: Tensor) -> Any:
        """The function's result."""
        if self._call is None:
            self._call = self._what_works(images)
        return self._call(images)

    def try_again(self) -> None:
        """Begin anew: the network has changed."""
        self._call = None

    def _what_works(self, images: Tensor) -> Pass:
        try:
            strategy = self._module.trainer.strategy
            if isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
                compiled: Pass = torch.compile(self._function)
                self._there_and_back(compiled, images)
            else:
                torch.compile(_small)(torch.zeros(8, device=images.device))
                compiled = torch.compile(self._function)
        except Exception as error:  # of whatever kind: each backend has its own
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(
                f"task.compile: nothing is compiled on this {images.device.type}: {reason}",
                stacklevel=4,
            )
            return self._function
        return compiled

    def _there_and_back(self, compiled: Pass, images: Tensor) -> None:
        """Raise whatever goes wrong; leave weights, gradients, statistics and random numbers."""
        before = {name: value.clone() for name, value in self._module.named_buffers()}
        devices = [images.device] if images.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices):
                results = compiled(images)
            outputs = results if isinstance(results, (tuple, list)) else (results,)
            total = torch.stack([one.float().square().mean() for one in outputs if one is not None])
            weights = [one for one in self._module.parameters() if one.requires_grad]
            torch.autograd.grad(total.sum(), weights, allow_unused=True)
        finally:
            with torch.no_grad():
                for name, value in self._module.named_buffers():
                    value.copy_(before[name])


def _small(values: Tensor) -> Tensor:
    return values.sin() + 1
