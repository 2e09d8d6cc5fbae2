"""Brings a checkpoint of other parameter groups into those of the optimizer that loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from .state import MOMENTUM_BUFFER

_Group = Mapping[str, Any]
# What training goes on with. Penalties are what groups are made for: they stay the live group's.
_TAKEN = ("lr", "initial_lr", "momentum", "dampening", "nesterov", "maximize")
_MOST_STATES = 200_000  # of the search for the order; two groups of ResNet-50's have 5,800
REMEDY = (
    "make the optimizer with groups like the checkpoint's, or save the checkpoint by an optimizer "
    "that was made of model.named_parameters() (torch >= 2.6), which keeps names"
)


def regrouped(checkpoint: dict[str, Any], live: Sequence[_Group]) -> dict[str, Any]:
    """The checkpoint with its parameters in the live groups; itself where they are so already.

    Parameters are told by their names where both sides have them (``param_names``). Otherwise one
    side must have a single group that lists the parameters in the model's order, and the other
    groups as ``param_groups`` makes them: with names, each in the model's order. The momentum
    buffers' shapes then tell which parameter is which, if they leave one way only.

    A group's lr, momentum, dampening, nesterov and maximize come from the checkpoint, weight decay
    and the other options stay the live group's.

    Args:
        checkpoint: an optimizer's state dict; not changed.
        live: the groups of the optimizer that loads it.

    Raises:
        ValueError: it can't be told which parameter is which; the remedy is said.
    """
    saved = checkpoint["param_groups"]
    by_name = _by_name(saved, live)
    if by_name is not None:
        places = by_name
    elif [len(g["params"]) for g in saved] == [len(g["params"]) for g in live]:
        return checkpoint
    else:
        places = _by_order(saved, live, checkpoint["state"])
    ids = [saved_id for group in saved for saved_id in group["params"]]
    if [places[a:b] for a, b in _spans(live)] == [list(range(a, b)) for a, b in _spans(saved)]:
        return checkpoint
    source = [g for g, group in enumerate(saved) for _ in group["params"]]
    groups = []
    for index, (group, (start, end)) in enumerate(zip(live, _spans(live), strict=True)):
        theirs = [saved[g] for g in sorted({source[place] for place in places[start:end]})]
        options = {k: v for k, v in group.items() if k != "params"} | _options(theirs, index)
        groups.append({**options, "params": [ids[place] for place in places[start:end]]})
    return {**checkpoint, "param_groups": groups}


def _spans(groups: Sequence[_Group]) -> list[tuple[int, int]]:
    """Where each group's parameters begin and end among those of all groups."""
    ends = list(accumulate(len(group["params"]) for group in groups))
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


def _by_name(saved: Sequence[_Group], live: Sequence[_Group]) -> list[int] | None:
    """For each live parameter its place in the checkpoint; None where names don't tell."""
    theirs, ours = _names(saved), _names(live)
    if theirs is None or ours is None or set(theirs) != set(ours):
        return None
    place = {name: i for i, name in enumerate(theirs)}
    return [place[name] for name in ours]


def _names(groups: Sequence[_Group]) -> list[str] | None:
    """The names of all parameters; None where one has none, or two have the same."""
    names: list[str] = []
    for group in groups:
        of_group = group.get("param_names") or []
        if len(of_group) != len(group["params"]):
            return None
        names += of_group
    return names if len(set(names)) == len(names) else None


def _by_order(
    saved: Sequence[_Group], live: Sequence[_Group], state: Mapping[Any, Mapping[str, Any]]
) -> list[int]:
    """For each live parameter its place in the checkpoint, told by order and shapes."""
    theirs = [_shape(state.get(i, {})) for group in saved for i in group["params"]]
    ours = [tuple(p.shape) for group in live for p in group["params"]]
    where = (
        f"ProxSGD: the checkpoint has {_count(saved)}, the optimizer {_count(live)}, and names of "
        "parameters don't tell which is which"
    )
    several = live if len(saved) == 1 else saved
    # Groups without names may be in any order, which shapes would not always show.
    if len(theirs) != len(ours) or 1 not in (len(saved), len(live)) or _names(several) is None:
        raise ValueError(f"{where}: {REMEDY}")
    if not any(shape is not None for shape in theirs):
        return list(range(len(ours)))  # there is no state to assign
    if len(saved) == 1:
        lists = [ours[a:b] for a, b in _spans(live)]
        found = _merge(theirs, lists)
        if found is not None:
            places = [0] * len(ours)
            starts = [a for a, _ in _spans(live)]
            for place, (index, i) in enumerate(found):
                places[starts[index] + i] = place
            return places
    else:
        found = _merge(ours, [theirs[a:b] for a, b in _spans(saved)])
        if found is not None:
            starts = [a for a, _ in _spans(saved)]
            return [starts[index] + i for index, i in found]
    raise ValueError(f"{where}, nor do order and shapes in one way only: {REMEDY}")


def _count(groups: Sequence[_Group]) -> str:
    number = sum(len(group["params"]) for group in groups)
    return f"{len(groups)} param_groups of {number} parameters"


def _shape(state: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of a parameter as its state tells; None where it has none."""
    buffer = state.get(MOMENTUM_BUFFER)
    return tuple(buffer.shape) if isinstance(buffer, Tensor) else None


def _merge(
    order: Sequence[tuple[int, ...] | None], lists: Sequence[Sequence[tuple[int, ...] | None]]
) -> list[tuple[int, int]] | None:
    """How ``lists`` interleave to ``order``: for each place the list and the index in it.

    None in either is any shape. The search goes from the front over all sets of positions that are
    reached; each keeps the way it was reached by, or that there are several.

    Returns:
        None where there is no way, or more than one.
    """
    reached: dict[tuple[int, ...], int | None] = {tuple(0 for _ in lists): -1}
    steps = [reached]
    for shape in order:
        following: dict[tuple[int, ...], int | None] = {}
        for positions, way in reached.items():
            for index, (items, i) in enumerate(zip(lists, positions, strict=True)):
                if i < len(items) and (shape is None or items[i] in (None, shape)):
                    after = (*positions[:index], i + 1, *positions[index + 1 :])
                    is_only = after not in following and way is not None
                    following[after] = index if is_only else None
        reached = following
        steps.append(reached)
        if sum(map(len, steps)) > _MOST_STATES:
            return None
    positions = tuple(len(items) for items in lists)
    found: list[tuple[int, int]] = []
    for step in reversed(steps[1:]):
        way = step.get(positions)
        if way is None:
            return None
        positions = (*positions[:way], positions[way] - 1, *positions[way + 1 :])
        found.append((way, positions[way]))
    return found[::-1]


def _options(sources: Sequence[_Group], index: int) -> dict[str, Any]:
    """What a live group takes over from the saved groups that its parameters come from."""
    taken = {}
    for key in _TAKEN:
        values = [group[key] for group in sources if key in group]
        if any(bool(value != values[0]) for value in values[1:]):
            raise ValueError(
                f"ProxSGD: param_groups[{index}] would get parameters of the checkpoint's groups "
                f"with {key} {' and '.join(f'{float(v):g}' for v in values)}: must be one; {REMEDY}"
            )
        if values:
            taken[key] = values[0]
    return taken
