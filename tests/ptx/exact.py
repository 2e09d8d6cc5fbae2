"""Integer arithmetic that the floating point is tested against, and operands that are hard."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Format(NamedTuple):
    """A binary floating-point format."""

    precision: int  # bits, the hidden one included
    smallest: int  # exponent of the smallest subnormal number
    largest: int  # exponent of the largest binade

    def nearest_even(self, units: int, exponent: int) -> float:
        """`units * 2**exponent` rounded once."""
        sign, units = (-1.0, -units) if units < 0 else (1.0, units)
        drop = max(units.bit_length() - self.precision, self.smallest - exponent, 0)
        rest = units & ((1 << drop) - 1)
        half = (1 << drop) >> 1
        units >>= drop
        units += rest > half or (0 < rest == half and units & 1)
        exponent += drop
        if units.bit_length() + exponent > self.largest + 1:
            return sign * math.inf
        return sign * math.ldexp(units, exponent)


HALF = Format(11, -24, 15)
BFLOAT = Format(8, -133, 127)
SINGLE = Format(24, -149, 127)
DOUBLE = Format(53, -1074, 1023)


def fma(target: Format, a: float, b: float, c: float) -> float:
    """`a * b + c` rounded once, with IEEE's special cases."""
    if not all(map(math.isfinite, (a, b, c))):
        product = math.nan if {0.0, math.inf} == {abs(a), abs(b)} else _sign(a) * _sign(b)
        if not math.isfinite(a) or not math.isfinite(b):
            product *= math.nan if math.isnan(a) or math.isnan(b) else math.inf
        return product + c
    (m, i), (n, j), (o, k) = map(_dyadic, (a, b, c))
    place = min(i + j, k)
    exact = (m * n << i + j - place) + (o << k - place)
    if exact == 0:
        product = 0.0 * _sign(a) * _sign(b)
        return product + c if a == 0 or b == 0 else 0.0
    return target.nearest_even(exact, place)


def _dyadic(x: float) -> tuple[int, int]:
    """A finite number as an integer and an exponent of two."""
    fraction, exponent = math.frexp(x)
    return int(fraction * 2**53), exponent - 53


def _sign(x: float) -> float:
    return math.copysign(1.0, x)


def _edges(dtype: type, bits: type) -> Array:
    info = np.finfo(dtype)
    one = dtype(1)
    positive = [
        0.0,
        info.smallest_subnormal,
        info.tiny,
        np.nextafter(info.tiny, dtype(0)),
        info.eps,
        0.1,
        np.nextafter(one, dtype(0)),
        1.0,
        1 + info.eps,
        3.0,
        2.0 ** (info.nmant + 1),
        info.max,
        np.inf,
    ]
    values = np.array(positive, dtype)
    nan = np.array([np.nan], dtype)
    payload = (nan.view(bits) | bits(0x15)).view(dtype)
    return np.concatenate((values, -values, nan, payload))


SINGLES = _edges(np.float32, np.uint32)
DOUBLES = _edges(np.float64, np.uint64)


def combinations(values: Array, operands: int) -> tuple[Array, ...]:
    """All tuples of values, one array for each operand."""
    columns = np.array(list(itertools.product(range(len(values)), repeat=operands))).T
    return tuple(values[c] for c in columns)


def random_bits(count: int, operands: int, dtype: type, seed: int) -> tuple[Array, ...]:
    """Numbers whose bits are random: all exponents, infinities and NaNs among them."""
    bits = np.dtype(f"u{np.dtype(dtype).itemsize}")
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, np.iinfo(bits).max, (operands, count), bits, endpoint=True)
    return tuple(drawn.view(dtype))


def near_ties(count: int, dtype: type, seed: int) -> tuple[Array, Array, Array]:
    """Operands of fma whose short mantissas and close exponents give ties and cancellations."""
    info = np.finfo(dtype)
    generator = np.random.default_rng(seed)
    short = generator.integers(1, 16, (3, count)).astype(dtype) / 8
    short *= generator.choice([-1, 1], (3, count))
    low, high = -(info.nmant + 3), info.nmant + 3
    exponents = generator.integers(low, high, (3, count)).astype(dtype)
    exponents[:2] /= 2
    a, b, c = short * dtype(2) ** np.rint(exponents)
    tail = generator.choice([0, 1], count).astype(dtype) * info.eps
    return a * (1 + tail), b, c


def same_bits(actual: Array, expected: Array) -> None:
    """Asserts that two arrays of floats have the same bits."""
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    assert actual.dtype == expected.dtype
    different = np.flatnonzero(actual.view(bits) != expected.view(bits))
    assert not len(different), (different[:5], actual[different[:5]], expected[different[:5]])
