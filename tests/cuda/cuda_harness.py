"""Runs the plan that the host code makes on the PTX of the kernels, in the interpreter."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ptx
import reference

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = ("-std=c++17", "-O3", "--fmad=false", "-lineinfo")  # test_ptx_kernels checks: the build's
UNITS_PER_BLOCK = 1024


class Storage(NamedTuple):
    """The dtypes of a parameter's tensors, and the elements in one unit of its kernel."""

    param: str
    momentum: str
    master: bool
    unit: int

    @property
    def weight(self) -> str:
        return "float32" if self.master else self.param


STORAGES = {
    "float32": Storage("float32", "float32", False, 4),
    "float64": Storage("float64", "float64", False, 2),
    "float16": Storage("float16", "float16", False, 8),
    "bfloat16": Storage("bfloat16", "bfloat16", False, 8),
    "float32_momentum_bfloat16": Storage("float32", "bfloat16", False, 4),
    "bfloat16_master": Storage("bfloat16", "float32", True, 4),
    "bfloat16_master_momentum_bfloat16": Storage("bfloat16", "bfloat16", True, 4),
    "float16_master": Storage("float16", "float32", True, 4),
}
BITS = {"float32": np.uint32, "float64": np.uint64, "float16": np.uint16, "bfloat16": np.uint16}
VECTOR = {name: storage.unit for name, storage in STORAGES.items()}

DEFAULTS = {
    "lr": 0.0,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "l1": 0.0,
    "nesterov": False,
    "maximize": False,
    "proximal": False,
    "frozen_zeros": False,
    "grad_scale": 1.0,
    "grad_coefficient": 1.0,
}
OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "l1": 0.3, "weight_decay": 0.1},
    {"lr": 0.1, "l1": 0.3, "weight_decay": 0.1, "proximal": True, "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "l1": 0.03, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9, "l1": 0.03, "weight_decay": 0.1, "nesterov": True},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "l1": 0.06, "maximize": True},
    {"lr": 0.1, "momentum": 0.7, "l1": 0.1, "weight_decay": 0.5, "proximal": True},
    {"lr": 0.1, "momentum": 0.7, "nesterov": True, "proximal": True, "weight_decay": 0.5},
    {"lr": 0.1, "momentum": 0.9, "l1": 0.03, "frozen_zeros": True, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9, "l1": 0.03, "grad_scale": 48.0, "grad_coefficient": 0.3},
]
# The values that the kernel may read in device memory when it runs.
ON_DEVICE = ("lr", "l1", "grad_scale", "grad_coefficient", "found_inf")


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
    """A parameter with gradient, momentum, master and start, as storage; skews are in elements.

    The master's skew is the fourth, or the parameter's; the start's is the fifth, or 0.
    """

    p: np.ndarray
    g: np.ndarray
    m: np.ndarray
    skews: tuple[int, ...] = (0, 0, 0)
    w: np.ndarray | None = None
    start: np.ndarray | None = None


def make_tensors(
    sizes: Sequence[int],
    dtype: str,
    seed: int = 0,
    skews: Sequence[tuple[int, ...]] | None = None,
    threshold: float = 0.03,
) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    cycle = itertools.cycle(skews or [(0, 0, 0)])
    storage = STORAGES[dtype]
    tensors = []
    for n in sizes:
        stored = [
            draw(n, d, rng, threshold) for d in (storage.param, storage.param, storage.momentum)
        ]
        master = draw(n, "float32", rng, threshold) if storage.master else None
        tensors.append(Tensor(*stored, skews=next(cycle), w=master))
    return tensors


def with_starts(tensors: Sequence[Tensor], dtype: str, seed: int = 0) -> list[Tensor]:
    """The tensors with starts: where the weight is, near it, far from it, and special values."""
    rng = np.random.default_rng(seed)
    weight = STORAGES[dtype].weight
    made = []
    for t in tensors:
        here = t.p if t.w is None else t.w
        with np.errstate(all="ignore"):
            near = to_values(here, weight) * rng.choice([0.98, 1.0, 1.01], len(here))
        choices = [here, to_bits(near, weight), draw(len(here), weight, rng, 0.03)]
        start = np.choose(rng.integers(0, 3, len(here)), choices).astype(here.dtype)
        made.append(dataclasses.replace(t, start=start))
    return made


def signed_zeros(dtype: str) -> Tensor:
    """Every combination of +0, -0 and a number among parameter, gradient and momentum."""
    values = np.array(list(itertools.product((0.0, -0.0, 0.25), repeat=3)))
    storage = STORAGES[dtype]
    stored = (storage.param, storage.param, storage.momentum)
    columns = [to_bits(values[:, i].copy(), d) for i, d in enumerate(stored)]
    return Tensor(*columns, w=to_bits(values[:, 0].copy(), "float32") if storage.master else None)


