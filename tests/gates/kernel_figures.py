"""Registers of the CUDA kernels, and launches and parameter bytes for ResNet-50.

``python tests/gates/kernel_figures.py`` writes bench/results/kernels.json, which the suite compares
the kernels with. ptxas allots registers, so the figures depend on its release.
"""

from __future__ import annotations

import collections
import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import cuda_harness as harness
import numpy as np
import ptx
from ptx.compiler import version
from resnet50_sizes import resnet50_groups, resnet50_sizes

UNITS = harness.UNITS_PER_BLOCK
FIGURES = Path(__file__).resolve().parents[2] / "bench" / "results" / "kernels.json"
SHIPPED = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120")


class Resources(NamedTuple):
    registers: int
    stack: int
    spills: int


def resources(
    csrc: Path, arch: str, flags: tuple[str, ...], source: str = "elements.cu"
) -> dict[str, Resources]:
    """What each kernel takes, from `ptxas -v`."""
    _, text = ptx.compile_cubin(csrc / "cuda" / source, arch, flags)
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


def mobilenet_sizes() -> list[int]:
    """Elements of a network like MobileNetV3-Small: many small tensors (Howard et al., 2019)."""
    sizes = [16 * 27, 16, 16]
    inside = 16
    for expanded, width in ((16, 16), (72, 24), (88, 24), (96, 40), (240, 40), (240, 40),
                            (120, 48), (144, 48), (288, 96), (576, 96), (576, 96)):  # fmt: skip
        squeezed = max(8, expanded // 4)
        sizes += [inside * expanded, expanded, expanded, expanded * 25, expanded, expanded]
        sizes += [expanded * squeezed, squeezed, squeezed * expanded, expanded]
        sizes += [expanded * width, width, width]
        inside = width
    return [*sizes, inside * 576, 576, 576, 576 * 1024, 1024, 1024 * 1000, 1000]


MODELS = {
    "ResNet-50 in one group": [resnet50_sizes()],
    "ResNet-50 in two groups": resnet50_groups(),
    "ResNet-50's vectors": resnet50_groups()[1:],
    "MobileNet": [mobilenet_sizes()],
    "581 scalars": [[1] * 581],
}


def launches_of(plan: harness.Plan, storage: str, groups: list[list[int]]) -> list[dict[str, Any]]:
    """The launches of a step with momentum; the n-th parameter's address is (n + 1) * 2^34."""
    kind = harness.STORAGES[storage]
    options = harness.named_options({"lr": 0.1, "momentum": 0.9, "l1": 1e-5}, False)
    address = itertools.count(2**34, 2**34)
    buckets = [
        ([(next(address), 2**60, 2**61, 2**62 * kind.master, 0, 0, n) for n in sizes], options, {})
        for sizes in groups
    ]
    return plan(storage, buckets)


def busiest_block(plan: harness.Plan, storage: str, groups: list[list[int]]) -> int:
    """The most parameters that one block walks, read from the tables."""
    unit = harness.STORAGES[storage].unit
    sizes = [n for group in groups for n in group]
    (two,) = launches_of(plan, storage, [[1, 1]])
    entry = _place(two, 1) - _place(two, 0)
    number = most = 0
    for launch in launches_of(plan, storage, groups):
        pieces: collections.Counter[int] = collections.Counter()
        while number < len(sizes) and (at := _place(launch, number)) >= 0:
            # An entry's last 8 bytes are its first unit, and in 16 bits its group.
            last_word = launch["parameters"][at + entry - 8 : at + entry]
            first = int.from_bytes(last_word[:6], "little")
            last = first + -(-sizes[number] // unit) - 1
            pieces.update(range(first // UNITS, last // UNITS + 1))
            number += 1
        assert max(pieces) + 1 == launch["grid"]
        most = max(most, *pieces.values())
    assert number == len(sizes)
    return most


def _place(launch: dict[str, Any], number: int) -> int:
    """Where the entry of a parameter is in a table of :func:`launches_of`; -1: not there."""
    words = np.frombuffer(launch["parameters"], np.uint64)
    (found,) = np.nonzero(words == (number + 1) * 2**34)
    return int(found[0]) * 8 if len(found) else -1


def resnet50_launches(storage: str) -> list[dict[str, int]]:
    """The launches of a step on ResNet-50 in two groups, from the plan of the installed module."""
    return [
        {
            "blocks": launch["grid"],
            "threads": launch["block"],
            "parameter_bytes": len(launch["parameters"]),
        }
        for launch in launches_of(harness.installed_plan, storage, resnet50_groups())
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
