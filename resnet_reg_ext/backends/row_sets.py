"""Coupled rows: row i of every parameter of a set is one group of the group lasso."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..options import Options
from .bucket import Bucket
from .device_values import DeviceValues, is_capturing


@dataclass(frozen=True)
class Part:
    """Parameters of one bucket that belong to sets, with what their group says of the step."""

    bucket: Bucket
    options: Options
    fused: bool | None
    capturable: bool
    values: DeviceValues
    """What a kernel reads on the device; the options hold everything else."""


_DEVICE, _DTYPE = attrgetter("device"), attrgetter("dtype")


@dataclass(frozen=True)
class RowSet:
    """A set of coupled rows; nothing in it is 0 or empty but rows of other processes."""

    members: tuple[tuple[int, int], ...]
    """(part, index in the part's bucket), in the order in which squares are summed."""
    rows: int
    coefficient: float
    """group_lasso."""
    weights: float | Tensor
    """a_g: one number, or float64 on the CPU, one for each row."""

    def thresholds(self, options: Options) -> Tensor:
        """Each row's t = (lr·(group_lasso·k))·a_g, in float64 in this order, on the CPU."""
        base = options.lr * (self.coefficient * options.k)
        if isinstance(self.weights, Tensor):
            return self.weights * base
        return torch.full((self.rows,), base * self.weights, dtype=torch.float64, device="cpu")


# The first parameter of a set -> the set's weights, and their copy on the parameter's CUDA device.
_copies: Any = WeakTensorKeyDictionary()


def weights_beside(param: Tensor, weights: Tensor, name: str) -> Tensor:
    """The weights of a set in the memory of its first parameter's device, without gaps.

    A copy on a CUDA device is kept while the parameter lives, and changed in place when the weights
    do, so that a captured graph reads memory that is still theirs.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would copy freed memory.
    """
    if param.is_cpu:
        return weights.contiguous()
    known: tuple[Tensor, Tensor] | None = _copies.get(param)
    if known is not None and known[1].device == param.device and torch.equal(known[0], weights):
        return known[1]
    if is_capturing():
        raise RuntimeError(
            f"{name}: row_weights have changed since the last step: take one before the capture"
        )
    copy = weights.contiguous().to(param.device)
    if known is not None and known[1].device == copy.device and known[1].shape == copy.shape:
        copy = known[1].copy_(copy)
    _copies[param] = (weights.clone(), copy)
    return copy


def rows_contiguous(tensor: Tensor) -> bool:
    """Whether each row of a dense tensor is one block of memory, row after row."""
    if tensor.is_contiguous():
        return True
    rows = tensor.shape[0]
    return rows == 1 or tensor.stride(0) == tensor.numel() // rows


def uniform(parts: Sequence[Part]) -> bool:
    """Whether all parameters of all parts are alike, so that each set's needn't be compared."""
    kinds = set()
    for part in parts:
        bucket, options = part.bucket, part.options
        stored = (bucket.params, bucket.momentum_buffers, bucket.master_params)
        dtypes = [frozenset(map(_DTYPE, tensors or ())) for tensors in stored]
        devices = frozenset(map(_DEVICE, bucket.params))
        if any(len(of_one) > 1 for of_one in (devices, *dtypes)):
            return False
        kinds.add((options.lr, options.momentum, options.dampening, devices, *dtypes))
    return len(kinds) == 1


def check_alike(one: RowSet, parts: Sequence[Part]) -> None:
    """Refuses a set whose parameters can't be scaled together.

    Raises:
        ValueError: names two parameters and in what they differ.
    """
    kinds = [_kind(parts[p], i) for p, i in one.members]
    for (p, i), kind in zip(one.members, kinds, strict=True):
        if kind == kinds[0]:
            continue
        what = next(what for what in kind if kind[what] != kinds[0][what])
        first_part, first = one.members[0]
        other = parts[first_part].bucket.name(first).removeprefix("ProxSGD: ")
        raise ValueError(
            f"{parts[p].bucket.name(i)}: its {what} is {_in_words(kind[what])}, and that of "
            f"{other} is {_in_words(kinds[0][what])}: must be equal, as their rows are coupled"
        )


def _kind(part: Part, i: int) -> dict[str, object]:
    """What must be equal within a set."""
    param, _, momentum_buffer, master, _ = part.bucket.operands(i)
    return {
        "device": param.device,
        "storage": (
            param.dtype,
            None if momentum_buffer is None else momentum_buffer.dtype,
            None if master is None else master.dtype,
        ),
        "lr": part.options.lr,
        "momentum": part.options.momentum,
        "dampening": part.options.dampening,
    }


def _in_words(value: object) -> str:
    if isinstance(value, tuple):
        kinds = zip(("parameter", "momentum buffer", "master weight"), value, strict=True)
        return ", ".join(f"{kind} {dtype}" for kind, dtype in kinds if dtype is not None)
    return str(value)
