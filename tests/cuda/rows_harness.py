"""Sets of coupled rows in the interpreter: drawn, laid out, run and compared with the reference."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cuda_harness as harness
import numpy as np
import ptx
import reference

HELD = {"float64": 2560}  # elements that a block holds; of other storages 5,120


class RowSet(NamedTuple):
    """Members with the index of their options, in the order in which squares are summed."""

    members: list[tuple[harness.Tensor, int]]
    rows: int
    weights: float | np.ndarray


class Options(NamedTuple):
    """A group's, as for :class:`cuda_harness.Group`."""

    options: dict[str, Any]
    first: bool = False
    on_device: dict[str, float] | None = None
    number_dtype: str = "float64"


# Operands' addresses and elements, the index of options.
Members = list[tuple[tuple[int, ...], int]]
# Members, rows, group_lasso k, a_g of all rows, the address of one for each.
Described = tuple[Members, int, float, float, int]
# plan(storage, options with values, sets, capacity): the launches.
Plan = Callable[..., list[dict[str, Any]]]


def installed_plan(
    storage: str,
    options: Sequence[tuple[dict[str, Any], dict[str, int]]],
    sets: Sequence[Described],
    capacity: int = 0,
) -> list[dict[str, Any]]:
    """The plan of the installed module."""
    from resnet_reg_ext import _C

    given = [(_C.Options(**o), _C.DeviceValues(**values)) for o, values in options]
    launches: list[dict[str, Any]] = _C.plan_prox_sgd_rows_cuda(storage, given, sets, capacity)
    return launches


SHIM = r"""
static std::vector<cuda::RowOptions> options;
static std::vector<RowSet> sets;
extern "C" void add_options() { options.emplace_back(); }
extern "C" bool set_option(const char* name, double value) {
  return set(options.back().options, name, value);
}
extern "C" bool set_device_value(const char* name, uint64_t address) {
  return set(options.back().values, name, address);
}
extern "C" void add_set(long rows, double lasso, double weight, uint64_t weights) {
  sets.push_back({{}, Storage::float32, rows, lasso, weight, (const double*)weights});
}
extern "C" void add_member(uint64_t* row, long index) {
  Operands o{(void*)row[0], (const void*)row[1], (void*)row[2], (void*)row[3], (const void*)row[4],
             (int64_t)row[6], (int64_t*)row[5]};
  sets.back().members.push_back({o, o.numel / sets.back().rows, (size_t)index});
}
extern "C" long plan(int storage, long capacity) {
  launches = cuda::plan_rows(sets, options, static_cast<Storage>(storage), capacity);
  sets.clear();
  options.clear();
  return static_cast<long>(launches.size());
}
"""


def compile_plan(csrc: Path, out: Path) -> Plan:
    """The host's plan, compiled from sources other than the installed ones."""
    shim, library = out / "row_shim.cpp", out / "row_plan.so"
    shim.write_text(harness.SHIM_COMMON + SHIM)
    command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", f"-I{csrc}", shim]
    subprocess.run([*command, csrc / "cuda" / "row_plan.cpp", "-o", library], check=True)
    code = ctypes.CDLL(str(library))
    code.set_option.argtypes = [ctypes.c_char_p, ctypes.c_double]
    code.set_option.restype = code.set_device_value.restype = ctypes.c_bool
    code.set_device_value.argtypes = [ctypes.c_char_p, ctypes.c_uint64]
    code.add_set.argtypes = [ctypes.c_long, ctypes.c_double, ctypes.c_double, ctypes.c_uint64]
    code.add_member.argtypes = [ctypes.c_void_p, ctypes.c_long]

    def plan(
        storage: str,
        options: Sequence[tuple[dict[str, Any], dict[str, int]]],
        sets: Sequence[Described],
        capacity: int = 0,
    ) -> list[dict[str, Any]]:
        for of_group, values in options:
            code.add_options()
            for name, value in of_group.items():
                assert code.set_option(name.encode(), value), name
            for name, address in values.items():
                assert code.set_device_value(name.encode(), address), name
        for members, *rest in sets:
            code.add_set(*rest)
            for row, index in members:
                table = np.array(row, np.uint64)
                code.add_member(table.ctypes.data, index)
        return harness.planned(code, code.plan(list(harness.STORAGES).index(storage), capacity))

    return plan


def lasso_of(options: dict[str, Any], group_lasso: float) -> float:
    """group_lasso k."""
    momentum = options.get("momentum", 0.0)
    k = (1 - options.get("dampening", 0.0)) / (1 - momentum) if momentum else 1.0
    return group_lasso * k


@dataclass
class Case:
    """What a run is of."""

    storage: str
    sets: list[RowSet]
    options: list[Options]
    group_lasso: float = 0.3
    counts_zeros: bool = True


