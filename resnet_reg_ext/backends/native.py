"""The native backend: the only module that touches the compiled core, ``resnet_reg_ext._C``.

The core knows no torch. It reads tensors through DLPack's C exchange API, which torch has from 2.11
on; for an older torch this module describes each tensor to it in Python, which is slower and
otherwise the same.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..options import Options
from . import openmp
from .bucket import Bucket, Run, raise_versions
from .device_values import NUMBER_DTYPES, DeviceValues
from .row_sets import Part, RowSet, weights_beside

_C: Any = None
missing = ""
"""Why the native module is not there; empty where it is."""
_openmp_runtime = openmp.load()
try:
    _C = importlib.import_module("._C", "resnet_reg_ext")
except ImportError as error:
    missing = f"the native module can't be used ({error})"
    if not _openmp_runtime:
        missing += "; neither torch nor the system has a libgomp"

SIMD_VARIABLE = "RESNET_REG_EXT_SIMD"

_DLPACK_DEVICE = {"cpu": 1, "cuda": 2}
_DLPACK_OTHER_DEVICE = 12  # kDLExtDev
_DLPACK_DTYPE = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
}
_DLPACK_OTHER_DTYPE = (0, 8)
# The core's own numbers (csrc/storage.h).
_DTYPE = {dtype: number for number, dtype in enumerate(NUMBER_DTYPES)}


def _describe(tensor: Tensor) -> tuple[Any, ...]:
    """What the exchange API would tell: address, device, dtype, shape and strides."""
    if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
        raise TypeError("not a plain strided tensor")
    device = tensor.device
    code, bits = _DLPACK_DTYPE.get(tensor.dtype, _DLPACK_OTHER_DTYPE)
    return (
        tensor.data_ptr(),
        _DLPACK_DEVICE.get(device.type, _DLPACK_OTHER_DEVICE),
        device.index or 0,
        code,
        bits,
        tuple(tensor.shape),
        tensor.stride(),
    )


def _current_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def use_exchange_api(enable: bool = True) -> None:
    """Reads tensors through DLPack's C exchange API if torch has it and ``enable`` is true."""
    global _reader
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None) if enable else None
    others = (_describe, _current_stream, Tensor, torch.nn.Parameter)
    try:
        _reader = _C.TensorReader(api, *others)
    except ValueError:  # another library has put something else under that name
        _reader = _C.TensorReader(None, *others)


_reader: Any = None
if _C is not None:
    use_exchange_api()
    if SIMD_VARIABLE in os.environ:
        try:
            _C.set_simd_level(os.environ[SIMD_VARIABLE])
        except ValueError as error:
            raise ImportError(f"{SIMD_VARIABLE}: {error}") from None


def available() -> bool:
    """Whether the native module is installed."""
    return _C is not None


def has_exchange_api() -> bool:
    """Whether tensors are read through DLPack's C exchange API."""
    return bool(_reader.has_exchange_api)


def read(bucket: Bucket) -> Any:
    """Reads and checks a bucket's tensors; the result keeps them alive.

    Its ``misfits`` lists the parameters that the core can't take as they are: for each an ``index``
    in the bucket, a ``reason`` in words, ``layout_only`` where all that is wrong is that the
    parameter's tensors are laid out differently, ``cuda_unusable``, and ``shared`` where it shares
    memory with another parameter.
    """
    zeros = 0 if bucket.num_zeros is None else bucket.num_zeros.data_ptr()
    return _reader.read(
        bucket.params,
        bucket.grads,
        bucket.momentum_buffers,
        bucket.master_params,
        zeros,
        bucket.starts,
    )


@dataclass
class NativeRun:
    """The step of a bucket that was read without misfits; see :func:`joined`."""

    reading: Any
    options: Any
    on_devices: dict[int, DeviceValues]
    """Values that the kernel reads when it runs, by the index of their CUDA device."""
    written: tuple[list[Tensor], ...]

    def __call__(self) -> None:
        """Takes the step."""
        _run([self])


def prepare(
    reading: Any, bucket: Bucket, options: Options, values: DeviceValues | None = None
) -> NativeRun:
    """The step of a bucket that was read without misfits.

    ``values`` are read on the parameters' CUDA devices when the kernel runs.
    """
    native_options = _C.Options(**vars(options), first_step=bucket.first_step)
    return NativeRun(reading, native_options, _on_devices(bucket, values), bucket.written())


