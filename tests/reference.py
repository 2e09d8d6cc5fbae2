"""The update in plain NumPy, from the formulas alone: what every backend is compared with.

Imports nothing but the standard library and NumPy. float16 and bfloat16 are held as float32 arrays
whose values they can represent, so all arithmetic is float32's or float64's.
"""

from fractions import Fraction

import numpy as np

# Digits of the significand and exponent of the smallest subnormal, for the types that are narrower
# than what is computed in.
NARROW = {"float16": (11, -24), "bfloat16": (8, -133)}
DTYPES = ("float32", "float64", "bfloat16", "float16")


def compute_type(dtype):
    return np.float64 if dtype == "float64" else np.float32


def two_sum(a, b):
    """a + b as its rounded value and the exact error (Knuth)."""
    s = a + b
    b_part = s - a
    return s, (a - (s - b_part)) + (b - b_part)


def two_product(a, b):
    """a * b as its rounded value and the exact error (Dekker, Veltkamp)."""

    def split(x):
        scaled = x * 134217729.0  # 2^27 + 1
        high = scaled - (scaled - x)
        return high, x - high

    a_high, a_low = split(a)
    b_high, b_low = split(b)
    product = a * b
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


def sum_rounded_to_odd(a, b):
    """a + b in float64; if inexact, the neighbour of the exact sum whose last bit is 1."""
    s, error = two_sum(a, b)
    is_even = (s.view(np.int64) & 1) == 0
    neighbour = np.nextafter(s, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & np.isfinite(s) & is_even, neighbour, s)


def fma32(a, b, c):
    """The float32 nearest to the exact a * b + c.

    A product of two float32 is exact in float64. With the sum rounded to odd there, rounding it to
    float32 is the only rounding that counts (Boldo and Melquiond, 2008).
    """
    a, b, c = (np.asarray(x, np.float32).astype(np.float64) for x in (a, b, c))
    return sum_rounded_to_odd(a * b, c).astype(np.float32)


