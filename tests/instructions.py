"""Counts the instructions of the native step on a small input and compares with committed figures.

``python -m bench.instructions`` fails where a figure is exceeded by more than 3 %; ``--update``
records new ones. Counts are exact and the same on a busy machine and on a quiet one, but belong to
a compiler: with another one they are printed and not compared. Needs valgrind.

The step is counted as the difference of two runs of one small program, with ten steps and with
none. It loads the native module alone, without torch, and describes memory of its own to it.
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

from . import load_package

FIGURES = Path(__file__).parent / "results" / "instructions.json"
SLACK = 0.03
STEPS = 10
# Case: what PROGRAM gets, as (dtype's DLPack code, bits, momentum, l1, SIMD level).
CASES = {
    "float32": (2, 32, 0.9, 1e-5, "avx2"),
    "float32, l1=0": (2, 32, 0.9, 0.0, "avx2"),
    "float32, no momentum": (2, 32, 0.0, 1e-5, "avx2"),
    "float32, baseline": (2, 32, 0.9, 1e-5, "baseline"),
    "float64": (2, 64, 0.9, 1e-5, "avx2"),
    "float16": (2, 16, 0.9, 1e-5, "avx2"),
    "bfloat16": (4, 16, 0.9, 1e-5, "avx2"),
}

PROGRAM = """
import ctypes, importlib.util, json, sys
path, steps, case = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
code, bits, momentum, l1, level = case
spec = importlib.util.spec_from_file_location("resnet_reg_ext._C", path)
core = importlib.util.module_from_spec(spec)
spec.loader.exec_module(core)
class Memory:
    def __init__(self, elements):
        self.elements = elements
        self.kept = ctypes.create_string_buffer(elements * bits // 8 + 64)
        self.address = (ctypes.addressof(self.kept) + 63) // 64 * 64
def describe(m):
    return m.address, 1, 0, code, bits, (m.elements,), (1,)
sizes = [0, 1, 7, 64, 65, 1000, 32768, 32769, 40000] + [512] * 100
lists = [[Memory(n) for n in sizes] for _ in range(3)]
if not momentum:
    lists[2] = None
core.set_simd_level(level)
reader = core.TensorReader(None, describe, lambda device: 0, Memory, Memory)
reading = reader.read(*lists)
assert not reading.misfits, reading.misfits
options = (0.1, momentum, 0.0, 1e-4, l1, False, False, False, False, 1.0, 1.0, False, 1, {})
for _ in range(steps):
    core.prox_sgd_(reader, reading, *options)
"""


def count(module: str, case: Sequence[object], steps: int) -> int:
    """Instructions of a whole run of the program."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        run = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                f"--callgrind-out-file={out}",
                sys.executable,
                "-I",
                "-S",
                "-c",
                PROGRAM,
                module,
                str(steps),
                json.dumps(case),
            ],
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": "0", "PYTHONMALLOC": "malloc"},
        )
        if run.returncode:
            raise RuntimeError(f"valgrind failed:\n{run.stderr}")
        for line in out.read_text().splitlines():
            if line.startswith(("totals:", "summary:")):
                return int(line.split()[1])
    raise RuntimeError("valgrind wrote no total")


def measure(module: str) -> dict[str, int]:
    """Instructions of one step for each case."""
    figures = {}
    for name, case in CASES.items():
        figures[name] = round((count(module, case, STEPS) - count(module, case, 0)) / STEPS)
        print(f"{name}: {figures[name]:,} instructions", flush=True)
    return figures


def compare(figures: dict[str, int], committed: dict[str, int]) -> list[str]:
    """A sentence for each case that needs too many instructions or isn't committed."""
    wrong = []
    for name, figure in figures.items():
        if name not in committed:
            wrong.append(f"{name}: no figure is committed")
        elif figure > committed[name] * (1 + SLACK):
            share = 100 * (figure / committed[name] - 1)
            wrong.append(f"{name}: {figure:,} are {share:.1f} % more than {committed[name]:,}")
        elif figure < committed[name] * (1 - SLACK):
            print(f"{name}: fewer than the committed {committed[name]:,}; record with --update")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.instructions", description=__doc__)
    parser.add_argument("--update", action="store_true", help="record what is counted")
    options = parser.parse_args(arguments)
    if not shutil.which("valgrind"):
        print("not counted: valgrind isn't installed")
        return 0
    core = load_package()._native._C
    if "avx2" not in core.simd_levels():
        print("not counted: this processor has no AVX2")
        return 0
    compiler = core.build_info()["compiler"]
    figures = measure(core.__file__)
    if options.update:
        text = json.dumps({"compiler": compiler, "instructions": figures}, indent=1)
        FIGURES.write_text(text + "\n")
        print(f"recorded in {FIGURES}")
        return 0
    committed = json.loads(FIGURES.read_text())
    if committed["compiler"] != compiler:
        print(f"not compared: the figures are {committed['compiler']}'s, this is {compiler}")
        return 0
    wrong = compare(figures, committed["instructions"])
    print("\n".join(wrong) if wrong else f"all within {100 * SLACK:.0f} %")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
