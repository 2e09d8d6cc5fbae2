"""The CUDA kernels of coupled rows, executed from nvcc's PTX with the shipped host code's plans."""

from __future__ import annotations

import os

import cuda_harness as harness
import numpy as np
import ptx
import pytest
import rows_harness
from kernel_figures import resources
from resnet50_sizes import resnet50_row_sets
from rows_harness import Case, Options, RowSet, draw, draw_set

from resnet_reg_ext import _C

ARCH = "compute_90"
PLAIN = {"lr": 0.1, "momentum": 0.9, "l1": 0.02, "weight_decay": 0.1}
RIDGE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.5, "proximal": True}
# Of each storage, drawn; each is a dozen sets of several tensors (docs/verification.md).
CASES = int(os.environ.get("RESNET_REG_EXT_TEST_DRAWN_CASES", "2"))


def module():
    return harness.module_for(ARCH, source="rows.cu")


def check(case: Case, **more):
    """Kernel and NumPy reference agree to the byte; the interpreter has no finding."""
    outcome, _ = rows_harness.execute(module(), rows_harness.installed_plan, case, **more)
    for result in outcome.results:
        result.raise_if_findings()
    assert rows_harness.failed(outcome, case) == set()
    return outcome


def test_every_rounding_is_pinned():
    kernels = module().kernels
    names = [f"prox_sgd_rows_{storage}" for storage in _C.storages]
    assert sorted(kernels) == sorted([*names, *(f"{name}_start" for name in names)])
    for kernel in kernels.values():
        assert ptx.contractable(kernel) == []


@pytest.mark.parametrize("storage", harness.STORAGES)
def test_drawn_sets(storage):
    """Shapes, options, momentum modes, misalignments, special values, zeros counted."""
    rng = np.random.default_rng([*storage.encode()])
    dead, kernels = 0, set()
    for _ in range(CASES):
        case = rows_harness.draw_case(rng, storage, 12)
        outcome = check(case)
        kernels |= {result.kernel for result in outcome.results}
        dead += sum(outcome.zeros)
    assert dead > 1000
    assert len(kernels) == 2  # of sets without starts, and of those that have some


@pytest.mark.parametrize("storage", harness.STORAGES)
def test_factors_near_a_threshold(storage):
    """The order of the sum and each rounding on the way to the threshold show there."""
    outcome = check(rows_harness.near_thresholds(storage, 24, (1, 1100, 30)))
    if harness.STORAGES[storage].param != "float16":  # which has nothing so small
        assert 1 <= outcome.zeros[0] < 24
    held = rows_harness.HELD.get(storage, 5120)
    check(rows_harness.near_thresholds(storage, 40, (17, 2)))
    check(rows_harness.near_thresholds(storage, 6, (5, held + 1, 1, held + 600)))
    check(rows_harness.near_thresholds(storage, 12, (1, 1100, 30), towards_start=True))


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_rows_that_a_block_cannot_hold_are_read_twice(storage):
    rng = np.random.default_rng(3)
    held = rows_harness.HELD.get(storage, 5120)
    widths = [[held + 1, 1], [7, held - 8], [2 * held, 33], [3] * 130 + [1]]
    sets = [draw_set(rng, storage, 3, w, 2, skewed=n == 1) for n, w in enumerate(widths)]
    sets += [draw_set(rng, storage, 2, w, 2, starts=0.8) for w in widths[:2]]
    case = Case(storage, sets, [Options(PLAIN), Options(RIDGE, first=True)])
    outcome = check(case)
    # Of a whole number of vectors; the last has more segments than a block has sums for.
    assert outcome.results[0].counts.instructions["bar.sync"] > 0


def towards(rows, starts, weights):
    """What becomes of float32 rows with starts and a gradient of zero; lr and group_lasso are 1."""
    values, start = np.float32(rows), np.float32(starts)
    p, s = (of.ravel().view(np.uint32) for of in (values, start))
    tensor = harness.Tensor(p, np.zeros_like(p), np.zeros_like(p), start=s)
    one = RowSet([(tensor, 0)], len(values), np.array(weights, np.float64))
    outcome = check(Case("float32", [one], [Options({"lr": 1.0})], 1.0))
    return outcome.params[0].view(np.float32).reshape(values.shape)


def test_a_group_at_its_threshold_is_its_start_to_the_bit():
    start = np.random.default_rng(12).standard_normal((3, 2)).astype(np.float32)
    start[2] = [-0.0, 1e-40]
    away = np.float32([[-3, 4], [3, 4], [0.5, 0]])
    norms = np.sqrt(np.square(((start + away) - start).astype(np.float64)).sum(1))
    p = towards(start + away, start, norms * [1, 0.5, 1])
    assert np.array_equal(p[[0, 2]].view(np.uint32), start[[0, 2]].view(np.uint32))
    assert np.allclose(p[1], start[1] + away[1] / 2)


