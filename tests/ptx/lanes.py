"""Sets of threads of a batch: a slice where they are neighbours, else their numbers in order.

`ALL` indexes an array without a copy, so that code without divergence pays nothing for masks.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
Lanes = slice | Array

ALL = slice(None)


def numbers(lanes: Lanes, count: int) -> Array:
    """The threads as an array of numbers; `count` is the batch's size."""
    return np.arange(*lanes.indices(count)) if isinstance(lanes, slice) else lanes


def size(lanes: Lanes, count: int) -> int:
    return len(range(*lanes.indices(count))) if isinstance(lanes, slice) else len(lanes)


def tidy(members: Array, count: int) -> Lanes:
    """Sorted numbers in their cheapest form."""
    if len(members) == count:
        return ALL
    if len(members) and members[-1] - members[0] + 1 == len(members):
        return slice(int(members[0]), int(members[-1]) + 1)
    return members


def narrow(lanes: Lanes, mask: Array, count: int) -> Lanes:
    """Those for which the mask holds; it has one element for each, or a single one for all."""
    if len(mask) == 1 and size(lanes, count) != 1:
        return lanes if mask[0] else slice(0, 0)
    return tidy(numbers(lanes, count)[mask], count)


def merge(a: Lanes, b: Lanes, count: int) -> Lanes:
    """The union of two sets that have no thread in common."""
    return tidy(np.sort(np.concatenate((numbers(a, count), numbers(b, count)))), count)
