"""The unit that backends work on: parameters of one group, with their gradients and state."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], None]
"""A step that was prepared: everything was checked, so nothing can refuse it any more."""


class Skip(enum.Enum):
    """Why there is nothing to run."""

    FOUND_INF = "the gradients hold an infinity or a NaN"


def raise_versions(written: Iterable[list[Tensor]]) -> None:
    """Tells autograd that lists of tensors change; torch's own operations do so themselves."""
    for tensors in written:
        if tensors:
            torch.autograd.graph.increment_version(tensors)


@dataclass
class Bucket:
    """Parameters of one group, all or none of them at their first step, with a master weight."""

    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor] | None
    """None without momentum; filled by the step where ``first_step``."""
    master_params: list[Tensor] | None
    """float32 copies of 16-bit parameters."""
    first_step: bool
    name: Callable[[int], str]
    """What an error about the i-th parameter begins with."""
    starts: list[Tensor] | None = None
    """What the penalties pull towards, in the dtype that the step updates; None: zero."""
    num_zeros: Tensor | None = None
    """Takes the number of zeros of each parameter, or with ``starts`` of the weights that are at
    their start: int64, on the parameters' one device."""
    created: list[tuple[Tensor, str, Tensor | None]] = field(default_factory=list)
    """State that the step adds, or with None removes: (parameter, key, value)."""

    def operands(
        self, i: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The i-th parameter with its gradient, momentum buffer, master weight and start."""
        return (
            self.params[i],
            self.grads[i],
            None if self.momentum_buffers is None else self.momentum_buffers[i],
            None if self.master_params is None else self.master_params[i],
            None if self.starts is None else self.starts[i],
        )

    def lists(self) -> tuple[list[Tensor], ...]:
        """Every list of tensors that there is."""
        every = (self.params, self.grads, self.momentum_buffers, self.master_params, self.starts)
        return tuple(tensors for tensors in every if tensors is not None)

    def written(self) -> tuple[list[Tensor], ...]:
        """The lists that a step writes to."""
        every = (self.params, self.momentum_buffers, self.master_params)
        return tuple(tensors for tensors in every if tensors is not None)

    def map(self, change: Callable[[list[Tensor]], list[Tensor]]) -> Bucket:
        """The bucket with each of its lists changed."""
        return dataclasses.replace(
            self,
            params=change(self.params),
            grads=change(self.grads),
            momentum_buffers=None
            if self.momentum_buffers is None
            else change(self.momentum_buffers),
            master_params=None if self.master_params is None else change(self.master_params),
            starts=None if self.starts is None else change(self.starts),
        )

    def pick(self, indices: Sequence[int]) -> Bucket:
        """Some of the parameters, without their counters."""
        name = self.name
        picked = self.map(lambda tensors: [tensors[i] for i in indices])
        chosen = set(map(id, picked.params))
        return dataclasses.replace(
            picked,
            name=lambda i: name(indices[i]),
            num_zeros=None,
            created=[entry for entry in self.created if id(entry[0]) in chosen],
        )

    def replace(self, **changes: Any) -> Bucket:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)
