"""Builds resnet_reg_ext._C with ninja: C++ always, CUDA where a compiler for it is at hand.

Environment variables:
    RESNET_REG_EXT_NATIVE=0    leave the native module out: a pure-PyTorch package
    RESNET_REG_EXT_CUDA=1|0    insist on CUDA, or leave it out; found out if unset
    RESNET_REG_EXT_SANITIZE    sanitizers to build with, such as "address,undefined"
    TORCH_CUDA_ARCH_LIST       CUDA architectures, such as "8.0;9.0+PTX"
    CXX                        the C++ compiler

Metadata is in pyproject.toml.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
OLDEST_ARCHITECTURE = 70  # __grid_constant__ needs it
CUDA_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-lineinfo"]
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# Rounding is part of the contract: nothing may be fused that the source doesn't fuse. The other two
# only let the loop be vectorised; they change no value.
KERNEL_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
# One release throughout: nvcc's packages do not pin each other, and a newer nvvm writes PTX that an
# older ptxas refuses. 13.0 is the release that the oldest driver for CUDA 13 runs.
PYPI_TOOLKIT = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
]
PYPI_TOOLKIT_DRIVER = 13000  # what cuDriverGetVersion must say for CUDA 13's runtime: driver 580


def setting(name: str) -> str:
    """An environment variable that must be 0, 1 or unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r}: must be 0, 1 or unset")
    return value


def native_wanted() -> bool:
    """Whether to build the native module: on Linux, unless told not to."""
    if setting("RESNET_REG_EXT_NATIVE") == "0":
        return False
    if sys.platform != "linux":
        if setting("RESNET_REG_EXT_NATIVE") == "1":
            raise SystemExit("RESNET_REG_EXT_NATIVE=1: the native module is built on Linux only")
        print("resnet_reg_ext: the native module is for Linux; installing pure PyTorch")
        return False
    return True


def driver_version() -> int:
    """What cuDriverGetVersion says, 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value if status == 0 else 0


def find_nvcc() -> str | None:
    """Nvcc from the PATH, from where toolkits usually lie, or from PyPI's packages."""
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        return nvcc
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) for home in homes if home]
    folders += [Path(folder or ".") / "nvidia" / "cu13" for folder in sys.path]
    found = (shutil.which("nvcc", path=str(folder / "bin")) for folder in folders)
    return next(filter(None, found), None)


def cuda_left_out() -> str:
    """Why CUDA is left out of this build, or an empty string where it is built."""
    wanted = setting("RESNET_REG_EXT_CUDA")
    if wanted == "0":
        return "RESNET_REG_EXT_CUDA=0"
    if wanted == "1" or find_nvcc():
        return ""
    driver = driver_version()
    if driver >= PYPI_TOOLKIT_DRIVER:
        return ""
    if driver:
        return (
            f"no nvcc was found, and the driver (CUDA {driver // 1000}.{driver % 1000 // 10}) is "
            "too old for PyPI's compiler, which needs driver 580: update the driver, or put nvcc "
            "on the PATH"
        )
    return "no nvcc and no NVIDIA driver were found"


def build_requirements() -> list[str]:
    """Requirements beyond pyproject.toml's: a CUDA compiler where one is wanted and missing."""
    if not native_wanted() or cuda_left_out() or find_nvcc():
        return []
    return PYPI_TOOLKIT


