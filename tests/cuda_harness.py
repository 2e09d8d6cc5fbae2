"""Runs the plan that the host code makes on the PTX of the kernels, in the interpreter."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ptx
import reference

CSRC = Path(__file__).resolve().parent.parent / "csrc"
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-lineinfo")  # test_ptx_kernels checks: the build's
UNITS_PER_BLOCK = 1024
STORAGE = {"float32": np.uint32, "float64": np.uint64, "float16": np.uint16, "bfloat16": np.uint16}
VECTOR = {"float32": 4, "float64": 2, "float16": 8, "bfloat16": 8}

DEFAULTS = {
    "lr": 0.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "l1": 0.0,
    "nesterov": False,
    "maximize": False,
    "l2_mode": "coupled",
}
OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "l1": 0.3, "weight_decay": 0.1},
    {"lr": 0.1, "l1": 0.3, "weight_decay": 0.1, "l2_mode": "proximal", "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "l1": 0.03, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9, "l1": 0.03, "weight_decay": 0.1, "nesterov": True},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "l1": 0.06, "maximize": True},
    {"lr": 0.1, "momentum": 0.7, "l1": 0.1, "weight_decay": 0.5, "l2_mode": "proximal"},
    {"lr": 0.1, "momentum": 0.7, "nesterov": True, "l2_mode": "proximal", "weight_decay": 0.5},
]


def option_id(options: dict[str, Any]) -> str:
    return "-".join(f"{k}={v}" for k, v in options.items() if k != "lr") or "plain"


# ---- values ------------------------------------------------------------------------------------


def to_bits(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values, rounded once, as the bytes of storage."""
    if dtype == "float64":
        return values.astype(np.float64).view(np.uint64)
    narrow = values.astype(np.float32)
    if dtype == "float32":
        return narrow.view(np.uint32)
    if dtype == "float16":
        with np.errstate(all="ignore"):
            return narrow.astype(np.float16).view(np.uint16)
    return (reference.rounded(narrow, "bfloat16").view(np.uint32) >> 16).astype(np.uint16)


def to_values(bits: np.ndarray, dtype: str) -> np.ndarray:
    """What storage holds, in the compute type."""
    if dtype == "float64":
        return bits.view(np.float64)
    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def draw(size: int, dtype: str, rng: np.random.Generator, threshold: float) -> np.ndarray:
    """Random values of all magnitudes, with NaN, infinities, zeros, subnormals and ties."""
    values = rng.standard_normal(size) * rng.choice([1e-3, 0.1, 1.0, 30.0], size)
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, threshold, -threshold, 6e4, 1e38]
    places = rng.random(size) < 0.15
    values[places] = rng.choice(special, size)[places]
    return to_bits(values, dtype)


@dataclass
class Tensor:
    """A parameter with gradient and momentum, as storage; skews are in elements."""

    p: np.ndarray
    g: np.ndarray
    m: np.ndarray
    skews: tuple[int, int, int] = (0, 0, 0)


def make_tensors(
    sizes: Sequence[int],
    dtype: str,
    seed: int = 0,
    skews: Sequence[tuple[int, int, int]] | None = None,
    threshold: float = 0.03,
) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    cycle = itertools.cycle(skews or [(0, 0, 0)])
    return [
        Tensor(*(draw(n, dtype, rng, threshold) for _ in range(3)), skews=next(cycle))
        for n in sizes
    ]


def signed_zeros(dtype: str) -> Tensor:
    """Every combination of +0, -0 and a number among parameter, gradient and momentum."""
    values = np.array(list(itertools.product((0.0, -0.0, 0.25), repeat=3)))
    return Tensor(*(to_bits(values[:, i].copy(), dtype) for i in range(3)))


# ---- plans and programs ------------------------------------------------------------------------

Plan = Callable[..., list[dict[str, Any]]]


def plan_arguments(options: dict[str, Any], first: bool) -> tuple[Any, ...]:
    o = {**DEFAULTS, **options}
    return (
        o["lr"],
        o["momentum"],
        o["dampening"],
        o["weight_decay"],
        o["l1"],
        o["nesterov"],
        o["maximize"],
        o["l2_mode"] == "proximal",
        first,
    )


SHIM = r"""
#include "cuda/plan.h"
#include <cstring>
#include <exception>
using namespace prox_sgd;
static std::vector<cuda::Launch> launches;
extern "C" long plan(int dtype, long count, Triple* triples, double lr, double momentum,
                     double dampening, double weight_decay, double l1, bool nesterov, bool maximize,
                     bool proximal, bool first, long capacity) {
  Options o{lr, momentum, dampening, weight_decay, l1, nesterov, maximize, proximal, first};
  try {
    launches = cuda::plan({triples, triples + count}, static_cast<DType>(dtype), o, capacity);
  } catch (const std::exception&) {
    return -1;
  }
  return static_cast<long>(launches.size());
}
extern "C" const char* kernel(long i) { return launches[i].kernel; }
extern "C" long grid(long i) { return launches[i].grid; }
extern "C" long block(long i) { return launches[i].block; }
extern "C" long bytes(long i) { return static_cast<long>(launches[i].parameters.size()); }
extern "C" void copy(long i, void* to) {
  std::memcpy(to, launches[i].parameters.data(), launches[i].parameters.size());
}
"""


