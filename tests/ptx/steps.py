"""Turns a kernel's instructions into what the machine executes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .access import atomic_step, load_step, store_step
from .instructions import Modifiers
from .lanes import Lanes
from .operands import Reader, Step, Translator, computing_step, move_step
from .program import Instruction, Kernel, Location, Module, Symbol, Variable
from .scalars import SCALARS
from .spaces import WINDOWS
from .synchronise import active_mask, barrier, reduction, shuffle, vote, warp_barrier

if TYPE_CHECKING:
    from .machine import Batch

_PRED = SCALARS["pred"]


@dataclass(frozen=True)
class Action:
    """An instruction made executable: it computes and goes on, or it decides who goes where."""

    instruction: Instruction
    guard: Reader | None
    compute: Step | None = None
    control: Any = None  # a Meeting, Branch, Exit or Trap


@dataclass(frozen=True)
class Program:
    kernel: Kernel
    actions: list[Action]
    shared_bytes: int
    local_bytes: int


class Branch:
    def __init__(self, target: int):
        self.target = target

    def arrive(self, batch: Batch, lanes: Lanes, pc: int) -> list[tuple[int, Lanes]]:
        return [(self.target, lanes)]


class Exit:
    def arrive(self, batch: Batch, lanes: Lanes, pc: int) -> list[tuple[int, Lanes]]:
        batch.exited[lanes] = True
        return []


class Trap(Exit):
    """`trap` ends the thread and is a finding."""

    def __init__(self, instruction: Instruction):
        self.instruction = instruction

    def arrive(self, batch: Batch, lanes: Lanes, pc: int) -> list[tuple[int, Lanes]]:
        batch.report("trap", "the kernel aborts", self, batch.numbers(lanes))
        return super().arrive(batch, lanes, pc)


def _convert_address(t: Translator) -> Step:
    """`cvta`: between an offset in a space and a generic address."""
    m = Modifiers(t.instruction)
    away = m.take("to")
    space = m.require("global", *WINDOWS)
    address = m.type("u64")
    m.end()
    target, source = t.operands(2)
    write, read = t.writer(target, address), t.reader(source, address)
    base = np.uint64(WINDOWS.get(space, 0))
    if away:
        return lambda batch, lanes: write(batch, lanes, read(batch, lanes) - base)
    return lambda batch, lanes: write(batch, lanes, read(batch, lanes) + base)


def _fence(t: Translator) -> Step:
    """Memory is consistent at all times here, and fences do not order threads by themselves."""
    m = Modifiers(t.instruction)
    if t.instruction.opcode == "membar":
        m.require("cta", "gl", "sys")
    else:
        m.take("sc", "acq_rel")
        m.require("cta", "gpu", "sys")
    m.end()
    t.operands(0)
    return lambda batch, lanes: None


_COMPUTING: dict[str, Callable[[Translator], Step]] = {
    "mov": move_step,
    "cvta": _convert_address,
    "ld": load_step,
    "st": store_step,
    "atom": atomic_step,
    "red": atomic_step,
    "activemask": active_mask,
    "membar": _fence,
    "fence": _fence,
}
_WARP_MEETINGS = {"shfl": shuffle, "vote": vote, "redux": reduction}


def _control(t: Translator) -> Any:
    """What decides where threads go next, or None for an instruction that only computes."""
    instruction = t.instruction
    opcode = instruction.opcode
    if opcode in _WARP_MEETINGS:
        return _WARP_MEETINGS[opcode](t)
    if instruction.name == "bar.warp.sync":
        return warp_barrier(t)
    if opcode in ("bar", "barrier"):
        return barrier(t)
    if instruction.name in ("bra", "bra.uni"):
        (target,) = t.operands(1)
        if not isinstance(target, Symbol) or target.name not in t.kernel.labels:
            raise t.error("unknown label")
        return Branch(t.kernel.labels[target.name])
    if instruction.name in ("ret", "ret.uni", "exit", "trap"):
        t.operands(0)
        return Trap(instruction) if opcode == "trap" else Exit()
    return None


def _action(t: Translator) -> Action:
    guard = t.instruction.guard
    read_guard = t.reader(guard, _PRED) if guard is not None else None
    control = _control(t)
    if control is not None:
        return Action(t.instruction, read_guard, control=control)
    step = _COMPUTING.get(t.instruction.opcode, computing_step)(t)
    return Action(t.instruction, read_guard, compute=step)


def _lay_out(variables: list[Variable], symbols: dict[str, int]) -> int:
    """Gives variables their offsets; returns how many bytes they take."""
    end = 0
    for v in variables:
        start = -(-end // v.align) * v.align
        symbols[v.name] = start
        end = start + v.size
    return end


def compile_kernel(module: Module, kernel: Kernel, threads: int, dynamic: int) -> Program:
    """Makes a kernel executable for blocks of so many threads and bytes of dynamic shared memory.

    It is kept with the module: launches have no state in a program.

    Raises:
        UnsupportedPTX: an instruction is not known.
    """
    key = (kernel.name, threads, dynamic)
    if key not in module.programs:
        module.programs[key] = _compiled(module, kernel, threads, dynamic)
    return module.programs[key]


def _compiled(module: Module, kernel: Kernel, threads: int, dynamic: int) -> Program:
    symbols = {p.name: p.offset for p in kernel.parameters}
    used = {
        getattr(getattr(o, "base", o), "name", None)
        for i in kernel.instructions
        for o in i.operands
    }
    shared = [*(v for v in module.shared if v.name in used), *kernel.shared]
    fixed = _lay_out([*(v for v in shared if v.size), *(v for v in shared if not v.size)], symbols)
    local = _lay_out(kernel.local, symbols)
    actions = [_action(Translator(kernel, i, symbols, threads)) for i in kernel.instructions]
    end = Instruction("exit", (), (), None, 0, Location(0, 0), "end of the kernel")
    actions.append(Action(end, None, control=Exit()))
    return Program(kernel, actions, fixed + dynamic, local)