def test_towards_a_start_a_threshold_of_0_changes_nothing_and_a_nan_spreads():
    p = towards([[0.1, 1e-9], [np.nan, 2], [np.inf, 2]], [[0.7, 1], [1, 2], [1, 2]], [0, 9, 9])
    assert p[0].tolist() == np.float32([0.1, 1e-9]).tolist()
    assert np.isnan(p[1]).all()
    assert p[2].tolist() == [np.inf, 2]


def test_values_in_device_memory_are_those_of_the_host():
    rng = np.random.default_rng(4)
    on_device = {"lr": 0.1, "l1": 0.02, "grad_scale": 48.0, "grad_coefficient": 0.3}
    options = {**PLAIN, "grad_scale": 48.0, "grad_coefficient": 0.3}
    sets = [draw_set(rng, "float32", 5, [33, 1], 2), draw_set(rng, "float32", 2, [5200], 1)]
    sets.append(draw_set(rng, "float32", 3, [40, 1], 1, starts=1.0))
    given = [Options(options, False, on_device), Options({**RIDGE}, False, {"lr": 0.1})]
    check(Case("float32", sets, given))
    halves = Options(
        {**PLAIN, "lr": 0.125, "l1": 0.25}, False, {"lr": 0.125, "l1": 0.25}, "bfloat16"
    )
    check(Case("float32", sets[1:], [halves]))


def test_a_learning_rate_that_rounding_took_below_0_counts_as_0():
    rng = np.random.default_rng(5)
    one = draw_set(rng, "float32", 4, [40, 1], 1)
    check(Case("float32", [one], [Options({**PLAIN, "lr": 0.0}, False, {"lr": -1e-18})]))


@pytest.mark.parametrize("found_inf", [1.0, 0.5, float("nan")])
def test_a_step_that_found_an_infinity_changes_nothing(found_inf):
    rng = np.random.default_rng(6)
    sets = [draw_set(rng, "float32", 5, [33, 1], 1), draw_set(rng, "float32", 1, [5300], 1)]
    case = Case("float32", sets, [Options(PLAIN, False, {"found_inf": found_inf})])
    outcome, params = rows_harness.execute(module(), rows_harness.installed_plan, case)
    assert outcome.findings == []
    (result,) = outcome.results
    assert not any(name.startswith("st.global") for name in result.counts.instructions)
    assert outcome.zeros == [0, 0, 0]
    given = [t.p for one in sets for t, _ in one.members]
    assert all(np.array_equal(a, b) for a, b in zip(params, given, strict=True))


def of_values(rows, weights, **options):
    """What becomes of float32 rows with a gradient of zero; lr and group_lasso are 1."""
    values = np.array(rows, np.float32)
    bits = values.ravel().view(np.uint32)
    tensor = harness.Tensor(bits, np.zeros_like(bits), np.zeros_like(bits))
    one = RowSet([(tensor, 0)], len(values), np.array(weights, np.float64))
    case = Case("float32", [one], [Options({"lr": 1.0, **options})], 1.0)
    return check(case).params[0].view(np.float32).reshape(values.shape)


def test_a_group_at_its_threshold_is_zero():
    p = of_values([[-3.0, 4.0], [-3.0, 4.0], [3.0, -4.0]], [5.0, 4.0, 6.0])
    assert p.tolist() == [[0, 0], [-0.6000000238418579, 0.800000011920929], [0, 0]]
    assert not np.signbit(p[[0, 2]]).any()


def test_a_nan_makes_its_group_nan_and_a_threshold_of_0_changes_nothing():
    p = of_values([[np.nan, 4.0], [np.inf, 4.0], [1.0, 0.0]], [9.0, 9.0, 9.0])
    assert np.isnan(p[0]).all()
    assert p[1:].tolist() == [[np.inf, 4.0], [0.0, 0.0]]
    p = of_values([[-0.0, 0.0], [np.nan, 1.0]], [0.0, 0.0])
    assert np.signbit(p[0]).tolist() == [True, False]
    assert p[1, 1] == 1.0


def test_groups_of_one_weight():
    """A threshold in float64 on a set of single numbers: no segment is summed."""
    p = of_values([[2.0], [-1.0], [0.5], [-0.0]], [0.5, 2.0, 0.5, 0.0])
    assert p.ravel().tolist() == [1.5, 0.0, 0.0, 0.0]
    assert np.signbit(p).ravel().tolist() == [False, False, False, True]


# ---- the plan ------------------------------------------------------------------------------------


def planned(sets, storage="float32", options=(0.1,), capacity=0, start=0):
    """The launches for sets of (rows, widths, index of options), at made-up addresses."""
    described, address = [], 2**34
    for rows, widths, index in sets:
        members = []
        for width in widths:
            row = (address, address + 2**60, address + 2**61, 2**62, start, 0, rows * width)
            members.append((row, index))
            address += 2**34
        described.append((members, rows, 0.1, 1.0, 0))
    of_groups = [
        (harness.named_options({"lr": 0.1, "momentum": 0.9, "l1": l1}, False), {}) for l1 in options
    ]
    return rows_harness.installed_plan(storage, of_groups, described, capacity)


