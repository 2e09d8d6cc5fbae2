"""The update in functions: the readable definition, and the choice of who carries it out.

Everything here is pure PyTorch and runs on any device. :func:`prox_sgd_` hands what it can to the
native kernels, which give the same bits (on a CPU with AVX2).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _distributed, _native

L2_MODES = ("coupled", "proximal")

__all__ = ["elastic_net_prox", "prox_sgd_", "soft_threshold"]

_FLOAT32_MAX = torch.finfo(torch.float32).max
_ROUNDING = 1e-6  # of what a schedule begins with: how far below 0 rounding may take its end


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    r"""The proximal map of the L1 norm, elementwise.

    .. math:: S_t(x) = \operatorname{sign}(x)\,\max(|x| - t, 0)
              = \arg\min_u \tfrac12 (u - x)^2 + t |u|

    Gives +0 wherever ``|x| <= t``, keeps infinities and passes NaN on. (Parikh and Boyd, *Proximal
    Algorithms*, 2014, section 6.5.2.)

    Args:
        x: a floating-point tensor of any shape.
        threshold: t >= 0, finite.

    Returns:
        A new tensor of x's shape and dtype. Differentiable in x: the gradient is 1 where
        ``|x| > t`` and 0 elsewhere, the kink included.

    Raises:
        ValueError: the threshold is negative, NaN, or infinite in float32.
    """
    t = _finite_and_not_negative(threshold, "threshold")
    return torch.where(x.abs() <= t, torch.zeros_like(x), x - x.clamp(-t, t))


def elastic_net_prox(x: Tensor, l1: float, weight_decay: float, step: float = 1.0) -> Tensor:
    r"""The proximal map of the elastic net with step size ``step``, elementwise.

    .. math:: \arg\min_u \tfrac12 (u - x)^2
              + s\,(l_1 |u| + \tfrac12\, \text{weight\_decay}\; u^2)
              = \frac{S_{s\,l_1}(x)}{1 + s\;\text{weight\_decay}}

    (Parikh and Boyd, *Proximal Algorithms*, 2014, section 6.5.3.)

    Args:
        x: a floating-point tensor of any shape.
        l1: the coefficient of the L1 norm, >= 0.
        weight_decay: the coefficient of half the squared L2 norm, >= 0.
        step: the step size s, >= 0.

    Returns:
        A new tensor of x's shape and dtype, differentiable in x as :func:`soft_threshold` is.

    Raises:
        ValueError: a coefficient is negative, NaN, or infinite in float32.
    """
    s = _finite_and_not_negative(step, "step")
    t = s * _finite_and_not_negative(l1, "l1")
    return soft_threshold(x, t) * (
        1 / (1 + s * _finite_and_not_negative(weight_decay, "weight_decay"))
    )


class Hyperparameters(NamedTuple):
    """A parameter group's options, checked. The order is that of the native core's arguments."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    l1: float
    nesterov: bool
    maximize: bool
    proximal: bool
    frozen_zeros: bool
    grad_scale: float = 1.0
    grad_coefficient: float = 1.0

    @property
    def gain(self) -> float:
        """k: how far momentum carries a constant gradient, in units of lr."""
        return 1.0 if self.momentum == 0 else (1 - self.dampening) / (1 - self.momentum)