def execute(
    module: ptx.Module, plan: Plan, case: Case, *, capacity: int = 0, **more: Any
) -> tuple[harness.Outcome, list[np.ndarray]]:
    """Runs every launch of the plan of a case; the arrays: what it left, member by member."""
    arena = ptx.Arena()
    rows: dict[int, tuple[int, ...]] = {}
    places: dict[int, tuple[Any, ...]] = {}
    given = []
    for index, of_group in enumerate(case.options):
        tensors = [t for one in case.sets for t, group in one.members if group == index]
        group = harness.Group(tensors, *of_group)
        (addresses, named, values), placed = harness.place(
            arena, case.storage, group, case.counts_zeros
        )
        given.append((named, values))
        for t, row, of_tensor in zip(tensors, addresses, placed, strict=True):
            rows[id(t)], places[id(t)] = tuple(row), of_tensor
    described: list[Described] = []
    for one in case.sets:
        lasso = lasso_of(case.options[one.members[0][1]].options, case.group_lasso)
        number, address = one.weights, 0
        if isinstance(one.weights, np.ndarray):
            data = one.weights.view(np.uint8)
            number, address = 0.0, arena.allocate(len(data), data=data, writable=False).address
        members = [(rows[id(t)], group) for t, group in one.members]
        described.append((members, one.rows, lasso, number, address))
    launches = plan(case.storage, given, described, capacity)
    outcome = harness.run_all(module, launches, arena, **more)
    storage = harness.STORAGES[case.storage]
    for one in case.sets:
        for t, _ in one.members:
            p, _, m, w, _, z = places[id(t)]
            param = arena.read(p.address, t.p.nbytes).view(harness.BITS[storage.param])
            outcome.params.append(param)
            if m is not None:
                stored = arena.read(m.address, t.m.nbytes)
                outcome.momenta.append(stored.view(harness.BITS[storage.momentum]))
            if w is not None:
                outcome.masters.append(arena.read(w.address, t.w.nbytes).view(np.uint32))
            if z is not None:
                outcome.zeros.append(int(arena.read(z.address, 8).view(np.int64)[0]))
    return outcome, outcome.params


def expected(case: Case) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """What the NumPy reference says: parameters, momentum buffers and masters."""
    storage = harness.STORAGES[case.storage]
    params, momenta, masters = [], [], []
    for one in case.sets:
        members = []
        for t, group in one.members:
            options, first = case.options[group][:2]
            with_momentum = options.get("momentum", 0.0) != 0
            p = harness.to_values(t.w if storage.master else t.p, storage.weight)
            g = harness.to_values(t.g, storage.param)
            m = harness.to_values(t.m, storage.momentum)
            shape = (one.rows, -1)
            chosen = {k: v for k, v in options.items() if k != "proximal"}
            chosen["l2_mode"] = "proximal" if options.get("proximal") else "coupled"
            chosen["momentum_dtype"] = storage.momentum
            before = m.reshape(shape) if with_momentum and not first else None
            if t.start is not None:
                chosen["start"] = harness.to_values(t.start, storage.weight).reshape(shape)
            members.append((p.reshape(shape), g.reshape(shape), before, storage.weight, chosen))
        weights = np.broadcast_to(np.asarray(one.weights, np.float64), one.rows)
        for p, m in reference.row_step(members, weights, group_lasso=case.group_lasso):
            params.append(harness.to_bits(p.ravel(), storage.param))
            if m is not None:
                momenta.append(harness.to_bits(m.ravel(), storage.momentum))
            if storage.master:
                masters.append(harness.to_bits(p.ravel(), "float32"))
    return params, momenta, masters


def failed(outcome: harness.Outcome, case: Case) -> set[str]:
    """Names of the checks that fail."""
    names = {finding.kind for finding in outcome.findings}
    if outcome.guards:
        names.add("guards")
    wanted = expected(case)
    if any(harness.differing(outcome, wanted, case.storage).values()):
        names.add("bytes")
    tensors = [t for one in case.sets for t, _ in one.members]
    if case.counts_zeros and outcome.zeros != harness.zeros_in(wanted[0], case.storage, tensors):
        names.add("zeros")
    return names


def near_thresholds(
    storage: str, rows: int, widths: Sequence[int], towards_start: bool = False
) -> Case:
    """Thresholds at the norm, and one and two last places of float64 below it, by turns.

    A factor is then so small that whatever changes the last place of a sum or of a threshold
    changes it by a multiple, in every storage; towards a start where that is so small, too.
    """
    rng = np.random.default_rng(1)
    kind = harness.STORAGES[storage]
    members, total = [], np.zeros(rows)
    for width in widths:
        bits = harness.to_bits(rng.standard_normal(rows * width), kind.weight)
        values = harness.to_values(bits, kind.weight)
        start = None
        if towards_start:
            start = harness.to_bits(rng.standard_normal(rows * width) * 1e-18, kind.weight)
            values = values - harness.to_values(start, kind.weight)
        total += reference.square_sums(values.reshape(rows, width))
        p = harness.to_bits(harness.to_values(bits, kind.weight), kind.param)
        m = np.zeros(len(p), harness.BITS[kind.momentum])
        master = bits if kind.master else None
        members.append((harness.Tensor(p, np.zeros_like(p), m, w=master, start=start), 0))
    lr, lasso = 0.7, 0.3
    weights = np.sqrt(total) / (lr * lasso)
    weights[1::3] = np.nextafter(weights[1::3], 0.0)
    weights[2::3] = np.nextafter(np.nextafter(weights[2::3], 0.0), 0.0)
    return Case(storage, [RowSet(members, rows, weights)], [Options({"lr": lr})], lasso)


