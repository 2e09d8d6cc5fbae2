"""What is exactly zero, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .backends import dtensor
from .backends.pure import count_zeros


@dataclass(frozen=True)
class LayerSparsity:
    """Exact zeros of one parameter."""

    name: str
    """The parameter's name, or its place in the groups where those have no names."""
    zeros: int
    """How many of its elements are +0 or -0."""
    size: int
    """How many elements it has."""
    l1: float | None = None
    """The L1 coefficient of its group, where it was counted through an optimizer."""
    regularised: bool | None = None
    """Whether that is above 0, or was before a schedule took it there; None where not known."""

    @property
    def fraction(self) -> float:
        """Share of zeros, 0 for an empty parameter."""
        return self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True)
class Sparsity:
    """Exact zeros of all parameters. Prints as a table."""

    layers: tuple[LayerSparsity, ...]

    @property
    def zeros(self) -> int:
        """Zeros in all layers."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def size(self) -> int:
        """Elements in all layers."""
        return sum(layer.size for layer in self.layers)

    @property
    def fraction(self) -> float:
        """Share of zeros in all layers, 0 where there are no elements."""
        return self.zeros / self.size if self.size else 0.0

    @property
    def regularised(self) -> Sparsity:
        """Only the layers whose group has an L1 coefficient above 0, or had before a schedule.

        Raises:
            ValueError: the zeros were counted through a model, which doesn't tell.
        """
        if any(layer.regularised is None for layer in self.layers):
            raise ValueError(
                "sparsity: only an optimizer tells what is regularised: count through it"
            )
        return Sparsity(tuple(layer for layer in self.layers if layer.regularised))

    def to_dict(self) -> dict[str, Any]:
        """Numbers for a log: totals, and zeros, size and fraction of each layer by name."""
        return {
            "zeros": self.zeros,
            "size": self.size,
            "fraction": self.fraction,
            "layers": {
                layer.name: {
                    "zeros": layer.zeros,
                    "size": layer.size,
                    "fraction": layer.fraction,
                }
                for layer in self.layers
            },
        }

    def __str__(self) -> str:
        rows = [*self.layers, LayerSparsity("total", self.zeros, self.size)]
        width = max(len("parameter"), *(len(row.name) for row in rows))
        lines = [f"{'parameter':<{width}}  {'zeros':>12}  {'size':>12}  {'zeros %':>8}"]
        lines += [
            f"{row.name:<{width}}  {row.zeros:>12,}  {row.size:>12,}  {100 * row.fraction:>8.2f}"
            for row in rows
        ]
        return "\n".join(lines)


def sparsity(source: nn.Module | Optimizer) -> Sparsity:
    """Counts the exact zeros of a model's or an optimizer's parameters.

    Reads every parameter once, but for those that a ``ProxSGD`` with ``track_sparsity`` has counted
    in its last step; +0 and -0 both count. Shared parameters are counted once. Of DTensors each
    process counts its part, and the counts are summed: all processes must call this.

    Args:
        source: a module, or an optimizer, whose groups' ``l1`` is then known too.

    Raises:
        TypeError: the source is neither.
    """
    named = list(_parameters(source))
    with torch.no_grad():
        tracked: Any = getattr(source, "_zeros_known", None)
        known: dict[Tensor, Tensor] = {} if tracked is None else tracked()
        counts = [
            known[p] if p in known else count_zeros(dtensor.countable(p.detach()))
            for _, p, *_ in named
        ]
        counts = dtensor.summed(counts, [p for _, p, *_ in named])
        zeros = _to_host(counts)
    return Sparsity(
        tuple(
            LayerSparsity(name, n, p.numel(), l1, regularised)
            for (name, p, l1, regularised), n in zip(named, zeros, strict=True)
        )
    )


def _to_host(counts: list[Tensor]) -> list[int]:
    """The counts as numbers, by one transfer a device and not one a count."""
    members: dict[torch.device, list[int]] = {}
    for i, count in enumerate(counts):
        members.setdefault(count.device, []).append(i)
    numbers = [0] * len(counts)
    for indices in members.values():
        for i, number in zip(
            indices, torch.stack([counts[i] for i in indices]).tolist(), strict=True
        ):
            numbers[i] = number
    return numbers


def has_l1(group: dict[str, Any]) -> bool:
    """Whether a group has an L1 coefficient above 0, or had one before a schedule took it there."""
    return float(group.get("l1", 0.0)) > 0 or group.get("initial_l1", 0.0) > 0


def _parameters(
    source: nn.Module | Optimizer,
) -> Iterator[tuple[str, Tensor, float | None, bool | None]]:
    """Names and parameters with their group's l1, and whether it has one; None where not known."""
    if isinstance(source, nn.Module):
        for name, parameter in source.named_parameters():
            yield name, parameter, None, None
    elif isinstance(source, Optimizer):
        # Groups of two models may use one name twice.
        known = Counter(n for group in source.param_groups for n in group.get("param_names", ()))
        for g, group in enumerate(source.param_groups):
            names = group.get("param_names", ())
            of_group = float(group.get("l1", 0.0)), has_l1(group)
            for i, parameter in enumerate(group["params"]):
                name = f"param_groups[{g}]['params'][{i}]"
                if i < len(names):  # not if one was appended to the group's parameters alone
                    name = names[i] if known[names[i]] == 1 else f"param_groups[{g}]: {names[i]}"
                yield name, parameter, *of_group
    else:
        raise TypeError(f"sparsity: {type(source).__name__} is neither a module nor an optimizer")
