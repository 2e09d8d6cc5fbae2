"""What instructions compute: floating point, conversions, and opcodes that integers share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import floats
from .instructions import (
    BITS,
    BOOLEAN,
    COMPARISONS,
    INTEGER_BINARY,
    INTEGERS,
    UNSIGNED_COMPARISONS,
    Array,
    Modifiers,
    Operation,
    define,
    integer_binary,
    integer_comparison,
    integer_mad,
    integer_product,
)
from .program import Instruction, Kernel
from .scalars import SCALARS, ScalarType

Function = Callable[..., Array]

_ONE = {"f16": np.uint16(0x3C00), "bf16": np.uint16(0x3F80)}
_SIGN = np.uint16(0x8000)
_FMA16 = {"f16": floats.fma_half, "bf16": floats.fma_bfloat}
_WIDEN = {"f16": floats.widen_half, "bf16": floats.widen_bfloat}
_NARROW = {"f16": floats.to_half, "bf16": floats.to_bfloat}
_PARTS = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
_PRED = SCALARS["pred"]


# ---- arithmetic ----------------------------------------------------------------------------------


def _fma_of(name: str) -> Function:
    return {"f32": floats.fma32, "f64": floats.fma64, **_FMA16}[name]


def _arithmetic(opcode: str, name: str) -> Function:
    """An operation on one scalar format. In 16 bits all are special cases of fma."""
    if opcode == "fma":
        return _fma_of(name)
    if name in ("f32", "f64"):
        return {
            "add": floats.add,
            "sub": floats.subtract,
            "mul": floats.multiply,
            "min": floats.minimum,
            "max": floats.maximum,
        }[opcode]
    fma, one = _FMA16[name], _ONE[name]
    widen, narrow = _WIDEN[name], _NARROW[name]
    return {
        "add": lambda a, b: fma(a, np.full_like(a, one), b),
        "sub": lambda a, b: fma(b, np.full_like(b, one | _SIGN), a),
        "mul": lambda a, b: fma(a, b, np.full_like(a, _SIGN)),  # plus -0
        "min": lambda a, b: narrow(floats.minimum(widen(a), widen(b))),
        "max": lambda a, b: narrow(floats.maximum(widen(a), widen(b))),
    }[opcode]


def _in_halves(function: Function, part: ScalarType) -> Function:
    """The operation on both parts of packed operands."""

    def compute(*operands: Array) -> Array:
        parts = [a.view(part.dtype).reshape(-1, 2) for a in operands]
        halves = [function(*(np.ascontiguousarray(p[:, i]) for p in parts)) for i in (0, 1)]
        return np.stack(halves, axis=1).reshape(-1).view(f"u{2 * part.bytes}")

    return compute


def _propagating(function: Function) -> Function:
    """`.NaN` of min and max: a NaN operand gives a NaN."""

    def compute(a: Array, b: Array) -> Array:
        return np.where(np.isnan(a) | np.isnan(b), floats.canonical(a + b), function(a, b))

    return compute


def _flushing(function: Function) -> Function:
    return lambda *operands: floats.flush(function(*map(floats.flush, operands)))


def _saturating(function: Function) -> Function:
    """Clamps to [0, 1]; a NaN gives 0."""

    def compute(*operands: Array) -> Array:
        result = function(*operands)
        return np.where(result > 0, np.minimum(result, result.dtype.type(1)), result.dtype.type(0))

    return compute


def _float_operation(m: Modifiers, operands: int, allowed: tuple[str, ...]) -> Operation:
    """`{.rn}{.NaN}{.ftz}{.sat}.type` of an arithmetic opcode; other roundings are not modelled."""
    opcode = "fma" if m.instruction.opcode == "mad" else m.instruction.opcode
    if opcode == "fma":
        m.require("rn")
    elif opcode not in ("min", "max"):
        m.take("rn")
    ftz = m.take("ftz")
    nan = m.take("NaN") if opcode in ("min", "max") else ""
    sat = m.take("sat") if opcode not in ("min", "max") else ""
    t = m.type(*allowed)
    part = _PARTS.get(t.name, t.name)
    if (ftz or sat or nan) and t.name != "f32":
        raise m.error(f"'.{ftz or sat or nan}' is known for f32 alone")
    function = _arithmetic(opcode, part)
    if nan:
        function = _propagating(function)
    if ftz:
        function = _flushing(function)
    if sat:
        function = _saturating(function)
    if part != t.name:
        function = _in_halves(function, SCALARS[part])
    return Operation((t,), (t,) * operands, function)


_SIXTEEN = ("f16", "bf16", "f16x2", "bf16x2")
_FLOATS = ("f32", "f64", *_SIXTEEN)
_WITH_PAIRS = (*_FLOATS, "f32x2")


def _is_integer(m: Modifiers) -> bool:
    return m.rest[-1:] != [] and m.rest[-1] in INTEGERS


@define("add", "sub")
def _add(m: Modifiers) -> Operation:
    if _is_integer(m):
        return integer_binary(m.type(*INTEGERS), INTEGER_BINARY[m.instruction.opcode])
    return _float_operation(m, 2, _WITH_PAIRS)


@define("min", "max")
def _extremum(m: Modifiers) -> Operation:
    if _is_integer(m):
        return integer_binary(m.type(*INTEGERS), INTEGER_BINARY[m.instruction.opcode])
    return _float_operation(m, 2, _FLOATS)


@define("mul")
def _multiply(m: Modifiers) -> Operation:
    if _is_integer(m):
        t, result, product = integer_product(m)
        return Operation((result,), (t, t), product)
    return _float_operation(m, 2, _WITH_PAIRS)


@define("mad")
def _mad(m: Modifiers) -> Operation:
    return integer_mad(m) if _is_integer(m) else _float_operation(m, 3, ("f32", "f64"))


@define("fma")
def _fma(m: Modifiers) -> Operation:
    return _float_operation(m, 3, _WITH_PAIRS)


@define("div")
def _divide(m: Modifiers) -> Operation:
    if _is_integer(m):
        return integer_binary(m.type(*INTEGERS), INTEGER_BINARY["div"])
    m.require("rn")
    ftz = m.take("ftz")
    t = m.type("f32") if ftz else m.type("f32", "f64")
    return Operation((t,), (t, t), _flushing(floats.divide) if ftz else floats.divide)


@define("rcp", "sqrt")
def _unary_rounded(m: Modifiers) -> Operation:
    m.require("rn")
    ftz = m.take("ftz")
    t = m.type("f32") if ftz else m.type("f32", "f64")
    function: Function = floats.square_root
    if m.instruction.opcode == "rcp":

        def function(a: Array) -> Array:
            return floats.divide(a.dtype.type(1), a)

    return Operation((t,), (t,), _flushing(function) if ftz else function)


@define("neg", "abs")
def _sign(m: Modifiers) -> Operation:
    """On floats these touch the sign bit alone, of NaNs too."""
    negate = m.instruction.opcode == "neg"
    if m.rest[-1:] and m.rest[-1] in ("s16", "s32", "s64"):
        t = m.type("s16", "s32", "s64")
        return Operation((t,), (t,), np.negative if negate else np.abs)
    ftz = m.take("ftz")
    t = m.type("f32") if ftz else m.type(*_FLOATS)
    if t.name in ("f32", "f64"):
        function: Function = np.negative if negate else np.abs
        return Operation((t,), (t,), _flushing(function) if ftz else function)
    sign = t.dtype.type(0x8000 if t.bits == 16 else 0x80008000)
    return Operation((t,), (t,), lambda a: a ^ sign if negate else a & ~sign)


@define("copysign")
def _copysign(m: Modifiers) -> Operation:
    t = m.type("f32", "f64")
    return Operation((t,), (t, t), lambda a, b: np.copysign(b, a))


@define("testp")
def _test(m: Modifiers) -> Operation:
    name = m.require("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    t = m.type("f32", "f64")
    tiny = np.finfo(t.dtype).tiny
    tests: dict[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (np.abs(a) < tiny) & (a != 0),
    }
    return Operation((_PRED,), (t,), tests[name])


# ---- comparison ----------------------------------------------------------------------------------


def _float_comparison(name: str) -> Function | None:
    """`lt` is false where a NaN is, `ltu` true; `num` and `nan` ask for NaNs alone."""
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name in COMPARISONS:
        return COMPARISONS[name]
    unordered: dict[str, Function] = {
        "equ": lambda a, b: ~((a < b) | (a > b)),
        "neu": np.not_equal,
        "ltu": lambda a, b: ~(a >= b),
        "leu": lambda a, b: ~(a > b),
        "gtu": lambda a, b: ~(a <= b),
        "geu": lambda a, b: ~(a < b),
        "num": lambda a, b: (a == a) & (b == b),
        "nan": lambda a, b: (a != a) | (b != b),
    }
    return unordered.get(name)


@define("setp")
def _compare(m: Modifiers) -> Operation:
    """`setp.cmp{.bool}{.ftz}.type p{|q}, a, b{, c}`: p = cmp bool c, q = not cmp bool c."""
    names = {*COMPARISONS, *UNSIGNED_COMPARISONS, "equ", "neu", "ltu", "leu", "gtu", "geu", "num"}
    name = m.require(*names, "nan")
    boolean = m.take(*BOOLEAN)
    ftz = m.take("ftz")
    t = m.type("f32") if ftz else m.type(*BITS, *INTEGERS, "f32", "f64", "f16", "bf16")
    function = _float_comparison(name) if t.kind == "f" else integer_comparison(t, name)
    if function is None:
        raise m.error(f"'{t}' has no comparison '{name}'")
    widen = floats.flush if ftz else _WIDEN.get(t.name, lambda a: a)

    def compute(a: Array, b: Array, *combine: Array) -> tuple[Array, Array]:
        with np.errstate(invalid="ignore"):
            holds = function(widen(a), widen(b))
        if boolean:
            combined = BOOLEAN[boolean]
            return combined(holds, combine[0]), combined(~holds, combine[0])
        return holds, ~holds

    return Operation((_PRED, _PRED), (t, t, *((_PRED,) if boolean else ())), compute)


# ---- conversion ----------------------------------------------------------------------------------

_CONVERTIBLE = (*INTEGERS, "u8", "s8")
_SCALAR_FLOATS = ("f16", "bf16", "f32", "f64")


@define("cvt")
def _convert(m: Modifiers) -> Operation:
    rounding = m.take("rn", "rz", *floats.ROUND)
    ftz = m.take("ftz")
    sat = m.take("sat")
    to = m.type(*_CONVERTIBLE, *_SCALAR_FLOATS, "f16x2", "bf16x2")
    source = m.type(*_CONVERTIBLE, *_SCALAR_FLOATS)
    if to.kind == "packed":
        return _convert_pair(m, to, source, rounding, ftz or sat)
    if to.kind == "f" and source.kind == "f":
        function = _float_to_float(m, to, source, rounding, sat)
    elif to.kind == "f":
        function = _integer_to_float(m, to, source, rounding, sat)
    elif source.kind == "f":
        function = _float_to_integer(m, to, source, rounding)
    else:
        function = _integer_to_integer(m, to, source, rounding, sat)
    if ftz:
        function = _flushed_conversion(m, function, to, source)
    return Operation((to,), (source,), function, wide_registers=True)


def _flushed_conversion(
    m: Modifiers, function: Function, to: ScalarType, source: ScalarType
) -> Function:
    if "f32" not in (to.name, source.name):
        raise m.error("'.ftz' needs an f32")

    def compute(a: Array) -> Array:
        result = function(floats.flush(a) if source.name == "f32" else a)
        return floats.flush(result) if to.name == "f32" else result

    return compute


def _convert_pair(
    m: Modifiers, to: ScalarType, source: ScalarType, rounding: str, other: str
) -> Operation:
    """Two float32 into one register; the first becomes the upper half."""
    if source.name != "f32" or rounding not in ("rn", "rz") or other:
        raise m.error(f"unknown conversion '{m.instruction.name}'")
    narrow = _narrowing(_PARTS[to.name], rounding)

    def compute(high: Array, low: Array) -> Array:
        return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low)

    return Operation((to,), (source, source), compute)


def _narrowing(name: str, rounding: str) -> Function:
    toward_zero = {"f16": floats.to_half_toward_zero, "bf16": floats.to_bfloat_toward_zero}
    return _NARROW[name] if rounding == "rn" else toward_zero[name]


def _float_to_float(
    m: Modifiers, to: ScalarType, source: ScalarType, rounding: str, sat: str
) -> Function:
    if sat and to.name != "f32":
        raise m.error("'.sat' is known for f32 alone")
    widen = _WIDEN.get(source.name, lambda a: a)
    if to.name == source.name:
        if to.bits == 16 or rounding in ("rn", "rz"):
            raise m.error(f"unknown conversion '{m.instruction.name}'")
        to_integral = floats.ROUND[rounding] if rounding else np.copy

        def function(a: Array) -> Array:
            return floats.canonical(to_integral(a))

    elif to.bits > source.bits:
        if rounding:
            raise m.error("widening is exact and takes no rounding")

        def function(a: Array) -> Array:
            return floats.canonical(widen(a).astype(to.dtype))

    else:
        narrow = _narrow_from(source, to, rounding)
        if narrow is None:
            raise m.error(f"unknown conversion '{m.instruction.name}'")
        function = narrow
    return _saturating(function) if sat else function


def _narrow_from(source: ScalarType, to: ScalarType, rounding: str) -> Function | None:
    if source.name == "f32" and to.bits == 16 and rounding in ("rn", "rz"):
        return _narrowing(to.name, rounding)
    if source.name == "f64" and rounding == "rn":
        if to.name == "bf16":
            return lambda a: floats.to_bfloat(floats.double_to_single_odd(a))
        return floats.to_half if to.name == "f16" else floats.to_single
    return None


def _integer_to_float(
    m: Modifiers, to: ScalarType, source: ScalarType, rounding: str, sat: str
) -> Function:
    if rounding != "rn" or sat:
        raise m.error(f"unknown conversion '{m.instruction.name}'")
    if to.bits > 16:
        return lambda a: a.astype(to.dtype)
    if source.bits == 64:
        raise m.error("64-bit integers are not converted to 16-bit floats")
    if to.name == "f16":
        return lambda a: floats.to_half(a.astype(np.float64))
    return lambda a: floats.to_bfloat(floats.double_to_single_odd(a.astype(np.float64)))


def _float_to_integer(m: Modifiers, to: ScalarType, source: ScalarType, rounding: str) -> Function:
    """Saturates with or without `.sat`."""
    if rounding not in floats.ROUND:
        raise m.error("a float is converted to an integer with rni, rzi, rmi or rpi")
    widen = _WIDEN.get(source.name, lambda a: a)
    return lambda a: floats.to_integer(widen(a), rounding, to.dtype)


def _integer_to_integer(
    m: Modifiers, to: ScalarType, source: ScalarType, rounding: str, sat: str
) -> Function:
    if rounding:
        raise m.error("integers take no rounding")
    if not sat:
        return lambda a: a.astype(to.dtype)
    limits, given = np.iinfo(to.dtype), np.iinfo(source.dtype)
    low, high = max(limits.min, given.min), min(limits.max, given.max)
    return lambda a: np.clip(a, source.dtype.type(low), source.dtype.type(high)).astype(to.dtype)


# ---- what a compiler may still fuse --------------------------------------------------------------


def contractable(kernel: Kernel) -> list[Instruction]:
    """Floating-point additions and multiplications without a rounding.

    ptxas may fuse those into fma, so that the PTX does not settle their results.
    """
    return [
        i
        for i in kernel.instructions
        if i.opcode in ("add", "sub", "mul")
        and i.modifiers[-1] in _WITH_PAIRS
        and not {"rn", "rz", "rm", "rp"} & set(i.modifiers)
    ]
