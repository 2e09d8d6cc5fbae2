"""Floating-point operations with the roundings and NaNs of the PTX manual, exact to the bit.

Arrays in, arrays out. float16 and bfloat16 travel as their bits in uint16. Every function is total:
no input raises or warns.

NaNs: float32 arithmetic gives 0x7FFFFFFF, float16 and bfloat16 give 0x7FFF, as the manual says. For
float64 the manual leaves the payload open; here it is the quiet NaN 0x7FF8000000000000.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

Array = np.ndarray

NAN32 = np.uint32(0x7FFFFFFF).view(np.float32)
NAN64 = np.uint64(0x7FF8000000000000).view(np.float64)
NAN16 = np.uint16(0x7FFF)


def canonical(x: Array) -> Array:
    """`x` with every NaN replaced by the one that arithmetic gives; in place."""
    nan = np.isnan(x)
    if nan.any():
        x[nan] = NAN32 if x.dtype == np.float32 else NAN64
    return x


def flush(x: Array) -> Array:
    """Subnormals to zeros of the same sign: the `.ftz` modifier."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


# ---- exact building blocks -----------------------------------------------------------------------


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum and its error: `a + b` exactly where nothing overflows (Knuth)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def _split(a: Array) -> tuple[Array, Array]:
    """Two halves of at most 26 bits whose sum is `a` (Veltkamp)."""
    scaled = a * 134217729.0  # 2^27 + 1
    high = scaled - (scaled - a)
    return high, a - high


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded product and its error, exact where nothing over- or underflows (Dekker)."""
    product = a * b
    a_high, a_low = _split(a)
    b_high, b_low = _split(b)
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def sum_to_odd(a: Array, b: Array) -> Array:
    """`a + b` rounded to odd in float64.

    Truncated, and the last bit set where anything was lost. Rounding that once more to a format
    with at least two bits fewer is the same as rounding the exact sum (Boldo and Melquiond,
    "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd",
    IEEE Trans. Computers 57(4), 2008).
    """
    total, error = two_sum(a, b)
    bits = total.view(np.uint64)
    finite = np.isfinite(total)
    inexact = finite & (error != 0)
    inward = inexact & ((error > 0) == (total < 0))
    return ((bits - inward) | inexact).view(np.float64)


# ---- arithmetic ----------------------------------------------------------------------------------

_LOW_BITS = np.uint64((1 << 29) - 1)  # what float64's mantissa has beyond float32's
_TIE = np.uint64(1 << 28)
_TINY32 = np.float64(2.0**-125)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """float32 `a * b + c`, rounded once.

    The product is exact in float64. The sum is rounded there and again to float32; two roundings
    can differ from one only where the first lands on a tie of the second, or where the result is so
    small that its ties lie elsewhere. Those elements are rounded to odd first.
    """
    with np.errstate(all="ignore"):
        product = a.astype(np.float64) * b
        total = product + c
        result = total.astype(np.float32)
        doubtful = (total.view(np.uint64) & _LOW_BITS) == _TIE
        doubtful |= (np.abs(total) < _TINY32) & (total != 0)
        if doubtful.any():
            where = np.flatnonzero(doubtful)
            addend = np.broadcast_to(c, total.shape)[where].astype(np.float64)
            product = np.broadcast_to(product, total.shape)[where]
            result[where] = sum_to_odd(product, addend).astype(np.float32)
    return canonical(result)


_SAFE = (2.0**-300, 2.0**300)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """float64 `a * b + c`, rounded once.

    Product and sum are held as unevaluated sums of doubles whose tail is rounded to odd. That is
    exact while exponents are moderate; the other elements go through integers, one by one.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    with np.errstate(all="ignore"):
        high, low = two_product(a, b)
        middle, tail = two_sum(c, low)
        head, rest = two_sum(high, middle)
        result = head + sum_to_odd(tail, rest)
        # Where a factor is zero, infinite or NaN the product is exact.
        plain = (a == 0) | (b == 0) | ~np.isfinite(a) | ~np.isfinite(b)
        result = np.where(plain, a * b + c, result)
        result = np.where(np.isinf(c) & np.isfinite(a) & np.isfinite(b), c, result)
    moderate = _moderate(a) & _moderate(b) & (_moderate(c) | (c == 0))
    for i in np.flatnonzero(~moderate & ~plain & np.isfinite(c)):
        result[i] = _fma_exact(float(a[i]), float(b[i]), float(c[i]))
    return canonical(result)


def _moderate(x: Array) -> Array:
    magnitude = np.abs(x)
    return (magnitude >= _SAFE[0]) & (magnitude <= _SAFE[1])


