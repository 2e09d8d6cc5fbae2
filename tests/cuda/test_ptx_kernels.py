"""The shipped CUDA kernels, executed from nvcc's PTX with the shipped host code's launch plans."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import cuda_harness as harness
import kernel_figures
import numpy as np
import ptx
import pytest
from cuda_harness import BITS, DEFAULTS, OPTIONS, UNITS_PER_BLOCK, VECTOR, option_id
from hypothesis import given, settings
from hypothesis import strategies as st
from resnet50_sizes import resnet50_groups, resnet50_sizes

from resnet_reg_ext import _C

DTYPES = tuple(harness.STORAGES)
ARCHITECTURES = ("compute_80", "compute_90", ptx.newest_arch())


DLPACK = {"float32": (2, 32), "float64": (2, 64), "float16": (2, 16), "bfloat16": (4, 16)}


class Bits(np.ndarray):
    """An array of bits with the dtype that they stand for."""

    dtype_name: str


def on_cpu(dtype, tensors, options, first):
    """The CPU kernel's result for the same bytes: parameters, momentum buffers and masters."""
    storage = harness.STORAGES[dtype]

    def stored(bits, name):
        array = bits.copy().view(Bits)
        array.dtype_name = name
        return array

    def describe(array):
        code, bits = DLPACK[array.dtype_name]
        return array.ctypes.data, 1, 0, code, bits, array.shape, (1,)

    ps = [stored(t.p, storage.param) for t in tensors]
    gs = [stored(t.g, storage.param) for t in tensors]
    ms = [stored(t.m, storage.momentum) for t in tensors] if options.get("momentum") else None
    ws = [stored(t.w, "float32") for t in tensors] if storage.master else None
    starts = None
    if tensors[0].start is not None:
        starts = [stored(t.start, storage.weight) for t in tensors]
    num_zeros = np.zeros(len(ps), np.int64)
    reader = _C.TensorReader(None, describe, None, Bits, Bits)
    reading = reader.read(ps, gs, ms, ws, num_zeros.ctypes.data, starts)
    assert reading.misfits == []
    chosen = _C.Options(**harness.named_options(options, first))
    _C.prox_sgd_(reader, [(reading, chosen, {})], 2)
    assert num_zeros.tolist() == harness.zeros_in(ps, dtype, tensors)
    return [[a.view(np.ndarray) for a in arrays or []] for arrays in (ps, ms, ws)]


def check(arch, dtype, tensors, options, *, first=False, **more):
    """Kernel, CPU backend and NumPy reference agree to the byte; the interpreter has no finding."""
    outcome = harness.execute(
        harness.module_for(arch),
        harness.installed_plan,
        dtype,
        tensors,
        options,
        first=first,
        count_zeros=True,
        **more,
    )
    for result in outcome.results:
        result.raise_if_findings()
    assert outcome.guards == []
    for source in (on_cpu, harness.expected):
        wanted = source(dtype, tensors, options, first)
        assert not any(harness.differing(outcome, wanted, dtype).values()), source.__name__
    assert outcome.zeros == harness.zeros_in(outcome.params, dtype, tensors)
    return outcome


