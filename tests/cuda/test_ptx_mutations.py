"""The checker is checked: bugs planted in kernel, plan and shared math must each be caught.

A mutant is a copy of csrc/ with one small edit. Its plan is compiled with g++, its kernels with
nvcc, and both run through the checks that the shipped sources pass. The check that is meant for it
must catch it, not just any, and with the kernels of one storage: others aren't compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cuda_harness as harness
import ptx
import pytest
from kernel_figures import MODELS, busiest_block, resources
from test_ptx_compiled import LOADS, disassemble, loads_before_first_use, most_registers

ARCH = "compute_90"
# One kernel for each storage, which halves the time to compile.
SMALL_TABLE = "-DPROX_SGD_PARAMETER_BYTES=4096"
# -lineinfo is half of the PTX.
FLAGS = (*(flag for flag in harness.FLAGS if flag != "-lineinfo"), SMALL_TABLE)
OTHER_KERNELS = r"^PROX_SGD_KERNELS\((?!{storage}\)|storage\))\w+\)\n"


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    caught_by: str
    storage: str = "float32"
    flags: tuple[str, ...] = FLAGS


UPDATE, PROX, ROUNDING = "math/update.h", "math/prox.h", "math/rounding.h"
KERNEL, PACKS, PLAN = "cuda/elements.cu", "cuda/packs.cuh", "cuda/plan.cpp"
DEVICE = "cuda/device.cuh"
MUTANTS = [
    # the shared math
    Mutant(
        "threshold signs swapped",
        PROX,
        "fminf(fmaxf(v, -t), t)",
        "fminf(fmaxf(v, t), -t)",
        "bytes",
    ),
    Mutant(
        "fmax swallows NaN",
        PROX,
        "sub_(v, keep(clamp_(v, t), mask))",
        "C(v > C(0) ? fmax(v - t, C(0)) : -fmax(-v - t, C(0)))",
        "bytes",
    ),
    Mutant(
        "momentum averaged on the first step",
        UPDATE,
        "m = mode == MomentumMode::running ? averaged : d;",
        "m = mode != MomentumMode::none ? averaged : d;",
        "bytes",
    ),
    Mutant("minus zero lost without nesterov", UPDATE, ", c.lookahead_sign))", ", 0u))", "bytes"),
    Mutant("dampening forgotten", UPDATE, "1.0 - o.dampening);", "1.0);", "bytes"),
    Mutant(
        "naive threshold lr * l1",
        UPDATE,
        "mul_(lr, mul_(l1, s.k))",
        "mul_(lr, l1)",
        "bytes",
    ),
    Mutant(
        "contraction let loose",
        ROUNDING,
        "return __fadd_rn(a, -b); }",
        "return a - b; }",
        "contractable",
        flags=tuple(flag for flag in FLAGS if flag != "--fmad=false"),
    ),
    Mutant(
        "first step taken for a running one",
        "prox_sgd.h",
        "first_step ? MomentumMode::first_step : MomentumMode::running",
        "MomentumMode::running",
        "uninitialised",
    ),
    # towards a start
    Mutant(
        "start missed by a rounding",
        PROX,
        "choose(equal(pull, u, all), start, sub_(v, pull))",
        "sub_(v, pull)",
        "bytes",
    ),
    Mutant(
        "weight decay towards zero",
        UPDATE,
        "descend(c, mode, form, p, sub_(p, start), g, m)",
        "descend(c, mode, form, p, p, g, m)",
        "bytes",
    ),
    Mutant(
        "ridge factor applied to the weight itself",
        PROX,
        "fma_(factor, sub_(p, start), start)",
        "fma_(factor, p, start)",
        "bytes",
        storage="float64",
    ),
    Mutant(
        "ridge factor of 1 rounds",
        PROX,
        "choose(equal(factor, C(1), all), p, scaled)",
        "scaled",
        "bytes",
    ),
    Mutant(
        "infinities less their start become NaN",
        PROX,
        "choose(equal(u, u, all), clamp_(u, t), C(0))",
        "u == u ? clamp_(u, t) : u",
        "bytes",
    ),
    Mutant(
        "no l1 taken for a threshold of 0",
        PROX,
        "return choose(equal(t, C(0), all), v, moved);",
        "return moved;",
        "bytes",
    ),
    Mutant(
        "frozen weights become zero",
        UPDATE,
        "choose(stays, start, moved)",
        "choose(stays, C(0), moved)",
        "bytes",
    ),
    Mutant(
        "starts are taken from the weights",
        KERNEL,
        "read<Use::once>(t.start + at + k * stride, start[k])",
        "read<Use::once>(t.weight + at + k * stride, start[k])",
        "bytes",
    ),
    Mutant(
        "alignment of the start forgotten",
        KERNEL,
        "(aligned<N>(arrays.start) && aligned<N>(arrays.grad))",
        "aligned<N>(arrays.grad)",
        "misaligned",
    ),
    Mutant(
        "zeros counted instead of what is at its start",
        KERNEL,
        "if constexpr (kStart) {\n        num_zeros +=",
        "if constexpr (false) {\n        num_zeros +=",
        "zeros",
    ),
    Mutant(
        "kernel towards zero launched for starts",
        PLAN,
        '(towards_start_ ? "_start_" : "_")',
        '"_"',
        "bytes",
    ),
    # the kernel
    Mutant(
        "tail runs to the end of the unit",
        KERNEL,
        "min((stop - entry.first_unit) * N, o.numel)",
        "(stop - entry.first_unit) * N",
        "out-of-bounds",
    ),
    Mutant(
        "tail off by one",
        KERNEL,
        "arrays, in_vectors, size);",
        "arrays, in_vectors, size - 1);",
        "bytes",
    ),
    Mutant(
        "alignment test dropped",
        PACKS,
        "% (N * sizeof(T)) == 0;",
        "% (N * sizeof(T)) < 99;",
        "misaligned",
    ),
    Mutant(
        "alignment of the momentum forgotten",
        KERNEL,
        " && aligned<N>(arrays.momentum_buffer)",
        "",
        "misaligned",
    ),
    Mutant(
        "chunks overlap by one unit",
        KERNEL,
        "stop = first + kUnitsPerBlock;",
        "stop = first + kUnitsPerBlock + 1;",
        "race",
    ),
    Mutant("binary search never ends", KERNEL, "high = middle - 1;", "high = middle;", "budget"),
    Mutant(
        "block index multiplied in 32 bits",
        KERNEL,
        "static_cast<int64_t>(blockIdx.x) * kUnitsPerBlock",
        "static_cast<int>(blockIdx.x) * kUnitsPerBlock",
        "bytes past 32 bits",
    ),
    Mutant("pairs updated twice", KERNEL, "at += kCount * kStride", "at += kStride", "bytes"),
    Mutant("odd pack forgotten", KERNEL, "kCount == 2 && at < end", "false", "bytes"),
    Mutant(
        "all threads take one pack",
        KERNEL,
        "begin + static_cast<int>(threadIdx.x) * N",
        "begin",
        "race",
    ),
    Mutant(
        "words stored in the wrong order",
        PACKS,
        '"r"(word.x), "r"(word.y), "r"(word.z)',
        '"r"(word.y), "r"(word.x), "r"(word.z)',
        "bytes",
    ),
    Mutant(
        "alignment of the gradient forgotten",
        KERNEL,
        "if (kStart || aligned<N>(arrays.grad)) {",
        "if (true) {",
        "misaligned",
    ),
    Mutant(
        "misaligned gradient loads its first element only",
        KERNEL,
        "t.grad + at + k * stride + i, g",
        "t.grad + at + k * stride, g",
        "bytes",
    ),
    Mutant(
        "a group's infinity stops the others",
        KERNEL,
        "*group.values.found_inf != 0.0f) continue;",
        "*group.values.found_inf != 0.0f) return;",
        "bytes",
    ),
    Mutant(
        "first group's options for all",
        KERNEL,
        "table.header.groups[entry.group]",
        "table.header.groups[0]",
        "bytes",
    ),
    Mutant(
        "coefficients read before they are computed",
        KERNEL,
        "  __syncthreads();\n  return now;",
        "  return now;",
        "race",
    ),
    Mutant(
        "warps' zeros added before they are known",
        DEVICE,
        "= number;\n  __syncthreads();",
        "= number;",
        "race",
    ),
    Mutant(
        "float32 learning rate read as float64",
        DEVICE,
        "      return *static_cast<const float*>(address);",
        "      return *static_cast<const double*>(address);",
        "bytes",
    ),
    Mutant(
        "linear search for the entry",
        KERNEL,
        "const int middle = (low + high + 1) / 2;",
        "const int middle = low + 1;",
        "search",
    ),
    Mutant(
        "momentum read on the first step",
        KERNEL,
        "if (c.mode == MomentumMode::running) {",
        "if (c.mode != MomentumMode::none) {",
        "uninitialised",
    ),
    Mutant(
        "momentum written without momentum",
        KERNEL,
        "if (c.mode != MomentumMode::none) write",
        "if (true) write",
        "bytes",
    ),
    Mutant(
        "vector path never taken",
        KERNEL,
        "vectors ? size / N",
        "false ? size / N",
        "vectors",
    ),
    Mutant(
        "registers squeezed by launch bounds",
        KERNEL,
        "__launch_bounds__(kThreads, start ? 3 : 4)",
        "__launch_bounds__(kThreads, 8)",
        "spills",
    ),
    Mutant("blocks too coarse", "cuda/params.h", "4 * kThreads", "1024 * kThreads", "balance"),
    Mutant(
        "master weights not written",
        KERNEL,
        "if constexpr (T::has_master) write",
        "if (false) write",
        "bytes",
        storage="bfloat16_master",
    ),
    Mutant(
        "alignment of the master forgotten",
        KERNEL,
        "aligned<N>(arrays.weight) &&",
        "true &&",
        "misaligned",
        storage="bfloat16_master",
    ),
    Mutant(
        "zeros counted by one lane of a warp",
        DEVICE,
        "number += __shfl_xor_sync(0xffffffffu, number, distance)",
        "number += distance - distance",
        "zeros",
    ),
    Mutant(
        "zeros added without an atomic",
        DEVICE,
        "atomicAdd(reinterpret_cast<unsigned long long*>(counter), "
        "static_cast<unsigned long long>(sum));",
        "*counter += sum;",
        "race",
    ),
    Mutant(
        "frozen zeros move",
        UPDATE,
        "clear_if_zero(p, c.frozen_zeros, moved)",
        "moved",
        "bytes",
    ),
    Mutant(
        "scaled gradients taken as they are",
        UPDATE,
        "flip(mul_(g, c.grad_factor), c.ascent)",
        "flip(g, c.ascent)",
        "bytes",
    ),
    Mutant(
        "device's learning rate ignored",
        DEVICE,
        "if (from.lr) scheduled.lr = number_at(from.lr, from.lr_dtype);",
        "",
        "bytes",
    ),
    Mutant(
        "found_inf ignored",
        KERNEL,
        "*group.values.found_inf != 0.0f",
        "false",
        "bytes",
    ),
    Mutant(
        "one pack in flight",
        KERNEL,
        "sizeof(typename T::Weight) == sizeof(float) && !kStart ? 2 : 1",
        "1",
        "loads",
    ),
    Mutant(
        "found_inf acts on exactly 1",
        KERNEL,
        "*group.values.found_inf != 0.0f",
        "*group.values.found_inf == 1.0f",
        "bytes",
    ),
    Mutant(
        "NaN learning rate taken for 0",
        UPDATE,
        "s.lr < 0.0 ? 0.0 : s.lr",
        "s.lr > 0.0 ? s.lr : 0.0",
        "bytes",
    ),
    Mutant(
        "NaN l1 taken for 0",
        UPDATE,
        "s.l1 < 0.0 ? 0.0 : s.l1",
        "s.l1 > 0.0 ? s.l1 : 0.0",
        "bytes",
    ),
    Mutant(
        "1 - dampening rounded twice",
        UPDATE,
        "static_cast<C>(1.0 - o.dampening)",
        "C(1) - static_cast<C>(o.dampening)",
        "bytes",
    ),
    Mutant(
        "proximal scale in another order",
        UPDATE,
        "mul_(lr, mul_(s.proximal_decay, s.k))",
        "mul_(mul_(lr, s.proximal_decay), s.k)",
        "bytes",
        storage="float64",
    ),
    Mutant(
        "zeros of a tensor that is wholly zero not counted",
        DEVICE,
        "if (sum != 0) {",
        "if (sum % 256 != 0) {",
        "zeros",
    ),
    Mutant(
        "no vector accesses while counting",
        KERNEL,
        "vectors ? size / N",
        "vectors && !o.num_zeros ? size / N",
        "vectors",
    ),
    Mutant(
        "first unit compared in 32 bits",
        KERNEL,
        "table.entries[middle].first_unit <= unit",
        "static_cast<int>(table.entries[middle].first_unit) <= unit",
        "bytes past 32 bits",
    ),
    # the plan
    Mutant(
        "last flush missing",
        PLAN,
        "    flush();\n    return std::move(launches_);",
        "    return std::move(launches_);",
        "bytes",
    ),
    Mutant("full table dropped", PLAN, "        flush();\n", "        reset();\n", "bytes"),
    Mutant("group not listed in the next table", PLAN, "        listed = false;\n", "", "bytes"),
    Mutant(
        "a bucket takes the group of the last",
        PLAN,
        "bool listed = false;",
        "bool listed = groups_ > 0;",
        "bytes",
    ),
    Mutant(
        "prefix sum rounds down",
        PLAN,
        "units_ += (o.numel + T::per_unit - 1) / T::per_unit;",
        "units_ += o.numel / T::per_unit;",
        "bytes",
    ),
    Mutant("prefix sum not reset", PLAN, "    units_ = 0;\n", "", "launches"),
    Mutant(
        "gap shorter than a block", PLAN, "units_ = round_up(units_);", "units_ += 1;", "pieces"
    ),
    Mutant("no limit to the pieces of a block", PLAN, "kMostPieces", "1000", "pieces"),
    Mutant(
        "grid rounds down",
        PLAN,
        "blocks = round_up(units_) / kUnitsPerBlock",
        "blocks = units_ / kUnitsPerBlock + (units_ < kUnitsPerBlock)",
        "bytes",
    ),
    Mutant(
        "empty tensor takes a place",
        PLAN,
        "if (o.numel == 0) continue;",
        "",
        "launches",
    ),
]

PLAIN, MOMENTUM, NESTEROV, DAMPENED, FROZEN, SCALED = (
    harness.OPTIONS[i] for i in (1, 3, 5, 6, 9, 10)
)
PROXIMAL = {"lr": 0.2, "momentum": 0.95, "weight_decay": 0.7, "proximal": True}
SKEWS = [(0, 0, 0), (0, 0, 1), (1, 0, 0)]
SIZES = [5, 0, 300, 2051, 4096 * 3 + 3, 1, 1024]


class Build(NamedTuple):
    """Kernels and plan of one source tree."""

    csrc: Path
    module: ptx.Module
    plan: harness.Plan
    flags: tuple[str, ...]


def compared(outcome: harness.Outcome, wanted, zeros, dtype: str) -> set[str]:
    """Names of the checks that fail."""
    failed = {finding.kind for finding in outcome.findings}
    if outcome.guards:
        failed.add("guards")
    if any(harness.differing(outcome, wanted, dtype).values()):
        failed.add("bytes")
    if outcome.zeros != zeros:
        failed.add("zeros")
    return failed


def run(build: Build, dtype, tensors, options, **more) -> set[str]:
    """Names of the checks that fail on one bucket."""
    if not isinstance(tensors[0], harness.Tensor):
        tensors = harness.make_tensors(tensors, dtype, seed=8, skews=more.pop("skews", None))
    first = more.get("first", False)
    outcome = harness.execute(
        build.module, build.plan, dtype, tensors, options, budget=20_000, count_zeros=True, **more
    )
    if more.get("on_device", {}).get("found_inf"):
        wanted = [t.p for t in tensors], [t.m for t in tensors], []
        zeros = [0] * len(tensors)
    else:
        wanted = harness.expected(dtype, tensors, options, first)
        zeros = harness.zeros_in(wanted[0], dtype, tensors)
    return compared(outcome, wanted, zeros, dtype)


def run_groups(build: Build) -> set[str]:
    """Two groups on both sides of a table's end, and one whose gradients hold an infinity."""
    made = [harness.make_tensors([300, 9, 2], "float32", seed=i) for i in range(4)]
    groups = [
        harness.Group(made[0], MOMENTUM),
        harness.Group(made[1], NESTEROV, on_device={"found_inf": 2.0}),
        harness.Group(made[2], {**SCALED, "lr": 0.125}, False, {"lr": 0.125}, "float32"),
        harness.Group(made[3], FROZEN, False, {"l1": 0.03}),
    ]
    failed = set()
    for capacity in (0, 4):
        outcome = harness.execute_groups(
            build.module, build.plan, "float32", groups, capacity=capacity, count_zeros=True
        )
        each = [harness.expected("float32", g.tensors, g.options, g.first) for g in groups]
        each[1] = ([t.p for t in made[1]], [t.m for t in made[1]], [])
        wanted = tuple([a for of_group in each for a in of_group[i]] for i in range(3))
        zeros = harness.zeros_in(wanted[0], "float32")
        zeros[3:6] = [0, 0, 0]
        failed |= compared(outcome, wanted, zeros, "float32")
    return failed