def fma64(a, b, c):
    """The float64 nearest to the exact a * b + c."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (a, b, c)))
    product, error = two_product(a, b)
    high, low = two_sum(c, error)
    high, rest = two_sum(product, high)
    result = high + sum_rounded_to_odd(low, rest)
    # A zero factor makes the product exact. Where the parts above may leave float64's range, count
    # in rationals.
    result = np.where((a == 0) | (b == 0), a * b + c, result)
    safe = (abs(a) < 2.0**400) & (abs(b) < 2.0**400) & (abs(c) < 2.0**900)
    safe &= (abs(product) > 2.0**-900) | (a == 0) | (b == 0)
    for index in map(tuple, np.argwhere(~safe)):
        result[index] = fma_in_rationals(float(a[index]), float(b[index]), float(c[index]))
    return result


def fma_in_rationals(a, b, c):
    """The float64 nearest to the exact a * b + c, one element."""
    if not np.isfinite(a * 0.0 + b * 0.0 + c * 0.0) or a == 0 or b == 0:
        return a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return 0.0
    try:
        return exact.numerator / exact.denominator  # correctly rounded, subnormals too
    except OverflowError:
        return np.inf if exact > 0 else -np.inf


def rounded(x, dtype):
    """x as dtype would store it: rounded once to nearest even."""
    if dtype not in NARROW:
        return x
    digits, smallest = NARROW[dtype]
    x = np.asarray(x, np.float32).astype(np.float64)
    finite = np.where(np.isfinite(x), x, 0)
    exponent = np.maximum(np.frexp(finite)[1] - digits, smallest)
    result = np.ldexp(np.rint(np.ldexp(finite, -exponent)), exponent)
    limit = 2.0**16 if dtype == "float16" else 2.0**128
    result = np.where(abs(result) >= limit, np.copysign(np.inf, result), result)
    return np.where(np.isfinite(x), result, x).astype(np.float32)


def step(
    p,
    g,
    m,
    dtype,
    *,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    l1=0.0,
    l2_mode="coupled",
    maximize=False,
    frozen_zeros=False,
    grad_scale=1.0,
    grad_coefficient=1.0,
    momentum_dtype=None,
    start=None,
):
    """One step on arrays; ``m`` is None at the first step. Returns the new p and m.

    ``dtype`` is that of the weights: float32 where they are master weights. ``start``: what the
    penalties pull towards instead of zero.
    """
    c = compute_type(dtype)
    fma = fma64 if c is np.float64 else fma32
    k = (1 - dampening) / (1 - momentum) if momentum != 0 else 1.0
    with np.errstate(all="ignore"):
        threshold = c(0 if frozen_zeros else lr * (l1 * k))
        scale = c(1 / (1 + lr * (weight_decay * k)))
        p, g = np.asarray(p, c), np.asarray(g, c)
        if maximize:
            g = -g
        factor = c(1) / c(np.float32(grad_scale)) * c(np.float32(grad_coefficient))
        if factor != 1:
            g = g * factor
        towards = c(0) if start is None else np.asarray(start, c)
        d = (
            fma(c(weight_decay), p - towards, g)
            if weight_decay != 0 and l2_mode == "coupled"
            else g
        )
        s = d
        if momentum != 0:
            m = d if m is None else fma(c(1 - dampening), d, c(momentum) * np.asarray(m, c))
            s = fma(c(momentum), m, d) if nesterov else m
            m = rounded(m, momentum_dtype or dtype)
        v = fma(c(-lr), s, p)
        if threshold != 0:
            u = v - towards
            within = np.where(np.isnan(u), v, towards)
            v = np.where(
                u > threshold, v - threshold, np.where(u < -threshold, v + threshold, within)
            )
        if l2_mode == "proximal" and scale != 1:
            if start is None:
                v = v * scale
            else:
                v = np.where(v == towards, v, fma(scale, v - towards, towards))
        if frozen_zeros:
            v = np.where(p == towards, towards, v)
        return rounded(v, dtype), m


def square_sums(rows):
    """The sum of squares of each row of an array, in float64, in the pinned order."""
    total = np.zeros(len(rows))
    for begin in range(0, rows.shape[1], 512):
        segment = rows[:, begin : begin + 512].astype(np.float64)
        lanes = np.zeros((len(rows), 16))
        for i in range(0, segment.shape[1], 16):
            part = segment[:, i : i + 16]
            lanes[:, : part.shape[1]] += part * part
        while lanes.shape[1] > 1:
            half = lanes.shape[1] // 2
            lanes = lanes[:, :half] + lanes[:, half:]
        total += lanes[:, 0]
    return total


def row_step(members, weights, *, group_lasso):
    """One step of a set of coupled rows, with frozen zeros nowhere.

    ``members``: for each parameter its p, g and m as for :func:`step`, its dtype, and its options;
    the arrays, also an option ``start``, are of (rows, elements of a row in memory order).
    ``weights``: a_g of each row.
    Returns the new p and m of each.
    """
    moved, total = [], np.zeros(len(weights))
    with np.errstate(all="ignore"):
        for p, g, m, dtype, options in members:
            proximal = options.get("l2_mode") == "proximal"
            wide = "float64" if dtype == "float64" else "float32"
            of_step = {**options, "momentum_dtype": options.get("momentum_dtype") or dtype}
            if proximal:
                of_step["weight_decay"] = 0.0
            u, m = step(p, g, m, wide, **of_step)
            moved.append((u, m))
            start = options.get("start")
            total = total + square_sums(u if start is None else u - np.asarray(start, u.dtype))
        norms = np.sqrt(total)
        result = []
        for (u, m), (_, _, _, dtype, options) in zip(moved, members, strict=True):
            momentum, lr = options.get("momentum", 0.0), options["lr"]
            k = (1 - options.get("dampening", 0.0)) / (1 - momentum) if momentum != 0 else 1.0
            t = lr * (group_lasso * k) * np.asarray(weights, np.float64)
            c = compute_type(dtype)
            factors = (1 - t / norms).astype(c)[:, None]
            towards = np.asarray(options.get("start", np.zeros_like(u)), c)
            scaled = factors * (u - towards)
            scaled = np.where(towards == 0, scaled, towards + scaled)
            scaled = np.where(factors == 1, u, scaled)
            new = np.where((norms <= t)[:, None], towards, scaled)
            new = np.where((t == 0)[:, None], u, new)
            scale = c(1 / (1 + lr * (options.get("weight_decay", 0.0) * k)))
            if options.get("l2_mode") == "proximal" and scale != 1:
                fma = fma64 if c is np.float64 else fma32
                if "start" in options:
                    new = np.where(new == towards, new, fma(scale, new - towards, towards))
                else:
                    new = new * scale
            result.append((rounded(new.astype(c), dtype), m))
    return result


def values(tensor):
    """A tensor's values as an array of the compute type."""
    tensor = tensor.detach().cpu()
    return (tensor if str(tensor.dtype) == "torch.float64" else tensor.float()).numpy().copy()


def assert_same(actual, expected, what=""):
    """Equal bit by bit, the sign of zero included. A NaN equals every NaN."""
    actual, expected = (
        values(x) if hasattr(x, "detach") else np.asarray(x) for x in (actual, expected)
    )
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, not {expected.shape}"
    same = (actual == expected) & (np.signbit(actual) == np.signbit(expected))
    same |= np.isnan(actual) & np.isnan(expected)
    if not same.all():
        index = tuple(int(i[0]) for i in np.nonzero(np.atleast_1d(~same)))
        raise AssertionError(
            f"{what}: {np.count_nonzero(~same)} of {same.size} differ, first at {index}: "
            f"{np.atleast_1d(actual)[index].item().hex()}, "
            f"not {np.atleast_1d(expected)[index].item().hex()}"
        )