def hyperparameters(
    group: Mapping[str, Any], where: str = "", on_device: dict[str, Tensor] | None = None
) -> Hyperparameters:
    """Checks a group's options.

    Args:
        group: holds ``lr``, ``momentum``, ``dampening``, ``weight_decay``, ``nesterov``, ``l1``,
            ``l2_mode``, ``maximize``, ``fused`` and ``frozen_zeros``.
        where: what to put before an option's name in an error.
        on_device: takes an ``lr`` or ``l1`` that a CUDA device holds, 0 in the result then;
            without it, the host waits for the value.

    Raises:
        ValueError: an option is out of its range; names it and its value.
    """
    lr = _number(group, "lr", where, on_device)
    momentum = _number(group, "momentum", where)
    if not momentum < 1:
        raise ValueError(
            f"{where}momentum is {group['momentum']}: must be in [0, 1), "
            "as the L1 threshold divides by 1 - momentum"
        )
    dampening = _number(group, "dampening", where)
    if not dampening <= 1:
        raise ValueError(f"{where}dampening is {group['dampening']}: must be in [0, 1]")
    nesterov = bool(group["nesterov"])
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"{where}nesterov is True with momentum {momentum} and dampening {dampening}: "
            "it needs a momentum above 0 and no dampening"
        )
    if group["l2_mode"] not in L2_MODES:
        raise ValueError(f"{where}l2_mode is {group['l2_mode']!r}: must be one of {L2_MODES}")
    if group["fused"] is not None and not isinstance(group["fused"], bool):
        raise ValueError(f"{where}fused is {group['fused']!r}: must be None, True or False")
    h = Hyperparameters(
        lr,
        momentum,
        dampening,
        _number(group, "weight_decay", where),
        _number(group, "l1", where, on_device),
        nesterov,
        bool(group["maximize"]),
        group["l2_mode"] == "proximal",
        bool(group["frozen_zeros"]),
    )
    if h.lr * max(h.l1, h.weight_decay) * h.gain > _FLOAT32_MAX:
        raise ValueError(
            f"{where}lr {h.lr}, l1 {h.l1} and weight_decay {h.weight_decay} with momentum "
            f"{h.momentum}: their product is beyond float32"
        )
    return h


def _number(
    group: Mapping[str, Any], key: str, where: str, on_device: dict[str, Tensor] | None = None
) -> float:
    """A group's number, checked; ``on_device`` as for :func:`hyperparameters`."""
    value = group[key]
    if type(value) is float and 0 <= value <= _FLOAT32_MAX:
        return value
    name = f"{where}{key}"
    if on_device is not None and _is_on_gpu(value):
        on_device[key] = scalar(value, name)
        return 0.0
    number = number_in(value, name)
    if number < 0 and number >= -_ROUNDING * float(group.get(f"initial_{key}", 0.0)):
        return 0.0  # a schedule that ends at 0 may end next to it
    return _not_negative(number, value, name)


def _finite_and_not_negative(value: Any, name: str) -> float:
    return _not_negative(number_in(value, name), value, name)


def number_in(value: Any, name: str) -> float:
    """A number, or a tensor's only one.

    Raises:
        ValueError: it is neither; says what ``name`` is.
    """
    if isinstance(value, Tensor):
        value = scalar(value, name)
    try:
        if isinstance(value, str):  # which float() would read
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}: must be a number") from None


def _not_negative(number: float, value: Any, name: str) -> float:
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {value}: must be finite and not negative")
    if number > _FLOAT32_MAX:
        raise ValueError(f"{name} is {value}: must be within float32's range")
    return number


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def scalar(value: Tensor, name: str) -> Tensor:
    """A tensor that must hold one real number, as it is.

    Raises:
        ValueError: it doesn't; says what ``name`` is.
    """
    if value.numel() != 1:
        raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}: must be a number")
    if value.is_meta or value.is_complex():
        raise ValueError(f"{name} is {value!r}: must be a number")
    return value


