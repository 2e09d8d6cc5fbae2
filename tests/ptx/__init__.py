"""Executes PTX in NumPy, exactly, with checks of every memory access.

module = ptx.parse(ptx.compile_ptx(Path("kernel.cu"), "compute_90"))
arena = ptx.Arena()
x = arena.allocate(4096, name="x", data=values)
result = ptx.launch(module, "kernel", grid=4, block=256, params=params, memory=arena)
result.raise_if_findings()
"""

from .compiler import (
    CompilerError,
    architectures,
    compile_cubin,
    compile_ptx,
    find_nvcc,
    find_tool,
    newest_arch,
)
from .counts import Counts, Traffic
from .findings import Finding
from .float_instructions import contractable
from .machine import KernelFault, Result, launch
from .memory import Allocation, Arena, LazyAllocation
from .parser import list_kernels, parse
from .program import Instruction, Kernel, Module
from .scalars import UnsupportedPTX

__all__ = [
    "Allocation",
    "Arena",
    "CompilerError",
    "Counts",
    "Finding",
    "Instruction",
    "Kernel",
    "KernelFault",
    "LazyAllocation",
    "Module",
    "Result",
    "Traffic",
    "UnsupportedPTX",
    "architectures",
    "compile_cubin",
    "compile_ptx",
    "contractable",
    "find_nvcc",
    "find_tool",
    "launch",
    "list_kernels",
    "newest_arch",
    "parse",
]
