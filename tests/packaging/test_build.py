"""Building from source: what a stranger's `pip install .` meets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import caching_compiler
import make_dist
import pytest
from ptx import compiler

pytestmark = pytest.mark.one_torch

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_CUDA = {"RESNET_REG_EXT_CUDA": "0"}

# Runs on a Python that has no torch: the module loads, plans a launch and takes a step.
SMOKE = """
import ctypes, glob, importlib.util, sys

ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)  # torch's, where there is a torch

(path,) = glob.glob(sys.argv[1] + "/resnet_reg_ext/_C*.so")
spec = importlib.util.spec_from_file_location("_C", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "torch" not in sys.modules
assert module.build_info()["version"] and "none" in module.simd_levels()
def options(**chosen):
    rest = dict(dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False, proximal=False,
                frozen_zeros=False, grad_scale=1.0, grad_coefficient=1.0, first_step=False)
    return module.Options(**chosen, **rest)
(launch,) = module.plan_prox_sgd_cuda(
    "float32",
    [([(4096, 8192, 12288, 0, 0, 0, 5000)], options(lr=0.1, momentum=0.9, l1=1e-3),
      module.DeviceValues())],
)
assert launch["grid"] == 2 and launch["block"] == 256, launch
class Reads:  # what the reader needs of a tensor, without torch
    pass
store = {name: (ctypes.c_float * 3)(*values) for name, values in
         {"p": (1.0, -1.0, 0.05), "g": (1.0, 1.0, 0.0)}.items()}
tensors = {name: Reads() for name in store}
names = {id(t): n for n, t in tensors.items()}
def describe(t):
    return (ctypes.addressof(store[names[id(t)]]), 1, 0, 2, 32, (3,), (1,))
reader = module.TensorReader(None, describe, lambda device: 0, Reads, Reads)
reading = reader.read([tensors["p"]], [tensors["g"]], None, None, 0)
assert reading.misfits == [], reading.misfits
module.prox_sgd_(reader, [(reading, options(lr=0.25, momentum=0.0, l1=1.0), {})], 2)
assert list(store["p"]) == [0.5, -1.0, 0.0], list(store["p"])
print("smoke test passed")
"""


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def clean_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources alone, as a clone has them, in a folder whose name isn't the easiest."""
    folder = tmp_path_factory.mktemp("a clone: of it")
    for name in ("csrc", "resnet_reg_ext"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def fast_compiler(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For tests of what is built and not of how fast it is."""
    return str(caching_compiler.wrapper(tmp_path_factory.mktemp("compiler") / "c++"))


def build_wheel(python: str, source: Path, out: Path, **environment: str) -> Path:
    result = run(
        [python, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(out), str(source)],
        **{**WITHOUT_CUDA, **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def python_of_version(version: str) -> str:
    python = make_dist.pythons().get((3, int(version.removeprefix("3."))))
    if python is None:
        pytest.skip(f"there is no Python {version} on this machine")
    return python


def smoke_test(python: str, wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    result = run([python, "-c", SMOKE, str(folder)])
    assert result.returncode == 0, result.stderr
    assert "smoke test passed" in result.stdout


def test_a_source_distribution_builds_into_a_wheel_of_another_python(
    clean_copy: Path, fast_compiler: str, tmp_path: Path
) -> None:
    """Without litter."""
    python = python_of_version("3.13")
    script = (
        "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=clean_copy,
        capture_output=True,
        text=True,
        env={**os.environ, **WITHOUT_CUDA},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert (source / "csrc" / "cuda" / "elements.cu").is_file()

    wheel = build_wheel(python, source, tmp_path / "wheel", CXX=fast_compiler)
    names = zipfile.ZipFile(wheel).namelist()
    stray = [
        n
        for n in names
        if ".dist-info/" not in n
        and not n.startswith("resnet_reg_ext/_C.")
        and not (
            n.startswith("resnet_reg_ext/") and n.endswith((".py", "py.typed", "report.html.jinja"))
        )
    ]
    assert stray == []
    assert "resnet_reg_ext/recipe/report.html.jinja" in names
    assert sum(n.startswith("resnet_reg_ext/_C.") for n in names) == 1
    smoke_test(python, wheel, tmp_path / "unpacked")


def configure(clean_copy: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=clean_copy,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_without_a_compiler_the_install_names_the_way_out(clean_copy: Path, tmp_path: Path) -> None:
    result = configure(clean_copy, PATH=str(tmp_path), CXX="", **WITHOUT_CUDA)
    assert result.returncode != 0
    assert "no C++ compiler was found" in result.stderr
    assert "RESNET_REG_EXT_NATIVE=0" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_compiler_of_ones_own_in_a_folder_that_a_shell_would_expand(
    clean_copy: Path, tmp_path: Path
) -> None:
    """What an older version left in the build folder stays out; ninja rebuilds what changed."""
    folder = tmp_path / "for 5 $HOME"
    shutil.copytree(clean_copy, folder, ignore=shutil.ignore_patterns("build", "*.so"))
    caching_compiler.wrapper(folder / "compiler")
    name = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    gone = folder / "build" / name / "resnet_reg_ext" / "gone.py"
    gone.parent.mkdir(parents=True)
    gone.write_text("")

    def build() -> str:
        result = subprocess.run(
            [sys.executable, "setup.py", "build"],
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, **WITHOUT_CUDA, "CXX": "./compiler"},
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    build()
    built = [path.name for path in gone.parent.iterdir()]
    assert sum(name.startswith("_C.") for name in built) == 1
    assert "prox_sgd.py" in built
    assert "gone.py" not in built
    assert "no work to do" in build()
    header = folder / "csrc" / "cpu" / "plan.h"
    header.write_text(header.read_text() + "\n// changed\n")
    output = build()
    assert "cpu/launch.cpp" in output
    assert "bindings.cpp" not in output


def test_flags_that_would_change_the_rounding_are_refused() -> None:
    header = ROOT / "csrc" / "math" / "update.h"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-x", "c++", str(header)]
    assert run(command).returncode == 0
    result = run([*command, "-ffast-math"])
    assert result.returncode != 0
    assert "the update pins each rounding" in result.stderr


def test_pure_pytorch_can_be_asked_for(clean_copy: Path, tmp_path: Path) -> None:
    wheel = build_wheel(
        sys.executable, clean_copy, tmp_path, RESNET_REG_EXT_NATIVE="0", PATH=os.environ["PATH"]
    )
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "pure")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'pure')!r})\n"
        "import torch, resnet_reg_ext as r\n"
        "assert r.backends.native._C is None and r.__file__.startswith(sys.path[0])\n"
        "w = torch.nn.Parameter(torch.tensor([1.0, 0.05])); w.grad = torch.zeros(2)\n"
        "r.ProxSGD([w], lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.5).step()\n"
        "assert w.tolist() == [0.5, 0.0], w\n"
        "try:\n    r.ProxSGD([w], fused=True)\n"
        "except RuntimeError as error:\n    assert 'native module' in str(error)\n"
        "else:\n    raise AssertionError('fused=True was accepted')\n"
    )
    result = run([sys.executable, "-P", "-c", script])
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RESNET_REG_EXT_CUDA", "yes", "must be 0, 1 or unset"),
        ("RESNET_REG_EXT_NATIVE", "off", "must be 0, 1 or unset"),
    ],
)
def test_a_wrong_setting_is_named(
    clean_copy: Path, variable: str, value: str, message: str
) -> None:
    result = configure(clean_copy, **{variable: value})
    assert result.returncode != 0
    assert f"{variable}={value!r}: {message}" in result.stderr


def test_an_unknown_architecture_is_named_with_those_that_are_known(clean_copy: Path) -> None:
    result = configure(clean_copy, RESNET_REG_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0 99.9")
    assert result.returncode != 0
    assert "'99.9' is not an architecture" in result.stderr
    assert "9.0" in result.stderr.split("knows")[-1]


def test_a_list_of_architectures_that_are_all_too_old_is_an_error(clean_copy: Path) -> None:
    result = configure(clean_copy, RESNET_REG_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST="3.5 6.1")
    assert result.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST=3.5 6.1: all are older than" in result.stderr


def test_a_compiler_that_is_not_there_is_named(clean_copy: Path) -> None:
    result = configure(clean_copy, CXX="/no/such/g++ -m64", **WITHOUT_CUDA)
    assert result.returncode != 0
    assert "CXX=/no/such/g++ -m64: there is no such program" in result.stderr
    assert "Traceback" not in result.stderr


def nvcc_of_release(folder: Path, release: str) -> Path:
    """A toolkit's folder with the nvcc of the tests, which says that it is another release."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && '
        f"echo 'Cuda compilation tools, release {release}, V{release}.1' && exit\n"
        f'exec {compiler.find_nvcc()} "$@"\n'
    )
    nvcc.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("release", "asked", "built", "parameter_bytes"),
    [("12.0", "8.0", "8.0", 4096), ("13.0", "5.2 8.0;9.0a+PTX", "8.0 9.0+PTX", 32764)],
)
def test_chosen_architectures_are_built(
    clean_copy: Path,
    fast_compiler: str,
    tmp_path: Path,
    release: str,
    asked: str,
    built: str,
    parameter_bytes: int,
) -> None:
    """With a toolkit that is not on the PATH, and a compiler that is called by way of a program."""
    without_nvcc = [
        folder
        for folder in os.environ["PATH"].split(os.pathsep)
        if not Path(folder, "nvcc").exists()
    ]
    result = configure(
        clean_copy,
        RESNET_REG_EXT_CUDA="1",
        TORCH_CUDA_ARCH_LIST=asked,
        CXX=f"env {fast_compiler} -DNOTHING=1",
        CUDA_HOME=str(nvcc_of_release(tmp_path / "toolkit", release)),
        PATH=os.pathsep.join(without_nvcc),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("5.2 is left out, too old" in result.stdout) == ("5.2" in asked)
    # Wheels for other Pythons may have been built in the same copy.
    tag = sys.implementation.cache_tag
    (module,) = clean_copy.glob(f"build/lib*{tag}/resnet_reg_ext/_C*.so")
    script = (
        "import ctypes, importlib.util, sys\n"
        "ctypes.CDLL('libgomp.so.1', mode=ctypes.RTLD_GLOBAL)\n"
        "spec = importlib.util.spec_from_file_location('_C', sys.argv[1])\n"
        "m = importlib.util.module_from_spec(spec); spec.loader.exec_module(m)\n"
        "print(m.build_info()['cuda_architectures'])\n"
        "names = [name for name in dir(m.Options) if not name.startswith('_')]\n"
        "options = m.Options(**{name: 0 for name in names})\n"
        "bucket = [(16, 32, 48, 0, 0, 0, 1)] * 700, options, m.DeviceValues()\n"
        "plan = m.plan_prox_sgd_cuda('float32', [bucket])\n"
        "print(max(len(launch['parameters']) for launch in plan))\n"
    )
    architectures, table = run([sys.executable, "-c", script, str(module)]).stdout.splitlines()
    assert architectures == built
    assert parameter_bytes - 64 < int(table) <= parameter_bytes
    # What the kernels take is in their machine code's description.
    code = run([str(compiler.find_tool("cuobjdump")), "-elf", "-arch=sm_80", str(module)]).stdout
    sizes = re.findall(r"EIATTR_CBANK_PARAM_SIZE\s+Format:\s+\w+\s+Value:\s+(0x[0-9a-f]+)", code)
    assert int(table) in {int(size, 16) for size in sizes}
    assert max(int(size, 16) for size in sizes) <= parameter_bytes
