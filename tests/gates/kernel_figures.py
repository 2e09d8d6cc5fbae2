"""Registers of the CUDA kernels, and launches and parameter bytes for ResNet-50.

``python tests/gates/kernel_figures.py`` writes bench/results/kernels.json, which the suite compares
the kernels with. ptxas allots registers, so the figures depend on its release.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import cuda_harness as harness
import ptx
from ptx.compiler import version

FIGURES = Path(__file__).resolve().parents[2] / "bench" / "results" / "kernels.json"
SHIPPED = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


class Resources(NamedTuple):
    registers: int
    stack: int
    spills: int


def resources(csrc: Path, arch: str, flags: tuple[str, ...]) -> dict[str, Resources]:
    """What each kernel takes, from `ptxas -v`."""
    _, text = ptx.compile_cubin(csrc / "cuda" / "elements.cu", arch, flags)
    found = {}
    for part in text.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", part)
        used = re.search(r"Used (\d+) registers", part)
        assert all((name, stack, used)), part
        found[name[1]] = Resources(int(used[1]), int(stack[1]), int(stack[2]))
    return found


def registers(arch: str) -> dict[str, int]:
    """Registers of each kernel as it is shipped."""
    used = resources(harness.CSRC, arch, harness.FLAGS)
    return {kernel: used[kernel].registers for kernel in sorted(used)}


def resnet50_sizes() -> list[int]:
    """Elements of ResNet-50's 161 parameters, in order (He et al., 2015, table 1)."""
    sizes = [64 * 3 * 49, 64, 64]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += [inside * width, width, width, width * width * 9, width, width]
            sizes += [width * 4 * width, width * 4, width * 4]
            if block == 0:
                sizes += [inside * width * 4, width * 4, width * 4]
            inside = width * 4
    return [*sizes, 1000 * inside, 1000]


def resnet50_launches(storage: str) -> list[dict[str, int]]:
    """The launches of a step on ResNet-50 with momentum, from the plan of the installed module."""
    master = 2**43 if harness.STORAGES[storage].master else 0
    rows = [(2**40, 2**41, 2**42, master, 0, size) for size in resnet50_sizes()]
    options = harness.named_options({"lr": 0.1, "momentum": 0.9, "l1": 1e-5}, False)
    return [
        {
            "blocks": launch["grid"],
            "threads": launch["block"],
            "parameter_bytes": len(launch["parameters"]),
        }
        for launch in harness.installed_plan(storage, rows, options)
    ]


def compiler() -> str:
    """The release of nvcc, and so of ptxas."""
    return version(ptx.find_nvcc()).splitlines()[-1]


def committed() -> dict[str, Any]:
    return json.loads(FIGURES.read_text())


def main() -> None:
    figures = {
        "nvcc": compiler(),
        "registers": {arch: registers(arch) for arch in SHIPPED},
        "resnet50": {name: resnet50_launches(name) for name in harness.STORAGES},
    }
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"recorded in {FIGURES}")


if __name__ == "__main__":
    main()
