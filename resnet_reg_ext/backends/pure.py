"""The update in pure PyTorch: its readable definition, and a backend for every device."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import repeat
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..options import Options
from .bucket import Bucket, Run
from .checks import COMPUTE_DTYPE, check_operands, overlaps_itself
from .device_values import to_float32
from .pure_start import clear_nan_, clear_nan_lists_, pull_towards, where_, where_lists_
from .workspace import CHUNK, Workspace


class Coefficients(NamedTuple):
    """The numbers that the update multiplies and compares with, for one compute dtype."""

    grad_factor: float
    weight_decay: float
    momentum: float
    one_minus_dampening: float
    nesterov: bool
    maximize: bool
    lr: float
    l1_threshold: float
    l2_factor: float
    """1 where it rounds to 1."""
    frozen_zeros: bool

    @classmethod
    def of(cls, options: Options, dtype: torch.dtype) -> Coefficients:
        """The coefficients of checked options."""

        def rounded(value: float) -> float:
            return value if dtype is torch.float64 else to_float32(value)

        return cls(
            grad_factor=rounded(rounded(1 / options.grad_scale) * options.grad_coefficient),
            weight_decay=0.0 if options.proximal else options.weight_decay,
            momentum=options.momentum,
            one_minus_dampening=1 - options.dampening,
            nesterov=options.nesterov,
            maximize=options.maximize,
            lr=options.lr,
            l1_threshold=rounded(options.l1_threshold),
            l2_factor=rounded(options.l2_factor),
            frozen_zeros=options.frozen_zeros,
        )


def update_values(
    ops: SimpleNamespace,
    p: Any,
    g: Any,
    m: Any,
    c: Coefficients,
    first_step: bool,
    start: Any = None,
    scratch: Tensor | None = None,
    distance: Tensor | None = None,
) -> None:
    """The update in the compute dtype, in place. ``add(alpha=)`` rounds once: it is an fma.

    With ``SINGLE``, p, g, m and start are tensors, and ``scratch`` and ``distance`` take
    intermediate values; with ``_FOREACH`` they are lists of tensors, and memory is allocated for
    those. ``start`` is None where the penalties pull towards zero.
    """
    frozen = None
    if c.frozen_zeros:
        frozen = ops.equal(p, 0) if start is None else ops.equal_each(p, start)
    d = ops.neg(g, out=scratch) if c.maximize else g
    if c.grad_factor != 1:
        d = ops.mul(d, c.grad_factor, out=scratch)
    if c.weight_decay != 0:
        shrunk = p if start is None else ops.sub(p, start, out=distance)
        d = ops.add(d, shrunk, alpha=c.weight_decay, out=scratch)
    s = d
    if c.momentum != 0:
        if first_step:
            ops.copy_(m, d)
        else:
            ops.mul_(m, c.momentum)
            ops.add_(m, d, alpha=c.one_minus_dampening)
        s = ops.add(d, m, alpha=c.momentum, out=scratch) if c.nesterov else m
    ops.add_(p, s, alpha=-c.lr)
    if start is not None:
        pull_towards(ops, p, start, c.l1_threshold, c.l2_factor, frozen, scratch, distance)
        return
    if c.l1_threshold != 0:  # v - clamp(v, -t, t) is the soft threshold, and a NaN stays one
        ops.sub_(p, ops.clamp(p, -c.l1_threshold, c.l1_threshold, out=scratch))
    if c.l2_factor != 1:
        ops.mul_(p, c.l2_factor)
    if frozen is not None:
        ops.masked_fill_(p, frozen, 0)


def _clamp_lists(tensors: list[Tensor], low: float, high: float, out: None) -> list[Tensor]:
    clamped = list(torch._foreach_clamp_min(tensors, low))
    torch._foreach_clamp_max_(clamped, high)
    return clamped


def _masked_fill_lists_(tensors: list[Tensor], masks: list[Tensor], value: float) -> None:
    for tensor, mask in zip(tensors, masks, strict=True):
        tensor.masked_fill_(mask, value)


SINGLE = SimpleNamespace(
    neg=torch.neg,
    mul=torch.mul,
    add=torch.add,
    clamp=torch.clamp,
    equal=torch.eq,
    equal_each=torch.eq,
    sub=torch.sub,
    clear_nan_=clear_nan_,
    where_=where_,
    copy_=Tensor.copy_,
    mul_=Tensor.mul_,
    add_=Tensor.add_,
    sub_=Tensor.sub_,
    masked_fill_=Tensor.masked_fill_,
)
_FOREACH = SimpleNamespace(
    neg=lambda a, out: torch._foreach_neg(a),
    mul=lambda a, b, out: torch._foreach_mul(a, b),
    add=lambda a, b, alpha, out: torch._foreach_add(a, b, alpha=alpha),
    clamp=_clamp_lists,
    equal=lambda a, b: [t == b for t in a],
    equal_each=lambda a, b: [t == u for t, u in zip(a, b, strict=True)],
    sub=lambda a, b, out: torch._foreach_sub(a, b),
    clear_nan_=clear_nan_lists_,
    where_=where_lists_,
    copy_=torch._foreach_copy_,
    mul_=torch._foreach_mul_,
    add_=torch._foreach_add_,
    sub_=torch._foreach_sub_,
    masked_fill_=_masked_fill_lists_,
)

# Below this many elements calling an operation takes longer than the operation: such tensors are
# updated by operations on lists.
_SMALL = 1 << 12


def prepare(bucket: Bucket, options: Options) -> Run:
    """The step of a bucket, checked.

    Raises:
        ValueError: a tensor can't be updated; names its parameter.
    """
    for i in range(len(bucket.params)):
        check_operands(*bucket.operands(i), partial(bucket.name, i))
    bucket = plain(bucket)
    odd = [i for i in range(len(bucket.params)) if is_odd(bucket, i)]
    if not odd:
        return partial(_update_, bucket, options)
    return _prepare_with_odd(bucket, options, odd)


def plain(bucket: Bucket) -> Bucket:
    """The bucket without subclasses that only rename, and without gradients of stride 0."""
    result = bucket.map(lambda tensors: [_without_subclass(t) for t in tensors])
    # With an operand whose strides are 0, torch rounds twice in add(alpha=).
    result.grads = [
        g.clone(memory_format=torch.contiguous_format) if overlaps_itself(g) else g
        for g in result.grads
    ]
    return result


def is_odd(bucket: Bucket, i: int) -> bool:
    """Whether an operation on one of a parameter's tensors may raise, or run anyone's code."""
    return not all(t is None or _is_plain(t) for t in bucket.operands(i))


def _without_subclass(tensor: Tensor) -> Tensor:
    """The memory of a subclass that only overrides ``__torch_function__``, as a plain tensor.

    Two unrelated subclasses in one operation would raise, after other parameters have changed.
    """
    if _is_plain(tensor) or type(tensor).__torch_dispatch__ != Tensor.__torch_dispatch__:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


_is_functorch_wrapped: Any = getattr(
    torch._C._functorch, "is_functorch_wrapped_tensor", lambda tensor: False
)


def _is_plain(tensor: Tensor) -> bool:
    """Whether no operation on the tensor runs anyone's Python code, or refuses its values."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not _is_functorch_wrapped(tensor)


