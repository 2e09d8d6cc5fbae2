"""The operator that a compiled step consists of.

Imported when something is compiled, not before: it takes torch._dynamo with it, two seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from . import dispatch
from .bucket import Bucket, Skip
from .device_values import DeviceValues


@torch.library.custom_op(
    "resnet_reg_ext::prox_sgd_step",
    mutates_args=("params", "momentum_buffers", "master_params"),
    schema="(str plan, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] master_params, Tensor[] starts, Tensor[] tensor_options, Tensor? grad_scale, "
    "Tensor? grad_coefficient, Tensor? found_inf) -> ()",
)
def prox_sgd_step(
    plan: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    master_params: Sequence[Tensor],
    starts: Sequence[Tensor],
    tensor_options: Sequence[Tensor],
    grad_scale: Tensor | None,
    grad_coefficient: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """A step on tensors; everything is checked before anything is changed.

    ``plan`` is JSON, a list of groups. Each has its ``options`` by name, of which those in
    ``tensor_options`` are the next of the operator's ``tensor_options``; ``where`` begins an error
    about them; its ``buckets`` say for the next parameters their ``names`` for errors, whether it
    is their ``first_step``, and whether they have a ``momentum`` buffer, a ``master`` weight and a
    ``start``.
    """
    lists = iter(params), iter(grads), iter(momentum_buffers), iter(master_params), iter(starts)
    values = DeviceValues(
        grad_scale=grad_scale, grad_coefficient=grad_coefficient, found_inf=found_inf
    )
    tensors = iter(tensor_options)
    groups = json.loads(plan)
    for group in groups:
        group["options"] |= {key: next(tensors) for key in group["tensor_options"]}
    runs = []
    for group in groups:
        on_device: dict[str, Tensor] = {}
        options = Options.from_group(group["options"], group["where"], on_device)
        for bucket in _buckets(group, options, *lists):
            run = dispatch.prepare(
                bucket,
                options,
                fused=group["options"]["fused"],
                capturable=group["options"]["capturable"],
                values=values._replace(**on_device),
            )
            if not isinstance(run, Skip):
                runs.append(run)
    dispatch.run_all(runs)


@prox_sgd_step.register_fake
def _(*_: Any) -> None:
    return None


def _buckets(
    group: dict[str, Any],
    options: Options,
    params: Iterator[Tensor],
    grads: Iterator[Tensor],
    momentum_buffers: Iterator[Tensor],
    master_params: Iterator[Tensor],
    starts: Iterator[Tensor],
) -> Iterator[Bucket]:
    for described in group["buckets"]:
        if (options.momentum != 0) is not described["momentum"]:
            raise RuntimeError(
                f"{group['where']}momentum is {options.momentum}, but was "
                f"{'not ' if described['momentum'] else ''}0 when the step was compiled; call "
                "torch.compiler.reset()"
            )
        names: list[str] = described["names"]
        count = range(len(names))
        yield Bucket(
            params=[next(params) for _ in count],
            grads=[next(grads) for _ in count],
            momentum_buffers=[next(momentum_buffers) for _ in count]
            if described["momentum"]
            else None,
            master_params=[next(master_params) for _ in count] if described["master"] else None,
            starts=[next(starts) for _ in count] if described["start"] else None,
            first_step=described["first_step"],
            name=names.__getitem__,
        )