def _on_devices(bucket: Bucket, values: DeviceValues | None) -> dict[int, DeviceValues]:
    """The values on each of the CUDA devices of a bucket's parameters."""
    devices = {param.device for param in bucket.params} if values else ()
    return {device.index: values.on(device) for device in devices} if values else {}


def joined(runs: Sequence[Run]) -> list[Run]:
    """The same steps, the core's as one: a CUDA launch takes buckets of all groups."""
    ours = [run for run in runs if isinstance(run, NativeRun)]
    others = [run for run in runs if not isinstance(run, NativeRun)]
    return [partial(_run, ours), *others] if ours else others


def _run(runs: Sequence[NativeRun]) -> None:
    steps = []
    for run in runs:
        addresses = {index: _addresses(values) for index, values in run.on_devices.items()}
        steps.append((run.reading, run.options, addresses))
        raise_versions(run.written)
    _C.prox_sgd_(_reader, steps, torch.get_num_threads())


def _addresses(values: DeviceValues) -> Any:
    given = {key: value for key, value in values._asdict().items() if value is not None}
    dtypes = {f"{key}_dtype": _DTYPE[given[key].dtype] for key in ("lr", "l1") if key in given}
    return _C.DeviceValues(**{key: value.data_ptr() for key, value in given.items()}, **dtypes)


def prepare_rows(readings: Sequence[Any], parts: Sequence[Part], sets: Sequence[RowSet]) -> Run:
    """The step of sets of coupled rows whose parts were read without misfits, planned.

    Raises:
        RuntimeError: a CUDA graph is being captured, and ``row_weights`` aren't on the device yet.
    """
    on_devices = [_on_devices(part.bucket, part.values) for part in parts]
    steps = [
        (
            reading,
            _C.Options(**vars(part.options), first_step=part.bucket.first_step),
            {index: _addresses(values) for index, values in of_part.items()},
        )
        for reading, part, of_part in zip(readings, parts, on_devices, strict=True)
    ]
    weights: list[Tensor] = []
    described = []
    for one in sets:
        p, i = one.members[0]
        first = parts[p]
        number, address = one.weights, 0
        if isinstance(number, Tensor):
            name = first.bucket.name(i)
            weights.append(weights_beside(first.bucket.params[i], number, name))
            number, address = 0.0, weights[-1].data_ptr()
        lasso = one.coefficient * first.options.k
        described.append((list(one.members), one.rows, lasso, number, address))
    plan = _C.RowPlan(steps, described)

    return partial(_run_rows, plan, parts, (weights, on_devices))


def _run_rows(plan: Any, parts: Sequence[Part], _kept: Any) -> None:
    """Takes a planned step; ``_kept`` has the tensors whose addresses the plan holds."""
    for part in parts:
        raise_versions(part.bucket.written())
    _C.prox_sgd_rows_(_reader, plan, torch.get_num_threads())


def beyond_cuda_rows(one: RowSet, parts: Sequence[Part]) -> str:
    """Why the CUDA kernel can't take a set, whatever its tensors are; empty where it can."""
    most, most_options = _C.cuda_row_limits
    count = len(one.members)
    buckets = {p: parts[p] for p, _ in one.members}.values()
    options = {(b.options, b.bucket.first_step, *map(id, b.values)) for b in buckets}
    if count <= most and len(options) <= most_options:
        return ""
    return (
        f"its rows are coupled with those of {count - 1} others, with {len(options)} sets of "
        f"options, and the CUDA kernel takes {most} parameters with {most_options} sets of options"
    )


_warned: set[str] = set()


def warn_unusable_cuda(device: torch.device) -> None:
    """Says once why a CUDA device's tensors go the pure-PyTorch way, and the remedy."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    why = why_cuda_unusable(index)
    if why not in _warned:
        _warned.add(why)
        warnings.warn(
            f"ProxSGD runs in pure PyTorch on {device}, which is slower: {why}", stacklevel=3
        )


def why_cuda_unusable(index: int) -> str:
    """Why CUDA device ``index`` can't be used by the core; empty where it can."""
    return missing or str(_C.why_cuda_unusable(index))
