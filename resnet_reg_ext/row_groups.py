"""What param groups say of the group lasso: coefficient, sets of coupled rows, and weights.

A group's ``rows`` has an integer or None for each of its ``params``. Parameters with the same
integer, in whichever groups they are, are a set: row i of all of them together is one group of the
group lasso. ``row_weights`` has for each of the ``params`` None, a number, or one for each row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .options import Options, finite_and_not_negative, group_lasso_of
from .sparsity import has_l1
from .state import parameter_name, parameter_place

Place = tuple[int, int]
"""Index of a group, and of a parameter in it."""


def check_group(group: Mapping[str, Any], where: str, count: int | None = None) -> None:
    """Refuses a group with an option that is out of its range.

    Args:
        group: a parameter group.
        where: what an error begins with.
        count: the number of its parameters; None where it isn't known yet.

    Raises:
        ValueError: names the option and its value.
    """
    Options.from_group(group, where)
    check_lists(group, where, count)
    for i, value in enumerate(group.get("row_weights") or ()):
        _weights(value, f"{where}row_weights[{i}]")


def check_lists(group: Mapping[str, Any], where: str, count: int | None) -> None:
    """Refuses options of the group lasso, but for the numbers in ``row_weights``."""
    group_lasso_of(group, where)
    for key in ("rows", "row_weights"):
        values = group.get(key)
        if values is None:
            continue
        if not isinstance(values, (list, tuple)):
            raise ValueError(
                f"{where}{key} is a {type(values).__name__}: must be a list with an entry for each "
                "of the params"
            )
        if count is not None and len(values) != count:
            raise ValueError(
                f"{where}{key} has {len(values)} entries: must have {count}, one for each of the "
                "params"
            )
        for i, value in enumerate(values):
            if key == "rows" and value is not None and type(value) is not int:
                raise ValueError(f"{where}rows[{i}] is {value!r}: must be an int or None")


def check_used(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a ``group_lasso`` that would apply to nothing.

    Raises:
        ValueError: no group has a set.
    """
    for index, group in enumerate(groups):
        if group_lasso_of(group) > 0 and not any(has_rows(other) for other in groups):
            raise ValueError(
                f"ProxSGD: param_groups[{index}]: group_lasso is {group['group_lasso']}, but no "
                "group has rows, which say what is coupled: see param_groups(model, group_lasso=)"
            )


def has_rows(group: Mapping[str, Any]) -> bool:
    """Whether a parameter of a group belongs to a set."""
    rows = group.get("rows")
    return rows is not None and any(number is not None for number in rows)


def shrinks(group: Mapping[str, Any]) -> bool:
    """Whether a group has a penalty that makes zeros."""
    return has_l1(group) or has_group_lasso(group)


def has_group_lasso(group: Mapping[str, Any]) -> bool:
    """Whether a group's sets are penalised, or were before a schedule took group_lasso to 0."""
    coefficient = group_lasso_of(group) > 0 or group.get("initial_group_lasso", 0.0) > 0
    return coefficient and has_rows(group)


def members_of(groups: Sequence[Mapping[str, Any]]) -> dict[int, list[tuple[Place, Tensor]]]:
    """The parameters of each set, by its number, and their places."""
    members: dict[int, list[tuple[Place, Tensor]]] = {}
    for g, group in enumerate(groups):
        for i, (number, param) in enumerate(
            zip(group.get("rows") or (), group["params"], strict=False)
        ):
            if number is not None:
                members.setdefault(number, []).append(((g, i), param))
    return members


def default_weight(params: Sequence[Tensor]) -> float:
    """The weight of a row of a set that is given none: the square root of its elements."""
    rows = params[0].shape[0]
    return math.sqrt(sum(p.numel() // rows for p in params)) if rows else 0.0


def rows_and_weights(
    groups: Sequence[Mapping[str, Any]],
    members: Sequence[tuple[Place, Tensor]],
    weights: float | Tensor | None,
) -> tuple[int, float | Tensor]:
    """How many rows a set has, and their weights, by default √elements.

    Args:
        groups: the optimizer's.
        members: of the set.
        weights: what :func:`weights_of` gives for it.

    Raises:
        ValueError: its parameters have different first dimensions, or the weights another length.
    """
    (first_g, first_i), first = members[0]
    for (g, i), param in members:
        if param.dim() == 0:
            raise ValueError(
                f"{parameter_name(groups[g], g, i)}: has no dimensions: must have rows to be "
                "coupled"
            )
        if param.shape[0] != first.shape[0]:
            other = parameter_place(groups[first_g], first_g, first_i)
            raise ValueError(
                f"{parameter_name(groups[g], g, i)}: its first dimension is {param.shape[0]}, and "
                f"that of {other} is {first.shape[0]}: must be equal, as their rows are coupled"
            )
    rows = first.shape[0]
    if isinstance(weights, Tensor) and len(weights) != rows:
        raise ValueError(
            f"{parameter_name(groups[first_g], first_g, first_i)}: its row_weights has "
            f"{len(weights)} numbers: must have {rows}, one for each row"
        )
    return rows, default_weight([p for _, p in members]) if weights is None else weights


def weights_of(
    groups: Sequence[Mapping[str, Any]], members: Sequence[tuple[Place, Tensor]]
) -> float | Tensor | None:
    """The weights of a set: what any of its parameters says, which must be the same."""
    given: list[tuple[Place, Any]] = []
    for (g, i), _ in members:
        values = groups[g].get("row_weights")
        value = None if values is None else values[i]
        if value is not None:
            if type(value) is not float or not 0 <= value < math.inf:
                value = _weights(value, f"ProxSGD: param_groups[{g}]: row_weights[{i}]")
            given.append(((g, i), value))
    for place, weights in given[1:]:
        if not _equal(weights, given[0][1]):
            in_words = f"{parameter_name(groups[place[0]], *place)}: its row_weights"
            other = parameter_place(groups[given[0][0][0]], *given[0][0])
            raise ValueError(
                f"{in_words} differ from those of {other}: must be equal, or None, as their rows "
                "are coupled"
            )
    return given[0][1] if given else None


def _equal(a: float | Tensor, b: float | Tensor) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _weights(value: Any, name: str) -> float | Tensor | None:
    """An entry of ``row_weights``, checked: None, a number, or float64 on the CPU."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple, Tensor)):
        return finite_and_not_negative(value, name)
    try:
        weights = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {value!r}: must be numbers, one for each row") from None
    if weights.dim() != 1 or not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(
            f"{name} is {value!r}: must be finite numbers, not negative, one for each row"
        )
    return weights.detach()
