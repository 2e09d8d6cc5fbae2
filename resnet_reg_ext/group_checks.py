"""Checks of what an optimizer is given: keywords and the parameters of its groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .backends.checks import check_no_shared_memory
from .state import parameter_name, parameter_place

_REMEDIES = {
    "foreach": "the native step is one pass over all tensors; see fused",
    "differentiable": "the step isn't differentiable; torch.optim.SGD(differentiable=True) is",
    "betas": "there is one momentum",
    "eps": "nothing is divided by a gradient's magnitude",
}


def refuse_unknown(keywords: Mapping[str, Any]) -> None:
    """Refuses keywords that aren't options of ProxSGD.

    Raises:
        TypeError: names the keyword and, for one of torch's own options, what to use.
    """
    for key in keywords:
        remedy = f": {_REMEDIES[key]}" if key in _REMEDIES else ""
        raise TypeError(f"ProxSGD() got an unexpected keyword argument {key!r}{remedy}")


def check_params(group: Mapping[str, Any], index: int) -> None:
    """Refuses parameters of a group that a step can't be right for.

    Raises:
        ValueError: a parameter is lazily negated or listed twice.
    """
    places: dict[int, int] = {}
    for i, param in enumerate(group["params"]):
        if not torch.nn.parameter.is_lazy(param) and param.is_neg():
            raise ValueError(
                f"{parameter_name(group, index, i)}: is a lazily negated view: call resolve_neg() "
                "on it"
            )
        first = places.setdefault(id(param), i)
        if first != i:
            raise ValueError(
                f"{parameter_name(group, index, i)}: is the same parameter as "
                f"{parameter_place(group, index, first)}: list it once"
            )


def check_memory(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuses parameters that share memory, in whichever groups they are.

    Raises:
        ValueError: names both parameters.
    """
    check_no_shared_memory(
        (param, partial(parameter_name, group, g, i))
        for g, group in enumerate(groups)
        for i, param in enumerate(group["params"])
    )


def with_names_apart(group: dict[str, Any]) -> dict[str, Any]:
    """Takes (name, tensor) pairs apart for a torch whose Optimizer can't: before 2.6."""
    params = group["params"]
    if _OPTIMIZER_KNOWS_NAMES or isinstance(params, Tensor):
        return group
    params = list(params)
    if params and isinstance(params[0], tuple):
        names, tensors = zip(*params, strict=True)
        return {**group, "params": list(tensors), "param_names": list(names)}
    return {**group, "params": params}


_OPTIMIZER_KNOWS_NAMES = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 6)
