"""The strength at which a group lasso takes a share of channels, or of multiply-adds, to zero."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .backends import dtensor
from .options import Options
from .row_groups import has_rows, members_of, rows_and_weights, weights_of
from .state import MASTER_WEIGHT, parameter_place, towards_start
from .structure import Channels, ChannelSet

_WHO = "TargetSparsity"
_BEYOND = 0.0025
_CONTROL = ("reach", "strength", "held")


@dataclass(frozen=True)
class Layer:
    """A layer's multiply-adds, and how each steered set's channels take part in them.

    Attributes:
        multiply_adds: at the start.
        rows: by the set's number, the share of the layer's rows that one channel is.
        columns: the same of its columns.
    """

    multiply_adds: int
    rows: dict[int, float]
    columns: dict[int, float]

    def left(self, gone: Mapping[int, int]) -> float:
        """Multiply-adds without so many channels of each set."""
        rows = 1 - sum(gone.get(number, 0) * share for number, share in self.rows.items())
        columns = 1 - sum(gone.get(number, 0) * share for number, share in self.columns.items())
        return self.multiply_adds * rows * columns


@dataclass(frozen=True)
class Measured:
    """What is gone, and what it takes that the target goes.

    Attributes:
        share: of the channels, or of the multiply-adds, what is gone.
        missing: how many channels must still go; 0 once the target is reached.
        reach: the largest ‖w_g‖/(a_g·k) of the channels that are to go, in units of lr: how far
            the strength times the sum of lr must reach. None where there is no such channel.
        limit: the same of a quarter of a point more, and of one channel more at least.
        is_near: whether less than a quarter of a point is missing.
        lr: what ``reach`` is divided by, to be in steps.
    """

    share: float
    missing: int
    reach: float | None
    limit: float
    is_near: bool
    lr: float


class ChannelSteering:
    """Reads the coupled rows of an optimizer, and tells the strength that they need.

    Channels that were taken out since the start count as gone. Norms of sharded rows are gathered:
    all processes must call :meth:`measure`, and get the same strength.

    Args:
        optimizer: some of its groups have ``rows``.
        of: "channels" or "macs".
        sets: for "macs", the model's.

    Raises:
        TypeError: ``sets`` aren't what ``channels`` returns.
        ValueError: they are another model's, a set's parameters don't have the same rows, or a
            group with a set has ``toward="start"``.
    """

    def __init__(self, optimizer: Optimizer, of: str, sets: Channels | None) -> None:
        self.optimizer = optimizer
        groups = optimizer.param_groups
        _refuse_starts(groups, of)
        self.sizes = {
            number: rows_and_weights(groups, members, weights_of(groups, members))[0]
            for number, members in members_of(groups).items()
        }
        self.layers: list[Layer] = []
        if of == "macs":
            self.layers = _layers(optimizer, sets)
        self.lost: list[int] = []
        self._reach: float | None = None
        self._strength = self._held = 0.0

    def check(self, target: float) -> None:
        """Refuses a target that the weights of the rows don't let the optimizer reach.

        Raises:
            ValueError: tells how much can go.
        """
        gone, reaches, owners, _ = self._read()
        penalised = owners[reaches.isfinite()]
        most = self._share(Counter(gone) + Counter(penalised.tolist()))
        if most < target and len(owners):
            raise ValueError(
                f"{_WHO}: target is {target!r}, but row_weights above 0 let {most:.4f} go: must be "
                "at most that"
            )

    def measure(self, target: float) -> Measured | None:
        """What is gone, and how far the strength must reach for the rest.

        Args:
            target: the share that is to go.

        Returns:
            None where there is no channel, or none that requires a gradient.
        """
        gone, reaches, owners, lr = self._read()
        if not len(owners):
            return None
        self._tell_lost(gone)
        share, missing = self._share(gone), self._missing(target, gone, owners)
        finite = reaches[reaches.isfinite()].tolist()
        if not missing or not finite:
            return Measured(share, missing, None, 0.0, False, lr)
        more = max(missing + 1, self._missing(target + _BEYOND, gone, owners))
        reach, limit = (finite[min(count, len(finite)) - 1] for count in (missing, more))
        return Measured(share, missing, reach, limit, target - share <= _BEYOND, lr)

    def strength(
        self, found: Measured, lrs_left: float, every: int, smoothing: float
    ) -> float | None:
        """The strength for the next steps.

        Args:
            found: what was measured now.
            lrs_left: the sum of lr over the steps left, in units of the present lr.
            every: how many steps ago it was measured before.
            smoothing: over how many steps the pull of the gradients is averaged.

        Returns:
            None where the strength is to stay, as nothing can move.
        """
        if not found.missing:
            return 0.0
        if found.reach is None:
            return None
        if self._reach is not None:
            # What the strength alone would have done is the strength; gradients hold off some.
            held = self._strength - (self._reach - found.reach) / (found.lr * every)
            self._held += min(1.0, every / smoothing) * (held - self._held)
        self._reach = found.reach
        needed = found.reach / found.lr / lrs_left + max(0.0, self._held)
        if found.is_near:  # channels that died lately would come back by their momentum
            needed = max(needed, self._strength)
        # The last step takes no more than what is asked for.
        self._strength = min(needed, found.limit / found.lr)
        return self._strength

    @torch.no_grad()
    def _read(self) -> tuple[dict[int, int], Tensor, Tensor, float]:
        """How many channels of each set are gone; of the others how far each is from zero, sorted.

        Sets with a parameter that requires no gradient aren't counted.

        Returns:
            Counts by the set's number; ‖w_g‖/(a_g·k) of the channels (channels,), float64, infinite
            where no strength will do; their sets' numbers (channels,); and the largest lr. Where a
            set's lr is smaller, its channels are farther from zero by as much.
        """
        groups = self.optimizer.param_groups
        members = members_of(groups)
        lr = max((float(groups[m[0][0][0]]["lr"]) for m in members.values()), default=0.0)
        gone = {number: size for number, size in self.sizes.items() if number not in members}
        reaches, owners = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.long)]
        for number, of_set in members.items():
            params = [param for _, param in of_set]
            if not all(param.requires_grad for param in params) or not len(params[0]):
                continue
            _, weights = rows_and_weights(groups, of_set, weights_of(groups, of_set))
            group = groups[of_set[0][0][0]]
            moved = Options.from_group(group).k * (float(group["lr"]) / lr if lr else 0.0)
            norms = torch.stack([_row_norms(self._value(p)) for p in params]).square().sum(0).sqrt()
            alive = norms != 0  # NaN is
            # 0/0 stays out of it; what is not penalised, or has no lr, has an infinite one.
            needed = (norms / (torch.as_tensor(weights, dtype=torch.double) * moved))[alive]
            reaches.append(needed.nan_to_num(nan=math.inf, posinf=math.inf))
            owners.append(torch.full((len(needed),), number))
            gone[number] = self.sizes.setdefault(number, len(norms)) - len(needed)
        every, order = torch.cat(reaches).sort(stable=True)
        return gone, every, torch.cat(owners)[order], lr

    def _value(self, param: Tensor) -> Tensor:
        """What the step shrinks: the master weight where there is one."""
        value: Tensor = self.optimizer.state.get(param, {}).get(MASTER_WEIGHT, param)
        return value.detach()

    def _share(self, gone: Mapping[int, int]) -> float:
        if self.layers:
            total = sum(layer.multiply_adds for layer in self.layers)
            return 1 - sum(layer.left(gone) for layer in self.layers) / max(1, total)
        return sum(gone.values()) / max(1, sum(self.sizes[number] for number in gone))

    def _missing(self, target: float, gone: Mapping[int, int], owners: Tensor) -> int:
        """How many of the channels that are left must go, in their order, to be nearest to it."""
        if not self.layers:
            total = sum(self.sizes[number] for number in gone)
            return max(0, round(target * total) - sum(gone.values()))

        def share(count: int) -> float:
            return self._share(Counter(gone) + Counter(owners[:count].tolist()))

        low = bisect_left(range(len(owners)), target, key=share)
        return low - 1 if low and target - share(low - 1) < share(low) - target else low

    def _tell_lost(self, gone: Mapping[int, int]) -> None:
        """Warns, once, of each set that has no channel left."""
        lost = [number for number, size in self.sizes.items() if gone.get(number, 0) == size]
        for number in sorted(set(lost) - set(self.lost)):
            self.lost.append(number)
            groups, name = self.optimizer.param_groups, "a set"
            for (g, i), _ in members_of(groups).get(number, ())[:1]:
                name = parameter_place(groups[g], g, i)
            warnings.warn(
                f"{_WHO}: all {self.sizes[number]} channels of {name} are zero: what goes through "
                "such a layer is lost; param_groups(min_keep=0.1) keeps a tenth",
                stacklevel=5,
            )

    def state_dict(self) -> dict[str, Any]:
        """The counts at the start, what was told, and how the strength is taken."""
        layers = [(la.multiply_adds, dict(la.rows), dict(la.columns)) for la in self.layers]
        state = {"sizes": dict(self.sizes), "layers": layers, "lost": list(self.lost)}
        return state | {key: getattr(self, f"_{key}") for key in _CONTROL}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave."""
        self.layers = [Layer(*values) for values in state["layers"]]
        self.sizes, self.lost = dict(state["sizes"]), list(state["lost"])
        for key in _CONTROL:
            setattr(self, f"_{key}", state[key])


