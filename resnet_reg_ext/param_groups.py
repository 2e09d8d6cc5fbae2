"""From a model to parameter groups: what is regularised and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def param_groups(
    model: nn.Module,
    *,
    l1: float = 1e-5,
    weight_decay: float = 1e-4,
    exclude: str | Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Splits a model's parameters into a regularised and an unregularised group.

    The parameters of normalisation layers (any module whose class name holds "norm"), biases, and
    what ``exclude`` names get ``l1=0`` and ``weight_decay=0``: shrinking them takes a layer's scale
    or offset away and saves nothing. All other parameters get ``l1`` and ``weight_decay``.

    A parameter that is used in several places is in one group, the unregularised one if any of its
    places is. Frozen parameters are included; an optimizer passes over them until they have a
    gradient.

    Args:
        model: any module.
        l1: coefficient for the regularised group.
        weight_decay: coefficient for the regularised group.
        exclude: a shell-style pattern of full parameter names, such as ``"fc.*"``, or several.

    Returns:
        One or two groups with (name, parameter) pairs, for :class:`resnet_reg_ext.ProxSGD`.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: the model has no parameters, or a pattern matches none of their names.

    Example:
        >>> optimizer = ProxSGD(param_groups(model, l1=1e-5, weight_decay=1e-4), lr=0.1)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups: model is a {type(model).__name__}: must be a module, whose layers tell "
            "which parameters to regularise"
        )
    exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    unmatched = set(exclude)
    names: dict[nn.Parameter, str] = {}
    unregularised: set[nn.Parameter] = set()
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, name)
        # What torch.nn.utils.parametrize computes "weight" from is "parametrizations.weight.…".
        path = name.split(".")
        end = path.index("parametrizations") if "parametrizations" in path[:-2] else len(path) - 1
        leaf = path[-1] if end == len(path) - 1 else path[end + 1]
        is_norm = "norm" in type(modules[".".join(path[:end])]).__name__.lower()
        matching = [pattern for pattern in exclude if fnmatchcase(name, pattern)]
        unmatched.difference_update(matching)
        if is_norm or "bias" in leaf.split("_") or matching:
            unregularised.add(parameter)
    if not names:
        raise ValueError("param_groups: the model has no parameters")
    if unmatched:
        raise ValueError(f"param_groups: exclude matches no parameter: {sorted(unmatched)}")
    groups = []
    for chosen, options in (
        (False, {"l1": l1, "weight_decay": weight_decay}),
        (True, {"l1": 0.0, "weight_decay": 0.0}),
    ):
        members = [(n, p) for p, n in names.items() if (p in unregularised) is chosen]
        if members:
            groups.append({"params": members, **options})
    return groups
