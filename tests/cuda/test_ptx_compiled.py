"""What ptxas and the disassembler say of the kernels: registers, memory accesses, arithmetic."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import cuda_harness as harness
import kernel_figures
import ptx
import pytest
from kernel_figures import SHIPPED, resources

# 65,536 registers of an SM are 64 for each thread of 32 warps. That many warps have
# 1,024 * 5 * 16 bytes in flight, several times the bandwidth times the latency of memory.
MOST_REGISTERS = 64
MOST_TOWARDS_A_START = 80  # 24 warps
SIZES = ("12k", "32k", "start_12k")  # of the table; towards a start there is the smaller only
KERNELS = {f"prox_sgd_{storage}_{size}" for storage in harness.STORAGES for size in SIZES}


# 16-byte loads in flight: all that a thread reads before it computes.
LOADS = {
    "float32": 6,
    "float64": 3,
    "float16": 3,
    "bfloat16": 3,
    "float32_momentum_bfloat16": 4,
    "bfloat16_master": 4,
    "bfloat16_master_momentum_bfloat16": 2,
    "float16_master": 4,
    "float32_start": 4,
    "float64_start": 4,
    "float16_start": 4,
    "bfloat16_start": 4,
    "float32_momentum_bfloat16_start": 3,
    "bfloat16_master_start": 3,
    "bfloat16_master_momentum_bfloat16_start": 2,
    "float16_master_start": 3,
}


@functools.cache
def machine_code(arch: str, csrc: Path) -> dict[str, list[str]]:
    """Each kernel's machine code, an instruction a line, in order of address."""
    cubin, _ = ptx.compile_cubin(csrc / "cuda" / "elements.cu", arch, harness.FLAGS)
    text = subprocess.run(
        [ptx.find_tool("cuobjdump"), "-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    return {
        part.split()[0]: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", part)
        for part in text.split("Function : ")[1:]
    }


def disassemble(arch: str, kernel: str, csrc: Path = harness.CSRC) -> list[str]:
    """A kernel's machine code."""
    return machine_code(arch, csrc)[kernel]


def most_registers(kernel: str) -> int:
    """The most registers that a kernel may take."""
    return MOST_TOWARDS_A_START if "_start_" in kernel else MOST_REGISTERS


@pytest.mark.parametrize("arch", SHIPPED)
def test_no_spills_no_stack_and_few_registers(arch):
    found = resources(harness.CSRC, arch, harness.FLAGS)
    assert set(found) == KERNELS
    committed = kernel_figures.committed()
    # Another release of ptxas allots registers its own way.
    comparable = committed["nvcc"] == kernel_figures.compiler()
    for kernel, used in found.items():
        assert used.stack == 0, kernel
        assert used.spills == 0, kernel
        most = committed["registers"][arch][kernel] if comparable else most_registers(kernel)
        assert used.registers <= most, kernel


@pytest.mark.parametrize("storage", harness.STORAGES)
def test_launches_of_a_step_on_resnet50_are_those_committed(storage):
    assert (
        kernel_figures.resnet50_launches(storage) == kernel_figures.committed()["resnet50"][storage]
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_32_warps_are_resident_and_24_towards_a_start(arch):
    """Registers are the only limit: there is no shared memory. They are given out 8 a thread."""
    for kernel, used in resources(harness.CSRC, arch, harness.FLAGS).items():
        granted = -(-used.registers // 8) * 8
        warps = 65536 // (granted * 32)
        assert warps // 8 * 8 >= (24 if "_start_" in kernel else 32), kernel  # blocks of 8 warps


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_local_memory_is_not_touched(arch):
    for kernel in KERNELS:
        assert not [i for i in disassemble(arch, kernel) if re.search(r"\b(LDL|STL)\b", i)]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
@pytest.mark.parametrize("storage", LOADS)
def test_vector_accesses_and_loads_in_flight(arch, storage):
    code = disassemble(arch, f"prox_sgd_{storage}_12k")
    assert any("STG.E.128" in line for line in code)
    assert not any("STRONG" in line for line in code if "STG" in line)
    assert loads_before_first_use(code) >= LOADS[storage]


def loads_before_first_use(code: list[str]) -> int:
    """The most 16-byte loads that are issued before any register that one of them fills is read."""
    best, pending = 0, []
    for line in code:
        load = re.search(r"LDG\.E\.128\S*\s+R(\d+),", line)
        first = re.split(r"[ ,]", line.split("]")[0])[0]
        operands = line.split(",", 1)[1] if "," in line else ""
        read = {int(r) for r in re.findall(r"\bR(\d+)\b", operands)}
        if any(set(range(r, r + 4)) & read for r in pending) or first.startswith(("BRA", "EXIT")):
            pending = []
        if load:
            pending.append(int(load[1]))
            best = max(best, len(pending))
    return best
