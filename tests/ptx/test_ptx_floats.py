"""Floating point against integer arithmetic, to the bit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ptx import exact, floats
from ptx.exact import BFLOAT, DOUBLE, DOUBLES, HALF, SINGLE, SINGLES, combinations, same_bits

ALL_16 = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)


def expected_fma(target: exact.Format, a, b, c) -> np.ndarray:
    """With the NaN that PTX gives."""
    dtype = a.dtype
    rows = zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    return floats.canonical(np.array([exact.fma(target, *row) for row in rows], dtype))


FMA_OPERANDS = {
    "edges": lambda values, dtype: combinations(values, 3),
    "random bits": lambda values, dtype: exact.random_bits(20_000, 3, dtype, seed=1),
    "near ties": lambda values, dtype: exact.near_ties(20_000, dtype, seed=2),
    "subnormal results": lambda values, dtype: tiny_products(dtype),
}


def tiny_products(dtype: type) -> tuple[np.ndarray, ...]:
    info = np.finfo(dtype)
    a, b, c = exact.near_ties(10_000, dtype, seed=3)
    root = 2.0 ** (info.minexp // 2)
    return a * dtype(root), b * dtype(root), c * info.tiny


@pytest.mark.parametrize("operands", FMA_OPERANDS)
@pytest.mark.parametrize("width", [32, 64])
def test_fma_rounds_once(width: int, operands: str):
    dtype, values, target, fma = {
        32: (np.float32, SINGLES, SINGLE, floats.fma32),
        64: (np.float64, DOUBLES, DOUBLE, floats.fma64),
    }[width]
    a, b, c = FMA_OPERANDS[operands](values, dtype)
    same_bits(fma(a, b, c), expected_fma(target, a, b, c))


def test_fma_is_not_a_product_and_a_sum():
    a = np.array([1 + 2.0**-12], np.float32)
    c = np.array([-1 - 2.0**-11], np.float32)
    assert floats.fma32(a, a, c)[0] == 2.0**-24
    assert floats.add(floats.multiply(a, a), c)[0] == 0


@pytest.mark.parametrize("fma", [floats.fma32, floats.fma64])
def test_fma_takes_one_element_for_all(fma):
    dtype = np.float32 if fma is floats.fma32 else np.float64
    a, b, c = exact.near_ties(100, dtype, seed=4)
    for shapes in np.ndindex(2, 2, 2):
        given = [x[:1] if one else x for x, one in zip((a, b, c), shapes, strict=True)]
        same_bits(fma(*given), fma(*(x.copy() for x in np.broadcast_arrays(*given))))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_narrow_fma_rounds_once(name: str):
    target, widen, narrow, fma = {
        "f16": (HALF, floats.widen_half, floats.to_half, floats.fma_half),
        "bf16": (BFLOAT, floats.widen_bfloat, floats.to_bfloat, floats.fma_bfloat),
    }[name]
    bits = exact.random_bits(20_000, 3, np.uint16, seed=5)
    a, b, c = (widen(x) for x in bits)
    same_bits(fma(*bits), narrow(expected_fma(target, a, b, c)))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_widening_and_narrowing_are_inverse(name: str):
    widen, narrow = {
        "f16": (floats.widen_half, floats.to_half),
        "bf16": (floats.widen_bfloat, floats.to_bfloat),
    }[name]
    wide = widen(ALL_16)
    number = ~np.isnan(wide)
    assert (narrow(wide)[number] == ALL_16[number]).all()
    assert (narrow(wide)[~number] == 0x7FFF).all()


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_narrowing_rounds_to_nearest_even(name: str):
    """At every float32 on, just below and just above the middle of two 16-bit neighbours."""
    target, widen, narrow = {
        "f16": (HALF, floats.widen_half, floats.to_half),
        "bf16": (BFLOAT, floats.widen_bfloat, floats.to_bfloat),
    }[name]
    grid = np.sort(widen(ALL_16)[np.isfinite(widen(ALL_16))])
    middle = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    middle = middle[middle != 0][::7]
    up, down = (np.nextafter(middle, np.float32(way)) for way in (np.inf, -np.inf))
    x = np.concatenate((middle, up, down, exact.random_bits(20_000, 1, np.float32, seed=6)[0]))
    expected = np.array([exact.fma(target, v, 1.0, -0.0) for v in x.tolist()], np.float32)
    same_bits(floats.canonical(widen(narrow(x))), floats.canonical(expected))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_narrowing_toward_zero_is_the_nearest_inside(name: str):
    widen, narrow = {
        "f16": (floats.widen_half, floats.to_half_toward_zero),
        "bf16": (floats.widen_bfloat, floats.to_bfloat_toward_zero),
    }[name]
    x = exact.random_bits(50_000, 1, np.float32, seed=7)[0]
    x = np.concatenate((x[np.isfinite(x)], np.float32([65504, 65519.99, 1e-8, -1e-8, 0, -0.0])))
    bits = narrow(x)
    inside, outside = widen(bits), widen((bits + 1).astype(np.uint16))
    assert (np.abs(inside) <= np.abs(x)).all()
    assert ((np.abs(outside) > np.abs(x)) | np.isnan(outside)).all()
    assert (np.signbit(inside) == np.signbit(x)).all()
    assert narrow(np.array([np.nan, np.inf], np.float32)).tolist() == [
        0x7FFF,
        0x7C00 if name == "f16" else 0x7F80,
    ]


@pytest.mark.parametrize("target", [HALF, BFLOAT], ids=["f16", "bf16"])
def test_double_to_16_bits_rounds_once(target: exact.Format):
    """Values a hair off the middle, which rounding through float32 would put on it."""
    x = np.concatenate((1 + 2.0**-11 + 2.0**-40 * np.arange(-3, 4), [2.0**-25, 1.5 * 2.0**-25]))
    x = np.concatenate((x, 1 + 2.0**-8 + 2.0**-40 * np.arange(-3, 4), -x, [1e300, -1e300, 1e-300]))
    if target is HALF:
        actual = floats.widen_half(floats.to_half(x))
    else:
        actual = floats.widen_bfloat(floats.to_bfloat(floats.double_to_single_odd(x)))
    expected = np.array([exact.fma(target, v, 1.0, -0.0) for v in x.tolist()], np.float32)
    same_bits(actual, expected)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (floats.minimum, [-0.0, -0.0, 1.0, 1.0, np.nan, -np.inf]),
        (floats.maximum, [0.0, 0.0, 1.0, 1.0, np.nan, 2.0]),
    ],
)
def test_extrema_prefer_numbers_and_order_zeros(function, expected):
    a = np.float32([0.0, -0.0, np.nan, 1.0, np.nan, -np.inf])
    b = np.float32([-0.0, 0.0, 1.0, np.nan, np.nan, 2.0])
    same_bits(function(a, b), floats.canonical(np.float32(expected)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_nan_becomes_canonical(dtype: type):
    values = SINGLES if dtype == np.float32 else DOUBLES
    expected = 0x7FFFFFFF if dtype == np.float32 else 0x7FF8000000000000
    a, b = combinations(values, 2)
    for function in (floats.add, floats.subtract, floats.multiply, floats.divide):
        result = function(a, b)
        nan = np.isnan(result)
        assert nan.any()
        assert (result[nan].view(f"u{result.itemsize}") == expected).all()


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
@pytest.mark.parametrize("rounding", floats.ROUND)
def test_conversion_to_integers_saturates(rounding: str, dtype: type):
    limits = np.iinfo(dtype)
    x = np.concatenate((DOUBLES, [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, float(limits.max)]))
    x = np.concatenate((x, [float(limits.min), float(limits.max) + 1, float(limits.min) - 1]))
    function = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[rounding]

    def expected(v: float) -> int:
        if math.isnan(v):
            return 0
        if math.isinf(v):
            return limits.max if v > 0 else limits.min
        return min(max(function(v), limits.min), limits.max)

    actual = floats.to_integer(x, rounding, np.dtype(dtype))
    assert actual.dtype == dtype
    assert actual.tolist() == [expected(v) for v in x.tolist()]


def test_flush_keeps_signs_and_normal_numbers():
    x = np.float32([1e-40, -1e-40, 2.0**-126, -0.0, 1.0])
    same_bits(floats.flush(x), np.float32([0.0, -0.0, 2.0**-126, -0.0, 1.0]))
