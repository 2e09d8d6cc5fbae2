"""Refusals of tensors that no backend can update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COMPUTE_DTYPE = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}
"""The dtype in which a parameter of each supported dtype is updated."""


def check_operands(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    master: Tensor | None,
    start: Tensor | None,
    name: Callable[[], str],
) -> None:
    """Refuses what no backend can update. ``name`` gives the parameter's, for an error.

    Raises:
        ValueError: names the parameter and what is wrong with it.
    """
    if param.is_complex() or grad.is_complex():
        raise ValueError(f"{name()}: complex parameters and gradients are not supported")
    if param.layout is not torch.strided:
        raise ValueError(f"{name()}: the parameter's layout is {param.layout}: must be strided")
    _check_overlap(param, "the parameter", name)
    if grad.layout is not torch.strided:
        raise ValueError(
            f"{name()}: the gradient is sparse ({grad.layout}): sparse gradients are not supported"
        )
    if param.dtype not in COMPUTE_DTYPE:
        raise ValueError(
            f"{name()}: its dtype is {param.dtype}: must be float32, float64, bfloat16 or float16"
        )
    if not grad.is_floating_point():
        raise ValueError(f"{name()}: the gradient's dtype is {grad.dtype}: must be floating-point")
    _check_alike(param, grad, "the gradient", name)
    if start is not None:
        check_state(param, start, "start", name)
    for key, value in (
        ("the parameter", param),
        ("momentum_buffer", momentum_buffer),
        ("master_weight", master),
    ):
        if value is None:
            continue
        if value is not param:
            check_state(param, value, key, name)
        if value.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"{name()}: {key} was made in inference mode: torch changes it in that mode only"
            )


def check_state(param: Tensor, value: Any, key: str, name: Callable[[], str]) -> None:
    """Refuses a state tensor that isn't the parameter's.

    Raises:
        ValueError: names the parameter, the state's key and what is wrong with it.
    """
    if not isinstance(value, Tensor):
        raise ValueError(f"{name()}: {key} is {value!r}: must be a tensor")
    if value.layout is not torch.strided:
        raise ValueError(f"{name()}: {key}'s layout is {value.layout}: must be strided")
    check_not_negated(value, key, name)
    _check_alike(param, value, key, name)
    if not value.is_floating_point():
        raise ValueError(f"{name()}: {key}'s dtype is {value.dtype}: must be floating-point")
    _check_overlap(value, key, name)


def check_not_negated(tensor: Tensor, what: str, name: Callable[[], str]) -> None:
    """Refuses to write to a lazily negated view (``torch._neg_view``, ``x.conj().imag``).

    Raises:
        ValueError: says which tensor of which parameter.
    """
    if tensor.is_neg():
        raise ValueError(f"{name()}: {what} is a lazily negated view: call resolve_neg() on it")


def _check_alike(param: Tensor, other: Tensor, what: str, name: Callable[[], str]) -> None:
    """Refuses a tensor of another shape or device than its parameter's."""
    if other.shape != param.shape:
        raise ValueError(
            f"{name()}: {what}'s shape is {tuple(other.shape)}: must be the parameter's, "
            f"{tuple(param.shape)}"
        )
    if other.device != param.device:
        raise ValueError(
            f"{name()}: {what} is on {other.device}: must be where the parameter is, "
            f"on {param.device}"
        )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share a place in memory, as after ``expand()``."""
    return any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _check_overlap(tensor: Tensor, what: str, name: Callable[[], str]) -> None:
    """Refuses to write to a tensor whose elements share places in memory."""
    if overlaps_itself(tensor):
        raise ValueError(
            f"{name()}: {what} overlaps itself in memory (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}): must have a place for each element"
        )


def check_no_shared_memory(params: Iterable[tuple[Tensor, Callable[[], str]]]) -> None:
    """Refuses parameters that share memory: a step would update it twice, at the same time.

    Slices of one buffer that share no element pass. Tensors that have no address (of subclasses
    that wrap others, on the meta device, lazy or fake) aren't looked at.

    Raises:
        ValueError: names both parameters.
    """
    spans: dict[torch.device, list[tuple[int, int, Tensor, Callable[[], str]]]] = {}
    for param, name in params:
        span = _span(param)
        if span is not None:
            spans.setdefault(param.device, []).append((*span, param, name))
    for on_device in spans.values():
        on_device.sort(key=lambda row: row[0])
        open_rows: list[tuple[int, int, Tensor, Callable[[], str]]] = []
        for row in on_device:
            open_rows = [other for other in open_rows if other[1] > row[0]]
            for other in open_rows:
                if _share_elements(other[2], row[2]):
                    raise ValueError(
                        f"{row[3]()}: shares memory with {other[3]().removeprefix('ProxSGD: ')}: "
                        "list one of them, or give one its own memory by .clone()"
                    )
            open_rows.append(row)


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """The addresses from a tensor's first byte to behind its last; None where there are none."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    if not plain or tensor.layout is not torch.strided or tensor.is_meta or not tensor.numel():
        return None
    try:
        begin = tensor.data_ptr()
    except RuntimeError:  # a fake tensor, or one that functorch wraps
        return None
    if begin == 0:
        return None
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (reach + 1) * tensor.element_size()


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose spans overlap have a byte in common."""
    (begin_a, end_a), (begin_b, end_b) = _span(a) or (0, 0), _span(b) or (0, 0)
    if begin_a == begin_b or (a.is_contiguous() and b.is_contiguous()):
        return True
    begin = min(begin_a, begin_b)
    taken = torch.zeros(max(end_a, end_b) - begin, dtype=torch.uint8)

    def bytes_of(tensor: Tensor, at: int) -> Tensor:
        size = tensor.element_size()
        strides = [s * size for s in tensor.stride()]
        return taken.as_strided([*tensor.shape, size], [*strides, 1], at - begin)

    bytes_of(a, begin_a).fill_(1)
    return bool(bytes_of(b, begin_b).any())