Case = tuple[str, Callable[[Build], set[str]]]


def memory_cases() -> Iterator[Case]:
    """Storages, and what gives the names of the checks that fail; the quickest come first."""

    def case(dtype, tensors, options, **more):
        return dtype, lambda build: run(build, dtype, tensors, options, **more)

    yield case("float32", [harness.signed_zeros("float32")], MOMENTUM)
    for found_inf in (1.0, 0.5, 2.0, float("nan")):
        yield case("float32", [9], MOMENTUM, on_device={"found_inf": found_inf})
    for name in ("lr", "l1"):
        unknown = {**MOMENTUM, name: float("nan")}
        yield case("float32", [9], unknown, on_device={name: float("nan")})
    yield case("float32", [300], PLAIN, skews=[(0, 1, 0)])
    yield case("float32", [700], FROZEN)
    yield case("float32", [700], SCALED, on_device={"lr": 0.1, "grad_scale": 48.0})
    yield case("float32", [700], {**DAMPENED, "dampening": 0.9})
    yield case("float64", [700], PROXIMAL)
    yield case("bfloat16_master", [700], MOMENTUM, skews=[(0, 0, 0, 1)])
    yield from start_cases()
    yield "float32", run_groups
    yield case("float32", [6, 9, 0, 4100, 3], DAMPENED, capacity=2)
    yield case("float32", [7, 4096 * 2 + 4], PLAIN)
    yield case("bfloat16", [8, 4099], PLAIN)
    nothing = harness.np.zeros(8192, harness.np.uint32)
    yield case("float32", [harness.Tensor(nothing, nothing, nothing)], PLAIN)
    yield case("float32", SIZES, NESTEROV, skews=SKEWS)
    yield case("float32", SIZES, DAMPENED, first=True)
    yield case("bfloat16_master", SIZES, MOMENTUM)


