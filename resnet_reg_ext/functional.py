"""The update in functions: the readable definition, and the choice of who carries it out.

Everything here is pure PyTorch and runs on any device. :func:`prox_sgd_` hands what it can to the
native kernels, which give the same bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native

L2_MODES = ("coupled", "proximal")

_FLOAT32_MAX = torch.finfo(torch.float32).max


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
        ValueError: the threshold is negative, infinite or NaN.
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
        ValueError: a coefficient is negative, infinite or NaN.
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

    @property
    def gain(self) -> float:
        """k: how far momentum carries a constant gradient, in units of lr."""
        return 1.0 if self.momentum == 0 else (1 - self.dampening) / (1 - self.momentum)


def hyperparameters(group: Mapping[str, Any], where: str = "") -> Hyperparameters:
    """Checks a group's options.

    Args:
        group: holds ``lr``, ``momentum``, ``dampening``, ``weight_decay``, ``nesterov``, ``l1``,
            ``l2_mode``, ``maximize`` and ``fused``.
        where: what to put before an option's name in an error.

    Raises:
        ValueError: an option is out of its range; names it and its value.
    """

    def number(key: str) -> float:
        return _finite_and_not_negative(group[key], f"{where}{key}")

    lr = number("lr")
    momentum = number("momentum")
    if not momentum < 1:
        raise ValueError(
            f"{where}momentum is {group['momentum']}: must be in [0, 1), "
            "as the L1 threshold divides by 1 - momentum"
        )
    dampening = number("dampening")
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
    if group["fused"] not in (None, True, False):
        raise ValueError(f"{where}fused is {group['fused']!r}: must be None, True or False")
    h = Hyperparameters(
        lr,
        momentum,
        dampening,
        number("weight_decay"),
        number("l1"),
        nesterov,
        bool(group["maximize"]),
        group["l2_mode"] == "proximal",
    )
    if h.lr * max(h.l1, h.weight_decay) * h.gain > _FLOAT32_MAX:
        raise ValueError(
            f"{where}lr {h.lr}, l1 {h.l1} and weight_decay {h.weight_decay} with momentum "
            f"{h.momentum}: their product is beyond float32"
        )
    return h


def _finite_and_not_negative(value: Any, name: str) -> float:
    if type(value) is float:
        number = value
    else:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}: must be a number")
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {value!r}: must be a number") from None
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {value}: must be finite and not negative")
    if number > _FLOAT32_MAX:
        raise ValueError(f"{name} is {value}: must be within float32, which is computed in")
    return number


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
        fused: None takes the native kernels for the tensors that they can take and pure PyTorch for
            the others; True raises where they can't; False takes pure PyTorch.

    Raises:
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
    }
    h = hyperparameters(options)
    if h.momentum != 0 and momentum_buffers is None:
        raise ValueError(f"momentum is {momentum}: momentum_buffers must be given")
    buffers = list(momentum_buffers) if momentum_buffers is not None and h.momentum != 0 else None
    for name, tensors in (("params", params), ("grads", grads), ("momentum_buffers", buffers)):
        if tensors is not None and len(tensors) != len(params):
            raise ValueError(f"{len(params)} params, but {len(tensors)} {name}")
        if name != "grads" and any(map(Tensor.is_neg, tensors or ())):
            raise ValueError(f"{name} holds a lazily negated view: call resolve_neg() on it")
    prepare_prox_sgd(
        list(params), list(grads), buffers, h, first_step, fused, "params[{}]".format
    )()


def prepare_prox_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor] | None,
    h: Hyperparameters,
    first: bool,
    fused: bool | None,
    name: Callable[[int], str],
) -> Callable[[], None]:
    """Checks all that :func:`prox_sgd_` needs and returns the step, which then can't be refused.

    So that an optimizer can check every bucket before it changes the first one. ``name`` turns an
    index into words for an error.
    """
    if fused is False or not _native.available() or torch.compiler.is_compiling():
        if fused:
            reason = _native.missing or "a step can't be compiled by torch.compile with fused=True"
            raise RuntimeError(f"fused=True: {reason}; fused=None takes pure PyTorch instead")
        for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
            check_triple(param, grad, momenta[i] if momenta else None, name(i))
        return lambda: _update_(params, grads, momenta, h, first)

    # DLPack's exchange API doesn't tell of lazy negation (torch._neg_view, x.conj().imag).
    if any(map(Tensor.is_neg, grads)):
        grads = [grad.resolve_neg() for grad in grads]
    reading = _native.read(params, grads, momenta)
    misfits = _native.misfits(reading)
    if not misfits:
        return lambda: _native.prox_sgd_(reading, params, momenta, h, first)

    # The uncommon way: some tensors need another layout, or aren't for the native kernels at all.
    pure: list[int] = []
    relaid: list[int] = []
    for misfit in misfits:
        i = misfit.position
        check_triple(params[i], grads[i], momenta[i] if momenta else None, name(i))
        if misfit.layout_only:
            relaid.append(i)
            continue
        if fused:
            raise RuntimeError(
                f"{name(i)}: fused=True, but {misfit.reason}"
                + (
                    f" ({_native.why_cuda_unusable(params[i].device.index or 0)})"
                    if misfit.cuda_unusable
                    else ""
                )
                + "; fused=None takes pure PyTorch for such tensors"
            )
        if misfit.cuda_unusable:
            _native.warn_unusable_cuda(params[i].device)
        pure.append(i)
    return _prepare_mixed(params, grads, momenta, h, first, relaid, pure)


def _prepare_mixed(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor] | None,
    h: Hyperparameters,
    first: bool,
    relaid: Sequence[int],
    pure: Sequence[int],
) -> Callable[[], None]:
    """A step for a bucket in which some tensors are laid out anew and some go the pure way."""

    def pick(tensors: list[Tensor] | None, indices: Sequence[int]) -> list[Tensor] | None:
        return None if tensors is None else [tensors[i] for i in indices]

    @torch.no_grad()
    def run() -> None:
        native_grads = list(grads)
        native_momenta = None if momenta is None else list(momenta)
        for i in relaid:
            native_grads[i] = _like(grads[i], params[i])
            if momenta is not None and native_momenta is not None:
                native_momenta[i] = _like(momenta[i], params[i])
        left = set(pure)
        native = [i for i in range(len(params)) if i not in left]
        if native:
            some = [params[i] for i in native]
            buffers = pick(native_momenta, native)
            reading = _native.read(some, [native_grads[i] for i in native], buffers)
            _native.prox_sgd_(reading, some, buffers, h, first)
        if momenta is not None and native_momenta is not None:
            for i in relaid:
                if native_momenta[i] is not momenta[i]:
                    momenta[i].copy_(native_momenta[i])
        if pure:
            _update_(
                [params[i] for i in pure],
                [grads[i] for i in pure],
                pick(momenta, pure),
                h,
                first,
            )

    return run


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """The tensor's values in the memory layout of ``model``; itself where it has it already."""
    if tensor.stride() == model.stride():
        return tensor
    return torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def check_triple(param: Tensor, grad: Tensor, momentum: Tensor | None, name: str) -> None:
    """Refuses what no backend can update.

    Raises:
        ValueError: names the parameter and what is wrong with it.
    """
    if param.is_complex() or grad.is_complex():
        raise ValueError(f"{name}: complex parameters and gradients are not supported")
    if param.layout is not torch.strided:
        raise ValueError(f"{name}: the parameter's layout is {param.layout}: must be strided")
    if any(n > 1 and s == 0 for n, s in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(
            f"{name}: the parameter overlaps itself in memory (shape {tuple(param.shape)}, strides "
            f"{param.stride()}): must have a place for each element"
        )
    if grad.layout is not torch.strided:
        raise ValueError(
            f"{name}: the gradient is sparse ({grad.layout}): sparse gradients are not supported"
        )
    if param.dtype not in _COMPUTE_DTYPE:
        raise ValueError(
            f"{name}: its dtype is {param.dtype}: must be float32, float64, bfloat16 or float16"
        )
    if not grad.is_floating_point():
        raise ValueError(f"{name}: the gradient's dtype is {grad.dtype}: must be floating-point")
    if grad.shape != param.shape:
        raise ValueError(
            f"{name}: the gradient's shape is {tuple(grad.shape)}: must be the parameter's, "
            f"{tuple(param.shape)}"
        )
    if grad.device != param.device:
        raise ValueError(
            f"{name}: the gradient is on {grad.device}: must be where the parameter is, "
            f"on {param.device}"
        )
    if momentum is not None:
        check_momentum(param, momentum, name)


def check_momentum(param: Tensor, momentum: Any, name: str) -> None:
    """Refuses a momentum buffer that isn't the parameter's.

    Raises:
        ValueError: names the parameter and what is wrong with the buffer.
    """
    if not isinstance(momentum, Tensor):
        raise ValueError(f"{name}: momentum_buffer is {momentum!r}: must be a tensor")
    if momentum.is_neg():
        raise ValueError(f"{name}: momentum_buffer is a lazily negated view: call resolve_neg()")
    if momentum.shape != param.shape:
        raise ValueError(
            f"{name}: momentum_buffer's shape is {tuple(momentum.shape)}: must be the "
            f"parameter's, {tuple(param.shape)}"
        )
    if momentum.device != param.device:
        raise ValueError(
            f"{name}: momentum_buffer is on {momentum.device}: must be where the parameter is, "
            f"on {param.device}"
        )
    if not momentum.is_floating_point():
        raise ValueError(
            f"{name}: momentum_buffer's dtype is {momentum.dtype}: must be floating-point"
        )


_COMPUTE_DTYPE = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}