def compile_plan(csrc: Path, out: Path, defines: Sequence[str] = ()) -> Plan:
    """The host's plan, compiled from sources other than the installed ones."""
    shim = out / "shim.cpp"
    shim.write_text(SHIM)
    library = out / "plan.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{csrc}", *defines]
    subprocess.run([*command, shim, csrc / "cuda" / "plan.cpp", "-o", library], check=True)
    code = ctypes.CDLL(str(library))
    code.kernel.restype = ctypes.c_char_p
    code.plan.argtypes = [
        ctypes.c_int,
        ctypes.c_long,
        ctypes.c_void_p,
        *[ctypes.c_double] * 5,
        *[ctypes.c_bool] * 4,
        ctypes.c_long,
    ]

    def plan(dtype: str, triples: Sequence[Sequence[int]], *arguments: Any, capacity: int = 0):
        table = np.array(triples, np.uint64).reshape(-1, 4)
        number = ("float32", "float64", "float16", "bfloat16").index(dtype)
        count = code.plan(number, len(table), table.ctypes.data, *arguments, capacity)
        launches = []
        for i in range(count):
            parameters = ctypes.create_string_buffer(code.bytes(i))
            code.copy(i, parameters)
            launches.append(
                {
                    "kernel": code.kernel(i).decode(),
                    "grid": code.grid(i),
                    "block": code.block(i),
                    "parameters": parameters.raw,
                }
            )
        return launches

    return plan


_modules: dict[tuple[Any, ...], ptx.Module] = {}


def module_for(arch: str, csrc: Path = CSRC, flags: Sequence[str] = FLAGS) -> ptx.Module:
    key = (arch, csrc, tuple(flags))
    if key not in _modules:
        _modules[key] = ptx.parse(ptx.compile_ptx(csrc / "cuda" / "kernel.cu", arch, flags))
    return _modules[key]


# ---- runs --------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What the kernels left in memory, and what the interpreter saw."""

    params: list[np.ndarray]
    momenta: list[np.ndarray]
    results: list[ptx.Result] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)

    @property
    def findings(self) -> list[ptx.Finding]:
        return [finding for result in self.results for finding in result.findings]


def execute(
    module: ptx.Module,
    plan: Plan,
    dtype: str,
    tensors: Sequence[Tensor],
    options: dict[str, Any],
    *,
    first: bool = False,
    capacity: int = 0,
    races: bool = True,
    budget: int = 200_000,
) -> Outcome:
    """Lays the tensors out in an arena and runs every launch of their plan."""
    arena = ptx.Arena()
    width = STORAGE[dtype]().itemsize
    with_momentum = options.get("momentum", 0.0) != 0
    places = []
    for i, t in enumerate(tensors):
        sp, sg, sm = (s * width for s in t.skews)
        p = arena.allocate(t.p.nbytes, skew=sp, name=f"param {i}", data=t.p.view(np.uint8))
        g = arena.allocate(
            t.g.nbytes, skew=sg, name=f"grad {i}", data=t.g.view(np.uint8), writable=False
        )
        m = None
        if with_momentum:
            data = None if first else t.m.view(np.uint8)
            m = arena.allocate(t.m.nbytes, skew=sm, name=f"momentum {i}", data=data)
        places.append((p, g, m))
    triples = [
        (p.address, g.address, m.address if m else 0, len(t.p))
        for (p, g, m), t in zip(places, tensors, strict=True)
    ]
    launches = plan(dtype, triples, *plan_arguments(options, first), capacity=capacity)
    outcome = Outcome([], [])
    for launch in launches:
        outcome.results.append(
            ptx.launch(
                module,
                launch["kernel"],
                grid=launch["grid"],
                block=launch["block"],
                params=launch["parameters"],
                memory=arena,
                races=races,
                budget=budget,
            )
        )
    outcome.guards = arena.check_guards()
    storage = STORAGE[dtype]
    for (p, _, m), t in zip(places, tensors, strict=True):
        outcome.params.append(arena.read(p.address, t.p.nbytes).view(storage))
        if m is not None:
            outcome.momenta.append(arena.read(m.address, t.m.nbytes).view(storage))
    return outcome


def expected(
    dtype: str, tensors: Sequence[Tensor], options: dict[str, Any], first: bool
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the NumPy reference says."""
    with_momentum = options.get("momentum", 0.0) != 0
    params, momenta = [], []
    for t in tensors:
        m = to_values(t.m, dtype) if with_momentum and not first else None
        p, m = reference.step(to_values(t.p, dtype), to_values(t.g, dtype), m, dtype, **options)
        params.append(to_bits(p, dtype))
        if with_momentum:
            momenta.append(to_bits(m, dtype))
    return params, momenta


def differences(actual: Sequence[np.ndarray], wanted: Sequence[np.ndarray], dtype: str) -> int:
    """Elements whose bytes differ; a NaN equals every NaN."""
    count = 0
    for a, b in zip(actual, wanted, strict=True):
        nan = np.isnan(to_values(a, dtype)) & np.isnan(to_values(b, dtype))
        count += int(np.count_nonzero((a != b) & ~nan))
    return count


def boundary_sizes(dtype: str) -> list[int]:
    """Sizes on both sides of every boundary that plan and kernel know."""
    v = VECTOR[dtype]
    chunk = UNITS_PER_BLOCK * v
    step = 256 * v
    return [0, 1, v - 1, v, v + 1, 2 * v + 1, step - 1, step + v, 2 * step + 1, chunk - 1, chunk]
