"""Control flow, barriers, warps and launches; and the project's own kernel from end to end."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from ptx import Arena, launch, parse
from ptx.snippets import module, run

Array = np.ndarray

START = "mov.u32 %r0, %tid.x; mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0;\n"
STORE = "\nst.global.u32 [%rd5], %r9;"


def each_thread(body: str, threads: int = 32, **options) -> tuple[Array, object]:
    """What threads leave in `%r9`, and the result of the launch."""
    arena = Arena()
    output = arena.allocate(4 * threads, data=bytes(4 * threads))
    result = run(START + body + STORE, output.address, memory=arena, threads=threads, **options)
    return arena.read(output.address, output.size).view(np.uint32), result


# ---- control flow --------------------------------------------------------------------------------


def test_branches_part_and_meet_again():
    body = """
      setp.lt.u32 %p1, %r0, 20; @%p1 bra small;
      mov.u32 %r9, 2; bra.uni join;
    small: setp.lt.u32 %p2, %r0, 7; @!%p2 bra middle;
      mov.u32 %r9, 0; bra.uni join;
    middle: mov.u32 %r9, 1;
    join: add.u32 %r9, %r9, 10; activemask.b32 %r8; setp.eq.u32 %p3, %r8, -1;
      @!%p3 mov.u32 %r9, 99;
    """
    values, result = each_thread(body)
    result.raise_if_findings()
    assert values.tolist() == [10] * 7 + [11] * 13 + [12] * 12
    assert result.counts.instructions["bra.uni"] == 12 + 7


def test_loops_run_for_each_thread_its_own_times():
    body = """
      mov.u32 %r9, 0; mov.u32 %r1, 0;
    again: setp.ge.u32 %p1, %r1, %r0; @%p1 bra out;
      add.u32 %r1, %r1, 1; add.u32 %r9, %r9, %r1; bra again;
    out:
    """
    values, result = each_thread(body, threads=100)
    result.raise_if_findings()
    assert (values == np.arange(100) * (np.arange(100) + 1) // 2).all()


def test_threads_may_leave_early():
    values, result = each_thread("mov.u32 %r9, 5; setp.gt.u32 %p1, %r0, 9; @%p1 ret;", threads=70)
    result.raise_if_findings()
    assert values.tolist() == [5] * 10 + [0] * 60


def test_guards_leave_other_threads_alone():
    body = "mov.u32 %r9, 1; setp.eq.u32 %p1, %r0, 3; @%p1 add.u32 %r9, %r9, %r0;"
    values, _ = each_thread(body, threads=5)
    assert values.tolist() == [1, 1, 1, 4, 1]


def test_a_hang_is_a_finding():
    _, result = each_thread("again: bra again;", threads=64, grid=4, budget=1000)
    assert result.finding_counts == {"budget": 1}
    assert result.findings[0].instruction.endswith("bra again;")


def test_a_trap_is_a_finding_and_ends_the_thread():
    values, result = each_thread("mov.u32 %r9, 1; setp.eq.u32 %p1, %r0, 3; @%p1 trap;", threads=5)
    assert result.finding_counts == {"trap": 1}
    assert result.findings[0].thread == (3, 0, 0)
    assert values.tolist() == [1, 1, 1, 0, 1]


def test_special_registers():
    names = [f"%{n}.{a}" for n in ("tid", "ntid", "ctaid", "nctaid") for a in "xyz"]
    names += ["%laneid", "%warpid", "%nwarpid"]
    names += [f"%lanemask_{r}" for r in ("eq", "lt", "le", "gt", "ge")]
    grid, block = (3, 2, 4), (5, 4, 3)
    threads, blocks = 60, 24
    arena = Arena()
    output = arena.allocate(threads * blocks * len(names) * 4)
    body = """
      mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.x; mad.lo.u32 %r3, %r1, 5, %r2;
      mov.u32 %r1, %tid.z; mad.lo.u32 %r3, %r1, 20, %r3;
      mov.u32 %r1, %ctaid.z; mov.u32 %r2, %ctaid.y; mad.lo.u32 %r4, %r1, 2, %r2;
      mov.u32 %r1, %ctaid.x; mad.lo.u32 %r4, %r4, 3, %r1; mad.lo.u32 %r3, %r4, 60, %r3;
    """
    body += f"mul.wide.u32 %rd1, %r3, {4 * len(names)}; add.s64 %rd1, %rd1, %rd0;\n"
    for i, name in enumerate(names):
        body += f"mov.u32 %r1, {name}; st.global.u32 [%rd1+{4 * i}], %r1;\n"
    params = struct.pack("<Q", output.address)
    launch(module(body, 1), "test", grid, block, params, arena).raise_if_findings()
    values = arena.read(output.address, output.size).view(np.uint32).reshape(-1, len(names)).T
    index = np.arange(threads * blocks)
    thread, cta = index % threads, index // threads
    lane = thread % 32
    expected = [thread % 5, thread // 5 % 4, thread // 20, *block]
    expected += [cta % 3, cta // 3 % 2, cta // 6, *grid, lane, thread // 32, 2]
    expected += [1 << lane, (1 << lane) - 1, (2 << lane) - 1]
    expected += [2**32 - (2 << lane), 2**32 - (1 << lane)]
    for name, value, right in zip(names, values, expected, strict=True):
        assert (value == right).all(), name


# ---- barriers ------------------------------------------------------------------------------------

REVERSE = """.shared .align 4 .b8 fast[400];
  shl.b32 %r1, %r0, 2; st.shared.u32 [%r1], %r0;
  {barrier}
  mov.u32 %r2, %ntid.x; sub.u32 %r2, %r2, %r0; sub.u32 %r2, %r2, 1; shl.b32 %r2, %r2, 2;
  ld.shared.u32 %r9, [%r2];