@torch.no_grad()
def _update_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor] | None,
    h: Hyperparameters,
    first: bool,
) -> None:
    """The update in pure PyTorch."""
    for dtype in (torch.float32, torch.float64):
        chosen = [i for i, p in enumerate(params) if _COMPUTE_DTYPE[p.dtype] is dtype]
        if not chosen:
            continue
        # What is stored in another type is widened, and rounded once when it is stored again.
        stored = [params[i] for i in chosen]
        p = [t.to(dtype) for t in stored]
        g = [grads[i].to(dtype) for i in chosen]
        stored_m = [momenta[i] for i in chosen] if momenta is not None else []
        m = [t.to(dtype) for t in stored_m]
        _update_in_(dtype, p, g, m, h, first)
        for to, value in zip(stored + stored_m, p + m, strict=True):
            if to is not value:
                to.copy_(value)


def _update_in_(
    dtype: torch.dtype,
    p: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    h: Hyperparameters,
    first: bool,
) -> None:
    """The update on tensors of the compute type. ``add(alpha=)`` rounds once: it is an fma."""
    k = h.gain
    threshold = _rounded(h.lr * (h.l1 * k), dtype)
    d = torch._foreach_neg(g) if h.maximize else g
    if h.weight_decay != 0 and not h.proximal:
        d = torch._foreach_add(d, p, alpha=h.weight_decay)
    s = d
    if m:
        if first:
            torch._foreach_copy_(m, d)
        else:
            torch._foreach_mul_(m, h.momentum)
            torch._foreach_add_(m, d, alpha=1 - h.dampening)
        s = torch._foreach_add(d, m, alpha=h.momentum) if h.nesterov else m
    torch._foreach_add_(p, s, alpha=-h.lr)
    if threshold != 0:
        inside = torch._foreach_clamp_min(p, -threshold)
        torch._foreach_clamp_max_(inside, threshold)
        torch._foreach_sub_(p, inside)
    if h.weight_decay != 0 and h.proximal:
        torch._foreach_mul_(p, 1 / (1 + h.lr * (h.weight_decay * k)))


def _rounded(value: float, dtype: torch.dtype) -> float:
    return value if dtype is torch.float64 else ctypes.c_float(value).value
