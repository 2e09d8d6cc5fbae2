"""Tries candidates for sets of coupled channels out: takes half of each out of a random model.

And tries whether a set's norms alone make its channels zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from .channel_sets import ChannelIndex, ChannelSet, ExcludedSet, tensors_of
from .surgery import cut, positions_kept

# The two models' float64 sums differ in their order only; a set that is wrong is off by far more.
_TOLERANCE = 1e-9

_Tried = tuple[ChannelSet, Tensor]
"""A set, and which of its channels to set to zero: (size,) of bool."""


def proven(
    model: nn.Module, forward: Callable[[nn.Module], Any], sets: Sequence[ChannelSet]
) -> tuple[list[ChannelSet], list[ExcludedSet]]:
    """Those sets whose zero channels can be taken out without a change of the outputs.

    Args:
        model: a copy in eval mode and float64, whose weights are overwritten: a model of zeros,
            or one whose branches start at zero, would hide what is wrong.
        forward: runs it on the example inputs in float64.
        sets: the candidates.

    Returns:
        The good ones, with their closing norms, and the others with a reason.

    Raises:
        ValueError: sets that are good alone aren't so together.
    """
    generator = torch.Generator().manual_seed(1)
    tried = [(one, _half(one.size, generator)) for one in sets]
    reason, zeroed = _difference(model, forward, tried)
    bad = []
    if reason is not None:
        good = []
        for one, drop in tried:
            reason, _ = _difference(model, forward, [(one, drop)])
            if reason is None:
                good.append((one, drop))
            else:
                bad.append(ExcludedSet(one.name, reason))
        tried = good
        reason, zeroed = _difference(model, forward, tried)
        if reason is not None:
            raise ValueError(f"channels: {type(model).__name__} can't lose channels: {reason}")
    return _with_closing_norms(model, forward, tried, zeroed), bad


def _half(size: int, generator: torch.Generator) -> Tensor:
    """Which channels to take out: half of them by chance, one at least unless there is one."""
    drop = torch.zeros(size, dtype=torch.bool)
    drop[torch.randperm(size, generator=generator)[: size // 2]] = True
    return drop


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Weights of a scale that keeps activations in range; nothing is zero, no two are equal."""
    for seed, (_, parameter) in enumerate(model.named_parameters()):
        generator = torch.Generator(parameter.device).manual_seed(seed)
        if parameter.dim() > 1:
            bound = (6 / max(1, parameter[0].numel())) ** 0.5
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
    for seed, (name, buffer) in enumerate(model.named_buffers()):
        if name.endswith(("running_mean", "running_var")):
            generator = torch.Generator(buffer.device).manual_seed(seed)
            buffer.uniform_(0.5, 1.5, generator=generator)


@torch.no_grad()
def _set_to_zero(
    tensors: Mapping[str, Tensor], indices: Sequence[ChannelIndex], drop: Tensor
) -> None:
    for index in indices:
        positions = [p for i, at in enumerate(index.indices) if drop[i] for p in at]
        tensor = tensors[index.tensor]
        tensor.index_fill_(
            index.dim, torch.tensor(positions, dtype=torch.long, device=tensor.device), 0
        )


@torch.no_grad()
def _difference(
    model: nn.Module, forward: Callable[[nn.Module], Any], tried: Sequence[_Tried]
) -> tuple[str | None, Any]:
    """How outputs change where these channels are taken out, None if they don't.

    Returns:
        It, and the outputs while they are zero.
    """
    _randomise(model)
    tensors = tensors_of(model)
    for one, drop in tried:
        _set_to_zero(tensors, one.producers, drop)
    leaks = _Leaks(model, tried)
    with leaks:
        expected = forward(model)
    sets, kept = [one for one, _ in tried], [~drop for _, drop in tried]
    small = cut(model, positions_kept(tensors, sets, kept))
    trace = _Entered(small)
    try:
        with trace:
            got = forward(small)
    except Exception as error:
        return f"{trace.innermost} can't run without them: {error}", expected
    if _equal(expected, got):
        return None, expected
    if leaks.found:
        return f"{leaks.found[0]} doesn't get zeros where they are zero", expected
    return "the outputs change where they are taken out", expected


