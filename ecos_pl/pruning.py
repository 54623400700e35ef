"""Structured pruning: whole channels leave a network, the least important ones first.

Every set of layers that share channels (found by Torch-Pruning, Fang et al., CVPR 2023) keeps the
same share of them. So the structure, and with it size, multiply-adds and latency, follows from that
one number before anything is trained; which channels stay follows from their importance.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecos_pl.classifier import Classifier
from ecos_pl.extras import require

CHANNEL_MULTIPLE = 8
"""Channels come in multiples of this: what vector units of phones and servers work on at once."""


class PruningError(ValueError):
    """A network that cannot be pruned; the message is one line."""


def round_channels(channels: int, keep: float) -> int:
    """Channels that stay: the nearest multiple of 8, at least 8, at most all.

    >>> [round_channels(64, keep) for keep in (1, 0.5, 0.3, 0.01)], round_channels(6, 0.5)
    ([64, 32, 16, 8], 6)
    """
    nearest = int(channels * keep / CHANNEL_MULTIPLE + 0.5) * CHANNEL_MULTIPLE
    return min(channels, max(CHANNEL_MULTIPLE, nearest))


def channel_groups(model: Classifier) -> dict[str, int]:
    """Sets of layers that share channels: name of the first layer → channels per convolution group.

    Raises:
        PruningError: The network's connections cannot be followed.
    """
    return {name: one.channels for name, one in _channel_sets(model).items()}


def narrowed(full: Mapping[str, int], keep: float) -> dict[str, int]:
    """Widths at which each set of layers keeps this share of the channels in ``full``."""
    return {name: round_channels(channels, keep) for name, channels in full.items()}


def prune(model: Classifier, widths: Mapping[str, int], gradients: Mapping[str, Tensor]) -> None:
    """Remove channels, in place, until each set of layers has the width wanted.

    The importance of a channel is the first-order Taylor estimate of what the loss changes when it
    goes (Molchanov et al., CVPR 2019), summed over all layers that share it. The head's outputs
    and attention's heads stay.

    Args:
        model: To prune.
        widths: Name of each set's first layer → channels that stay, as from ``narrowed``.
        gradients: By parameter name, what ``typical_gradients`` found; without any, large
            weights count as important.

    Raises:
        PruningError: The network's connections cannot be followed.
    """
    import torch_pruning as tp

    for name, parameter in model.net.named_parameters():
        parameter.grad = gradients.get(name, torch.zeros_like(parameter)) if gradients else None
    sets = _channel_sets(model)
    kind = tp.importance.GroupTaylorImportance if gradients else tp.importance.MagnitudeImportance
    importance = kind(normalizer=None)
    removed = {
        name: one.least_important(importance, one.channels - widths[name])
        for name, one in sets.items()
        if one.channels > widths[name]
    }
    for name, rows in removed.items():
        sets[name].remove(rows)
    model.net.to(memory_format=torch.channels_last)
    model.zero_grad(set_to_none=True)


def typical_gradients(model: Classifier, losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """Root mean square gradient of each parameter, by name, over losses that are made one by one.

    Not the mean: where a network has learned its images, that is near zero for every channel.
    """
    squares: dict[str, Tensor] = {}
    number = 0
    for loss in losses:
        model.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        number += 1
        for name, parameter in model.net.named_parameters():
            if parameter.grad is not None:
                square = parameter.grad.detach().float().square()
                squares[name] = squares[name] + square if name in squares else square
    model.zero_grad(set_to_none=True)
    return {name: (square / number).sqrt() for name, square in squares.items()}


def pruned_copy(model: Classifier, keep: float) -> Classifier:
    """A copy whose sets of layers keep a share of their channels, large weights first."""
    smaller = copy.deepcopy(model)
    if keep < 1:
        prune(smaller, narrowed(channel_groups(model), keep), {})
    return smaller.eval()


@dataclass(frozen=True)
class _ChannelSet:
    """Layers that share channels.

    Attributes:
        graph: Torch-Pruning's graph of the network.
        group: Its description of the set, with all channels.
        channels: Of the first layer, in each of ``num_groups``.
        num_groups: Groups of grouped convolutions, which lose the same channels each; 1 mostly.
    """

    graph: Any
    group: Any
    channels: int
    num_groups: int

    def least_important(self, importance: Callable[[Any], Tensor | None], number: int) -> list[int]:
        scores = importance(self.group)
        assert scores is not None, "a set of layers without weights"
        order = scores.view(self.num_groups, -1).mean(dim=0).argsort(stable=True)[:number]
        starts = self.channels * torch.arange(self.num_groups, device=order.device)
        rows: list[int] = (starts[:, None] + order).flatten().sort().values.tolist()
        return rows

    def remove(self, rows: list[int]) -> None:
        first = self.group[0].dep
        self.graph.get_pruning_group(first.target.module, first.handler, rows).prune()


def _channel_sets(model: Classifier) -> dict[str, _ChannelSet]:
    require("compress", ["torch_pruning"])
    import torch_pruning as tp

    net = model.net
    names = {module: name for name, module in net.named_modules()}
    weight = next(net.parameters())
    example = torch.zeros(1, 3, model.image_size, model.image_size).to(weight)
    training = net.training
    net.eval()
    try:
        with torch.enable_grad():
            graph = tp.DependencyGraph().build_dependency(net, example)
        head: nn.Module = net.get_classifier()  # type: ignore[operator]  # every timm model has it
        attention = [module for module in net.modules() if hasattr(module, "qkv")]
        ignored = [inner for module in (head, *attention) for inner in module.modules()]
        found = list(graph.get_all_groups(ignored_layers=ignored))
    except Exception as error:  # of many kinds: it follows whatever a network does
        reason = " ".join(str(error).split())[:120]
        raise PruningError(
            f"the channels of {model.backbone} cannot be pruned: {reason}"
        ) from error
    finally:
        net.train(training)
    sets = {}
    for group in found:
        num_groups = max(_groups_of(dep.target.module) for dep, _ in group)
        channels = len(group[0].idxs) // num_groups
        sets[names[group[0].dep.target.module]] = _ChannelSet(graph, group, channels, num_groups)
    if not sets:
        raise PruningError(f"{model.backbone} has no channels that can be pruned")
    return sets


def _groups_of(module: nn.Module) -> int:
    """Groups that must stay equally wide; a depthwise convolution's are its channels."""
    if isinstance(module, nn.GroupNorm):
        return module.num_groups
    groups = getattr(module, "groups", 1) if isinstance(module, nn.Conv2d) else 1
    return 1 if groups == getattr(module, "out_channels", 0) else groups
