"""What a PTX module consists of, as plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .scalars import ScalarType


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False  # `!%p1`


@dataclass(frozen=True)
class Special:
    """A read-only register such as `%tid.x`."""

    name: str


@dataclass(frozen=True)
class Integer:
    value: int


@dataclass(frozen=True)
class Float:
    """A floating-point constant: its bits, and how many bits it was written with."""

    bits: int
    width: int


@dataclass(frozen=True)
class Symbol:
    """The address of a parameter, a variable or a label, plus a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """`[base + offset]`."""

    base: Register | Symbol | Integer
    offset: int = 0


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """`a|b`: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Sink:
    """`_`: a destination that is thrown away."""


Operand = Register | Special | Integer | Float | Symbol | Address | Vector | Pair | Sink


class Location(NamedTuple):
    """Where `.loc` says an instruction comes from: a file's number and a line; 0 if unknown."""

    file: int
    line: int


@dataclass(frozen=True)
class Instruction:
    """`@guard opcode.modifiers operands;`."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    line: int
    location: Location
    text: str

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True)
class Variable:
    """A parameter, or a variable in shared or local memory. `size` 0: dynamic shared memory."""

    name: str
    align: int
    size: int
    offset: int = 0


@dataclass
class Kernel:
    name: str
    parameters: list[Variable] = field(default_factory=list)
    registers: dict[str, ScalarType] = field(default_factory=dict)
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    max_threads: tuple[int, int, int] | None = None
    required_threads: tuple[int, int, int] | None = None
    min_blocks: int | None = None

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


@dataclass
class Module:
    version: str = ""
    target: str = ""
    kernels: dict[str, Kernel] = field(default_factory=dict)
    shared: list[Variable] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)
    programs: dict[tuple[str, int, int], Any] = field(default_factory=dict, repr=False)
    """What launches have made of the kernels: see `steps.compile_kernel`."""

    def locate(self, instruction: Instruction) -> str:
        """The source of an instruction as `file:line`."""
        file, line = instruction.location
        return f"{self.files[file]}:{line}" if file in self.files else "unknown source"
