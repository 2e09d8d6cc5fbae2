"""Counts of exact zeros, or of weights that are where training started, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .backends import dtensor
from .backends.pure import count_zeros


@dataclass(frozen=True)
class LayerSparsity:
    """Exact zeros of one parameter, or its weights that are exactly at their start.

    Attributes:
        name: the parameter's name, or its place in the groups where those have no names.
        zeros: how many of its elements are +0 or -0; with ``at_start``, are equal to their start.
        size: how many elements it has.
        l1: the L1 coefficient of its group; None if counted through a model.
        regularised: whether l1 is above 0, or was before a schedule took it to 0; None if counted
            through a model.
        at_start: whether its group has ``toward="start"``.
    """

    name: str
    zeros: int
    size: int
    l1: float | None = None
    regularised: bool | None = None
    at_start: bool = False

    @property
    def fraction(self) -> float:
        """Share of ``zeros``, 0 for an empty parameter."""
        return self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True)
class Sparsity:
    """Exact zeros of all parameters. Prints as a summary; ``table()`` has every layer.

    Attributes:
        layers: one entry for each parameter.
    """

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
        parts = {"total": self}
        if all(layer.regularised is not None for layer in self.layers):
            others = Sparsity(tuple(layer for layer in self.layers if not layer.regularised))
            parts = {"regularised": self.regularised, "others": others, "total": self}
        header = f"{'':<11}  {'parameters':>10}  {'zeros':>12}  {'size':>12}  {'zeros %':>8}"
        lines = [
            f"{name:<11}  {len(part.layers):>10,}  {part.zeros:>12,}  {part.size:>12,}  "
            f"{100 * part.fraction:>8.2f}"
            for name, part in parts.items()
        ]
        if any(layer.at_start for layer in self.layers):
            lines.append('with toward="start", weights at their start are counted as zeros')
        return "\n".join([header, *lines, "table() lists the parameters"])

    def table(self) -> str:
        """A line for each parameter, and one for all."""
        rows = [*self.layers, LayerSparsity("total", self.zeros, self.size)]
        width = max(len("parameter"), *(len(row.name) for row in rows))
        lines = [f"{'parameter':<{width}}  {'zeros':>12}  {'size':>12}  {'zeros %':>8}"]
        lines += [
            f"{row.name:<{width}}  {row.zeros:>12,}  {row.size:>12,}  {100 * row.fraction:>8.2f}"
            + ("  at their start" if row.at_start else "")
            for row in rows
        ]
        return "\n".join(lines)


def sparsity(source: nn.Module | Optimizer) -> Sparsity:
    """Counts the exact zeros of a model's or an optimizer's parameters.

    Reads every parameter once, whatever an optimizer has counted before; +0 and -0 both count.
    Shared parameters are counted once. Where an optimizer's group has ``toward="start"``, weights
    are counted that equal their start as rounded to the parameter's dtype: all of them before the
    parameter's first step. Of DTensors each process counts its part, and the counts
    are summed: all processes must call this.

    Args:
        source: a module, or an optimizer, whose groups' ``l1`` is then known too.

    Returns:
        The counts, parameter by parameter; it prints as a table.

    Raises:
        TypeError: the source is neither.

    Example:
        >>> print(f"{sparsity(optimizer).regularised.fraction:.1%}")
        0.0%
    """
    return count(source, {})


def count(source: nn.Module | Optimizer, known: Mapping[Tensor, Tensor]) -> Sparsity:
    """As :func:`sparsity`, but with the counts that are known of some parameters already.

    Args:
        source: a module or an optimizer.
        known: for some of the parameters, their number of zeros, as a 0-dimensional int64 tensor;
            these parameters are not read.

    Raises:
        TypeError: the source is neither.
    """
    named = list(_parameters(source))
    starts = starts_of(source) if isinstance(source, Optimizer) else {}
    with torch.no_grad():
        counts = [known[p] if p in known else _count(p, starts) for _, p, *_ in named]
        counts = dtensor.summed(counts, [p for _, p, *_ in named])
        zeros = _to_host(counts)
    return Sparsity(
        tuple(
            LayerSparsity(name, n, p.numel(), l1, regularised, p in starts)
            for (name, p, l1, regularised), n in zip(named, zeros, strict=True)
        )
    )


def _count(param: Tensor, starts: Mapping[Tensor, Tensor | None]) -> Tensor:
    """What this process counts of a parameter; without a start yet, it is its own."""
    values = dtensor.countable(param.detach())
    start = starts.get(param)
    if start is None:
        return count_zeros(values, values if param in starts else None)
    return count_zeros(values, dtensor.countable(start))


def starts_of(optimizer: Optimizer) -> dict[Tensor, Tensor | None]:
    """The parameters of groups with ``toward="start"``: their starts, None before a first step."""
    return {
        param: optimizer.state[param].get("start") if param in optimizer.state else None
        for group in optimizer.param_groups
        if group.get("toward") == "start"
        for param in group["params"]
    }


def _to_host(counts: list[Tensor]) -> list[int]:
    """The counts as numbers, with one transfer for each device."""
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


def has_l1(group: Mapping[str, Any]) -> bool:
    """Whether a group's L1 coefficient is above 0, or was before a schedule took it to 0."""
    return float(group.get("l1", 0.0)) > 0 or group.get("initial_l1", 0.0) > 0


def _parameters(
    source: nn.Module | Optimizer,
) -> Iterator[tuple[str, Tensor, float | None, bool | None]]:
    """Name, parameter, its group's l1, and whether the group has one; None where not known."""
    if isinstance(source, nn.Module):
        for name, parameter in source.named_parameters():
            yield name, parameter, None, None
    elif isinstance(source, Optimizer):
        # Groups of two models may use one name twice.
        uses = Counter(n for group in source.param_groups for n in group.get("param_names", ()))
        for g, group in enumerate(source.param_groups):
            names = group.get("param_names", ())
            of_group = float(group.get("l1", 0.0)), has_l1(group)
            for i, parameter in enumerate(group["params"]):
                name = f"param_groups[{g}]['params'][{i}]"
                if i < len(names):  # a parameter may be appended to group["params"] without a name
                    name = names[i] if uses[names[i]] == 1 else f"param_groups[{g}]: {names[i]}"
                yield name, parameter, *of_group
    else:
        raise TypeError(f"sparsity: {type(source).__name__} is neither a module nor an optimizer")
