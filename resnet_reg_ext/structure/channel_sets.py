"""Sets of coupled channels as plain objects, and which of their channels are zero."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ChannelIndex:
    """Where the channels of a set lie in one tensor.

    Attributes:
        tensor: full name of the parameter or buffer, such as ``"layer1.0.conv1.weight"``.
        dim: the dimension that the channels lie along.
        indices: for each channel of the set its positions on ``dim``. There are several where a
            flattened image feeds a linear layer, or where a convolution has groups; none where
            the tensor has nothing of that channel.
    """

    tensor: str
    dim: int
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ChannelSet:
    """Channels that can only be taken out of all of these tensors at once.

    Attributes:
        name: the first module, in the model's order, that produces the channels.
        size: number of channels.
        producers: rows of convolutions and linear layers (weight and bias) and elements of norms
            (weight and bias). A channel is zero for every input if all of these are zero.
        consumers: columns of the layers that read the channels.
        statistics: what else is indexed by channel: running means and variances, PReLU's slopes.
        closing_norms: the producers that are norms' weights and biases, where every path from the
            channels to their consumers leads through one of these norms: a channel is zero if
            these are, whatever its other producers are. Empty where some path has no norm.
    """

    name: str
    size: int
    producers: tuple[ChannelIndex, ...]
    consumers: tuple[ChannelIndex, ...]
    statistics: tuple[ChannelIndex, ...] = ()
    closing_norms: tuple[ChannelIndex, ...] = ()

    @property
    def all(self) -> tuple[ChannelIndex, ...]:
        """Producers, consumers and statistics."""
        return self.producers + self.consumers + self.statistics

    @property
    def width(self) -> int:
        """Rows of the first producer for each channel: 1, but for convolutions with groups."""
        return max(1, len(self.producers[0].indices[0]))


@dataclass(frozen=True)
class ExcludedSet:
    """Channels that are coupled but can't be taken out.

    Attributes:
        name: the first module that produces them.
        reason: why not; it names the module that stands in the way.
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Channels(Sequence[ChannelSet]):
    """The sets of a model, in the model's order.

    Attributes:
        sets: those whose channels can be taken out.
        excluded: those whose channels can't.
        multiply_adds: by layer, for one example of a batch: those of convolutions and linear
            layers.
    """

    sets: tuple[ChannelSet, ...]
    excluded: tuple[ExcludedSet, ...] = ()
    multiply_adds: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Number of channels in all sets."""
        return sum(one.size for one in self.sets)

    @overload
    def __getitem__(self, index: int) -> ChannelSet: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[ChannelSet, ...]: ...
    def __getitem__(self, index: int | slice) -> ChannelSet | tuple[ChannelSet, ...]:
        return self.sets[index]

    def __len__(self) -> int:
        return len(self.sets)

    def __iter__(self) -> Iterator[ChannelSet]:
        return iter(self.sets)

    def __str__(self) -> str:
        width = max([len("set"), *(len(one.name) for one in self.sets)])
        lines = [f"{'set':<{width}}  {'channels':>8}  {'producers':>9}  {'consumers':>9}"]
        lines += [
            f"{one.name:<{width}}  {one.size:>8}  {len(one.producers):>9}  {len(one.consumers):>9}"
            for one in self.sets
        ]
        lines.append(f"{'total':<{width}}  {self.total:>8}")
        lines += [f"excluded: {one}" for one in self.excluded]
        return "\n".join(lines)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def flat_indices(index: ChannelIndex, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions on the dimension, and beside each the channel it belongs to (both int64)."""
    positions = [p for positions in index.indices for p in positions]
    owners = [i for i, positions in enumerate(index.indices) for _ in positions]
    return (
        torch.tensor(positions, dtype=torch.long, device=device),
        torch.tensor(owners, dtype=torch.long, device=device),
    )


