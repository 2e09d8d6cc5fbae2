"""Finds the compilers for resnet_reg_ext._C and asks what they can do."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import CompileError

ARCHITECTURES = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "11.0", "12.0")
OLDEST_ARCHITECTURE = 70  # __grid_constant__ needs it
CUDA_FLAGS = ["-std=c++17", "-O3", "--fmad=false", "-lineinfo"]
# One release of all: nvcc's packages do not pin each other, and ptxas refuses the PTX of a newer
# nvvm. The oldest driver for CUDA 13 runs 13.0.
PYPI_TOOLKIT = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
]
PYPI_TOOLKIT_DRIVER = 13000  # cuDriverGetVersion of driver 580, which CUDA 13's runtime needs


def setting(name: str) -> str:
    """An environment variable that must be 0, 1 or unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name}={value!r}: must be 0, 1 or unset")
    return value


def run(command: list[str]) -> str:
    """What a command prints, or CompileError with it."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def driver_version() -> int:
    """What cuDriverGetVersion says, 0 without a driver."""
    version = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value if status == 0 else 0


def find_nvcc() -> str | None:
    """Nvcc from the PATH, from a toolkit's usual folders, or from PyPI's packages."""
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        return nvcc
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) for home in homes if home]
    folders += [Path(folder or ".") / "nvidia" / "cu13" for folder in sys.path]
    found = (shutil.which("nvcc", path=str(folder / "bin")) for folder in folders)
    return next(filter(None, found), None)


def why_without_cuda() -> str:
    """Why this build leaves CUDA out, or an empty string where it doesn't."""
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


def requirements() -> list[str]:
    """Requirements beyond pyproject.toml's: PyPI's CUDA compiler if one is wanted and missing."""
    return [] if why_without_cuda() or find_nvcc() else PYPI_TOOLKIT


def find_cxx() -> str:
    """The C++ compiler, with arguments, or an exit with one clear sentence."""
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


def links(cxx: str, flags: list[str], code: str) -> bool:
    """Whether compiler and linker make a program of the code with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(f"{code}\n")
        command = [*shlex.split(cxx), *flags, str(source), "-o", str(Path(folder, "probe"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


class Cuda:
    """A CUDA compiler, its toolkit and the architectures to compile for."""

    def __init__(self, nvcc: str, cxx: str) -> None:
        self.nvcc = nvcc
        self.cxx = cxx
        known = {int(a) for a in re.findall(r"compute_(\d+)\b", run([nvcc, "--list-gpu-arch"]))}
        self.sass, self.ptx = self._architectures(known)
        # nvcc's own path may be a wrapper's; the dry run tells where the toolkit is.
        top = re.search(r"TOP=(.*)", run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]))
        if top is None:
            raise CompileError(f"{nvcc} does not say where its toolkit is (nvcc --dryrun)")
        self.root = Path(top.group(1)).resolve()
        release = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]))
        if release is None:
            raise CompileError(f"{nvcc} does not say which release it is (nvcc --version)")
        # How large a kernel's parameters may be: see cuda/params.h.
        large = (int(release[1]), int(release[2])) >= (12, 1)
        self.defines = [f"-DPROX_SGD_PARAMETER_BYTES={32764 if large else 4096}"]

    def _architectures(self, known: set[int]) -> tuple[list[int], list[int]]:
        """Architectures to compile machine code and PTX for."""
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
        if not listed:
            sass = [n for n in (int(a.replace(".", "")) for a in ARCHITECTURES) if n in known]
            return sass, sass[-1:]
        sass, ptx = [], []
        oldest = max(OLDEST_ARCHITECTURE, min(known))
        for entry in listed:
            # The suffixes of 9.0a and 10.0f stand for instructions that the kernels don't use.
            match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
            number = int(match[1] + match[2]) if match else 0
            if match and number < oldest:
                # The list may be meant for other programs too.
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

    @property
    def names(self) -> str:
        """Architectures in words, such as "9.0 12.0+PTX"."""
        return " ".join(f"{a / 10:.1f}" + ("+PTX" if a in self.ptx else "") for a in self.sass)

    def flags(self, has_kernels: bool) -> list[str]:
        """Flags to compile for every architecture, or for one where there are no kernels."""
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.sass]
        code += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in self.ptx]
        if not has_kernels:
            code = code[:1]
        # nvcc wants the compiler itself: "ccache g++" and "env VARIABLE=1 g++" are none.
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


def find_cuda(cxx: str) -> Cuda | None:
    """The CUDA compiler, None where CUDA is left out, or an exit if it is wanted and missing."""
    if why := why_without_cuda():
        print(f"resnet_reg_ext: building without CUDA: {why}", file=sys.stderr)
        return None
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit(
            "resnet_reg_ext: RESNET_REG_EXT_CUDA=1, but no nvcc was found: put one on the "
            "PATH, or build with isolation, which gets it from PyPI."
        )
    return Cuda(nvcc, cxx)


@dataclass
class Toolchain:
    """The compilers, and what the C++ compiler can do."""

    cxx: str
    cuda: Cuda | None
    sanitize: list[str]
    x86: bool
    avx2: list[str]  # flags; empty without
    openmp: list[str]  # flags; empty without

    @property
    def openmp_link(self) -> list[str]:
        """Flags of OpenMP for the linker: none with GCC, as torch's libgomp is loaded first.

        See backends/openmp.py. Clang's runtime is another library, which torch doesn't bring.
        """
        gcc = "#if defined(__clang__) || !defined(__GNUC__)\n#error\n#endif\nint main() {}"
        return [] if links(self.cxx, [], gcc) else self.openmp

    @classmethod
    def found(cls) -> Toolchain:
        """What there is on this machine."""
        cxx = find_cxx()
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise SystemExit(
                "resnet_reg_ext: Python.h was not found: install Python's development files "
                "(python3-dev), or set RESNET_REG_EXT_NATIVE=0."
            )
        cuda = find_cuda(cxx)
        # Code that uses them: some compilers only warn of flags for another processor.
        uses_avx2 = (
            "#include <immintrin.h>\n"
            "int main() { return _mm256_movemask_epi8(_mm256_setzero_si256()); }"
        )
        avx2 = ["-mavx2", "-mfma", "-mf16c"]
        uses_openmp = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }"
        openmp = ["-fopenmp"] if links(cxx, ["-fopenmp"], uses_openmp) else []
        if not openmp:
            print(f"resnet_reg_ext: {cxx} has no OpenMP: steps take one thread", file=sys.stderr)
        is_x86 = "#if !defined(__x86_64__) && !defined(__i386__)\n#error\n#endif\nint main() {}"
        return cls(
            cxx,
            cuda,
            shlex.split(os.environ.get("RESNET_REG_EXT_SANITIZE", "").replace(",", " ")),
            links(cxx, [], is_x86),
            avx2 if links(cxx, avx2, uses_avx2) else [],
            openmp,
        )
