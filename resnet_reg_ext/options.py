"""A parameter group's options: checked once, then carried in one frozen dataclass."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

L2_MODES = ("coupled", "proximal")
TOWARD = ("zero", "start")
MOMENTUM_DTYPES = (None, torch.float32, torch.bfloat16)
# Options that say how to compute, not what: a checkpoint doesn't change them.
HOW_TO_COMPUTE = ("fused", "capturable", "master_weights", "momentum_dtype", "track_sparsity")

_FLOAT32_MAX = torch.finfo(torch.float32).max
# A schedule that ends at 0 may end this far below it, relative to where it began.
_UNDERSHOOT = 1e-6


@dataclass(frozen=True)
class Options:
    """The options that the update depends on, as checked numbers.

    The native core has a struct with the same field names (``csrc/prox_sgd.h``).
    """

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    l1: float
    nesterov: bool
    maximize: bool
    proximal: bool
    """l2_mode="proximal"; coupled otherwise."""
    frozen_zeros: bool
    grad_scale: float = 1.0
    """A float32 number by which gradients are divided."""
    grad_coefficient: float = 1.0
    """A float32 number with which gradients are multiplied."""

    @property
    def k(self) -> float:
        """The step that momentum makes of a constant gradient, in units of lr."""
        return 1.0 if self.momentum == 0 else (1 - self.dampening) / (1 - self.momentum)

    @property
    def l1_threshold(self) -> float:
        """The threshold t1 = lr·(l1·k), in float64 in this order; 0 where zeros are frozen."""
        return 0.0 if self.frozen_zeros else self.lr * (self.l1 * self.k)

    @property
    def l2_factor(self) -> float:
        """The factor r = 1/(1 + lr·(weight_decay·k)), in float64; 1 unless ``proximal``."""
        return 1 / (1 + self.lr * (self.weight_decay * self.k)) if self.proximal else 1.0

    @classmethod
    def from_group(
        cls, group: Mapping[str, Any], where: str = "", on_device: dict[str, Tensor] | None = None
    ) -> Options:
        """Checks a group's options.

        Args:
            group: has every option of :class:`resnet_reg_ext.ProxSGD`.
            where: what an error begins with, before the option's name.
            on_device: collects an ``lr`` or ``l1`` that is in a CUDA device's memory; the field is
                0 then. Without it the host waits for the value.

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
        _check_choices(group, where)
        options = cls(
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=_number(group, "weight_decay", where),
            l1=_number(group, "l1", where, on_device),
            nesterov=nesterov,
            maximize=bool(group["maximize"]),
            proximal=group["l2_mode"] == "proximal",
            frozen_zeros=bool(group["frozen_zeros"]),
        )
        if options.lr * max(options.l1, options.weight_decay) * options.k > _FLOAT32_MAX:
            raise ValueError(
                f"{where}lr {options.lr}, l1 {options.l1} and weight_decay {options.weight_decay} "
                f"with momentum {options.momentum}: their product is beyond float32"
            )
        return options


def group_lasso_of(group: Mapping[str, Any], where: str = "") -> float:
    """A group's coefficient of the group lasso, checked; 0 where the group has none.

    Raises:
        ValueError: it is out of its range; names its value.
    """
    return _number(group, "group_lasso", where) if "group_lasso" in group else 0.0


def _check_choices(group: Mapping[str, Any], where: str) -> None:
    if group["l2_mode"] not in L2_MODES:
        raise ValueError(f"{where}l2_mode is {group['l2_mode']!r}: must be one of {L2_MODES}")
    check_toward(group.get("toward", "zero"), where)
    if group["fused"] is not None and not isinstance(group["fused"], bool):
        raise ValueError(f"{where}fused is {group['fused']!r}: must be None, True or False")
    if group.get("momentum_dtype") not in MOMENTUM_DTYPES:
        raise ValueError(
            f"{where}momentum_dtype is {group['momentum_dtype']!r}: must be None, torch.float32 or "
            "torch.bfloat16"
        )


def check_toward(toward: Any, where: str) -> None:
    """Refuses an option ``toward`` that is none.

    Raises:
        ValueError: gives the value; begins with ``where``.
    """
    if toward not in TOWARD:
        raise ValueError(f"{where}toward is {toward!r}: must be one of {TOWARD}")


def _number(
    group: Mapping[str, Any], key: str, where: str, on_device: dict[str, Tensor] | None = None
) -> float:
    """A group's number, checked; ``on_device`` as for :meth:`Options.from_group`."""
    value = group[key]
    if type(value) is float and 0 <= value <= _FLOAT32_MAX:
        return value
    name = f"{where}{key}"
    if on_device is not None and isinstance(value, Tensor) and value.is_cuda:
        on_device[key] = one_element(value, name)
        return 0.0
    number = to_number(value, name)
    if number < 0 and number >= -_UNDERSHOOT * float(group.get(f"initial_{key}", 0.0)):
        return 0.0
    return _checked(number, value, name)


def to_number(value: Any, name: str) -> float:
    """A number, or a tensor's only element.

    Raises:
        ValueError: it is neither; says what ``name`` is.
    """
    if isinstance(value, Tensor):
        value = one_element(value, name)
    try:
        if isinstance(value, str):  # float() would read "0.1"
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r}: must be a number") from None


def finite_and_not_negative(value: Any, name: str) -> float:
    """A number >= 0 within float32's range.

    Raises:
        ValueError: it isn't; says what ``name`` is.
    """
    return _checked(to_number(value, name), value, name)


def _checked(number: float, value: Any, name: str) -> float:
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {value}: must be finite and not negative")
    if number > _FLOAT32_MAX:
        raise ValueError(f"{name} is {value}: must be within float32's range")
    return number


def one_element(value: Tensor, name: str) -> Tensor:
    """The tensor, which must hold one real number.

    Raises:
        ValueError: it doesn't; says what ``name`` is.
    """
    if value.numel() != 1:
        raise ValueError(f"{name} is a tensor of shape {tuple(value.shape)}: must be a number")
    if value.is_meta or value.is_complex():
        raise ValueError(f"{name} is {value!r}: must be a number")
    return value
