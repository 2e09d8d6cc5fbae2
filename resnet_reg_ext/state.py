"""The optimizer's state: momentum buffers, master weights and starts of each parameter.

The only module that knows what a first step is, which parameters have a master weight or a start,
and in which dtypes they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from functools import partial
from itertools import repeat
from operator import attrgetter
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from .backends import dtensor
from .backends.bucket import Bucket
from .backends.device_values import is_capturing

MOMENTUM_BUFFER = "momentum_buffer"
MASTER_WEIGHT = "master_weight"
START = "start"
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_GRAD = attrgetter("grad")
_NO_STATE: dict[str, Any] = {}

State = MutableMapping[Tensor, dict[str, Any]]


def collect(
    group: Mapping[str, Any], index: int, state: Mapping[Tensor, dict[str, Any]], momentum: bool
) -> list[Bucket]:
    """The parameters of a group that have a gradient, with their state.

    Those at their first step are in a bucket of their own, as are those with a master weight. State
    that doesn't exist yet is None in a bucket's lists, for :func:`create_missing`.

    Args:
        group: a parameter group.
        index: the group's index, for errors.
        state: the optimizer's.
        momentum: whether the group's momentum is above 0.
    """
    # A copy: another thread may change the list wherever torch lets it run.
    params: list[Tensor] = list(group["params"])
    grads: list[Any] = list(map(_GRAD, params))
    if _has_none(grads):
        params = [p for p, g in zip(params, grads, strict=True) if g is not None]
        grads = [g for g in grads if g is not None]
    if not params:
        return []
    whole = Bucket(params, grads, None, None, False, partial(_name_of, group, index, params))
    states = list(map(state.get, params, repeat(_NO_STATE)))
    buffers: list[Any] | None = [s.get(MOMENTUM_BUFFER) for s in states] if momentum else None
    if group["master_weights"] or (buffers is not None and _has_none(buffers)):
        buckets = _divide(whole, group, states, buffers)
    else:
        whole.momentum_buffers = buffers
        buckets = [whole]
    if towards_start(group):
        for bucket in buckets:
            starts: list[Any] = [state.get(p, _NO_STATE).get(START) for p in bucket.params]
            bucket.starts = starts
    return _with_counters(buckets) if group["track_sparsity"] else buckets


def _divide(
    whole: Bucket,
    group: Mapping[str, Any],
    states: Sequence[dict[str, Any]],
    buffers: Sequence[Any] | None,
) -> list[Bucket]:
    """A bucket for each combination of first step or not, and master weight or not."""
    masters: list[Any] = [None] * len(states)
    with_master: set[int] = set()
    if group["master_weights"]:
        for i, param in enumerate(whole.params):
            if has_master(group, param):
                with_master.add(i)
                masters[i] = states[i].get(MASTER_WEIGHT)
            elif MASTER_WEIGHT in states[i]:
                # The parameter had 16 bits once; this step leaves its copy behind.
                whole.created.append((param, MASTER_WEIGHT, None))
    members: dict[tuple[bool, bool], list[int]] = {}
    for i in range(len(states)):
        key = (buffers is not None and buffers[i] is None, i in with_master)
        members.setdefault(key, []).append(i)
    buckets = []
    for (first_step, master), indices in members.items():
        part = whole if len(members) == 1 else whole.pick(indices)
        part.first_step = first_step
        if buffers is not None:
            part.momentum_buffers = [buffers[i] for i in indices]
        if master:
            part.master_params = [masters[i] for i in indices]
        buckets.append(part)
    return buckets


def _has_none(values: Sequence[Any]) -> bool:
    """Whether a value is None; ``in`` would compare tensors."""
    return NoneType in set(map(type, values))


def _with_counters(buckets: list[Bucket]) -> list[Bucket]:
    """Gives buckets counters of zeros; each bucket is on one device then."""
    # Not all ways to load a DTensor raise its version, so no count of one is kept.
    if any(dtensor.has_dtensors(bucket.params) for bucket in buckets):
        return buckets
    counted = []
    for bucket in buckets:
        by_device: dict[torch.device, list[int]] = {}
        for i, param in enumerate(bucket.params):
            by_device.setdefault(param.device, []).append(i)
        for device, indices in by_device.items():
            part = bucket if len(by_device) == 1 else bucket.pick(indices)
            part.num_zeros = torch.zeros(len(indices), dtype=torch.int64, device=device)
            counted.append(part)
    return counted


def create_missing(bucket: Bucket, group: Mapping[str, Any]) -> None:
    """Fills in the state that doesn't exist yet. :func:`commit` puts it into the optimizer.

    Raises:
        RuntimeError: a start is missing while a CUDA graph is captured, which would take it anew at
            every replay.
    """
    momentum_buffers = bucket.momentum_buffers if bucket.first_step else None
    for key, values, make in (
        (MOMENTUM_BUFFER, momentum_buffers, new_momentum_buffer),
        (MASTER_WEIGHT, bucket.master_params, new_master),
    ):
        for i, value in enumerate(values or ()):
            if value is None:
                created = make(group, bucket.params[i])
                values[i] = created
                bucket.created.append((bucket.params[i], key, created))
    for i, start in enumerate(bucket.starts or ()):
        if start is None:
            if bucket.params[i].is_cuda and is_capturing():
                raise RuntimeError(
                    f"{bucket.name(i)}: has no start yet, and a CUDA graph that is being captured "
                    "would take it anew at each replay: take one step before the capture"
                )
            _, _, _, master, _ = bucket.operands(i)
            created = new_start(bucket.params[i], master)
            bucket.starts[i] = created
            bucket.created.append((bucket.params[i], START, created))


def commit(bucket: Bucket, state: State) -> None:
    """Puts into the optimizer's state what the bucket's step has created, once it has run."""
    for param, key, value in bucket.created:
        if value is None:
            del state[param][key]
        else:
            state.setdefault(param, {})[key] = value


def has_master(group: Mapping[str, Any], param: Tensor) -> bool:
    """Whether a parameter has a float32 copy in the state."""
    return bool(group["master_weights"]) and param.dtype in _SIXTEEN_BITS


def momentum_dtype_of(group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """The dtype that a parameter's momentum buffer is stored in."""
    dtype: torch.dtype | None = group["momentum_dtype"]
    if dtype is None or param.dtype is torch.float64:
        return torch.float32 if has_master(group, param) else param.dtype
    return dtype