# ---- drawn sets ---------------------------------------------------------------------------------

# Around a lane's, a vector's, a segment's ends; 1 is that of norms and biases.
WIDTHS = [1, 1, 2, 3, 4, 8, 15, 16, 17, 31, 48, 147, 511, 512, 513, 576, 1030]


def draw(
    rng: np.random.Generator, rows: int, width: int, storage: str, skews: tuple[int, ...] = ()
) -> harness.Tensor:
    """A member: rows of all magnitudes, some zero, with signed zeros, subnormals, few NaNs."""
    kind = harness.STORAGES[storage]
    special = [0.0, -0.0, 1e-40, -6e-8, 1e-3]

    def values(dtype: str) -> np.ndarray:
        drawn = rng.standard_normal((rows, width)) * 10.0 ** rng.integers(-3, 2, (rows, 1))
        drawn = np.where(rng.random(drawn.shape) < 0.1, rng.choice(special, drawn.shape), drawn)
        drawn[rng.random(rows) < 0.15] = 0.0
        if rng.random() < 0.15:
            drawn.flat[rng.integers(drawn.size)] = rng.choice([np.nan, np.inf, -np.inf])
        return harness.to_bits(drawn.ravel(), dtype)

    stored = [values(dtype) for dtype in (kind.param, kind.param, kind.momentum)]
    master = values("float32") if kind.master else None
    return harness.Tensor(*stored, skews=skews or (0, 0, 0), w=master)


def draw_set(
    rng: np.random.Generator,
    storage: str,
    rows: int,
    widths: Sequence[int],
    groups: int,
    skewed: bool = False,
    starts: float = 0.0,
) -> RowSet:
    """Members in groups at random, and weights: one number, or one for each row.

    ``starts``: the share of members that have one.
    """
    unit = harness.STORAGES[storage].unit
    members = []
    for width in widths:
        skews = tuple(int(s) for s in rng.integers(0, unit, 5) * (rng.random(5) < 0.4))
        tensor = draw(rng, rows, width, storage, skews if skewed else ())
        if starts and rng.random() < starts:
            (tensor,) = harness.with_starts([tensor], storage, int(rng.integers(2**31)))
        members.append((tensor, int(rng.integers(groups))))
    weights: float | np.ndarray = float(np.sqrt(sum(widths)) * rng.choice([0.1, 1.0, 3.0]))
    if rng.random() < 0.5:
        weights = rng.choice([0.0, 0.5, 2.0, 30.0], rows)
    return RowSet(members, rows, weights)


def draw_case(rng: np.random.Generator, storage: str, number: int = 8) -> Case:
    """Several sets with several tensors each, in groups of one lr, momentum and dampening."""
    momentum = float(rng.choice([0.0, 0.5, 0.9]))
    shared = {
        "lr": float(rng.choice([0.1, 0.3, 1.0])),
        "momentum": momentum,
        "dampening": float(rng.choice([0.0, 0.3])),
    }
    options = []
    for _ in range(3):
        nesterov = momentum != 0 and shared["dampening"] == 0 and rng.random() < 0.4
        scaled = rng.random() < 0.3
        of_group = {
            **shared,
            "l1": float(rng.choice([0.0, 0.02])),
            "weight_decay": float(rng.choice([0.0, 0.1])),
            "proximal": bool(rng.random() < 0.5),
            "nesterov": bool(nesterov),
            "maximize": bool(rng.random() < 0.2),
            "grad_scale": 48.0 if scaled else 1.0,
            "grad_coefficient": 0.3 if scaled else 1.0,
        }
        options.append(Options(of_group, momentum != 0 and bool(rng.random() < 0.3)))
    sets = []
    for _ in range(number):
        rows = int(rng.choice([1, 2, 5, 9, 17, 40]))
        most = 12_000 // rows
        widths = [min(int(rng.choice(WIDTHS)), most) for _ in range(int(rng.integers(1, 5)))]
        starts = float(rng.choice([0.0, 0.0, 0.5, 1.0]))
        skewed = bool(rng.random() < 0.5)
        sets.append(draw_set(rng, storage, rows, widths, len(options), skewed, starts))
    return Case(storage, sets, options, float(rng.choice([0.01, 0.3, 1.0])))
