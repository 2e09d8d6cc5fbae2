"""A controller of l1 that makes a given share of the regularised weights zero by a given step."""

from __future__ import annotations

import math
import operator
import warnings
from typing import Any

from torch.optim import Optimizer

from .schedules import BaseL1Scheduler
from .sparsity import sparsity


class TargetSparsity(BaseL1Scheduler):
    r"""Steers l1 so that a given share of the regularised weights is zero by a given step.

    The l1 of all groups that have one above 0 at construction is multiplied by one factor, so that
    their ratios stay. In groups with ``toward="start"`` weights that are exactly at their start
    count as zeros do. The share that is aimed at rises as in Zhu and Gupta's pruning schedule,

    .. math:: s(t) = s_\text{target}
              + (s_\text{begin} - s_\text{target}) (1 - (t - t_\text{begin}) / T)^3

    over the first 80 % of the steps from ``begin`` to ``steps``, where s_begin is the share found
    at ``begin``. The controller changes the factor's logarithm in proportion to the error of the
    share, in log-odds, extrapolated along its slope. It measures time in fractions of
    ``steps - begin``, so the same gains work for a few hundred steps and for a million. Weights
    that can't move, because they require no gradient or their lr is 0, aren't counted. If no weight
    can move, l1 is left alone.

    When the share is within half a percentage point of the target, in the second half of that time
    or later, the groups' zeros are frozen, as by :meth:`resnet_reg_ext.ProxSGD.freeze_zeros`: the
    share no longer changes, and the other weights train on without the shrinkage of L1. With
    ``freeze=False`` the controller goes on instead, and holds the share only on average: a single
    batch with large gradients moves weights off zero, for a few steps, faster than l1 can follow.

    Meanwhile, don't change these groups' l1 in another way; lr may follow any schedule. While zeros
    are frozen, by this class or by you, the controller does nothing.

    Args:
        optimizer: a :class:`resnet_reg_ext.ProxSGD`. Its l1 is where the search starts.
        target: the share of exact zeros in the steered groups, in (0, 1) (default: 0.9).
        steps: the call of :meth:`step` by which the target is to be reached. Fewer steps mean
            larger adjustments; 160 were enough for a ResNet-50 on digits.
        begin: the call of :meth:`step` up to which l1 is left alone (default: 0).
        every: count and adjust at every so many calls (default: a thousandth of the time from
            ``begin`` to ``steps``, at least 1). Counting reads the weights even if the optimizer
            has ``track_sparsity=True``, so that changes through ``p.data`` are seen.
        freeze: whether to freeze the zeros once the target is reached (default: True).

    Raises:
        TypeError: ``optimizer`` isn't one that applies an l1, or a number of steps isn't whole.
        ValueError: no group has an l1 above 0, or an argument is out of its range.

    Example:
        >>> steering = TargetSparsity(optimizer, target=0.9, steps=len(loader) * 60)
        >>> optimizer.step()
        >>> steering.step()
        >>> steering.reached  # after training: whether the share is within two points of 0.9
        False

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
        self._has_frozen = False
        self._start_share = 0.0
        self._share: float | None = None
        self._size = 0
        self._slope = 0.0
        self._log_factor = 0.0

    @property
    def share(self) -> float | None:
        """The share of zeros as last counted, or None before the first count."""
        return self._share

    @property
    def reached(self) -> bool:
        """Whether the share, as last counted, is within two points of the target.

        For after training, also where early stopping ended it before ``steps``: the warning of
        :meth:`step` comes at the last of ``steps`` only. False before the first count.
        """
        return self._share is not None and abs(self._share - self.target) <= _MISSED

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
        self._step_count += 1
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
        if self.reached:
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
        if size == 0:  # no weight can answer, and the error would move l1 without end
            return
        share = zeros / size
        if self._share is None:
            self._start_share = share
        length = self.steps - self.begin
        passed = self.every / length
        if self._share is not None and size == self._size:  # over the same weights only
            rise = (self._log_odds(share) - self._log_odds(self._share)) / passed
            self._slope += min(1.0, passed / _SMOOTHING) * (rise - self._slope)
        self._share, self._size = share, size
        near = passed_steps >= length / 2 and abs(share - self.target) <= _NEAR
        if self.freeze and near and not self._has_frozen:
            self._has_frozen = True
            for group in self._steered():
                group["frozen_zeros"] = True
            return

        ahead = self._log_odds(self.asked(self.last_epoch + _LOOK_AHEAD * length))
        ahead -= self._log_odds(share) + _LOOK_AHEAD * self._slope
        move = _GAIN * passed * min(max(ahead, -_MOST_DOWN), _MOST_UP)
        self._log_factor += min(max(move, -_FASTEST), _FASTEST)
        self._log_factor = min(max(self._log_factor, -_FARTHEST), _FARTHEST)
        factor = math.exp(self._log_factor)
        self._set_l1([factor * l1 for l1 in self.base_lrs])

    def _count(self) -> tuple[int, int]:
        """Counts exact zeros and elements of the steered groups' parameters that can move."""
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
        """Log-odds of a share, cut off at 1 % and 99.5 %, or half-way to a target beyond these."""
        share = max(share, min(0.01, self.target / 2))
        share = min(share, max(0.995, (1 + self.target) / 2))
        return math.log(share / (1 - share))

    def state_dict(self) -> dict[str, Any]:
        """The controller's state; each l1 itself is in the optimizer's state."""
        values = {key: getattr(self, name) for key, name in _STATE.items()}
        return {"groups": self._groups, **values, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave. The arguments stay this object's.

        Raises:
            ValueError: other groups were steered.
        """
        self._check_groups(state_dict)
        values = {name: state_dict[key] for key, name in _STATE.items()}
        for name, value in values.items():
            setattr(self, name, value)
        # Version 0.1.0 didn't save it.
        self._step_count = state_dict.get("_step_count", self.last_epoch + 1)


def _whole(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"TargetSparsity: {name} is {value!r}: must be a whole number") from None


# Keys of a checkpoint, which stay as version 0.1.0 has written them, and the attributes they are.
_STATE = {
    "last_epoch": "last_epoch",
    "_start_l1": "base_lrs",
    "_reached": "_has_frozen",
    "_start_share": "_start_share",
    "_share": "_share",
    "_size": "_size",
    "_slope": "_slope",
    "_log_factor": "_log_factor",
}

# Tuned on ResNets of three sizes on digit images, at targets of 0.5, 0.8 and 0.95. Zeros come as
# slowly as l1 pulls weights in, and go only once l1 is below the gradients. So the controller looks
# ahead, against overshoot, and goes down more slowly than up. Times are fractions of steps - begin.
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