# ---- plans and programs ------------------------------------------------------------------------

# A bucket: rows, Options and DeviceValues by name, missing values being the defaults.
Bucket = tuple[Sequence[Sequence[int]], dict[str, Any], dict[str, int]]
# plan(storage, buckets, capacity): the launches.
Plan = Callable[..., list[dict[str, Any]]]
NUMBER_DTYPES = ("float32", "float64", "float16", "bfloat16")  # as DType numbers them


def named_options(options: dict[str, Any], first: bool) -> dict[str, Any]:
    """All fields of the core's Options."""
    return {**DEFAULTS, **options, "first_step": first}


def installed_plan(
    storage: str, buckets: Sequence[Bucket], capacity: int = 0
) -> list[dict[str, Any]]:
    """The plan of the installed module."""
    from resnet_reg_ext import _C

    given = [(rows, _C.Options(**o), _C.DeviceValues(**values)) for rows, o, values in buckets]
    launches: list[dict[str, Any]] = _C.plan_prox_sgd_cuda(storage, given, capacity)
    return launches


# What the shims of both plans have: fields by name, and the launches.
SHIM_COMMON = r"""
#include "rows.h"
#include <cstring>
using namespace prox_sgd;
static std::vector<cuda::Launch> launches;
template <typename Struct, typename Value>
static bool set(Struct& to, const char* name, Value value) {
  bool found = false;
  Struct::for_each_field([&](const char* known, auto field) {
    if (std::strcmp(name, known)) return;
    to.*field = (std::decay_t<decltype(to.*field)>)value;
    found = true;
  });
  return found;
}
extern "C" const char* kernel(long i) { return launches[i].kernel.c_str(); }
extern "C" long grid(long i) { return launches[i].grid; }
extern "C" long block(long i) { return launches[i].block; }
extern "C" long bytes(long i) { return static_cast<long>(launches[i].parameters.size()); }
extern "C" void copy(long i, void* to) {
  std::memcpy(to, launches[i].parameters.data(), launches[i].parameters.size());
}
"""

SHIM = r"""
#include <exception>
#include <list>
static Options options;
static cuda::DeviceValues device_values;
struct Given {
  std::vector<Operands> operands;
  Options options;
  cuda::DeviceValues values;
};
static std::list<Given> given;
extern "C" bool set_option(const char* name, double value) { return set(options, name, value); }
extern "C" bool set_device_value(const char* name, uint64_t address) {
  return set(device_values, name, address);
}
extern "C" void add_bucket(long count, uint64_t* rows) {
  given.push_back({{}, options, device_values});
  for (long i = 0; i < count; ++i, rows += 7) {
    given.back().operands.push_back({(void*)rows[0], (const void*)rows[1], (void*)rows[2],
                                     (void*)rows[3], (const void*)rows[4], (int64_t)rows[6],
                                     (int64_t*)rows[5]});
  }
  device_values = {};
}
extern "C" long plan(int storage, long capacity) {
  std::vector<cuda::Bucket> buckets;
  for (const Given& g : given) buckets.push_back({g.operands, g.options, g.values});
  try {
    launches = cuda::plan(buckets, static_cast<Storage>(storage), capacity);
  } catch (const std::exception&) {
    launches.clear();
  }
  given.clear();
  return static_cast<long>(launches.size());
}
"""


def compile_plan(csrc: Path, out: Path, defines: Sequence[str] = ()) -> Plan:
    """The host's plan, compiled from sources other than the installed ones."""
    shim = out / "shim.cpp"
    shim.write_text(SHIM_COMMON + SHIM)
    library = out / "plan.so"
    command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", f"-I{csrc}", *defines]
    subprocess.run([*command, shim, csrc / "cuda" / "plan.cpp", "-o", library], check=True)
    code = ctypes.CDLL(str(library))
    code.set_option.argtypes = [ctypes.c_char_p, ctypes.c_double]
    code.set_option.restype = ctypes.c_bool
    code.set_device_value.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    code.set_device_value.restype = ctypes.c_bool
    code.add_bucket.argtypes = [ctypes.c_long, ctypes.c_void_p]
    code.plan.argtypes = [ctypes.c_int, ctypes.c_long]

    def plan(storage: str, buckets: Sequence[Bucket], capacity: int = 0) -> list[dict[str, Any]]:
        for rows, options, values in buckets:
            for name, value in options.items():
                assert code.set_option(name.encode(), value), name
            for name, address in values.items():
                assert code.set_device_value(name.encode(), address), name
            table = np.array(rows, np.uint64).reshape(-1, 7)
            code.add_bucket(len(table), table.ctypes.data)
        return planned(code, code.plan(list(STORAGES).index(storage), capacity))

    return plan