def run(command: list[str]) -> str:
    """What a command prints, or CompileError with it."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


class Cuda:
    """A CUDA compiler and what it knows."""

    def __init__(self, nvcc: str, cxx: str) -> None:
        self.nvcc = nvcc
        known = {int(a) for a in re.findall(r"compute_(\d+)\b", run([nvcc, "--list-gpu-arch"]))}
        self.sass, self.ptx = self._architectures(known)
        # nvcc says itself where its toolkit is; its own path may be a wrapper's.
        top = re.search(r"TOP=(.*)", run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]))
        if top is None:
            raise CompileError(f"{nvcc} does not say where its toolkit is (nvcc --dryrun)")
        self.root = Path(top.group(1)).resolve()
        release = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]))
        if release is None:
            raise CompileError(f"{nvcc} does not say which release it is (nvcc --version)")
        # What a kernel's parameters may take: csrc/cuda/kernel.h.
        large = (int(release[1]), int(release[2])) >= (12, 1)
        self.defines = [f"-DPROX_SGD_PARAMETER_BYTES={32764 if large else 4096}"]
        self.cxx = cxx

    def _architectures(self, known: set[int]) -> tuple[list[int], list[int]]:
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
        if listed:
            sass, ptx = [], []
            oldest = max(OLDEST_ARCHITECTURE, min(known))
            for entry in listed:
                # The suffixes of 9.0a and 10.0f ask for instructions that aren't used here.
                match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
                number = int(match[1] + match[2]) if match else 0
                if match and number < oldest:
                    # A list that is meant for other programs too may well begin with older ones.
                    print(f"resnet_reg_ext: TORCH_CUDA_ARCH_LIST: {entry} is left out, too old")
                    continue
                if match is None or number not in known:
                    raise CompileError(
                        f"TORCH_CUDA_ARCH_LIST: {entry!r} is not an architecture that {self.nvcc} "
                        f"knows; it knows {', '.join(f'{a / 10:.1f}' for a in sorted(known))}"
                    )
                sass.append(number)
                if match[3]:
                    ptx.append(number)
            if not sass:
                raise CompileError(
                    f"TORCH_CUDA_ARCH_LIST={' '.join(listed)}: all are older than {oldest / 10:.1f}"
                )
            return sass, ptx
        sass = [n for n in (int(a.replace(".", "")) for a in ARCHITECTURES) if n in known]
        return sass, sass[-1:]

    @property
    def names(self) -> list[str]:
        """Architectures in words, such as 9.0 or 12.0+PTX."""
        names = [f"{a / 10:.1f}" + ("+PTX" if a in self.ptx else "") for a in self.sass]
        return names

    def flags(self, has_kernels: bool) -> list[str]:
        """Options that compile for every architecture; for one where there are no kernels."""
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.sass]
        code += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in self.ptx]
        if not has_kernels:
            code = code[:1]
        # nvcc wants a compiler, and not what may stand before one, as in "ccache g++".
        words = shlex.split(self.cxx)
        before = ("ccache", "sccache", "distcc", "env")
        while len(words) > 1 and (Path(words[0]).name in before or "=" in words[0]):
            words = words[1:]
        host = [f"-ccbin={words[0]}", *(f"-Xcompiler={word}" for word in words[1:])]
        host += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        return [*CUDA_FLAGS, *self.defines, *code, "--threads=0", *host]

    @property
    def runtime(self) -> Path:
        """The static CUDA runtime."""
        folders = ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")
        for folder in folders:
            library = self.root / folder / "libcudart_static.a"
            if library.is_file():
                return library
        raise CompileError(f"libcudart_static.a is in none of {folders} of {self.root}")


def find_cxx() -> str:
    """The C++ compiler, or an end with one clear sentence."""
    chosen = os.environ.get("CXX")
    if chosen:
        program, *arguments = shlex.split(chosen)
        found = shutil.which(program)
        if found is None:
            raise SystemExit(f"resnet_reg_ext: CXX={chosen}: there is no such program")
        if os.sep in program:  # ninja runs in another folder
            program = os.path.abspath(found)
        return shlex.join([program, *arguments])
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return name
    raise SystemExit(
        "resnet_reg_ext: no C++ compiler was found. Install one (g++ or clang++), or set "
        "RESNET_REG_EXT_NATIVE=0 to install the slower pure-PyTorch package."
    )


class FreshBuild(build_py):  # type: ignore[misc]
    """Copies the package into an empty folder: an older version's may hold what is gone."""

    def run(self) -> None:
        """Empties the folder, and copies."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib, "resnet_reg_ext"), ignore_errors=True)
        super().run()


class NinjaBuild(build_ext):  # type: ignore[misc]
    """Compiles csrc/ in parallel and links it, rebuilding only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        """Writes a build.ninja for the extension, runs it and puts the module in its place."""
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        output = folder / Path(self.get_ext_fullpath(ext.name)).name
        self._write(folder, output)
        self._ninja(folder)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(output, target)
        target.chmod(0o755)

    def get_source_files(self) -> list[str]:
        """All of csrc/, for the source distribution."""
        return [str(p.relative_to(ROOT)) for p in sorted(CSRC.rglob("*")) if p.is_file()]

    def _ninja(self, folder: Path) -> None:
        command = [sys.executable, "-m", "ninja"]
        if self.verbose or os.environ.get("VERBOSE"):
            command.append("-v")
        if subprocess.run(command, cwd=folder, check=False).returncode != 0:
            raise CompileError(
                "resnet_reg_ext: the native module did not compile; see above. To do without a "
                "part: RESNET_REG_EXT_CUDA=0 leaves CUDA out, RESNET_REG_EXT_NATIVE=0 all of it."
            )

    def _accepted(self, cxx: str, flags: list[str], code: str = "int main() {}") -> bool:
        """Whether compiler and linker take these flags, for a program."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(f"{code}\n")
            command = [*shlex.split(cxx), *flags, str(source), "-o", str(Path(folder, "probe"))]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def _write(self, folder: Path, output: Path) -> None:
        import pybind11

        ninja_syntax: Any = importlib.import_module("ninja.ninja_syntax")

        cxx = find_cxx()
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise SystemExit(
                "resnet_reg_ext: Python.h was not found: install Python's development files "
                "(python3-dev), or set RESNET_REG_EXT_NATIVE=0."
            )
        left_out = cuda_left_out()
        cuda = None
        if not left_out:
            nvcc = find_nvcc()
            if nvcc is None:
                raise SystemExit(
                    "resnet_reg_ext: RESNET_REG_EXT_CUDA=1, but no nvcc was found: put one on the "
                    "PATH, or build with isolation, which gets it from PyPI."
                )
            cuda = Cuda(nvcc, cxx)
        if left_out:
            print(f"resnet_reg_ext: building without CUDA: {left_out}", file=sys.stderr)

        # Tried with code, as some compilers only warn of flags for another processor.
        avx2 = ["-mavx2", "-mfma", "-mf16c"]
        uses_avx2 = (
            "#include <immintrin.h>\n"
            "int main() { return _mm256_movemask_epi8(_mm256_setzero_si256()); }"
        )
        has_avx2 = self._accepted(cxx, avx2, uses_avx2)
        uses_openmp = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
        openmp = ["-fopenmp"] if self._accepted(cxx, ["-fopenmp"], uses_openmp) else []
        if not openmp:
            print(f"resnet_reg_ext: {cxx} has no OpenMP: steps take one thread", file=sys.stderr)
        sanitizers = os.environ.get("RESNET_REG_EXT_SANITIZE", "")
        instrument = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g1"]
        common = CXX_FLAGS + (instrument if sanitizers else [])
        common += [f"-I{folder}", f"-I{CSRC}"]

        def text(value: str) -> str:
            return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

        values = {
            "PROX_SGD_VERSION": text(self.distribution.get_version()),
            "PROX_SGD_COMPILER": text(run([*shlex.split(cxx), "--version"]).splitlines()[0]),
            "PROX_SGD_SANITIZERS": text(sanitizers),
            "PROX_SGD_CUDA_ARCHITECTURES": text(" ".join(cuda.names) if cuda else ""),
            "PROX_SGD_CUDA_FLAGS": text(" ".join(CUDA_FLAGS)),
            "PROX_SGD_CUDA_LEFT_OUT": text(left_out),
        }
        header = "#pragma once\n" + "".join(f"#define {k} {v}\n" for k, v in values.items())
        info = folder / "build_info.h"
        if not info.exists() or info.read_text() != header:
            info.write_text(header)

        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
        sources: dict[str, tuple[str, list[str]]] = {
            # Called once a step; at -O3 it takes 19 s to compile instead of 14.
            "bindings": (
                "bindings.cpp",
                [*common, *includes, "-O1", "-DPYBIND11_DETAILED_ERROR_MESSAGES"],
            ),
            "tensors": ("tensors.cpp", [*common, *includes]),
            "cpu_plan": ("cpu/plan.cpp", common),
            "cpu_prox_sgd": (
                "cpu/prox_sgd.cpp",
                [*common, *KERNEL_FLAGS, *openmp, *(["-DPROX_SGD_HAS_AVX2"] if has_avx2 else [])],
            ),
            "cpu_baseline": (
                "cpu/kernel.cpp",
                [*common, *KERNEL_FLAGS, "-DPROX_SGD_SIMD=baseline"],
            ),
            "cuda_plan": (
                "cuda/plan.cpp",
                [*common, "-ffp-contract=off", *(cuda.defines if cuda else [])],
            ),
        }
        if has_avx2:
            sources["cpu_avx2"] = (
                "cpu/kernel.cpp",
                [*common, *KERNEL_FLAGS, *avx2, "-DPROX_SGD_SIMD=avx2"],
            )
        if cuda is None:
            sources["cuda_absent"] = ("cuda/absent.cpp", common)

        compiler = cxx.replace("$", "$$")
        with (folder / "build.ninja").open("w") as stream:
            ninja = ninja_syntax.Writer(stream)
            ninja.rule(
                "cxx",
                f"{compiler} -MMD -MF $out.d $flags -c $in -o $out",
                description="C++  $in",
                depfile="$out.d",
                deps="gcc",
            )
            objects = []
            for name, (source, flags) in sources.items():
                objects.append(f"{name}.o")
                ninja.build(
                    f"{name}.o",
                    "cxx",
                    in_ninja(CSRC / source),
                    variables={"flags": " ".join(map(quote, flags))},
                )
            link = ["-shared", *openmp, *(instrument[:1] if sanitizers else [])]
            if cuda is not None:
                ninja.rule(
                    "cuda",
                    f"{quote(cuda.nvcc)} -MD -MF $out.d $flags -c $in -o $out",
                    description="CUDA $in",
                    depfile="$out.d",
                    deps="gcc",
                )
                for name, has_kernels in (("kernel", True), ("launch", False)):
                    objects.append(f"cuda_{name}.o")
                    ninja.build(
                        f"cuda_{name}.o",
                        "cuda",
                        in_ninja(CSRC / "cuda" / f"{name}.cu"),
                        variables={"flags": " ".join(map(quote, cuda.flags(has_kernels)))},
                    )
                link += [str(cuda.runtime), "-ldl", "-lrt", "-lpthread"]
                # The static runtime's symbols stay inside: torch brings a runtime of its own.
                link += ["-Wl,--exclude-libs,ALL"]
            if not sanitizers:
                link += ["-Wl,-s"]
            ninja.rule("link", f"{compiler} $in -o $out $flags", description="LINK $out")
            ninja.build(
                in_ninja(output),
                "link",
                objects,
                variables={"flags": " ".join(map(quote, link))},
            )


def in_ninja(path: Path) -> str:
    """A path for build.ninja, where blanks and colons are taken care of."""
    return str(path).replace("$", "$$")


def quote(word: str) -> str:
    """A word for a shell command in build.ninja."""
    return shlex.quote(word).replace("$", "$$")


if native_wanted():
    setup(
        ext_modules=[Extension("resnet_reg_ext._C", sources=[])],
        cmdclass={"build_ext": NinjaBuild, "build_py": FreshBuild},
        setup_requires=build_requirements(),
    )
else:
    setup(cmdclass={"build_py": FreshBuild})
