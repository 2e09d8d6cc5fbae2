"""Counts the native step's instructions on a small input, and compares with committed figures.

``python tests/gates/instructions.py`` fails for a figure that is off by more than 3 %; ``--update``
records new ones. Counts are the same on a busy machine and on a quiet one, but depend on the
compiler: with another one nothing is compared. Needs valgrind.

Only the native module's own instructions are counted. Python around it takes another number in
every process, as its hash tables and allocator depend on addresses: the difference between a
process with steps and one without varied by 6 %. One process, without torch, runs all cases on
memory of its own, on one thread.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from resnet_reg_ext.backends import native

FIGURES = Path(__file__).resolve().parents[2] / "bench" / "results" / "instructions.json"
SLACK = 0.03
COMMAND = "python tests/gates/instructions.py --update"
STEPS = 3
FLOAT16, FLOAT32, FLOAT64, BFLOAT16 = (2, 16), (2, 32), (2, 64), (4, 16)


class Case(NamedTuple):
    """Storage types, as DLPack's code and bits, and options of a step."""

    weight: tuple[int, int] = FLOAT32
    buffer: tuple[int, int] = FLOAT32
    master: bool = False
    momentum: float = 0.9
    l1: float = 1e-5
    count_zeros: bool = False
    nesterov: bool = False
    maximize: bool = False
    start: bool = False


CASES = {
    "float32": Case(),
    "float32, l1=0": Case(l1=0.0),
    "float32, no momentum": Case(momentum=0.0),
    "float32, zeros counted": Case(count_zeros=True),
    "float32, nesterov": Case(nesterov=True),
    "float32, maximize": Case(maximize=True),
    "float32, towards the start": Case(start=True),
    "float32, towards the start, counted": Case(start=True, count_zeros=True),
    "float32, momentum in bfloat16": Case(buffer=BFLOAT16),
    "float64": Case(FLOAT64, FLOAT64),
    "float64, towards the start": Case(FLOAT64, FLOAT64, start=True),
    "float16": Case(FLOAT16, FLOAT16),
    "float16, zeros counted": Case(FLOAT16, FLOAT16, count_zeros=True),
    "float16, master weights": Case(FLOAT16, master=True),
    "bfloat16": Case(BFLOAT16, BFLOAT16),
    "bfloat16, towards the start, counted": Case(BFLOAT16, BFLOAT16, start=True, count_zeros=True),
    "bfloat16, zeros counted": Case(BFLOAT16, BFLOAT16, count_zeros=True),
    "bfloat16, master weights": Case(BFLOAT16, master=True),
    "bfloat16, master weights, zeros counted": Case(BFLOAT16, master=True, count_zeros=True),
}

# A function that nothing else calls: valgrind writes its counts to a file, and starts from 0 again,
# at each call.
MARK = "getppid"
PROGRAM = """
import ctypes, importlib.util, json, os, sys
path, steps, cases = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("resnet_reg_ext._C", path)
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
class Memory:
    def __init__(self, elements, code, bits):
        self.elements, self.dtype = elements, (code, bits)
        self.kept = ctypes.create_string_buffer(elements * bits // 8 + 64)
        self.address = (ctypes.addressof(self.kept) + 63) // 64 * 64
def describe(m):
    return m.address, 1, 0, *m.dtype, (m.elements,), (1,)
sizes = [0, 1, 7, 64, 65, 1000, 32768, 32769, 40000] + [512] * 100
reader = core.TensorReader(None, describe, lambda device: 0, Memory, Memory)
for weight, buffer, master, momentum, l1, count_zeros, nesterov, maximize, start in cases:
    params, grads = ([Memory(n, *weight) for n in sizes] for _ in range(2))
    momenta = [Memory(n, *buffer) for n in sizes] if momentum else None
    masters = [Memory(n, 2, 32) for n in sizes] if master else None
    starts = [Memory(n, *((2, 32) if master else weight)) for n in sizes] if start else None
    counters = (ctypes.c_int64 * len(sizes))()
    zeros = ctypes.addressof(counters) if count_zeros else 0
    reading = reader.read(params, grads, momenta, masters, zeros, starts)
    assert not reading.misfits, reading.misfits
    options = core.Options(
        lr=0.1, momentum=momentum, dampening=0.0, weight_decay=1e-4, l1=l1, nesterov=nesterov,
        maximize=maximize, proximal=False, frozen_zeros=False, grad_scale=1.0,
        grad_coefficient=1.0, first_step=False,
    )
    core.prox_sgd_(reader, [(reading, options, {})], 1)
    os.getppid()
    for _ in range(steps):
        core.prox_sgd_(reader, [(reading, options, {})], 1)
    os.getppid()
"""