def test_the_flags_are_those_of_the_build():
    assert _C.build_info()["cuda_flags"] == " ".join(harness.FLAGS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_rounding_is_pinned(arch):
    """No multiplication and addition that ptxas would be free to fuse."""
    module = harness.module_for(arch)
    sizes = ("12k", "32k", "start_12k")
    names = [f"prox_sgd_{d}_{size}" for d in _C.storages for size in sizes]
    assert sorted(ptx.list_kernels(module)) == sorted(names)
    assert _C.storages == DTYPES
    for kernel in module.kernels.values():
        assert ptx.contractable(kernel) == []


# Storages of one dtype on three architectures, the others on one.
ON_ARCHITECTURES = pytest.mark.parametrize(
    ("dtype", "arch"),
    [(d, a) for d in DTYPES for a in (ARCHITECTURES if d in BITS else ["compute_90"])],
)


@ON_ARCHITECTURES
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_every_option(options, dtype, arch):
    v = VECTOR[dtype]
    sizes = [v + 1, 0, 300, 256 * v * 2 + 3, 1]
    tensors = [*harness.make_tensors(sizes, dtype, seed=1), harness.signed_zeros(dtype)]
    check(arch, dtype, tensors, options, first=False)
    if options.get("momentum"):
        check(arch, dtype, tensors, options, first=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_every_option_towards_a_start(options, dtype):
    v = VECTOR[dtype]
    sizes = [v + 1, 0, 300, 256 * v * 2 + 3, 1]
    plain = [*harness.make_tensors(sizes, dtype, seed=1), harness.signed_zeros(dtype)]
    tensors = harness.with_starts(plain, dtype)
    check("compute_90", dtype, tensors, options, first=options.get("momentum") == 0.9)
    if options.get("momentum"):
        check("compute_90", dtype, tensors, options, first=options["momentum"] != 0.9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=option_id)
def test_a_start_of_zeros_gives_the_bits_of_none(options, dtype):
    plain = [*harness.make_tensors([300], dtype, seed=14), harness.signed_zeros(dtype)]
    zeros = [
        dataclasses.replace(t, start=np.zeros_like(t.p if t.w is None else t.w)) for t in plain
    ]
    outcomes = [
        harness.execute(
            harness.module_for("compute_90"),
            harness.installed_plan,
            dtype,
            tensors,
            options,
            count_zeros=True,
        )
        for tensors in (plain, zeros)
    ]
    assert [o.findings for o in outcomes] == [[], []]
    one, other = ((o.params, o.momenta, o.masters) for o in outcomes)
    assert not any(harness.differing(outcomes[0], other, dtype).values())
    assert len(one[0]) == len(other[0]) == 2
    assert outcomes[0].zeros == outcomes[1].zeros


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "float64"])
@pytest.mark.parametrize("options", [OPTIONS[7], OPTIONS[9]], ids=option_id)
def test_float32_kernels_count_in_float64_only_for_what_the_device_holds(options, dtype):
    """On most GPUs float64 is 32 or 64 times slower."""
    tensors = harness.make_tensors([300], dtype, seed=13)

    def wide(on_device):
        outcome = check("compute_90", dtype, tensors, options, on_device=on_device)
        (result,) = outcome.results
        return [name for name in result.counts.instructions if ".f64" in name]

    assert wide(None) == []
    assert wide({"lr": 0.1}) != []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [OPTIONS[7], OPTIONS[10]], ids=option_id)
def test_values_in_device_memory_are_those_of_the_host(options, dtype):
    """Learning rate, l1, scale and coefficient are read when the kernel runs, to the same bits."""
    tensors = harness.make_tensors([VECTOR[dtype] + 1, 300], dtype, seed=10)
    values = {**DEFAULTS, **options}
    everything = {name: values[name] for name in harness.ON_DEVICE[:-1]} | {"found_inf": 0.0}
    check("compute_80", dtype, tensors, options, on_device=everything)
    for name in harness.ON_DEVICE[:-1]:
        check("compute_80", dtype, tensors, options, on_device={name: values[name]})


@pytest.mark.parametrize("number_dtype", ["float32", "float16", "bfloat16"])
def test_lr_and_l1_are_read_in_their_own_type(number_dtype):
    tensors = harness.make_tensors([300], "float32", seed=10)
    options = {**OPTIONS[7], "lr": 0.125, "l1": 0.25}
    on_device = {name: options[name] for name in ("lr", "l1")}
    check("compute_80", "float32", tensors, options, on_device=on_device, number_dtype=number_dtype)


