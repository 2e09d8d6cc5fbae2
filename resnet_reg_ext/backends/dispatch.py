"""The choice of a backend for each parameter of a bucket, and the preparation of its step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from . import dtensor, native, pure
from .bucket import Bucket, Run, Skip, raise_versions
from .checks import check_operands
from .device_values import DeviceValues, is_capturing


def prepare(
    bucket: Bucket,
    options: Options,
    *,
    fused: bool | None,
    capturable: bool = True,
    values: DeviceValues | None = None,
) -> Run | Skip:
    """Checks all that a step needs and returns it; nothing can refuse it then.

    So an optimizer can check every bucket before it changes the first one.

    Args:
        bucket: parameters with their gradients and state; nothing is changed yet.
        options: the group's, checked.
        fused: None gives every parameter that the native kernels can take to them and the others
            to pure PyTorch; True raises where they can't; False gives all to pure PyTorch.
        capturable: whether a CUDA graph that is being captured may hold the step.
        values: options in a CUDA device's memory, which the kernel reads itself where all
            parameters go to it; else the host waits for them.

    Raises:
        ValueError: a tensor or a value can't be used; names it.
        RuntimeError: ``fused=True`` and a parameter can't go to the native kernels, or a graph is
            being captured that may not hold the step.
    """
    check_may_run(bucket, fused, capturable)
    shards = bucket
    if dtensor.has_dtensors(bucket.params):
        shards = dtensor.local_bucket(bucket)
    ready = resolve_negation(shards)
    if values:
        # A number from the host may not travel through device memory: a captured graph would read
        # the freed memory of the copy.
        on_host, values = values.split()
        known = read_values(on_host, options, bucket, "")
        if isinstance(known, Skip):
            return known
        options = known
    if may_be_native(fused):
        run = _prepare_native(ready, options, fused, values)
    else:
        why = "the step runs on the host or in pure PyTorch"
        known = read_values(values, options, ready, why)
        refuse_stray_dtensors(ready)
        run = known if isinstance(known, Skip) else pure.prepare(ready, known)
    if isinstance(run, Skip) or shards is bucket:
        return run
    if isinstance(run, native.NativeRun):
        run.written += bucket.written()
        return run
    return partial(run_on_shards, run, [bucket])


def check_may_run(bucket: Bucket, fused: bool | None, capturable: bool) -> None:
    """Refuses a bucket whatever its tensors are; arguments as for :func:`prepare`.

    Raises:
        RuntimeError: there is no native core for ``fused=True``, or a graph is being captured that
            may not hold the step.
    """
    if not capturable and is_capturing() and any(p.is_cuda for p in bucket.params):
        raise RuntimeError(
            f"{bucket.name(0)}: a CUDA graph is being captured, which would repeat the step with "
            "the options of now: capturable is False in its group"
        )
    if fused and not native.available():
        raise RuntimeError(
            f"{bucket.name(0)}: fused=True, but {native.missing}; fused=None takes pure PyTorch "
            "instead"
        )


def run_all(runs: Sequence[Run]) -> None:
    """Takes steps that were prepared, those on CUDA devices in as few launches as can be."""
    for run in native.joined(runs):
        run()


def may_be_native(fused: bool | None) -> bool:
    """Whether an option ``fused`` admits the native kernels, where there are any.

    Dispatch modes, such as those that make tensors fakes or record a graph, don't see what the
    kernels do: under one, None stands for pure PyTorch.
    """
    return native.available() and (fused or (fused is None and _dispatch_modes() == 0))


_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def resolve_negation(bucket: Bucket) -> Bucket:
    """Resolves lazily negated gradients.

    DLPack doesn't tell of lazy negation, and torch's copies to another dtype may forget it.
    Parameters and state are checked when they are added or loaded.
    """
    if any(map(Tensor.is_neg, bucket.grads)):
        return bucket.replace(grads=[g.resolve_neg() for g in bucket.grads])
    return bucket


def refuse_stray_dtensors(bucket: Bucket) -> None:
    """Refuses a gradient or state that is a DTensor where the parameter is an ordinary tensor."""
    if dtensor.has_dtensors(*bucket.lists()):
        dtensor.local_bucket(bucket)


def _prepare_native(
    bucket: Bucket, options: Options, fused: bool | None, values: DeviceValues | None
) -> Run | Skip:
    """A step that the native kernels take as far as they can."""
    reading = native.read(bucket)
    misfits = reading.misfits
    why = ""
    if misfits:
        why = misfits[0].reason
    elif values:
        if not all(param.is_cuda for param in bucket.params):
            why = "the step runs on the host or in pure PyTorch"
        elif bucket.first_step:
            why = "it is a parameter's first step: take one before the capture"
    if why:
        at = misfits[0].index if misfits else 0
        known = read_values(values, options, bucket, why, at)
        if isinstance(known, Skip):
            return known
        options, values = known, None
    if not misfits:
        return native.prepare(reading, bucket, options, values)
    return _prepare_split(bucket, options, fused, misfits)


def read_values(
    values: DeviceValues | None, options: Options, bucket: Bucket, why: str, at: int = 0
) -> Options | Skip:
    """The options with what is in a device's memory, for which the host waits; see DeviceValues."""
    if not values:
        return options
    return values.read_into(options, partial(bucket.name, at), why)


