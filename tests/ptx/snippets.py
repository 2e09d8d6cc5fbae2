"""Small PTX programs for tests."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from .machine import Result, launch
from .memory import Arena
from .parser import parse
from .program import Module

Array = np.ndarray

HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n"

REGISTERS = """
  .reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<20>; .reg .b64 %rd<20>;
"""


def module(body: str, parameters: int = 0, before: str = "") -> Module:
    """A kernel `test` of some 64-bit parameters, which `%rd0`, `%rd1` ... hold at the start."""
    declared = ", ".join(f".param .u64 test_param_{i}" for i in range(parameters))
    loads = "".join(f"  ld.param.u64 %rd{i}, [test_param_{i}];\n" for i in range(parameters))
    return parse(f"{HEAD}{before}.visible .entry test({declared})\n{{{REGISTERS}{loads}{body}\n}}")


def run(
    body: str,
    *parameters: int,
    memory: Arena | None = None,
    threads: int = 1,
    grid: int = 1,
    before: str = "",
    **options: Any,
) -> Result:
    """Launches a body on integer parameters."""
    params = struct.pack(f"<{len(parameters)}Q", *parameters)
    code = module(body, len(parameters), before)
    return launch(code, "test", grid, threads, params, memory or Arena(), **options)


_NAMES = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}


def evaluate(statement: str, result: type, *operands: Array) -> Array:
    """What an instruction computes, by executing it in one thread for each element.

    `{d}` and `{0}`, `{1}` ... stand for registers of the sizes of `result` and of the operands;
    predicates from `%p1` on and other registers from 3 to 8 are free. Operands of one element are
    the same for all threads.
    """
    count = max(map(len, operands))
    arena = Arena()
    dtype = np.dtype(result)
    output = arena.allocate(count * dtype.itemsize, name="result")
    body, names = [], []
    addresses = [output.address]
    for i, operand in enumerate(operands):
        size = operand.dtype.itemsize
        data = arena.allocate(operand.nbytes, name=f"operand {i}", data=operand, writable=False)
        addresses.append(data.address)
        names.append(f"{_NAMES[size]}{10 + i}")
        index = "%r0" if len(operand) == count else "0"
        body.append(f"mad.wide.u32 %rd9, {index}, {size}, %rd{i + 1};")
        body.append(f"ld.global.b{8 * size} {names[-1]}, [%rd9];")
    target = f"{_NAMES[dtype.itemsize]}19"
    body += [
        statement.format(*names, d=target),
        f"mad.wide.u32 %rd9, %r0, {dtype.itemsize}, %rd0;",
        f"st.global.b{8 * dtype.itemsize} [%rd9], {target};",
    ]
    start = "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %tid.x; mad.lo.s32 %r0, %r1, 64, %r2;\n"
    start += f"setp.ge.u32 %p0, %r0, {count}; @%p0 ret;\n"
    code = start + "\n".join(body)
    outcome = run(code, *addresses, memory=arena, threads=64, grid=-(-count // 64), races=False)
    outcome.raise_if_findings()
    return arena.read(output.address, output.size).view(dtype)
