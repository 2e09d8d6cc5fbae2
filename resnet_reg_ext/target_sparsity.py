"""Steers l1, or group_lasso, so that a given share of weights or channels is zero by a step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from .channel_steering import ChannelSteering
from .row_groups import has_group_lasso
from .schedules import BaseL1Scheduler
from .sparsity import sparsity
from .steering_arguments import check_of, checked_lrs, checked_window
from .structure import Channels


class TargetSparsity(BaseL1Scheduler):
    r"""Steers l1 or group_lasso so that a given share is exactly zero by a given step.

    **Of the weights.** The l1 of all groups that have one above 0 at construction is multiplied by
    one factor, so that their ratios stay. In groups with ``toward="start"`` weights that are
    exactly at their start count as zeros do. The share that is aimed at rises as in Zhu and Gupta's
    pruning schedule,

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

    **Of the channels**, or of the multiply-adds (``of="channels"``, ``"macs"``). A channel is a
    group g of the group lasso, row i of a set of coupled rows, as ``param_groups(model,
    group_lasso=..., example_inputs=...)`` makes them. A step shrinks ‖w_g‖ by group_lasso·a_g·lr·k,
    so that the strength follows in closed form from the channels as they are and the steps left:

    .. math:: \text{group\_lasso} = \operatorname{quantile}_\text{target} \Big(
              \frac{\lVert w_g \rVert}{a_g \sum_\text{steps left} lr \cdot k} \Big)

    It is the same for all groups with ``rows``; what they had before doesn't matter. It is taken
    anew at every count, and what gradients held off lately, by which the quantile fell behind, is
    added. It aims at the end of the first 80 % of the steps from ``begin`` to ``steps``; up to
    ``begin`` it is 0. No step reaches farther than to a quarter of a point beyond the target. For
    multiply-adds the quantile is that of as many channels, in the order of that fraction, as it
    takes: a layer's multiply-adds are in proportion to its rows and to its columns. Once the target
    is reached, the zeros are frozen, whenever that is. Channels that ``compact`` has taken out
    meanwhile count as gone. A set that loses its last channel is told by a warning.

    Meanwhile, don't change these groups' l1 or group_lasso in another way; lr may follow any
    schedule. While zeros are frozen, by this class or by you, the controller does nothing.

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
        of: what the share is one of: ``"weights"``, ``"channels"`` or ``"macs"`` (default:
            ``"weights"``).
        sets: for ``of="macs"`` what :func:`resnet_reg_ext.channels` returns for the model, which
            counts multiply-adds; the optimizer's groups must name its parameters.
        lrs: of channels and multiply-adds, the lr of each of the steps, or numbers in proportion to
            it, where a schedule will change lr; None counts on lr as it is (default: None).

    Raises:
        TypeError: ``optimizer`` isn't one that applies an l1, a number of steps isn't whole, or
            ``sets`` or ``lrs`` are something else.
        ValueError: no group has an l1 above 0, or rows and a group_lasso; an argument is out of its
            range; or ``row_weights`` of 0 keep more channels than the target leaves.

    Example:
        >>> steering = TargetSparsity(optimizer, target=0.9, steps=len(loader) * 60)
        >>> optimizer.step()
        >>> steering.step()
        >>> steering.reached  # after training: whether the share is within two points of 0.9
        False

        >>> groups = param_groups(model, group_lasso=1e-3, example_inputs=images[:1])
        >>> optimizer = ProxSGD(groups, lr=0.01)
        >>> steering = TargetSparsity(optimizer, 0.5, steps=len(loader) * 60, of="channels")

    References:
        Zhu and Gupta, *To prune, or not to prune*, 2017, eq. 1, for the curve of weights.
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
        of: str = "weights",
        sets: Channels | None = None,
        lrs: Sequence[float] | None = None,
    ) -> None:
        check_of(of, sets, lrs)
        steps, begin, every = checked_window(target, steps, begin, every)
        self._lrs = checked_lrs(lrs, steps)
        self.of = of
        self._option = "l1" if of == "weights" else "group_lasso"
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
        self._channels: ChannelSteering | None = None
        if of == "weights":
            return
        self._channels = ChannelSteering(optimizer, of, sets)
        self._channels.check(target)
        for group, value in zip(self._steered(), self.base_lrs, strict=True):
            group.setdefault("initial_group_lasso", value)
        self._set_l1([0.0] * len(self._groups))
        if begin == 0 and not self._is_frozen():
            self._steer_channels(self._channels)

    def _is_steered(self, group: dict[str, Any]) -> bool:
        return super()._is_steered(group) if self.of == "weights" else has_group_lasso(group)

    @property
    def _what_is_steered(self) -> str:
        if self.of == "weights":
            return super()._what_is_steered
        return "rows and a group_lasso above 0: see param_groups(model, group_lasso=)"

    @property
    def share(self) -> float | None:
        """The share as last counted, or None before the first count."""
        return self._share

    @property
    def reached(self) -> bool:
        """Whether the share, as last counted, is within two points of the target.

        For after training, also where early stopping ended it before ``steps``: the warning of
        :meth:`step` comes at the last of ``steps`` only. False before the first count.
        """
        return self._share is not None and abs(self._share - self.target) <= _MISSED

    def asked(self, step: float) -> float:
        """The share that the curve of weights asks for after ``step`` calls of :meth:`step`."""
        done = (step - self.begin) / (_RAMP * (self.steps - self.begin))
        left = 1 - min(max(done, 0.0), 1.0)
        return self.target + (self._start_share - self.target) * left**3

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Counts, where it is time to, and sets l1 or group_lasso; after ``optimizer.step()``.

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
        if passed_steps % self.every == 0:
            if self._channels is not None and passed_steps >= 0:
                self._steer_channels(self._channels)
            elif self._channels is None and passed_steps > 0:
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
                f"is 0 or none requires a gradient: {self._option} has been left as it was",
                stacklevel=3,
            )
            return
        if self.reached:
            return
        values = ", ".join(f"{value:.3g}" for value in self.get_last_l1())
        what = {"macs": "multiply-adds"}.get(self.of, self.of)
        nearer = "start nearer to that, " if self._channels is None else ""
        warnings.warn(
            f"TargetSparsity: after {self.steps} steps {share:.1%} of the {what} are zero, not "
            f"{self.target:.1%}; steering goes on. {self._option} has come to {values}: {nearer}"
            "give it more steps, or see that lr doesn't decay before",
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
            self._freeze()
            return

        ahead = self._log_odds(self.asked(self.last_epoch + _LOOK_AHEAD * length))
        ahead -= self._log_odds(share) + _LOOK_AHEAD * self._slope
        move = _GAIN * passed * min(max(ahead, -_MOST_DOWN), _MOST_UP)
        self._log_factor += min(max(move, -_FASTEST), _FASTEST)
        self._log_factor = min(max(self._log_factor, -_FARTHEST), _FARTHEST)
        factor = math.exp(self._log_factor)
        self._set_l1([factor * l1 for l1 in self.base_lrs])

    def _freeze(self) -> None:
        self._has_frozen = True
        for group in self._steered():
            group["frozen_zeros"] = True

    def _steer_channels(self, channels: ChannelSteering) -> None:
        """Counts, and sets group_lasso or freezes the zeros."""
        found = channels.measure(self.target)
        if found is None:
            return
        self._share = found.share
        if self.freeze and not found.missing and not self._has_frozen:
            self._freeze()
            return
        end = self.begin + math.ceil(_RAMP * (self.steps - self.begin))
        left = max(end - self.last_epoch, self.every)
        ahead = self._lrs[self.last_epoch : self.last_epoch + left]
        lrs_left = sum(ahead) / ahead[0] if ahead and ahead[0] > 0 else float(left)
        smoothing = _SMOOTHING * (self.steps - self.begin)
        strength = channels.strength(found, lrs_left, self.every, smoothing)
        if strength is not None:
            self._set_l1([strength] * len(self._groups))

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
        state = {"groups": self._groups, **values, "_step_count": self._step_count}
        if self._channels is not None:
            state |= {"of": self.of, "group_lasso": self.get_last_l1()}
            state["channels"] = self._channels.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave. The arguments stay this object's.

        Raises:
            ValueError: other groups were steered, or to a share of something else.
        """
        of = state_dict.get("of", "weights")
        if of != self.of:
            raise ValueError(f"TargetSparsity: the state is that of={of!r}, and of is {self.of!r}")
        self._check_groups(state_dict)
        values = {name: state_dict[key] for key, name in _STATE.items()}
        for name, value in values.items():
            setattr(self, name, value)
        # Version 0.1.0 didn't save it.
        self._step_count = state_dict.get("_step_count", self.last_epoch + 1)
        if self._channels is not None:
            self._channels.load_state_dict(state_dict["channels"])
            self._set_l1(state_dict["group_lasso"])


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
