"""The preparation of a step of coupled rows: which sets the native core takes, and which not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from . import dtensor, native, pure, pure_rows
from .bucket import Bucket, Run, Skip
from .checks import check_operands
from .device_values import DeviceValues
from .dispatch import (
    check_may_be_pure,
    check_may_run,
    copy_back,
    lay_out,
    may_be_native,
    read_values,
    refuse_stray_dtensors,
    resolve_negation,
    run_on_shards,
)
from .row_sets import Part, RowSet, check_alike, rows_contiguous, uniform

_Place = tuple[int, int]
"""A part, and a parameter's place in its bucket."""
_Reasons = Mapping[_Place, str]
"""Why members can't go to the native core."""


def prepare(parts: Sequence[Part], sets: Sequence[RowSet]) -> Run | Skip:
    """Checks all that a step of the sets needs and returns it; nothing can refuse it then.

    Args:
        parts: the sets' parameters, with their gradients and state.
        sets: what is coupled.

    Raises:
        ValueError: a tensor or a value can't be used, or the parameters of a set differ; names
            them.
        RuntimeError: ``fused=True`` and a set can't go to the native core, or a graph is being
            captured that may not hold the step.
    """
    divided = [part.bucket for part in parts if dtensor.has_dtensors(part.bucket.params)]
    local: list[Part] = []
    for part in parts:
        check_may_run(part.bucket, part.fused, part.capturable)
        bucket = part.bucket
        if dtensor.has_dtensors(bucket.params):
            bucket = dtensor.local_bucket(bucket)
        bucket = resolve_negation(bucket)
        refuse_stray_dtensors(bucket)
        if bucket is not part.bucket:
            part = dataclasses.replace(part, bucket=bucket)
        local.append(part)
    readings = [native.read(part.bucket) if may_be_native(part.fused) else None for part in local]
    unfit, to_lay_out = _misfits(local, sets, readings)
    why = _why_on_host(local, sets, unfit)
    for p, part in enumerate(local):
        if not part.values:
            continue
        now, later = (part.values, DeviceValues()) if why else part.values.split()
        options = read_values(now, part.options, part.bucket, why)
        if isinstance(options, Skip):
            return options
        local[p] = dataclasses.replace(part, options=options, values=later)
    if divided:
        sets = [_shard_of(one, parts) for one in sets]
    if not uniform(local):
        for one in sets:
            check_alike(one, local)
    if not all(map(Tensor.numel, chain.from_iterable(part.bucket.params for part in local))):
        sets = _without_empty(sets, local)
    run = _prepare_local(local, sets, readings, unfit, to_lay_out)
    return partial(run_on_shards, run, divided) if divided else run


def _without_empty(sets: Sequence[RowSet], parts: Sequence[Part]) -> list[RowSet]:
    """The sets without parameters that have no elements, such as an empty shard."""
    kept = []
    for one in sets:
        members = tuple((p, i) for p, i in one.members if parts[p].bucket.params[i].numel())
        if members:
            kept.append(dataclasses.replace(one, members=members))
    return kept


def _shard_of(one: RowSet, parts: Sequence[Part]) -> RowSet:
    """The set of this process's rows.

    Raises:
        ValueError: a parameter isn't divided by rows, or not as the set's others are.
    """
    params = [parts[p].bucket.params[i] for p, i in one.members]
    begin, rows = dtensor.local_rows(params, [parts[p].bucket.name(i) for p, i in one.members])
    weights = one.weights
    if isinstance(weights, Tensor):
        weights = weights[begin : begin + rows]
    return dataclasses.replace(one, rows=rows, weights=weights)


def _why_on_host(parts: Sequence[Part], sets: Sequence[RowSet], unfit: _Reasons) -> str:
    """Why the host must know what is in a device's memory; empty where the kernel reads it."""
    if not any(value is not None and value.is_cuda for part in parts for value in part.values):
        return ""
    for part in parts:
        if not all(param.is_cuda for param in part.bucket.params):
            return "the step runs on the host or in pure PyTorch"
    if unfit:
        return next(iter(unfit.values())) or "the step runs in pure PyTorch"
    if any(part.bucket.first_step for part in parts):
        return "it is a parameter's first step: take one before the capture"
    for one in sets:
        if len({id(parts[p].values.lr) for p, _ in one.members}) > 1:
            return "groups whose rows are coupled have other tensors for lr"
    return ""