@pytest.mark.parametrize("name", ["lr", "l1"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_the_device_holds_counts_as_0_where_rounding_took_it_below(dtype, name):
    tensors = [*harness.make_tensors([300], dtype, seed=11), harness.signed_zeros(dtype)]
    options = {**OPTIONS[7], name: 0.0}
    check("compute_80", dtype, tensors, options, on_device={name: -1e-18})


def test_frozen_zeros_stop_the_shrinkage_of_an_l1_in_device_memory():
    tensors = harness.make_tensors([300], "float32", seed=11)
    check("compute_80", "float32", tensors, OPTIONS[9], on_device={"l1": 0.03})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [False, True])
def test_a_step_that_found_an_infinity_changes_nothing(dtype, first):
    tensors = harness.make_tensors([VECTOR[dtype] + 1, 300], dtype, seed=12)
    outcome = harness.execute(
        harness.module_for("compute_80"),
        harness.installed_plan,
        dtype,
        tensors,
        OPTIONS[4],
        count_zeros=True,
        on_device={"found_inf": 1.0, "lr": 0.1},
    )
    for result in outcome.results:
        result.raise_if_findings()
        assert not any(name.startswith("st.global") for name in result.counts.instructions)
    assert outcome.guards == []
    assert outcome.zeros == [0, 0]


@ON_ARCHITECTURES
def test_sizes_across_every_boundary(dtype, arch):
    sizes = [*harness.boundary_sizes(dtype), UNITS_PER_BLOCK * VECTOR[dtype] * 3 + 5]
    check(arch, dtype, harness.make_tensors(sizes, dtype, seed=2), OPTIONS[4])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_combination_of_alignments(dtype):
    skews = list(itertools.product((0, 1), (0, 1), (0, VECTOR[dtype] - 1)))
    sizes = [VECTOR[dtype] * 3 + 1, 1000] * len(skews)
    tensors = harness.make_tensors(sizes, dtype, seed=3, skews=[s for s in skews for _ in (0, 1)])
    check("compute_90", dtype, tensors, OPTIONS[5])
    check("compute_90", dtype, tensors, OPTIONS[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_alignment_of_a_start(dtype):
    skews = [(0, 0, 0, 0, skew) for skew in range(VECTOR[dtype])]
    sizes = [VECTOR[dtype] * 3 + 1] * len(skews)
    tensors = harness.make_tensors(sizes, dtype, seed=3, skews=skews)
    check("compute_90", dtype, harness.with_starts(tensors, dtype), OPTIONS[5])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_more_tensors_than_a_table_holds(dtype):
    tensors = harness.make_tensors([(i * 7) % 13 for i in range(1900)], dtype, seed=4)
    outcome = check("compute_90", dtype, tensors, OPTIONS[4])
    assert len(outcome.results) == 4  # 508 or so to a table; empty tensors take no place


@pytest.mark.parametrize("sizes", [[0], [0, 0], [0, 5], [5, 0], [0, 5, 0, 0, 4096, 0]], ids=str)
@pytest.mark.parametrize("capacity", [0, 1])
def test_empty_tensors_take_no_place(sizes, capacity):
    tensors = harness.make_tensors(sizes, "float32", seed=5)
    outcome = check("compute_90", "float32", tensors, OPTIONS[4], capacity=capacity)
    filled = sum(n > 0 for n in sizes)
    assert len(outcome.results) == (filled if capacity else min(filled, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_share_a_launch(dtype):
    """Each with its options, momentum mode and values in device memory."""
    v = VECTOR[dtype]
    groups = [
        harness.Group(harness.make_tensors(sizes, dtype, seed=20 + i), options, first, on_device)
        for i, (sizes, options, first, on_device) in enumerate(
            [
                ([v + 1, 0, 300], OPTIONS[4], False, None),
                ([0], OPTIONS[4], False, None),
                ([5, 256 * v * 2 + 3], OPTIONS[5], True, None),
                ([7, 300], OPTIONS[7], False, {"lr": 0.1, "l1": 0.1}),
                ([1025 * v, 2], OPTIONS[4], False, {"lr": 0.1, "l1": 0.03}),
            ]
        )
    ]
    outcome = harness.execute_groups(
        harness.module_for("compute_90"),
        harness.installed_plan,
        dtype,
        groups,
        count_zeros=True,
    )
    (result,) = outcome.results
    result.raise_if_findings()
    assert outcome.guards == []
    each = [harness.expected(dtype, g.tensors, g.options, g.first) for g in groups]
    wanted = tuple([a for of_group in each for a in of_group[i]] for i in range(3))
    assert not any(harness.differing(outcome, wanted, dtype).values())
    assert outcome.zeros == harness.zeros_in(outcome.params, dtype)


def test_a_group_that_found_an_infinity_stops_no_other():
    tensors = [harness.make_tensors([300], "float32", seed=i) for i in range(2)]
    outcome = harness.execute_groups(
        harness.module_for("compute_90"),
        harness.installed_plan,
        "float32",
        [
            harness.Group(tensors[0], OPTIONS[4], on_device={"found_inf": 1.0}),
            harness.Group(tensors[1], OPTIONS[4], on_device={"found_inf": 0.0}),
        ],
    )
    wanted = harness.expected("float32", tensors[1], OPTIONS[4], False)
    assert np.array_equal(outcome.params[0], tensors[0][0].p)
    assert harness.differences(outcome.params[1:], wanted[0], "float32") == 0


@pytest.mark.parametrize("number", [8, 9, 17])
def test_more_groups_than_a_table_holds(number):
    groups = [
        harness.Group(harness.make_tensors([4 + i], "float32", seed=i), {"lr": 0.01 * (i + 1)})
        for i in range(number)
    ]
    outcome = harness.execute_groups(
        harness.module_for("compute_90"), harness.installed_plan, "float32", groups
    )
    assert len(outcome.results) == -(-number // 8)
    for i, group in enumerate(groups):
        wanted = harness.expected("float32", group.tensors, group.options, False)
        assert harness.differences(outcome.params[i : i + 1], wanted[0], "float32") == 0


@pytest.mark.parametrize("shapes", kernel_figures.MODELS)
@pytest.mark.parametrize("storage", ["float32", "float64", "bfloat16"])
def test_no_block_walks_more_than_4_pieces(shapes, storage):
    """One behind the other, each takes as long as memory to answer."""
    groups = kernel_figures.MODELS[shapes]
    assert kernel_figures.busiest_block(harness.installed_plan, storage, groups) <= 4


def test_one_misaligned_gradient_leaves_the_other_accesses_whole():
    """As where gradients are views into DDP's buckets."""
    tensors = harness.make_tensors([4096], "float32", seed=3, skews=[(0, 1, 0)])
    outcome = check("compute_90", "float32", tensors, OPTIONS[4])
    done = outcome.results[0].counts.instructions
    assert not any(name in done for name in ("st.global.f32", "st.global.b32"))
    assert sum(n for name, n in done.items() if name.startswith("st.global.v4")) > 0


def test_one_huge_among_many_tiny():
    sizes = [1, 3, 2] * 40 + [150_001] + [5, 1] * 40
    check("compute_90", "float32", harness.make_tensors(sizes, "float32", seed=6), OPTIONS[4])


@st.composite
def buckets(draw):
    dtype = draw(st.sampled_from(DTYPES))
    boundary = st.sampled_from(harness.boundary_sizes(dtype))
    sizes = draw(st.lists(st.one_of(boundary, st.integers(0, 600)), min_size=1, max_size=7))
    skew = st.integers(0, VECTOR[dtype] - 1)
    skews = draw(st.lists(st.tuples(skew, skew, skew), min_size=1, max_size=3))
    options = draw(st.sampled_from(OPTIONS))
    return dtype, sizes, skews, options, draw(st.booleans()), draw(st.sampled_from([0, 1, 2, 3]))


@settings(max_examples=60)
@given(buckets(), st.integers(0, 2**16))
def test_any_bucket(bucket, seed):
    dtype, sizes, skews, options, first, capacity = bucket
    tensors = harness.make_tensors(sizes, dtype, seed=seed, skews=skews)
    check("compute_90", dtype, tensors, options, first=first, capacity=capacity)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sizes_and_addresses_past_32_bits(arch):
    """A tensor of 2^32 + 1001 elements: its first, last and in-between blocks, and no others."""
    numel = 2**32 + 1001
    chunk = UNITS_PER_BLOCK * 4
    options = OPTIONS[4]

    def fill(factor):
        return lambda start, count: to_pattern(np.arange(start, start + count), factor)

    def to_pattern(offsets, factor):
        words = ((offsets // 4) * factor % 1009).astype(np.float32) / np.float32(1009)
        shift = (offsets % 4).astype(np.uint32) * 8
        return (words.view(np.uint32) >> shift).astype(np.uint8)

    arena = ptx.Arena()
    spans = [
        arena.place_lazy(2**40 * (i + 1), numel * 4, name=name, fill=fill(factor))
        for i, (name, factor) in enumerate([("param", 7), ("grad", 11), ("momentum", 13)])
    ]
    row = (*(s.address for s in spans), 0, 0, 0, numel)
    bucket = ([row], harness.named_options(options, False), {})
    (launch,) = harness.installed_plan("float32", [bucket])
    assert launch["grid"] == -(-numel // chunk)
    blocks = [0, 2**31 // chunk - 1, 2**31 // chunk, 2**32 // chunk - 1, 2**32 // chunk]
    result = ptx.launch(
        harness.module_for(arch),
        launch["kernel"],
        grid=launch["grid"],
        block=launch["block"],
        params=launch["parameters"],
        memory=arena,
        blocks=blocks,
    )
    result.raise_if_findings()
    for block in blocks:
        begin, end = block * chunk, min((block + 1) * chunk, numel)
        offsets = np.arange(begin * 4, end * 4, dtype=np.int64)
        t = harness.Tensor(*(to_pattern(offsets, f).view(np.uint32) for f in (7, 11, 13)))
        params, momenta, _ = harness.expected("float32", [t], options, False)
        for span, wanted in ((spans[0], params[0]), (spans[2], momenta[0])):
            got = arena.read(span.address + begin * 4, (end - begin) * 4).view(np.uint32)
            assert np.array_equal(got, wanted), (block, span.name)


def test_a_bucket_too_large_for_a_grid_is_refused():
    rows = [(16, 32, 48, 0, 0, 0, 2**43)]
    bucket = (rows, harness.named_options({"lr": 0.1}, False), {})
    with pytest.raises(ValueError, match="too large for one CUDA grid"):
        harness.installed_plan("float64", [bucket])


# ---- tables of 4 KiB, for a toolkit before CUDA 12.1 --------------------------------------------


def test_small_tables(tmp_path: Path):
    define = "-DPROX_SGD_PARAMETER_BYTES=4096"
    plan = harness.compile_plan(harness.CSRC, tmp_path, [define])
    module = harness.module_for("compute_80", flags=(*harness.FLAGS, define))
    tensors = harness.make_tensors([(i * 5) % 11 + 1 for i in range(250)], "float32", seed=7)
    outcome = harness.execute(module, plan, "float32", tensors, OPTIONS[4])
    assert outcome.findings == []
    assert outcome.guards == []
    # Some 43 tensors to a table.
    assert len(outcome.results) in (5, 6, 7)
    wanted = harness.expected("float32", tensors, OPTIONS[4], False)
    assert not any(harness.differing(outcome, wanted, "float32").values())


def test_cache_hints_change_no_bits():
    """A variant that no build has, until a GPU has measured it."""
    define = "-DPROX_SGD_CACHE_HINTS"
    module = harness.module_for("compute_80", flags=(*harness.FLAGS, define))
    for dtype in ("float32", "bfloat16_master"):
        tensors = harness.make_tensors([3, 4096], dtype, seed=7)
        outcome = harness.execute(module, harness.installed_plan, dtype, tensors, OPTIONS[4])
        assert outcome.findings == []
        hinted = [n for n in outcome.results[0].counts.instructions if ".global.cs" in n]
        assert {name[:2] for name in hinted} == {"ld", "st"}
        wanted = harness.expected(dtype, tensors, OPTIONS[4], False)
        assert not any(harness.differing(outcome, wanted, dtype).values())


# ---- ResNet-50 whole -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options", "towards_start", "bytes_an_element"),
    [
        ("float32", OPTIONS[4], False, 20),
        ("float32", OPTIONS[4], True, 24),
        ("bfloat16", OPTIONS[4], False, 10),
        ("float32", OPTIONS[1], False, 12),
        ("float32_momentum_bfloat16", OPTIONS[4], False, 16),
    ],
    ids=[
        "float32",
        "float32-start",
        "bfloat16",
        "float32-without-momentum",
        "float32-momentum-bfloat16",
    ],
)
def test_resnet50_whole(dtype, options, towards_start, bytes_an_element):
    sizes = resnet50_sizes()
    assert len(sizes) == 161
    assert sum(sizes) == 25_557_032
    rng = np.random.default_rng(0)
    storage = harness.STORAGES[dtype]
    pools = {d: harness.draw(2**20 + 7, d, rng, 0.03) for d in (storage.param, storage.momentum)}

    def drawn(n, stored):
        return np.resize(np.roll(pools[stored], int(rng.integers(2**20))), n)

    stored = (storage.param, storage.param, storage.momentum)
    tensors = [harness.Tensor(*(drawn(n, d) for d in stored)) for n in sizes]
    if towards_start:
        tensors = harness.with_starts(tensors, dtype)
    outcome = harness.execute(
        harness.module_for("compute_90"),
        harness.installed_plan,
        dtype,
        tensors,
        options,
        races=False,
    )
    (result,) = outcome.results  # one launch
    result.raise_if_findings()
    assert outcome.guards == []
    wanted = on_cpu(dtype, tensors, options, False)
    assert not any(harness.differing(outcome, wanted, dtype).values())

    counts = result.counts
    assert counts.bytes == bytes_an_element * sum(sizes)
    assert counts.load.efficiency >= 0.995
    assert counts.store.efficiency >= 0.995
    assert counts.imbalance <= 1.02


def test_resnet50s_two_groups_are_one_launch_of_12_kib():
    groups = resnet50_groups()
    (launch,) = kernel_figures.launches_of(harness.installed_plan, "float32", groups)
    assert len(launch["parameters"]) <= 12 * 1024
    assert sorted(n for group in groups for n in group) == sorted(resnet50_sizes())


def test_defaults_cover_every_option():
    assert {k for options in OPTIONS for k in options} == set(DEFAULTS)
