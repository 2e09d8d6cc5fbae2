"""Instructions at which threads meet: barriers, shuffles, votes and reductions over a warp.

A thread that arrives is parked until the others are there. `Meeting.arrive` parks threads and gives
back those that may go on; `Meeting.force` is for when nothing else can run: it reports who is
missing and lets the parked ones go on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .instructions import INTEGER_BINARY, Modifiers
from .lanes import Lanes, merge, narrow
from .operands import Reader, Translator
from .program import Instruction, Integer, Pair, Sink
from .scalars import SCALARS

if TYPE_CHECKING:
    from .machine import Batch

Array = np.ndarray

_U32 = SCALARS["u32"]
_PRED = SCALARS["pred"]


class Meeting(Protocol):
    instruction: Instruction

    def arrive(self, batch: Batch, lanes: Lanes, pc: int) -> list[tuple[int, Lanes]]: ...

    def force(self, batch: Batch, lanes: Lanes, pc: int) -> list[tuple[int, Lanes]]: ...


# ---- barriers of a block -------------------------------------------------------------------------

Completion = Callable[["Batch", Lanes], None]


class Barrier:
    """`bar.sync` and its like. Threads of a block meet at a barrier's number, wherever they are."""

    def __init__(self, instruction: Instruction, number: int, complete: Completion | None):
        self.instruction = instruction
        self.number = number
        self.complete = complete

    def arrive(self, batch: Batch, lanes: Lanes, pc: int) -> list[tuple[int, Lanes]]:
        waiting = batch.at_barrier.setdefault(self.number, {})
        waiting[pc] = merge(waiting[pc], lanes, batch.count) if pc in waiting else lanes
        arrived = sum(
            np.bincount(batch.block[parked], minlength=batch.blocks) for parked in waiting.values()
        )
        return self._release(batch, arrived == batch.threads)

    def force(self, batch: Batch, lanes: Lanes, pc: int) -> list[tuple[int, Lanes]]:
        first = batch.first_of_each_block(lanes)
        batch.report("barrier", "not all threads of the block reach the barrier", self, first)
        return self._release(batch, np.ones(batch.blocks, bool))

    def _release(self, batch: Batch, complete: Array) -> list[tuple[int, Lanes]]:
        """Lets the parked threads of complete blocks go on."""
        if not complete.any():
            return []
        waiting = batch.at_barrier[self.number]
        released = []
        for pc, parked in list(waiting.items()):
            mask = complete[batch.block[parked]]
            gone = narrow(parked, mask, batch.count)
            if batch.size(gone):
                batch.pass_barrier(gone)
                complete_there = batch.program[pc].control.complete
                if complete_there is not None:
                    complete_there(batch, gone)
                released.append((pc + 1, gone))
            if mask.all():
                del waiting[pc]
            else:
                waiting[pc] = narrow(parked, ~mask, batch.count)
        return released


def barrier(translator: Translator) -> Barrier:
    """`bar.sync n{, threads}`, or `bar.red`, which also reduces a predicate over the block."""
    instruction = translator.instruction
    m = Modifiers(instruction)
    m.take("cta")
    kind = m.require("sync", "red")
    if kind == "sync":
        m.take("aligned")
        m.end()
        number, *count = translator.operands(1, 2)
        complete = None
    else:
        reduction = m.require("popc", "and", "or")
        m.take("aligned")
        result = m.type("u32" if reduction == "popc" else "pred")
        m.end()
        target, number, *count, predicate = translator.operands(3, 4)
        write = translator.writer(target, result)
        read = translator.reader(predicate, _PRED)

        def complete(batch: Batch, lanes: Lanes) -> None:
            block = batch.block[lanes]
            holds = np.broadcast_to(read(batch, lanes), block.shape)
            votes = np.bincount(block[holds], minlength=batch.blocks)[block]
            if reduction == "popc":
                write(batch, lanes, votes.astype(np.uint32))
            else:
                write(batch, lanes, votes > 0 if reduction == "or" else votes == batch.threads)

    if not isinstance(number, Integer) or not all(isinstance(c, Integer) for c in count):
        raise translator.error("a barrier's number and count must be constants")
    if count and count[0].value != translator.threads:
        raise translator.error("a barrier of a part of the block")
    return Barrier(instruction, number.value, complete)