def planned(code: ctypes.CDLL, count: int) -> list[dict[str, Any]]:
    """The launches that a shim has planned."""
    code.kernel.restype = ctypes.c_char_p
    launches = []
    for i in range(count):
        parameters = ctypes.create_string_buffer(code.bytes(i))
        code.copy(i, parameters)
        named = {"kernel": code.kernel(i).decode(), "grid": code.grid(i), "block": code.block(i)}
        launches.append({**named, "parameters": parameters.raw})
    return launches


_modules: dict[tuple[Any, ...], ptx.Module] = {}


def module_for(
    arch: str,
    csrc: Path = CSRC,
    flags: Sequence[str] = FLAGS,
    source: str = "elements.cu",
) -> ptx.Module:
    """The kernels compiled from a source tree."""
    key = (arch, csrc, tuple(flags), source)
    if key not in _modules:
        _modules[key] = ptx.parse(ptx.compile_ptx(csrc / "cuda" / source, arch, flags))
    return _modules[key]


# ---- runs --------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What the kernels left in memory, and what the interpreter saw."""

    params: list[np.ndarray]
    momenta: list[np.ndarray]
    masters: list[np.ndarray] = field(default_factory=list)
    zeros: list[int] = field(default_factory=list)
    results: list[ptx.Result] = field(default_factory=list)
    guards: list[str] = field(default_factory=list)

    @property
    def findings(self) -> list[ptx.Finding]:
        return [finding for result in self.results for finding in result.findings]


class Group(NamedTuple):
    """Tensors with one set of options."""

    tensors: Sequence[Tensor]
    options: dict[str, Any]
    first: bool = False
    on_device: dict[str, float] | None = None
    """Values of ON_DEVICE that the kernel is to find in device memory; the plan is given others."""
    number_dtype: str = "float64"
    """In which lr and l1 are there."""


def execute(
    module: ptx.Module,
    plan: Plan,
    dtype: str,
    tensors: Sequence[Tensor],
    options: dict[str, Any],
    *,
    first: bool = False,
    on_device: dict[str, float] | None = None,
    number_dtype: str = "float64",
    **more: Any,
) -> Outcome:
    """Runs the plan of one group; ``more``: as for :func:`execute_groups`."""
    group = Group(tensors, options, first, on_device, number_dtype)
    return execute_groups(module, plan, dtype, [group], **more)


def run_all(
    module: ptx.Module, launches: Sequence[dict[str, Any]], arena: ptx.Arena, **more: Any
) -> Outcome:
    """Runs the launches of a plan; ``more`` goes to each."""
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
                **more,
            )
        )
    outcome.guards = arena.check_guards()
    return outcome


def execute_groups(
    module: ptx.Module,
    plan: Plan,
    dtype: str,
    groups: Sequence[Group],
    *,
    capacity: int = 0,
    races: bool = True,
    budget: int = 200_000,
    count_zeros: bool = False,
) -> Outcome:
    """Lays the groups' tensors out in an arena and runs every launch of their plan."""
    arena = ptx.Arena()
    placed = [place(arena, dtype, group, count_zeros) for group in groups]
    launches = plan(dtype, [bucket for bucket, _ in placed], capacity)
    outcome = run_all(module, launches, arena, races=races, budget=budget)
    storage = STORAGES[dtype]
    for group, (_, places) in zip(groups, placed, strict=True):
        for (p, _, m, w, _, z), t in zip(places, group.tensors, strict=True):
            param = arena.read(p.address, t.p.nbytes).view(BITS[storage.param])
            outcome.params.append(param)
            if m is not None:
                momentum = arena.read(m.address, t.m.nbytes).view(BITS[storage.momentum])
                outcome.momenta.append(momentum)
            if w is not None:
                outcome.masters.append(arena.read(w.address, t.w.nbytes).view(np.uint32))
            if z is not None:
                outcome.zeros.append(int(arena.read(z.address, 8).view(np.int64)[0]))
    return outcome


