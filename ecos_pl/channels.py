"""A network with fewer channels, rebuilt from the shapes of its weights alone; no pickle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def fit_shapes(net: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a freshly built network the channels that a state dict of its pruned kin has, in place.

    What the weights hold is left undefined where a shape changes: load the state dict next. No
    other network fits: names and numbers of dimensions must agree, and no side may be longer.

    Raises:
        ValueError: The state dict is no pruned version of this network's; one line.
    """
    own = net.state_dict()
    if different := sorted(set(own) ^ set(state)):
        where = "missing" if different[0] in own else "unexpected"
        raise ValueError(f"{different[0]} is {where}")
    for name, tensor in state.items():
        before, after = own[name].shape, tensor.shape
        if len(before) != len(after) or any(n > m for n, m in zip(after, before, strict=True)):
            raise ValueError(f"{name} is {list(after)}, and at most {list(before)} would fit")
    for prefix, module in net.named_modules():
        names = [name for name, _ in module.named_parameters(recurse=False)]
        names += [name for name, _ in module.named_buffers(recurse=False)]
        shapes = {name: state[key].shape for name in names if (key := _join(prefix, name)) in state}
        old = {name: getattr(module, name).shape for name in shapes}
        if shapes != old:
            for name, shape in shapes.items():
                _replace(module, name, shape)
            _describe(module, old)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _replace(module: nn.Module, name: str, shape: torch.Size) -> None:
    tensor = getattr(module, name)
    fresh = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(fresh, requires_grad=tensor.requires_grad))
    else:
        module.register_buffer(name, fresh)


def _describe(module: nn.Module, old: Mapping[str, torch.Size]) -> None:
    """Set what a module says of its channels, which its arithmetic goes by."""
    if isinstance(module, nn.Conv2d):
        outputs, inputs = module.weight.shape[:2]
        if module.groups > 1 and module.groups == module.in_channels:  # depthwise
            module.groups = outputs // (old["weight"][0] // module.groups)
        module.out_channels, module.in_channels = outputs, inputs * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        module.num_features = len(module.running_mean if module.weight is None else module.weight)
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(module.weight)
