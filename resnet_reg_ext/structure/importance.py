"""How much each channel matters, and the removal of those that matter least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_map

from .channel_sets import (
    Channels,
    ChannelSet,
    per_channel_sum,
    smallest_multiple,
    tensors_of,
)
from .channels import channels, check_model
from .compact import Compacted, checked_multiple, take_out
from .surgery import copy_module, without_hooks


def importance(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    method: str = "taylor",
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    max_batches: int | None = None,
    sets: Channels | None = None,
) -> dict[str, Tensor]:
    """Scores every channel of every set.

    ``"taylor"``: how much the loss of a batch would change to first order if the channel were set
    to zero, squared, summed over batches. Behind norms with weight g and bias b that is
    (g·∂g + b·∂b)², summed over the set's norms; in a set without norms (Σ w·∂w)² over each layer's
    rows and biases. Source: Molchanov et al., *Importance estimation for neural network pruning*,
    2019.

    ``"magnitude"``: root mean square of the channel's producers. No batch is run.

    Args:
        model: isn't changed; a copy of it is run, in the mode that it is in. In training mode norms
            use the batch's statistics, which helps while running ones lag.
        loader: pairs (inputs, targets); inputs as for :func:`channels`. They are moved to the
            model's device.
        method: see above.
        loss: of outputs and targets, a single number.
        max_batches: so many batches at most; None for all.
        sets: what :func:`channels` gives for this model; None finds them with the first batch.

    Returns:
        By the set's name a float64 tensor (size,) on the CPU.

    Raises:
        ValueError: an unknown method, a model that channels can't be taken out of, or no batch.

    Example:
        >>> scores = importance(model, loader, max_batches=20)
        >>> scores["layer1.0.conv1"].shape
        torch.Size([64])
    """
    check_model(model, "importance")
    if method not in ("taylor", "magnitude"):
        raise ValueError(f"importance: method is {method!r}: must be 'taylor' or 'magnitude'")
    if sets is None:
        # A generator gives its first batch once.
        batches = iter(loader)
        first = next(batches, None)
        if first is None:
            raise ValueError("importance: loader has no batch: must have one")
        sets, loader = channels(model, _moved(first[0], model)), chain([first], batches)
    if method == "magnitude":
        return magnitude(model, sets)
    copy = without_hooks(copy_module(model)).requires_grad_(False)
    tensors = tensors_of(copy)
    scored = {one.name: _scored_tensors(one, copy) for one in sets}
    parameters = list(dict.fromkeys(tensors[n] for names in scored.values() for n in names))
    for parameter in parameters:
        parameter.requires_grad_(True)
    scores = {one.name: torch.zeros(one.size, dtype=torch.float64) for one in sets}
    count = 0
    for batch in islice(loader, max_batches):
        inputs, targets = _moved(batch[0], model), _moved(batch[1], model)
        with torch.enable_grad():
            value = loss(_called(copy, inputs), targets)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        by_tensor = dict(zip(parameters, gradients, strict=True))
        for one in sets:
            scores[one.name] += _taylor(one, tensors, scored[one.name], by_tensor)
        count += 1
    if not count:
        raise ValueError("importance: loader has no batch: must have one")
    return scores


def magnitude(model: nn.Module, sets: Channels) -> dict[str, Tensor]:
    """Root mean square of each channel's producers, by the set's name: float64, on the CPU."""
    tensors = tensors_of(model)
    scores = {}
    for one in sets:
        squares = torch.zeros(one.size, dtype=torch.float64)
        counts = torch.zeros(one.size, dtype=torch.float64)
        for index in one.producers:
            values = tensors[index.tensor].detach().double()
            squares += per_channel_sum(values.square(), index, one.size).cpu()
            counts += per_channel_sum(torch.ones_like(values), index, one.size).cpu()
        scores[one.name] = (squares / counts).sqrt()
    return scores


def _scored_tensors(one: ChannelSet, model: nn.Module) -> list[str]:
    """Weights and biases of the set's norms; of its other layers where it has none."""
    norms = [
        index.tensor
        for index in one.producers
        if isinstance(
            model.get_submodule(index.tensor.rpartition(".")[0]), nn.modules.batchnorm._NormBase
        )
    ]
    return norms or [index.tensor for index in one.producers]


