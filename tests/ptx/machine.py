"""Executes kernels: many blocks at a time, all their threads in one NumPy operation.

Of the threads of a batch the ones at the lowest program counter go first, so that branches which
part meet again behind their join. Threads at a barrier or a warp instruction are parked until the
others are there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np

from . import races
from .access import Access
from .counts import Counts
from .findings import Finding, Findings
from .lanes import ALL, Lanes, merge, narrow, numbers, size
from .memory import Arena
from .program import Kernel, Module
from .spaces import Spaces
from .steps import Program, compile_kernel
from .synchronise import Meeting

Array = np.ndarray
Dim = tuple[int, int, int]

BATCH_THREADS = 1 << 15
BUDGET = 100_000
_MAX_GRID = (2**31 - 1, 65535, 65535)


class KernelFault(AssertionError):
    """Raised by `Result.raise_if_findings`."""


@dataclass
class Result:
    """What came of a launch."""

    kernel: str
    findings: list[Finding]  # the first of each kind
    finding_counts: Counter[str]  # all of them
    counts: Counts

    @property
    def ok(self) -> bool:
        return not self.finding_counts

    def raise_if_findings(self) -> None:
        if not self.ok:
            total = ", ".join(f"{n} {kind}" for kind, n in self.finding_counts.items())
            raise KernelFault("\n".join([f"{self.kernel}: {total}", *map(str, self.findings)]))


class _BudgetExceeded(Exception):
    pass


class Launch:
    """What the batches of a launch have in common."""

    def __init__(
        self, module: Module, program: Program, grid: Dim, block: Dim, spaces: Spaces, races: bool
    ):
        self.module = module
        self.program = program
        self.grid = grid
        self.block = block
        self.spaces = spaces
        self.races = races
        self.findings = Findings()
        self.counts = Counts()
        self.executed = np.zeros(len(program.actions), np.int64)
        self.blocks: list[int] = []  # that were executed, in order

    def coordinates(self, index: int, extent: Dim) -> Dim:
        return index % extent[0], index // extent[0] % extent[1], index // extent[0] // extent[1]


class Batch:
    """The threads of some blocks: their registers, where they are, and what they wait for."""

    def __init__(self, launch: Launch, blocks: list[int]):
        self.launch = launch
        self.program = launch.program.actions
        self.detects_races = launch.races
        self.threads = prod(launch.block)
        self.blocks = len(blocks)
        self.count = self.blocks * self.threads
        self.first_block = len(launch.blocks)
        launch.blocks += blocks
        thread = np.arange(self.threads)
        self.thread = np.tile(thread, self.blocks)
        self.block = np.repeat(np.arange(self.blocks), self.threads)
        self.warps_per_block = -(-self.threads // 32)
        self.warp = self.block * self.warps_per_block + self.thread // 32
        self.lane = (self.thread % 32).astype(np.uint32)
        self.warp_start = np.arange(self.count) - self.lane
        self.exited = np.zeros(self.count, bool)
        self.at_barrier: dict[int, dict[int, Lanes]] = {}  # by number of the barrier, then by pc
        self.at_warp_meeting: dict[int, Lanes] = {}  # by pc
        self.registers: dict[str, Array] = {
            name: np.zeros(1, t.register_dtype)
            for name, t in launch.program.kernel.registers.items()
        }
        self.block_index = np.array(blocks, np.int64)
        self.block_bytes = np.zeros(self.blocks, np.int64)
        if self.detects_races:
            self.keys = races.keys(self.first_block + self.block, np.int64(0), self.thread)
        self._specials: dict[str, Array] = {}
        launch.spaces.populate(self.block, self.blocks)

    # ---- sets of threads

    def numbers(self, lanes: Lanes) -> Array:
        return numbers(lanes, self.count)

    def size(self, lanes: Lanes) -> int:
        return size(lanes, self.count)

    def first(self, lanes: Lanes) -> Array:
        return self.numbers(lanes)[:1]

    def first_of_each_block(self, lanes: Lanes) -> Array:
        members = self.numbers(lanes)
        return members[np.unique(self.block[members], return_index=True)[1]]

    def alive(self) -> Lanes:
        return narrow(ALL, ~self.exited, self.count) if self.exited.any() else ALL

    def lane_bits(self, lanes: Lanes) -> Array:
        """For each warp of the batch, a bit for each of its lanes that is in the set."""
        bits = np.zeros(self.blocks * self.warps_per_block, np.uint32)
        np.bitwise_or.at(bits, self.warp[lanes], np.uint32(1) << self.lane[lanes])
        return bits

    # ---- running

    def run(self, budget: int) -> None:
        """Executes until all threads have left the kernel."""
        launch = self.launch
        self.frontier: dict[int, Lanes] = {0: ALL}
        while self.frontier or self._unblock():
            pc = min(self.frontier)
            lanes: Lanes | None = self.frontier.pop(pc)
            while lanes is not None:
                if pc in self.frontier:
                    lanes = merge(lanes, self.frontier.pop(pc), self.count)
                budget -= 1
                if budget < 0:
                    message = "the instruction budget is used up"
                    self.report("budget", message, self.program[pc], self.first(lanes))
                    raise _BudgetExceeded
                lanes = self._execute(pc, lanes)
                pc += 1
        launch.counts.block_bytes = np.append(launch.counts.block_bytes, self.block_bytes)

    def _execute(self, pc: int, lanes: Lanes) -> Lanes | None:
        """Executes one instruction; gives the threads that go on behind it, if it is certain."""
        action = self.program[pc]
        active = lanes
        if action.guard is not None:
            mask = action.guard(self, lanes)
            active = narrow(lanes, mask, self.count)
        count = self.size(active)
        if not count:
            return lanes
        self.launch.executed[pc] += count
        if action.compute is not None:
            action.compute(self, active)
            return lanes
        if count < self.size(lanes):
            self._enter(pc + 1, narrow(lanes, ~mask, self.count))
        for target, group in action.control.arrive(self, active, pc):
            self._enter(target, group)
        return None

    def _enter(self, pc: int, lanes: Lanes) -> None:
        if self.size(lanes):
            other = self.frontier.get(pc)
            self.frontier[pc] = lanes if other is None else merge(other, lanes, self.count)

    def _unblock(self) -> bool:
        """When all threads that are left are parked: lets the first ones go on, with a finding."""
        if self.at_warp_meeting:
            pc = min(self.at_warp_meeting)
            lanes = self.at_warp_meeting[pc]
        else:
            parked = [(pc, w) for waiting in self.at_barrier.values() for pc, w in waiting.items()]
            if not parked:
                return False
            pc, lanes = min(parked, key=lambda item: item[0])
        meeting: Meeting = self.program[pc].control
        for target, group in meeting.force(self, lanes, pc):
            self._enter(target, group)
        return True

    def pass_barrier(self, lanes: Lanes) -> None:
        if self.detects_races:
            self.keys[lanes] += 1 << races.THREAD_BITS

    # ---- what instructions ask for

    def special(self, name: str) -> Array:
        """The value of a special register, for each thread or for all."""
        if name not in self._specials:
            self._specials[name] = self._special(name).astype(np.uint32)
        return self._specials[name]

    def _special(self, name: str) -> Array:
        what, _, axis = name[1:].partition(".")
        if what.startswith("lanemask"):
            bit = np.uint64(1) << self.lane.astype(np.uint64)
            return {
                "eq": bit,
                "lt": bit - np.uint64(1),
                "le": 2 * bit - np.uint64(1),
                "gt": ~(2 * bit - np.uint64(1)),
                "ge": ~(bit - np.uint64(1)),
            }[what[-2:]]
        if what in ("laneid", "warpid", "nwarpid"):
            values = {
                "laneid": self.lane,
                "warpid": self.thread // 32,
                "nwarpid": np.array([self.warps_per_block]),
            }
            return values[what]
        place = "xyz".index(axis)
        extent = self.launch.block if what in ("tid", "ntid") else self.launch.grid
        if what in ("ntid", "nctaid"):
            return np.array([extent[place]])
        index = self.thread if what == "tid" else self.block_index[self.block]
        value = index // prod(extent[:place]) % extent[place]
        return value if (value != value[0]).any() else value[:1]

    def resolve(
        self, space: str, threads: Array, addresses: Array, width: int
    ) -> tuple[Arena | Spaces, Array]:
        return self.launch.spaces.resolve(space, threads, addresses, width)

    def count_traffic(self, access: Access, lanes: Lanes, addresses: Array) -> None:
        """Counts an access if it is one to global memory."""
        if access.space not in ("global", "generic"):
            return
        getattr(self.launch.counts, access.kind).add(self.warp[lanes], addresses, access.width)
        if lanes is ALL:
            self.block_bytes += self.threads * access.width
        else:
            blocks = np.bincount(self.block[lanes], minlength=self.blocks)
            self.block_bytes += blocks * access.width

    def report(
        self,
        kind: str,
        message: str,
        source: Access | Meeting,
        threads: Array,
        addresses: Array | None = None,
        rivals: Array | None = None,
    ) -> None:
        """Reports a finding for each of some threads."""
        launch = self.launch
        kept = []
        for i in range(min(launch.findings.room(kind), len(threads))):
            address = None if addresses is None else int(addresses[i])
            space = getattr(source, "space", "")
            kept.append(
                Finding(
                    kind,
                    message + (self._describe(int(rivals[i])) if rivals is not None else ""),
                    launch.program.kernel.name,
                    self._block_of(self.first_block + int(self.block[threads[i]])),
                    launch.coordinates(int(self.thread[threads[i]]), launch.block),
                    launch.module.locate(source.instruction),
                    source.instruction.text,
                    address,
                    None if address is None else launch.spaces.nearest(space, address),
                )
            )
        launch.findings.report(kind, len(threads), kept)

    def _block_of(self, ordinal: int) -> Dim:
        return self.launch.coordinates(self.launch.blocks[ordinal], self.launch.grid)

    def _describe(self, key: int) -> str:
        ordinal, thread = races.describe(key)
        where = self.launch.coordinates(thread, self.launch.block)
        return f"block {self._block_of(ordinal)}, thread {where}"


# ---- launching -----------------------------------------------------------------------------------


def _dim(value: int | tuple[int, ...]) -> Dim:
    x, y, z = (*((value,) if isinstance(value, int) else value), 1, 1)[:3]
    return x, y, z


def _check(kernel: Kernel, grid: Dim, block: Dim, params: bytes) -> None:
    if len(params) != kernel.parameter_bytes:
        raise ValueError(
            f"{kernel.name} takes {kernel.parameter_bytes} bytes of parameters, not {len(params)}"
        )
    if min(*grid, *block) < 1 or any(g > m for g, m in zip(grid, _MAX_GRID, strict=True)):
        raise ValueError(f"no device launches a grid of {grid} blocks of {block} threads")
    limit = prod(kernel.max_threads or (1024,))
    if prod(block) > min(limit, 1024):
        raise ValueError(f"{prod(block)} threads in a block of {kernel.name}, which takes {limit}")
    if kernel.required_threads and block != kernel.required_threads:
        raise ValueError(f"{kernel.name} requires blocks of {kernel.required_threads} threads")


def _batches(blocks: Iterable[int], length: int) -> Iterator[list[int]]:
    remaining = iter(blocks)
    while batch := list(itertools.islice(remaining, length)):
        yield batch


def launch(
    module: Module,
    kernel: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    params: bytes,
    memory: Arena,
    *,
    races: bool = True,
    blocks: Iterable[int] | None = None,
    shared_bytes: int = 0,
    budget: int = BUDGET,
    batch_threads: int = BATCH_THREADS,
) -> Result:
    """Executes a kernel.

    Args:
        module: what `parse` gave.
        kernel: the kernel's name.
        grid: blocks along x, y and z; an integer for x alone.
        block: threads along x, y and z.
        params: the bytes of the kernel's parameter space.
        memory: the device's memory, which the kernel changes.
        races: look for data races.
        blocks: linear indices of the blocks to execute; None for all.
        shared_bytes: dynamic shared memory of each block.
        budget: instructions that a batch of blocks may issue before it counts as hanging.
        batch_threads: about how many threads are executed at a time.

    Returns:
        Findings and counts. A bad access is left out (a load gives 0) and execution goes on.

    Raises:
        UnsupportedPTX: the kernel has an instruction that is not known.
        ValueError: no device would take this launch.
    """
    grid, block = _dim(grid), _dim(block)
    code = module.kernels[kernel]
    _check(code, grid, block, params)
    program = compile_kernel(module, code, prod(block), shared_bytes)
    memory.forget_accesses()
    if blocks is None:
        blocks = range(prod(grid))
    spaces = Spaces(memory, params, program.shared_bytes, program.local_bytes)
    state = Launch(module, program, grid, block, spaces, races)
    with np.errstate(all="ignore"), contextlib.suppress(_BudgetExceeded):
        for some in _batches(blocks, max(batch_threads // prod(block), 1)):
            Batch(state, some).run(budget)
    names = [i.name for i in code.instructions]
    for name, executed in zip(names, state.executed.tolist(), strict=False):
        if executed:
            state.counts.instructions[name] += executed
    return Result(kernel, state.findings.kept, state.findings.counts, state.counts)
