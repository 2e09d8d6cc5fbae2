"""Tries candidates for sets of coupled channels out: takes half of each out of a random model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from .channel_sets import ChannelSet, ExcludedSet, tensors_of
from .surgery import cut, positions_kept

# The two models' float64 sums differ in their order only; a set that is wrong is off by far more.
_TOLERANCE = 1e-9


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
        The good ones, and the others with a reason.

    Raises:
        ValueError: sets that are good alone aren't so together.
    """
    generator = torch.Generator().manual_seed(1)
    drops = [_half(one.size, generator) for one in sets]
    if _difference(model, forward, sets, drops) is None:
        return list(sets), []
    good, bad = [], []
    for one, drop in zip(sets, drops, strict=True):
        reason = _difference(model, forward, [one], [drop])
        if reason is None:
            good.append((one, drop))
        else:
            bad.append(ExcludedSet(one.name, reason))
    remaining = [one for one, _ in good]
    reason = _difference(model, forward, remaining, [drop for _, drop in good])
    if reason is not None:
        raise ValueError(f"channels: {type(model).__name__} can't lose channels: {reason}")
    return remaining, bad


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
def _difference(
    model: nn.Module,
    forward: Callable[[nn.Module], Any],
    sets: Sequence[ChannelSet],
    drops: Sequence[Tensor],
) -> str | None:
    """How outputs change where these channels are taken out; None if they don't."""
    _randomise(model)
    tensors = tensors_of(model)
    for one, drop in zip(sets, drops, strict=True):
        for index in one.producers:
            positions = [p for i, at in enumerate(index.indices) if drop[i] for p in at]
            tensor = tensors[index.tensor]
            tensor.index_fill_(
                index.dim, torch.tensor(positions, dtype=torch.long, device=tensor.device), 0
            )
    leaks = _Leaks(model, sets, drops)
    with leaks:
        expected = forward(model)
    small = cut(model, positions_kept(tensors, sets, [~drop for drop in drops]))
    trace = _Entered(small)
    try:
        with trace:
            got = forward(small)
    except Exception as error:
        return f"{trace.innermost} can't run without them: {error}"
    if _equal(expected, got):
        return None
    if leaks.found:
        return f"{leaks.found[0]} doesn't get zeros where they are zero"
    return "the outputs change where they are taken out"


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

    def __init__(
        self, model: nn.Module, sets: Sequence[ChannelSet], drops: Sequence[Tensor]
    ) -> None:
        self.found: list[str] = []
        self.columns: dict[str, list[int]] = {}
        for one, drop in zip(sets, drops, strict=True):
            for index in one.consumers:
                of_layer = self.columns.setdefault(index.tensor.rpartition(".")[0], [])
                of_layer += [p for i, at in enumerate(index.indices) if drop[i] for p in at]
        self.model, self.handles = model, list[Any]()

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
