"""The device's memory: allocations at any 64-bit address, with byte-exact bounds and contents."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import numpy as np

from .races import Shadow

Array = np.ndarray
Filler = Callable[[int, int], "Array | bytes"]

GUARD = 256
_GUARD_BYTE = 0xA5
_LARGEST_ACCESS = 32


def _as_bytes(data: bytes | Array) -> Array:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    return np.frombuffer(data, np.uint8)


def item_dtype(width: int) -> np.dtype:
    """What one access of `width` bytes is moved as."""
    return np.dtype(f"u{width}" if width <= 8 else f"V{width}")


class Allocation:
    """A range of device memory, backed by a buffer that has a guard zone on either side.

    Positions are byte offsets into the buffer; they are congruent to addresses modulo 32, so that
    an aligned access is aligned in the buffer too. `valid` says of each byte whether it has been
    written; None means all.
    """

    def __init__(self, address: int, size: int, name: str, writable: bool):
        self.address = address
        self.size = size
        self.name = name
        self.writable = writable
        self.origin = (address - GUARD) // _LARGEST_ACCESS * _LARGEST_ACCESS  # of position 0
        self.valid: Array | None = None
        self.shadow: Shadow | None = None
        self.buffer = self._new_buffer()

    @property
    def end(self) -> int:
        return self.address + self.size

    def _new_buffer(self) -> Array:
        length = self.end - self.origin + GUARD
        buffer = np.empty(-(-length // _LARGEST_ACCESS) * _LARGEST_ACCESS, np.uint8)
        start = self.address - self.origin
        buffer[:start] = _GUARD_BYTE
        buffer[start + self.size :] = _GUARD_BYTE
        return buffer

    def positions(self, addresses: Array) -> Array:
        """Positions of addresses that are known to lie inside."""
        return (addresses - np.uint64(self.origin % 2**64)).view(np.int64)

    def load(self, positions: Array, width: int) -> Array:
        return self.buffer.view(item_dtype(width))[positions // width]

    def store(self, positions: Array, width: int, items: Array) -> None:
        self.buffer.view(item_dtype(width))[positions // width] = items
        if self.valid is not None:
            self.valid.reshape(-1, width)[positions // width] = True

    def initialised(self, positions: Array, width: int) -> Array | None:
        """Whether every byte of each access has been written; None if that holds throughout."""
        if self.valid is None:
            return None
        return self.valid.reshape(-1, width)[positions // width].all(axis=1)

    def races(self, kind: str, positions: Array, width: int, keys: Array) -> Array:
        if self.shadow is None:
            self.shadow = Shadow(len(self.buffer))
        self.shadow.grow(len(self.buffer))
        return self.shadow.access(kind, positions, width, keys)

    def write(self, address: int, data: bytes | Array) -> None:
        """The host's write."""
        data = _as_bytes(data)
        where = self._positions_of_range(address, len(data))
        self.buffer[where] = data
        if self.valid is not None:
            self.valid[where] = True

    def read(self, address: int, nbytes: int) -> Array:
        """The host's read: a copy."""
        return self.buffer[self._positions_of_range(address, nbytes)].copy()

    def _positions_of_range(self, address: int, nbytes: int) -> slice | Array:
        if not self.address <= address <= address + nbytes <= self.end:
            raise IndexError(f"{nbytes} bytes at {address:#x} are not inside '{self.name}'")
        return slice(address - self.origin, address - self.origin + nbytes)

    def guards_intact(self) -> bool:
        start = self.address - self.origin
        outside = self.buffer[:start], self.buffer[start + self.size :]
        return all((zone == _GUARD_BYTE).all() for zone in outside)


