"""The arguments of ``TargetSparsity``, checked."""

from __future__ import annotations

import math
import operator
from typing import Any

_WHO = "TargetSparsity"


def checked_window(target: Any, steps: Any, begin: Any, every: Any) -> tuple[int, int, int]:
    """Steps, begin and every as whole numbers, every by its default where it is None.

    Raises:
        TypeError: a number of steps isn't whole.
        ValueError: an argument is out of its range.
    """
    if isinstance(target, str) or not 0 < target < 1:
        raise ValueError(f"{_WHO}: target is {target!r}: must be above 0 and below 1")
    steps, begin = _whole(steps, "steps"), _whole(begin, "begin")
    every = None if every is None else _whole(every, "every")
    if not 0 <= begin < steps:
        raise ValueError(
            f"{_WHO}: begin is {begin} and steps is {steps}: "
            "begin must be at least 0, and steps above it"
        )
    every = max(1, (steps - begin) // 1000) if every is None else every
    if not 1 <= every <= steps - begin:
        raise ValueError(
            f"{_WHO}: every is {every}: must be from 1 to steps - begin, which is {steps - begin}"
        )
    return steps, begin, every


def check_of(of: Any, sets: Any, lrs: Any) -> None:
    """Refuses what the share can't be one of, and arguments that are for others.

    Raises:
        ValueError: names the argument.
    """
    if of not in ("weights", "channels", "macs"):
        raise ValueError(f"{_WHO}: of is {of!r}: must be 'weights', 'channels' or 'macs'")
    if sets is not None and of != "macs":
        raise ValueError(f"{_WHO}: sets are for of='macs', and of is {of!r}")
    if lrs is not None and of == "weights":
        raise ValueError(f"{_WHO}: lrs are for of='channels' and of='macs', and of is {of!r}")


def checked_lrs(lrs: Any, steps: int) -> list[float]:
    """One lr for each step, as numbers; none where None is given.

    Raises:
        TypeError: they are no numbers.
        ValueError: there are too few, or one is out of range.
    """
    if lrs is None:
        return []
    try:
        numbers = [float(lr) for lr in lrs]
    except (TypeError, ValueError):
        raise TypeError(f"{_WHO}: lrs is {lrs!r:.100}: must be numbers, one a step") from None
    wrong = [lr for lr in numbers if not 0 <= lr < math.inf]
    if wrong or len(numbers) < steps:
        what = f"has {wrong[0]!r}" if wrong else f"has {len(numbers)} numbers"
        raise ValueError(
            f"{_WHO}: lrs {what}: must have {steps}, one a step, finite and not negative"
        )
    return numbers


def _whole(value: Any, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{_WHO}: {name} is {value!r}: must be a whole number") from None
