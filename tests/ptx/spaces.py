"""Address spaces: how addresses of global, shared, local and parameter memory are told apart.

An instruction that names a space gives an offset in it. A generic address lies in a window above
2^63 for all spaces but the global one, as `cvta` makes it. Shared and local memory exist once for
each block and each thread; their copies lie one after the other in one allocation.
"""

from __future__ import annotations

import numpy as np

from .memory import GUARD, Allocation, Arena

Array = np.ndarray
Parts = tuple[list[tuple[Allocation, Array | slice]], Array | None]

WINDOWS = {"shared": 0xD << 60, "local": 0xE << 60, "param": 0xF << 60}
_FIRST_WINDOW = np.uint64(min(WINDOWS.values()))
_NOWHERE = np.uint64(2**64 - 1)


class Spaces:
    """What the threads of a batch can address."""

    def __init__(self, arena: Arena, parameters: bytes, shared: int, local: int):
        self.arena = arena
        self.sizes = {"shared": shared, "local": local, "param": len(parameters)}
        self.parameters = parameters

    def populate(self, block: Array, blocks: int) -> None:
        """Gives every block of a batch its shared memory and every thread its local memory."""
        self.windows = Arena()
        if self.parameters:
            self.windows.place(
                WINDOWS["param"], len(self.parameters), "parameters", self.parameters, False
            )
        self.owners = {"shared": block, "local": np.arange(len(block))}
        for name, copies in (("shared", blocks), ("local", len(block))):
            if self.sizes[name]:
                self.windows.place(WINDOWS[name], copies * self._stride(name), f"{name} memory")

    def _stride(self, name: str) -> int:
        return -(-self.sizes[name] // GUARD) * GUARD

    def resolve(
        self, space: str, threads: Array, addresses: Array, width: int
    ) -> tuple[Arena | Spaces, Array]:
        """Absolute addresses, and who sorts them by allocation."""
        if space in WINDOWS:
            return self.windows, self._absolute(space, threads, addresses, width)
        if space == "global" or not (addresses >= _FIRST_WINDOW).any():
            return self.arena, addresses
        absolute = addresses.copy()
        for name, base in WINDOWS.items():
            inside = np.flatnonzero(addresses >> np.uint64(60) == base >> 60)
            offsets = addresses[inside] - np.uint64(base)
            absolute[inside] = self._absolute(name, threads[inside], offsets, width)
        return self, absolute

    def _absolute(self, space: str, threads: Array, offsets: Array, width: int) -> Array:
        size = self.sizes[space]
        base = np.uint64(WINDOWS[space])
        if size < width:
            return np.full(len(offsets), _NOWHERE)
        if space != "param":
            base = base + (self.owners[space][threads] * self._stride(space)).view(np.uint64)
        return np.where(offsets <= size - width, base + offsets, _NOWHERE)

    def partition(self, addresses: Array, width: int) -> Parts:
        """Like `Arena.partition`, for generic addresses."""
        upper = addresses >= _FIRST_WINDOW
        held, lost = [], []
        for arena, chosen in ((self.arena, ~upper), (self.windows, upper)):
            index = np.flatnonzero(chosen)
            if len(index):
                parts, missing = arena.partition(addresses[index], width)
                held += [(allocation, index[places]) for allocation, places in parts]
                if missing is not None:
                    lost.append(index[missing])
        return held, np.concatenate(lost) if lost else None

    def nearest(self, space: str, address: int) -> str:
        if space in WINDOWS:
            return f"offset into {self.sizes[space]} bytes of {space} memory"
        for name, base in WINDOWS.items():
            if address >> 60 == base >> 60:
                return self.nearest(name, address)
        return self.arena.nearest(address)