def prox_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    l1: float = 0.0,
    l2_mode: str = "coupled",
    maximize: bool = False,
    first_step: bool = False,
    master_weights: Sequence[Tensor] | None = None,
    frozen_zeros: bool = False,
    fused: bool | None = None,
) -> None:
    r"""One step of proximal SGD on lists of tensors, in place; not differentiable.

    With k = (1 - dampening) / (1 - momentum), or 1 without momentum, for every element:

    .. code-block:: text

        d = grad + weight_decay * p              l2_mode="coupled"; d = grad for "proximal"
        m = momentum * m + (1 - dampening) * d   m = d on the first step
        s = d + momentum * m                     nesterov; else s = m; s = d without momentum
        v = p - lr * s
        p = soft_threshold(v, lr * l1 * k)
        p = p / (1 + lr * weight_decay * k)      l2_mode="proximal" only

    Products and sums that belong together are fused (one rounding), in float32 for float32, float16
    and bfloat16 tensors and in float64 for float64; each stored value is rounded once.

    Args:
        params: tensors to change; float32, float64, bfloat16 or float16, any shape, any device.
        grads: gradients, of the parameters' shapes and devices; not changed.
        momentum_buffers: one for each parameter where ``momentum`` is not 0; changed.
        lr: the learning rate, >= 0.
        momentum: in [0, 1).
        dampening: in [0, 1].
        weight_decay: >= 0.
        nesterov: Nesterov's momentum.
        l1: coefficient of the L1 norm in the objective, >= 0.
        l2_mode: ``"coupled"`` or ``"proximal"``.
        maximize: ascend instead of descend.
        first_step: the buffers hold nothing yet and are only written.
        master_weights: float32 copies of bfloat16 or float16 parameters. The update is made on
            them, and the parameters become what they round to.
        frozen_zeros: weights that are 0 stay 0, and ``l1`` is not applied.
        fused: None takes the native kernels for the tensors that they can take and pure PyTorch for
            the others; True raises where they can't; False takes pure PyTorch.

    Raises:
        TypeError: something other than a tensor is in a list. Nothing has changed then.
        ValueError: an option, a shape, a device or a dtype is wrong. Nothing has changed then.
        RuntimeError: ``fused=True`` and a tensor can't go the native way. Nothing has changed then.
    """
    options = {
        "lr": lr,
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "l1": l1,
        "l2_mode": l2_mode,
        "maximize": maximize,
        "fused": fused,
        "frozen_zeros": frozen_zeros,
    }
    h = hyperparameters(options)
    if h.momentum != 0 and momentum_buffers is None:
        raise ValueError(f"momentum is {momentum}: momentum_buffers must be given")
    params, grads = list(params), list(grads)
    buffers = list(momentum_buffers) if momentum_buffers is not None and h.momentum != 0 else None
    masters = None if master_weights is None else list(master_weights)
    for name, tensors in (
        ("params", params),
        ("grads", grads),
        ("momentum_buffers", buffers),
        ("master_weights", masters),
    ):
        if tensors is not None and len(tensors) != len(params):
            raise ValueError(f"{len(params)} params, but {len(tensors)} {name}")
        for i, tensor in enumerate(tensors or ()):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}] is a {type(tensor).__name__}: must be a tensor")
            if name != "grads" and tensor.is_neg():
                raise ValueError(f"{name}[{i}]: is a lazily negated view: call resolve_neg() on it")
    bucket = Bucket(params, grads, buffers, masters, first_step)
    run = prepare_prox_sgd(bucket, h, fused, "params[{}]".format)
    assert run is not None  # there is no found_inf
    run()


