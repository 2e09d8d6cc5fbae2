"""How things are measured: interleaved, in medians and quantiles, never by a single run."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import ROOT

Step = Callable[[], object]
Quantiles = dict[str, float]


def quantiles(values: Sequence[float]) -> Quantiles:
    """The 20th, 50th and 80th percentile."""
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return {"q20": at(0.2), "q50": statistics.median(ordered), "q80": at(0.8)}


class Samples:
    """Seconds of several steps, round by round: the steps of one round ran one after another."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.seconds: dict[str, list[float]] = {key: [] for key in keys}

    def __contains__(self, key: str) -> bool:
        return key in self.seconds

    def time(self, key: str, unit: float = 1e-3) -> Quantiles:
        """Quantiles of one step's time, in units of ``unit`` seconds."""
        return quantiles([s / unit for s in self.seconds[key]])

    def ratio(self, key: str, over: str, factor: float = 1.0) -> Quantiles:
        """Quantiles of the ratios of two steps' times, each formed within one round."""
        pairs = zip(self.seconds[key], self.seconds[over], strict=True)
        return quantiles([factor * a / b for a, b in pairs])


def interleave(
    steps: dict[str, Step],
    rounds: int,
    *,
    budget: float = 60.0,
    warm_ups: int = 2,
    least: float = 1e-3,
    sync: Step | None = None,
) -> Samples:
    """Times steps in rounds, each round all of them, so that drift hits all alike.

    Each round has an order of its own, so that none has always the same predecessor: what a step
    finds in the caches is what the one before has left there. The orders are the same in each run.

    Args:
        steps: what to time.
        rounds: how many rounds at the most.
        budget: seconds after which no further round is started, though at least three are run.
        warm_ups: untimed calls of each step before the first round.
        least: a step that takes less is repeated, in one timing, for about as long.
        sync: waits until all work is done, where steps only queue it.
    """
    sync = sync or (lambda: None)
    keys = list(steps)
    repeats = {}
    for key, step in steps.items():
        for _ in range(warm_ups):
            step()
        repeats[key] = max(1, round(least / max(_seconds(step, 1, sync), 1e-7)))
    samples = Samples(keys)
    order = random.Random(0)
    end = time.perf_counter() + budget
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            if index >= 3 and time.perf_counter() > end:
                break
            for key in order.sample(keys, len(keys)):
                samples.seconds[key].append(_seconds(steps[key], repeats[key], sync))
    finally:
        if enabled:
            gc.enable()
    return samples


def _seconds(step: Step, repeats: int, sync: Step) -> float:
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    sync()
    return (time.perf_counter() - start) / repeats


def synchronise(device: str) -> Step | None:
    """What waits for a device."""
    return torch.cuda.synchronize if device == "cuda" else None


def bytes_an_element(dtype: torch.dtype, momentum: bool) -> int:
    """Bytes that a step must move: parameter, gradient (read only) and momentum."""
    return torch.empty(0, dtype=dtype).element_size() * (5 if momentum else 3)


class Limit:
    """An operation that only moves memory, with torch's threads: the bandwidth to compare with.

    On a CPU ``addcmul_`` on flat tensors, which reads three numbers and writes one for each
    element, nearest to what a step does; on a GPU a copy.
    """

    def __init__(self, elements: int, device: str, dtype: torch.dtype) -> None:
        size = torch.empty(0, dtype=dtype).element_size()
        made = [torch.zeros(elements, device=device, dtype=dtype) for _ in range(3)]
        self.name = "copy_" if device == "cuda" else "addcmul_"
        self.bytes_an_element = size * (2 if device == "cuda" else 4)
        self._a, self._b, self._c = made
        for tensor in made:
            tensor.normal_()

    def __call__(self) -> None:
        if self.name == "copy_":
            self._a.copy_(self._b)
        else:
            self._a.addcmul_(self._b, self._c, value=1e-9)


def extra_memory(step: Step, device: str) -> int | None:
    """Bytes that one step needs for a while beyond what is there before and after.

    On a GPU torch's allocator is asked. On a CPU it is the process's peak of resident memory, which
    Linux can reset; None where it can't be. Run the step before, so that it has its state.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # What malloc keeps for later use would hide what the step takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0]) * 1024


def machine(device: str) -> dict[str, Any]:
    """What ran: processor, memory, threads and versions."""
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
    """The sources' commit, with "-dirty" if they have changed since; None for an installed copy."""
    if not (ROOT / ".git").exists():  # git would find the repository that the copy lies in
        return None
    command = ["git", "describe", "--always", "--abbrev=9", "--exclude=*", "--dirty"]
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _cores() -> int:
    """Processors that this process may use."""
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
