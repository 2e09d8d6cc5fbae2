"""What changes l1 while training: a schedule, or a controller that is told the share of zeros."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .sparsity import has_l1, sparsity


class _L1Steering(LRScheduler):
    """What both have in common: the groups whose l1 is above 0 at construction, by their index.

    It is an ``LRScheduler`` so that trainers step, save and restore it as one; of that class's code
    nothing is used. Groups are held by index, as loading a checkpoint replaces their dicts.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        name = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{name}: optimizer is a {type(optimizer).__name__}: must be ProxSGD")
        # Its groups may well have an l1, which it keeps and does nothing with.
        if type(optimizer).__module__.startswith("torch.optim."):
            raise TypeError(
                f"{name}: optimizer is torch's {type(optimizer).__name__}, which applies no l1: "
                "must be ProxSGD"
            )
        self.optimizer = optimizer
        self.last_epoch = 0
        self._groups = [i for i, g in enumerate(optimizer.param_groups) if self._is_steered(g)]
        if not self._groups:
            raise ValueError(f"{name}: no parameter group has an l1 above 0")
        for i in self._groups:
            l1 = optimizer.param_groups[i]["l1"]
            if isinstance(l1, torch.Tensor) and not l1.is_floating_point():
                raise TypeError(
                    f"{name}: param_groups[{i}]: l1 is a tensor of {l1.dtype}: must be of a "
                    "floating-point dtype, to be moved"
                )

    def _is_steered(self, group: dict[str, Any]) -> bool:
        return bool(group.get("l1", 0.0) > 0)

    def _steered(self) -> list[dict[str, Any]]:
        return [self.optimizer.param_groups[i] for i in self._groups]

    def _set_l1(self, values: list[float]) -> None:
        for group, value in zip(self._steered(), values, strict=True):
            if isinstance(group["l1"], torch.Tensor):
                group["l1"].fill_(value)
            else:
                group["l1"] = value

    def get_last_l1(self) -> list[float]:
        """The l1 of every group that is steered, in the optimizer's order."""
        return [float(group["l1"]) for group in self._steered()]

    def get_last_lr(self) -> list[Any]:
        """The same as :meth:`get_last_l1`, for trainers that log what a scheduler has set."""
        return self.get_last_l1()

    def _initial_step(self) -> None:
        # What SequentialLR calls, after it has set lr back.
        raise TypeError(
            f"{type(self).__name__} can't be chained by torch's schedulers, which would move lr. "
            "Chain what moves l1 inside: L1Scheduler(optimizer, lambda o: SequentialLR(o, ...))"
        )

    def _check_groups(self, state: dict[str, Any]) -> None:
        if state["groups"] != self._groups:
            raise ValueError(
                f"{type(self).__name__}: the state is that of param_groups {state['groups']}, "
                f"but those with an l1 are {self._groups}"
            )