def _prepare_with_odd(bucket: Bucket, options: Options, odd: list[int]) -> Run:
    """A step with tensors whose operations may raise, as of a ``__torch_dispatch__`` subclass.

    They are updated in copies now, so that whatever raises does it before anything has changed.
    """
    chosen = set(odd)
    rest = bucket.pick([i for i in range(len(bucket.params)) if i not in chosen])
    written = bucket.pick(odd)
    with torch.no_grad():
        updated = written.map(lambda tensors: [t.clone() for t in tensors])
    _update_(updated, options)

    @torch.no_grad()
    def run() -> None:
        _update_(rest, options)
        for originals, copies in zip(written.written(), updated.written(), strict=True):
            for original, copy in zip(originals, copies, strict=True):
                original.copy_(copy)
        if bucket.num_zeros is not None:
            count_zeros_into(bucket.num_zeros, bucket)

    return run


@torch.no_grad()
def _update_(bucket: Bucket, options: Options) -> None:
    """Updates a bucket: large tensors on a CPU in chunks, the others by operations on lists."""
    workspace = Workspace()
    coefficients: dict[torch.dtype, Coefficients] = {}
    together: list[int] = []
    elements = 0
    for i, param in enumerate(bucket.params):
        size = param.numel()
        if param.is_cpu and size > _SMALL:
            dtype = COMPUTE_DTYPE[param.dtype]
            if dtype not in coefficients:
                coefficients[dtype] = Coefficients.of(options, dtype)
            for chunk in _chunks(*bucket.operands(i)):
                _update_chunk_(chunk, coefficients[dtype], dtype, bucket.first_step, workspace)
            continue
        if param.is_cpu and elements + size > CHUNK:
            _update_lists_(bucket.pick(together), options)
            together, elements = [], 0
        together.append(i)
        elements += size if param.is_cpu else 0
    if together:
        _update_lists_(bucket.pick(together), options)
    if bucket.num_zeros is not None:
        count_zeros_into(bucket.num_zeros, bucket)


