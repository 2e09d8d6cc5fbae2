"""The description of what ran: package, processor, memory, threads and versions."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import ROOT


def native_core() -> Any:
    """The compiled module of the installed package.

    Raises:
        ImportError: the package isn't installed, or was installed without its compiled module.
    """
    return importlib.import_module("resnet_reg_ext._C")


def machine(device: str) -> dict[str, Any]:
    """Processor, memory, threads and versions, as JSON takes them."""
    info = _lines("/proc/cpuinfo")
    memory = _lines("/proc/meminfo").get("MemTotal", "0 kB")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("resnet_reg_ext", "torchvision", "torchao", "pytorch_optimizer", "proxtorch"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "cpu_ids": ", ".join(
            f"{key} {info[key]}" for key in ("cpu family", "model", "stepping") if key in info
        ),
        "cores": _cores(),
        "memory_gib": round(int(memory.split()[0]) / 2**20, 1),
        "threads": torch.get_num_threads(),
        "torch_simd": torch.backends.cpu.get_cpu_capability(),
        "os": platform.platform(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The clone's commit, with "-dirty" if files have changed since; None without a repository."""
    if not (ROOT / ".git").exists():  # git would find a repository that an unpacked sdist lies in
        return None
    command = ["git", "describe", "--always", "--abbrev=9", "--exclude=*", "--dirty"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _cores() -> int:
    """Number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _lines(path: str) -> dict[str, str]:
    """The first value of each key of a /proc file."""
    found: dict[str, str] = {}
    try:
        text = Path(path).read_text()
    except OSError:
        return found
    for line in text.splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    return found
