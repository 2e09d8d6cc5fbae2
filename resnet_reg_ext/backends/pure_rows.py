"""The update of coupled rows in pure PyTorch: its readable definition, for every device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .bucket import Run
from .checks import COMPUTE_DTYPE
from .pure import SINGLE, Coefficients, is_odd, plain, update_values
from .pure_start import pull_towards
from .row_sets import Part, RowSet
from .workspace import CHUNK, Workspace

# A row's squares are added in segments of this many elements, and in a segment in lanes.
SEGMENT = 512
LANES = 16
# Elements of a set that are updated before they are scaled, on a CPU: bounds the memory that 16-bit
# parameters take in float32.
_PIECE = 1 << 21


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
        if params[0].is_cpu:
            step = max(1, _PIECE * one.rows // sum(p.numel() for p in params))
        for begin in range(0, one.rows, step):
            _update_piece_(parts, one, begin, thresholds[begin : begin + step], workspace)


def _update_piece_(
    parts: Sequence[Part], one: RowSet, begin: int, thresholds: Tensor, workspace: Workspace
) -> None:
    """Updates some rows of a set: element by element, then each row by its group's factor."""
    count = len(thresholds)
    moved: list[tuple[Tensor, Tensor | None, Tensor, Tensor | None, float]] = []
    total = torch.zeros_like(thresholds)
    for n, (p, i) in enumerate(one.members):
        part = parts[p]
        operands = [
            None if t is None else t.detach().narrow(0, begin, count)
            for t in part.bucket.operands(i)
        ]
        param, _, _, master, start = operands
        assert param is not None
        # Its own memory for each parameter: all are needed until the factors are known.
        dtype = COMPUTE_DTYPE[param.dtype]
        u = workspace.widened(f"p{n}", param if master is None else master, dtype)
        origin = None if start is None else workspace.widened(f"start{n}", start, dtype)
        step = max(1, CHUNK * count // param.numel()) if param.is_cpu else count
        for at in range(0, count, step):
            rows = slice(at, at + step)
            grad, momentum_buffer = (None if t is None else t[rows] for t in operands[1:3])
            of_rows = None if origin is None else origin[rows]
            _update_chunk_(u[rows], grad, momentum_buffer, of_rows, part, workspace)
            distance = u[rows] if of_rows is None else u[rows] - of_rows
            total[rows] += square_sums(_in_memory_order_of(param, distance))
        moved.append((u, origin, param, master, part.options.l2_factor))
    norms = _square_roots(total)
    dead = (norms <= thresholds) & (thresholds != 0)
    factors = torch.where(thresholds == 0, 1.0, 1 - thresholds / norms)
    any_dead = not dead.is_cpu or bool(dead.any())  # which a GPU's host would wait for
    for u, origin, param, master, l2_factor in moved:
        per_row = [count] + [1] * (u.dim() - 1)
        of_each = factors.to(u.dtype).view(per_row)
        if origin is not None:
            _scale_towards_(u, origin, of_each, dead.view(per_row), l2_factor)
        else:
            u.mul_(of_each)
            if any_dead:
                u.masked_fill_(dead.view(per_row), 0)
            if l2_factor != 1:
                u.mul_(l2_factor)
        for target in (param, master):
            if target is not None and target is not u:
                target.copy_(u)


def _scale_towards_(
    u: Tensor, start: Tensor, factors: Tensor, dead: Tensor, l2_factor: float
) -> None:
    """Scales rows' distances from their start, by their factors and then the ridge penalty's.

    The factors' product and sum are rounded each: torch has no fma whose factor is a tensor.
    """
    scaled = (u - start).mul_(factors)
    scaled = torch.where(start == 0, scaled, start + scaled)
    torch.where(factors == 1, u, scaled, out=u)
    torch.where(dead, start, u, out=u)
    if l2_factor != 1:
        pull_towards(SINGLE, u, start, 0.0, l2_factor, None, None, None)


def _update_chunk_(
    u: Tensor,
    grad: Tensor | None,
    momentum_buffer: Tensor | None,
    start: Tensor | None,
    part: Part,
    workspace: Workspace,
) -> None:
    """Updates rows up to the soft threshold: ``u``, in the compute dtype, and the momentum."""
    dtype = u.dtype
    assert grad is not None
    m = None if momentum_buffer is None else workspace.widened("m", momentum_buffer, dtype)
    update_values(
        SINGLE,
        u,
        workspace.widened("g", grad, dtype),
        m,
        Coefficients.of(part.options, dtype)._replace(l2_factor=1.0),
        part.bucket.first_step,
        start,
        scratch=workspace.like("scratch", u, dtype),
        distance=None if start is None else workspace.like("distance", u, dtype),
    )
    if momentum_buffer is not None and m is not None and m is not momentum_buffer:
        momentum_buffer.copy_(m)


def _square_roots(values: Tensor) -> Tensor:
    """Square roots, rounded to nearest: on a CPU torch's own, which MKL computes, are not."""
    if not values.is_cpu:
        return values.sqrt()
    roots = [math.sqrt(value) for value in values.tolist()]
    return torch.tensor(roots, dtype=values.dtype, device=values.device)


def _in_memory_order_of(param: Tensor, values: Tensor) -> Tensor:
    """Values as (rows, elements of a row in the order that the parameter's have in memory)."""
    rows = values.shape[0]
    if param.is_contiguous():
        return values.reshape(rows, -1)
    inner = sorted(range(1, param.dim()), key=param.stride, reverse=True)
    return values.permute(0, *inner).reshape(rows, -1)


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
    wide = padded.double()
    squares = wide * wide if wide is padded else wide.mul_(wide)
    lanes, *others = squares.view(count, number, steps, LANES).unbind(2)
    for other in others:
        lanes += other
    while lanes.shape[2] > 1:
        half = lanes.shape[2] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes.squeeze(2)
