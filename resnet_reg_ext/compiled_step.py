"""The step inside torch.compile: state is created in the graph, and one operator does the rest.

TorchDynamo doesn't trace ``_init_group`` of an optimizer: it calls it while compiling, guards
``param_groups`` and ``state``, and takes the tensors that it has put into its lists as inputs of
the graph. A float that changes becomes a symbol, which isn't guarded: so numbers go into the graph
as tensors, and not into what ``_init_group`` returns.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from . import eager_step, row_groups, state
from .backends import dtensor
from .backends.op import prox_sgd_step
from .options import to_number

_NUMBERS = ("lr", "momentum", "dampening", "weight_decay", "l1", "initial_lr", "initial_l1")
_CHOICES = ("nesterov", "l2_mode", "maximize", "frozen_zeros", "fused", "capturable", "toward")
NOT_IN_A_GRAPH = ""
"""What :func:`init_group` returns where the step must be taken outside the graph."""


def init_group(
    optimizer: Any,
    group: dict[str, Any],
    index: int,
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    master_params: list[Tensor | None],
    starts: list[Tensor | None],
) -> str:
    """Fills the lists with a group's tensors; returns its part of the operator's plan.

    ``momentum_buffers``, ``master_params`` and ``starts`` get None for what doesn't exist yet.
    """
    # Coupled rows whatever their group_lasso is: a float that changes isn't guarded.
    if dtensor.has_dtensors(group["params"]) or row_groups.has_rows(group):
        return NOT_IN_A_GRAPH
    momentum = bool(to_number(group["momentum"], f"ProxSGD: param_groups[{index}]: momentum") != 0)
    buckets = state.collect({**group, "track_sparsity": False}, index, optimizer.state, momentum)
    described = []
    for bucket in buckets:
        if bucket.created:  # state is to be removed
            return NOT_IN_A_GRAPH
        params += bucket.params
        grads += bucket.grads
        momentum_buffers += bucket.momentum_buffers or []
        master_params += bucket.master_params or []
        starts += bucket.starts or []
        described.append(
            {
                "names": [bucket.name(i) for i in range(len(bucket.params))],
                "first_step": bucket.first_step,
                "momentum": momentum,
                "master": bucket.master_params is not None,
                "start": bucket.starts is not None,
            }
        )
    in_graph = [key for key in _NUMBERS if key in group and _is_in_graph(group[key])]
    others = [key for key in (*_NUMBERS, *_CHOICES) if key in group and key not in in_graph]
    part = {
        "where": f"ProxSGD: param_groups[{index}]: ",
        "options": {key: group[key] for key in others},
        "tensor_options": in_graph,
        "buckets": described,
    }
    return json.dumps(part, default=_as_json)


def _is_in_graph(value: Any) -> bool:
    return isinstance(value, (float, int, Tensor)) and not isinstance(value, bool)


def _as_json(value: Any) -> Any:
    """A NumPy scalar's number; in words what is neither number nor text, to be refused later."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return repr(value)


def _tensors_of(group: dict[str, Any]) -> list[Tensor]:
    """The numbers of a group that go into the graph, in the order of ``_NUMBERS``."""
    return [
        group[key]
        if isinstance(group[key], Tensor)
        else torch.tensor(group[key], dtype=torch.float64, device="cpu")
        for key in _NUMBERS
        if key in group and _is_in_graph(group[key])
    ]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside(optimizer: Any, grad_coefficient: Tensor | None) -> None:
    eager_step.step(optimizer, grad_coefficient)


def _create_missing(
    group: dict[str, Any],
    params: list[Tensor],
    buffers: list[Any],
    masters: list[Any],
    starts: list[Any],
) -> list[tuple[Tensor, str, Tensor]]:
    """Fills in the state that is None, in the graph; returns it as (parameter, key, value)."""
    new: list[tuple[Tensor, str, Tensor]] = []
    for i in range(len(buffers)):
        if buffers[i] is None:
            buffers[i] = state.new_momentum_buffer(group, params[i])
            new.append((params[i], state.MOMENTUM_BUFFER, buffers[i]))
    with_master = [i for i, p in enumerate(params) if state.has_master(group, p)]
    of_param: list[Tensor | None] = [None for _ in params]
    for i in range(len(masters)):
        at = with_master[i]
        if masters[i] is None:
            masters[i] = state.new_master(group, params[at])
            new.append((params[at], state.MASTER_WEIGHT, masters[i]))
        of_param[at] = masters[i]
    for i in range(len(starts)):
        if starts[i] is None:
            starts[i] = state.new_start(params[i], of_param[i])
            new.append((params[i], state.START, starts[i]))
    return new


@torch.no_grad()
def step(optimizer: Any, grad_coefficient: float | Tensor | None) -> None:
    """What torch.compile sees of a step."""
    if grad_coefficient is not None and not isinstance(grad_coefficient, Tensor):
        grad_coefficient = torch.tensor(grad_coefficient, dtype=torch.float64, device="cpu")
    values = eager_step.device_values(optimizer, grad_coefficient)
    parts: list[str] = []
    every: tuple[list[Any], ...] = ([], [], [], [], [], [])
    new: list[tuple[Tensor, str, Tensor]] = []
    for index, group in enumerate(optimizer.param_groups):
        params: list[Any] = []
        grads: list[Any] = []
        buffers: list[Any] = []
        masters: list[Any] = []
        starts: list[Any] = []
        part = optimizer._init_group(group, index, params, grads, buffers, masters, starts)
        if part == NOT_IN_A_GRAPH:
            _outside(optimizer, values.grad_coefficient)
            return
        parts.append(part)
        new += _create_missing(group, params, buffers, masters, starts)
        # What was collected depends on it, so it must be guarded.
        if not isinstance(group["momentum"], Tensor) and group["momentum"] == 0:
            assert not buffers
        tensors = _tensors_of(group)
        for all_of_them, of_group in zip(
            every, (params, grads, buffers, masters, starts, tensors), strict=True
        ):
            all_of_them.extend(of_group)
    if new and values.found_inf is not None:
        # If the step is skipped, the state must not have been created.
        _outside(optimizer, values.grad_coefficient)
        return
    plan = "[" + ",".join(parts) + "]"
    prox_sgd_step(plan, *every, values.grad_scale, values.grad_coefficient, values.found_inf)
    for param, key, value in new:
        optimizer.state[param][key] = value