def _prepare_split(
    bucket: Bucket, options: Options, fused: bool | None, misfits: Sequence[Any]
) -> Run:
    """A step in which some parameters are laid out anew, and some go to pure PyTorch."""
    refuse_stray_dtensors(bucket)
    to_pure: list[int] = []
    to_lay_out: list[int] = []
    for misfit in misfits:
        check_operands(*bucket.operands(misfit.index), partial(bucket.name, misfit.index))
        if misfit.layout_only:
            to_lay_out.append(misfit.index)
        else:
            check_may_be_pure(bucket, fused, misfit)
            to_pure.append(misfit.index)
    taken = set(to_pure)
    to_native = [i for i in range(len(bucket.params)) if i not in taken]
    laid_out = lay_out(bucket, to_lay_out)
    runs: list[Run] = []
    if to_native:
        part = laid_out.pick(to_native)
        reading = native.read(part)
        if reading.misfits:  # whatever it is: nothing has changed yet
            misfit = reading.misfits[0]
            raise RuntimeError(f"{part.name(misfit.index)}: {misfit.reason}")
        runs.append(native.prepare(reading, part, options))
    if to_pure:
        runs.append(pure.prepare(bucket.pick(to_pure), options))

    @torch.no_grad()
    def run() -> None:
        for part in runs:
            part()
        copy_back(bucket, laid_out, to_lay_out)
        if bucket.num_zeros is not None:
            pure.count_zeros_into(bucket.num_zeros, bucket)

    return run


def check_may_be_pure(bucket: Bucket, fused: bool | None, misfit: Any) -> None:
    """Refuses to give a parameter to pure PyTorch where it may not go there; else may warn.

    Raises:
        RuntimeError: ``fused=True``.
        ValueError: it shares memory with another parameter.
    """
    device = bucket.params[misfit.index].device
    if misfit.shared:
        raise ValueError(
            f"{bucket.name(misfit.index)}: {misfit.reason}: give it its own by .clone()"
        )
    if fused:
        why = f" ({native.why_cuda_unusable(device.index or 0)})" if misfit.cuda_unusable else ""
        raise RuntimeError(
            f"{bucket.name(misfit.index)}: fused=True, but {misfit.reason}{why}; fused=None takes "
            "pure PyTorch for such tensors"
        )
    if misfit.cuda_unusable:
        native.warn_unusable_cuda(device)


def lay_out(bucket: Bucket, indices: Sequence[int]) -> Bucket:
    """Gives some parameters' gradients and state copies in the parameter's memory layout."""

    def changed(tensors: list[Tensor]) -> list[Tensor]:
        result = list(tensors)
        for i in indices:
            result[i] = _in_layout_of(bucket.params[i], tensors[i])
        return result

    return bucket.map(changed)


def copy_back(bucket: Bucket, laid_out: Bucket, indices: Sequence[int]) -> None:
    """Copies what a step has written from :func:`lay_out`'s copies."""
    for originals, copies in zip(bucket.written(), laid_out.written(), strict=True):
        for i in indices:
            if copies[i] is not originals[i]:
                originals[i].copy_(copies[i])


def _in_layout_of(param: Tensor, tensor: Tensor) -> Tensor:
    if tensor.stride() == param.stride():
        return tensor
    with torch.no_grad():
        return torch.empty_like(param, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def run_on_shards(run: Run, buckets: Sequence[Bucket]) -> None:
    """Runs a step of this process's shards and tells autograd that the DTensors have changed."""
    run()
    for bucket in buckets:
        raise_versions(bucket.written())