def start_cases() -> Iterator[Case]:
    """With special values, and where the start is what the weight is, near it and elsewhere."""
    for dtype, options, skew in (
        ("float32", NESTEROV, 0),
        ("float32", MOMENTUM, 1),
        ("float32", FROZEN, 0),
        ("float64", PROXIMAL, 0),
        ("float32", {**PROXIMAL, "lr": 1e-12}, 0),
        ("bfloat16_master", MOMENTUM, 0),
    ):
        skews = [(0, 0, 0, 0, skew)]
        tensors = harness.make_tensors([5, 0, 700, 2051], dtype, seed=8, skews=skews)
        tensors = harness.with_starts(tensors, dtype)
        yield dtype, functools.partial(run, dtype=dtype, tensors=tensors, options=options)
    # Without L1 a -0 that the gradient leaves keeps its sign, whatever the start's is.
    signs = harness.signed_zeros("float32")
    signs = dataclasses.replace(signs, start=harness.np.zeros_like(signs.p))
    options = {"lr": 0.1, "momentum": 0.9}
    yield "float32", functools.partial(run, dtype="float32", tensors=[signs], options=options)


def check_rounding(build: Build) -> set[str]:
    return {"contractable"} if any(map(ptx.contractable, build.module.kernels.values())) else set()


