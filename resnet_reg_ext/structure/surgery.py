"""Copies a model without some of its channels, and takes an optimizer along."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from .channel_sets import ChannelSet, tensors_of

# For each tensor and dimension the positions that stay.
Positions = dict[str, dict[int, Tensor]]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def positions_kept(
    tensors: Mapping[str, Tensor], sets: Sequence[ChannelSet], kept: Sequence[Tensor]
) -> Positions:
    """From channels to tensors.

    Args:
        tensors: the model's parameters and buffers by name.
        sets: of coupled channels.
        kept: for each set a bool for each channel.
    """
    masks: dict[tuple[str, int], list[bool]] = {}
    for one, stays in zip(sets, kept, strict=True):
        for index in one.all:
            size = tensors[index.tensor].shape[index.dim]
            for positions, stay in zip(index.indices, stays.tolist(), strict=True):
                if not stay:
                    mask = masks.setdefault((index.tensor, index.dim), [True] * size)
                    for position in positions:
                        mask[position] = False
    result: Positions = {}
    for (name, dim), mask in masks.items():
        stay = torch.tensor([i for i, keep in enumerate(mask) if keep], dtype=torch.long)
        result.setdefault(name, {})[dim] = stay.to(tensors[name].device)
    return result


def take(tensor: Tensor, positions: Mapping[int, Tensor]) -> Tensor:
    """A new tensor with these positions of each dimension, in the same memory format."""
    if not positions:
        return tensor.detach().clone()
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    taken = tensor.detach()
    for dim, stay in positions.items():
        taken = taken.index_select(dim, stay.to(taken.device))
    back = sorted(range(tensor.dim()), key=order.__getitem__)
    return taken.permute(order).contiguous().permute(back)


def cut(model: nn.Module, positions: Positions) -> nn.Module:
    """A copy of the model with only these positions. Gradients go along."""
    # What the memo of a deep copy has is taken instead of a copy, wherever it is referred to.
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        memo[id(parameter)] = _without(parameter, positions.get(name, {}))
    for name, buffer in model.named_buffers():
        if name in positions:
            memo[id(buffer)] = take(buffer, positions[name])
    new = copy_module(model, memo)
    for path, module in new.named_modules():
        prefix = f"{path}." if path else ""
        own = [*module._parameters, *module._buffers]
        if any(prefix + local in positions for local in own):
            fit_attributes(module)
    return new


def _without(parameter: nn.Parameter, positions: Mapping[int, Tensor]) -> nn.Parameter:
    """A new parameter with its gradient and the attributes that were set on the old one."""
    new = nn.Parameter(take(parameter, positions), parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    if parameter.grad is not None:
        new.grad = take(parameter.grad, positions)
    return new


def fit_attributes(module: nn.Module, groups: int | None = None) -> None:
    """Sets a layer's numbers of channels and groups by the shape of its weight.

    Args:
        module: a convolution, linear layer, norm or PReLU; others are left alone.
        groups: of a convolution; None keeps the rows that each group has.
    """
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, _ConvNd):
        if module.groups > 1 or groups is not None:
            rows = max(1, module.out_channels // module.groups)
            module.groups = groups if groups is not None else weight.shape[0] // rows
        outs, ins = (1, 0) if module.transposed else (0, 1)
        module.out_channels = weight.shape[outs]
        module.in_channels = weight.shape[ins] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, _NormBase):
        statistics = weight if weight is not None else module.running_mean
        if statistics is not None:
            module.num_features = statistics.shape[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]


def copy_module(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy that keeps forward and backward hooks.

    A hook that is a method of something outside the model stays that very object's method.

    Args:
        model: any module.
        memo: as ``copy.deepcopy`` takes it: by id what stands for an object in the copy.

    Raises:
        ValueError: the model can't be copied, or a hook refers to one of its modules or parameters,
            which the copy doesn't have.
    """
    memo = {} if memo is None else memo
    own = {id(module) for module in model.modules()} | {id(p) for p in model.parameters()}
    for path, hook in _module_hooks(model):
        function = hook.func if isinstance(hook, partial) else hook
        if any(id(value) in own for value in _closed_over(function)):
            raise ValueError(
                f"{path or 'the model'} has a hook ({getattr(function, '__name__', function)}) "
                "that refers to the model's own modules or parameters and would go on with the "
                "old ones: must be removed first and registered on the new model"
            )
        if isinstance(hook, MethodType):
            if id(hook.__self__) not in own:
                memo[id(hook.__self__)] = hook.__self__
        elif not isinstance(hook, partial) and id(hook) not in own:
            memo[id(hook)] = hook
    for module in model.modules():
        # What a forward pass has left behind, as masked and normalised weights: it will be made
        # anew, and deepcopy refuses what autograd has made.
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{type(model).__name__} can't be copied: {error}") from None


def _closed_over(function: Any) -> Iterator[Any]:
    """The values that a closure holds."""
    for cell in getattr(function, "__closure__", None) or ():
        # A cell is empty until its variable is assigned.
        with contextlib.suppress(ValueError):
            yield cell.cell_contents