def per_channel_sum(values: Tensor, index: ChannelIndex, size: int) -> Tensor:
    """Sums ``values``, of the tensor's shape, over everything of a channel: (size,)."""
    rows = values.movedim(index.dim, 0).reshape(values.shape[index.dim], -1).sum(1)
    positions, owners = flat_indices(index, values.device)
    return torch.zeros(size, dtype=rows.dtype, device=rows.device).index_add(
        0, owners, rows[positions]
    )


@torch.no_grad()
def nonzero_channels(
    tensors: Mapping[str, Tensor], indices: Sequence[ChannelIndex], size: int
) -> Tensor:
    """Which channels have anything but exact zeros in these tensors: (size,) of bool, on the CPU.

    Both zeros count as zero, NaN doesn't.
    """
    return _channels_with(lambda tensor: tensor != 0, tensors, indices, size)


@torch.no_grad()
def live_channels(
    one: ChannelSet, tensors: Mapping[str, Tensor], masters: Mapping[str, Tensor]
) -> Tensor:
    """Which channels of a set aren't zero for every input: (size,) of bool, on the CPU.

    Zero are those whose closing norms are zero, or where there are none all producers. A NaN or an
    infinity keeps a channel alive wherever it is: a norm's zero would make NaN of it.

    Args:
        one: the set.
        tensors: the model's, by name.
        masters: master weights by name, which must be zero too.
    """
    deciding = one.closing_norms or one.producers
    live = nonzero_channels(tensors, deciding, one.size)
    live |= nonzero_channels(masters, [i for i in deciding if i.tensor in masters], one.size)
    others = [index for index in one.producers if index not in deciding]
    if others and not bool(live.all()):
        live |= _channels_with(lambda tensor: ~tensor.isfinite(), tensors, others, one.size)
    return live


def _channels_with(
    is_so: Callable[[Tensor], Tensor],
    tensors: Mapping[str, Tensor],
    indices: Sequence[ChannelIndex],
    size: int,
) -> Tensor:
    """Which channels have an element that is so in one of these tensors."""
    found = torch.zeros(size, dtype=torch.bool)
    for index in indices:
        count = per_channel_sum(is_so(tensors[index.tensor]).long(), index, size)
        found |= count.cpu() > 0
    return found


def smallest_multiple(count: int, one: ChannelSet, multiple_of: int) -> int:
    """How many channels to keep, at least ``count``, so that rows are a multiple; at most all."""
    step = multiple_of // math.gcd(multiple_of, one.width)
    return min(one.size, -(-max(1, count) // step) * step)


def without(sets: Channels, removed: Mapping[str, Sequence[int]]) -> Channels:
    """The sets of a model whose channels were taken out, without a search.

    A convolution that is left with one group is the exception: a search finds single channels
    there, of which these sets know nothing.

    Args:
        sets: before.
        removed: by the set's name which channels are gone, as a report tells.

    Returns:
        The same sets with fewer channels and new positions; without multiply-adds, which are
        others now.
    """
    gone: dict[tuple[str, int], list[int]] = {}
    for one in sets:
        for index in one.all:
            positions = gone.setdefault((index.tensor, index.dim), [])
            positions += [p for i in removed.get(one.name, ()) for p in index.indices[i]]
    for positions in gone.values():
        positions.sort()

    def moved(index: ChannelIndex, stay: Sequence[int]) -> ChannelIndex:
        before = gone[index.tensor, index.dim]
        positions = (index.indices[i] for i in stay)
        return ChannelIndex(
            index.tensor,
            index.dim,
            tuple(tuple(p - bisect_left(before, p) for p in at) for at in positions),
        )

    smaller = []
    for one in sets:
        lost = set(removed.get(one.name, ()))
        stay = [i for i in range(one.size) if i not in lost]
        parts = [
            tuple(moved(index, stay) for index in part)
            for part in (one.producers, one.consumers, one.statistics, one.closing_norms)
        ]
        smaller.append(ChannelSet(one.name, len(stay), *parts))
    return Channels(tuple(smaller), sets.excluded)