def check_launches(build: Build) -> set[str]:
    options = harness.named_options(PLAIN, False)
    empty = [(4096, 8192, 0, 0, 0, 0, 0)]
    full = [(4096, 8192, 0, 0, 0, 0, 5)]
    large = [(4096, 8192, 0, 0, 0, 0, 4 * 4096)]
    plans = [
        build.plan("float32", [(rows, options, {})], 1)
        for rows in (empty, empty + full, 2 * full, 2 * large)
    ]
    grids = [[launch["grid"] for launch in launches] for launches in plans]
    return set() if grids == [[], [1], [1, 1], [4, 4]] else {"launches"}


def check_pieces(build: Build) -> set[str]:
    most = max(
        busiest_block(build.plan, "float32", MODELS[name])
        for name in ("ResNet-50's vectors", "581 scalars")
    )
    return {"pieces"} if most > 4 else set()


def check_search(build: Build) -> set[str]:
    """The last block of a full table finds its entry in some log2(32) steps."""
    rows = [(2**40, 2**41, 0, 0, 0, 0, 4096)] * 32
    bucket = (rows, harness.named_options({"lr": 0.5}, False), {})
    (launch,) = build.plan("float32", [bucket])
    arena = ptx.Arena()
    for address in (2**40, 2**41):
        arena.place_lazy(address, 4096 * 4, fill=lambda start, count: bytes(count))
    counts = []
    for block in (0, 31):
        result = ptx.launch(
            build.module,
            launch["kernel"],
            grid=launch["grid"],
            block=launch["block"],
            params=launch["parameters"],
            memory=arena,
            blocks=[block],
        )
        counts.append(sum(result.counts.instructions.values()))
    return {"search"} if counts[1] > 1.2 * counts[0] else set()