@pytest.mark.parametrize("storage", harness.STORAGES)
def test_resnet50s_sets_are_one_launch(storage):
    (launch,) = planned([(*one, 0) for one in resnet50_row_sets()], storage)
    assert launch["kernel"] == f"prox_sgd_rows_{storage}"
    (launch,) = planned([(*one, 0) for one in resnet50_row_sets()], storage, start=2**63)
    assert launch["kernel"] == f"prox_sgd_rows_{storage}_start"


def test_more_sets_groups_and_members_than_a_table_holds():
    assert len(planned([(4, [3], 0)] * 5, capacity=2)) == 3
    assert len(planned([(4, [3, 1], 0)] * 350)) == 2
    each = [(4, [3], i) for i in range(17)]
    assert len(planned(each, options=[0.1 * i for i in range(17)])) == 3
    assert len(planned(each, options=[0.1 * (i % 8) for i in range(17)])) == 1
    most, groups = _C.cuda_row_limits
    assert groups == 8
    (launch,) = planned([(2, [1] * most, 0)], "float64")
    assert len(launch["parameters"]) <= 32764
    with pytest.raises(ValueError, match="too large for one CUDA launch"):
        planned([(2, [1] * (most + 40), 0)], "float64")
    assert planned([]) == []


def test_more_tables_than_one_give_the_same_bits():
    case = rows_harness.draw_case(np.random.default_rng(8), "float32", 5)
    assert len(check(case, capacity=2).results) == 3


def test_no_spills_and_few_registers():
    for kernel, used in resources(harness.CSRC, "sm_80", harness.FLAGS, "rows.cu").items():
        wide = kernel in ("prox_sgd_rows_float16", "prox_sgd_rows_bfloat16")
        assert (used.stack, used.spills) == (0, 0), kernel
        assert used.registers <= (80 if wide or kernel.endswith("_start") else 64), kernel


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("starts", "bytes_an_element"), [(0.0, 20), (1.0, 24)])
def test_resnet50s_rows(starts, bytes_an_element):
    """Rows of its sets, of their own length: 20 or 24 bytes an element, by whole sectors."""
    rng = np.random.default_rng(9)
    groups = [Options(PLAIN), Options({**PLAIN, "l1": 0.0, "weight_decay": 0.0})]
    sets = []
    for rows, widths in resnet50_row_sets()[:: 6 if starts else 3]:
        some = min(rows, 16)
        tensors = [draw(rng, some, width, "float32") for width in widths]
        if starts:
            tensors = harness.with_starts(tensors, "float32")
        members = [(t, int(width == 1)) for t, width in zip(tensors, widths, strict=True)]
        sets.append(RowSet(members, some, float(np.sqrt(sum(widths)))))
    outcome, _ = rows_harness.execute(
        module(), rows_harness.installed_plan, Case("float32", sets, groups), races=False
    )
    (result,) = outcome.results
    result.raise_if_findings()
    elements = sum(len(t.p) for one in sets for t, _ in one.members)
    # Counters of zeros, which only those who ask for them have, are added to by atomics.
    counts = result.counts
    moved = counts.load.bytes + counts.store.bytes
    assert moved == pytest.approx(bytes_an_element * elements, rel=1e-3)
    assert counts.store.efficiency > 0.97
    assert rows_harness.failed(outcome, Case("float32", sets, groups)) == set()


def test_addresses_past_32_bits():
    """The first and the last rows of a parameter of 2^33 elements, on memory that exists there."""
    rows, width = 2**23, 1024
    zero = lambda start, count: bytes(count)  # noqa: E731
    arena = ptx.Arena()
    p, g = (arena.place_lazy(2**41 * (i + 1), rows * width * 4, fill=zero) for i in range(2))
    ends = (0, (rows - 1) * width * 4)
    ones = np.ones(width, np.float32).view(np.uint8)
    for end in ends:
        arena.write(g.address + end, ones)
    members = [((p.address, g.address, 0, 0, 0, 0, rows * width), 0)]
    chosen = harness.named_options({"lr": 0.5}, False)
    described = [(members, rows, 1.0, 16.0, 0)]
    (launch,) = rows_harness.installed_plan("float32", [(chosen, {})], described)
    result = ptx.launch(
        module(),
        launch["kernel"],
        grid=launch["grid"],
        block=launch["block"],
        params=launch["parameters"],
        memory=arena,
        blocks=[0, launch["grid"] - 1],
    )
    result.raise_if_findings()
    # v is -0.5: its norm is 16, the threshold 8.
    for end in ends:
        got = arena.read(p.address + end, width * 4).view(np.float32)
        assert (got == -0.25).all()
