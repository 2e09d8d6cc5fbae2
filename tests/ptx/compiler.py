"""Finds NVIDIA's compiler and runs it; results are kept while no file that went in changes."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


class CompilerError(Exception):
    """A tool is missing, or has failed with the text that it gave."""


@functools.cache
def find_tool(name: str) -> Path:
    """A program of the CUDA toolkit.

    Looked for on PATH, then beside nvcc, then in PyPI's packages `nvidia-cuda-*`.

    Raises:
        CompilerError: it is nowhere.
    """
    on_path = shutil.which(name)
    if on_path:
        return Path(on_path)
    spec = importlib.util.find_spec("nvidia")
    packages = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    candidates = [bin for p in packages for bin in sorted(p.glob("cu*/bin"), reverse=True)]
    if name != "nvcc":
        candidates.insert(0, _toolkit_programs())
    for folder in candidates:
        if (folder / name).exists():
            return folder / name
    raise CompilerError(f"no {name}: put it on PATH, or install nvidia-cuda-nvcc and its like")


def find_nvcc() -> Path:
    """The compiler; see `find_tool`."""
    return find_tool("nvcc")


def _toolkit_programs() -> Path:
    """The folder in which nvcc itself looks for programs; what is on PATH may be a wrapper."""
    plan = _run([find_nvcc(), "--dryrun", "-x", "cu", "-ptx", os.devnull])
    return Path(plan.split("_HERE_=", 1)[1].splitlines()[0])


def _run(command: Sequence[str | Path]) -> str:
    """What a command prints on both streams."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise CompilerError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


@functools.cache
def version(nvcc: Path) -> str:
    """What `nvcc --version` prints."""
    return _run([nvcc, "--version"])


@functools.cache
def architectures() -> tuple[str, ...]:
    """The virtual architectures that nvcc knows, oldest first: `compute_75` and so on."""
    names = _run([find_nvcc(), "--list-gpu-arch"]).split()
    return tuple(sorted(names, key=lambda name: int(name.removeprefix("compute_"))))


def newest_arch() -> str:
    """The newest virtual architecture that nvcc knows."""
    return architectures()[-1]


def compile_ptx(
    source: Path, arch: str, flags: Sequence[str] = (), include_dirs: Sequence[Path] = ()
) -> str:
    """The PTX of a CUDA file for an architecture such as `compute_90`.

    Raises:
        CompilerError: there is no nvcc, or it fails.
    """
    output, _ = _compile(source, ["-ptx", f"-arch={arch}", *flags], include_dirs)
    return output.read_text()


def compile_cubin(
    source: Path, arch: str, flags: Sequence[str] = (), include_dirs: Sequence[Path] = ()
) -> tuple[Path, str]:
    """Machine code for an architecture such as `sm_90`, and what `ptxas -v` says of it.

    Raises:
        CompilerError: there is no nvcc, or it fails.
    """
    return _compile(source, ["-cubin", f"-arch={arch}", "-Xptxas=-v", *flags], include_dirs)


def _compile(
    source: Path, options: Sequence[str], include_dirs: Sequence[Path]
) -> tuple[Path, str]:
    """Runs nvcc unless the same run is known; returns its output file and what it printed."""
    source = source.resolve()
    nvcc = find_nvcc()
    options = [*options, *(f"-I{folder}" for folder in include_dirs)]
    key = hashlib.sha256(json.dumps([str(source), options, version(nvcc)]).encode()).hexdigest()
    folder = _cache() / key[:32]
    record = folder / "record.json"
    if record.exists():
        known = json.loads(record.read_text())
        if all(_digest(Path(path)) == digest for path, digest in known["inputs"].items()):
            return folder / known["output"], known["printed"]
    with tempfile.TemporaryDirectory(dir=_cache()) as scratch:
        output, dependencies = Path(scratch) / "output", Path(scratch) / "dependencies"
        printed = _run([nvcc, source, *options, "-o", output, "-MMD", "-MF", dependencies])
        inputs = {str(p): _digest(p) for p in [source, *_dependencies(dependencies.read_text())]}
        name = f"{_digest(output)[:32]}.out"  # of its own, for those who run at the same time
        folder.mkdir(exist_ok=True)
        os.replace(output, folder / name)
        entry = Path(scratch) / "record"
        entry.write_text(json.dumps({"inputs": inputs, "output": name, "printed": printed}))
        os.replace(entry, record)
    return folder / name, printed


@functools.cache
def _cache() -> Path:
    folder = Path(tempfile.gettempdir()) / f"resnet-reg-ext-ptx-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "absent"


def _dependencies(rule: str) -> list[Path]:
    """The files to the right of the colon in a makefile's rule."""
    names = rule.replace("\\\n", " ").split(": ", 1)[1]
    return [Path(name.replace("\0", " ")) for name in names.replace("\\ ", "\0").split()]
