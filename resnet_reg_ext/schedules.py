"""Schedules of l1: any scheduler of ``torch.optim.lr_scheduler``, applied to l1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .sparsity import has_l1


class BaseL1Scheduler(LRScheduler):
    """Base class of the schedulers of l1. They move the groups whose l1 is above 0 at construction.

    It derives from ``LRScheduler`` so that trainers step, save and restore it, and it has that
    class's attributes, which hold l1 here instead of learning rates. None of that class's code is
    used, as it would move lr. Groups are held by index, as loading a checkpoint replaces their
    dicts.
    """

    base_lrs: list[Any]
    """The first l1 of every group that is steered."""
    _option = "l1"
    """The groups' option that is moved."""

    def __init__(self, optimizer: Optimizer) -> None:
        name = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{name}: optimizer is a {type(optimizer).__name__}: must be ProxSGD")
        # The groups of torch's optimizers may have an l1 too, which they keep and do not apply.
        if type(optimizer).__module__.startswith("torch.optim."):
            raise TypeError(
                f"{name}: optimizer is torch's {type(optimizer).__name__}, which applies no l1: "
                "must be ProxSGD"
            )
        self.optimizer = optimizer
        self.last_epoch = 0
        # As in torch, one more than the number of step() calls. Accelerate adds to it.
        self._step_count = 1
        self._groups = [i for i, g in enumerate(optimizer.param_groups) if self._is_steered(g)]
        if not self._groups:
            raise ValueError(f"{name}: no parameter group has {self._what_is_steered}")
        for i in self._groups:
            value = optimizer.param_groups[i][self._option]
            if isinstance(value, torch.Tensor) and not value.is_floating_point():
                raise TypeError(
                    f"{name}: param_groups[{i}]: {self._option} is a tensor of {value.dtype}: must "
                    "be of a floating-point dtype, to be moved"
                )
        self.base_lrs = self.get_last_l1()

    def _is_steered(self, group: dict[str, Any]) -> bool:
        return bool(group.get("l1", 0.0) > 0)

    @property
    def _what_is_steered(self) -> str:
        return "an l1 above 0"

    def _steered(self) -> list[dict[str, Any]]:
        return [self.optimizer.param_groups[i] for i in self._groups]

    def _set_l1(self, values: list[float]) -> None:
        for group, value in zip(self._steered(), values, strict=True):
            if isinstance(group[self._option], torch.Tensor):
                group[self._option].fill_(value)
            else:
                group[self._option] = value

    def get_last_l1(self) -> list[float]:
        """The l1 of every group that is steered, in the optimizer's order.

        Of a :class:`TargetSparsity` of channels or multiply-adds, the group_lasso.
        """
        return [float(group[self._option]) for group in self._steered()]

    def get_last_lr(self) -> list[Any]:
        """The same as :meth:`get_last_l1`, for trainers that log what a scheduler has set."""
        return self.get_last_l1()

    @property
    def _last_lr(self) -> list[Any]:  # type: ignore[override]
        return self.get_last_l1()

    def get_lr(self) -> list[Any]:
        """The same as :meth:`get_last_l1`, for programs that log it.

        Raises:
            TypeError: the caller is about to set lr to it, as pytorch-ignite's ``LRScheduler`` is.
                Call :meth:`step` after ``optimizer.step()`` instead.
        """
        # Who calls get_lr to set lr says so by this flag, in torch and elsewhere.
        if self._get_lr_called_within_step:
            self._get_lr_called_within_step = False
            raise TypeError(
                f"{type(self).__name__} moves l1: lr can't be set to what its get_lr() gives. Call "
                "its step() after each optimizer.step(); with pytorch-ignite: trainer."
                "add_event_handler(Events.ITERATION_COMPLETED, lambda engine: scheduler.step())"
            )
        return self.get_last_l1()

    def _initial_step(self) -> None:
        # SequentialLR calls it, after it has set lr back.
        raise TypeError(
            f"{type(self).__name__} can't be chained by torch's schedulers, which would move lr. "
            "Chain what moves l1 inside: L1Scheduler(optimizer, lambda o: SequentialLR(o, ...))"
        )

    def _check_groups(self, state: dict[str, Any]) -> None:
        if state["groups"] != self._groups:
            raise ValueError(
                f"{type(self).__name__}: the state is that of param_groups {state['groups']}, "
                f"but those with {'an' if self._option == 'l1' else 'a'} {self._option} are "
                f"{self._groups}"
            )


