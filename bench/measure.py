"""Time and memory of steps: interleaved rounds, medians and quantiles."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

Step = Callable[[], object]
Quantiles = dict[str, float]


def quantiles(values: Sequence[float]) -> Quantiles:
    """The 20th, 50th and 80th percentile."""
    ordered = sorted(values)

    def at(fraction: float) -> float:
        position = fraction * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return {"q20": at(0.2), "q50": statistics.median(ordered), "q80": at(0.8)}


class Samples:
    """Seconds of several steps, round by round: the steps of a round ran one after another."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.seconds: dict[str, list[float]] = {key: [] for key in keys}

    def __contains__(self, key: str) -> bool:
        return key in self.seconds

    def time(self, key: str, unit: float = 1e-3) -> Quantiles:
        """Quantiles of a step's time, in units of ``unit`` seconds."""
        return quantiles([s / unit for s in self.seconds[key]])

    def ratio(self, key: str, over: str, factor: float = 1.0) -> Quantiles:
        """Quantiles of the ratios of two steps' times, each formed within one round."""
        pairs = zip(self.seconds[key], self.seconds[over], strict=True)
        return quantiles([factor * a / b for a, b in pairs])


@contextlib.contextmanager
def without_gc() -> Iterator[None]:
    """Keeps the garbage collector out of the timings."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Sets torch's number of threads for a while; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    steps: dict[str, Step],
    rounds: int,
    *,
    budget: float = 60.0,
    warm_ups: int = 2,
    least: float = 1e-3,
    sync: Step | None = None,
) -> Samples:
    """Times steps in rounds, all steps in each round, so that drift affects all alike.

    A step finds in the caches what its predecessor left there, so each round has a random order of
    its own. The orders are the same in each run.

    Args:
        steps: the steps, by key.
        rounds: the largest number of rounds.
        budget: seconds after which no further round starts; at least three rounds run.
        warm_ups: untimed calls of each step before the first round.
        least: seconds; a shorter step is repeated within one timing for about that long.
        sync: waits until queued work is done, on a device that queues it.
    """
    sync = sync or (lambda: None)
    keys = list(steps)
    repeats = {}
    for key, step in steps.items():
        for _ in range(warm_ups):
            step()
        repeats[key] = max(1, round(least / max(seconds(step, 1, sync), 1e-7)))
    samples = Samples(keys)
    order = random.Random(0)
    end = time.perf_counter() + budget
    with without_gc():
        for index in range(rounds):
            if index >= 3 and time.perf_counter() > end:
                break
            for key in order.sample(keys, len(keys)):
                samples.seconds[key].append(seconds(steps[key], repeats[key], sync))
    return samples


def seconds(step: Step, repeats: int, sync: Step) -> float:
    """Mean seconds of a step that runs ``repeats`` times in a row."""
    sync()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    sync()
    return (time.perf_counter() - start) / repeats


def synchronise(device: str) -> Step | None:
    """The function that waits for a device; None for a CPU, which queues nothing."""
    return torch.cuda.synchronize if device == "cuda" else None


def bytes_an_element(dtype: torch.dtype, momentum: bool) -> int:
    """Bytes that a step must move: parameter, gradient (read only) and momentum."""
    return torch.empty(0, dtype=dtype).element_size() * (5 if momentum else 3)


class MemoryLimit:
    """An operation that is bound by memory bandwidth, with torch's threads.

    On a CPU it is ``addcmul_`` on flat tensors, which like a step reads three numbers and writes
    one for each element; on a GPU a copy.
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


def peak_memory(step: Step, device: str) -> int | None:
    """The largest temporary memory of a step in three runs, in bytes; None where it is unknown.

    Run the step once before, so that it has its state.
    """
    peaks = [_extra_memory(step, device) for _ in range(3)]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def _extra_memory(step: Step, device: str) -> int | None:
    """Bytes, by torch's allocator on a GPU; on a CPU by the peak of resident memory (Linux)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # Memory that malloc keeps for later use would hide the step's allocations.
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