def _update_chunk_(
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    c: Coefficients,
    dtype: torch.dtype,
    first_step: bool,
    workspace: Workspace,
) -> None:
    """Updates a chunk of a parameter on a CPU.

    Tensors of another dtype are widened, and each is rounded once when it is stored again.
    """
    param, grad, momentum_buffer, master, start = operands
    weight = param if master is None else master
    p = workspace.widened("p", weight, dtype)
    g = workspace.widened("g", grad, dtype)
    m = None if momentum_buffer is None else workspace.widened("m", momentum_buffer, dtype)
    scratch = workspace.like("scratch", p, dtype)
    if start is None:
        update_values(SINGLE, p, g, m, c, first_step, scratch=scratch)
    else:
        w = workspace.widened("start", start, dtype)
        distance = workspace.like("distance", p, dtype)
        update_values(SINGLE, p, g, m, c, first_step, w, scratch, distance)
    if p is not weight:
        weight.copy_(p)
    if momentum_buffer is not None and m is not None and m is not momentum_buffer:
        momentum_buffer.copy_(m)
    if master is not None:
        param.copy_(p)


def _update_lists_(bucket: Bucket, options: Options) -> None:
    """Updates a bucket, each operation on all tensors before the next."""
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i, param in enumerate(bucket.params):
        by_dtype.setdefault(COMPUTE_DTYPE[param.dtype], []).append(i)
    for dtype, members in by_dtype.items():
        part = bucket.pick(members)
        weights = part.params if part.master_params is None else part.master_params
        momentum_buffers = part.momentum_buffers or []
        p, m, g, start = (
            [t if t.dtype is dtype else t.to(dtype) for t in tensors]
            for tensors in (weights, momentum_buffers, part.grads, part.starts or [])
        )
        c = Coefficients.of(options, dtype)
        update_values(_FOREACH, p, g, m, c, part.first_step, start or None)
        stored = [(weights, p), (momentum_buffers, m)]
        if part.master_params is not None:
            stored.append((part.params, p))
        for targets, values in stored:
            for target, value in zip(targets, values, strict=True):
                if target is not value:
                    target.copy_(value)


def _chunks(*operands: Tensor | None) -> Iterable[Any]:
    """A parameter's operands, cut into chunks if they are large and laid out alike."""
    given = [t for t in operands if t is not None]
    size = given[0].numel()
    if size <= CHUNK:
        return (operands,)
    if all(t.is_contiguous() for t in given):
        flat = [None if t is None else t.detach().view(-1) for t in operands]
    elif given[0].dim() == 4 and all(
        t.is_contiguous(memory_format=torch.channels_last) for t in given
    ):
        flat = [None if t is None else t.detach().permute(0, 2, 3, 1).view(-1) for t in operands]
    else:
        return (operands,)
    return zip(*(repeat(None) if t is None else torch.split(t, CHUNK) for t in flat), strict=False)


def count_zeros_into(num_zeros: Tensor, bucket: Bucket) -> None:
    """Writes how many weights of each parameter are zero, or at their start where it has one."""
    starts = bucket.starts or repeat(None)
    counts = [count_zeros(p, start) for p, start in zip(bucket.params, starts, strict=False)]
    torch.stack(counts, out=num_zeros)


def count_zeros(tensor: Tensor, start: Tensor | None = None) -> Tensor:
    """The number of zeros, of either sign, as a tensor; takes no memory for each element.

    With a start: of the elements that are equal to what it is in their dtype.
    """
    if start is not None:
        return torch.count_nonzero(tensor == start.to(tensor.dtype))
    return tensor.numel() - torch.count_nonzero(tensor)
