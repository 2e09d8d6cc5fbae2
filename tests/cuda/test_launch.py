"""csrc/cuda/launch.cu against a stand-in for CUDA: stream, status, and the device put back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
LAUNCHER = CSRC / "cuda" / "launch.cu"
STAND_IN = Path(__file__).with_name("stand_in")

# In a process of its own: a process has one library of a name, and by the name libcuda.so.1 the
# launcher finds the driver.
SCRIPT = """
import ctypes, json, sys
code = ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
code.launch_two.restype = code.why_unusable.restype = ctypes.c_char_p
code.launch_two.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
stream = ctypes.c_void_p.in_dll(code, "last_stream")
def value(name):
    return ctypes.c_int.in_dll(code, name)
current = ctypes.c_long.in_dll(code, "current")
def launch(device, table_bytes=10):
    thrown = code.launch_two(device, 0x5EA, table_bytes).decode()
    return {"thrown": thrown, "current context": current.value, "launches": value("launches").value}
seen = {"no context before": launch(1)}
names = "last_device", "last_grid", "last_block"
seen["last launch"] = [value(name).value for name in names] + [stream.value]
seen["contexts"] = list((ctypes.c_int * 2).in_dll(code, "has_context"))
current.value = 1
seen["another device's context before"] = launch(1)
value("refused_from").value = 5
seen["the second is refused"] = launch(1)
seen["no such table"] = launch(1, 2)
value("refused_from").value = -1
code.launch_rows(1, ctypes.c_void_p(0x5EA), 10)
seen["kernel of coupled rows"] = ctypes.c_void_p.in_dll(code, "last_kernel").value
seen["usable"] = [code.why_unusable(device).decode() for device in (0, 1)]
seen["current context at last"] = current.value
print(json.dumps(seen))
"""
EXPECTED = {
    "no context before": {"thrown": "", "current context": 0, "launches": 2},
    "last launch": [1, 7, 256, 0x5EA],
    "contexts": [0, 1],
    "another device's context before": {"thrown": "", "current context": 1, "launches": 4},
    "the second is refused": {
        "thrown": "ProxSGD: second: the stand-in refuses",
        "current context": 1,
        "launches": 5,
    },
    "no such table": {
        "thrown": "ProxSGD: plan and kernel were built for tables of different sizes",
        "current context": 1,
        "launches": 5,
    },
    "kernel of coupled rows": 3010,
    "usable": [
        "",
        "no kernel of this build runs on CUDA device 1 (compute capability 3.5): reinstall with "
        "TORCH_CUDA_ARCH_LIST naming its architecture",
    ],
    "current context at last": 1,
}


class Mutant(NamedTuple):
    name: str
    old: str
    new: str


MUTANTS = [
    Mutant("stream dropped", "static_cast<cudaStream_t>(stream)", "nullptr"),
    Mutant("status unchecked", "if (status == cudaSuccess) return;", "return;"),
    Mutant("device not made current", 'check(cudaSetDevice(device), "cudaSetDevice");', ""),
    Mutant("device not put back", "set_context()(previous_); }", "}"),
    Mutant(
        "device put back by a new context", "set_context()(previous_); }", "cudaSetDevice(0); }"
    ),
    Mutant("rows take the kernel of elements", "launch.coupled_rows ?", "false ?"),
    Mutant("starts take the kernel towards zero", "launch.towards_start", "false"),
    Mutant("table's size unchecked", "if (kernel == nullptr) {", "if (false) {"),
]


def seen(folder: Path, source: str) -> dict[str, Any]:
    """What the stand-in saw of a launcher."""
    launcher, library = folder / "launch.cpp", folder / "libcuda.so.1"
    launcher.write_text(source.replace('"../prox_sgd.h"', '"prox_sgd.h"'))
    command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", "-w", f"-I{STAND_IN}", f"-I{CSRC}"]
    command += [f"-I{CSRC / 'cuda'}", str(launcher), str(STAND_IN / "runtime.cpp")]
    command += ["-Wl,-soname,libcuda.so.1", "-ldl", "-o", str(library)]
    subprocess.run(command, check=True)
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(library)], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stdout + told.stderr
    result: dict[str, Any] = json.loads(told.stdout)
    return result


def test_the_launcher_as_it_is(tmp_path: Path) -> None:
    assert seen(tmp_path, LAUNCHER.read_text()) == EXPECTED


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    source = LAUNCHER.read_text()
    assert source.count(mutant.old) == 1, "the edit no longer applies"
    assert seen(tmp_path, source.replace(mutant.old, mutant.new)) != EXPECTED