# ---- meetings of a warp --------------------------------------------------------------------------

Exchange = Callable[["WarpState"], None]


class WarpState:
    """Threads that execute a warp instruction together, and who is there in each warp."""

    def __init__(self, batch: Batch, lanes: Lanes, members: Array, meeting: WarpMeeting):
        self.batch = batch
        self.lanes = lanes
        self.members = members  # the membermask, for each thread
        self.meeting = meeting
        self.here = batch.lane_bits(lanes)[batch.warp[lanes]]

    def gather(self, value: Array, lane: Array) -> tuple[Array, Array]:
        """The values of other lanes of the same warp, and whether those lanes take part."""
        batch = self.batch
        whole = np.zeros(batch.count, value.dtype)
        whole[self.lanes] = value
        absent = ((self.here & self.members) >> lane.astype(np.uint32)) & np.uint32(1) == 0
        source = batch.warp_start[self.lanes] + lane
        return whole[np.where(absent, 0, source)], ~absent

    def ballot(self, predicate: Array) -> Array:
        """A bit for each participating lane whose predicate holds."""
        lanes = narrow(self.lanes, predicate, self.batch.count)
        return self.batch.lane_bits(lanes)[self.batch.warp[self.lanes]] & self.members


class WarpMeeting:
    """An instruction for which the threads named by a membermask wait for one another."""

    def __init__(self, instruction: Instruction, mask: Reader, exchange: Exchange | None):
        self.instruction = instruction
        self.mask = mask
        self.exchange = exchange

    def arrive(self, batch: Batch, lanes: Lanes, pc: int) -> list[tuple[int, Lanes]]:
        if pc in batch.at_warp_meeting:
            lanes = merge(batch.at_warp_meeting.pop(pc), lanes, batch.count)
        members = np.broadcast_to(self.mask(batch, lanes), batch.size(lanes))
        alive = batch.lane_bits(batch.alive())
        warp = batch.warp[lanes]
        missing = members & alive[warp] & ~batch.lane_bits(lanes)[warp]
        if missing.any():
            batch.at_warp_meeting[pc] = narrow(lanes, missing != 0, batch.count)
            lanes = narrow(lanes, missing == 0, batch.count)
        return self._execute(batch, lanes, pc)

    def force(self, batch: Batch, lanes: Lanes, pc: int) -> list[tuple[int, Lanes]]:
        message = "lanes of the membermask never arrive"
        batch.report("absent-lane", message, self, batch.numbers(lanes))
        del batch.at_warp_meeting[pc]
        return self._execute(batch, lanes, pc)

    def _execute(self, batch: Batch, lanes: Lanes, pc: int) -> list[tuple[int, Lanes]]:
        if not batch.size(lanes):
            return []
        members = np.broadcast_to(self.mask(batch, lanes), batch.size(lanes))
        stranger = (members >> batch.lane[lanes]) & np.uint32(1) == 0
        if stranger.any():
            message = "the membermask does not name the thread that uses it"
            batch.report("absent-lane", message, self, batch.numbers(lanes)[stranger])
        if self.exchange is not None:
            self.exchange(WarpState(batch, lanes, members, self))
        return [(pc + 1, lanes)]


