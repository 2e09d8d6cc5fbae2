"""Compiles resnet_reg_ext._C: writes a ninja graph and runs it.

setup.py calls it, and documents the environment variables.
"""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools.errors import CompileError

from .toolchain import CUDA_FLAGS, Toolchain, requirements, run, setting, why_without_cuda

__all__ = ["build", "requirements", "setting"]

CSRC = Path(__file__).resolve().parent
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Each rounding is part of the contract: the compiler may not contract a * b + c to an fma. The
# other two flags let it vectorise the loop and change no value.
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]


def in_ninja(path: Path) -> str:
    """A path for build.ninja; the writer itself escapes blanks and colons."""
    return str(path).replace("$", "$$")


def quote(words: list[str]) -> str:
    """Words of a shell command for build.ninja."""
    return " ".join(shlex.quote(word).replace("$", "$$") for word in words)


def write_build_info(path: Path, tools: Toolchain, version: str) -> None:
    """Writes the header that build_info() is made of, if it has changed."""

    def text(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    values = {
        "PROX_SGD_VERSION": version,
        "PROX_SGD_COMPILER": run([*shlex.split(tools.cxx), "--version"]).splitlines()[0],
        "PROX_SGD_SANITIZERS": " ".join(tools.sanitize),
        "PROX_SGD_CUDA_ARCHITECTURES": tools.cuda.names if tools.cuda else "",
        "PROX_SGD_CUDA_FLAGS": " ".join(CUDA_FLAGS),
        "PROX_SGD_CUDA_LEFT_OUT": why_without_cuda(),
    }
    header = "#pragma once\n" + "".join(f"#define {k} {text(v)}\n" for k, v in values.items())
    if not path.exists() or path.read_text() != header:
        path.write_text(header)


def cxx_sources(tools: Toolchain, folder: Path) -> dict[str, list[str]]:
    """C++ sources with their flags."""
    pybind11: Any = importlib.import_module("pybind11")
    common = [*CXX_FLAGS, *instrumentation(tools), f"-I{folder}", f"-I{CSRC}"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    python += ["-O1", "-DPYBIND11_DETAILED_ERROR_MESSAGES"]  # -O3 takes a third longer to compile
    has_avx2 = ["-DPROX_SGD_HAS_AVX2"] if tools.avx2 else []
    without_kernel = tools.x86 and not tools.avx2
    sources = {
        "bindings.cpp": [*common, *python],
        "tensor_view.cpp": [*common, *python],
        "tensor_lists.cpp": [*common, *python],
        "row_bindings.cpp": [*common, *python],
        "cpu/plan.cpp": common,
        "cpu/row_launch.cpp": [*common, *KERNEL_FLAGS, *tools.openmp],
        "cpu/simd.cpp": [*common, *has_avx2],
        "cpu/launch.cpp": [*common, *KERNEL_FLAGS, *tools.openmp],
    }
    defines = tools.cuda.defines if tools.cuda else []
    for plan in ("cuda/plan.cpp", "cuda/row_plan.cpp"):
        sources[plan] = [*common, "-ffp-contract=off", *defines]
    if without_kernel:
        sources["cpu/absent.cpp"] = common
    else:
        for kernel in ("cpu/elements.cpp", "cpu/rows.cpp"):
            sources[kernel] = [*common, *KERNEL_FLAGS, *tools.avx2]
    if tools.cuda is None:
        sources["cuda/absent.cpp"] = common
    return sources


def instrumentation(tools: Toolchain) -> list[str]:
    """Flags of the sanitizers that are asked for; with -O3 their checks take minutes to compile."""
    if not tools.sanitize:
        return []
    return [f"-fsanitize={','.join(tools.sanitize)}", "-fno-omit-frame-pointer", "-g1", "-O1"]


def write_ninja(tools: Toolchain, folder: Path, output: Path) -> None:
    """Writes build.ninja, which compiles all sources into the module ``output``."""
    syntax: Any = importlib.import_module("ninja.ninja_syntax")
    compiler = tools.cxx.replace("$", "$$")
    link = ["-shared", *tools.openmp_link, *instrumentation(tools)[:1]]
    with (folder / "build.ninja").open("w") as stream:
        ninja = syntax.Writer(stream)

        def rule(name: str, command: str, depfile: str) -> None:
            ninja.rule(
                name,
                f"{command} {depfile} -MF $out.d $flags -c $in -o $out",
                description=f"{name.upper()} $in",
                depfile="$out.d",
                deps="gcc",
            )

        def compile_(name: str, source: str, flags: list[str]) -> str:
            out = source.replace("/", "_").replace(".", "_") + ".o"
            ninja.build(out, name, in_ninja(CSRC / source), variables={"flags": quote(flags)})
            return out

        rule("cxx", compiler, "-MMD")
        objects = [compile_("cxx", *source) for source in cxx_sources(tools, folder).items()]
        if tools.cuda is not None:
            rule("cuda", quote([tools.cuda.nvcc]), "-MD")
            for name, has_kernels in (("elements", True), ("rows", True), ("launch", False)):
                objects.append(compile_("cuda", f"cuda/{name}.cu", tools.cuda.flags(has_kernels)))
            # The static runtime's symbols stay inside: torch has a runtime of its own.
            link += [str(tools.cuda.runtime), "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
        if not tools.sanitize:
            link += ["-Wl,-s"]
        ninja.rule("link", f"{compiler} $in -o $out $flags", description="LINK $out")
        ninja.build(in_ninja(output), "link", objects, variables={"flags": quote(link)})


def build(folder: Path, output: Path, version: str, verbose: bool) -> None:
    """Compiles the module ``output`` in ``folder``, only what has changed since the last time."""
    folder.mkdir(parents=True, exist_ok=True)
    tools = Toolchain.found()
    write_build_info(folder / "build_info.h", tools, version)
    write_ninja(tools, folder, output)
    command = [sys.executable, "-m", "ninja", *(["-v"] if verbose else [])]
    if subprocess.run(command, cwd=folder, check=False).returncode != 0:
        raise CompileError(
            "resnet_reg_ext: the native module did not compile; see above. To do without a "
            "part: RESNET_REG_EXT_CUDA=0 leaves CUDA out, RESNET_REG_EXT_NATIVE=0 all of it."
        )