class LazyAllocation(Allocation):
    """A range that may be far larger than the host's memory: pages come when they are touched.

    `fill(offset, nbytes)` gives the bytes of a fresh page at an offset from the allocation's start.
    Without it pages come uninitialised.
    """

    PAGE = 1 << 16

    def __init__(self, address: int, size: int, name: str, writable: bool, fill: Filler | None):
        super().__init__(address, size, name, writable)
        self.fill = fill
        self.first_page = address // self.PAGE
        self.slots = np.full((self.end - 1) // self.PAGE - self.first_page + 1, -1, np.int32)
        self.pages = 0  # in the buffer
        if fill is None:
            self.valid = np.zeros(0, bool)

    def _new_buffer(self) -> Array:
        return np.zeros(0, np.uint8)

    def positions(self, addresses: Array) -> Array:
        page = (addresses // np.uint64(self.PAGE)).view(np.int64) - self.first_page
        slots = self.slots[page]
        if (slots < 0).any():
            for fresh in np.unique(page[slots < 0]):
                self._touch(int(fresh))
            slots = self.slots[page]
        within = (addresses % np.uint64(self.PAGE)).view(np.int64)
        return slots.astype(np.int64) * self.PAGE + within

    def _touch(self, page: int) -> None:
        if (self.pages + 1) * self.PAGE > len(self.buffer):
            more = max(self.pages, 8) * self.PAGE
            self.buffer = np.concatenate((self.buffer, np.zeros(more, np.uint8)))
            if self.valid is not None:
                self.valid = np.concatenate((self.valid, np.zeros(more, bool)))
        base = (self.first_page + page) * self.PAGE
        start, end = max(base, self.address), min(base + self.PAGE, self.end)
        if self.fill is not None:
            at = self.pages * self.PAGE + start - base
            self.buffer[at : at + end - start] = _as_bytes(
                self.fill(start - self.address, end - start)
            )
        self.slots[page] = self.pages
        self.pages += 1

    @property
    def touched(self) -> list[int]:
        """The addresses of the pages that exist, in order."""
        return [(self.first_page + int(p)) * self.PAGE for p in np.flatnonzero(self.slots >= 0)]

    def _positions_of_range(self, address: int, nbytes: int) -> Array:
        super()._positions_of_range(address, nbytes)
        return self.positions(np.uint64(address) + np.arange(nbytes, dtype=np.uint64))

    def guards_intact(self) -> bool:
        return True  # nothing outside has a place in the buffer


class Arena:
    """A device's allocations; new ones go upwards from `base`, with guard zones between them."""

    def __init__(self, base: int = 0x7F00_0000_0000):
        self.cursor = base
        self.allocations: list[Allocation] = []
        self._index()

    def allocate(
        self,
        nbytes: int,
        align: int = 256,
        skew: int = 0,
        name: str = "",
        data: bytes | Array | None = None,
        writable: bool = True,
    ) -> Allocation:
        """Memory at the next address that is `skew` past a multiple of `align`.

        `data` of None leaves it uninitialised.
        """
        address = -(-(self.cursor + GUARD) // align) * align + skew
        self.cursor = address + nbytes
        return self.place(address, nbytes, name=name, data=data, writable=writable)

    def place(
        self,
        address: int,
        nbytes: int,
        name: str = "",
        data: bytes | Array | None = None,
        writable: bool = True,
    ) -> Allocation:
        """Memory at an address of the caller's choice."""
        allocation = Allocation(address, nbytes, self._name(name), writable)
        if data is None:
            allocation.valid = np.zeros(len(allocation.buffer), bool)
        else:
            if len(_as_bytes(data)) != nbytes:
                raise ValueError(f"'{name}': {len(_as_bytes(data))} bytes of data for {nbytes}")
            allocation.write(address, data)
        return self._insert(allocation)

    def place_lazy(
        self,
        address: int,
        nbytes: int,
        name: str = "",
        fill: Filler | None = None,
        writable: bool = True,
    ) -> LazyAllocation:
        """Memory of any size, of which only touched pages exist; see `LazyAllocation`."""
        allocation = LazyAllocation(address, nbytes, self._name(name), writable, fill)
        self._insert(allocation)
        return allocation

    def _name(self, name: str) -> str:
        return name or f"allocation {len(self.allocations)}"

    def _insert(self, allocation: Allocation) -> Allocation:
        at = bisect.bisect(self._bases, allocation.address)
        neighbours = self.allocations[max(at - 1, 0) : at + 1]
        for other in neighbours:
            if allocation.address < other.end and other.address < allocation.end:
                raise ValueError(f"'{allocation.name}' overlaps '{other.name}'")
        self.allocations.insert(at, allocation)
        self._index()
        return allocation

    def _index(self) -> None:
        self._bases = [a.address for a in self.allocations]
        self._base_array = np.array(self._bases, np.uint64)
        self._size_array = np.array([a.size for a in self.allocations], np.uint64)

    def read(self, address: int, nbytes: int) -> Array:
        """A copy of memory as bytes, for the host."""
        return self._holder(address).read(address, nbytes)

    def write(self, address: int, data: bytes | Array) -> None:
        """The host's write; counts as initialisation."""
        self._holder(address).write(address, data)

    def _holder(self, address: int) -> Allocation:
        at = bisect.bisect(self._bases, address) - 1
        if at < 0 or address > self.allocations[at].end:
            raise IndexError(f"no allocation holds {address:#x}")
        return self.allocations[at]

    def check_guards(self) -> list[str]:
        """Names of allocations around which something was written; empty if all is well."""
        return [a.name for a in self.allocations if not a.guards_intact()]

    def forget_accesses(self) -> None:
        """Starts a new launch: what earlier ones accessed is ordered before it."""
        for allocation in self.allocations:
            allocation.shadow = None

    def partition(
        self, addresses: Array, width: int
    ) -> tuple[list[tuple[Allocation, Array | slice]], Array | None]:
        """Sorts accesses by the allocation that holds them whole.

        Returns the allocations, each with the accesses that it holds, and the accesses that none
        holds (None if all are held).
        """
        lowest, highest = int(addresses.min()), int(addresses.max())
        at = bisect.bisect(self._bases, lowest) - 1
        if at >= 0 and highest + width <= self.allocations[at].end:
            return [(self.allocations[at], slice(None))], None
        at = np.searchsorted(self._base_array, addresses, side="right") - 1
        if not self.allocations:
            return [], np.arange(len(addresses))
        offsets = addresses - self._base_array[at]
        room = self._size_array[at]
        held = (at >= 0) & (room >= width) & (offsets <= room - np.uint64(width))
        parts = [
            (self.allocations[i], np.flatnonzero(held & (at == i))) for i in np.unique(at[held])
        ]
        return parts, None if held.all() else np.flatnonzero(~held)

    def nearest(self, address: int) -> str:
        """The allocation nearest to an address, in words."""
        if not self.allocations:
            return "no allocations"

        def distance(a: Allocation) -> int:
            return max(a.address - address, address - a.end + 1, 0)

        a = min(self.allocations, key=distance)
        if distance(a) == 0:
            return f"byte {address - a.address} of '{a.name}'"
        if address < a.address:
            return f"{a.address - address} bytes before '{a.name}'"
        return f"{address - a.end} bytes after the end of '{a.name}', which has {a.size} bytes"
