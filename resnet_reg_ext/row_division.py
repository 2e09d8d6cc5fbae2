"""The division of a step into what is taken element by element and the sets of coupled rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .backends.bucket import Bucket
from .backends.device_values import DeviceValues
from .backends.row_sets import Part, RowSet
from .options import Options, group_lasso_of
from .row_groups import Place, check_lists, check_used, members_of, rows_and_weights, weights_of
from .state import parameter_name, parameter_place

_Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class CoupledSet:
    """A set as the groups describe it."""

    members: list[tuple[Place, Tensor]]
    in_groups: list[int]
    """The groups that its parameters are in, each once."""
    constant: bool
    """Whether its weights are numbers, which nobody changes in place, or the default."""
    coefficient: float = 0.0
    weights: float | Tensor | None = None


class SetReader:
    """Reads sets from the groups; does so anew only where what the groups say has changed.

    Nearly every step has the sets of the one before, and a ResNet-50 has 161 parameters to look at.
    """

    def __init__(self) -> None:
        self._said: list[list[Any]] = []
        self._sets: list[CoupledSet] = []
        self._strengths: tuple[list[float], list[bool]] | None = None
        self._active: list[CoupledSet] = []
        self.coupled: set[int] = set()
        """The identities of the parameters of the sets that were read."""
        self._params: list[Tensor] = []
        self._places: dict[int, Place] = {}
        self._shapes: list[torch.Size] = []
        self._row_sets: list[RowSet] | None = None

    def read(self, groups: _Groups, frozen: Sequence[bool]) -> bool:
        """Reads the sets that a step shrinks, in the order of their first parameters.

        Args:
            groups: the optimizer's.
            frozen: for each group whether its zeros are frozen, which stops all shrinkage.

        Returns:
            Whether there are any.

        Raises:
            ValueError: an option is wrong, or the parameters of a set have different ones.
        """
        coefficients = [
            group_lasso_of(group, f"ProxSGD: param_groups[{g}]: ") for g, group in enumerate(groups)
        ]
        if not any(coefficients):
            return False
        self._find(groups)
        strengths = (coefficients, list(frozen))
        if strengths != self._strengths or not all(one.constant for one in self._active):
            self._strengths = self._row_sets = None
            found = [_active(one, groups, *strengths) for one in self._sets]
            self._active = [one for one in found if one is not None]
            self._params = [param for one in self._active for _, param in one.members]
            self.coupled = set(map(id, self._params))
            self._strengths = strengths
        return bool(self._active)

    def _find(self, groups: _Groups) -> None:
        said = [_said(group) for group in groups]
        if len(said) == len(self._said) and all(map(_identical, said, self._said)):
            return
        self._said, self._strengths = [], None
        check_used(groups)
        for g, group in enumerate(groups):
            check_lists(group, f"ProxSGD: param_groups[{g}]: ", len(group["params"]))
        self._sets = [_set_of(members, groups) for members in members_of(groups).values()]
        self._said = said

    def row_sets(self, groups: _Groups, places: dict[int, Place]) -> list[RowSet]:
        """The sets of :meth:`read` whose parameters have gradients, for a backend.

        Args:
            groups: the optimizer's.
            places: by the identity of a parameter its part and its index there.

        Raises:
            ValueError: a set has gradients on some of its parameters only.
        """
        # Of those alone: parameters that aren't initialised yet have no shape.
        shapes = [param.shape for param in self._params if id(param) in places]
        if self._row_sets is None or places != self._places or shapes != self._shapes:
            made = [_row_set(one, places, groups) for one in self._active]
            self._row_sets = [one for one in made if one is not None]
            self._places, self._shapes = places, shapes
        return self._row_sets


def _active(
    one: CoupledSet, groups: _Groups, coefficients: Sequence[float], frozen: Sequence[bool]
) -> CoupledSet | None:
    """A set with its coefficient and its weights; None where a step doesn't shrink it."""
    for what, values in (("group_lasso", coefficients), ("frozen_zeros", frozen)):
        if len({values[g] for g in one.in_groups}) > 1:
            raise _differs(groups, [place for place, _ in one.members], what, values)
    first = one.in_groups[0]
    if coefficients[first] == 0 or frozen[first]:
        return None
    weights = weights_of(groups, one.members)
    return replace(one, coefficient=coefficients[first], weights=weights)


