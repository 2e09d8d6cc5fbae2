"""What instructions compute: registers in, registers out. Integers, logic, comparison, selection.

`operation(instruction)` turns an opcode with its modifiers into an `Operation`: the types of
results and sources, and a function of arrays. Arrays have one element for each active thread, or a
single one where all threads hold the same. A function never returns one of its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .program import Instruction
from .scalars import SCALARS, ScalarType, UnsupportedPTX

Array = np.ndarray


@dataclass(frozen=True)
class Operation:
    results: tuple[ScalarType, ...]
    sources: tuple[ScalarType, ...]
    compute: Callable[..., Array | tuple[Array, ...]]
    wide_registers: bool = False  # registers may be wider than the types, as `cvt` allows


class Modifiers:
    """An instruction's modifiers, taken one by one from the left; none may be left over."""

    def __init__(self, instruction: Instruction):
        self.instruction = instruction
        self.rest = list(instruction.modifiers)

    def error(self, message: str) -> UnsupportedPTX:
        return UnsupportedPTX(message, self.instruction.line, self.instruction.text)

    def take(self, *names: str) -> str:
        """The next modifier if it is one of `names`, else an empty string."""
        return self.rest.pop(0) if self.rest and self.rest[0] in names else ""

    def require(self, *names: str) -> str:
        found = self.take(*names)
        if not found:
            raise self.error(f"'{self.instruction.name}' needs one of {', '.join(names)}")
        return found

    def type(self, *allowed: str) -> ScalarType:
        return SCALARS[self.require(*allowed)]

    def end(self) -> None:
        if self.rest:
            raise self.error(f"unknown modifier '.{self.rest[0]}' of '{self.instruction.name}'")


Definition = Callable[[Modifiers], Operation]
OPERATIONS: dict[str, Definition] = {}


def define(*opcodes: str) -> Callable[[Definition], Definition]:
    def register(function: Definition) -> Definition:
        OPERATIONS.update(dict.fromkeys(opcodes, function))
        return function

    return register


def operation(instruction: Instruction) -> Operation:
    """What an instruction computes.

    Raises:
        UnsupportedPTX: the opcode, or one of its modifiers, is not known.
    """
    modifiers = Modifiers(instruction)
    if instruction.opcode not in OPERATIONS:
        raise modifiers.error(f"unknown instruction '{instruction.name}'")
    result = OPERATIONS[instruction.opcode](modifiers)
    modifiers.end()
    return result


INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
BITS = ("b16", "b32", "b64")
_U32 = SCALARS["u32"]
_PRED = SCALARS["pred"]


# ---- integer arithmetic --------------------------------------------------------------------------


def integer_binary(t: ScalarType, compute: Callable[[Array, Array], Array]) -> Operation:
    return Operation((t,), (t, t), compute)


def _divide(a: Array, b: Array) -> Array:
    """Truncates. By zero gives all ones; PTX leaves that open."""
    with np.errstate(all="ignore"):
        quotient = a // b
        rest = a - quotient * b
        quotient += (rest != 0) & ((a < 0) != (b < 0))
    return np.where(b == 0, ~np.zeros_like(b), quotient)


def _remainder(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return a - _divide(a, b) * b


INTEGER_BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "div": _divide,
    "rem": _remainder,
    "min": np.minimum,
    "max": np.maximum,
}


@define("rem")
def _rem(m: Modifiers) -> Operation:
    return integer_binary(m.type(*INTEGERS), _remainder)