def check_work(build: Build) -> set[str]:
    """Vector accesses, and the same work for all blocks."""
    tensors = harness.make_tensors([4096 * 60, 64, 64], "float32", seed=9)
    failed = set()
    for count_zeros in (True, False):
        outcome = harness.execute(
            build.module,
            build.plan,
            "float32",
            tensors,
            PLAIN,
            races=False,
            count_zeros=count_zeros,
        )
        (result,) = outcome.results
        loads = [name for name in result.counts.instructions if name.startswith("ld.global")]
        if not any(".v4." in name for name in loads):
            failed.add("vectors")
    if result.counts.imbalance > 1.02 or len(result.counts.block_bytes) < 60:
        failed.add("balance")
    return failed


def check_past_32_bits(build: Build) -> set[str]:
    """The first and last block of a tensor of 2^34 elements, on memory that exists where touched.

    A second tensor lies behind it.
    """
    numel = 2**34
    arena = ptx.Arena()
    p, g = (
        arena.place_lazy(2**41 * (i + 1), numel * 4, fill=lambda start, count: bytes(count))
        for i in range(2)
    )
    one = harness.to_bits(harness.np.ones(4), "float32").view(harness.np.uint8)
    ends = (0, numel * 4 - 16)
    for end in ends:
        arena.write(g.address + end, one)
        arena.write(p.address + end, bytes(16))
    rows = [(p.address, g.address, 0, 0, 0, 0, numel), (2**45, 2**46, 0, 0, 0, 0, 4)]
    bucket = (rows, harness.named_options({"lr": 0.5}, False), {})
    (launch,) = build.plan("float32", [bucket])
    result = ptx.launch(
        build.module,
        launch["kernel"],
        grid=launch["grid"],
        block=launch["block"],
        params=launch["parameters"],
        memory=arena,
        blocks=[0, launch["grid"] - 2],
    )
    values = [arena.read(p.address + end, 16).view(harness.np.float32) for end in ends]
    right = result.ok and all((value == -0.5).all() for value in values)
    return set() if right else {"bytes past 32 bits"}


