"""Bugs planted in the kernels and the plan of coupled rows; each must be caught.

A mutant is a copy of csrc/ with one small edit, as in test_ptx_mutations.py. Of the kernels those
are compiled that its cases run.
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cuda_harness as harness
import numpy as np
import ptx
import pytest
import rows_harness
from rows_harness import Case, Options, RowSet, draw, draw_set

ARCH = "compute_90"
FLAGS = tuple(flag for flag in harness.FLAGS if flag != "-lineinfo")  # half of the PTX
KERNEL, SPANS, TABLE, PLAN = (
    f"cuda/{name}" for name in ("rows.cu", "row_spans.cuh", "row_table.h", "row_plan.cpp")
)
FACTOR = "math/row_factor.h"
PLAIN = {"lr": 0.1, "momentum": 0.9, "l1": 0.02, "weight_decay": 0.1}
RIDGE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5, "proximal": True}


class Mutant(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    caught_by: str = "bytes"
    storage: str = "float32"
    start: bool = False  # whether it shows in sets with starts


MUTANTS = [
    Mutant(
        "lanes added from neighbour to neighbour",
        SPANS,
        "distance = kLanes / 2; distance > 0; distance /= 2",
        "distance = 1; distance < kLanes; distance *= 2",
    ),
    Mutant("segments of 256", TABLE, "kSegment = 512", "kSegment = 256"),
    Mutant(
        "squares of float64 not rounded",
        SPANS,
        "add_(sum, mul_(x, x))",
        "fma_(x, x, sum)",
        storage="float64",
    ),
    Mutant(
        "segments added from the last to the first",
        SPANS,
        "row * count + i]",
        "row * count + count - 1 - i]",
    ),
    Mutant(
        "segments added to what the rows before have",
        KERNEL,
        "sum = add_(sum, with_squares(0.0, span",
        "sum = (with_squares(sum, span",
    ),
    Mutant("rows of a long group added up as one", KERNEL, "  of_member = 0.0;\n        }", "}"),
    Mutant(
        "a NaN becomes zero",
        FACTOR,
        "norm <= t ? 0.0 : sub_(1.0, div_(t, norm))",
        "norm > t ? sub_(1.0, div_(t, norm)) : 0.0",
    ),
    Mutant("a threshold of 0 clears -0", FACTOR, "t == 0.0 ? 1.0 : factor", "factor"),
    Mutant(
        "factor rounded twice",
        FACTOR,
        "sub_(1.0, div_(t, norm))",
        "sub_(1.0, static_cast<double>(static_cast<float>(div_(t, norm))))",
    ),
    Mutant("a weight of the next row", KERNEL, ": set.weights[row]", ": set.weights[row ^ 1]"),
    Mutant(
        "lr multiplied into a_g",
        FACTOR,
        "mul_(mul_(lr, lasso), weight)",
        "mul_(lr, mul_(lasso, weight))",
    ),
    Mutant(
        "no barrier before squares are added",
        KERNEL,
        "span, s, true);\n  });\n  __syncthreads();",
        "span, s, true);\n  });",
        "race",
    ),
    Mutant(
        "no barrier before factors are used",
        KERNEL,
        "lr, first + row, sum);\n  }\n  __syncthreads();",
        "lr, first + row, sum);\n  }",
        "race",
    ),
    Mutant(
        "no barrier between the parts of a row",
        KERNEL,
        "      __syncthreads();  // the next part",
        "      // the next part",
        "race",
    ),
    Mutant("momentum of a long row moved twice", KERNEL, "span, s, pass == 1)", "span, s, true)"),
    Mutant("ridge in the update too", KERNEL, "made.coefficients.scale = C(1);", ""),
    Mutant("zeros by a product", SPANS, "factor == C(0) ? C(0) : scaled", "scaled"),
    Mutant("factor of a unit's first row", SPANS, "++row;", ""),
    Mutant("alignment of the gradient forgotten", SPANS, "aligned<N>(span.arrays.grad) &&", "",
           "misaligned"),
    Mutant(
        "zeros of zero groups not counted",
        SPANS,
        "num_zeros += is_zero(stored.values[i]);",
        "num_zeros += factor != C(0) && is_zero(stored.values[i]);",
        "zeros",
    ),
    Mutant("members not behind the sets", PLAN, "set.first_member += header_.count;", "(void)set;"),
    Mutant("pieces of the last set only", PLAN, "pieces_ += pieces;", "pieces_ = pieces;"),
    Mutant("a full table dropped", PLAN, "if (!has_room(set, pieces)) flush();",
           "if (!has_room(set, pieces)) reset();"),
    Mutant("one group's options for all", PLAN, "place(member.options, listed_));",
           "0 * member.width);"),
    Mutant("more rows than a block has sums for", PLAN, "&& sums <= kMostSums", "&& sums >= 0",
           "any"),
    Mutant(
        "norm of the weights",
        SPANS,
        "return sub_(held[i], load(starts[i]));",
        "return held[i];",
        start=True,
    ),
    Mutant(
        "factor on the weight itself",
        FACTOR,
        "mul_(factor, sub_(p, start))",
        "mul_(factor, p)",
        start=True,
    ),
    Mutant(
        "a threshold of 0 rounds",
        FACTOR,
        "factor == C(1) ? p : scaled",
        "scaled",
        start=True,
    ),
    Mutant(
        "a start of 0 takes the sign of -0",
        FACTOR,
        "start == C(0) ? product : add_(start, product)",
        "add_(start, product)",
        start=True,
    ),
    Mutant("start of the neighbour", SPANS, "start = load(s.starts[from + i])",
           "start = load(s.starts[(from + i) ^ 1])", start=True),
    Mutant("no start read as one", SPANS, "if (kStart && t.start)", "if (kStart)", "any",
           start=True),
    Mutant("alignment of the start forgotten", SPANS,
           "(!kStart || aligned<N>(span.arrays.start)) &&", "", "misaligned", start=True),
    Mutant(
        "zeros counted where there are starts",
        SPANS,
        "is_at_start(stored.values[i], s.starts[from + i])",
        "is_zero(stored.values[i])",
        "zeros",
        start=True,
    ),
    Mutant(
        "ridge towards zero",
        SPANS,
        "scale_towards(start, scale_row_towards(start, held[i], factor), ridge)",
        "mul_(scale_row_towards(start, held[i], factor), ridge)",
        start=True,
    ),
    Mutant("sets that have some starts only", PLAN, "std::any_of(", "std::all_of(", start=True),
    Mutant("starts left out of the table", PLAN, "entry.start = o.start;", "", start=True),
]  # fmt: skip


def by_hand() -> Case:
    """A group with a NaN, and groups with a threshold of 0, one of them of negative zeros."""
    rows = np.array([[-3, 4], [np.nan, 4], [-0.0, 0], [1, 2], [-0.0, 0]], np.float32)
    bits = rows.ravel().view(np.uint32)
    tensor = harness.Tensor(bits, np.zeros_like(bits), np.zeros_like(bits))
    weights = np.array([4.0, 9.0, 0.0, 9.0, 1.0])
    return Case("float32", [RowSet([(tensor, 0)], 5, weights)], [Options({"lr": 1.0})], 1.0)


def by_hand_with_starts() -> Case:
    """Groups at and above their thresholds, without one, with a NaN, with signed zeros."""
    rows = np.float32([[-2, 6], [-2, 6], [0.1, 1e-9], [np.nan, 2], [-0.0, 7]])
    start = np.float32([[1, 2], [1, 2], [0.7, 1], [1, 2], [0, 0]])
    p, s = (of.ravel().view(np.uint32) for of in (rows, start))
    tensor = harness.Tensor(p, np.zeros_like(p), np.zeros_like(p), start=s)
    weights = np.array([5.0, 4.0, 0.0, 9.0, 1.0])
    return Case("float32", [RowSet([(tensor, 0)], 5, weights)], [Options({"lr": 1.0})], 1.0)


@functools.cache
def cases_with_starts() -> list[Case]:
    rng = np.random.default_rng(7)
    both = [Options(PLAIN), Options(RIDGE)]
    mixed = [draw_set(rng, "float32", 9, [33, 8, 1, 5], 2, starts=0.5) for _ in range(2)]
    skewed = draw(rng, 5, 24, "float32", (0, 0, 0, 0, 1))
    (skewed,) = harness.with_starts([skewed], "float32")
    wide = draw_set(rng, "float32", 40, [400, 1], 2, starts=1.0)._replace(weights=2.0)
    return [
        by_hand_with_starts(),
        Case("float32", [*mixed, RowSet([(skewed, 0)], 5, 1.0)], both),
        Case("float32", [wide], both),
    ]


@functools.cache
def cases(storage: str) -> list[Case]:
    """The quickest first."""
    near = rows_harness.near_thresholds(storage, 24, (1, 1100, 30))
    if storage == "float64":
        return [rows_harness.near_thresholds(storage, 40, (17, 2)), near]
    rng = np.random.default_rng(7)
    both = [Options(PLAIN), Options(RIDGE)]
    several = draw_set(rng, storage, 9, [33, 1, 5], 2)._replace(weights=2.0)
    members = [(draw(rng, 40, width, storage), 1) for width in (400, 1)]
    pieces = RowSet(members, 40, rng.choice([0.5, 20.0], 40) * rng.random(40))
    skewed = RowSet([(draw(rng, 5, 24, storage, (0, 1, 0)), 0)], 5, 1.0)
    narrow = RowSet([(draw(rng, 200, 2, storage), 0) for _ in range(6)], 200, 1.0)
    long = RowSet([(draw(rng, 1, width, storage), width % 2) for width in (5124, 1, 8)], 1, 3.0)
    stopped = [Options(PLAIN, False, {"found_inf": 1.0})]
    return [
        by_hand(),
        Case(storage, [skewed], stopped),
        Case(storage, [several, skewed], both),
        near,
        Case(storage, [several, pieces, skewed], both),
        Case(storage, [narrow], both),
        Case(storage, [long], both, counts_zeros=False),
        rows_harness.near_thresholds(storage, 3, (5, 5700, 5121)),
    ]


def failures(
    module: ptx.Module, plan: rows_harness.Plan, storage: str, start: bool = False
) -> Iterator[set[str]]:
    """The names of the checks that each case fails; two sets fill a table."""
    for case in cases_with_starts() if start else cases(storage):
        outcome, params = rows_harness.execute(module, plan, case, capacity=2, budget=20_000)
        if case.options[0].on_device:
            given = [t.p for one in case.sets for t, _ in one.members]
            same = all(map(np.array_equal, params, given))
            yield set() if same and not outcome.findings else {"bytes"}
        else:
            yield rows_harness.failed(outcome, case)


@pytest.mark.parametrize("storage", ["float32", "float64"])
def test_the_shipped_sources_pass_every_check(storage: str) -> None:
    module = harness.module_for(ARCH, source="rows.cu")
    assert set().union(*failures(module, rows_harness.installed_plan, storage)) == set()


def test_the_shipped_sources_pass_every_check_towards_a_start() -> None:
    module = harness.module_for(ARCH, source="rows.cu")
    assert set().union(*failures(module, rows_harness.installed_plan, "float32", True)) == set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(harness.CSRC, csrc)
    source = (csrc / mutant.file).read_text()
    assert source.count(mutant.old) >= 1, "the edit no longer applies"
    (csrc / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    kernel = csrc / KERNEL
    others = rf"\nPROX_SGD_ROW_KERNEL\((?!{mutant.storage}\)|storage)\w+\)"
    variant = rf"\n  PROX_SGD_ROW_KERNEL_OF\(.*, {'false' if mutant.start else 'true'}\)( *\\)?"
    text = re.sub(others, "", kernel.read_text())
    kernel.write_text(re.sub(variant, lambda found: "\n \\" if found[1] else "\n", text))
    module, plan = harness.module_for(ARCH, source="rows.cu"), rows_harness.installed_plan
    if mutant.file != PLAN:
        module = harness.module_for(ARCH, csrc, FLAGS, source="rows.cu")
    if mutant.file in (PLAN, TABLE):
        plan = rows_harness.compile_plan(csrc, tmp_path)
    # Up to the first case that shows it.
    assert any(
        mutant.caught_by in found or (mutant.caught_by == "any" and found)
        for found in failures(module, plan, mutant.storage, mutant.start)
    )