def _high_half(a: Array, b: Array) -> Array:
    """The upper half of the full product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)
    x, y = a.view(np.uint64), b.view(np.uint64)
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x_low, x_high, y_low, y_high = x & low, x >> half, y & low, y >> half
    cross = x_high * y_low + ((x_low * y_low) >> half)
    middle = x_low * y_high + (cross & low)
    high = x_high * y_high + (cross >> half) + (middle >> half)
    if a.dtype.kind == "i":  # a negative factor stands for itself plus 2^64
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def integer_product(m: Modifiers) -> tuple[ScalarType, ScalarType, Callable[..., Array]]:
    """Of `mul` and `mad`: types of factors and result, and the function that multiplies."""
    part = m.require("lo", "hi", "wide")
    if part != "wide":
        t = m.type(*INTEGERS)
        return t, t, np.multiply if part == "lo" else _high_half
    t = m.type("u16", "u32", "s16", "s32")
    wide = SCALARS[f"{t.kind}{2 * t.bits}"]
    return t, wide, lambda a, b: a.astype(wide.dtype) * b.astype(wide.dtype)


def integer_mad(m: Modifiers) -> Operation:
    t, result, product = integer_product(m)
    return Operation((result,), (t, t, result), lambda a, b, c: product(a, b) + c)


@define("sad")
def _sad(m: Modifiers) -> Operation:
    t = m.type(*INTEGERS)
    unsigned = np.dtype(f"u{t.bytes}")

    def compute(a: Array, b: Array, c: Array) -> Array:
        distance = np.maximum(a, b).view(unsigned) - np.minimum(a, b).view(unsigned)
        return c.view(unsigned) + distance

    return Operation((t,), (t, t, t), compute)


# ---- logic and bits ------------------------------------------------------------------------------


@define("and", "or", "xor")
def _logic(m: Modifiers) -> Operation:
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    t = m.type("pred", *BITS)
    return integer_binary(t, functions[m.instruction.opcode])


@define("not")
def _not(m: Modifiers) -> Operation:
    t = m.type("pred", *BITS)
    return Operation((t,), (t,), np.invert)


@define("lop3")
def _lop3(m: Modifiers) -> Operation:
    t = m.type("b32")

    def compute(a: Array, b: Array, c: Array, table: Array) -> Array:
        result = np.zeros_like(a & b & c)
        for row in range(8):
            if table[0] >> row & 1:
                terms = (x if row & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
                x, y, z = terms
                result = result | (x & y & z)
        return result

    return Operation((t,), (t, t, t, t), compute)


@define("shl", "shr")
def _shift(m: Modifiers) -> Operation:
    left = m.instruction.opcode == "shl"
    t = m.type(*BITS) if left else m.type(*BITS, *INTEGERS)
    last = t.dtype.type(t.bits - 1)

    def compute(a: Array, amount: Array) -> Array:
        """Amounts beyond the width shift everything out, or leave copies of the sign."""
        inside = np.minimum(amount, np.uint32(last)).astype(t.dtype)
        if t.kind == "s":
            return a >> inside
        shifted = a << inside if left else a >> inside
        return np.where(amount > last, t.dtype.type(0), shifted)

    return Operation((t,), (t, _U32), compute)


@define("shf")
def _funnel_shift(m: Modifiers) -> Operation:
    left = m.require("l", "r") == "l"
    wrap = m.require("wrap", "clamp") == "wrap"
    t = m.type("b32")

    def compute(low: Array, high: Array, amount: Array) -> Array:
        count = amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        if left:
            return ((both << count.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
        return (both >> count.astype(np.uint64)).astype(np.uint32)

    return Operation((t,), (t, t, _U32), compute)


def _ones(count: Array) -> Array:
    """So many ones at the low end of 64 bits."""
    shifted = np.uint64(1) << np.minimum(count, 63).astype(np.uint64)
    return np.where(count >= 64, ~np.uint64(0), shifted - np.uint64(1))


@define("bfe")
def _extract_field(m: Modifiers) -> Operation:
    """Bits from `start` on, `length` of them; beyond the field or the word, zeros or the sign."""
    t = m.type("u32", "u64", "s32", "s64")
    bits = SCALARS[f"u{t.bits}"].dtype

    def compute(a: Array, start: Array, length: Array) -> Array:
        start, length = (start & 0xFF).astype(np.int64), (length & 0xFF).astype(np.int64)
        word = a.view(bits).astype(np.uint64)
        inside = _ones(np.clip(t.bits - start, 0, length))
        field = (word >> np.minimum(start, 63).astype(np.uint64)) & inside
        if t.kind == "s":
            top = np.clip(start + length - 1, 0, t.bits - 1).astype(np.uint64)
            negative = ((word >> top) & np.uint64(1) != 0) & (length > 0)
            field = np.where(negative, field | ~inside, field)
        return field.astype(bits).view(t.dtype)

    return Operation((t,), (t, _U32, _U32), compute)


@define("bfi")
def _insert_field(m: Modifiers) -> Operation:
    t = m.type("b32", "b64")

    def compute(a: Array, b: Array, start: Array, length: Array) -> Array:
        start, length = (start & 0xFF).astype(np.int64), (length & 0xFF).astype(np.int64)
        shift = np.minimum(start, 63).astype(np.uint64)
        where = np.where(start < 64, _ones(length) << shift, np.uint64(0))
        moved = a.astype(np.uint64) << shift
        return ((b.astype(np.uint64) & ~where) | (moved & where)).astype(t.dtype)

    return Operation((t,), (t, t, _U32, _U32), compute)


@define("prmt")
def _permute_bytes(m: Modifiers) -> Operation:
    t = m.type("b32")

    def compute(a: Array, b: Array, selector: Array) -> Array:
        both = (b.astype(np.uint64) << np.uint64(32)) | a
        result = np.uint32(0)
        for byte in range(4):
            nibble = (selector >> np.uint32(4 * byte)).astype(np.uint64)
            chosen = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(0xFF)
            sign = np.where(chosen & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            chosen = np.where(nibble & np.uint64(8), sign, chosen).astype(np.uint32)
            result = result | chosen << np.uint32(8 * byte)
        return result

    return Operation((t,), (t, t, t), compute)


def population(a: Array) -> Array:
    """The number of ones."""
    x = a.astype(np.uint64)
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    pairs = np.uint64(0x3333333333333333)
    x = (x & pairs) + ((x >> np.uint64(2)) & pairs)
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint32)


def bit_length(a: Array) -> Array:
    """The position of the highest one, counted from 1; 0 for 0."""
    x = a.astype(np.uint64)
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> np.uint64(shift))
    return population(x)


@define("popc")
def _popc(m: Modifiers) -> Operation:
    return Operation((_U32,), (m.type("b32", "b64"),), population)


@define("clz")
def _clz(m: Modifiers) -> Operation:
    t = m.type("b32", "b64")
    return Operation((_U32,), (t,), lambda a: np.uint32(t.bits) - bit_length(a))


@define("bfind")
def _bfind(m: Modifiers) -> Operation:
    """The position of the highest one, or with .shiftamt how far left it would have to go."""
    amount = m.take("shiftamt")
    t = m.type("u32", "u64", "s32", "s64")

    def compute(a: Array) -> Array:
        if t.kind == "s":  # of a negative number, the highest zero
            a = np.where(a < 0, ~a, a)
        length = bit_length(a.view(f"u{t.bytes}"))
        found = np.uint32(t.bits) - length if amount else length - np.uint32(1)
        return np.where(length == 0, np.uint32(0xFFFFFFFF), found)

    return Operation((_U32,), (t,), compute)


_REVERSED_BYTES = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)


@define("brev")
def _reverse_bits(m: Modifiers) -> Operation:
    t = m.type("b32", "b64")

    def compute(a: Array) -> Array:
        return _REVERSED_BYTES[a.view(np.uint8)].view(t.dtype).byteswap()

    return Operation((t,), (t,), compute)


# ---- selection and comparison --------------------------------------------------------------------


@define("selp")
def _select(m: Modifiers) -> Operation:
    t = m.type(*BITS, *INTEGERS, "f32", "f64")
    bits = SCALARS[f"b{t.bits}"]
    return Operation((bits,), (bits, bits, _PRED), lambda a, b, p: np.where(p, a, b))


@define("slct")
def _select_by_sign(m: Modifiers) -> Operation:
    t = m.type(*BITS, *INTEGERS, "f32", "f64")
    selector = m.type("s32", "f32")
    bits = SCALARS[f"b{t.bits}"]
    return Operation((bits,), (bits, bits, selector), lambda a, b, c: np.where(c >= 0, a, b))


BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def integer_comparison(t: ScalarType, name: str) -> Callable[[Array, Array], Array] | None:
    """The function of a comparison, or None where the type does not have it."""
    if t.kind == "b" and name not in ("eq", "ne"):
        return None
    if t.kind == "u":
        name = UNSIGNED_COMPARISONS.get(name, name)
    return COMPARISONS.get(name)
