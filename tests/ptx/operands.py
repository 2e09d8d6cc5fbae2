"""Turns operands into functions that read and write the registers of a batch.

A register's value is an array of plain bits, one element a thread, or a single element while all
threads of the batch hold the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .instructions import operation
from .lanes import ALL, Lanes
from .program import (
    Float,
    Instruction,
    Integer,
    Kernel,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Vector,
)
from .scalars import SCALARS, ScalarType, UnsupportedPTX

if TYPE_CHECKING:
    from .machine import Batch

Array = np.ndarray
Reader = Callable[["Batch", Lanes], Array]
Writer = Callable[["Batch", Lanes, Array], None]
Step = Callable[["Batch", Lanes], None]


class Translator:
    """The operands of one instruction of a kernel that is launched with so many threads a block.

    `symbols` gives the addresses of variables.
    """

    def __init__(
        self, kernel: Kernel, instruction: Instruction, symbols: dict[str, int], threads: int
    ):
        self.kernel = kernel
        self.instruction = instruction
        self.symbols = symbols
        self.threads = threads

    def error(self, message: str) -> UnsupportedPTX:
        return UnsupportedPTX(message, self.instruction.line, self.instruction.text)

    def operands(self, *counts: int) -> tuple[Operand, ...]:
        """The instruction's operands, whose number must be one of `counts`."""
        operands = self.instruction.operands
        if len(operands) not in counts:
            raise self.error(f"'{self.instruction.name}' with {len(operands)} operands")
        return operands

    def register_type(self, register: Register, t: ScalarType, wider: bool) -> ScalarType:
        declared = self.kernel.registers[register.name]
        wider = wider and t.kind != "f"
        fits = declared.bits >= t.bits if wider else declared.bits == t.bits
        if not fits or (declared.kind == "pred") != (t.kind == "pred"):
            raise self.error(f"'{register.name}' is {declared}, which is not the size of {t}")
        return declared

    def reader(self, operand: Operand, t: ScalarType, wider: bool = False) -> Reader:
        """Reads an operand as type `t`; of a wider register, if allowed, the low bits."""
        if isinstance(operand, Register):
            return self._register_reader(operand, t, wider)
        if isinstance(operand, Special):
            return self._special_reader(operand, t)
        value = self.constant(operand, t)
        return lambda batch, lanes: value

    def constant(self, operand: Operand, t: ScalarType) -> Array:
        """A constant as an array of one element."""
        if isinstance(operand, Integer) and t.kind != "f":
            bits = operand.value & ((1 << t.bits) - 1)
        elif isinstance(operand, Float) and operand.width == t.bits:
            bits = operand.bits
        elif isinstance(operand, Symbol) and operand.name in self.symbols and t.bits >= 32:
            bits = self.symbols[operand.name] + operand.offset
        else:
            raise self.error(f"unknown operand {operand} of type {t}")
        return np.array([bits], t.register_dtype).view(t.dtype)

    def _register_reader(self, register: Register, t: ScalarType, wider: bool) -> Reader:
        declared = self.register_type(register, t, wider)
        name, dtype, negated = register.name, t.dtype, register.negated
        truncated = t.register_dtype if declared.bits > t.bits else None

        def read(batch: Batch, lanes: Lanes) -> Array:
            value = batch.registers[name]
            if len(value) > 1:
                value = value[lanes]
            if truncated is not None:
                value = value.astype(truncated)
            return ~value if negated else value.view(dtype)

        return read

    def _special_reader(self, special: Special, t: ScalarType) -> Reader:
        if t.bits != 32 or t.kind == "f":
            raise self.error(f"'{special.name}' read as {t}")

        def read(batch: Batch, lanes: Lanes) -> Array:
            value = batch.special(special.name)
            return (value[lanes] if len(value) > 1 else value).view(t.dtype)

        return read

    def writer(self, operand: Operand, t: ScalarType, wider: bool = False) -> Writer:
        """Writes a value of type `t`; a wider register, if allowed, gets it extended."""
        if isinstance(operand, Sink):
            return lambda batch, lanes, value: None
        if not isinstance(operand, Register):
            raise self.error("a destination must be a register")
        declared = self.register_type(operand, t, wider)
        name, stored = operand.name, declared.register_dtype
        extended = np.dtype(f"{t.dtype.kind}{declared.bytes}") if declared.bits > t.bits else None

        def write(batch: Batch, lanes: Lanes, value: Array) -> None:
            if extended is not None:
                value = value.astype(extended)
            value = value.view(stored)
            if lanes is ALL:
                batch.registers[name] = value
                return
            current = batch.registers[name]
            if len(current) != batch.count:
                current = batch.registers[name] = np.repeat(current, batch.count)
            current[lanes] = value

        return write


def computing_step(translator: Translator) -> Step:
    """The step of an instruction that only computes."""
    op = operation(translator.instruction)
    operands = translator.operands(len(op.sources) + 1)
    wider = op.wide_registers
    target = operands[0]
    targets = (target.first, target.second) if isinstance(target, Pair) else (target,)
    if len(targets) > len(op.results):
        raise translator.error("too many destinations")
    writers = [translator.writer(o, t, wider) for o, t in zip(targets, op.results, strict=False)]
    readers = [
        translator.reader(o, t, wider) for o, t in zip(operands[1:], op.sources, strict=True)
    ]
    compute = op.compute
    if len(op.results) == 1:
        write = writers[0]

        def step(batch: Batch, lanes: Lanes) -> None:
            write(batch, lanes, compute(*[read(batch, lanes) for read in readers]))

    else:

        def step(batch: Batch, lanes: Lanes) -> None:
            results = compute(*[read(batch, lanes) for read in readers])
            for write, result in zip(writers, results, strict=False):
                write(batch, lanes, result)

    return step


def move_step(translator: Translator) -> Step:
    """`mov`: a copy, or vectors packed into and unpacked from one register."""
    modifiers = translator.instruction.modifiers
    if len(modifiers) != 1 or modifiers[0] not in SCALARS:
        raise translator.error("unknown form of mov")
    t = SCALARS[modifiers[0]]
    target, source = translator.operands(2)
    if isinstance(target, Vector):
        return _unpacking(translator, target, source, t)
    write = translator.writer(target, t)
    if isinstance(source, Vector):
        read = _packed_reader(translator, source, t)
    else:
        read = translator.reader(source, t)
    return lambda batch, lanes: write(batch, lanes, read(batch, lanes).copy())


def _part(translator: Translator, vector: Vector, t: ScalarType) -> ScalarType:
    name = f"b{t.bits // len(vector.items)}"
    if t.kind != "b" or name not in SCALARS or t.bits % len(vector.items):
        raise translator.error("unknown form of mov")
    return SCALARS[name]


def _unpacking(translator: Translator, target: Vector, source: Operand, t: ScalarType) -> Step:
    part = _part(translator, target, t)
    writers = [translator.writer(item, part) for item in target.items]
    read = translator.reader(source, t)

    def step(batch: Batch, lanes: Lanes) -> None:
        whole = np.ascontiguousarray(read(batch, lanes))
        parts = whole.view(part.dtype).reshape(-1, len(writers))
        for i, write in enumerate(writers):
            write(batch, lanes, parts[:, i].copy())

    return step


def _packed_reader(translator: Translator, source: Vector, t: ScalarType) -> Reader:
    part = _part(translator, source, t)
    readers = [translator.reader(item, part) for item in source.items]

    def read(batch: Batch, lanes: Lanes) -> Array:
        parts = np.broadcast_arrays(*(r(batch, lanes) for r in readers))
        return np.stack(parts, axis=1).reshape(-1).view(t.dtype)

    return read
