"""Candidates for sets of coupled channels, from torch-pruning's dependency graph.

Only its graph is used, on a copy of the model. It knows what a layer does by autograd's names and
takes what it doesn't know for elementwise; so its sets are candidates, to be tried out.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .channel_sets import ChannelIndex, ChannelSet, ExcludedSet

# What one channel is made of: (role, tensor, dim, position).
Atom = tuple[str, str, int, int]

_BY_CHANNEL = (_ConvNd, nn.Linear, _NormBase, nn.PReLU)
_PLAIN = {nn.Linear.forward} | {
    getattr(nn, f"Conv{transposed}{n}d").forward
    for transposed in ("", "Transpose")
    for n in (1, 2, 3)
}


@dataclass
class _Candidate:
    """One of the graph's groups: for each of its channels the atoms."""

    members: list[str]
    channels: list[set[Atom]]
    reasons: list[str] = field(default_factory=list)


def candidates(
    model: nn.Module, forward: Callable[[nn.Module], Any], calls: Counter[str]
) -> tuple[list[ChannelSet], list[ExcludedSet]]:
    """The sets of coupled channels that the graph shows.

    Args:
        model: in eval mode; every parameter must require a gradient, as autograd is followed.
        forward: runs it on the example inputs.
        calls: how often each module was called in a forward pass.

    Raises:
        ImportError: torch-pruning isn't installed.
        ValueError: the graph can't be built.
    """
    try:
        pruning = importlib.import_module("torch_pruning")
    except ImportError:
        raise ImportError(
            "channels: torch-pruning isn't installed, which finds the coupled channels: "
            "pip install 'resnet_reg_ext[compact]'"
        ) from None
    graph = pruning.DependencyGraph()
    try:
        graph.build_dependency(
            model, None, forward_fn=lambda module, _: forward(module), verbose=False
        )
        groups = list(graph.get_all_groups())
    except Exception as error:
        raise ValueError(
            f"channels: torch-pruning can't follow {type(model).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error
    names = {module: name for name, module in model.named_modules()}
    problems = _Problems(model, calls)
    found = [_candidate(group, names, problems) for group in groups]
    order = {name: i for i, name in enumerate(names.values())}
    sets, excluded = [], []
    for candidate in _coupled_by_groups(found, model):
        name = min(candidate.members, key=order.__getitem__)
        if not candidate.reasons and not any(a[0] == "consumer" for a in candidate.channels[0]):
            candidate.reasons.append("feeds the model's output")
        if candidate.reasons:
            excluded.append(ExcludedSet(name, candidate.reasons[0]))
        else:
            sets.append(_as_set(name, candidate, order))
    sets.sort(key=lambda one: order[one.name])
    excluded.sort(key=lambda one: order[one.name])
    return sets, excluded


class _Problems:
    """What keeps a module's channels in."""

    def __init__(self, model: nn.Module, calls: Counter[str]) -> None:
        self.calls = calls
        self.names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(parameter, []).append(name)

    def of(self, name: str, module: Any) -> str | None:
        """Why the channels of this module can't be taken out; None if they can."""
        kind = type(module).__name__
        if isinstance(module, nn.Parameter):
            return f"{self.names[module][0]} is a parameter outside of layers"
        if not isinstance(module, _BY_CHANNEL):
            return f"{name} is a {kind}, which mixes channels or isn't known"
        if self.calls[name] > 1:
            return f"{name} is used more than once"
        if isinstance(module, (_ConvNd, nn.Linear)) and type(module).forward not in _PLAIN:
            return f"{name} is a {kind}, whose forward is its own"
        if isinstance(module, _ConvNd) and module.transposed and module.groups > 1:
            return f"{name} is a transposed convolution with groups"
        extra = set(module._parameters) - {"weight", "bias"}
        extra |= set(module._buffers) - {"running_mean", "running_var", "num_batches_tracked"}
        if extra or "weight" not in module._parameters:
            return f"{name}'s weight isn't a plain parameter (parametrised or masked)"
        for parameter in module.parameters():
            if len(self.names[parameter]) > 1:
                return f"{' and '.join(self.names[parameter])} are one parameter"
        return None


def _candidate(group: Any, names: dict[nn.Module, str], problems: _Problems) -> _Candidate:
    """From a group of the graph to the atoms of each of its channels."""
    size = len(group[0].idxs)
    candidate = _Candidate([names[group[0].dep.target.module]], [set() for _ in range(size)])
    for item in group:
        module, handler = item.dep.target.module, item.dep.handler.__name__
        is_op = isinstance(module, nn.Module) and module not in names
        if is_op and type(module).__name__ == "_OutputOp":
            candidate.reasons.append("feeds the model's output")
        if is_op:
            continue
        name = names.get(module, "")
        problem = problems.of(name, module)
        if problem is not None:
            candidate.reasons.append(problem)
            continue
        is_columns = "in_channels" in handler and isinstance(module, (_ConvNd, nn.Linear))
        if not is_columns and not isinstance(module, nn.PReLU):
            candidate.members.append(name)
        for position, root in zip(item.idxs, item.root_idxs, strict=True):
            candidate.channels[root].update(_atoms(name, module, position, is_columns))
    candidate.members = list(dict.fromkeys(candidate.members))
    return candidate


def _atoms(name: str, module: nn.Module, position: int, is_columns: bool) -> Iterator[Atom]:
    """What a layer has of the channel at this position."""
    if isinstance(module, (_ConvNd, nn.Linear)):
        rows, columns = (1, 0) if getattr(module, "transposed", False) else (0, 1)
        if is_columns and getattr(module, "groups", 1) > 1:
            # The whole group goes or stays; its rows are added with it.
            assert isinstance(module, _ConvNd)
            yield "group", name, 0, position // (module.in_channels // module.groups)
            return
        if is_columns:
            yield "consumer", f"{name}.weight", columns, position
            return
        yield "producer", f"{name}.weight", rows, position
        if module.bias is not None:
            yield "producer", f"{name}.bias", 0, position
        if getattr(module, "groups", 1) > 1:
            assert isinstance(module, _ConvNd)
            yield "group", name, 0, position // (module.out_channels // module.groups)
        return
    if isinstance(module, nn.PReLU):
        if module.num_parameters > 1:
            yield "statistics", f"{name}.weight", 0, position
        return
    for local, parameter in module._parameters.items():
        if parameter is not None:
            yield "producer", f"{name}.{local}", 0, position
    for local, buffer in module._buffers.items():
        if buffer is not None and buffer.dim() == 1:
            yield "statistics", f"{name}.{local}", 0, position


def _coupled_by_groups(found: list[_Candidate], model: nn.Module) -> list[_Candidate]:
    """Joins candidates that share something, as by a convolution with groups, and their channels.

    Of such a convolution a group is the smallest part that can be taken out: its inputs in one
    candidate, its outputs in another.
    """
    where: dict[Atom, list[tuple[int, int]]] = {}
    for c, candidate in enumerate(found):
        for i, atoms in enumerate(candidate.channels):
            for atom in atoms:
                where.setdefault(atom, []).append((c, i))
    whole = _Union((c, -1) for c in range(len(found)))
    parts = _Union((c, i) for c, one in enumerate(found) for i in range(len(one.channels)))
    for places in where.values():
        for place in places[1:]:
            whole.join((places[0][0], -1), (place[0], -1))
            parts.join(places[0], place)
    joined: dict[tuple[int, int], _Candidate] = {}
    channels: dict[tuple[int, int], set[Atom]] = {}
    for c, candidate in enumerate(found):
        root = whole.root((c, -1))
        target = joined.setdefault(root, _Candidate([], []))
        target.members += candidate.members
        target.reasons += candidate.reasons
        for i, atoms in enumerate(candidate.channels):
            part = parts.root((c, i))
            if part not in channels:
                channels[part] = set()
                target.channels.append(channels[part])
            channels[part] |= atoms
    for candidate in joined.values():
        for atoms in candidate.channels:
            _complete_groups(atoms, model)
    return list(joined.values())


def _complete_groups(atoms: set[Atom], model: nn.Module) -> None:
    """Replaces a convolution's group by its rows."""
    groups = [atom for atom in atoms if atom[0] == "group"]
    for _, name, _, group in groups:
        convolution: Any = model.get_submodule(name)
        rows = convolution.out_channels // convolution.groups
        for position in range(group * rows, (group + 1) * rows):
            atoms.update(_atoms(name, convolution, position, False))
    atoms.difference_update(groups)


class _Union:
    """Disjoint sets."""

    def __init__(self, items: Iterable[tuple[int, int]]) -> None:
        self.parent = {item: item for item in items}

    def root(self, item: tuple[int, int]) -> tuple[int, int]:
        while self.parent[item] != item:
            self.parent[item] = item = self.parent[self.parent[item]]
        return item

    def join(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        one, other = self.root(one), self.root(other)
        self.parent[max(one, other)] = min(one, other)


def _as_set(name: str, candidate: _Candidate, order: dict[str, int]) -> ChannelSet:
    """The candidate as a plain object, its tensors in the model's order."""
    places: dict[tuple[str, str, int], list[list[int]]] = {}
    size = len(candidate.channels)
    for i, atoms in enumerate(candidate.channels):
        for role, tensor, dim, position in sorted(atoms):
            key = role, tensor, dim
            if key not in places:
                places[key] = [[] for _ in range(size)]
            places[key][i].append(position)
    roles: dict[str, list[ChannelIndex]] = {"producer": [], "consumer": [], "statistics": []}
    # A layer's weight before its bias, as in the model.
    in_order = sorted(
        places, key=lambda key: (order[key[1].rpartition(".")[0]], key[1].endswith(".bias"), key)
    )
    for role, tensor, dim in in_order:
        indices = tuple(tuple(sorted(each)) for each in places[role, tensor, dim])
        roles[role].append(ChannelIndex(tensor, dim, indices))
    return ChannelSet(
        name, size, tuple(roles["producer"]), tuple(roles["consumer"]), tuple(roles["statistics"])
    )


def count_calls(
    model: nn.Module, forward: Callable[[nn.Module], Any]
) -> tuple[Counter[str], dict[str, int]]:
    """One forward pass: how often each module is called, and each layer's multiply-adds in all."""
    calls: Counter[str] = Counter()
    multiply_adds: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            calls[name] += 1
            if isinstance(module, (_ConvNd, nn.Linear)) and isinstance(output, torch.Tensor):
                transposed = getattr(module, "transposed", False)
                weight, along = module.weight, inputs[0] if transposed else output
                positions = along.numel() // weight.shape[0]
                multiply_adds[name] = multiply_adds.get(name, 0) + positions * weight.numel()

        return count

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls, multiply_adds
