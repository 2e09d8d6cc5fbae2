"""Finds data races, exact to the byte.

A shadow remembers for every granule of memory which threads have read it, written it or updated it
atomically. Two accesses race if they come from different threads, at least one writes, not both are
atomic, and no barrier lies between them. Barriers order the threads of one block; nothing orders
blocks.

A thread at a moment is a key: block, epoch (barriers that its block has passed) and thread in one
integer, in this order. For each kind of access a granule keeps the lowest and the highest key. That
loses nothing: they tell whether another block or, within the block's newest epoch, another thread
was there; older epochs of the only block that was there are dropped when it comes again.

Granules start at 16 bytes and are split when a smaller access comes.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray

THREAD_BITS = 11
EPOCH_BITS = 21
BLOCK_SHIFT = THREAD_BITS + EPOCH_BITS
_LIMIT = np.int64(1 << 62)

_CONFLICTS = {
    "load": ("store", "atomic"),
    "store": ("store", "load", "atomic"),
    "atomic": ("load", "store"),
}


def keys(block: Array, epoch: Array, thread: Array) -> Array:
    """Keys of threads now. 0 is kept for nobody."""
    return (block << BLOCK_SHIFT) | (epoch << THREAD_BITS) | (thread + 1)


def describe(key: int) -> tuple[int, int]:
    """Block and thread of a key."""
    return key >> BLOCK_SHIFT, (key & ((1 << THREAD_BITS) - 1)) - 1


class Shadow:
    """The access history of one allocation."""

    def __init__(self, size: int):
        self.granule = 16
        self.size = -(-size // 16) * 16
        self.seen: dict[str, tuple[Array, Array]] = {}

    def grow(self, size: int) -> None:
        """Follows an allocation whose buffer grows."""
        more = -(-size // 16) * 16 - self.size
        if more > 0:
            empty = np.zeros(more // self.granule, np.int64)
            self.seen = {
                kind: (np.concatenate((low, empty)), np.concatenate((high, empty)))
                for kind, (low, high) in self.seen.items()
            }
            self.size += more

    def access(self, kind: str, positions: Array, width: int, keys: Array) -> Array:
        """Records accesses of `width` bytes at byte positions.

        Returns for each the key of a thread that it races with, and 0 where there is none.
        """
        if width < self.granule:
            self._split(width)
        per_access = width // self.granule
        index = positions // self.granule
        if per_access > 1:
            index = (index[:, None] + np.arange(per_access)).ravel()
            keys = np.repeat(keys, per_access)
        self._record(kind, index, keys)
        rivals = np.zeros(len(index), np.int64)
        for other in _CONFLICTS[kind]:
            if other in self.seen:
                np.maximum(rivals, self._rivals(other, index, keys), out=rivals)
        return rivals.reshape(-1, per_access).max(axis=1) if per_access > 1 else rivals

    def _split(self, granule: int) -> None:
        factor = self.granule // granule
        self.seen = {
            kind: (np.repeat(low, factor), np.repeat(high, factor))
            for kind, (low, high) in self.seen.items()
        }
        self.granule = granule

    def _record(self, kind: str, index: Array, keys: Array) -> None:
        """The lowest key is kept as its distance from a limit, so that fresh zeros are nobody."""
        if kind not in self.seen:
            count = self.size // self.granule
            self.seen[kind] = np.zeros(count, np.int64), np.zeros(count, np.int64)
        low, high = self.seen[kind]
        outdated = index[_earlier(_LIMIT - low[index], high[index], keys)]
        if len(outdated):
            low[outdated] = 0
            high[outdated] = 0
        np.maximum.at(low, index, _LIMIT - keys)
        np.maximum.at(high, index, keys)

    def _rivals(self, kind: str, index: Array, keys: Array) -> Array:
        low, high = self.seen[kind]
        lowest, highest = _LIMIT - low[index], high[index]
        foreign = (highest != 0) & ((highest != keys) | (lowest != keys))
        if not foreign.any():
            return np.int64(0)
        foreign &= ~_earlier(lowest, highest, keys)
        return np.where(foreign, np.where(highest != keys, highest, lowest), 0)


def _earlier(lowest: Array, highest: Array, keys: Array) -> Array:
    """Whether all that a granule remembers lies before a barrier that this block has passed."""
    block = keys >> BLOCK_SHIFT
    return (
        (highest >> THREAD_BITS < keys >> THREAD_BITS)
        & (highest >> BLOCK_SHIFT == block)
        & (lowest >> BLOCK_SHIFT == block)
    )
