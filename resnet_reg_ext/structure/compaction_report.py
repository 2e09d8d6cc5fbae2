"""What a removal of channels has changed, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from .channel_sets import Channels, ExcludedSet


@dataclass(frozen=True)
class LayerChange:
    """One layer, or the total, before and after.

    Attributes:
        name: the module's.
        channels: outputs, before and after; 0 after where the layer is gone.
        parameters: elements of weight and bias.
        multiply_adds: for one example; 0 for norms.
    """

    name: str
    channels: tuple[int, int]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int]


@dataclass(frozen=True)
class CompactionReport:
    """What was taken out of a model, and what wasn't and why. Prints as a table.

    Attributes:
        layers: convolutions, linear layers and norms, in the model's order.
        channels: of all sets that channels can be taken out of, before and after. A channel that
            several layers share counts once.
        parameters: of the whole model, before and after.
        removed: by the set's name which channels are gone.
        kept_zero: by the set's name how many channels are zero and stay: a layer's last one, or
            those that ``multiple_of`` asks for.
        constant: by the set's name which channels would leave a constant and stay: their
            convolutions and linear layers are zero, but a bias or a norm isn't.
        shortcuts: residual blocks that are only their shortcut now.
        excluded: sets whose channels can't be taken out.
    """

    layers: tuple[LayerChange, ...]
    channels: tuple[int, int]
    parameters: tuple[int, int]
    removed: Mapping[str, tuple[int, ...]]
    kept_zero: Mapping[str, int]
    constant: Mapping[str, tuple[int, ...]]
    shortcuts: tuple[str, ...]
    excluded: tuple[ExcludedSet, ...]

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Of all convolutions and linear layers for one example, before and after."""
        before = sum(layer.multiply_adds[0] for layer in self.layers)
        return before, sum(layer.multiply_adds[1] for layer in self.layers)

    def __str__(self) -> str:
        total = LayerChange("total", self.channels, self.parameters, self.multiply_adds)
        rows = [
            (row.name, *(f"{a:,} → {b:,}" for a, b in _numbers(row)))
            for row in (*self.layers, total)
        ]
        rows.insert(0, ("layer", "channels", "parameters", "multiply-adds"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))])
            for row in rows
        ]
        lines += [f"only its shortcut is left of {name}" for name in self.shortcuts]
        lines += [
            f"{name}: {len(which)} channels would leave a constant and stay: a bias or a norm of "
            "theirs isn't zero"
            for name, which in self.constant.items()
        ]
        lines += [
            f"{name}: {count} channels of zeros stay" for name, count in self.kept_zero.items()
        ]
        lines += [f"not taken out of {one}" for one in self.excluded]
        return "\n".join(lines)


def _numbers(row: LayerChange) -> tuple[tuple[int, int], ...]:
    return row.channels, row.parameters, row.multiply_adds


def layer_changes(old: nn.Module, new: nn.Module, found: Channels) -> tuple[LayerChange, ...]:
    """Compares the layers of two models with the same names."""
    successors = dict(new.named_modules())
    changes = []
    for name, module in old.named_modules():
        if not isinstance(module, (_ConvNd, nn.Linear, _NormBase)):
            continue
        other = successors.get(name)
        before, after = _elements(module), _elements(other)
        multiply_adds = found.multiply_adds.get(name, 0)
        weights = _weight_elements(module), _weight_elements(other)
        remaining = multiply_adds * weights[1] // weights[0] if weights[0] else 0
        changes.append(
            LayerChange(
                name,
                (_outputs(module), _outputs(other)),
                (before, after),
                (multiply_adds, remaining),
            )
        )
    return tuple(changes)


def _elements(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(p.numel() for p in module._parameters.values() if p is not None)


def _weight_elements(module: nn.Module | None) -> int:
    weight = None if module is None else module._parameters.get("weight")
    return 0 if weight is None else weight.numel()


def _outputs(module: nn.Module | None) -> int:
    if isinstance(module, _ConvNd):
        return module.out_channels
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.num_features if isinstance(module, _NormBase) else 0


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters; shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def names_of(sets: Channels, values: Sequence[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """By the set's name, without what is empty."""
    return {one.name: value for one, value in zip(sets, values, strict=True) if value}