def _prepare_local(
    parts: Sequence[Part],
    sets: Sequence[RowSet],
    readings: Sequence[Any],
    unfit: _Reasons,
    to_lay_out: Set[_Place],
) -> Run:
    """A step of ordinary tensors; the last two as from :func:`_misfits`."""
    to_native, to_pure = sets, []
    if unfit:
        to_native = [one for one in sets if not any(member in unfit for member in one.members)]
        to_pure = [one for one in sets if any(member in unfit for member in one.members)]
    runs: list[Run] = []
    if to_pure:
        for one in to_pure:
            _check_set_may_be_pure(one, parts, unfit)
        runs.append(pure_rows.prepare(parts, to_pure))
    if to_native:
        whole = not to_pure and not to_lay_out
        runs.append(_prepare_native(parts, to_native, to_lay_out, readings if whole else None))
        if whole:
            return runs[0]

    @torch.no_grad()
    def run() -> None:
        for one in runs:
            one()
        for part in parts:
            if part.bucket.num_zeros is not None:
                pure.count_zeros_into(part.bucket.num_zeros, part.bucket)

    return run


def _misfits(
    parts: Sequence[Part], sets: Sequence[RowSet], readings: Sequence[Any]
) -> tuple[dict[_Place, str], set[_Place]]:
    """Why members can't go to the native core, by (part, index), and those to be laid out for it.

    A reason is the core's, in words, or "" where the core isn't wanted.
    """
    unfit: dict[_Place, str] = {}
    to_lay_out: set[_Place] = set()
    for p, (part, reading) in enumerate(zip(parts, readings, strict=True)):
        bucket = part.bucket
        if reading is None:
            unfit |= {(p, i): "" for i in range(len(bucket.params))}
            continue
        for misfit in reading.misfits:
            check_operands(*bucket.operands(misfit.index), partial(bucket.name, misfit.index))
            if misfit.layout_only:
                to_lay_out.add((p, misfit.index))
            else:
                check_may_be_pure(bucket, part.fused, misfit)
                unfit[p, misfit.index] = misfit.reason
        for i, param in enumerate(bucket.params):
            if not rows_contiguous(param):
                unfit.setdefault((p, i), "its rows aren't contiguous in memory")
    for one in sets:
        p, i = one.members[0]
        on_cuda = readings[p] is not None and parts[p].bucket.params[i].is_cuda
        if on_cuda and (why := native.beyond_cuda_rows(one, parts)):
            unfit.setdefault((p, i), why)
    return unfit, to_lay_out


def _check_set_may_be_pure(one: RowSet, parts: Sequence[Part], unfit: _Reasons) -> None:
    fused = any(parts[p].fused for p, _ in one.members)
    for p, i in one.members:
        bucket = parts[p].bucket
        check_operands(*bucket.operands(i), partial(bucket.name, i))
        if fused and (p, i) in unfit:
            why = unfit[p, i] or "fused is False for it, and its rows are coupled"
            raise RuntimeError(
                f"{bucket.name(i)}: fused=True, but {why}; fused=None takes pure PyTorch for such "
                "tensors"
            )


def _prepare_native(
    parts: Sequence[Part],
    sets: Sequence[RowSet],
    to_lay_out: Set[_Place],
    readings: Sequence[Any] | None,
) -> Run:
    """A step of the native core on all of the parts, or on what the sets have of them."""
    if readings is not None:
        return native.prepare_rows(readings, parts, sets)
    taken: list[Part] = []
    places: dict[tuple[int, int], tuple[int, int]] = {}
    copies: list[tuple[Bucket, Bucket, list[int]]] = []
    for p, part in enumerate(parts):
        indices = sorted({i for one in sets for q, i in one.members if q == p})
        if not indices:
            continue
        bucket = part.bucket.pick(indices)
        places |= {(p, i): (len(taken), n) for n, i in enumerate(indices)}
        odd = [n for n, i in enumerate(indices) if (p, i) in to_lay_out]
        laid_out = lay_out(bucket, odd)
        copies.append((bucket, laid_out, odd))
        taken.append(dataclasses.replace(part, bucket=laid_out))
    fresh = [native.read(part.bucket) for part in taken]
    for part, reading in zip(taken, fresh, strict=True):
        if reading.misfits:  # whatever it is: nothing has changed yet
            misfit = reading.misfits[0]
            raise RuntimeError(f"{part.bucket.name(misfit.index)}: {misfit.reason}")
    moved = [
        dataclasses.replace(one, members=tuple(places[member] for member in one.members))
        for one in sets
    ]
    step = native.prepare_rows(fresh, taken, moved)

    def run() -> None:
        step()
        for bucket, laid_out, odd in copies:
            copy_back(bucket, laid_out, odd)

    return run
