"""Times each kernel alone, by replay of a CUDA graph, and whole steps beside their alternatives.

Prints a line a figure, as it is known. ``--rehearse`` runs the same on a CPU with small tensors;
the figures mean nothing then.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parent))
from resnet50_sizes import resnet50_groups, resnet50_row_sets, resnet50_sizes

from resnet_reg_ext import ProxSGD
from resnet_reg_ext.functional import prox_sgd_

REHEARSAL = "--rehearse" in sys.argv
DEVICE = "cpu" if REHEARSAL else "cuda"
SHRINK = 1000 if REHEARSAL else 1
ROUNDS = 2 if REHEARSAL else 30
# Sets of tensors that take turns: none is still in the cache when its turn comes again.
SETS = 3
F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
# dtypes of parameter and momentum buffer (None: no momentum), and whether there is a master weight.
KINDS: dict[str, tuple[torch.dtype, torch.dtype | None, bool]] = {
    "float32": (F32, F32, False),
    "float32 without momentum": (F32, None, False),
    "float64": (F64, F64, False),
    "float16": (F16, F16, False),
    "bfloat16": (BF16, BF16, False),
    "float32, momentum bfloat16": (F32, BF16, False),
    "bfloat16 with master": (BF16, F32, True),
    "bfloat16 with master, momentum bfloat16": (BF16, BF16, True),
    "float16 with master": (F16, F32, True),
}


def sizes_of(sizes: list[int]) -> list[int]:
    """Sizes, smaller in a rehearsal."""
    return [max(1, n // SHRINK) for n in sizes]


def tensors(sizes: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Random tensors of these sizes."""
    return [torch.randn(n, device=DEVICE).to(dtype) for n in sizes_of(sizes)]


def seconds(run: Callable[[], Any]) -> float:
    """The median time of a run on the device."""
    times = []
    for _ in range(ROUNDS):
        if REHEARSAL:
            began = time.perf_counter()
            run()
            times.append(time.perf_counter() - began)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The run as a graph's replay: its launches without the host's time."""
    run()
    if REHEARSAL:
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return graph.replay


def show(name: str, each: float, moved: int, ceiling: float = 0.0) -> None:
    """Prints microseconds and gigabytes a second, and the share of a plain copy's."""
    rate = moved / each
    share = f"{rate / ceiling:7.1%} of a copy" if ceiling else ""
    print(f"{name:42s} {each * 1e6:9.1f} us {rate / 1e9:8.1f} GB/s {share}", flush=True)


def ceilings() -> float:
    """Times a copy and a triad that move as much as a float32 step; returns the copy's rate."""
    total = sum(sizes_of(resnet50_sizes()))
    sets = [[torch.randn(total * 5 // 2, device=DEVICE) for _ in range(2)] for _ in range(SETS)]
    each = seconds(captured(lambda: [a.copy_(b) for a, b in sets])) / SETS
    moved = 2 * sets[0][0].numel() * 4
    show("copy", each, moved)
    triads = [[torch.randn(total * 5 // 3, device=DEVICE) for _ in range(3)] for _ in range(SETS)]
    triad = seconds(captured(lambda: [torch.add(a, b, alpha=2, out=c) for a, b, c in triads]))
    show("triad", triad / SETS, 3 * triads[0][0].numel() * 4)
    return moved / each


def kernels(ceiling: float) -> None:
    """Each kernel on ResNet-50's tensors."""
    sizes = resnet50_sizes()
    total = sum(sizes_of(sizes))
    for name, (dtype, momentum, master) in KINDS.items():
        sets = []
        for _ in range(SETS):
            p, g = tensors(sizes, dtype), tensors(sizes, dtype)
            m = tensors(sizes, momentum) if momentum else None
            sets.append((p, g, m, [t.float() for t in p] if master else None))

        def step(sets: Any = sets, momentum: Any = momentum) -> None:
            for p, g, m, w in sets:
                options = {"lr": 1e-3, "momentum": 0.9 if momentum else 0.0, "l1": 1e-5}
                prox_sgd_(p, g, m, **options, master_weights=w, fused=True)

        size = dtype.itemsize
        moved = 2 * size + (4 * 2 if master else size)
        moved += 2 * momentum.itemsize if momentum else 0
        show(name, seconds(captured(step)) / SETS, moved * total, ceiling)


def optimizers() -> dict[str, Callable[[list[list[torch.nn.Parameter]]], Any]]:
    """What makes an optimizer of two groups of parameters."""
    options: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
    made: dict[str, Callable[[list[list[torch.nn.Parameter]]], Any]] = {}

    def groups(params: list[list[torch.nn.Parameter]]) -> list[dict[str, Any]]:
        return [{"params": params[0]}, {"params": params[1], "weight_decay": 0.0}]

    made["ProxSGD"] = lambda params: ProxSGD(groups(params), **options, l1=1e-5, fused=True)
    made["torch SGD, fused"] = lambda p: torch.optim.SGD(groups(p), **options, fused=True)
    made["torch SGD, foreach"] = lambda p: torch.optim.SGD(groups(p), **options, foreach=True)
    try:
        from apex.optimizers import FusedSGD

        made["apex FusedSGD"] = lambda p: FusedSGD(groups(p), **options)
    except ImportError:
        print("apex: not installed", flush=True)
    return made


def coupled_channels() -> ProxSGD:
    """An optimizer of ResNet-50's coupled channels, which are all parameters but the last layer."""
    params, rows = [], []
    for number, (count, widths) in enumerate(resnet50_row_sets()):
        for width in widths:
            shape = (max(1, count // SHRINK), width)
            params.append(torch.nn.Parameter(torch.randn(shape, device=DEVICE)))
            rows.append(number)
    for p in params:
        p.grad = torch.randn_like(p)
    return ProxSGD(
        [{"params": params, "rows": rows}], lr=1e-3, l1=1e-5, group_lasso=1e-6, fused=True
    )


def whole_steps() -> None:
    """Steps of ResNet-50 in two groups: on the device, and how long the host is busy."""
    steps: dict[str, Callable[[], Any]] = {}
    for name, make in optimizers().items():
        params = [[torch.nn.Parameter(t) for t in tensors(s, F32)] for s in resnet50_groups()]
        for p in params[0] + params[1]:
            p.grad = torch.randn_like(p)
        optimizer = make(params)
        optimizer.step()
        steps[name] = optimizer.step
        if name == "torch SGD, foreach" and not REHEARSAL:
            steps["torch SGD, compiled"] = torch.compile(optimizer.step)
    steps["ProxSGD, group lasso"] = coupled_channels().step
    for name, step in steps.items():
        try:
            step()
            on_device = seconds(step)
            host = []
            for _ in range(ROUNDS):
                if not REHEARSAL:
                    torch.cuda.synchronize()
                began = time.perf_counter()
                step()
                host.append(time.perf_counter() - began)
        except Exception as error:  # of someone else's compiler: the others are still timed
            print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        print(
            f"{name:42s} {on_device * 1e6:9.1f} us on the device "
            f"{statistics.median(host) * 1e6:9.1f} us of the host",
            flush=True,
        )


if __name__ == "__main__":
    if REHEARSAL:
        print("a rehearsal on a CPU with small tensors: the figures mean nothing", flush=True)
    kernels(ceilings())
    whole_steps()
