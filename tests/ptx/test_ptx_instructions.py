"""Each instruction against a closed form in Python's integers, or in the exact float helpers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ptx import Arena, UnsupportedPTX, contractable, exact, floats, launch, parse
from ptx.exact import DOUBLES, SINGLES, combinations, random_bits, same_bits
from ptx.snippets import HEAD, evaluate, module

Array = np.ndarray


def integers(dtype: type, operands: int) -> tuple[Array, ...]:
    """Edge values in all combinations, and random ones."""
    limits = np.iinfo(dtype)
    edges = {0, 1, 2, 3, 7, 31, 100, limits.max, limits.max - 1, limits.min, limits.min + 1}
    if limits.min < 0:
        edges |= {-1, -2, -7}
    values = np.array(sorted(edges), dtype)
    some = random_bits(200, operands, dtype, seed=11)
    return tuple(np.concatenate(x) for x in zip(combinations(values, operands), some, strict=True))


def wrap(value: int, dtype: np.dtype) -> int:
    bits = 8 * dtype.itemsize
    value &= (1 << bits) - 1
    return value - (1 << bits) if dtype.kind == "i" and value >> (bits - 1) else value


def check(statement: str, function: Callable[..., int], result: type, *operands: Array) -> None:
    dtype = np.dtype(result)
    actual = evaluate(statement, result, *operands)
    rows = zip(*(x.tolist() for x in operands), strict=True)
    expected = [wrap(int(function(*row)), dtype) for row in rows]
    wrong = [i for i, e in enumerate(expected) if e != int(actual[i])]
    assert not wrong, [
        (i, [int(x[i]) for x in operands], actual[i], expected[i]) for i in wrong[:3]
    ]


def quotient(a: int, b: int) -> int:
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else -1


ARITHMETIC: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": quotient,
    "rem": lambda a, b: a - quotient(a, b) * b,
}
TYPES = {
    f"{k}{b}": np.dtype(f"{'i' if k == 's' else 'u'}{b // 8}").type
    for k in "su"
    for b in (16, 32, 64)
}


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_integer_arithmetic(name: str, t: str):
    a, b = integers(TYPES[t], 2)
    check(f"{name}.{t} {{d}}, {{0}}, {{1}};", ARITHMETIC[name], TYPES[t], a, b)


@pytest.mark.parametrize("t", TYPES)
def test_integer_products(t: str):
    dtype = TYPES[t]
    bits = np.iinfo(dtype).bits
    a, b, c = integers(dtype, 3)
    check(f"mul.hi.{t} {{d}}, {{0}}, {{1}};", lambda a, b, _: a * b >> bits, dtype, a, b, c)
    check(f"mad.lo.{t} {{d}}, {{0}}, {{1}}, {{2}};", lambda a, b, c: a * b + c, dtype, a, b, c)
    check(
        f"mad.hi.{t} {{d}}, {{0}}, {{1}}, {{2}};",
        lambda a, b, c: (a * b >> bits) + c,
        dtype,
        a,
        b,
        c,
    )
    check(f"sad.{t} {{d}}, {{0}}, {{1}}, {{2}};", lambda a, b, c: c + abs(a - b), dtype, a, b, c)
    if bits < 64:
        wide = np.dtype(f"{np.dtype(dtype).kind}{bits // 4}").type
        c = c.astype(wide)
        check(f"mul.wide.{t} {{d}}, {{0}}, {{1}};", lambda a, b: a * b, wide, a, b)
        check(f"mad.wide.{t} {{d}}, {{0}}, {{1}}, {{2}};", lambda a, b, c: a * b + c, wide, a, b, c)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits: int):
    dtype = TYPES[f"u{bits}"]
    a, b = integers(dtype, 2)
    for name, function in {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
    }.items():
        check(f"{name}.b{bits} {{d}}, {{0}}, {{1}};", function, dtype, a, b)
    check(f"not.b{bits} {{d}}, {{0}};", lambda a: ~a, dtype, a)


@pytest.mark.parametrize("t", ["s16", "s32", "s64"])
def test_integer_signs(t: str):
    (a,) = integers(TYPES[t], 1)
    check(f"neg.{t} {{d}}, {{0}};", lambda a: -a, TYPES[t], a)
    check(f"abs.{t} {{d}}, {{0}};", abs, TYPES[t], a)


AMOUNTS = np.array([0, 1, 5, 15, 16, 31, 32, 33, 63, 64, 255, 2**32 - 1], np.uint32)


def with_amounts(a: Array) -> tuple[Array, Array]:
    return np.repeat(a, len(AMOUNTS)), np.tile(AMOUNTS, len(a))


@pytest.mark.parametrize("t", TYPES)
def test_shifts(t: str):
    a, amount = with_amounts(integers(TYPES[t], 1)[0])
    check(f"shr.{t} {{d}}, {{0}}, {{1}};", lambda a, n: a >> min(n, 64), TYPES[t], a, amount)
    bits = t[1:]
    check(f"shl.b{bits} {{d}}, {{0}}, {{1}};", lambda a, n: a << min(n, 64), TYPES[t], a, amount)


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(mode: str):
    low, amount = with_amounts(integers(np.uint32, 1)[0])
    high = low[::-1].copy()

    def count(n: int) -> int:
        return n & 31 if mode == "wrap" else min(n, 32)

    def left(a: int, b: int, n: int) -> int:
        return (b << 32 | a) << count(n) >> 32

    def right(a: int, b: int, n: int) -> int:
        return (b << 32 | a) >> count(n)

    check(f"shf.l.{mode}.b32 {{d}}, {{0}}, {{1}}, {{2}};", left, np.uint32, low, high, amount)
    check(f"shf.r.{mode}.b32 {{d}}, {{0}}, {{1}}, {{2}};", right, np.uint32, low, high, amount)


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_bit_fields(t: str):
    """The definition in the PTX manual, bit by bit."""
    bits = int(t[1:])
    places = np.array([0, 1, 7, 31, 32, 40, 63, 64, 255, 256], np.uint32)
    a = integers(TYPES[t], 1)[0][::8]
    index = [x.ravel() for x in np.meshgrid(range(len(a)), places, places)]
    a, start, length = a[index[0]], index[1].astype(np.uint32), index[2].astype(np.uint32)

    def extract(a: int, start: int, length: int) -> int:
        start, length = start & 255, length & 255
        sign = t[0] == "s" and length > 0 and a >> min(start + length - 1, bits - 1) & 1
        word = a & ((1 << bits) - 1)
        inside = range(max(min(length, bits - start), 0))
        field = sum((word >> (start + i) & 1) << i for i in inside)
        return field | (-1 << len(inside) if sign else 0)

    check(f"bfe.{t} {{d}}, {{0}}, {{1}}, {{2}};", extract, TYPES[t], a, start, length)

    def insert(a: int, b: int, start: int, length: int) -> int:
        mask = ((1 << (length & 255)) - 1) << (start & 255)
        return (b & ~mask) | (a << (start & 255) & mask)

    b = a[::-1].copy()
    statement = f"bfi.b{bits} {{d}}, {{0}}, {{1}}, {{2}}, {{3}};"
    check(statement, insert, TYPES[t], a, b, start, length)


def test_byte_permutation():
    a, b, selector = integers(np.uint32, 3)

    def permute(a: int, b: int, selector: int) -> int:
        source = (b << 32 | a).to_bytes(8, "little")
        result = 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = source[nibble & 7]
            result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
        return result

    check("prmt.b32 {d}, {0}, {1}, {2};", permute, np.uint32, a, b, selector)


@pytest.mark.parametrize("table", [0x00, 0x80, 0x96, 0xE8, 0xCA, 0xFF])
def test_lookup_logic(table: int):
    a, b, c = random_bits(100, 3, np.uint32, seed=12)

    def look_up(a: int, b: int, c: int) -> int:
        rows = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32))
        return sum((table >> row & 1) << i for i, row in enumerate(rows))

    check(f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table};", look_up, np.uint32, a, b, c)


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counts(bits: int):
    (a,) = integers(TYPES[f"u{bits}"], 1)
    check(f"popc.b{bits} {{d}}, {{0}};", lambda a: bin(a).count("1"), np.uint32, a)
    check(f"clz.b{bits} {{d}}, {{0}};", lambda a: bits - a.bit_length(), np.uint32, a)
    check(f"bfind.u{bits} {{d}}, {{0}};", lambda a: a.bit_length() - 1, np.uint32, a)
    check(
        f"bfind.shiftamt.u{bits} {{d}}, {{0}};",
        lambda a: bits - a.bit_length() if a else -1,
        np.uint32,
        a,
    )
    check(f"brev.b{bits} {{d}}, {{0}};", lambda a: int(f"{a:0{bits}b}"[::-1], 2), a.dtype.type, a)
    s = a.view(f"i{bits // 8}")
    check(
        f"bfind.s{bits} {{d}}, {{0}};",
        lambda a: (a if a >= 0 else ~a).bit_length() - 1,
        np.uint32,
        s,
    )


# ---- comparison and selection --------------------------------------------------------------------

ORDERED: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
AS_NUMBER = "setp.{} %p1, {{0}}, {{1}}; selp.u32 {{d}}, 1, 0, %p1;"


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("name", ORDERED)
def test_integer_comparison(name: str, t: str):
    a, b = integers(TYPES[t], 2)
    check(AS_NUMBER.format(f"{name}.{t}"), ORDERED[name], np.uint32, a, b)


def test_unsigned_names_of_comparisons():
    a, b = integers(np.uint32, 2)
    for name, same in {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.items():
        check(AS_NUMBER.format(f"{name}.u32"), ORDERED[same], np.uint32, a, b)


@pytest.mark.parametrize("t", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("name", [*ORDERED, *(f"{n}u" for n in ORDERED), "num", "nan"])
def test_float_comparison(name: str, t: str):
    a, b, values = {
        "f32": lambda: (*combinations(SINGLES, 2), None),
        "f64": lambda: (*combinations(DOUBLES, 2), None),
        "f16": lambda: narrow_operands(floats.to_half, floats.widen_half),
        "bf16": lambda: narrow_operands(floats.to_bfloat, floats.widen_bfloat),
    }[t]()
    x, y = (a, b) if values is None else values
    unordered = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        expected = unordered == (name == "nan")
    else:
        holds = np.array(
            [ORDERED[name[:2]](*row) for row in zip(x.tolist(), y.tolist(), strict=True)]
        )
        expected = np.where(unordered, len(name) == 3, holds)
    actual = evaluate(AS_NUMBER.format(f"{name}.{t}"), np.uint32, a, b)
    assert (actual == expected).all()


def narrow_operands(narrow, widen):
    a, b = (narrow(x) for x in combinations(SINGLES, 2))
    return a, b, (widen(a), widen(b))


@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_comparison_combines_and_has_two_results(name: str):
    a, b, c = (x.astype(np.uint32) for x in np.indices((2, 2, 2)).reshape(3, -1))
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[name]
    statement = (
        "setp.ne.u32 %p1, {2}, 0;"
        f"setp.lt.{name}.u32 %p2|%p3, {{0}}, {{1}}, %p1;"
        "selp.u32 %r3, 1, 0, %p2; selp.u32 %r4, 2, 0, %p3; or.b32 {d}, %r3, %r4;"
    )
    actual = evaluate(statement, np.uint32, a, b, c)
    expected = combine(a < b, c) + 2 * combine(~(a < b), c)
    assert (actual == expected).all()
    negated = evaluate(statement.replace(", %p1;", ", !%p1;"), np.uint32, a, b, c)
    assert (negated == combine(a < b, c == 0) + 2 * combine(~(a < b), c == 0)).all()


def test_selection():
    a, b, c = integers(np.int32, 3)
    check("slct.s32.s32 {d}, {0}, {1}, {2};", lambda a, b, c: a if c >= 0 else b, np.int32, a, b, c)
    check(
        "setp.lt.s32 %p1, {2}, 5; selp.b32 {d}, {0}, {1}, %p1;",
        lambda a, b, c: a if c < 5 else b,
        np.int32,
        a,
        b,
        c,
    )


def test_predicate_logic():
    a, b = (x.astype(np.uint32) for x in np.indices((2, 2)).reshape(2, -1))
    for name, function in {"and": lambda a, b: a & b, "xor": lambda a, b: a ^ b}.items():
        statement = (
            "setp.ne.u32 %p1, {0}, 0; setp.ne.u32 %p2, {1}, 0;"
            f"{name}.pred %p3, %p1, %p2; not.pred %p3, %p3; selp.u32 {{d}}, 1, 0, !%p3;"
        )
        check(statement, function, np.uint32, a, b)


# ---- floating point ------------------------------------------------------------------------------


def canonical_rows(target: exact.Format, rows: list[tuple], dtype: type) -> Array:
    return floats.canonical(np.array([exact.fma(target, *row) for row in rows], dtype))


@pytest.mark.parametrize("t", ["f32", "f64"])
@pytest.mark.parametrize("name", ["add.rn", "add", "sub.rn", "mul.rn", "mul", "fma.rn"])
def test_float_arithmetic(name: str, t: str):
    """All are fma with a factor of 1 or an addend of -0."""
    values, dtype, target = {
        "f32": (SINGLES, np.float32, exact.SINGLE),
        "f64": (DOUBLES, np.float64, exact.DOUBLE),
    }[t]
    a, b = combinations(values, 2)
    c = b[::-1].copy()
    rows = {
        "add": lambda a, b, c: (a, 1.0, b),
        "sub": lambda a, b, c: (b, -1.0, a),
        "mul": lambda a, b, c: (a, b, -0.0),
        "fma": lambda a, b, c: (a, b, c),
    }[name[:3]]
    columns = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    third = ", {2}" if name == "fma.rn" else ""
    actual = evaluate(f"{name}.{t} {{d}}, {{0}}, {{1}}{third};", dtype, a, b, c)
    same_bits(actual, canonical_rows(target, [rows(*r) for r in columns], dtype))


@pytest.mark.parametrize("t", ["f16", "bf16", "f16x2", "bf16x2"])
@pytest.mark.parametrize("name", ["add.rn", "sub", "mul", "fma.rn", "min", "max", "neg", "abs"])
def test_narrow_arithmetic(name: str, t: str):
    target, widen, narrow = {
        "f16": (exact.HALF, floats.widen_half, floats.to_half),
        "bf16": (exact.BFLOAT, floats.widen_bfloat, floats.to_bfloat),
    }[t.removesuffix("x2")]
    bits = random_bits(600, 3, np.uint16, seed=13)
    a, b, c = (widen(x) for x in bits)
    rows = {
        "add": lambda a, b, c: (a, 1.0, b),
        "sub": lambda a, b, c: (b, -1.0, a),
        "mul": lambda a, b, c: (a, b, -0.0),
        "fma": lambda a, b, c: (a, b, c),
    }
    if name in ("min", "max"):
        expected = narrow({"min": floats.minimum, "max": floats.maximum}[name](a, b))
    elif name in ("neg", "abs"):
        expected = bits[0] ^ np.uint16(0x8000) if name == "neg" else bits[0] & np.uint16(0x7FFF)
    else:
        columns = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
        expected = narrow(canonical_rows(target, [rows[name[:3]](*r) for r in columns], np.float32))
    operands = ", ".join(f"{{{i}}}" for i in range({"fma.rn": 3, "neg": 1, "abs": 1}.get(name, 2)))
    size = np.uint32 if t.endswith("x2") else np.uint16
    given = [x.view(size) for x in bits]
    same_bits(evaluate(f"{name}.{t} {{d}}, {operands};", size, *given), expected.view(size))


@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_pairs_of_singles(name: str):
    a, b, c = (x.view(np.uint64) for x in exact.near_ties(400, np.float32, seed=14))
    third = ", {2}" if name == "fma" else ""
    actual = evaluate(f"{name}.rn.f32x2 {{d}}, {{0}}, {{1}}{third};", np.uint64, a, b, c)
    halves = [x.view(np.float32) for x in (a, b, c)]
    function = {"add": floats.add, "mul": floats.multiply, "fma": floats.fma32}[name]
    same_bits(actual.view(np.float32), function(*halves[: 3 if name == "fma" else 2]))


@pytest.mark.parametrize("t", ["f32", "f64"])
def test_division_and_root(t: str):
    values, dtype = {"f32": (SINGLES, np.float32), "f64": (DOUBLES, np.float64)}[t]
    a, b = combinations(values, 2)
    one = dtype(1)
    same_bits(evaluate(f"div.rn.{t} {{d}}, {{0}}, {{1}};", dtype, a, b), floats.divide(a, b))
    same_bits(evaluate(f"rcp.rn.{t} {{d}}, {{0}};", dtype, values), floats.divide(one, values))
    root = evaluate(f"sqrt.rn.{t} {{d}}, {{0}};", dtype, values)
    same_bits(root, floats.square_root(values))


@pytest.mark.parametrize("t", ["f32", "f64"])
def test_float_signs_and_extrema(t: str):
    values, bits = {"f32": (SINGLES, np.uint32), "f64": (DOUBLES, np.uint64)}[t]
    a, b = combinations(values, 2)
    sign = bits(1 << (8 * a.itemsize - 1))
    x, y = a.view(bits), b.view(bits)
    for statement, expected in {
        f"neg.{t} {{d}}, {{0}};": x ^ sign,
        f"abs.{t} {{d}}, {{0}};": x & ~sign,
        f"copysign.{t} {{d}}, {{0}}, {{1}};": (x & sign) | (y & ~sign),
        f"min.{t} {{d}}, {{0}}, {{1}};": floats.minimum(a, b).view(bits),
        f"max.{t} {{d}}, {{0}}, {{1}};": floats.maximum(a, b).view(bits),
    }.items():
        assert (evaluate(statement, bits, x, y) == expected).all(), statement


def test_modifiers_of_single_arithmetic():
    a = np.float32([1e-40, -1e-40, 2.0, -3.0, np.nan, 0.5])
    b = np.float32([1.0, 1.0, 1.0, 1.0, 1.0, np.nan])
    x, y = a.view(np.uint32), b.view(np.uint32)
    flushed = evaluate("mul.rn.ftz.f32 {d}, {0}, {1};", np.float32, x, y)
    same_bits(flushed, floats.multiply(floats.flush(a), b))
    saturated = evaluate("mul.rn.sat.f32 {d}, {0}, {1};", np.float32, x, y)
    same_bits(saturated, np.float32([1e-40, 0, 1, 0, 0, 0]))
    propagated = evaluate("max.NaN.f32 {d}, {0}, {1};", np.uint32, x, y)
    assert (propagated[4:] == 0x7FFFFFFF).all()


def test_kinds_of_floats():
    bits = SINGLES.view(np.uint32)
    for name, expected in {
        "finite": np.isfinite(SINGLES),
        "infinite": np.isinf(SINGLES),
        "number": ~np.isnan(SINGLES),
        "notanumber": np.isnan(SINGLES),
        "normal": np.isfinite(SINGLES) & (np.abs(SINGLES) >= 2.0**-126),
        "subnormal": (SINGLES != 0) & (np.abs(SINGLES) < 2.0**-126),
    }.items():
        statement = f"testp.{name}.f32 %p1, {{0}}; selp.u32 {{d}}, 1, 0, %p1;"
        assert (evaluate(statement, np.uint32, bits) == expected).all(), name


# ---- conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [*TYPES, "u8", "s8"])
@pytest.mark.parametrize("to", [*TYPES, "u8", "s8"])
def test_integer_conversion(to: str, source: str):
    """Registers may be wider than the types; what is narrow is extended."""
    storage = TYPES.get(source.replace("8", "16") if source.endswith("8") else source)
    (a,) = integers(storage, 1)
    result = TYPES.get(to.replace("8", "16") if to.endswith("8") else to)
    narrow_to, narrow_from = (
        np.dtype(f"{'i' if n[0] == 's' else 'u'}{int(n[1:]) // 8}") for n in (to, source)
    )
    check(
        f"cvt.{to}.{source} {{d}}, {{0}};",
        lambda a: wrap(wrap(a, narrow_from), narrow_to),
        result,
        a,
    )
    limits = np.iinfo(narrow_to)
    check(
        f"cvt.sat.{to}.{source} {{d}}, {{0}};",
        lambda a: min(max(wrap(a, narrow_from), limits.min), limits.max),
        result,
        a,
    )


@pytest.mark.parametrize("t", TYPES)
@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f64"])
def test_integer_to_float(name: str, t: str):
    (a,) = integers(TYPES[t], 1)
    target, dtype = {
        "f16": (exact.HALF, np.uint16),
        "bf16": (exact.BFLOAT, np.uint16),
        "f32": (exact.SINGLE, np.float32),
        "f64": (exact.DOUBLE, np.float64),
    }[name]
    if t[1:] == "64" and dtype == np.uint16:
        with pytest.raises(UnsupportedPTX, match="64-bit"):
            evaluate(f"cvt.rn.{name}.{t} {{d}}, {{0}};", dtype, a)
        return
    actual = evaluate(f"cvt.rn.{name}.{t} {{d}}, {{0}};", dtype, a)
    widen = {"f16": floats.widen_half, "bf16": floats.widen_bfloat}.get(name, lambda x: x)
    expected = [target.nearest_even(v, 0) for v in a.tolist()]
    assert widen(actual).tolist() == expected


@pytest.mark.parametrize("to", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_float_to_integer(source: str, to: str):
    values = {"f32": SINGLES, "f64": DOUBLES}[source]
    more = [0.5, 1.5, -1.5, 2.5, 32767.5, 65535.5, 2.0**31, -(2.0**31), 2.0**32, 2.0**63, 2.0**64]
    values = np.concatenate((values, np.array(more, values.dtype)))
    for rounding in floats.ROUND:
        actual = evaluate(f"cvt.{rounding}.{to}.{source} {{d}}, {{0}};", TYPES[to], values)
        expected = floats.to_integer(values, rounding, np.dtype(TYPES[to]))
        assert (actual == expected).all()


def test_rounding_to_integral_floats():
    x = np.concatenate((SINGLES, np.float32([0.5, -0.5, 1.5, 2.5, -2.5, 1e10])))
    for rounding, function in floats.ROUND.items():
        actual = evaluate(f"cvt.{rounding}.f32.f32 {{d}}, {{0}};", np.float32, x)
        same_bits(actual, floats.canonical(function(x)))
    clamped = evaluate("cvt.sat.f32.f32 {d}, {0};", np.float32, x)
    same_bits(clamped, np.where(x > 0, np.minimum(x, np.float32(1)), np.float32(0)))


def test_conversion_between_floats():
    a = np.concatenate((SINGLES, random_bits(300, 1, np.float32, seed=15)[0]))
    d = np.concatenate((DOUBLES, random_bits(300, 1, np.float64, seed=16)[0]))
    half = np.arange(0, 1 << 16, 7, dtype=np.uint16)

    def rounded(target: exact.Format, x: Array, dtype: type) -> Array:
        return canonical_rows(target, [(v, 1.0, -0.0) for v in x.tolist()], dtype)

    def convert(name: str, dtype: type, x: Array) -> Array:
        return evaluate(f"cvt.{name} {{d}}, {{0}};", dtype, x)

    same_bits(convert("rn.f32.f64", np.float32, d), rounded(exact.SINGLE, d, np.float32))
    same_bits(convert("f64.f32", np.float64, a), rounded(exact.DOUBLE, a, np.float64))
    same_bits(convert("f32.f16", np.float32, half), floats.widen_half(half))
    same_bits(convert("f32.bf16", np.float32, half), floats.widen_bfloat(half))
    same_bits(
        convert("f64.f16", np.float64, half),
        rounded(exact.DOUBLE, floats.widen_half(half), np.float64),
    )
    for name, narrow, toward_zero in (
        ("f16", floats.to_half, floats.to_half_toward_zero),
        ("bf16", floats.to_bfloat, floats.to_bfloat_toward_zero),
    ):
        same_bits(convert(f"rn.{name}.f32", np.uint16, a), narrow(a))
        same_bits(convert(f"rz.{name}.f32", np.uint16, a), toward_zero(a))
        target = exact.HALF if name == "f16" else exact.BFLOAT
        same_bits(convert(f"rn.{name}.f64", np.uint16, d), narrow(rounded(target, d, np.float32)))
        b = a[::-1].copy()
        pair = evaluate(f"cvt.rn.{name}x2.f32 {{d}}, {{0}}, {{1}};", np.uint32, a, b)
        assert (pair == (narrow(a).astype(np.uint32) << 16 | narrow(b))).all()


# ---- moves ---------------------------------------------------------------------------------------


def test_packing_and_unpacking():
    (a,) = random_bits(100, 1, np.uint64, seed=17)
    swapped = evaluate("mov.b64 {{%r3, %r4}}, {0}; mov.b64 {d}, {{%r4, %r3}};", np.uint64, a)
    assert (swapped == (a >> np.uint64(32) | a << np.uint64(32))).all()
    high = evaluate(
        "mov.b32 {{_, %rs3}}, {0}; cvt.u32.u16 {d}, %rs3;", np.uint32, a.astype(np.uint32)
    )
    assert (high == a.astype(np.uint32) >> 16).all()


def test_a_move_does_not_tie_registers_together():
    a = np.arange(4, dtype=np.uint32)
    statement = "mov.u32 %r3, {0}; setp.eq.u32 %p1, {0}, 2; @%p1 mov.u32 {0}, 9; mov.u32 {d}, %r3;"
    assert evaluate(statement, np.uint32, a).tolist() == [0, 1, 2, 3]


def test_constants():
    one = np.ones(1, np.uint32)
    for text, value in {
        "mov.f32 {d}, 0f3F800000;": 0x3F800000,
        "mov.u32 {d}, 0xFFU;": 255,
        "mov.s32 {d}, -2;": 2**32 - 2,
        "mov.b32 {d}, 010;": 8,
        "mov.f64 %rd5, 0d3FF8000000000000; cvt.rn.f32.f64 {d}, %rd5;": 0x3FC00000,
    }.items():
        assert evaluate(text, np.uint32, one).tolist() == [value], text


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("frobnicate.u32 %r1, %r2;", "unknown instruction"),
        ("add.rz.f32 %r1, %r2, %r3;", "needs one of"),
        ("add.sat.s32 %r1, %r2, %r3;", "needs one of"),
        ("fma.f32 %r1, %r2, %r3, %r4;", "needs one of rn"),
        ("div.approx.f32 %r1, %r2, %r3;", "needs one of rn"),
        ("setp.lo.s32 %p1, %r1, %r2;", "has no comparison"),
        ("add.u32 %r1, %r2;", "operands"),
        ("add.u32 %r1, %rd2, %r3;", "not the size"),
        ("add.u32 %r1, %p2, %r3;", "not the size"),
        ("mov.f32 %r1, 0d3FF0000000000000;", "unknown operand"),
        ("mov.u32 %r1, somewhere;", "unknown operand"),
        ("ld.global.acquire.u32 %r1, [%rd1];", "needs one of"),
        ("ld.global.v2.u32 %r1, [%rd1];", "registers for"),
        ("ld.global.u32 %r1, [%r2];", "not the size"),
        ("bra nowhere;", "unknown label"),
        ("bar.sync 0, 7;", "part of the block"),
        ("cvt.f32.f64 %r1, %rd1;", "unknown conversion"),
        ("cvt.s32.f32 %r1, %r2;", "rni, rzi"),
        ("bra.uni.foo L; L:", "unknown instruction"),
    ],
)
def test_unknown_forms_are_refused_with_line_and_text(statement: str, message: str):
    code = module("\n\n" + statement)
    with pytest.raises(UnsupportedPTX, match=message) as caught:
        launch(code, "test", 1, 1, b"", Arena())
    assert caught.value.text == statement
    assert caught.value.line == 9
    assert str(caught.value).startswith("line 9: ")


def test_contractable_lists_what_ptxas_may_fuse():
    body = """
      mul.f32 %r1, %r2, %r3; mul.rn.f32 %r1, %r2, %r3; add.f64 %rd1, %rd2, %rd3;
      add.s32 %r1, %r2, 1;
    """
    found = contractable(module(body).kernels["test"])
    assert [i.name for i in found] == ["mul.f32", "add.f64"]
    assert not contractable(parse(HEAD + ".entry e() { ret; }").kernels["e"])


def test_special_cases_of_integer_division():
    a = np.array([-(2**31), 7, -7], np.int32)
    b = np.array([-1, 0, 0], np.int32)
    assert evaluate("div.s32 {d}, {0}, {1};", np.int32, a, b).tolist() == [-(2**31), -1, -1]