def place(
    arena: ptx.Arena, dtype: str, group: Group, count_zeros: bool
) -> tuple[Bucket, list[tuple[Any, ...]]]:
    """Puts a group's tensors and device values into the arena."""
    storage = STORAGES[dtype]
    types = [BITS[d] for d in (storage.param, storage.param, storage.momentum)]
    with_momentum = group.options.get("momentum", 0.0) != 0
    places: list[tuple[Any, ...]] = []
    for i, t in enumerate(group.tensors):
        sp, sg, sm = (s * d().itemsize for s, d in zip(t.skews[:3], types, strict=True))
        # A parameter with a master is only written.
        data = None if storage.master else t.p.view(np.uint8)
        p = arena.allocate(t.p.nbytes, skew=sp, name=f"param {i}", data=data)
        g = arena.allocate(
            t.g.nbytes, skew=sg, name=f"grad {i}", data=t.g.view(np.uint8), writable=False
        )
        m = w = start = z = None
        if with_momentum:
            data = None if group.first else t.m.view(np.uint8)
            m = arena.allocate(t.m.nbytes, skew=sm, name=f"momentum {i}", data=data)
        if storage.master:
            data = t.w.view(np.uint8)
            w = arena.allocate(
                t.w.nbytes, skew=(*t.skews, t.skews[0])[3] * 4, name=f"master {i}", data=data
            )
        if t.start is not None:
            skew = (*t.skews, 0, 0)[4] * t.start.itemsize
            data = t.start.view(np.uint8)
            start = arena.allocate(
                t.start.nbytes, skew=skew, name=f"start {i}", data=data, writable=False
            )
        if count_zeros:
            z = arena.allocate(8, name=f"zeros {i}", data=np.zeros(8, np.uint8))
        places.append((p, g, m, w, start, z))
    rows = [
        (*(place.address if place else 0 for place in row), len(t.p))
        for row, t in zip(places, group.tensors, strict=True)
    ]
    given = dict(group.options)
    values = {}
    for name, value in (group.on_device or {}).items():
        is_number = name in ("lr", "l1")
        data = to_bits(np.array([value]), group.number_dtype if is_number else "float32")
        values[name] = arena.allocate(
            data.nbytes, name=name, data=data.view(np.uint8), writable=False
        ).address
        if is_number:
            values[f"{name}_dtype"] = NUMBER_DTYPES.index(group.number_dtype)
        given[name] = 123.0
    given.pop("found_inf", None)
    return (rows, named_options(given, group.first), values), places


def expected(
    dtype: str, tensors: Sequence[Tensor], options: dict[str, Any], first: bool
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """What the NumPy reference says: parameters, momentum buffers and masters."""
    storage = STORAGES[dtype]
    with_momentum = options.get("momentum", 0.0) != 0
    params, momenta, masters = [], [], []
    for t in tensors:
        m = to_values(t.m, storage.momentum) if with_momentum and not first else None
        p = to_values(t.w if storage.master else t.p, storage.weight)
        g = to_values(t.g, storage.param)
        by_mode = {k: v for k, v in options.items() if k != "proximal"}
        by_mode["l2_mode"] = "proximal" if options.get("proximal") else "coupled"
        start = None if t.start is None else to_values(t.start, storage.weight)
        p, m = reference.step(
            p, g, m, storage.weight, momentum_dtype=storage.momentum, start=start, **by_mode
        )
        params.append(to_bits(p, storage.param))
        if with_momentum:
            momenta.append(to_bits(m, storage.momentum))
        if storage.master:
            masters.append(to_bits(p, "float32"))
    return params, momenta, masters


def differences(actual: Sequence[np.ndarray], wanted: Sequence[np.ndarray], dtype: str) -> int:
    """Elements whose bytes differ; a NaN equals every NaN. ``dtype``: what they are stored in."""
    count = 0
    for a, b in zip(actual, wanted, strict=True):
        nan = np.isnan(to_values(a, dtype)) & np.isnan(to_values(b, dtype))
        count += int(np.count_nonzero((a != b) & ~nan))
    return count


def differing(outcome: Outcome, wanted: tuple[list[np.ndarray], ...], dtype: str) -> dict[str, int]:
    """Elements that differ, of parameters, momentum buffers and masters."""
    storage = STORAGES[dtype]
    got = (outcome.params, outcome.momenta, outcome.masters)
    return {
        name: differences(a, b, stored)
        for name, a, b, stored in zip(
            ("params", "momenta", "masters"),
            got,
            wanted,
            (storage.param, storage.momentum, "float32"),
            strict=True,
        )
    }


def zeros_in(params: Sequence[np.ndarray], dtype: str, tensors: Sequence[Tensor] = ()) -> list[int]:
    """The zeros of parameters, or where the tensors have starts, what is at them."""
    storage = STORAGES[dtype]
    counts = []
    for p, t in itertools.zip_longest(params, tensors):
        target: Any = 0
        if t is not None and t.start is not None:
            with np.errstate(all="ignore"):
                rounded = to_bits(to_values(t.start, storage.weight), storage.param)
            target = to_values(rounded, storage.param)
        counts.append(int(np.count_nonzero(to_values(p, storage.param) == target)))
    return counts


def boundary_sizes(dtype: str) -> list[int]:
    """Sizes on both sides of every boundary that plan and kernel know."""
    v = VECTOR[dtype]
    chunk = UNITS_PER_BLOCK * v
    step = 256 * v
    return [0, 1, v - 1, v, v + 1, 2 * v + 1, step - 1, step + v, 2 * step + 1, chunk - 1, chunk]
