"""Takes channels out of a model: those that are exactly zero, or those that are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from .channel_sets import (
    Channels,
    ChannelSet,
    flat_indices,
    live_channels,
    nonzero_channels,
    smallest_multiple,
    tensors_of,
)
from .channels import channels, check_model
from .compaction_report import CompactionReport, count_parameters, layer_changes, names_of
from .shortcuts import dead_branches, replace_blocks
from .surgery import check_average, cut, plan_optimizer, positions_kept


@dataclass(frozen=True)
class Compacted:
    """A smaller model.

    Attributes:
        model: a new module of the same class.
        report: what was taken out; prints as a table.
    """

    model: nn.Module
    report: CompactionReport


def compact(
    model: nn.Module,
    example_inputs: Any,
    optimizer: Optimizer | None = None,
    *,
    multiple_of: int = 1,
    average: AveragedModel | None = None,
    sets: Channels | None = None,
) -> Compacted:
    """Takes out every channel that is zero for every input. The outputs stay the same.

    That is one whose producers are all exactly zero: its rows of convolutions and linear layers,
    weight and bias, and its elements of norms. Where each path from them leads through a norm
    (``ChannelSet.closing_norms``), those of the norms are enough, as long as the others are finite.
    A channel with zero rows but a bias or a norm that isn't zero would leave a constant: it stays,
    and the report says so. At least one channel of every set stays. A residual
    block whose branch gives only zeros is replaced by its shortcut (torchvision's ResNets,
    MobileNetV2 and EfficientNet, timm's ResNets).

    The new model has the old one's dtypes, device, memory formats, training and evaluation modes,
    ``requires_grad`` flags, gradients, buffers, and forward and backward hooks.

    Training continues as it would have without the removal if :func:`zero_dead_columns` is called
    after each step. Otherwise weight decay and momentum move the columns that read a zero channel,
    and these may revive it. One difference remains: a block that becomes its shortcut loses the
    last norm's bias, which could have become nonzero again.

    Args:
        model: any module; it is left as it was.
        example_inputs: as for :func:`channels`; not used where ``sets`` is given.
        optimizer: changed in place: its groups list the new parameters, and state of a
            parameter's shape (momentum buffers, master weights, ...) loses the same channels.
            Schedulers and a GradScaler keep working. A channel counts as zero only if its master
            weights are zero too.
        multiple_of: keeps enough zero channels that the number of rows of each set is a multiple
            of this. Inference libraries prefer 8.
        average: a moving average of this model. It loses the same channels, in place. Where it
            still had nonzero weights in them, its outputs change.
        sets: what :func:`channels` returned for this model, to save the search.

    Returns:
        The new model and a report.

    Raises:
        ImportError: torch-pruning isn't installed.
        TypeError: ``model`` is no module, ``optimizer`` no optimizer.
        ValueError: a module, parameter or state can't be kept; it is named, and nothing has
            changed.

    Example:
        >>> result = compact(model, images[:1], optimizer)
        >>> model = result.model
        >>> before, after = result.report.channels
    """
    check_model(model, "compact")
    found = checked_sets(model, example_inputs, sets, "compact")
    multiple_of = checked_multiple(multiple_of, "compact")
    tensors = tensors_of(model)
    masters = _master_weights(model, optimizer)
    live, kept = [], []
    for one in found:
        alive = live_channels(one, tensors, masters)
        live.append(alive)
        kept.append(_filled_up(alive, smallest_multiple(int(alive.sum()), one, multiple_of)))
    blocks = dead_branches(model, found, live)
    constant = [_constant(tensors, one, alive) for one, alive in zip(found, live, strict=True)]
    zero = {
        one.name: int((stays & ~alive).sum())
        for one, stays, alive in zip(found, kept, live, strict=True)
        if bool((stays & ~alive).any())
    }
    return take_out(
        model, found, kept, optimizer, average, blocks=blocks, kept_zero=zero, constant=constant
    )


def take_out(
    model: nn.Module,
    found: Channels,
    kept: Sequence[Tensor],
    optimizer: Optimizer | None,
    average: AveragedModel | None,
    *,
    blocks: Sequence[str] = (),
    kept_zero: dict[str, int] | None = None,
    constant: Sequence[tuple[int, ...]] | None = None,
) -> Compacted:
    """Takes channels out of a model, its optimizer and its average; all of it or nothing.

    Args:
        model: is left as it was.
        found: its sets.
        kept: for each set a bool for each channel.
        optimizer: changed in place.
        average: changed in place.
        blocks: residual blocks that become their shortcuts.
        kept_zero: for the report.
        constant: for the report.
    """
    positions = positions_kept(tensors_of(model), found, kept)
    new = cut(model, positions)
    replace_blocks(new, blocks)
    commits: list[Callable[[], None]] = []
    if average is not None:
        if not isinstance(average, AveragedModel):
            raise TypeError(
                f"average is a {type(average).__name__}: must be a "
                "torch.optim.swa_utils.AveragedModel"
            )
        check_average(average.module, model)
        averaged = cut(average.module, positions)
        replace_blocks(averaged, blocks)
        commits.append(lambda: setattr(average, "module", averaged))
    if optimizer is not None:
        commits.append(plan_optimizer(optimizer, model, new, positions))
    for commit in commits:
        commit()
    removed = [tuple((~stays).nonzero().flatten().tolist()) for stays in kept]
    report = CompactionReport(
        layer_changes(model, new, found),
        (found.total, sum(int(stays.sum()) for stays in kept)),
        (count_parameters(model), count_parameters(new)),
        names_of(found, removed),
        kept_zero or {},
        names_of(found, constant) if constant is not None else {},
        tuple(blocks),
        found.excluded,
    )
    return Compacted(new, report)


@torch.no_grad()
def zero_dead_columns(model: nn.Module, sets: Channels, optimizer: Optimizer | None = None) -> int:
    """Keeps channels zero that have become zero, as if they had been taken out.

    The columns that read a zero channel have no effect on the outputs. But momentum and weight
    decay still move them, they count in gradient norms, and they pass gradients to the channel. So
    they are set to zero, as are the gradients and the optimizer state of these columns and of the
    channel's own rows. Rows of a convolution whose norm is zero become zero themselves, as weight
    decay and momentum would go on moving them. Call it after each step.

    Args:
        model: its outputs stay the same.
        sets: what :func:`channels` gives for it.
        optimizer: its state of a parameter's shape is set to zero there.

    Returns:
        How many channels are zero.

    Raises:
        ValueError: the sets are another model's.

    Example:
        >>> sets = channels(model, images[:1])
        >>> optimizer.step()
        >>> zero_dead_columns(model, sets, optimizer)
        0
    """
    checked_sets(model, None, sets, "zero_dead_columns")
    tensors = tensors_of(model)
    masters = _master_weights(model, optimizer)
    state: dict[Tensor, Any] = {} if optimizer is None else optimizer.state
    count = 0
    for one in sets:
        dead = ~live_channels(one, tensors, masters)
        if not bool(dead.any()):
            continue
        count += int(dead.sum())
        for index in one.consumers + one.producers:
            tensor = tensors[index.tensor]
            positions, owners = flat_indices(index, tensor.device)
            positions = positions[dead.to(tensor.device)[owners]]
            of_parameter = state[tensor].values() if tensor in state else ()
            for value in (tensor, tensor.grad, *of_parameter):
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    value.index_fill_(index.dim, positions.to(value.device), 0)
    return count


def checked_sets(
    model: nn.Module, example_inputs: Any, sets: Channels | None, who: str
) -> Channels:
    """The sets that are given, if they can be this model's; else those that are found."""
    if sets is None:
        return channels(model, example_inputs)
    if not isinstance(sets, Channels):
        raise TypeError(f"{who}: sets is a {type(sets).__name__}: must be what channels() gives")
    tensors = tensors_of(model)
    for one in sets:
        for index in one.all:
            size = tensors[index.tensor].shape[index.dim] if index.tensor in tensors else 0
            highest = max((max(at) for at in index.indices if at), default=-1)
            if highest >= size:
                raise ValueError(
                    f"{who}: sets are another model's: {index.tensor} has {size} positions on "
                    f"dimension {index.dim}, but one of set {one.name} is {highest}"
                )
    return sets


def checked_multiple(multiple_of: int, who: str) -> int:
    """Refuses what is no count."""
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"{who}: multiple_of is {multiple_of!r}: must be a whole number, >= 1")
    return multiple_of


def _filled_up(alive: Tensor, count: int) -> Tensor:
    """Which channels stay: all that live, and as many of the others that there are ``count``."""
    kept = alive.clone()
    missing = count - int(alive.sum())
    if missing > 0:
        kept[(~alive).nonzero().flatten()[:missing]] = True
    return kept


def _master_weights(model: nn.Module, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """The optimizer's own copies of parameters, by name: those of half precision can underflow."""
    if optimizer is None or not isinstance(optimizer, Optimizer):
        return {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter in optimizer.state:
            master = optimizer.state[parameter].get("master_weight")
            if isinstance(master, Tensor) and master.shape == parameter.shape:
                found[name] = master
    return found


def _constant(tensors: dict[str, Tensor], one: ChannelSet, alive: Tensor) -> tuple[int, ...]:
    """Channels with zero rows of weights, but with a bias or a norm that isn't zero."""
    weights = [index for index in one.producers if tensors[index.tensor].dim() > 1]
    constant = alive & ~nonzero_channels(tensors, weights, one.size)
    return tuple(constant.nonzero().flatten().tolist())
