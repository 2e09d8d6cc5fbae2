"""Values that a CUDA kernel reads from device memory, so that the host needn't wait for them."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import Options, finite_and_not_negative
from .bucket import Skip

NUMBER_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""The types in which the kernel reads lr and l1."""


class DeviceValues(NamedTuple):
    """One-element tensors; None for what isn't one."""

    lr: Tensor | None = None
    l1: Tensor | None = None
    grad_scale: Tensor | None = None
    grad_coefficient: Tensor | None = None
    found_inf: Tensor | None = None

    def __bool__(self) -> bool:
        return set(map(type, self)) != {NoneType}

    def on(self, device: torch.device) -> DeviceValues:
        """The values on a device, in the types that the kernel reads."""

        def moved(value: Tensor | None, dtypes: tuple[torch.dtype, ...]) -> Tensor | None:
            if value is None:
                return None
            dtype = value.dtype if value.dtype in dtypes else dtypes[0]
            return value.detach().to(device, dtype, non_blocking=True)

        numbers = (torch.float64, *NUMBER_DTYPES)
        return DeviceValues(
            lr=moved(self.lr, numbers),
            l1=moved(self.l1, numbers),
            grad_scale=moved(self.grad_scale, (torch.float32,)),
            grad_coefficient=moved(self.grad_coefficient, (torch.float32,)),
            found_inf=moved(self.found_inf, (torch.float32,)),
        )

    def split(self) -> tuple[DeviceValues, DeviceValues]:
        """Those that the host knows, for which nothing waits, and the others."""
        known = DeviceValues(*(v if v is not None and v.is_cpu else None for v in self))
        others = DeviceValues(*(None if v is None or v.is_cpu else v for v in self))
        return known, others

    def read_into(self, options: Options, name: Callable[[], str], why: str) -> Options | Skip:
        """The options with the values in, for which the host waits.

        Args:
            options: in which the values' fields are placeholders.
            name: names a parameter that they are for, for an error.
            why: says why the host must know them.

        Raises:
            RuntimeError: a CUDA graph is being captured, so the host can't wait.
            ValueError: a value is out of its range.
        """
        if is_capturing() and any(value is not None and value.is_cuda for value in self):
            raise RuntimeError(
                f"{name()}: can't wait for a value on the device while a CUDA graph is captured, "
                f"but {why}"
            )
        if self.found_inf is not None and self.found_inf.item() != 0:
            return Skip.FOUND_INF
        known: dict[str, Any] = {}
        if self.lr is not None:
            known["lr"] = finite_and_not_negative(self.lr, f"{name()}: lr")
        if self.l1 is not None:
            known["l1"] = finite_and_not_negative(self.l1, f"{name()}: l1")
        if self.grad_scale is not None:
            known["grad_scale"] = scale = to_float32(self.grad_scale.item())
            if not scale > 0:
                raise ValueError(f"ProxSGD: grad_scale is {scale}: must be above 0")
        if self.grad_coefficient is not None:
            known["grad_coefficient"] = to_float32(self.grad_coefficient.item())
        return dataclasses.replace(options, **known)


def to_float32(value: float) -> float:
    """A number rounded to float32."""
    return ctypes.c_float(value).value


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()
