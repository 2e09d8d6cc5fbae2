"""Instructions that access memory: ld, st, atom and red."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import floats
from .instructions import Modifiers
from .lanes import Lanes
from .memory import Allocation, item_dtype
from .operands import Reader, Step, Translator
from .program import Address, Instruction, Operand, Register, Vector
from .scalars import SCALARS, ScalarType

if TYPE_CHECKING:
    from .machine import Batch

Array = np.ndarray

SPACES = ("global", "shared", "local", "param")

# Hints about caches, which leave results alone.
_LOAD_HINTS = ("ca", "cg", "cs", "lu", "cv")
_STORE_HINTS = ("wb", "cg", "cs", "wt")
_EVICTION = tuple(
    f"L{level}::{hint}"
    for level in (1, 2)
    for hint in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")
)
_PREFETCH = ("L2::64B", "L2::128B", "L2::256B")
_ELEMENTS = (*(f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)), "f32", "f64")


class Part(NamedTuple):
    """The accesses of an instruction that one allocation holds and that are in order."""

    allocation: Allocation
    lanes: Array | slice  # places among the instruction's threads
    positions: Array


class Access:
    """What one instruction does to memory: where, how wide, and which checks it has to pass."""

    def __init__(self, kind: str, instruction: Instruction, space: str, width: int):
        self.kind = kind  # "load", "store" or "atomic"
        self.instruction = instruction
        self.space = space
        self.width = width
        self.what = f"{kind} of {width} bytes"

    def parts(self, batch: Batch, lanes: Lanes, addresses: Array) -> Iterator[Part]:
        """The accesses that may go on; the others are reported and left out."""
        threads = batch.numbers(lanes)
        keep: Array | slice = slice(None)
        misaligned = addresses & np.uint64(self.width - 1) != 0
        if misaligned.any():
            bad = np.flatnonzero(misaligned)
            batch.report("misaligned", self.what, self, threads[bad], addresses[bad])
            keep = np.flatnonzero(~misaligned)
            if not len(keep):
                return
        space, absolute = batch.resolve(self.space, threads[keep], addresses[keep], self.width)
        held, lost = space.partition(absolute, self.width)
        if lost is not None:
            where = np.arange(len(addresses))[keep][lost]
            batch.report("out-of-bounds", self.what, self, threads[where], addresses[where])
        for allocation, chosen in held:
            positions = allocation.positions(absolute[chosen])
            places = chosen if isinstance(keep, slice) else keep[chosen]
            good = self._check(batch, allocation, threads[places], addresses[places], positions)
            if good is None:
                yield Part(allocation, places, positions)
            elif len(good):
                yield Part(allocation, np.arange(len(addresses))[places][good], positions[good])

    def _check(
        self,
        batch: Batch,
        allocation: Allocation,
        threads: Array,
        addresses: Array,
        positions: Array,
    ) -> Array | None:
        """Which of the accesses are allowed; None if all are."""
        if self.kind != "load" and not allocation.writable:
            batch.report("read-only", self.what, self, threads, addresses)
            return np.arange(0)
        if batch.detects_races and self.space != "param":
            self._check_races(batch, allocation, threads, addresses, positions)
        if self.kind == "store":
            return None
        initialised = allocation.initialised(positions, self.width)
        if initialised is None or initialised.all():
            return None
        bad = np.flatnonzero(~initialised)
        message = f"{self.what} that were not all written before"
        batch.report("uninitialised", message, self, threads[bad], addresses[bad])
        return np.flatnonzero(initialised)

    def _check_races(
        self,
        batch: Batch,
        allocation: Allocation,
        threads: Array,
        addresses: Array,
        positions: Array,
    ) -> None:
        rivals = allocation.races(self.kind, positions, self.width, batch.keys[threads])
        bad = np.flatnonzero(rivals)
        if len(bad):
            message = f"{self.what} is not ordered with an access by "
            batch.report("race", message, self, threads[bad], addresses[bad], rivals=rivals[bad])


def address_reader(translator: Translator, operand: Operand, space: str) -> Reader:
    """Reads `[base + offset]` as 64-bit addresses."""
    if not isinstance(operand, Address):
        raise translator.error("an address must be in brackets")
    base = operand.base
    offset = np.uint64(operand.offset & (2**64 - 1))
    t = SCALARS["u64"]
    if isinstance(base, Register) and space in ("shared", "local", "param"):
        t = SCALARS[f"u{translator.kernel.registers[base.name].bits}"]
    read = translator.reader(base, t)
    return lambda batch, lanes: read(batch, lanes).astype(np.uint64) + offset


def _everyone(addresses: Array, batch: Batch, lanes: Lanes) -> Array:
    """One address for each thread."""
    count = batch.size(lanes)
    return addresses if len(addresses) == count else np.repeat(addresses, count)


def _space(m: Modifiers, allowed: tuple[str, ...]) -> str:
    return m.take(*allowed) or "generic"


def _vector(m: Modifiers) -> int:
    return int((m.take("v2", "v4", "v8") or "v1")[1:])


def _items(translator: Translator, operand: Operand, count: int) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise translator.error(f"{len(items)} registers for {count} elements")
    return items


def load_step(translator: Translator) -> Step:
    m = Modifiers(translator.instruction)
    m.take("volatile", "weak")
    space = _space(m, SPACES)
    m.take(*_LOAD_HINTS)
    m.take("nc")
    m.take(*_EVICTION)
    m.take(*_EVICTION)
    m.take(*_PREFETCH)
    count = _vector(m)
    t = m.type(*_ELEMENTS)
    m.end()
    target, source = translator.operands(2)
    writers = [translator.writer(o, t, wider=True) for o in _items(translator, target, count)]
    read_address = address_reader(translator, source, space)
    access = Access("load", translator.instruction, space, count * t.bytes)
    element = t.register_dtype

    def step(batch: Batch, lanes: Lanes) -> None:
        addresses = read_address(batch, lanes)
        if space == "param" and len(addresses) == 1:  # the same for all: read once
            items = _load(access, batch, batch.first(lanes), addresses)
        else:
            addresses = _everyone(addresses, batch, lanes)
            batch.count_traffic(access, lanes, addresses)
            items = _load(access, batch, lanes, addresses)
        columns = items.view(element).reshape(-1, count)
        for i, write in enumerate(writers):
            write(batch, lanes, columns[:, i].copy().view(t.dtype))

    return step


def _load(access: Access, batch: Batch, lanes: Lanes, addresses: Array) -> Array:
    result = None
    for part in access.parts(batch, lanes, addresses):
        items = part.allocation.load(part.positions, access.width)
        if len(items) == len(addresses):
            return items
        if result is None:
            result = np.zeros(len(addresses), item_dtype(access.width))
        result[part.lanes] = items
    return np.zeros(len(addresses), item_dtype(access.width)) if result is None else result


def store_step(translator: Translator) -> Step:
    m = Modifiers(translator.instruction)
    m.take("volatile", "weak")
    space = _space(m, SPACES[:3])
    m.take(*_STORE_HINTS)
    m.take(*_EVICTION)
    m.take(*_EVICTION)
    count = _vector(m)
    t = m.type(*_ELEMENTS)
    m.end()
    target, source = translator.operands(2)
    readers = [translator.reader(o, t, wider=True) for o in _items(translator, source, count)]
    read_address = address_reader(translator, target, space)
    access = Access("store", translator.instruction, space, count * t.bytes)

    def step(batch: Batch, lanes: Lanes) -> None:
        addresses = _everyone(read_address(batch, lanes), batch, lanes)
        batch.count_traffic(access, lanes, addresses)
        columns = np.empty((len(addresses), count), t.register_dtype)
        for i, read in enumerate(readers):
            columns[:, i] = read(batch, lanes).view(t.register_dtype)
        items = columns.reshape(-1).view(item_dtype(access.width))
        for part in access.parts(batch, lanes, addresses):
            part.allocation.store(part.positions, access.width, items[part.lanes])

    return step


# ---- atomics -------------------------------------------------------------------------------------


def _flushed_add(a: Array, b: Array) -> Array:
    """What `atom.add.f32` does in global memory: subnormals count as zeros."""
    return floats.flush(floats.add(floats.flush(a), floats.flush(b)))


def _atomic_function(m: Modifiers, name: str, t: ScalarType, space: str) -> Callable[..., Array]:
    if t.kind == "f":
        if name != "add":
            raise m.error("floats are only added atomically")
        return floats.add if t.bits == 64 or space == "shared" else _flushed_add
    return {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, new: new,
        "cas": lambda old, expected, new: np.where(old == expected, new, old),
    }[name]


_ATOMIC_TYPES = {
    "add": ("u32", "s32", "u64", "f32", "f64"),
    **dict.fromkeys(("min", "max"), ("u32", "s32", "u64", "s64")),
    **dict.fromkeys(("and", "or", "xor", "exch", "cas"), ("b32", "b64")),
}


def atomic_step(translator: Translator) -> Step:
    """Threads that meet at an address take turns, lowest first; hardware leaves the order open."""
    m = Modifiers(translator.instruction)
    returns = translator.instruction.opcode == "atom"
    m.take("relaxed", "acquire", "release", "acq_rel")
    m.take("cta", "gpu", "sys")
    space = _space(m, ("global", "shared"))
    name = m.require(*_ATOMIC_TYPES)
    t = m.type(*_ATOMIC_TYPES[name])
    m.end()
    function = _atomic_function(m, name, t, space)
    sources = 2 if name == "cas" else 1
    operands = translator.operands(sources + 1 + returns)
    write = translator.writer(operands[0], t) if returns else None
    read_address = address_reader(translator, operands[returns], space)
    readers = [translator.reader(o, t) for o in operands[returns + 1 :]]
    access = Access("atomic", translator.instruction, space, t.bytes)

    def step(batch: Batch, lanes: Lanes) -> None:
        addresses = _everyone(read_address(batch, lanes), batch, lanes)
        batch.count_traffic(access, lanes, addresses)
        values = [_everyone(read(batch, lanes), batch, lanes) for read in readers]
        old = np.zeros(len(addresses), t.dtype)
        for part in access.parts(batch, lanes, addresses):
            for turn in _turns(part.positions):
                places = np.arange(len(addresses))[part.lanes][turn]
                positions = part.positions[turn]
                before = part.allocation.load(positions, t.bytes).view(t.dtype)
                old[places] = before
                after = function(before, *(v[places] for v in values))
                part.allocation.store(positions, t.bytes, after.view(t.register_dtype))
        if write is not None:
            write(batch, lanes, old)

    return step


def _turns(positions: Array) -> list[Array]:
    """Splits accesses so that none of a turn meet: the first at each position, the second, ..."""
    order = np.argsort(positions, kind="stable")
    ordered = positions[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    lengths = np.diff(np.append(starts, len(ordered)))
    rank = np.arange(len(ordered)) - np.repeat(starts, lengths)
    by_rank = order[np.argsort(rank, kind="stable")]
    return np.split(by_rank, np.cumsum(np.bincount(rank))[:-1])