class Bucket(NamedTuple):
    """Parameters of one group that are all, or all not, at their first step."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor] | None
    masters: list[Tensor] | None
    first: bool
    zeros: Tensor | None = None
    """Where to count the zeros of each parameter: int64, on the parameters' one device."""
    fitting: Any = None
    """The native core's reading, of tensors that are known to fit."""

    def of(self, i: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """A parameter with its gradient, momentum buffer and master weight."""
        return (
            self.params[i],
            self.grads[i],
            self.momenta[i] if self.momenta is not None else None,
            self.masters[i] if self.masters is not None else None,
        )

    def pick(self, indices: Sequence[int]) -> Bucket:
        """Some of the parameters, without counters."""

        def some(tensors: list[Tensor]) -> list[Tensor]:
            return [tensors[i] for i in indices]

        return Bucket(
            some(self.params),
            some(self.grads),
            None if self.momenta is None else some(self.momenta),
            None if self.masters is None else some(self.masters),
            self.first,
        )

    def read(self) -> Any:
        """The native core's reading of the bucket."""
        return _native.read(self.params, self.grads, self.momenta, self.masters, self.zeros)

    @property
    def changed(self) -> tuple[list[Tensor] | None, ...]:
        """What a step writes to."""
        return self.params, self.momenta, self.masters


class DeviceValues(NamedTuple):
    """What the kernel reads in a CUDA device's memory, so that the host needn't wait for it."""

    lr: Tensor | None = None
    l1: Tensor | None = None
    grad_scale: Tensor | None = None
    grad_coefficient: Tensor | None = None
    found_inf: Tensor | None = None

    def on(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """The values on a device, in the types that the kernel reads."""
        wide = (torch.float64, torch.float64, torch.float32, torch.float32, torch.float32)
        return tuple(
            None if value is None else value.detach().to(device, dtype, non_blocking=True)
            for value, dtype in zip(self, wide, strict=True)
        )

    def applied_to(
        self, h: Hyperparameters, name: Callable[[], str], why: str
    ) -> Hyperparameters | None:
        """The hyperparameters with the values in, for which the host waits; None if inf was found.

        ``name`` gives a parameter that they are for, for an error.

        Raises:
            RuntimeError: a CUDA graph is being captured, so the host can't wait; says ``why`` it
                would have to.
            ValueError: a value is out of its range.
        """
        tensors = [value for value in self if value is not None]
        if is_capturing() and any(map(_is_on_gpu, tensors)):
            raise RuntimeError(
                f"{name()}: can't wait for a value on the device while a CUDA graph is captured, "
                f"but {why}"
            )
        if self.found_inf is not None and self.found_inf.item() != 0:
            return None
        if self.lr is not None:
            h = h._replace(lr=_finite_and_not_negative(self.lr, f"{name()}: lr"))
        if self.l1 is not None:
            h = h._replace(l1=_finite_and_not_negative(self.l1, f"{name()}: l1"))
        if self.grad_scale is not None:
            scale = _rounded(self.grad_scale.item(), torch.float32)
            if not scale > 0:
                raise ValueError(f"ProxSGD: grad_scale is {scale}: must be above 0")
            h = h._replace(grad_scale=scale)
        if self.grad_coefficient is not None:
            h = h._replace(grad_coefficient=_rounded(self.grad_coefficient.item(), torch.float32))
        return h


def may_be_native(fused: bool | None) -> bool:
    """Whether an option ``fused`` admits the native kernels, where there are such.

    They are nothing that a dispatch mode of torch's could see, as those that make tensors fakes or
    record a graph: under one, None stands for pure PyTorch.
    """
    return _native.available() and (fused or (fused is None and _dispatch_modes() == 0))


_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def prepare_prox_sgd(
    bucket: Bucket,
    h: Hyperparameters,
    fused: bool | None,
    name: Callable[[int], str],
    values: DeviceValues | None = None,
) -> Callable[[], None] | None:
    """Checks all that :func:`prox_sgd_` needs and returns the step, which then can't be refused.

    So that an optimizer can check every bucket before it changes the first one. ``name`` turns an
    index into words for an error. None is returned if ``values`` tell that the step is to be
    skipped; on a CUDA device, the kernel itself may skip it.
    """
    reading = bucket.fitting
    native = reading is not None or may_be_native(fused)
    if fused and not native:
        raise RuntimeError(
            f"{name(0)}: fused=True, but {_native.missing}; fused=None takes pure PyTorch instead"
        )
    misfits: list[Any] = []
    if native and reading is None:
        bucket = bucket._replace(grads=[g.resolve_neg() for g in bucket.grads])
        reading = bucket.read()
        misfits = reading.misfits
    if (misfits or not native) and _distributed.has_dtensors(
        bucket.params, bucket.grads, bucket.momenta or [], bucket.masters or []
    ):
        parts = _distributed.local_bucket(bucket, name)
        run = prepare_prox_sgd(parts, h, fused, name, values)
        return None if run is None else partial(_run_on_parts, run, bucket)

    if values is not None:
        why = ""
        if not native or not all(param.is_cuda for param in bucket.params):
            why = "the step runs on the host or in pure PyTorch"
        elif bucket.first:
            why = "it is a parameter's first step: take one before the capture"
        if why:
            known = values.applied_to(h, partial(name, 0), why)
            if known is None:
                return None
            h, values = known, None

    if not native:
        for i in range(len(bucket.params)):
            check_operands(*bucket.of(i), partial(name, i))
        return lambda: _update_(bucket, h)

    if not misfits:
        if values is None:
            return lambda: _native.prox_sgd_(reading, bucket.changed, h, bucket.first)
        on_devices = {
            device.index: values.on(device) for device in {p.device for p in bucket.params}
        }
        return lambda: _native.prox_sgd_(reading, bucket.changed, h, bucket.first, on_devices)

    # The uncommon way: some tensors need another layout, or aren't for the native kernels at all.
    pure: list[int] = []
    relaid: list[int] = []
    for misfit in misfits:
        i = misfit.index
        check_operands(*bucket.of(i), partial(name, i))
        if misfit.layout_only:
            relaid.append(i)
            continue
        if fused:
            raise RuntimeError(
                f"{name(i)}: fused=True, but {misfit.reason}"
                + (
                    f" ({_native.why_cuda_unusable(bucket.params[i].device.index or 0)})"
                    if misfit.cuda_unusable
                    else ""
                )
                + "; fused=None takes pure PyTorch for such tensors"
            )
        if misfit.cuda_unusable:
            _native.warn_unusable_cuda(bucket.params[i].device)
        pure.append(i)
    if values is not None:
        known = values.applied_to(h, partial(name, misfits[0].index), misfits[0].reason)
        if known is None:
            return None
        h = known
    return _prepare_mixed(bucket, h, relaid, pure)


def _run_on_parts(run: Callable[[], None], bucket: Bucket) -> None:
    """Runs a step of this process's parts and tells autograd that the whole has changed."""
    run()
    for tensors in bucket.changed:
        if tensors:
            torch.autograd.graph.increment_version(tensors)


def _prepare_mixed(
    bucket: Bucket, h: Hyperparameters, relaid: Sequence[int], pure: Sequence[int]
) -> Callable[[], None]:
    """A step for a bucket in which some tensors are laid out anew and some go the pure way."""

    @torch.no_grad()
    def run() -> None:
        grads = list(bucket.grads)
        states = [None if t is None else list(t) for t in (bucket.momenta, bucket.masters)]
        for i in relaid:
            for tensors in (grads, *states):
                if tensors is not None:
                    tensors[i] = _like(tensors[i], bucket.params[i])
        laid = Bucket(bucket.params, grads, states[0], states[1], bucket.first)
        left = set(pure)
        native = [i for i in range(len(bucket.params)) if i not in left]
        if native:
            some = laid.pick(native)
            _native.prox_sgd_(some.read(), some.changed, h, bucket.first)
        for stored, used in zip((bucket.momenta, bucket.masters), states, strict=True):
            if stored is not None and used is not None:
                for i in relaid:
                    if used[i] is not stored[i]:
                        stored[i].copy_(used[i])
        if pure:
            _update_(bucket.pick(pure), h)
        if bucket.zeros is not None:
            _count_zeros(bucket.params, bucket.zeros)

    return run


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor's values in the memory layout of ``model``; itself where it has it already."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def check_operands(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    master: Tensor | None,
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
    if param.dtype not in _COMPUTE_DTYPE:
        raise ValueError(
            f"{name()}: its dtype is {param.dtype}: must be float32, float64, bfloat16 or float16"
        )
    if not grad.is_floating_point():
        raise ValueError(f"{name()}: the gradient's dtype is {grad.dtype}: must be floating-point")
    _check_alike(param, grad, "the gradient", name)
    for key, value in (
        ("the parameter", param),
        ("momentum_buffer", momentum),
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
    if value.is_neg():
        raise ValueError(f"{name()}: {key} is a lazily negated view: call resolve_neg()")
    _check_alike(param, value, key, name)
    if not value.is_floating_point():
        raise ValueError(f"{name()}: {key}'s dtype is {value.dtype}: must be floating-point")
    _check_overlap(value, key, name)


def _check_alike(param: Tensor, other: Tensor, what: str, name: Callable[[], str]) -> None:
    """Refuses what has another shape than its parameter, or is elsewhere.

    Raises:
        ValueError: says what, and how it should be.
    """
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


def _check_overlap(tensor: Tensor, what: str, name: Callable[[], str]) -> None:
    """Refuses to write to a tensor whose elements share places, as after ``expand()``.

    Raises:
        ValueError: says which tensor of which parameter.
    """
    if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{name()}: {what} overlaps itself in memory (shape {tuple(tensor.shape)}, strides "
            f"{tensor.stride()}): must have a place for each element"
        )


_COMPUTE_DTYPE = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}

# Elements that the pure update works on at a time on a CPU, so that what one operation leaves is
# still in the cache when the next one reads it (bench/NOTES.md).
_CHUNK = 1 << 18
# Where calling an operation takes longer than the operation: those are called for lists.
_SMALL = 1 << 12


@torch.no_grad()
def _update_(bucket: Bucket, h: Hyperparameters) -> None:
    """The update in pure PyTorch."""
    workspace = _Workspace()
    coefficients: dict[torch.dtype, _Coefficients] = {}
    together: list[int] = []
    elements = 0
    for i, param in enumerate(bucket.params):
        size = param.numel()
        if param.is_cpu and size > _SMALL:
            dtype = _COMPUTE_DTYPE[param.dtype]
            if dtype not in coefficients:
                coefficients[dtype] = _coefficients(h, dtype)
            for p, g, m, master in _chunks(*bucket.of(i)):
                _update_chunk_(p, g, m, master, coefficients[dtype], dtype, bucket.first, workspace)
            continue
        if param.is_cpu and elements + size > _CHUNK:
            _update_each_(bucket.pick(together), h)
            together, elements = [], 0
        together.append(i)
        elements += size if param.is_cpu else 0
    if together:
        _update_each_(bucket.pick(together), h)
    if bucket.zeros is not None:
        _count_zeros(bucket.params, bucket.zeros)


def _update_chunk_(
    param: Tensor,
    grad: Tensor,
    momentum: Tensor | None,
    master: Tensor | None,
    c: _Coefficients,
    dtype: torch.dtype,
    first: bool,
    workspace: _Workspace,
) -> None:
    """The update of a chunk of a parameter on a CPU, one operation after another."""
    weight = param if master is None else master
    # What is stored in another type is widened, and rounded once when it is stored again.
    p = workspace.widened("p", weight, dtype)
    g = workspace.widened("g", grad, dtype)
    m = None if momentum is None else workspace.widened("m", momentum, dtype)
    _update_in_(_SINGLE, p, g, m, c, first, workspace.like("between", p, dtype))
    if p is not weight:
        weight.copy_(p)
    if momentum is not None and m is not None and m is not momentum:
        momentum.copy_(m)
    if master is not None:
        param.copy_(p)


def _update_each_(bucket: Bucket, h: Hyperparameters) -> None:
    """The update of lists, each operation on all tensors before the next."""
    kinds: dict[torch.dtype, list[int]] = {}
    for i, param in enumerate(bucket.params):
        kinds.setdefault(_COMPUTE_DTYPE[param.dtype], []).append(i)
    for dtype, members in kinds.items():
        params, grads, momenta, masters, first, *_ = bucket.pick(members)
        weights = params if masters is None else masters
        p, m, g = (
            [t if t.dtype is dtype else t.to(dtype) for t in tensors]
            for tensors in (weights, momenta or (), grads)
        )
        _update_in_(_FOREACH, p, g, m, _coefficients(h, dtype), first, None)
        targets = [(weights, p), (momenta or (), m)] + ([(params, p)] if masters else [])
        for stored, values in targets:
            for to, value in zip(stored, values, strict=True):
                if to is not value:
                    to.copy_(value)


class _Workspace:
    """Memory on a CPU for what is between two operations, the same for all chunks of a step.

    New memory for each chunk would be given back to the operating system and taken from it each
    time, which clears it page by page: that took as long as the arithmetic (bench/NOTES.md).
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, use: str, model: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the model's shape, for one use at a time."""
        size = model.numel()
        memory = self._memory.get((use, dtype))
        if memory is None or memory.numel() < size:
            # On a CPU whatever the default device is.
            memory = torch.empty(max(size, _CHUNK), dtype=dtype, device=model.device)
            self._memory[use, dtype] = memory
        shape = model.shape
        if len(shape) == 1:
            return memory if memory.numel() == size else memory[:size]
        if len(shape) == 4 and model.is_contiguous(memory_format=torch.channels_last):
            return memory.as_strided(shape, model.stride())
        return memory[:size].view(shape)

    def widened(self, use: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in another dtype; itself where it has it."""
        return tensor if tensor.dtype is dtype else self.like(use, tensor, dtype).copy_(tensor)


def _chunks(*tensors: Tensor | None) -> Iterable[Any]:
    """A parameter with what belongs to it, cut to chunks if it is large and laid out for that."""
    given = [t for t in tensors if t is not None]
    size = given[0].numel()
    if size <= _CHUNK:
        return (tensors,)
    if all(t.is_contiguous() for t in given):
        flat = [None if t is None else t.detach().view(-1) for t in tensors]
    elif given[0].dim() == 4 and all(
        t.is_contiguous(memory_format=torch.channels_last) for t in given
    ):
        flat = [None if t is None else t.detach().permute(0, 2, 3, 1).view(-1) for t in tensors]
    else:
        return (tensors,)
    return zip(*(repeat(None) if t is None else torch.split(t, _CHUNK) for t in flat), strict=False)


# The operations of the update: on one tensor, with ``out`` for what isn't stored, and on lists.
_SINGLE = SimpleNamespace(
    neg=torch.neg,
    mul=torch.mul,
    add=torch.add,
    clamp=torch.clamp,
    equal=torch.eq,
    copy_=Tensor.copy_,
    mul_=Tensor.mul_,
    add_=Tensor.add_,
    sub_=Tensor.sub_,
    masked_fill_=Tensor.masked_fill_,
)


def _clamp_each(tensors: list[Tensor], low: float, high: float, out: None) -> list[Tensor]:
    clamped = list(torch._foreach_clamp_min(tensors, low))
    torch._foreach_clamp_max_(clamped, high)
    return clamped


def _masked_fill_each_(tensors: list[Tensor], masks: list[Tensor], value: float) -> None:
    for tensor, mask in zip(tensors, masks, strict=True):
        tensor.masked_fill_(mask, value)


_FOREACH = SimpleNamespace(
    neg=lambda a, out: torch._foreach_neg(a),
    mul=lambda a, b, out: torch._foreach_mul(a, b),
    add=lambda a, b, alpha, out: torch._foreach_add(a, b, alpha=alpha),
    clamp=_clamp_each,
    equal=lambda a, b: [t == b for t in a],
    copy_=torch._foreach_copy_,
    mul_=torch._foreach_mul_,
    add_=torch._foreach_add_,
    sub_=torch._foreach_sub_,
    masked_fill_=_masked_fill_each_,
)


class _Coefficients(NamedTuple):
    """What the update multiplies and compares with."""

    factor: float
    weight_decay: float
    momentum: float
    dampening: float
    nesterov: bool
    maximize: bool
    lr: float
    threshold: float
    shrinkage: float
    frozen_zeros: bool


def _coefficients(h: Hyperparameters, dtype: torch.dtype) -> _Coefficients:
    k = h.gain
    return _Coefficients(
        factor=_rounded(_rounded(1 / h.grad_scale, dtype) * h.grad_coefficient, dtype),
        weight_decay=0.0 if h.proximal else h.weight_decay,
        momentum=h.momentum,
        dampening=h.dampening,
        nesterov=h.nesterov,
        maximize=h.maximize,
        lr=h.lr,
        threshold=0.0 if h.frozen_zeros else _rounded(h.lr * (h.l1 * k), dtype),
        shrinkage=1 / (1 + h.lr * (h.weight_decay * k)) if h.proximal else 1.0,
        frozen_zeros=h.frozen_zeros,
    )


def _update_in_(
    ops: SimpleNamespace,
    p: Any,
    g: Any,
    m: Any,
    c: _Coefficients,
    first: bool,
    scratch: Tensor | None,
) -> None:
    """The update in the compute type. ``add(alpha=)`` rounds once: it is an fma.

    With ``_SINGLE``, p, g and m are tensors, and ``scratch`` takes what isn't stored; with
    ``_FOREACH`` they are lists, and it is allocated.
    """
    frozen = ops.equal(p, 0) if c.frozen_zeros else None
    d = ops.neg(g, out=scratch) if c.maximize else g
    if c.factor != 1:
        d = ops.mul(d, c.factor, out=scratch)
    if c.weight_decay != 0:
        d = ops.add(d, p, alpha=c.weight_decay, out=scratch)
    s = d
    if c.momentum != 0:
        if first:
            ops.copy_(m, d)
        else:
            ops.mul_(m, c.momentum)
            ops.add_(m, d, alpha=1 - c.dampening)
        s = ops.add(d, m, alpha=c.momentum, out=scratch) if c.nesterov else m
    ops.add_(p, s, alpha=-c.lr)
    if c.threshold != 0:
        ops.sub_(p, ops.clamp(p, -c.threshold, c.threshold, out=scratch))
    if c.shrinkage != 1:
        ops.mul_(p, c.shrinkage)
    if frozen is not None:
        ops.masked_fill_(p, frozen, 0)


def _count_zeros(params: Sequence[Tensor], counters: Tensor) -> None:
    torch.stack([count_zeros(p) for p in params], out=counters)


def count_zeros(tensor: Tensor) -> Tensor:
    """The number of zeros, of either sign, as a tensor; takes no memory for each element."""
    return tensor.numel() - torch.count_nonzero(tensor)


def _rounded(value: float, dtype: torch.dtype) -> float:
    return value if dtype is torch.float64 else ctypes.c_float(value).value