def shuffle(translator: Translator) -> WarpMeeting:
    m = Modifiers(translator.instruction)
    m.require("sync")
    mode = m.require("idx", "up", "down", "bfly")
    t = m.type("b32")
    m.end()
    target, source, offset, limits, mask = translator.operands(5)
    pair = target if isinstance(target, Pair) else Pair(target, Sink())
    write = translator.writer(pair.first, t)
    write_inside = translator.writer(pair.second, _PRED)
    read, read_offset, read_limits = (translator.reader(o, _U32) for o in (source, offset, limits))

    def exchange(state: WarpState) -> None:
        batch, lanes = state.batch, state.lanes
        lane = batch.lane[lanes].astype(np.int64)
        step = (read_offset(batch, lanes) & np.uint32(31)).astype(np.int64)
        clamp = read_limits(batch, lanes).astype(np.int64)
        segment = (clamp >> 8) & 31
        lowest = lane & segment
        highest = lowest | (clamp & 31 & ~segment)
        if mode == "up":
            chosen = lane - step
            inside = chosen >= highest
        else:
            within = lowest | (step & ~segment)
            chosen = {"down": lane + step, "bfly": lane ^ step, "idx": within}[mode]
            inside = chosen <= highest
        chosen = np.where(inside, chosen, lane)
        value = np.broadcast_to(read(batch, lanes), lane.shape)
        result, present = state.gather(value, chosen)
        if not present.all():
            absent = batch.numbers(lanes)[~present]
            message = "a shuffle reads a lane that does not take part"
            batch.report("absent-lane", message, state.meeting, absent)
        write(batch, lanes, result)
        write_inside(batch, lanes, inside)

    return WarpMeeting(translator.instruction, translator.reader(mask, _U32), exchange)


def vote(translator: Translator) -> WarpMeeting:
    m = Modifiers(translator.instruction)
    m.require("sync")
    mode = m.require("any", "all", "ballot")
    t = m.type("b32" if mode == "ballot" else "pred")
    m.end()
    target, predicate, mask = translator.operands(3)
    write = translator.writer(target, t)
    read = translator.reader(predicate, _PRED)

    def exchange(state: WarpState) -> None:
        holds = np.broadcast_to(read(state.batch, state.lanes), state.members.shape)
        ballot = state.ballot(holds)
        result = {
            "ballot": ballot,
            "any": ballot != 0,
            "all": ballot == state.here & state.members,
        }[mode]
        write(state.batch, state.lanes, result)

    return WarpMeeting(translator.instruction, translator.reader(mask, _U32), exchange)


def reduction(translator: Translator) -> WarpMeeting:
    """`redux.sync`: a reduction whose result all participating lanes get."""
    m = Modifiers(translator.instruction)
    m.require("sync")
    name = m.require("add", "min", "max", "and", "or", "xor")
    t = m.type("b32") if name in ("and", "or", "xor") else m.type("u32", "s32")
    m.end()
    target, source, mask = translator.operands(3)
    write = translator.writer(target, t)
    read = translator.reader(source, t)
    logic = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    combine = {**INTEGER_BINARY, **logic}[name]

    def exchange(state: WarpState) -> None:
        value = np.broadcast_to(read(state.batch, state.lanes), state.members.shape)
        result = value.copy()
        first = np.ones(len(value), bool)
        for lane in range(32):
            other, present = state.gather(value, np.full(len(value), lane))
            result = np.where(present, np.where(first, other, combine(result, other)), result)
            first &= ~present
        write(state.batch, state.lanes, result)

    return WarpMeeting(translator.instruction, translator.reader(mask, _U32), exchange)


def warp_barrier(translator: Translator) -> WarpMeeting:
    (mask,) = translator.operands(1)
    return WarpMeeting(translator.instruction, translator.reader(mask, _U32), None)


def active_mask(translator: Translator) -> Callable[[Batch, Lanes], None]:
    """`activemask`: who executes together now."""
    m = Modifiers(translator.instruction)
    t = m.type("b32")
    m.end()
    (target,) = translator.operands(1)
    write = translator.writer(target, t)

    def step(batch: Batch, lanes: Lanes) -> None:
        write(batch, lanes, batch.lane_bits(lanes)[batch.warp[lanes]])

    return step