def _fma_exact(a: float, b: float, c: float) -> float:
    """For finite numbers, `a` and `b` not zero."""
    product = Fraction(a) * Fraction(b)
    exact = product + Fraction(c)
    sign = -1.0 if exact < 0 else 1.0  # an exact cancellation is +0
    try:
        return math.copysign(float(exact), sign)
    except OverflowError:
        return math.copysign(math.inf, sign)


def add(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return canonical(a + b)


def subtract(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return canonical(a - b)


def multiply(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return canonical(a * b)


def divide(a: Array, b: Array) -> Array:
    with np.errstate(all="ignore"):
        return canonical(a / b)


def square_root(a: Array) -> Array:
    with np.errstate(all="ignore"):
        return canonical(np.sqrt(a))


def minimum(a: Array, b: Array) -> Array:
    """The lesser; -0 below +0; of a number and a NaN the number."""
    a, b = np.broadcast_arrays(a, b)
    less = (a < b) | ((a == b) & np.signbit(a)) | np.isnan(b)
    return canonical(np.where(less, a, b))


def maximum(a: Array, b: Array) -> Array:
    """The greater; +0 above -0; of a number and a NaN the number."""
    a, b = np.broadcast_arrays(a, b)
    greater = (a > b) | ((a == b) & ~np.signbit(a)) | np.isnan(b)
    return canonical(np.where(greater, a, b))


# ---- 16-bit formats ------------------------------------------------------------------------------


def widen_half(bits: Array) -> Array:
    """float16 bits to float32, which is exact."""
    return canonical(bits.view(np.float16).astype(np.float32))


def widen_bfloat(bits: Array) -> Array:
    """bfloat16 bits to float32, which is exact."""
    return canonical((bits.astype(np.uint32) << np.uint32(16)).view(np.float32))


def to_single(x: Array) -> Array:
    """float64 to float32, to nearest even."""
    with np.errstate(all="ignore"):
        return canonical(x.astype(np.float32))


def to_half(x: Array) -> Array:
    """float32 or float64 to float16 bits, to nearest even."""
    with np.errstate(all="ignore"):
        bits = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), NAN16, bits)


def to_half_toward_zero(x: Array) -> Array:
    """float32 to float16 bits, truncated."""
    bits = to_half(x)
    with np.errstate(all="ignore"):
        outward = np.abs(bits.view(np.float16).astype(np.float32)) > np.abs(x)
    return bits - (outward & np.isfinite(x))


def to_bfloat(x: Array) -> Array:
    """float32 to bfloat16 bits, to nearest even."""
    bits = x.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), NAN16, rounded)


def to_bfloat_toward_zero(x: Array) -> Array:
    """float32 to bfloat16 bits, truncated."""
    bits = (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), NAN16, bits)


def double_to_single_odd(x: Array) -> Array:
    """float64 to float32, rounded to odd: a safe stop on the way to bfloat16."""
    with np.errstate(all="ignore"):
        near = x.astype(np.float32)
        back = near.astype(np.float64)
        overflow = np.isinf(near) & np.isfinite(x)
    inexact = (back != x) & ~np.isnan(x)
    outward = inexact & (np.abs(back) > np.abs(x))
    bits = np.where(overflow, near.view(np.uint32) - 1, near.view(np.uint32) - outward)
    return (bits | inexact).astype(np.uint32).view(np.float32)


def fma_half(a: Array, b: Array, c: Array) -> Array:
    """float16 `a * b + c` on bits, rounded once: the product is exact in float64."""
    wide = [widen_half(x).astype(np.float64) for x in (a, b, c)]
    with np.errstate(all="ignore"):
        return to_half(sum_to_odd(wide[0] * wide[1], wide[2]))


def fma_bfloat(a: Array, b: Array, c: Array) -> Array:
    """bfloat16 `a * b + c` on bits, rounded once."""
    wide = [widen_bfloat(x).astype(np.float64) for x in (a, b, c)]
    with np.errstate(all="ignore"):
        return to_bfloat(double_to_single_odd(sum_to_odd(wide[0] * wide[1], wide[2])))


# ---- to integers ---------------------------------------------------------------------------------

ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, rounding: str, dtype: np.dtype) -> Array:
    """Rounds and saturates; a NaN gives 0."""
    limits = np.iinfo(dtype)
    with np.errstate(all="ignore"):
        rounded = ROUND[rounding](x.astype(np.float64))
        low = rounded <= float(limits.min)
        high = rounded >= float(limits.max)  # 2^63 and 2^64 where the limit is not representable
        inside = np.where(low | high | np.isnan(rounded), 0.0, rounded).astype(dtype)
    return np.where(low, dtype.type(limits.min), np.where(high, dtype.type(limits.max), inside))
