"""The update of coupled rows in pure PyTorch: its readable definition, for every device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..options import Options
from .bucket import Run
from .checks import COMPUTE_DTYPE
from .pure import (
    CHUNK,
    SINGLE,
    Coefficients,
    Workspace,
    is_odd,
    plain,
    update_values,
)
from .row_sets import Part, RowSet

# A row's squares are added in segments of this many elements, and in a segment in lanes.
SEGMENT = 512
LANES = 16


def prepare(parts: Sequence[Part], sets: Sequence[RowSet]) -> Run:
    """The step of sets whose tensors were checked."""
    ready = [dataclasses.replace(part, bucket=plain(part.bucket)) for part in parts]
    if not any(is_odd(ready[p].bucket, i) for one in sets for p, i in one.members):
        return partial(_update_sets_, ready, sets)
    # Their operations may raise: they are updated in copies now, before anything has changed.
    updated = []
    with torch.no_grad():
        for part in ready:
            copied = part.bucket.map(lambda tensors: [t.clone() for t in tensors])
            updated.append(dataclasses.replace(part, bucket=copied))
    _update_sets_(updated, sets)

    @torch.no_grad()
    def run() -> None:
        for one in sets:
            for p, i in one.members:
                written = zip(ready[p].bucket.written(), updated[p].bucket.written(), strict=True)
                for originals, copies in written:
                    originals[i].copy_(copies[i])

    return run


@torch.no_grad()
def _update_sets_(parts: Sequence[Part], sets: Sequence[RowSet]) -> None:
    workspace = Workspace()
    for one in sets:
        params = [parts[p].bucket.params[i] for p, i in one.members]
        thresholds = one.thresholds(parts[one.members[0][0]].options).to(params[0].device)
        step = one.rows
        if params[0].is_cpu:  # in pieces that stay in the cache
            step = max(1, CHUNK * one.rows // sum(p.numel() for p in params))
        for begin in range(0, one.rows, step):
            _update_piece_(parts, one, begin, thresholds[begin : begin + step], workspace)


def _update_piece_(
    parts: Sequence[Part], one: RowSet, begin: int, thresholds: Tensor, workspace: Workspace
) -> None:
    """Updates some rows of a set: element by element, then each row by its group's factor."""
    count = len(thresholds)
    moved: list[tuple[Tensor, Tensor, Tensor | None, Options]] = []
    total = torch.zeros_like(thresholds)
    for n, (p, i) in enumerate(one.members):
        part = parts[p]
        param, grad, momentum_buffer, master = (
            None if t is None else t.detach().narrow(0, begin, count)
            for t in part.bucket.operands(i)
        )
        assert param is not None
        assert grad is not None
        weight = param if master is None else master
        dtype = COMPUTE_DTYPE[param.dtype]
        # Its own memory for each parameter: all are needed until the factors are known.
        u = workspace.widened(f"p{n}", weight, dtype)
        m = None if momentum_buffer is None else workspace.widened("m", momentum_buffer, dtype)
        update_values(
            SINGLE,
            u,
            workspace.widened("g", grad, dtype),
            m,
            Coefficients.of(part.options, dtype)._replace(l2_factor=1.0),
            part.bucket.first_step,
            workspace.like("scratch", u, dtype),
        )
        if momentum_buffer is not None and m is not None and m is not momentum_buffer:
            momentum_buffer.copy_(m)
        total += square_sums(_in_memory_order(u))
        moved.append((u, param, master, part.options))
    norms = _square_roots(total)
    dead = (norms <= thresholds) & (thresholds != 0)
    factors = torch.where(thresholds == 0, 1.0, 1 - thresholds / norms)
    for u, param, master, options in moved:
        of_rows = [count] + [1] * (u.dim() - 1)
        u.mul_(factors.to(u.dtype).view(of_rows))
        u.masked_fill_(dead.view(of_rows), 0)
        if options.l2_factor != 1:
            u.mul_(options.l2_factor)
        for target in (param, master):
            if target is not None and target is not u:
                target.copy_(u)


def _square_roots(values: Tensor) -> Tensor:
    """Square roots, rounded to nearest: on a CPU torch's own, which MKL computes, are not."""
    if not values.is_cpu:
        return values.sqrt()
    roots = [math.sqrt(value) for value in values.tolist()]
    return torch.tensor(roots, dtype=values.dtype, device=values.device)


def _in_memory_order(tensor: Tensor) -> Tensor:
    """The tensor as (rows, elements of a row in the order of their addresses)."""
    if tensor.is_contiguous():
        return tensor.view(tensor.shape[0], -1)
    inner = sorted(range(1, tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(0, *inner).reshape(tensor.shape[0], -1)


def square_sums(rows: Tensor) -> Tensor:
    """The sum of squares of each row of a matrix in float64, in the order of the contract.

    Element i of a segment goes to lane i mod 16; lanes are added by halving, then segments in
    order (docs/architecture.md).
    """
    count, width = rows.shape
    total = torch.zeros(count, dtype=torch.float64, device=rows.device)
    whole = width // SEGMENT
    if whole:
        sums = _segment_sums(rows[:, : whole * SEGMENT].reshape(count, whole, SEGMENT))
        for segment in sums.unbind(1):
            total += segment
    if width > whole * SEGMENT:
        total += _segment_sums(rows[:, whole * SEGMENT :].unsqueeze(1)).squeeze(1)
    return total


def _segment_sums(segments: Tensor) -> Tensor:
    """The sum of squares of each segment: from (rows, segments, elements) to (rows, segments)."""
    count, number, size = segments.shape
    if size == 1:
        return segments.squeeze(2).double().square()
    steps = -(-size // LANES)
    padded = segments
    if size % LANES:
        padded = torch.nn.functional.pad(segments, (0, steps * LANES - size))
    # Lanes lie side by side, and what goes to one lane after another: whole tensors are added.
    by_step = padded.view(count, number, steps, LANES).permute(2, 0, 1, 3)
    squares = torch.empty(by_step.shape, dtype=torch.float64, device=segments.device)
    squares.copy_(by_step).mul_(squares)
    lanes = squares[0]
    for step in range(1, steps):
        lanes += squares[step]
    while lanes.shape[2] > 1:
        half = lanes.shape[2] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes.squeeze(2)
