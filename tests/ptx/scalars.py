"""PTX's scalar types and how NumPy holds them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np


class UnsupportedPTX(Exception):
    """PTX that the interpreter does not know; it never guesses and never skips."""

    def __init__(self, message: str, line: int = 0, text: str = ""):
        self.line = line
        self.text = text
        where = f"line {line}: " if line else ""
        what = f" in '{text}'" if text else ""
        super().__init__(f"{where}{message}{what}")


@dataclass(frozen=True)
class ScalarType:
    """A type such as `u32`: its kind is one of s, u, b, f, pred and packed (f16x2 and its like)."""

    name: str
    kind: str
    bits: int

    @functools.cached_property
    def bytes(self) -> int:
        return max(self.bits // 8, 1)

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """What an operand of this type is viewed as. 16-bit floats and packed types stay bits."""
        if self.kind == "pred":
            return np.dtype(bool)
        if self.kind == "s":
            return np.dtype(f"i{self.bytes}")
        if self.kind == "f" and self.bits >= 32:
            return np.dtype(f"f{self.bytes}")
        return np.dtype(f"u{self.bytes}")

    @functools.cached_property
    def register_dtype(self) -> np.dtype:
        """What a register of this width is stored as: plain bits, or bool for a predicate."""
        return np.dtype(bool) if self.kind == "pred" else np.dtype(f"u{self.bytes}")

    def __str__(self) -> str:
        return self.name


SCALARS: dict[str, ScalarType] = {
    "pred": ScalarType("pred", "pred", 1),
    **{f"{k}{b}": ScalarType(f"{k}{b}", k, b) for k in "sub" for b in (8, 16, 32, 64)},
    **{f"f{b}": ScalarType(f"f{b}", "f", b) for b in (16, 32, 64)},
    "bf16": ScalarType("bf16", "f", 16),
    "f16x2": ScalarType("f16x2", "packed", 32),
    "bf16x2": ScalarType("bf16x2", "packed", 32),
    "f32x2": ScalarType("f32x2", "packed", 64),
}