def _said(group: Mapping[str, Any]) -> list[Any]:
    """All objects that say which sets a group has."""
    said: list[Any] = []
    for values in (group["params"], group.get("rows"), group.get("row_weights")):
        said.append(type(values))
        said += values if isinstance(values, (list, tuple)) else [values]
    return said


def _identical(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _set_of(members: list[tuple[Place, Tensor]], groups: _Groups) -> CoupledSet:
    given = [(groups[g].get("row_weights"), i) for (g, i), _ in members]
    constant = all(w is None or isinstance(w[i], (float, int, type(None))) for w, i in given)
    in_groups = list(dict.fromkeys(g for (g, _), _ in members))
    return CoupledSet(members, in_groups, constant)


def _differs(
    groups: _Groups, places: Sequence[Place], what: str, values: Sequence[Any]
) -> ValueError:
    h = places[0][0]
    g, i = next(place for place in places if values[place[0]] != values[h])
    return ValueError(
        f"{parameter_name(groups[g], g, i)}: its group's {what} is {values[g]}, and that of "
        f"{parameter_place(groups[h], *places[0])} is {values[h]}: must be equal, as their rows "
        "are coupled"
    )


def divide(
    reader: SetReader,
    groups: _Groups,
    read_options: Sequence[tuple[Options, DeviceValues]],
    collected: Sequence[tuple[Bucket, int]],
) -> tuple[list[tuple[Bucket, int]], list[Part], list[RowSet]]:
    """Divides buckets into what is stepped element by element and what belongs to sets.

    Args:
        reader: has read the sets.
        groups: the optimizer's.
        read_options: each group's options.
        collected: buckets and the indices of their groups.

    Returns:
        The elementwise buckets with their groups, the parts, and the sets whose parameters have
        gradients.

    Raises:
        ValueError: a set has gradients on some of its parameters only.
    """
    elementwise: list[tuple[Bucket, int]] = []
    parts: list[Part] = []
    places: dict[int, Place] = {}
    for bucket, g in collected:
        inside = [i for i, param in enumerate(bucket.params) if id(param) in reader.coupled]
        if not inside:
            elementwise.append((bucket, g))
            continue
        if len(inside) < len(bucket.params):
            chosen = set(inside)
            rest = [i for i in range(len(bucket.params)) if i not in chosen]
            elementwise.append((_pick(bucket, rest), g))
            bucket = _pick(bucket, inside)
        places |= {id(param): (len(parts), i) for i, param in enumerate(bucket.params)}
        group, (options, values) = groups[g], read_options[g]
        parts.append(Part(bucket, options, group["fused"], group["capturable"], values))
    return elementwise, parts, reader.row_sets(groups, places)


def _pick(bucket: Bucket, indices: Sequence[int]) -> Bucket:
    """Some of a bucket's parameters, with counters of their own where it has any."""
    part = bucket.pick(indices)
    if bucket.num_zeros is not None:
        part.num_zeros = torch.zeros(
            len(indices), dtype=torch.int64, device=bucket.num_zeros.device
        )
    return part


def _row_set(one: CoupledSet, places: Mapping[int, Place], groups: _Groups) -> RowSet | None:
    """A set whose parameters have gradients; None where none of them has."""
    members = [places[id(param)] for _, param in one.members if id(param) in places]
    if not members:
        return None
    if len(members) < len(one.members):
        with_grad = next(place for place, param in one.members if id(param) in places)
        g, i = next(place for place, param in one.members if id(param) not in places)
        other = parameter_place(groups[with_grad[0]], *with_grad)
        raise ValueError(
            f"{parameter_name(groups[g], g, i)}: has no gradient, but {other} has one: must "
            "have both or neither, as their rows are coupled"
        )
    rows, weights = rows_and_weights(groups, one.members, one.weights)
    return RowSet(tuple(members), rows, one.coefficient, weights)
