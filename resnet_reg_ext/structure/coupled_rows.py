"""From a model's channels to the rows that the group lasso couples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from ..row_groups import default_weight
from .channel_sets import ChannelIndex, Channels
from .compact import checked_sets


def coupled_rows(
    model: nn.Module,
    example_inputs: Any,
    excluded: Set[str] = frozenset(),
    *,
    sets: Channels | None = None,
    importance: Mapping[str, Tensor] | None = None,
    min_keep: float = 0.0,
    groups: str = "channels",
) -> tuple[dict[str, int], dict[str, float | Tensor]]:
    """Which parameters' rows are coupled, by name: the set's number, and the weights of its rows.

    They are those of all producers of a set, or with ``groups="norms"`` those of its closing
    norms. A weight is the square root of the number of elements of a group; with ``importance`` or
    ``min_keep``, see :func:`row_weights`.

    Args:
        model: any module.
        example_inputs: what one forward pass takes; not used where ``sets`` are given.
        excluded: names of parameters whose sets are left out.
        sets: what ``channels`` returned for this model.
        importance: scores of the channels by the set's name.
        min_keep: the fraction of each set's channels that gets the weight 0.
        groups: ``"channels"`` or ``"norms"``.

    Raises:
        ValueError: there are no example inputs, or no such channels; or as :func:`row_weights`
            has it.

    Warns:
        UserWarning: a set is left out, as its channels aren't single rows, or have no closing
            norms.
    """
    if example_inputs is None and sets is None:
        raise ValueError(
            "param_groups: example_inputs is None: must be what one forward pass takes, to find "
            "the channels that group_lasso is about"
        )
    # A parameter that several modules share is in the groups by its first name.
    first_names: dict[int, str] = {id(p): name for name, p in model.named_parameters()}
    named = {
        name: (first_names[id(p)], p) for name, p in model.named_parameters(remove_duplicate=False)
    }
    found = checked_sets(model, example_inputs, sets, "param_groups")
    coupled: dict[str, Mapping[str, Tensor]] = {}
    odd, open_ = [], []
    for one in found:
        if excluded & {producer.tensor for producer in one.producers}:
            continue
        members = one.closing_norms if groups == "norms" else one.producers
        params = dict(named[index.tensor] for index in members)
        if not members:
            open_.append(one.name)
        elif not _in_single_rows(one.size, members, {n: len(p) for n, p in params.items()}):
            odd.append(one.name)
        else:
            coupled[one.name] = params
    reasons = {
        "a channel there isn't one row of each parameter": odd,
        "groups='norms' needs a norm in every path from their layers": open_,
    }
    for reason, names in reasons.items():
        if names:
            warnings.warn(
                f"param_groups: group_lasso leaves out the channels of {', '.join(names)}: "
                f"{reason}",
                stacklevel=3,
            )
    if not coupled:
        why = [f"{name}: {reason}" for reason, names in reasons.items() for name in names]
        why += map(str, found.excluded)
        raise ValueError(
            "param_groups: group_lasso: the model has no channels whose rows can be penalised"
            + (f" ({'; '.join(why)})" if why else "")
        )
    weights = row_weights(coupled, importance, min_keep)
    return (
        {name: number for number, of_set in enumerate(coupled.values()) for name in of_set},
        {name: weights[one] for one, of_set in coupled.items() for name in of_set},
    )


@torch.no_grad()
def row_weights(
    coupled: Mapping[str, Mapping[str, Tensor]],
    importance: Mapping[str, Tensor] | None,
    min_keep: float,
) -> dict[str, float | Tensor]:
    r"""The weights a_g of each set's rows.

    With scores s_g, and n_g elements of a channel,

    .. math:: a_g = c \, \lVert w_g \rVert / s_g, \qquad
              \sum_g a_g \lVert w_g \rVert = \sum_g \sqrt{n_g} \lVert w_g \rVert

    so that ‖w_g‖/a_g, by which a strength chooses the channels that go, is in proportion to s_g as
    long as the norms are those of now, and the penalty is as large as that of the weights √n_g.
    Scores below a thousandth of their median count as that.

    Source: the adaptive lasso; Zou, *The adaptive lasso and its oracle properties*, 2006; Wang and
    Leng, *A note on adaptive group lasso*, 2008.

    Args:
        coupled: by the set's name its parameters by name, all with as many rows.
        importance: s_g, (rows,) by the set's name; None: a_g = √n_g.
        min_keep: the fraction of each set's rows, rounded up, whose a_g is 0: those of the highest
            scores, or without scores of the largest norms.

    Returns:
        By the set's name a number, or (rows,) in float64 on the CPU.

    Raises:
        ValueError: ``min_keep`` is out of its range, or scores are missing, of another shape,
            negative, not finite, or all zero.
    """
    if isinstance(min_keep, (bool, str)) or not 0 <= min_keep < 1:
        raise ValueError(f"param_groups: min_keep is {min_keep!r}: must be a share in [0, 1)")
    plain = {one: default_weight(list(of_set.values())) for one, of_set in coupled.items()}
    if importance is None and min_keep == 0:
        return dict(plain)
    norms = {one: _norms(list(of_set.values())) for one, of_set in coupled.items()}
    weights = {one: torch.full_like(norms[one], plain[one]) for one in coupled}
    ranked = norms
    if importance is not None:
        ranked = {one: _checked_scores(one, importance, norms[one]) for one in coupled}
        weights = _adaptive(norms, ranked, plain)
    for one, of_set in weights.items():
        keep = math.ceil(min_keep * len(of_set))
        of_set[torch.argsort(ranked[one], descending=True, stable=True)[:keep]] = 0.0
    return dict(weights)


def _adaptive(
    norms: Mapping[str, Tensor], scores: Mapping[str, Tensor], plain: Mapping[str, float]
) -> dict[str, Tensor]:
    every = torch.cat(list(scores.values()))
    if not bool((every > 0).any()):
        raise ValueError("param_groups: importance is 0 of all channels: must tell them apart")
    least = 1e-3 * float(every[every > 0].median())
    weights = {one: norms[one] / scores[one].clamp(min=least) for one in norms}
    wanted = sum(float(plain[one] * of_set.sum()) for one, of_set in norms.items())
    scale = wanted / sum(float((weights[one] * norms[one]).sum()) for one in norms)
    # A channel that is zero gets the weight that holds it there.
    return {
        one: torch.where(norms[one] > 0, scale * of_set, plain[one])
        for one, of_set in weights.items()
    }


def _norms(params: Sequence[Tensor]) -> Tensor:
    """‖w_g‖ of each channel: (rows,), float64, on the CPU."""
    rows = [p.detach().double().reshape(len(p), -1).square().sum(1).cpu() for p in params]
    return torch.stack(rows).sum(0).sqrt()


def _checked_scores(one: str, importance: Mapping[str, Tensor], norms: Tensor) -> Tensor:
    scores = importance.get(one)
    if not isinstance(scores, Tensor) or scores.shape != norms.shape:
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"param_groups: importance of set {one} is {shape}: must be a tensor of shape "
            f"({len(norms)},)"
        )
    if not bool((torch.isfinite(scores) & (scores >= 0)).all()):
        raise ValueError(
            f"param_groups: importance of set {one} has values that are negative or not finite"
        )
    return scores.detach().double().cpu()


def _in_single_rows(
    size: int, members: Sequence[ChannelIndex], first_dimensions: Mapping[str, int]
) -> bool:
    """Whether channel i is row i of every member, and these have no other rows."""
    single = tuple((i,) for i in range(size))
    return all(index.dim == 0 and index.indices == single for index in members) and all(
        rows == size for rows in first_dimensions.values()
    )