def check_registers(build: Build) -> set[str]:
    used = resources(build.csrc, "sm_80", build.flags)
    too_many = any(r.registers > most_registers(kernel) for kernel, r in used.items())
    failed = {"registers"} if too_many else set()
    return failed | ({"spills"} if any(r.spills for r in used.values()) else set())


def check_loads(build: Build) -> set[str]:
    code = disassemble("sm_90", "prox_sgd_float32_12k", build.csrc)
    return set() if loads_before_first_use(code) >= LOADS["float32"] else {"loads"}


CHECKS: list[Callable[[Build], set[str]]] = [
    check_rounding,
    check_launches,
    check_pieces,
    check_search,
    check_work,
    check_past_32_bits,
    check_registers,
    check_loads,
]
MEANT_FOR = {
    "contractable": check_rounding,
    "launches": check_launches,
    "pieces": check_pieces,
    "search": check_search,
    "vectors": check_work,
    "balance": check_work,
    "bytes past 32 bits": check_past_32_bits,
    "registers": check_registers,
    "spills": check_registers,
    "loads": check_loads,
}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Build:
    plan = harness.compile_plan(harness.CSRC, tmp_path_factory.mktemp("plan"), [SMALL_TABLE])
    return Build(harness.CSRC, harness.module_for(ARCH, flags=FLAGS), plan, FLAGS)