class L1Scheduler(_L1Steering):
    """Moves l1 as any of ``torch.optim.lr_scheduler``'s classes moves lr.

    The groups whose l1 is above 0 at construction are scheduled, each from its own l1; that stays
    in the group as ``initial_l1``, from which another schedule of the group starts too, as with
    lr. The other groups, and lr, are left alone.

    Args:
        optimizer: a :class:`resnet_reg_ext.ProxSGD`.
        schedule: a class of ``torch.optim.lr_scheduler``, or a function that makes a scheduler for
            the optimizer that it is given: one in whose groups l1 stands as lr.
        options: what ``schedule`` is called with besides. Where an option is a list with a value
            for each group (``LambdaLR``'s functions), it is for the scheduled groups.

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
        self._follow()

    def _is_steered(self, group: dict[str, Any]) -> bool:
        return has_l1(group)

    def _follow(self) -> None:
        """Sets l1 to what the schedule has made of the stand-in's lr."""
        # Rounding takes some schedules that end at 0 below it.
        self._set_l1([max(0.0, float(group["lr"])) for group in self._stand_in.param_groups])

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Goes to the next l1; after ``optimizer.step()``.

        Args:
            args: what the scheduler's own ``step`` takes, such as the metric of
                ``ReduceLROnPlateau``.
            kwargs: the same by name.
        """
        for group, l1 in zip(self._stand_in.param_groups, self.get_last_l1(), strict=True):
            group["lr"] = l1  # a checkpoint of the optimizer may have been loaded since
        self._stand_in.step()  # a scheduler warns where its optimizer has not stepped
        self._schedule.step(*args, **kwargs)
        self.last_epoch += 1
        self._follow()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state."""
        return {
            "groups": self._groups,
            "l1": self.get_last_l1(),
            "last_epoch": self.last_epoch,
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
        self._set_l1(l1)


class TargetSparsity(_L1Steering):
    r"""Steers l1 so that a given share of the regularised weights is zero by a given step.

    All groups whose l1 is above 0 at construction are multiplied by one factor; their ratios stay.
    The share asked for rises from that found at ``begin`` as in Zhu and Gupta's pruning schedule,

    .. math:: s(t) = s_\text{target}
              + (s_\text{begin} - s_\text{target}) (1 - (t - t_\text{begin}) / T)^3

    over the first 80 % of the steps from ``begin`` to ``steps``. The factor's logarithm moves by
    the error in the share's log-odds, looked ahead along its slope. Time is counted in parts of
    ``steps - begin``, so that the same gains serve a run of a few hundred steps and one of a
    million. Weights that can't move, as they require no gradient or their lr is 0, are not counted,
    and where none can, l1 stays.

    Once the share is within half a point of the target, in the second half of that time or later,
    the groups' zeros are frozen, once, as by :meth:`resnet_reg_ext.ProxSGD.freeze_zeros`: the
    share stays what it is, and the weights that are left are trained on without L1's bias. With
    ``freeze=False`` steering goes on instead. A single batch with large gradients then moves
    weights off zero, for a few steps, faster than l1 can answer: only the share's average is held,
    and in a noisy run by a point or two.

    Don't move these groups' l1 otherwise meanwhile; lr may follow any schedule. Nothing happens
    while zeros are frozen, whoever has frozen them.

    Args:
        optimizer: a :class:`resnet_reg_ext.ProxSGD`. Its l1 is where the search starts.
        target: the share of exact zeros in the steered groups, in (0, 1) (default: 0.9).
        steps: at which call of :meth:`step` the target is to be reached. The fewer there
            are, the larger are the adjustments; 160 were enough for a ResNet-50 on digits.
        begin: up to which call l1 is left as it is (default: 0).
        every: at how many calls to count and adjust (default: a thousandth of the time from
            ``begin`` to ``steps``, at least 1). Counting reads the weights, unless the optimizer
            has ``track_sparsity=True``.
        freeze: whether to freeze the zeros once the target is reached (default: True).

    Raises:
        TypeError: ``optimizer`` isn't one that applies an l1, or a number of steps isn't whole.
        ValueError: no group has an l1 above 0, or an argument is out of its range.

    Example:
        >>> steering = TargetSparsity(optimizer, target=0.9, steps=len(loader) * 60)
        >>> optimizer.step()
        >>> steering.step()

    References:
        Zhu and Gupta, *To prune, or not to prune*, 2017, eq. 1, for the curve.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        target: float = 0.9,
        *,
        steps: int,
        begin: int = 0,
        every: int | None = None,
        freeze: bool = True,
    ) -> None:
        if isinstance(target, str) or not 0 < target < 1:
            raise ValueError(f"TargetSparsity: target is {target!r}: must be above 0 and below 1")
        steps, begin = _whole(steps, "steps"), _whole(begin, "begin")
        every = None if every is None else _whole(every, "every")
        if not 0 <= begin < steps:
            raise ValueError(
                f"TargetSparsity: begin is {begin} and steps is {steps}: "
                "begin must be at least 0, and steps above it"
            )
        every = max(1, (steps - begin) // 1000) if every is None else every
        if not 1 <= every <= steps - begin:
            raise ValueError(
                f"TargetSparsity: every is {every}: must be from 1 to steps - begin, "
                f"which is {steps - begin}"
            )
        super().__init__(optimizer)
        self.target = target
        self.steps = steps
        self.begin = begin
        self.every = every
        self.freeze = freeze
        self._start_l1 = self.get_last_l1()
        self._reached = False
        self._start_share = 0.0
        self._share: float | None = None
        self._size = 0
        self._slope = 0.0
        self._log_factor = 0.0

    @property
    def share(self) -> float | None:
        """The share of zeros as last counted, or None before the first count."""
        return self._share

    def asked(self, step: float) -> float:
        """The share that the curve asks for after ``step`` calls of :meth:`step`."""
        done = (step - self.begin) / (_RAMP * (self.steps - self.begin))
        left = 1 - min(max(done, 0.0), 1.0)
        return self.target + (self._start_share - self.target) * left**3

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Counts the zeros, where it is time to, and sets l1; after ``optimizer.step()``.

        Warns, once, if the share is more than two points off the target at the last of ``steps``.

        Args:
            args: ignored; trainers give an epoch or a metric.
            kwargs: ignored too.
        """
        if self._is_frozen():
            return
        self.last_epoch += 1
        passed_steps = self.last_epoch - self.begin
        if passed_steps > 0 and passed_steps % self.every == 0:
            self._steer(passed_steps)
        if self.last_epoch == self.steps and not self._is_frozen():
            self._warn_if_missed()

    def _is_frozen(self) -> bool:
        return all(group.get("frozen_zeros") for group in self._steered())

    def _warn_if_missed(self) -> None:
        share = self._share
        if share is None:
            warnings.warn(
                f"TargetSparsity: in {self.steps} steps no weight of its groups could move, as lr "
                "is 0 or none requires a gradient: l1 has been left as it was",
                stacklevel=3,
            )
            return
        if abs(share - self.target) <= _MISSED:
            return
        l1 = ", ".join(f"{value:.3g}" for value in self.get_last_l1())
        warnings.warn(
            f"TargetSparsity: after {self.steps} steps {share:.1%} of the weights are zero, not "
            f"{self.target:.1%}; steering goes on. l1 has come to {l1}: start nearer to that, give "
            "it more steps, or see that lr doesn't decay before",
            stacklevel=3,
        )

    def _steer(self, passed_steps: int) -> None:
        """Counts, and sets l1 or freezes the zeros."""
        zeros, size = self._count()
        if size == 0:  # or the error would take l1 ever further while nothing answers
            return
        share = zeros / size
        if self._share is None:
            self._start_share = share
        length = self.steps - self.begin
        passed = self.every / length
        if self._share is not None and size == self._size:  # others than last time tell no slope
            rise = (self._log_odds(share) - self._log_odds(self._share)) / passed
            self._slope += min(1.0, passed / _SMOOTHING) * (rise - self._slope)
        self._share, self._size = share, size
        near = passed_steps >= length / 2 and abs(share - self.target) <= _NEAR
        if self.freeze and near and not self._reached:
            self._reached = True
            for group in self._steered():
                group["frozen_zeros"] = True
            return

        ahead = self._log_odds(self.asked(self.last_epoch + _LOOK_AHEAD * length))
        ahead -= self._log_odds(share) + _LOOK_AHEAD * self._slope
        move = _GAIN * passed * min(max(ahead, -_MOST_DOWN), _MOST_UP)
        self._log_factor += min(max(move, -_FASTEST), _FASTEST)
        self._log_factor = min(max(self._log_factor, -_FARTHEST), _FARTHEST)
        factor = math.exp(self._log_factor)
        self._set_l1([factor * l1 for l1 in self._start_l1])

    def _count(self) -> tuple[int, int]:
        """Exact zeros, and all weights, of those in the steered groups that can move."""
        layers = iter(sparsity(self.optimizer).layers)
        zeros = size = 0
        for index, group in enumerate(self.optimizer.param_groups):
            moves = index in self._groups and float(group["lr"]) > 0
            for param, layer in zip(group["params"], layers, strict=False):
                if moves and param.requires_grad:
                    zeros += layer.zeros
                    size += layer.size
        return zeros, size

    def _log_odds(self, share: float) -> float:
        """Finite at both ends: beyond 1 % and 99.5 %, or half-way to the target, it is flat."""
        share = max(share, min(0.01, self.target / 2))
        share = min(share, max(0.995, (1 + self.target) / 2))
        return math.log(share / (1 - share))

    def state_dict(self) -> dict[str, Any]:
        """Where the controller stands; each l1 itself is in the optimizer's state."""
        return {"groups": self._groups, **{key: getattr(self, key) for key in _STATE}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave. The arguments stay this object's.

        Raises:
            ValueError: other groups were steered.
        """
        self._check_groups(state_dict)
        values = {key: state_dict[key] for key in _STATE}
        for key, value in values.items():
            setattr(self, key, value)


def _whole(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"TargetSparsity: {name} is {value!r}: must be a whole number") from None


_STATE = (
    "last_epoch",
    "_start_l1",
    "_reached",
    "_start_share",
    "_share",
    "_size",
    "_slope",
    "_log_factor",
)

# Tuned on ResNets of three sizes on digit images, at targets of 0.5, 0.8 and 0.95. Zeros come about
# as slowly as l1 pulls weights in, and go again only once l1 is below the gradients: hence the look
# ahead, against overshooting, and the slower way down. Times are parts of steps - begin.
_RAMP = 0.8
_LOOK_AHEAD = 0.05
_SMOOTHING = 0.02
_GAIN = 50.0
_MOST_UP = 1.0
_MOST_DOWN = 0.5
_FASTEST = math.log(4)  # at one count, where steps are few
_FARTHEST = math.log(1e8)
_NEAR = 0.005
_MISSED = 0.02
