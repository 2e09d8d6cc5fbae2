"""The way to the compiled core: the only module that touches ``resnet_reg_ext._C``.

The core knows no torch. It reads tensors through DLPack's C exchange API, which newer torch has;
for an older one this module describes each tensor to it in Python, which is slower and otherwise
the same.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .functional import Hyperparameters

_C: Any = None
missing = ""
"""Why the native module is not there; empty where it is."""
try:
    _C = importlib.import_module("._C", __package__)
except ImportError as error:
    missing = f"the native module can't be used ({error})"

SIMD_VARIABLE = "RESNET_REG_EXT_SIMD"

_DLPACK_DEVICE = {"cpu": 1, "cuda": 2}
_DLPACK_DTYPE = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
}


_DEVICE_VALUES = ("lr", "l1", "grad_scale", "grad_coefficient", "found_inf")
_NOTHING_ON_DEVICES: dict[int, tuple[Tensor | None, ...]] = {}


def _describe(tensor: Tensor) -> tuple[Any, ...]:
    """What the exchange API would tell: address, device, dtype, shape and strides."""
    if tensor.layout is not torch.strided or tensor.is_neg() or tensor.is_conj():
        raise TypeError("not a plain strided tensor")
    device = tensor.device
    code, bits = _DLPACK_DTYPE.get(tensor.dtype, (0, 8))
    return (
        tensor.data_ptr(),
        _DLPACK_DEVICE.get(device.type, 12),
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
    except ValueError:  # what stands there is something else: other libraries set the attribute too
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


def read(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor] | None,
    masters: list[Tensor] | None,
    zeros: Tensor | None,
) -> Any:
    """Reads and checks lists of tensors; the result keeps them alive.

    ``zeros``: int64 counters, one a parameter, on the parameters' one device.
    """
    return _reader.read(params, grads, momenta, masters, _address(zeros))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def prox_sgd_(
    reading: Any,
    changed: Sequence[Sequence[Tensor] | None],
    h: Hyperparameters,
    first: bool,
    device: dict[int, tuple[Tensor | None, ...]] = _NOTHING_ON_DEVICES,
) -> None:
    """One step on a reading, in place.

    ``changed``: the lists of tensors, of those read, that the step writes to. ``device``: for CUDA
    devices, what is read there when the kernel runs: lr and l1 in float64, grad_scale,
    grad_coefficient and found_inf in float32.
    """
    addresses = {
        index: _C.DeviceValues(**dict(zip(_DEVICE_VALUES, map(_address, values), strict=True)))
        for index, values in device.items()
    }
    options = _C.Options(**h._asdict(), first_step=first)
    # Autograd must notice that the tensors change. Before the kernel, whose data take the place in
    # the caches of what has just been read of the tensors.
    for tensors in changed:
        if tensors:
            torch.autograd.graph.increment_version(tensors)
    _C.prox_sgd_(_reader, reading, options, torch.get_num_threads(), addresses)


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