"""


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "barrier.sync 3;", "bar.sync 1, 100;"])
def test_a_barrier_orders_a_block(barrier):
    values, result = each_thread(REVERSE.format(barrier=barrier), threads=100)
    result.raise_if_findings()
    assert (values == 99 - np.arange(100)).all()


def test_batches_have_shared_memory_of_their_own():
    values, result = each_thread(
        REVERSE.format(barrier="bar.sync 0;"), threads=100, grid=3, races=False, batch_threads=100
    )
    result.raise_if_findings()
    assert (values.reshape(-1, 100)[-1] == 99 - np.arange(100)).all()


def test_a_barrier_may_stand_in_both_branches():
    barrier = """setp.lt.u32 %p1, %r0, 50; @%p1 bra low;
      bar.sync 0; bra.uni on;
      low: bar.sync 0;
      on:
    """
    values, result = each_thread(REVERSE.format(barrier=barrier), threads=100)
    result.raise_if_findings()
    assert (values == 99 - np.arange(100)).all()


def test_barriers_in_a_loop_that_blocks_leave_at_different_times():
    body = """mov.u32 %r1, %ctaid.x; mov.u32 %r9, 0;
    again: bar.sync 0; add.u32 %r9, %r9, 1; setp.le.u32 %p1, %r9, %r1; @%p1 bra again;
    """
    _, result = each_thread(body, grid=5, races=False)
    result.raise_if_findings()
    assert result.counts.instructions["bar.sync"] == 32 * (1 + 2 + 3 + 4 + 5)


def test_a_barrier_that_some_threads_never_reach():
    body = "setp.eq.u32 %p1, %r0, 7; @%p1 bra out; bar.sync 0; out: mov.u32 %r9, 1;"
    values, result = each_thread(body, grid=2, races=False)
    assert result.finding_counts == {"barrier": 2}
    assert [f.block for f in result.findings] == [(0, 0, 0), (1, 0, 0)]
    assert (values == 1).all()


def test_barriers_that_reduce():
    body = """setp.lt.u32 %p1, %r0, {}; bar.red.popc.u32 %r9, 0, %p1;
      bar.red.and.pred %p2, 0, %p1; bar.red.or.pred %p3, 0, !%p1;
      @%p2 add.u32 %r9, %r9, 1000; @%p3 add.u32 %r9, %r9, 2000;
    """
    for limit, expected in ((0, 2000), (40, 2040), (70, 1070)):
        values, result = each_thread(body.format(limit), threads=70)
        result.raise_if_findings()
        assert (values == expected).all()


# ---- warps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "offset", "limits", "source"),
    [
        ("idx", "5", 31, lambda i: 5),
        ("idx", "%r0", 31, lambda i: i),
        ("idx", "3", 0x1C1F, lambda i: (i & 28) | 3),
        ("up", "4", 0, lambda i: i - 4 if i >= 4 else i),
        ("up", "2", 0x1800, lambda i: i - 2 if i % 8 >= 2 else i),
        ("down", "4", 31, lambda i: i + 4 if i + 4 < 32 else i),
        ("down", "2", 0x181F, lambda i: i + 2 if i % 8 + 2 < 8 else i),
        ("bfly", "16", 31, lambda i: i ^ 16),
        ("bfly", "1", 31, lambda i: i ^ 1),
    ],
)
def test_shuffles(mode, offset, limits, source):
    body = f"""mad.lo.u32 %r1, %r0, 3, 7;
      shfl.sync.{mode}.b32 %r9|%p1, %r1, {offset}, {limits}, -1; @!%p1 add.u32 %r9, %r9, 1000;
    """
    values, result = each_thread(body, threads=64)
    result.raise_if_findings()
    for i, value in enumerate(values.tolist()):
        lane = source(i % 32)
        outside = mode in ("up", "down") and lane == i % 32
        assert value == (i // 32 * 32 + lane) * 3 + 7 + 1000 * outside


def test_a_sum_over_a_warp():
    steps = "".join(
        f"shfl.sync.bfly.b32 %r1, %r9, {o}, 31, -1; add.u32 %r9, %r9, %r1;"
        for o in (16, 8, 4, 2, 1)
    )
    values, result = each_thread("mov.u32 %r9, %r0;" + steps, threads=64)
    result.raise_if_findings()
    assert values.tolist() == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_votes():
    body = """and.b32 %r1, %r0, 1; setp.eq.u32 %p1, %r1, 1; setp.ge.u32 %p4, %r0, 32;
      vote.sync.ballot.b32 %r9, %p1, -1;
      vote.sync.any.pred %p2, %p4, -1; vote.sync.all.pred %p3, !%p4, -1;
      @%p2 add.u32 %r9, %r9, 1; @%p3 add.u32 %r9, %r9, 2;
    """
    values, result = each_thread(body, threads=70)
    result.raise_if_findings()
    odd = 0xAAAAAAAA
    assert values.tolist() == [odd + 2] * 32 + [odd + 1] * 32 + [0b101010 + 1] * 6


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("add.u32", 496), ("min.s32", 0), ("max.u32", 31), ("and.b32", 0), ("or.b32", 31)],
)
def test_reductions_over_a_warp(operation, expected):
    values, result = each_thread(f"redux.sync.{operation} %r9, %r0, -1;")
    result.raise_if_findings()
    assert (values == expected).all()


def test_lanes_wait_for_their_mask_in_divergent_code():
    """Lanes arrive at the shuffle in two passes of a loop, and half of them at a time vote."""
    body = """mov.u32 %r1, 0; setp.lt.u32 %p1, %r0, 16; selp.u32 %r2, 0xFFFF, 0xFFFF0000, %p1;
      @%p1 bra meet;
    delay: add.u32 %r1, %r1, 1; setp.lt.u32 %p2, %r1, 9; @%p2 bra delay;
    meet: shfl.sync.bfly.b32 %r9, %r1, 16, 31, -1;
      @%p1 bra vote; add.u32 %r9, %r9, 100;
    vote: vote.sync.ballot.b32 %r3, %p1, %r2; popc.b32 %r3, %r3; add.u32 %r9, %r9, %r3;
    """
    values, result = each_thread(body)
    result.raise_if_findings()
    assert values.tolist() == [9 + 16] * 16 + [100] * 16


def test_lanes_that_never_arrive_are_reported():
    body = """setp.eq.u32 %p1, %r0, 5; @%p1 bra apart;
      vote.sync.ballot.b32 %r9, %p1, -1; bra.uni on;
    apart: bar.sync 0; bra.uni on;
    on: bar.sync 0;
    """
    _, result = each_thread(body)
    assert result.finding_counts["absent-lane"] == 31


def test_shuffles_from_lanes_that_do_not_exist():
    _, result = each_thread("shfl.sync.idx.b32 %r9, %r0, 20, 31, -1;", threads=40)
    assert result.finding_counts == {"absent-lane": 8}
    _, result = each_thread("shfl.sync.idx.b32 %r9, %r0, 2, 31, 0xFF;", threads=9)
    assert result.finding_counts == {"absent-lane": 1}
    assert "does not name" in result.findings[0].message


def test_a_warp_barrier_lets_all_through():
    values, result = each_thread("bar.warp.sync -1; mov.u32 %r9, 1;", threads=40)
    result.raise_if_findings()
    assert (values == 1).all()


# ---- launches ------------------------------------------------------------------------------------


def test_some_blocks_of_a_huge_grid():
    arena = Arena()
    region = arena.place_lazy(1 << 40, 4 * (2**31 - 1), fill=lambda offset, n: bytes(n))
    body = """mov.u32 %r1, %ctaid.x; mul.wide.u32 %rd5, %r1, 4; add.s64 %rd5, %rd5, %rd0;
      add.u32 %r1, %r1, 1; st.global.u32 [%rd5], %r1;
    """
    chosen = (0, 5, 2**30, 2**31 - 2)
    grid = 2**31 - 1
    result = run(body, region.address, memory=arena, grid=grid, blocks=chosen, batch_threads=2)
    result.raise_if_findings()
    assert result.counts.block_bytes.tolist() == [4] * 4
    for block in chosen:
        stored = arena.read(region.address + 4 * block, 4).view(np.uint32)
        assert stored.tolist() == [block + 1]
    assert arena.read(region.address + 4, 4).tolist() == [0] * 4


def test_batches_of_any_size_give_the_same():
    body = "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r9, %r1, 100, %r0;"
    for batch_threads in (1, 32, 100, 1 << 20):
        values, result = each_thread(body, grid=7, races=False, batch_threads=batch_threads)
        result.raise_if_findings()
        assert (values == 600 + np.arange(32)).all()
        assert len(result.counts.block_bytes) == 7


@pytest.mark.parametrize(
    ("grid", "block", "params", "message"),
    [
        (1, 1025, 8, "1025 threads"),
        (0, 32, 8, "no device"),
        (2**31, 32, 8, "no device"),
        ((1, 65536), 32, 8, "no device"),
        (1, 32, 7, "takes 8 bytes of parameters, not 7"),
        (1, 32, 9, "takes 8 bytes of parameters, not 9"),
    ],
)
def test_launches_that_no_device_takes(grid, block, params, message):
    with pytest.raises(ValueError, match=message):
        launch(module("", 1), "test", grid, block, bytes(params), Arena())


def test_bounds_on_threads_are_kept():
    text = ".version 9.0 .entry k() .{} 64 {{ ret; }}"
    with pytest.raises(ValueError, match="takes 64"):
        launch(parse(text.format("maxntid")), "k", 1, 65, b"", Arena())
    with pytest.raises(ValueError, match="requires blocks"):
        launch(parse(text.format("reqntid")), "k", 1, 32, b"", Arena())