def _taylor(
    one: ChannelSet,
    tensors: Mapping[str, Tensor],
    names: list[str],
    gradients: Mapping[Tensor, Tensor | None],
) -> Tensor:
    """One batch's score of each channel."""
    of_layers: dict[str, Tensor] = {}
    for index in one.producers:
        gradient = gradients.get(tensors[index.tensor])
        if index.tensor in names and gradient is not None:
            products = tensors[index.tensor].detach().double() * gradient.double()
            layer = index.tensor.rpartition(".")[0]
            change = per_channel_sum(products, index, one.size).cpu()
            of_layers[layer] = of_layers.get(layer, torch.zeros(())) + change
    total = torch.zeros(one.size, dtype=torch.float64)
    for change in of_layers.values():
        total += change.square()
    return total


def _moved(value: Any, model: nn.Module) -> Any:
    parameter = next(iter(model.parameters()), None)
    if parameter is None:
        return value
    return tree_map(lambda v: v.to(parameter.device) if isinstance(v, Tensor) else v, value)


def _called(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def remove(
    model: nn.Module,
    example_inputs: Any,
    *,
    share: float | None = None,
    macs: float | None = None,
    importance: Mapping[str, Tensor] | None = None,
    optimizer: Optimizer | None = None,
    min_keep: float = 0.1,
    multiple_of: int = 1,
    average: AveragedModel | None = None,
    sets: Channels | None = None,
) -> Compacted:
    """Takes out the least important channels in one shot, even if their weights aren't zero.

    All channels of the model are ranked together by their scores. The outputs change, so train on
    afterwards; each step of the smaller model is cheaper.

    Args:
        model: is left as it was.
        example_inputs: as for :func:`channels`; not used where ``sets`` is given.
        share: the fraction of all sets' channels to take out, in [0, 1). With ``multiple_of=1`` it
            is met exactly, after rounding to whole channels.
        macs: instead of ``share``, the fraction of multiply-adds to take out at least, in [0, 1).
        importance: scores by the set's name, as :func:`importance` returns; None for magnitudes.
        optimizer: changed in place, as by :func:`compact`.
        min_keep: the fraction of every set's channels that stays at least; one channel always does.
        multiple_of: takes out a little less, so that the number of rows of each set is a multiple
            of this.
        average: as with :func:`compact`.
        sets: as with :func:`compact`.

    Returns:
        The new model and a report.

    Raises:
        ValueError: an option is out of its range, more is asked than ``min_keep`` allows, or the
            scores aren't these sets'. Nothing has changed.

    Example:
        >>> scores = importance(model, loader)
        >>> result = remove(
        ...     model, images[:1], share=0.5, importance=scores, optimizer=optimizer
        ... )
        >>> model = result.model
    """
    check_model(model, "remove")
    if (share is None) == (macs is None):
        raise ValueError("remove: must have one of share and macs")
    for name, value in (("share", share), ("macs", macs), ("min_keep", min_keep)):
        limit = 1.0 if name == "min_keep" else math.nextafter(1.0, 0.0)
        if value is not None and not 0 <= value <= limit:
            raise ValueError(f"remove: {name} is {value!r}: must be a share in [0, 1)")
    checked_multiple(multiple_of, "remove")
    found = channels(model, example_inputs) if sets is None else sets
    scores = _checked_scores(magnitude(model, found) if importance is None else importance, found)
    order = _least_important(scores, found, min_keep)
    if share is not None:
        count = round(share * found.total)
        if count > len(order):
            raise ValueError(
                f"remove: share is {share!r}, {count} of {found.total} channels, but min_keep="
                f"{min_keep!r} lets {len(order)} go: must be at most {len(order) / found.total:.4f}"
            )
    else:
        assert macs is not None
        count = _count_for_macs(macs, order, model, found, min_keep)
    kept = _kept(order[:count], found)
    for one, stays, of_set in zip(found, kept, scores, strict=True):
        least = smallest_multiple(int(stays.sum()), one, multiple_of)
        gone = sorted((~stays).nonzero().flatten().tolist(), key=lambda i: -float(of_set[i]))
        for i in gone[: least - int(stays.sum())]:
            stays[i] = True
    return take_out(model, found, kept, optimizer, average)


def _checked_scores(scores: Mapping[str, Tensor], found: Channels) -> list[Tensor]:
    """The scores in the sets' order."""
    checked = []
    for one in found:
        of_set = scores.get(one.name)
        if not isinstance(of_set, Tensor) or of_set.shape != (one.size,):
            shape = tuple(of_set.shape) if isinstance(of_set, Tensor) else type(of_set).__name__
            raise ValueError(
                f"remove: importance of set {one.name} is {shape}: must be a tensor of shape "
                f"({one.size},)"
            )
        if not bool(torch.isfinite(of_set).all()):
            raise ValueError(f"remove: importance of set {one.name} has values that aren't finite")
        checked.append(of_set.detach().double().cpu())
    return checked


def _least_important(
    scores: list[Tensor], found: Channels, min_keep: float
) -> list[tuple[int, int]]:
    """(set, channel) of all channels that may go, the least important first."""
    ranked = []
    for s, (one, of_set) in enumerate(zip(found, scores, strict=True)):
        may_go = one.size - max(1, math.ceil(min_keep * one.size))
        least = torch.argsort(of_set, stable=True)[:may_go].tolist()
        ranked += [(float(of_set[i]), s, i) for i in least]
    return [(s, i) for _, s, i in sorted(ranked)]


def _kept(gone: list[tuple[int, int]], found: Channels) -> list[Tensor]:
    kept = [torch.ones(one.size, dtype=torch.bool) for one in found]
    for s, i in gone:
        kept[s][i] = False
    return kept


def _count_for_macs(
    macs: float, order: list[tuple[int, int]], model: nn.Module, found: Channels, min_keep: float
) -> int:
    """How many of the least important channels must go, to take so many multiply-adds out."""
    total = sum(found.multiply_adds.values())
    low, high = 0, len(order)
    if _macs_left(order, model, found) > (1 - macs) * total:
        least = 1 - _macs_left(order, model, found) / max(1, total)
        raise ValueError(
            f"remove: macs is {macs!r}, but min_keep={min_keep!r} lets {least:.4f} of the "
            "multiply-adds go: must be at most that"
        )
    while low < high:
        middle = (low + high) // 2
        if _macs_left(order[:middle], model, found) <= (1 - macs) * total:
            high = middle
        else:
            low = middle + 1
    return low


def _macs_left(gone: list[tuple[int, int]], model: nn.Module, found: Channels) -> float:
    """A layer's multiply-adds are in proportion to its rows, and to its columns."""
    share: dict[tuple[str, int], float] = {}
    tensors = tensors_of(model)
    for one, stays in zip(found, _kept(gone, found), strict=True):
        which = stays.tolist()
        for index in one.producers + one.consumers:
            lost = sum(len(at) for at, stay in zip(index.indices, which, strict=True) if not stay)
            key = index.tensor, index.dim
            size = tensors[index.tensor].shape[index.dim]
            share[key] = share.get(key, 1.0) - lost / size
    return sum(
        count * share.get((f"{layer}.weight", 0), 1.0) * share.get((f"{layer}.weight", 1), 1.0)
        for layer, count in found.multiply_adds.items()
    )
