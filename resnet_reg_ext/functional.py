"""The proximal maps, and one step of proximal SGD as a function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import dispatch
from .backends.bucket import Bucket, Skip
from .backends.checks import check_not_negated
from .options import Options, finite_and_not_negative

__all__ = ["elastic_net_prox", "group_soft_threshold", "prox_sgd_", "soft_threshold"]


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

    Example:
        >>> soft_threshold(torch.tensor([3.0, -0.5, -2.0]), 1.0)
        tensor([ 2.,  0., -1.])
    """
    t = finite_and_not_negative(threshold, "threshold")
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

    Example:
        >>> elastic_net_prox(torch.tensor([3.0, -0.5]), l1=1.0, weight_decay=1.0)
        tensor([1., 0.])
    """
    s = finite_and_not_negative(step, "step")
    t = s * finite_and_not_negative(l1, "l1")
    return soft_threshold(x, t) * (
        1 / (1 + s * finite_and_not_negative(weight_decay, "weight_decay"))
    )


def group_soft_threshold(x: Tensor, threshold: float | Tensor, dim: int = 0) -> Tensor:
    r"""The proximal map of the group lasso, whose groups are the slices of x along ``dim``.

    .. math:: u_g = \max(1 - t_g / \lVert x_g \rVert_2,\ 0)\; x_g
              = \arg\min_u \tfrac12 \lVert u - x_g \rVert_2^2 + t_g \lVert u \rVert_2

    Gives +0 for a whole group where its norm is at most t, a group of zeros included. A NaN makes
    its group NaN. Norms are computed in float64. Applied to what :func:`soft_threshold` gives, it
    is the proximal map of both penalties' sum. (Yuan and Lin, *Model selection and estimation in
    regression with grouped variables*, 2006; Simon et al., *A sparse-group lasso*, 2013.)

    Args:
        x: a floating-point tensor of one or more dimensions.
        threshold: t >= 0, finite: a number, or a tensor of one for each slice.
        dim: the dimension along which groups lie: ``x.select(dim, i)`` is one.

    Returns:
        A new tensor of x's shape and dtype. Differentiable in x; the gradient is 0 in groups that
        are set to zero, the kink included.

    Raises:
        ValueError: a threshold is negative, NaN or infinite, there is neither one nor one for each
            slice, or x has no dimensions.

    Example:
        >>> group_soft_threshold(torch.tensor([[6.0, 8.0], [0.6, 0.8]]), 5.0)
        tensor([[3., 4.],
                [0., 0.]])
    """
    if x.dim() == 0:
        raise ValueError("x has no dimensions: must have one along which groups lie")
    dim = range(x.dim())[dim]
    t = torch.as_tensor(threshold, dtype=torch.float64, device=x.device)
    if t.shape not in ((), (1,), (x.shape[dim],)):
        raise ValueError(
            f"threshold's shape is {tuple(t.shape)}: must be one number, or ({x.shape[dim]},), one "
            f"for each slice along dimension {dim}"
        )
    if not bool(((t >= 0) & t.isfinite()).all()):
        raise ValueError(f"threshold is {threshold}: must be finite and not negative")
    t = t.reshape([-1 if d == dim else 1 for d in range(x.dim())])
    squares = x.double().square()
    others = [d for d in range(x.dim()) if d != dim]
    square_sums = squares.sum(others, keepdim=True) if others else squares
    dead = square_sums.sqrt() <= t
    # Where the norm isn't used it must not be 0 either: its derivative would be infinite.
    norms = torch.where(square_sums == 0, torch.ones_like(square_sums), square_sums).sqrt()
    factors = torch.where(dead, torch.zeros_like(norms), 1 - t / norms).to(x.dtype)
    return torch.where(dead, torch.zeros_like(x), x * factors)


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
    starts: Sequence[Tensor] | None = None,
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
        starts: what the penalties pull towards instead of zero, as with ``toward="start"`` of
            :class:`resnet_reg_ext.ProxSGD`: one for each parameter, of its shape; not changed. The
            native kernels take those of the dtype that the step updates.
        frozen_zeros: weights that are 0, or at their start, stay there; ``l1`` is not applied.
        fused: None takes the native kernels for the tensors that they can take and pure PyTorch for
            the others; True raises where they can't; False takes pure PyTorch.

    Raises:
        TypeError: something other than a tensor is in a list. Nothing has changed then.
        ValueError: an option, a shape, a device or a dtype is wrong. Nothing has changed then.
        RuntimeError: ``fused=True`` and a tensor can't go the native way. Nothing has changed then.

    Example:
        >>> w, grad = torch.tensor([1.0, -0.125]), torch.tensor([0.5, 0.0])
        >>> prox_sgd_([w], [grad], lr=0.5, l1=0.5)
        >>> w
        tensor([0.5000, 0.0000])
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
    checked = Options.from_group(options)
    if checked.momentum != 0 and momentum_buffers is None:
        raise ValueError(f"momentum is {momentum}: momentum_buffers must be given")
    buffers = momentum_buffers if checked.momentum != 0 else None
    bucket = Bucket(
        params=list(params),
        grads=list(grads),
        momentum_buffers=None if buffers is None else list(buffers),
        master_params=None if master_weights is None else list(master_weights),
        first_step=first_step,
        starts=None if starts is None else list(starts),
        name="params[{}]".format,
    )
    _check_lists(bucket)
    run = dispatch.prepare(bucket, checked, fused=fused)
    assert not isinstance(run, Skip)  # only found_inf, which isn't given, skips a step
    run()


def _check_lists(bucket: Bucket) -> None:
    """Refuses lists of different lengths, and what isn't a tensor or is a lazily negated one."""
    for name, tensors in (
        ("params", bucket.params),
        ("grads", bucket.grads),
        ("momentum_buffers", bucket.momentum_buffers),
        ("master_weights", bucket.master_params),
        ("starts", bucket.starts),
    ):
        if tensors is not None and len(tensors) != len(bucket.params):
            raise ValueError(f"{len(bucket.params)} params, but {len(tensors)} {name}")
        for i, tensor in enumerate(tensors or ()):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}[{i}] is a {type(tensor).__name__}: must be a tensor")
            if name != "grads":
                check_not_negated(tensor, "it", f"{name}[{i}]".format)
