"""What loading a checkpoint checks and repairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import row_groups
from .backends import dtensor
from .backends.checks import check_state
from .options import HOW_TO_COMPUTE
from .state import (
    MASTER_WEIGHT,
    MOMENTUM_BUFFER,
    START,
    momentum_dtype_of,
    parameter_name,
    start_dtype_of,
)

_State = Mapping[Tensor, dict[str, Any]]


def check_momentum(saved: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a checkpoint of another kind of optimizer.

    Raises:
        ValueError: says what the checkpoint lacks.
    """
    for index, group in enumerate(saved):
        if "momentum" not in group:
            raise ValueError(
                f"ProxSGD: param_groups[{index}]: the checkpoint has no momentum: must be a "
                "ProxSGD's or a torch.optim.SGD's"
            )


def complete(
    new: Mapping[str, Any],
    live: Sequence[Mapping[str, Any]],
    defaults: Mapping[str, Any],
    checkpoint: Mapping[str, Any] | None,
) -> None:
    """Completes, checks and repairs what torch's loading has made of a checkpoint, or a pickle.

    Args:
        new: ``param_groups`` and ``state``; changed.
        live: the groups that they replace; none for a pickle.
        defaults: the optimizer's.
        checkpoint: what is loaded; None for a pickle.

    Raises:
        ValueError: an option is out of its range, or state isn't its parameter's.
    """
    for index, group in enumerate(new["param_groups"]):
        _complete_options(group, defaults, live[index] if index < len(live) else None)
        row_groups.check_group(group, f"ProxSGD: param_groups[{index}]: ", len(group["params"]))
        _check_state_of(group, index, new["state"])
        if checkpoint is not None:
            saved_ids = checkpoint["param_groups"][index]["params"]
            _restore_dtypes(group, new["state"], saved_ids, checkpoint["state"])


def _complete_options(
    group: dict[str, Any], defaults: Mapping[str, Any], live: Mapping[str, Any] | None
) -> None:
    """Gives a loaded group the options that it lacks, and the live group's way to compute.

    Args:
        group: of a checkpoint or a pickle; changed.
        defaults: the optimizer's.
        live: the group that it replaces; None for a pickle.
    """
    kept = defaults if live is None else live
    for key, value in defaults.items():
        group.setdefault(key, kept.get(key, value))
    for key in ("rows", "row_weights"):  # a checkpoint without groups doesn't say what is coupled
        if group.get(key) is None:
            group[key] = kept.get(key)
    if live is not None:
        group |= {key: live[key] for key in HOW_TO_COMPUTE}
        if "param_names" in live:
            group.setdefault("param_names", live["param_names"])


def _check_state_of(group: Mapping[str, Any], index: int, state: _State) -> None:
    """Refuses loaded state that isn't its parameter's.

    Raises:
        ValueError: names the parameter, the state's key and what is wrong with it.
    """
    for i, param in enumerate(group["params"]):
        for key, value in state.get(param, {}).items():
            if key in (MOMENTUM_BUFFER, MASTER_WEIGHT, START) and value is not None:
                check_state(param, value, key, partial(parameter_name, group, index, i))
                dtensor.check_alike(param, value, key, parameter_name(group, index, i))


def _restore_dtypes(
    group: Mapping[str, Any],
    state: _State,
    saved_ids: Sequence[Any],
    saved: Mapping[Any, dict[str, Any]],
) -> None:
    """Gives loaded state the dtypes that its group's options say.

    torch's loading has cast it to the parameter's dtype; where another one is wanted, it is taken
    from the checkpoint.

    Args:
        group: a parameter group.
        state: the state as torch's loading left it; changed.
        saved_ids: the group's ``params`` in the checkpoint.
        saved: the checkpoint's ``state``.
    """
    for param, saved_id in zip(group["params"], saved_ids, strict=True):
        of_param = state.get(param)
        if not of_param:
            continue
        original = saved[saved_id]
        if MASTER_WEIGHT in of_param and not (
            group["master_weights"] and original[MASTER_WEIGHT].dtype is torch.float32
        ):
            # In another dtype it has passed through another optimizer, which has trained the
            # parameter and left this as it was: the next step makes a new one.
            del of_param[MASTER_WEIGHT]
        dtypes = {
            MOMENTUM_BUFFER: momentum_dtype_of(group, param),
            MASTER_WEIGHT: torch.float32,
            START: start_dtype_of(group, param),
        }
        for key, dtype in dtypes.items():
            if of_param.get(key) is not None and of_param[key].dtype is not dtype:
                of_param[key] = original[key].to(param.device, dtype, copy=True)