def _refuse_starts(groups: Sequence[Mapping[str, Any]], of: str) -> None:
    """Refuses sets that are pulled towards their start, where all channels are at first."""
    for index, group in enumerate(groups):
        if has_rows(group) and towards_start(group):
            raise ValueError(
                f"{_WHO}: of is {of!r}, and param_groups[{index}] has rows and toward='start': "
                "must be 'zero' there, as channels are steered to zero; or take of='weights'"
            )


def _row_norms(value: Tensor) -> Tensor:
    """‖row‖ of each row: (rows,), float64, on the CPU."""
    if value.dim() > 1:
        value = torch.linalg.vector_norm(
            value, dim=tuple(range(1, value.dim())), dtype=torch.double
        )
    norms: Tensor = dtensor.full_tensor(value.abs().double())
    return norms.cpu()


def _layers(optimizer: Optimizer, sets: Any) -> list[Layer]:
    """Each layer's multiply-adds with the steered sets' part in them."""
    if not isinstance(sets, Channels):
        raise TypeError(
            f"{_WHO}: sets is a {type(sets).__name__}: must be what channels(model, "
            "example_inputs) returns, which tells the multiply-adds for of='macs'"
        )
    if not sets.multiply_adds:
        raise ValueError(f"{_WHO}: sets have no multiply_adds: must be what channels() returns")
    known: dict[str, tuple[int | None, Tensor]] = {}
    for group in optimizer.param_groups:
        rows = group.get("rows") or [None] * len(group["params"])
        for name, *of_param in zip(
            group.get("param_names", ()), rows, group["params"], strict=False
        ):
            known[name] = tuple(of_param)
    shares: dict[tuple[str, int], dict[int, float]] = {}
    for one in sets:
        number = _number_of(one, known)
        if number is None:
            continue
        for index in one.producers + one.consumers:
            if index.tensor not in known:
                raise ValueError(_foreign(index.tensor))
            size = known[index.tensor][1].shape[index.dim]
            share = sum(map(len, index.indices)) / one.size / size
            of_layer = shares.setdefault((index.tensor, index.dim), {})
            of_layer[number] = of_layer.get(number, 0.0) + share
    return [
        Layer(count, shares.get((f"{name}.weight", 0), {}), shares.get((f"{name}.weight", 1), {}))
        for name, count in sets.multiply_adds.items()
    ]


