"""Finds the sets of coupled channels of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .channel_sets import ChannelIndex, Channels, ChannelSet, ExcludedSet
from .channel_trial import proven
from .dependency_graph import candidates, count_calls
from .surgery import check_parameters, copy_module, without_hooks

__all__ = ["ChannelIndex", "ChannelSet", "Channels", "ExcludedSet", "channels"]

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}


def channels(model: nn.Module, example_inputs: Any) -> Channels:
    """Finds the sets of coupled channels: those that can only be taken out together.

    A channel is a row of the layers that produce it and a column of the layers that read it. Layers
    whose outputs are added, as in a residual stream, share their channels. In a convolution with
    groups the smallest unit is a whole group.

    torch-pruning's dependency graph (Fang et al., *DepGraph: Towards any structural pruning*, 2023)
    gives the candidates. Each is tried out on a copy with random float64 weights: half of its
    channels are set to zero and then taken out, and the outputs must agree to a relative 1e-9. A
    set that fails is listed in ``excluded`` with the module that prevents the removal: a LayerNorm
    mixes channels, for example, and a sigmoid turns 0 into 0.5. Whether a set's norms alone make
    its channels zero (``closing_norms``) is tried in the same way: the outputs must be those of
    zeros in all producers, and every consumer must read zeros.

    Args:
        model: any module; it isn't changed, and its hooks aren't run.
        example_inputs: what one forward pass takes: a tensor, a tuple of arguments, or a dict of
            keyword arguments. Small images do. The first dimension of the first tensor counts
            examples.

    Returns:
        The sets, a sequence in the model's order, with ``excluded`` and ``multiply_adds``. A
        ResNet-50 has 37 sets with 11,456 channels.

    Raises:
        ImportError: torch-pruning isn't installed.
        TypeError: ``model`` is no module.
        ValueError: it is wrapped, sharded, has hooks that a copy would lose, or can't be followed;
            the module or parameter is named.

    Example:
        >>> found = channels(resnet18(), torch.rand(1, 3, 32, 32))
        >>> len(found), found.total
        (12, 2880)
        >>> found[1].name, found[1].size
        ('layer1.0.conv1', 64)
        >>> [rows.tensor for rows in found[1].producers]
        ['layer1.0.conv1.weight', 'layer1.0.bn1.weight', 'layer1.0.bn1.bias']
    """
    check_model(model, "channels")
    with torch.inference_mode(False), torch.enable_grad(), _no_autocast(model):
        copy = without_hooks(copy_module(model)).eval().double().requires_grad_(False)
        for parameter in copy.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)
        forward = _forward(example_inputs)
        calls, total = count_calls(copy, forward)
        found, excluded = candidates(copy, forward, calls)
        copy.requires_grad_(False)
        good, bad = proven(copy, forward, found)
    count = _examples(example_inputs)
    multiply_adds = {name: number // count for name, number in total.items()}
    return Channels(tuple(good), (*excluded, *bad), multiply_adds)


def check_model(model: Any, who: str) -> None:
    """Refuses what no channels can be taken out of.

    Raises:
        TypeError: it is no module.
        ValueError: it is a wrapper, or a parameter can't be copied.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model is a {type(model).__name__}: must be a module")
    kind = type(model).__name__
    if kind in _WRAPPERS:
        raise ValueError(f"{who}: model is a {kind}: must be what it wraps, .{_WRAPPERS[kind]}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{who}: model is a {kind}: must be the module it was made from")
    try:
        check_parameters(model)
    except ValueError as error:
        raise ValueError(f"{who}: {error}") from None


def _forward(example_inputs: Any) -> Callable[[nn.Module], Any]:
    """Runs a model on the inputs, those of floating point in float64."""

    def double(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().double()
        return value

    inputs = tree_map(double, example_inputs)
    if isinstance(inputs, Mapping):
        return lambda model: model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return lambda model: model(*inputs)
    return lambda model: model(inputs)


def _examples(example_inputs: Any) -> int:
    for value in tree_leaves(example_inputs):
        if isinstance(value, Tensor) and value.dim():
            return max(1, value.shape[0])
    return 1


def _no_autocast(model: nn.Module) -> torch.autocast:
    first = next(iter(model.parameters()), None)
    device = first.device.type if first is not None else "cpu"
    return torch.autocast(device, enabled=False)
