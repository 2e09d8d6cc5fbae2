"""Coupled rows: row i of every parameter of a set is one group of the group lasso."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..options import Options
from .bucket import Bucket
from .device_values import DeviceValues


@dataclass(frozen=True)
class Part:
    """Parameters of one bucket that belong to sets, with what their group says of the step."""

    bucket: Bucket
    options: Options
    fused: bool | None
    capturable: bool
    values: DeviceValues


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

    def named(self, parts: Sequence[Part]) -> Iterator[tuple[Bucket, int, str]]:
        """Each member's bucket, its index there and its name."""
        for part, i in self.members:
            bucket = parts[part].bucket
            yield bucket, i, bucket.name(i)

    def thresholds(self, options: Options) -> Tensor:
        """Each row's t = (lr·(group_lasso·k))·a_g, in float64 in this order, on the CPU."""
        base = options.lr * (self.coefficient * options.k)
        if isinstance(self.weights, Tensor):
            return self.weights * base
        return torch.full((self.rows,), base * self.weights, dtype=torch.float64, device="cpu")


def rows_contiguous(tensor: Tensor) -> bool:
    """Whether each row of a dense tensor is one block of memory, row after row."""
    rows = tensor.shape[0]
    return rows == 1 or tensor.stride(0) == tensor.numel() // rows


def check_alike(one: RowSet, parts: Sequence[Part]) -> None:
    """Refuses a set whose parameters can't be scaled together.

    Raises:
        ValueError: names two parameters and in what they differ.
    """
    kinds = (
        ("first dimension", partial(_first_dimension)),
        ("device", lambda part, i: part.bucket.params[i].device),
        ("dtypes", _storage),
        ("lr", lambda part, i: part.options.lr),
        ("momentum", lambda part, i: part.options.momentum),
        ("dampening", lambda part, i: part.options.dampening),
    )
    first_part, first = one.members[0]
    for what, value_of in kinds:
        expected = value_of(parts[first_part], first)
        for p, i in one.members[1:]:
            value = value_of(parts[p], i)
            if value != expected:
                other = parts[first_part].bucket.name(first).removeprefix("ProxSGD: ")
                raise ValueError(
                    f"{parts[p].bucket.name(i)}: its {what} is {_in_words(value)}, and that of "
                    f"{other} is {_in_words(expected)}: must be equal, as their rows are coupled"
                )


def _first_dimension(part: Part, i: int) -> int:
    return part.bucket.params[i].shape[0]


def _storage(part: Part, i: int) -> tuple[torch.dtype | None, ...]:
    """The dtypes of a parameter, its momentum buffer and its master weight."""
    param, _, momentum_buffer, master = part.bucket.operands(i)
    state = (momentum_buffer, master)
    return (param.dtype, *(None if t is None else t.dtype for t in state))


def _in_words(value: object) -> str:
    if isinstance(value, tuple):
        kinds = zip(("parameter", "momentum buffer", "master weight"), value, strict=True)
        return ", ".join(f"{kind} {dtype}" for kind, dtype in kinds if dtype is not None)
    return str(value)
