"""Parses PTX as nvcc writes it.

Every directive is either taken in, or named here as one that cannot change what a kernel computes.
Anything else raises `UnsupportedPTX`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from .program import (
    Address,
    Float,
    Instruction,
    Integer,
    Kernel,
    Location,
    Module,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)
from .scalars import SCALARS, ScalarType, UnsupportedPTX

_TOKEN = re.compile(
    r"""(?P<blank>[ \t\r\n]+|//[^\n]*|/\*.*?\*/)
      | (?P<string>"[^"\n]*")
      | (?P<float>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16})
      | (?P<integer>0[xX][0-9a-fA-F]+U?|\d+U?(?![\w.]))
      | (?P<version>\d+\.\d+)
      | (?P<name>[%$.A-Za-z_](?:::|[\w$.])*)
      | (?P<mark>[{}()\[\],;:@!|+\-=<>])""",
    re.VERBOSE | re.DOTALL,
)
_KINDS = {
    "string": "a string",
    "integer": "an integer",
    "version": "a version",
    "name": "a name",
}
_SPECIAL = re.compile(
    r"%(n?tid|n?ctaid)\.[xyz]$|%(laneid|warpid|nwarpid)$|%lanemask_(eq|le|lt|ge|gt)$"
)
_LINKAGE = (".visible", ".weak", ".extern")
# Without effect on results: the first steers ptxas's optimiser, the second tells it which bytes of
# a load are looked at.
_HARMLESS_PRAGMA = re.compile(r'"(nounroll|used_bytes_mask (0x)?[0-9a-f]+)"')


class Token(NamedTuple):
    kind: str
    text: str
    line: int


def _tokens(text: str) -> Iterator[Token]:
    line, at = 1, 0
    for match in iter(_TOKEN.scanner(text).match, None):
        kind, found = match.lastgroup or "", match[0]
        if kind == "blank":  # no other token has a line's end
            line += found.count("\n")
        else:
            yield Token(kind, found, line)
        at = match.end()
    if at < len(text):
        raise UnsupportedPTX(f"unexpected character {text[at]!r}", line)
    yield Token("end", "", line)


class _Reader:
    """The tokens, and the small things that all of PTX is made of."""

    def __init__(self, text: str):
        self.lines = text.splitlines()
        self.tokens = list(_tokens(text))
        self.at = 0

    @property
    def next(self) -> Token:
        return self.tokens[self.at]

    def error(self, message: str, line: int = 0) -> UnsupportedPTX:
        line = line or self.next.line
        text = self.lines[line - 1].strip() if line <= len(self.lines) else ""
        return UnsupportedPTX(message, line, text)

    def take(self, *expected: str) -> str:
        """The next token, which must be one of `expected` where any is given."""
        token = self.next
        if token.kind == "end" or (expected and token.text not in expected):
            wanted = f"expected {' or '.join(expected)}, found " if expected else "unexpected "
            raise self.error(f"{wanted}'{token.text or 'end of file'}'")
        self.at += 1
        return token.text

    def take_if(self, *expected: str) -> bool:
        found = self.next.text in expected
        self.at += found
        return found

    def take_kind(self, kind: str) -> str:
        if self.next.kind != kind:
            raise self.error(f"expected {_KINDS[kind]}, found '{self.next.text}'")
        return self.take()

    def integer(self) -> int:
        sign = -1 if self.take_if("-") else 1
        text = self.take_kind("integer").rstrip("U")
        octal = len(text) > 1 and text.isdigit() and text[0] == "0"
        return sign * int(text, 8 if octal else 0)

    def integers(self) -> list[int]:
        values = [self.integer()]
        while self.take_if(","):
            values.append(self.integer())
        return values

    def scalar(self) -> ScalarType:
        text = self.take_kind("name")
        if text[0] != "." or text[1:] not in SCALARS:
            raise self.error(f"unknown type '{text}'")
        return SCALARS[text[1:]]

    def variable(self) -> Variable:
        """`.space .align 4 .b8 name[128]`, or one element without the brackets."""
        self.take(".param", ".shared", ".local")
        align = self.integer() if self.take_if(".align") else 0
        scalar = self.scalar()
        if self.take_if(".ptr"):  # says of a pointer what it points to
            self.take_if(".global", ".shared", ".const", ".local")
            if self.take_if(".align"):
                self.integer()
        name = self.take_kind("name")
        size = scalar.bytes
        if self.take_if("["):
            size = 0 if self.next.text == "]" else size * self.integer()
            self.take("]")
        return Variable(name, align or scalar.bytes, size)


def parse(text: str) -> Module:
    """Parses PTX text.

    Raises:
        UnsupportedPTX: something is not known, with its line and text.
    """
    reader = _Reader(text)
    module = Module()
    while reader.next.kind != "end":
        _module_statement(reader, module)
    return module


def list_kernels(module: Module) -> list[str]:
    """The names of the kernels in a module, in order."""
    return list(module.kernels)


def _module_statement(reader: _Reader, module: Module) -> None:
    while reader.take_if(*_LINKAGE):
        pass
    directive = reader.next.text
    if directive == ".entry":
        kernel = _KernelParser(reader).parse()
        module.kernels[kernel.name] = kernel
    elif directive == ".version":
        reader.take()
        module.version = reader.take_kind("version")
    elif directive == ".target":
        reader.take()
        module.target = reader.take_kind("name")
        while reader.take_if(","):
            reader.take("debug")
    elif directive == ".address_size":
        reader.take()
        reader.take("64")
    elif directive == ".shared":
        module.shared.append(reader.variable())
        reader.take(";")
    elif directive == ".file":
        reader.take()
        number = reader.integer()
        module.files[number] = os.path.normpath(reader.take_kind("string").strip('"'))
        if reader.take_if(","):  # time stamp and size
            reader.integers()
    elif directive == ".section":
        _skip_debug_section(reader)
    else:
        raise reader.error(f"unknown directive '{directive}'")


def _skip_debug_section(reader: _Reader) -> None:
    reader.take(".section")
    if not reader.next.text.startswith(".debug"):
        raise reader.error(f"unknown section '{reader.next.text}'")
    reader.take()
    reader.take("{")
    while reader.take() != "}":
        pass


class _KernelParser:
    """One kernel: parameters, directives, and the statements between the braces."""

    def __init__(self, reader: _Reader):
        self.reader = reader
        self.kernel = Kernel("")
        self.scopes: list[dict[str, str]] = []  # innermost last; from names to unique names
        self.location = Location(0, 0)

    def parse(self) -> Kernel:
        self.reader.take(".entry")
        self.kernel.name = self.reader.take_kind("name")
        if self.reader.take_if("("):
            self.parameters()
        self.directives()
        self.reader.take("{")
        self.scopes.append({})
        while self.scopes:
            self.statement()
        return self.kernel

    def parameters(self) -> None:
        offset = 0
        while not self.reader.take_if(")"):
            v = self.reader.variable()
            offset = -(-offset // v.align) * v.align
            self.kernel.parameters.append(Variable(v.name, v.align, v.size, offset))
            offset += v.size
            if self.reader.next.text != ")":
                self.reader.take(",")

    def directives(self) -> None:
        while self.reader.next.text != "{":
            directive = self.reader.take(".maxntid", ".reqntid", ".minnctapersm")
            x, y, z = [*self.reader.integers(), 1, 1][:3]
            if directive == ".maxntid":
                self.kernel.max_threads = (x, y, z)
            elif directive == ".reqntid":
                self.kernel.required_threads = (x, y, z)
            else:
                self.kernel.min_blocks = x

    # ---- statements

    def statement(self) -> None:
        reader = self.reader
        text = reader.next.text
        if reader.take_if("{"):
            self.scopes.append({})
        elif reader.take_if("}"):
            self.scopes.pop()
        elif text == ".reg":
            self.registers()
        elif text == ".shared":
            self.kernel.shared.append(reader.variable())
            reader.take(";")
        elif text == ".local":
            self.kernel.local.append(reader.variable())
            reader.take(";")
        elif text == ".loc":
            self.loc()
        elif reader.take_if(".pragma"):
            if not _HARMLESS_PRAGMA.fullmatch(reader.next.text):
                raise reader.error(f"unknown pragma {reader.next.text}")
            reader.at += 1
            reader.take(";")
        elif text.startswith("."):
            raise reader.error(f"unknown directive '{text}'")
        elif reader.next.kind == "name" and reader.tokens[reader.at + 1].text == ":":
            self.kernel.labels[reader.take()] = len(self.kernel.instructions)
            reader.take(":")
        else:
            self.instruction()

    def registers(self) -> None:
        reader = self.reader
        reader.take(".reg")
        scalar = reader.scalar()
        while True:
            name = reader.take_kind("name")
            if reader.take_if("<"):
                for number in range(reader.integer()):
                    self.declare(f"{name}{number}", scalar)
                reader.take(">")
            else:
                self.declare(name, scalar)
            if reader.take(",", ";") == ";":
                return

    def declare(self, name: str, scalar: ScalarType) -> None:
        unique = name
        while unique in self.kernel.registers:  # taken in another scope
            unique += "'"
        self.scopes[-1][name] = unique
        self.kernel.registers[unique] = scalar

    def loc(self) -> None:
        """`.loc file line column[, function_name label[+n], inlined_at file line column]`."""
        reader = self.reader
        reader.take(".loc")
        file, line, _ = (reader.integer() for _ in range(3))
        if reader.take_if(","):
            reader.take("function_name")
            reader.take_kind("name")
            if reader.take_if("+"):
                reader.integer()
            reader.take(",")
            reader.take("inlined_at")
            for _ in range(3):
                reader.integer()
        if line:  # line 0 marks code that belongs to no line
            self.location = Location(file, line)

    def instruction(self) -> None:
        reader = self.reader
        line = reader.next.line
        guard = None
        if reader.take_if("@"):
            guard = self.operand()
            if not isinstance(guard, Register):
                raise reader.error("a guard must be a predicate register")
        opcode, *modifiers = reader.take_kind("name").split(".")
        operands = []
        if reader.next.text != ";":
            operands.append(self.operand())
            while reader.take_if(","):
                operands.append(self.operand())
        reader.take(";")
        self.kernel.instructions.append(
            Instruction(
                opcode,
                tuple(modifiers),
                tuple(operands),
                guard,
                line,
                self.location,
                reader.lines[line - 1].strip(),
            )
        )

    # ---- operands

    def operand(self) -> Operand:
        reader = self.reader
        if reader.take_if("{"):
            items = [self.operand()]
            while reader.take_if(","):
                items.append(self.operand())
            reader.take("}")
            return Vector(tuple(items))
        if reader.take_if("["):
            return self.address()
        if reader.take_if("!"):
            negated = self.operand()
            if not isinstance(negated, Register):
                raise reader.error("only a predicate can be negated")
            return Register(negated.name, negated=True)
        operand = self.simple_operand()
        if reader.take_if("|"):
            return Pair(operand, self.simple_operand())
        return operand

    def address(self) -> Address:
        reader = self.reader
        base = self.simple_operand()
        offset = 0
        if isinstance(base, Symbol):
            base, offset = Symbol(base.name), base.offset
        elif reader.take_if("+"):
            offset = reader.integer()
        if not isinstance(base, Register | Symbol | Integer):
            raise reader.error("unknown form of address")
        reader.take("]")
        return Address(base, offset)

    def simple_operand(self) -> Operand:
        reader = self.reader
        if reader.next.kind == "float":
            text = reader.take()
            return Float(int(text[2:], 16), 32 if text[1] in "fF" else 64)
        if reader.next.text == "-" or reader.next.kind == "integer":
            return Integer(reader.integer())
        name = reader.take_kind("name")
        for scope in reversed(self.scopes):
            if name in scope:
                return Register(scope[name])
        if name == "_":
            return Sink()
        if _SPECIAL.match(name):
            return Special(name)
        if name.startswith("%"):
            raise reader.error(f"unknown register '{name}'")
        return Symbol(name, reader.integer() if reader.take_if("+") else 0)
