"""The step outside torch.compile: options, collect, prepare, run, commit."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from . import row_division, state
from .backends import dispatch, dispatch_rows, dtensor
from .backends.bucket import Bucket, Run, Skip
from .backends.device_values import DeviceValues, to_float32
from .options import Options, one_element, to_number
from .tracked_zeros import TrackedZeros


def step(optimizer: Any, grad_coefficient: float | Tensor | None) -> None:
    """Steps all groups; everything is checked before anything is changed.

    The zeros that were counted on the way become the optimizer's ``_tracked_zeros``.
    """
    values = device_values(optimizer, grad_coefficient)
    coefficient = 1.0
    if grad_coefficient is not None and not isinstance(grad_coefficient, Tensor):
        coefficient = to_float32(to_number(grad_coefficient, "ProxSGD: grad_coefficient"))
    groups = optimizer.param_groups
    # An option's __float__ may run anyone's code: all are read before any tensor is.
    read = [_read_options(group, index, values, coefficient) for index, group in enumerate(groups)]
    reader = _set_reader(optimizer)
    coupled = reader.read(groups, [options.frozen_zeros for options, _ in read])
    collected: list[tuple[Bucket, int]] = []
    for index, (group, (options, _)) in enumerate(zip(groups, read, strict=True)):
        for bucket in state.collect(group, index, optimizer.state, options.momentum != 0):
            state.create_missing(bucket, group)
            collected.append((bucket, index))
    stepped: list[Bucket] = []
    runs: list[Run] = []
    if coupled:
        collected, parts, row_sets = row_division.divide(reader, groups, read, collected)
        run = dispatch_rows.prepare(parts, row_sets)
        if not isinstance(run, Skip):
            runs.append(run)
            stepped += [part.bucket for part in parts]
    for bucket, index in collected:
        options, of_group = read[index]
        run = dispatch.prepare(
            bucket,
            options,
            fused=groups[index]["fused"],
            capturable=groups[index]["capturable"],
            values=of_group,
        )
        if not isinstance(run, Skip):
            runs.append(run)
            stepped.append(bucket)
    dispatch.run_all(runs)
    for bucket in stepped:
        state.commit(bucket, optimizer.state)
    counted = [
        TrackedZeros(bucket.params, bucket.starts, bucket.num_zeros, values.found_inf).stamped()
        for bucket in stepped
        if bucket.num_zeros is not None
    ]
    if counted:
        optimizer._tracked_zeros = counted


def _set_reader(optimizer: Any) -> row_division.SetReader:
    """The optimizer's own, which no pickle and no checkpoint holds."""
    reader: row_division.SetReader = optimizer.__dict__.setdefault(
        "_set_reader", row_division.SetReader()
    )
    return reader


def device_values(
    optimizer: Optimizer, grad_coefficient: float | Tensor | None = None
) -> DeviceValues:
    """What a GradScaler, and a tensor of the caller's, say of the gradients."""
    if isinstance(grad_coefficient, Tensor):
        one_element(grad_coefficient, "ProxSGD: grad_coefficient")
    else:
        grad_coefficient = None
    # A GradScaler sets these attributes for the time of a step.
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    if scale is None and grad_coefficient is None and found_inf is None:
        return DeviceValues()
    return DeviceValues(
        grad_scale=dtensor.full_tensor(scale),
        grad_coefficient=dtensor.full_tensor(grad_coefficient),
        found_inf=dtensor.full_tensor(found_inf),
    )


def _read_options(
    group: dict[str, Any], index: int, values: DeviceValues, grad_coefficient: float
) -> tuple[Options, DeviceValues]:
    """A group's options, checked, and those of its values that a kernel reads on a device."""
    on_device: dict[str, Tensor] = {}
    options = Options.from_group(group, f"ProxSGD: param_groups[{index}]: ", on_device)
    if grad_coefficient != 1:
        options = dataclasses.replace(options, grad_coefficient=grad_coefficient)
    return options, values._replace(**on_device) if on_device else values
