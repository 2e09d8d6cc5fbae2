"""The step inside torch.compile: one operator that reads the options when it runs.

If the options were read while compiling, the compiled code would hold for their values alone, and
every new learning rate would compile anew. So the operator gets a number that stands for the
optimizer, and the tensors. An option that is a tensor is among those, as code before the step in
the same graph may have changed it.

Imported when something is compiled, not before: it takes torch._dynamo with it, two seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _distributed
from .prox_sgd import (
    ProxSGD,
    has_master,
    momentum_dtype_of,
    new_master,
    new_momentum,
    optimizers_by_number,
)

if TYPE_CHECKING:
    from .functional import DeviceValues

_TENSOR_OPTIONS = ("lr", "l1")
# What a parameter comes with: bits of the operator's `kinds`.
_MOMENTUM, _FIRST, _MASTER = 1, 2, 4


class Row(NamedTuple):
    """A parameter with what belongs to it, as the operator got it."""

    group: int
    position: int
    param: Tensor
    grad: Tensor
    momentum: Tensor | None
    master: Tensor | None
    first: bool


@torch.library.custom_op(
    "resnet_reg_ext::prox_sgd_step",
    mutates_args=("params", "momenta", "masters"),
    schema="(str optimizer, int[] groups, int[] positions, int[] kinds, Tensor(a!)[] params, "
    "Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] masters, int[] option_keys, "
    "Tensor[] options, Tensor? grad_scale, Tensor? grad_coefficient, Tensor? found_inf) -> ()",
)
def prox_sgd_step(
    optimizer: str,
    groups: Sequence[int],
    positions: Sequence[int],
    kinds: Sequence[int],
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    masters: Sequence[Tensor],
    option_keys: Sequence[int],
    options: Sequence[Tensor],
    grad_scale: Tensor | None,
    grad_coefficient: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """A step of the optimizer that a number stands for, on the tensors given.

    ``groups`` and ``positions`` say of each parameter where it is in the optimizer, ``kinds`` which
    of momentum and master weight it comes with. ``option_keys`` are 2 times the group, plus 1 for
    l1.
    """
    alive = optimizers_by_number.get(optimizer)
    if alive is None:
        raise RuntimeError("ProxSGD: a compiled step was called after its optimizer was deleted")
    next_momentum, next_master = iter(momenta), iter(masters)
    rows = [
        Row(
            group,
            position,
            param,
            grad,
            next(next_momentum) if kind & _MOMENTUM else None,
            next(next_master) if kind & _MASTER else None,
            bool(kind & _FIRST),
        )
        for group, position, kind, param, grad in zip(
            groups, positions, kinds, params, grads, strict=True
        )
    ]
    tensors: dict[int, dict[str, Tensor]] = {}
    for key, value in zip(option_keys, options, strict=True):
        tensors.setdefault(key // 2, {})[_TENSOR_OPTIONS[key % 2]] = value
    alive._step_on(rows, tensors, grad_scale, grad_coefficient, found_inf)


@prox_sgd_step.register_fake
def _(*_: Any) -> None:
    return None


class _Group(NamedTuple):
    """What the compiled code depends on of a group's options."""

    with_momentum: bool
    dtypes: tuple[tuple[torch.dtype, bool], ...]
    """Of each parameter, what its momentum is stored in and whether it has a master weight."""
    tensors: tuple[str, ...]
    """The options that are tensors."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _read_groups(optimizer: str) -> tuple[_Group, ...] | None:
    """Read once, while compiling, without a guard on the options' values.

    None if there are DTensors, which the operator can't take.
    """
    alive = optimizers_by_number[optimizer]
    groups = alive.param_groups
    if any(_distributed.has_dtensors(group["params"]) for group in groups):
        return None
    alive._groups_traced = groups
    # By position, as dynamo guards the keys of a dict, and these keys are parameters. What isn't in
    # the state yet comes into it when the step has run.
    alive._states_traced = [[alive.state.get(p, {}) for p in group["params"]] for group in groups]
    return tuple(
        _Group(
            bool(group["momentum"] != 0),
            tuple((momentum_dtype_of(group, p), has_master(group, p)) for p in group["params"]),
            tuple(key for key in _TENSOR_OPTIONS if isinstance(group[key], Tensor)),
        )
        for group in groups
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eager(optimizer: ProxSGD, scaling: DeviceValues | None) -> None:
    optimizer._step(scaling)


@torch.no_grad()
def step(optimizer: ProxSGD, scaling: DeviceValues | None) -> None:
    """What torch.compile sees of a step: state is created, and one operator does the rest.

    ``param_groups`` isn't touched, but the same list under another name: dynamo would guard the
    value of every option.
    """
    found = _read_groups(optimizer._number)
    if found is None:
        _eager(optimizer, scaling)
        return
    columns: tuple[list[Any], ...] = tuple([] for _ in range(9))
    groups, positions, kinds, params, grads, momenta, masters, keys, options = columns
    created: list[tuple[dict[str, Any], str, Tensor]] = []
    for index, of_group in enumerate(found):
        group, states = optimizer._groups_traced[index], optimizer._states_traced[index]
        for key in of_group.tensors:
            keys.append(2 * index + _TENSOR_OPTIONS.index(key))
            options.append(group[key])
        for position, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            dtype, with_master = of_group.dtypes[position]
            state = states[position]
            kind = 0
            if of_group.with_momentum:
                kind |= _MOMENTUM
                momentum = state.get("momentum_buffer")
                if momentum is None:
                    kind |= _FIRST
                    momentum = new_momentum(param, dtype)
                    created.append((state, "momentum_buffer", momentum))
                momenta.append(momentum)
            if with_master:
                kind |= _MASTER
                master = state.get("master_weight")
                if master is None:
                    master = new_master(param)
                    created.append((state, "master_weight", master))
                masters.append(master)
            groups.append(index)
            positions.append(position)
            kinds.append(kind)
            params.append(param)
            grads.append(param.grad)
    scale, coefficient, found_inf = (
        (None, None, None)
        if scaling is None
        else (scaling.grad_scale, scaling.grad_coefficient, scaling.found_inf)
    )
    if created and found_inf is not None:
        # If the step is skipped, the state must not have been created.
        _eager(optimizer, scaling)
        return
    prox_sgd_step(optimizer._number, *columns, scale, coefficient, found_inf)
    for state, key, value in created:
        state[key] = value
