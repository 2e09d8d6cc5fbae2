"""The pull towards a start in pure PyTorch: soft-thresholding and shrinking a distance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def pull_towards(
    ops: SimpleNamespace,
    p: Any,
    start: Any,
    l1_threshold: float,
    l2_factor: float,
    frozen: Any,
    scratch: Tensor | None,
    distance: Tensor | None,
) -> None:
    """The proximal map of p's distance from its start, in place.

    Args:
        ops: operations on tensors, or on lists of tensors; so for the arguments below.
        p: what the gradient's and the momentum's part of the step has come to; changed.
        start: what the penalties pull towards.
        l1_threshold: 0 leaves soft-thresholding out.
        l2_factor: 1 leaves the ridge penalty's part out.
        frozen: where p becomes its start whatever the gradient says; None for nowhere.
        scratch: takes intermediate values, as does ``distance``.
        distance: see ``scratch``.
    """
    if l1_threshold != 0:
        u = ops.sub(p, start, out=distance)
        clamped = ops.clamp(u, -l1_threshold, l1_threshold, out=scratch)
        near = ops.equal_each(clamped, u)
        # An infinite p less an infinite start is a NaN, but p stays what it is.
        ops.clear_nan_(clamped)
        ops.sub_(p, clamped)
        ops.where_(near, start, p)
    if l2_factor != 1:
        there = ops.equal_each(p, start)
        moved = ops.add(start, ops.sub(p, start, out=distance), alpha=l2_factor, out=scratch)
        ops.where_(there, p, moved, out=p)
    if frozen is not None:
        ops.where_(frozen, start, p)


def where_(mask: Any, chosen: Any, other: Any, out: Any = None) -> None:
    """Writes ``chosen`` where the mask is true, and else ``other``; into that unless ``out``."""
    torch.where(mask, chosen, other, out=other if out is None else out)


def where_lists_(masks: Any, chosen: Any, others: Any, out: Any = None) -> None:
    """The same for lists."""
    for mask, one, other, to in zip(masks, chosen, others, out or others, strict=True):
        where_(mask, one, other, to)


def clear_nan_lists_(tensors: list[Tensor]) -> None:
    """Makes NaNs zeros, in a list of tensors."""
    for tensor in tensors:
        clear_nan_(tensor)


def clear_nan_(tensor: Tensor) -> None:
    """Makes NaNs zeros."""
    tensor.nan_to_num_(nan=0.0)