class L1Scheduler(BaseL1Scheduler):
    """Moves l1 as any of ``torch.optim.lr_scheduler``'s classes moves lr.

    The groups whose l1 is above 0 at construction are scheduled, each from its own l1. That first
    value stays in the group as ``initial_l1``, and a later schedule of the group starts from it
    too, as with lr. The other groups, and lr, are left alone.

    Args:
        optimizer: a :class:`resnet_reg_ext.ProxSGD`.
        schedule: a class of ``torch.optim.lr_scheduler``, or a function that takes an optimizer
            and returns a scheduler of it. It is given a stand-in whose groups have l1 as their lr.
        options: further arguments of ``schedule``. An option with one value for each group, such
            as ``LambdaLR``'s functions, has one for each scheduled group.

    Raises:
        TypeError: ``optimizer`` isn't one that applies an l1, or ``schedule`` made no scheduler of
            the optimizer that it was given.
        ValueError: no group has an l1 above 0.

    Example:
        >>> l1_schedule = L1Scheduler(optimizer, CosineAnnealingLR, T_max=1000)
        >>> l1_schedule = L1Scheduler(  # a warm-up of 100 steps, then tenfold less every 300
        ...     optimizer,
        ...     lambda o: SequentialLR(
        ...         o,
        ...         [LinearLR(o, 0.01, total_iters=100), StepLR(o, 300)],
        ...         milestones=[100],
        ...     ),
        ... )
        >>> optimizer.step()
        >>> l1_schedule.step()
    """

    def __init__(self, optimizer: Optimizer, schedule: Callable[..., Any], **options: Any) -> None:
        super().__init__(optimizer)
        groups: list[dict[str, Any]] = []
        for group in self._steered():
            groups.append(
                {"params": [torch.nn.Parameter(torch.empty(0))], "lr": float(group["l1"])}
            )
            if "initial_l1" in group:
                groups[-1]["initial_lr"] = group["initial_l1"]
        self._stand_in = torch.optim.SGD(groups, lr=0.0)
        self._schedule = schedule(self._stand_in, **options)
        steered = getattr(self._schedule, "optimizer", self._stand_in)
        if steered is not self._stand_in or not hasattr(self._schedule, "step"):
            raise TypeError(
                f"L1Scheduler: schedule made a {type(self._schedule).__name__}: must make a "
                "scheduler of the optimizer that it is given"
            )
        for group, stand_in in zip(self._steered(), self._stand_in.param_groups, strict=True):
            group["initial_l1"] = stand_in.get("initial_lr", stand_in["lr"])
        self.base_lrs = [float(group["initial_l1"]) for group in self._steered()]
        self._follow()

    def _is_steered(self, group: dict[str, Any]) -> bool:
        return has_l1(group)

    def _follow(self) -> None:
        """Copies the stand-in's lr to l1."""
        # Rounding can take a schedule that ends at 0, such as LinearLR, below it.
        self._set_l1([max(0.0, float(group["lr"])) for group in self._stand_in.param_groups])

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Goes to the next l1; after ``optimizer.step()``.

        Args:
            args: arguments of the scheduler's own ``step``, such as the metric of
                ``ReduceLROnPlateau``.
            kwargs: the same by name.
        """
        for group, l1 in zip(self._stand_in.param_groups, self.get_last_l1(), strict=True):
            group["lr"] = l1  # a checkpoint of the optimizer may have been loaded since
        self._stand_in.step()  # a scheduler warns where its optimizer has not stepped
        self._schedule.step(*args, **kwargs)
        self.last_epoch += 1
        self._step_count += 1
        self._follow()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state."""
        return {
            "groups": self._groups,
            "l1": self.get_last_l1(),
            "last_epoch": self.last_epoch,
            "base_lrs": self.base_lrs,
            "_step_count": self._step_count,
            "schedule": self._schedule.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, and sets l1; before or after the optimizer's.

        Raises:
            ValueError: other groups were scheduled.
        """
        self._check_groups(state_dict)
        l1, last_epoch = state_dict["l1"], state_dict["last_epoch"]
        self._schedule.load_state_dict(state_dict["schedule"])
        self.last_epoch = last_epoch
        # Version 0.1.0 saved neither of these two.
        self.base_lrs = list(state_dict.get("base_lrs", self.base_lrs))
        self._step_count = state_dict.get("_step_count", last_epoch + 1)
        self._set_l1(l1)
