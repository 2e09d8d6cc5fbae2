"""What a launch did: instructions executed and global memory moved."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

Array = np.ndarray

SECTOR = 32


@dataclass
class Traffic:
    """Global memory accesses of one kind."""

    bytes: int = 0
    requests: int = 0  # instructions of warps
    sectors: int = 0  # of 32 bytes, counted anew for each request

    @property
    def efficiency(self) -> float:
        """The part of the sectors' bytes that was asked for."""
        return self.bytes / (SECTOR * self.sectors) if self.sectors else 1.0

    def add(self, warps: Array, addresses: Array, width: int) -> None:
        """Counts one instruction; `warps` says, in order, which warp each access belongs to."""
        sectors = addresses // np.uint64(SECTOR)
        other_warp = warps[1:] != warps[:-1]
        if (~other_warp & (sectors[1:] < sectors[:-1])).any():
            sectors = sectors[np.lexsort((sectors, warps))]
        self.bytes += len(addresses) * width
        self.requests += 1 + np.count_nonzero(other_warp)
        self.sectors += 1 + np.count_nonzero(other_warp | (sectors[1:] != sectors[:-1]))


@dataclass
class Counts:
    """Sums over all threads of the blocks that were executed."""

    load: Traffic = field(default_factory=Traffic)
    store: Traffic = field(default_factory=Traffic)
    atomic: Traffic = field(default_factory=Traffic)
    instructions: Counter[str] = field(default_factory=Counter)  # by name with its modifiers
    block_bytes: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def bytes(self) -> int:
        return self.load.bytes + self.store.bytes + self.atomic.bytes

    @property
    def imbalance(self) -> float:
        """Bytes moved by the busiest block over those of the mean block; 1 if none moves any."""
        total = self.block_bytes.sum()
        return float(self.block_bytes.max() * len(self.block_bytes) / total) if total else 1.0
