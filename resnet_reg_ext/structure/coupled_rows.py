"""From a model's channels to the rows that the group lasso couples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Set
from typing import Any

from torch import nn

from .channel_sets import ChannelSet
from .channels import channels


def coupled_rows(
    model: nn.Module, example_inputs: Any, excluded: Set[str]
) -> tuple[dict[str, int], dict[str, float]]:
    """Which parameters' rows are coupled, by name: the set's number, and the weight of a row.

    The weight is the square root of the number of elements of a channel.

    Args:
        model: any module.
        example_inputs: what one forward pass takes.
        excluded: names of parameters whose sets are left out.

    Raises:
        ValueError: there are no example inputs, or no channels.

    Warns:
        UserWarning: a set is left out, as its channels aren't single rows.
    """
    if example_inputs is None:
        raise ValueError(
            "param_groups: example_inputs is None: must be what one forward pass takes, to find "
            "the channels that group_lasso is about"
        )
    # A parameter that several modules share is in the groups by its first name.
    first_names: dict[int, str] = {id(p): name for name, p in model.named_parameters()}
    named = {
        name: (first_names[id(p)], p) for name, p in model.named_parameters(remove_duplicate=False)
    }
    found = channels(model, example_inputs)
    rows: dict[str, int] = {}
    weights: dict[str, float] = {}
    odd = []
    number = 0
    for one in found:
        producers = dict(named[producer.tensor] for producer in one.producers)
        if excluded & {producer.tensor for producer in one.producers}:
            continue
        if not _in_single_rows(one, {name: p.shape[0] for name, p in producers.items()}):
            odd.append(one.name)
            continue
        size = sum(p.numel() // one.size for p in producers.values())
        rows |= dict.fromkeys(producers, number)
        number += 1
        weights |= dict.fromkeys(producers, math.sqrt(size))
    if odd:
        warnings.warn(
            f"param_groups: group_lasso leaves out the channels of {', '.join(odd)}: a channel "
            "there isn't one row of each parameter",
            stacklevel=3,
        )
    if not rows:
        reasons = "; ".join(str(one) for one in found.excluded)
        raise ValueError(
            "param_groups: group_lasso: the model has no channels whose rows can be penalised"
            + (f" ({reasons})" if reasons else "")
        )
    return rows, weights


def _in_single_rows(one: ChannelSet, first_dimensions: dict[str, int]) -> bool:
    """Whether channel i is row i of every producer, and these have no other rows."""
    single = tuple((i,) for i in range(one.size))
    return all(
        producer.dim == 0 and producer.indices == single for producer in one.producers
    ) and all(size == one.size for size in first_dimensions.values())