def _with_closing_norms(
    model: nn.Module,
    forward: Callable[[nn.Module], Any],
    tried: Sequence[_Tried],
    zeroed: Any,
) -> list[ChannelSet]:
    """The sets, with those of their norms that alone make a channel zero.

    Args:
        model: as :func:`proven` has it.
        forward: the same.
        tried: the sets and the channels to try.
        zeroed: the outputs while all producers of these channels are zero.
    """
    claims = [(replace(one, closing_norms=_norms_of(model, one)), drop) for one, drop in tried]
    several = [(one, drop) for one, drop in claims if one.closing_norms and one.size > 1]
    # The only channel of a set is tried alone: without it nothing may pass that tells other sets.
    single = [(one, ~drop) for one, drop in claims if one.closing_norms and one.size == 1]
    closed = _closed(model, forward, several, zeroed if len(several) == len(claims) else None)
    for claim in single:
        closed |= _closed(model, forward, [claim], None)
    return [one if one.name in closed else replace(one, closing_norms=()) for one, _ in claims]


@torch.no_grad()
def _closed(
    model: nn.Module, forward: Callable[[nn.Module], Any], claims: Sequence[_Tried], zeroed: Any
) -> set[str]:
    """Names of the sets whose norms alone do what all producers do: one trial if all are so.

    Args:
        model: as :func:`proven` has it.
        forward: the same.
        claims: sets with the norms that are to be tried, and channels.
        zeroed: the outputs while all producers of these channels are zero; None to find them.
    """
    if not claims:
        return set()
    _randomise(model)
    tensors = tensors_of(model)
    for one, drop in claims:
        _set_to_zero(tensors, one.closing_norms, drop)
    leaks = _Leaks(model, claims)
    with leaks:
        got = forward(model)
    if zeroed is None:
        for one, drop in claims:
            _set_to_zero(tensors, one.producers, drop)
        zeroed = forward(model)
    if not leaks.found and _equal(zeroed, got):
        return {one.name for one, _ in claims}
    if len(claims) == 1:
        return set()
    # Where no layer tells which sets it is, each is tried alone.
    suspected = [leaks.concern(one) or not leaks.found for one, _ in claims]
    innocent = [claim for claim, is_one in zip(claims, suspected, strict=True) if not is_one]
    found = _closed(model, forward, innocent, None)
    for claim, is_one in zip(claims, suspected, strict=True):
        if is_one:
            found |= _closed(model, forward, [claim], None)
    return found


def _norms_of(model: nn.Module, one: ChannelSet) -> tuple[ChannelIndex, ...]:
    """The producers that are a norm's weight or bias."""
    return tuple(
        index
        for index in one.producers
        if isinstance(model.get_submodule(index.tensor.rpartition(".")[0]), _NormBase)
    )


def _equal(expected: Any, got: Any) -> bool:
    ours, theirs = tree_leaves(expected), tree_leaves(got)
    if len(ours) != len(theirs):
        return False
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(one, Tensor):
            continue
        if one.shape != other.shape:
            return False
        size = float(one.abs().max()) if one.numel() else 0.0
        if not torch.allclose(one, other, rtol=0, atol=_TOLERANCE * max(size, 1e-300)):
            return False
    return True


class _Leaks:
    """Which consumers read something else than zeros from channels that are zero."""

    def __init__(self, model: nn.Module, tried: Sequence[_Tried]) -> None:
        self.found: list[str] = []
        self.columns: dict[str, list[int]] = {}
        for one, drop in tried:
            for index in one.consumers:
                of_layer = self.columns.setdefault(index.tensor.rpartition(".")[0], [])
                of_layer += [p for i, at in enumerate(index.indices) if drop[i] for p in at]
        self.model, self.handles = model, list[Any]()

    def concern(self, one: ChannelSet) -> bool:
        """Whether a layer that was found reads this set."""
        return any(index.tensor.rpartition(".")[0] in self.found for index in one.consumers)

    def __enter__(self) -> None:
        for name in self.columns:
            module = self.model.get_submodule(name)
            self.handles.append(module.register_forward_pre_hook(self._hook(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            value = inputs[0]
            dim = value.dim() - 1
            if isinstance(module, _ConvNd):
                dim -= len(module.kernel_size)
            columns = torch.tensor(self.columns[name], dtype=torch.long, device=value.device)
            if bool((value.index_select(dim, columns) != 0).any()):
                self.found.append(name)

        return look


class _Entered:
    """Which module a forward pass is in."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.stack, self.handles = model, list[str](), list[Any]()

    @property
    def innermost(self) -> str:
        return self.stack[-1] if self.stack else type(self.model).__name__

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            if name:
                enter, leave = self._hooks(name)
                self.handles.append(module.register_forward_pre_hook(enter))
                self.handles.append(module.register_forward_hook(leave))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(*_: Any) -> None:
            self.stack.append(name)

        def leave(*_: Any) -> None:
            self.stack.pop()

        return enter, leave