def _number_of(one: ChannelSet, known: Mapping[str, tuple[int | None, Tensor]]) -> int | None:
    """The number of a set's rows in the optimizer; None where they aren't coupled there."""
    numbers: dict[str, int | None] = {}
    for index in one.producers:
        if index.tensor not in known:
            raise ValueError(_foreign(index.tensor))
        number, param = known[index.tensor]
        numbers[index.tensor] = number
        if number is not None and len(param) != one.size:
            raise ValueError(
                f"{_WHO}: sets are another model's: {one.name} has {one.size} channels, and "
                f"{index.tensor} {len(param)} rows"
            )
    norms = {index.tensor for index in one.closing_norms}
    # With param_groups(groups="norms") a set's norms alone are coupled.
    by_norms = norms and all(numbers[tensor] is None for tensor in numbers.keys() - norms)
    coupled = {number for tensor, number in numbers.items() if not by_norms or tensor in norms}
    if len(coupled) > 1:
        raise ValueError(
            f"{_WHO}: sets are another model's: the producers of {one.name} aren't coupled in the "
            "optimizer"
        )
    return coupled.pop()


def _foreign(name: str) -> str:
    return (
        f"{_WHO}: sets have a {name}, and the optimizer has no parameter of that name: must be the "
        "model's own, and the optimizer have its param_groups(model, ...), which name all"
    )