def new_momentum_buffer(group: Mapping[str, Any], param: Tensor) -> Tensor:
    """A momentum buffer, to be written by the parameter's first step."""
    return torch.empty_like(param, dtype=momentum_dtype_of(group, param), requires_grad=False)


def new_master(group: Mapping[str, Any], param: Tensor) -> Tensor:
    """A float32 copy of a parameter."""
    return param.detach().to(torch.float32)


def towards_start(group: Mapping[str, Any]) -> bool:
    """Whether a group's penalties pull towards its parameters' starts."""
    return bool(group.get("toward") == "start")


def new_start(param: Tensor, master: Tensor | None) -> Tensor:
    """A copy of what the step updates: the master weight, or the parameter."""
    return (param if master is None else master).detach().clone()


def start_dtype_of(group: Mapping[str, Any], param: Tensor) -> torch.dtype:
    """The dtype that a parameter's start is stored in."""
    return torch.float32 if has_master(group, param) else param.dtype


def parameter_name(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """What an error about a parameter begins with."""
    return f"ProxSGD: {parameter_place(group, group_index, index)}"


def parameter_place(group: Mapping[str, Any], group_index: int, index: int) -> str:
    """Where a parameter is, and its name if it has one."""
    names = group.get("param_names")
    name = f" ({names[index]})" if names and index < len(names) else ""
    return f"param_groups[{group_index}]['params'][{index}]{name}"


def _name_of(group: Mapping[str, Any], group_index: int, params: list[Tensor], i: int) -> str:
    # Another thread may have taken it out of the group since it was collected.
    places = (index for index, param in enumerate(group["params"]) if param is params[i])
    index = next(places, i)
    return parameter_name(group, group_index, index)