def _module_hooks(model: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    for path, module in model.named_modules():
        for kind in _HOOKS:
            for hook in getattr(module, kind).values():
                yield path, hook


def without_hooks(model: nn.Module) -> nn.Module:
    """The model after its users' hooks were dropped; torch's own, which make weights, stay."""
    for module in model.modules():
        for kind in _HOOKS:
            hooks = getattr(module, kind)
            for key, hook in list(hooks.items()):
                if not str(getattr(type(hook), "__module__", "")).startswith("torch."):
                    del hooks[key]
                    for flags in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
                        getattr(module, flags).pop(key, None)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def check_parameters(model: nn.Module) -> None:
    """Refuses what would be lost or wrong in a copy.

    Raises:
        ValueError: a parameter has a hook of its own, or isn't a plain tensor.
    """
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or type(parameter.data) is not Tensor:
            raise ValueError(
                f"{name} is a {type(parameter.data).__name__}: must be a plain tensor; take "
                "channels out before the model is sharded or quantised"
            )
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"{name} has a hook, which a new parameter wouldn't have: must be removed first "
                "and registered on the new model's"
            )


def plan_optimizer(
    optimizer: Optimizer, old: nn.Module, new: nn.Module, positions: Positions
) -> Callable[[], None]:
    """Prepares an optimizer of ``old`` for ``new``; nothing changes until the result is called.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it has none of the model's parameters, or state that can't be cut.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}: must be a torch.optim.Optimizer"
        )
    names: dict[Tensor, str] = {p: name for name, p in old.named_parameters()}
    successors: dict[str, Tensor] = dict(new.named_parameters())
    groups = [
        _group_without(group, names, successors, positions) for group in optimizer.param_groups
    ]
    if not any(p in names for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer has none of the model's parameters: must be the model's own")
    state: list[tuple[Any, Any]] = []
    for key, of_parameter in optimizer.state.items():
        if not isinstance(key, Tensor) or key not in names:
            state.append((key, of_parameter))
        elif names[key] in successors:
            name = names[key]
            state.append((successors[name], _take_state(name, key, of_parameter, positions)))

    def commit() -> None:
        for group, lists in zip(optimizer.param_groups, groups, strict=True):
            for key, values in lists.items():
                group[key][:] = values
        optimizer.state.clear()
        optimizer.state.update(state)

    return commit


def _group_without(
    group: dict[str, Any],
    names: Mapping[Tensor, str],
    successors: Mapping[str, Tensor],
    positions: Positions,
) -> dict[str, list[Any]]:
    """The group's lists that have an entry for each parameter, without those that are gone."""
    stays = [p not in names or names[p] in successors for p in group["params"]]
    lists: dict[str, list[Any]] = {
        key: [value for value, stay in zip(group[key], stays, strict=True) if stay]
        for key in ("param_names", "rows", "row_weights")
        if isinstance(group.get(key), list) and len(group[key]) == len(stays)
    }
    if "row_weights" in lists:
        remaining = [p for p, stay in zip(group["params"], stays, strict=True) if stay]
        lists["row_weights"] = [
            _weights_of_rows(weights, positions.get(names.get(p, ""), {}))
            for weights, p in zip(lists["row_weights"], remaining, strict=True)
        ]
    lists["params"] = [
        successors[names[p]] if p in names else p
        for p, stay in zip(group["params"], stays, strict=True)
        if stay
    ]
    return lists


def _weights_of_rows(weights: Any, kept: Mapping[int, Tensor]) -> Any:
    """The group lasso's weights, one for each row or one for all, of the rows that stay."""
    if 0 not in kept or not isinstance(weights, (list, tuple, Tensor)):
        return weights
    if isinstance(weights, Tensor):
        return weights[kept[0].to(weights.device)]
    return [weights[i] for i in kept[0].tolist()]


def _take_state(name: str, parameter: Tensor, state: Any, positions: Positions) -> Any:
    """A parameter's state for its successor. What isn't cut is handed on as it is."""
    if name not in positions:
        return state
    taken = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value = take(value, positions[name])
        elif (isinstance(value, Tensor) and value.numel() != 1) or isinstance(
            value, (list, tuple, dict)
        ):
            kind = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"optimizer's state {key!r} of {name} is {kind}: must be a tensor of the "
                f"parameter's shape {tuple(parameter.shape)} or a single number to lose channels"
            )
        taken[key] = value
    return taken


def check_average(average: nn.Module, model: nn.Module) -> None:
    """Refuses an average of another model.

    Raises:
        ValueError: its tensors differ in names or shapes.
    """
    ours, others = tensors_of(model), tensors_of(average)
    for name in sorted({*ours} ^ {*others}):
        raise ValueError(f"average isn't of this model: {name} is only in one of them")
    for name, tensor in ours.items():
        if others[name].shape != tensor.shape:
            raise ValueError(
                f"average isn't of this model: {name} is {tuple(others[name].shape)}, must be "
                f"{tuple(tensor.shape)}"
            )