def build_of(mutant: Mutant, csrc: Path, out: Path, shipped: Build) -> Build:
    """What the bug isn't in is the shipped build's."""
    module, plan = shipped.module, shipped.plan
    # The checks of machine code compile for themselves.
    if mutant.file != PLAN and mutant.caught_by not in ("spills", "loads"):
        module = harness.module_for(ARCH, csrc, mutant.flags)
    if mutant.file not in (KERNEL, PACKS, DEVICE, PROX):
        plan = harness.compile_plan(csrc, out, [SMALL_TABLE])
    return Build(csrc, module, plan, mutant.flags)


def test_the_shipped_sources_pass_every_check(shipped: Build) -> None:
    for check in [*CHECKS, *(case for _, case in memory_cases())]:
        assert check(shipped) == set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_planted_bug_is_caught(mutant: Mutant, tmp_path: Path, shipped: Build) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(harness.CSRC, csrc)
    source = (csrc / mutant.file).read_text()
    assert source.count(mutant.old) >= 1, "the edit no longer applies"
    (csrc / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    others = OTHER_KERNELS.format(storage=mutant.storage)
    kernels, dropped = re.subn(others, "", (csrc / KERNEL).read_text(), flags=re.MULTILINE)
    assert dropped == len(harness.STORAGES) - 1
    (csrc / KERNEL).write_text(kernels)
    build = build_of(mutant, csrc, tmp_path, shipped)
    meant = MEANT_FOR.get(mutant.caught_by)
    cases = (case for storage, case in memory_cases() if storage == mutant.storage)
    # Up to the first case that shows it.
    assert any(mutant.caught_by in check(build) for check in ([meant] if meant else cases))