def instructions_of(module: str, profile: str) -> int:
    """Instructions that were executed in an object, without its calls to other objects."""
    total, here, after_call = 0, False, False
    for line in profile.splitlines():
        if line.startswith("ob="):
            here = line[3:] == module
        elif line.startswith("calls="):
            after_call = True
        elif line[:1].isdigit() or line[:2] == "0x":
            # The line after a call holds the cost of the called function.
            if here and not after_call:
                total += int(line.split()[-1])
            after_call = False
    return total


def measure(module: str, cases: dict[str, Case]) -> dict[str, int]:
    """Instructions of one step for each case."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "profile"
        run = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--compress-strings=no",
                "--compress-pos=no",
                f"--dump-before={MARK}",
                f"--callgrind-out-file={out}",
                sys.executable,
                *("-I", "-S", "-c", PROGRAM),
                *(module, str(STEPS), json.dumps(list(cases.values()))),
            ],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": "0"},
        )
        if run.returncode:
            raise RuntimeError(f"valgrind failed:\n{run.stderr}")
        # One file for every mark, numbered from 1: the even ones hold the steps before them.
        profiles = [Path(f"{out}.{2 * i}").read_text() for i in range(1, len(cases) + 1)]
    counts = [instructions_of(module, profile) for profile in profiles]
    return {name: round(count / STEPS) for name, count in zip(cases, counts, strict=True)}


def compare(figures: dict[str, int], committed: dict[str, int]) -> list[str]:
    """A sentence for each case that isn't within the slack of its committed figure."""
    wrong = []
    for name in sorted(figures.keys() | committed.keys()):
        if name not in committed or name not in figures:
            wrong.append(f"{name}: only {'counted' if name in figures else 'committed'}")
            continue
        share = figures[name] / committed[name] - 1
        if abs(share) > SLACK:
            wrong.append(
                f"{name}: {figures[name]:,} instructions a step, {100 * share:+.1f} % against the "
                f"committed {committed[name]:,}; where that is meant: {COMMAND}"
            )
    return wrong


def why_not() -> str:
    """Why nothing can be compared here; empty where it can."""
    if not shutil.which("valgrind"):
        return "valgrind isn't installed"
    if not native.available():
        return f"{native.missing}"
    if "avx2" not in native._C.simd_levels():
        return "this processor has no AVX2"
    info = native._C.build_info()
    if info["sanitizers"]:
        return "the module is built with sanitizers"
    made_by = json.loads(FIGURES.read_text())["compiler"] if FIGURES.exists() else "no one"
    if made_by != info["compiler"]:
        return f"the figures are {made_by}'s, this is {info['compiler']}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="record what is counted")
    options = parser.parse_args(arguments)
    if not options.update and (reason := why_not()):
        print(f"not compared: {reason}")
        return 0
    figures = measure(native._C.__file__, CASES)
    for name, figure in figures.items():
        print(f"{name}: {figure:,} instructions")
    if options.update:
        compiler = native._C.build_info()["compiler"]
        text = json.dumps({"compiler": compiler, "instructions": figures}, indent=1)
        FIGURES.write_text(text + "\n")
        print(f"recorded in {FIGURES}")
        return 0
    wrong = compare(figures, json.loads(FIGURES.read_text())["instructions"])
    print("\n".join(wrong) if wrong else f"all within {100 * SLACK:.0f} %")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
