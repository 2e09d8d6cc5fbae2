"""Memory accesses: what they move, what they are accused of, and what they cost."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ptx import Arena, KernelFault
from ptx.snippets import run

Array = np.ndarray

THREAD = "mov.u32 %r0, %tid.x;"
GLOBAL_THREAD = """
  mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;
  mad.lo.s32 %r0, %r1, %r2, %r3;
"""


def words(count: int) -> Array:
    return np.arange(1, count + 1, dtype=np.uint32)


@pytest.fixture
def arena() -> Arena:
    return Arena()


# ---- the host's side -----------------------------------------------------------------------------


def test_allocations_have_the_alignment_and_skew_asked_for(arena):
    for align, skew in ((256, 0), (256, 4), (16, 8), (4, 1)):
        a = arena.allocate(10, align=align, skew=skew, data=b"0123456789")
        assert a.address % align == skew % align
        assert arena.read(a.address + 2, 3).tobytes() == b"234"
    for a, b in itertools.pairwise(arena.allocations):
        assert b.address - a.end >= 256


def test_the_host_stays_inside(arena):
    a = arena.allocate(8, name="a", data=bytes(8))
    with pytest.raises(IndexError, match="'a'"):
        arena.read(a.address, 9)
    with pytest.raises(IndexError, match="no allocation"):
        arena.write(a.address - 300, b"x")
    with pytest.raises(ValueError, match="overlaps 'a'"):
        arena.place(a.address + 7, 4)
    with pytest.raises(ValueError, match="7 bytes of data for 8"):
        arena.allocate(8, data=bytes(7))


def test_guard_zones_notice_writes_around_an_allocation(arena):
    a = arena.allocate(8, name="a", data=bytes(8))
    arena.allocate(8, name="b", data=bytes(8))
    assert arena.check_guards() == []
    a.buffer[a.address - a.origin + 8] += 1
    assert arena.check_guards() == ["a"]


# ---- loads and stores ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "register", "expected"),
    [
        ("u8", "%rd", 0xF0),
        ("s8", "%rd", -16),
        ("u16", "%rd", 0xF1F0),
        ("s16", "%rd", -3600),
        ("u32", "%rd", 0xF3F2F1F0),
        ("s32", "%rd", -202182160),
        ("b64", "%rd", 0xF7F6F5F4F3F2F1F0),
    ],
)
def test_loads_extend(arena, t, register, expected):
    source = arena.allocate(8, data=bytes(range(0xF0, 0xF8)))
    target = arena.allocate(8)
    body = f"ld.global.{t} %rd5, [%rd0]; st.global.u64 [%rd1], %rd5;"
    run(body, source.address, target.address, memory=arena).raise_if_findings()
    assert arena.read(target.address, 8).view(np.int64)[0] == np.uint64(expected % 2**64).view("i8")


def test_stores_truncate(arena):
    target = arena.allocate(8, data=bytes(8))
    body = """mov.u64 %rd5, 0x1122334455667788;
      st.global.u8 [%rd0+1], %rd5; st.global.u16 [%rd0+4], %rd5;
    """
    run(body, target.address, memory=arena).raise_if_findings()
    assert arena.read(target.address, 8).tobytes().hex() == "0088000088770000"


@pytest.mark.parametrize(
    ("vector", "registers"),
    [("v2.u8", 2), ("v4.u8", 4), ("v2.u16", 2), ("v4.u32", 4), ("v2.b64", 2), ("v8.f32", 8)],
)
def test_vectors(arena, vector, registers):
    data = np.arange(32, dtype=np.uint8)
    source = arena.allocate(32, data=data)
    target = arena.allocate(32, data=bytes(32))
    kind = "%rd" if "64" in vector else "%r"
    names = ", ".join(f"{kind}{10 + i}" for i in range(registers))
    body = f"ld.global.{vector} {{{names}}}, [%rd0]; st.global.{vector} [%rd1], {{{names}}};"
    result = run(body, source.address, target.address, memory=arena)
    result.raise_if_findings()
    width = registers * int(vector.split(".")[1][1:]) // 8
    assert result.counts.load.bytes == result.counts.store.bytes == width
    moved = arena.read(target.address, 32)
    assert (moved[:width] == data[:width]).all()
    assert not moved[width:].any()


def test_parameters_are_indexed_dynamically_and_checked():
    body = f"""{THREAD}
      mul.wide.u32 %rd5, %r0, 8; mov.u64 %rd6, test_param_0; add.s64 %rd5, %rd5, %rd6;
      ld.param.u64 %rd7, [%rd5+8]; ld.param.u64 %rd8, [%rd0];
    """
    result = run(body, 0, 1, 2, threads=2)
    result.raise_if_findings()
    result = run(body, 0, 1, threads=2)
    assert result.finding_counts == {"out-of-bounds": 1}
    assert result.findings[0].thread == (1, 0, 0)
    assert "16 bytes of param memory" in str(result.findings[0])


def test_generic_addresses_reach_all_spaces(arena):
    target = arena.allocate(16)
    body = """.shared .align 8 .b8 fast[8]; .local .align 8 .b8 own[8];
      mov.u64 %rd5, fast; cvta.shared.u64 %rd5, %rd5;
      mov.u64 %rd6, own; cvta.local.u64 %rd6, %rd6;
      mov.u64 %rd7, test_param_1; cvta.param.u64 %rd7, %rd7; ld.u64 %rd8, [%rd7];
      st.u64 [%rd5], %rd8; ld.shared.u64 %rd8, [fast];
      add.s64 %rd8, %rd8, 1; st.local.u64 [own], %rd8; ld.u64 %rd8, [%rd6];
      st.u64 [%rd0], %rd8; cvta.to.shared.u64 %rd5, %rd5; st.global.u64 [%rd0+8], %rd5;
    """
    run(body, target.address, 41, memory=arena).raise_if_findings()
    assert arena.read(target.address, 16).view(np.uint64).tolist() == [42, 0]


def test_one_instruction_may_reach_several_spaces(arena):
    target = arena.allocate(256, data=bytes(256))
    body = f""".shared .align 8 .b8 fast[256]; {THREAD}
      mul.wide.u32 %rd5, %r0, 8; mov.u64 %rd6, fast; cvta.shared.u64 %rd6, %rd6;
      and.b32 %r5, %r0, 1; setp.eq.u32 %p1, %r5, 0; selp.b64 %rd7, %rd6, %rd0, %p1;
      add.s64 %rd7, %rd7, %rd5; st.u64 [%rd7], %rd5; ld.u64 %rd8, [%rd7];
      add.s64 %rd5, %rd0, %rd5; st.global.u64 [%rd5], %rd8;
    """
    run(body, target.address, memory=arena, threads=32).raise_if_findings()
    assert (arena.read(target.address, 256).view(np.uint64) == np.arange(32) * 8).all()


# ---- what is found -------------------------------------------------------------------------------


def test_out_of_bounds_is_reported_and_left_out(arena):
    data = arena.allocate(12, name="data", data=words(3))
    other = arena.allocate(16, name="other", data=bytes(16))
    body = f"""{THREAD} .loc 1 7 1
      mul.wide.u32 %rd5, %r0, 4; add.s64 %rd6, %rd0, %rd5; add.s64 %rd7, %rd1, %rd5;
      ld.global.u32 %r5, [%rd6]; st.global.u32 [%rd7], %r5;
    }} .file 1 "/a/b.cu" .entry other() {{ ret;
    """
    result = run(body, data.address, other.address, memory=arena, threads=4)
    assert not result.ok
    assert result.finding_counts == {"out-of-bounds": 1}
    (finding,) = result.findings
    assert (finding.block, finding.thread) == ((0, 0, 0), (3, 0, 0))
    assert finding.address == data.end
    assert finding.source == "/a/b.cu:7"
    assert "0 bytes after the end of 'data', which has 12 bytes" in str(finding)
    assert arena.read(other.address, 16).view(np.uint32).tolist() == [1, 2, 3, 0]
    with pytest.raises(KernelFault, match="1 out-of-bounds"):
        result.raise_if_findings()


@pytest.mark.parametrize(
    ("offset", "nearest"),
    [(-4, "4 bytes before 'a'"), (9, "after the end of 'a'"), (2**40, "after the end of 'a'")],
)
def test_accesses_partly_or_wholly_outside(arena, offset, nearest):
    a = arena.allocate(8, name="a", skew=1, data=bytes(8))
    result = run(f"st.global.u8 [%rd0+{offset}], 1;", a.address, memory=arena)
    assert [f.kind for f in result.findings] == ["out-of-bounds"]
    assert nearest in result.findings[0].allocation
    b = arena.allocate(6, name="b", data=bytes(6))
    result = run("ld.global.u32 %r1, [%rd0+4];", b.address, memory=arena)
    assert [f.kind for f in result.findings] == ["out-of-bounds"]
    assert result.findings[0].allocation == "byte 4 of 'b'"
    assert not arena.check_guards()


def test_nothing_is_mapped_in_an_empty_arena():
    result = run("ld.global.u32 %r1, [%rd0];", 64)
    assert result.findings[0].allocation == "no allocations"


@pytest.mark.parametrize(("t", "offset"), [("v4.f32", 4), ("v2.f32", 4), ("u32", 2), ("u16", 1)])
def test_misaligned_accesses(arena, t, offset):
    a = arena.allocate(64, data=words(16))
    count = int(t[1]) if t[0] == "v" else 1
    kind = "%rs" if "16" in t else "%r"
    names = ", ".join(f"{kind}{i + 1}" for i in range(count))
    names = f"{{{names}}}" if count > 1 else names
    result = run(f"st.global.{t} [%rd0+{offset}], {names};", a.address, memory=arena)
    assert result.finding_counts == {"misaligned": 1}
    assert (arena.read(a.address, 64).view(np.uint32) == words(16)).all()
    run(f"st.global.{t} [%rd0+32], {names};", a.address, memory=arena).raise_if_findings()


def test_initialisation_is_known_to_the_byte(arena):
    a = arena.allocate(8)
    store = "st.global.u16 [%rd0], %rs1; st.global.u8 [%rd0+2], %rs1;"
    result = run(store + "ld.global.u32 %r1, [%rd0];", a.address, memory=arena)
    assert result.finding_counts == {"uninitialised": 1}
    rest = "st.global.u8 [%rd0+3], %rs1; ld.global.u32 %r1, [%rd0];"
    run(rest, a.address, memory=arena).raise_if_findings()
    arena.write(a.address + 4, b"abcd")
    run("ld.global.u64 %rd5, [%rd0];", a.address, memory=arena).raise_if_findings()


def test_a_bad_load_gives_zero(arena):
    a = arena.allocate(8, data=words(2))
    target = arena.allocate(4, data=b"abcd")
    body = "mov.u32 %r1, 5; ld.global.u32 %r1, [%rd0+8]; st.global.u32 [%rd1], %r1;"
    run(body, a.address, target.address, memory=arena)
    assert arena.read(target.address, 4).tolist() == [0, 0, 0, 0]


def test_writes_to_read_only_memory(arena):
    a = arena.allocate(4, name="weights", data=words(1), writable=False)
    for statement in ("st.global.u32 [%rd0], 7;", "red.global.add.u32 [%rd0], 7;"):
        result = run(statement, a.address, memory=arena)
        assert result.finding_counts == {"read-only": 1}
        assert "'weights'" in str(result.findings[0])
    assert (arena.read(a.address, 4).view(np.uint32) == 1).all()


def test_findings_are_all_counted_and_some_are_kept(arena):
    result = run("st.global.u32 [%rd0], 7;", 64, memory=arena, threads=256, grid=10)
    assert result.finding_counts == {"out-of-bounds": 2560}
    assert len(result.findings) == 20


# ---- races ---------------------------------------------------------------------------------------

RACES = {
    "all store to one word": (GLOBAL_THREAD + "st.global.u32 [%rd0], %r0;", 2, 1, True),
    "all store the same": ("st.global.u32 [%rd0], 3;", 1, 2, True),
    "all load": ("ld.global.u32 %r1, [%rd0];", 64, 3, False),
    "load what a neighbour stores": (
        GLOBAL_THREAD + "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0;"
        "ld.global.u32 %r5, [%rd5+4]; st.global.u32 [%rd5], %r5;", 32, 1, True,
    ),
    "each its own": (
        GLOBAL_THREAD + "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0;"
        "ld.global.u32 %r5, [%rd5]; st.global.u32 [%rd5], %r5; ld.global.u8 %r5, [%rd5+1];",
        32, 3, False,
    ),
    "each its own byte": (
        GLOBAL_THREAD + "cvt.u64.u32 %rd5, %r0; add.s64 %rd5, %rd5, %rd0;"
        "st.global.u8 [%rd5], %r0; ld.global.u8 %r5, [%rd5];", 32, 3, False,
    ),
    "a vector over a neighbour's byte": (
        GLOBAL_THREAD + "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.u8 [%rd0+15], %r0;"
        "@!%p1 ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd0];", 2, 1, True,
    ),
    "a vector beside a neighbour's byte": (
        GLOBAL_THREAD + "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.u8 [%rd0+16], %r0;"
        "@!%p1 ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%rd0];", 2, 1, False,
    ),
    "atomics meet atomics": ("red.global.add.u32 [%rd0], 1;", 64, 3, False),
    "a load meets atomics": (
        "red.global.add.u32 [%rd0], 1; ld.global.u32 %r1, [%rd0];", 2, 1, True,
    ),
    "a store meets atomics": (
        GLOBAL_THREAD + "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.u32 [%rd0], 1;"
        "@!%p1 red.global.add.u32 [%rd0], 1;", 2, 1, True,
    ),
    "a barrier between the threads of a block": (
        THREAD + "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0; st.global.u32 [%rd5], %r0;"
        "bar.sync 0; xor.b32 %r5, %r0, 1; mul.wide.u32 %rd6, %r5, 4; add.s64 %rd6, %rd6, %rd0;"
        "ld.global.u32 %r6, [%rd6]; bar.sync 0; st.global.u32 [%rd5], %r6;", 64, 1, False,
    ),
    "no second barrier before the stores": (
        THREAD + "mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0; st.global.u32 [%rd5], %r0;"
        "bar.sync 0; xor.b32 %r5, %r0, 1; mul.wide.u32 %rd6, %r5, 4; add.s64 %rd6, %rd6, %rd0;"
        "ld.global.u32 %r6, [%rd6]; st.global.u32 [%rd5], %r6;", 64, 1, True,
    ),
    "a barrier between blocks": (
        GLOBAL_THREAD + "setp.eq.u32 %p1, %r0, 0; @%p1 st.global.u32 [%rd0], 1; bar.sync 0;"
        "ld.global.u32 %r5, [%rd0];", 1, 2, True,
    ),
    "many readers, a barrier, a writer": (
        THREAD + "ld.global.u32 %r5, [%rd0]; bar.sync 0; setp.eq.u32 %p1, %r0, 3;"
        "@%p1 st.global.u32 [%rd0], 1;", 64, 1, False,
    ),
    "many readers and a writer": (
        THREAD + "ld.global.u32 %r5, [%rd0]; setp.eq.u32 %p1, %r0, 3;"
        "@%p1 st.global.u32 [%rd0], 1;", 64, 1, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", RACES)
def test_races(arena, name, lazy):
    body, threads, grid, racing = RACES[name]
    if lazy:
        a = arena.place_lazy(1 << 34, 1 << 20, fill=lambda offset, n: bytes(n))
    else:
        a = arena.allocate(512, data=bytes(512))
    result = run(body, a.address, memory=arena, threads=threads, grid=grid)
    assert set(result.finding_counts) == ({"race"} if racing else set())
    assert run(body, a.address, memory=arena, threads=threads, grid=grid, races=False).ok


def test_blocks_of_different_batches_race(arena):
    a = arena.allocate(4, data=bytes(4))
    body = GLOBAL_THREAD + "st.global.u32 [%rd0], %r0;"
    options = {"memory": arena, "grid": 3, "batch_threads": 1}
    result = run(body, a.address, **options)
    assert result.finding_counts == {"race": 2}
    assert [f.block for f in result.findings] == [(1, 0, 0), (2, 0, 0)]
    assert "access by block (0, 0, 0), thread (0, 0, 0)" in result.findings[0].message


def test_launches_are_ordered(arena):
    a = arena.allocate(4, data=bytes(4))
    body = THREAD + "setp.eq.u32 %p1, %r0, {}; @%p1 st.global.u32 [%rd0], %r0;"
    for thread in (0, 1):
        run(body.format(thread), a.address, memory=arena, threads=2).raise_if_findings()


def test_shared_memory_is_checked_too():
    body = f""".shared .align 4 .b8 fast[128]; {THREAD}
      shl.b32 %r1, %r0, 2; st.shared.u32 [%r1], %r0; {{}}
      xor.b32 %r2, %r1, 124; ld.shared.u32 %r3, [%r2];
    """
    run(body.format("bar.sync 0;"), threads=32, grid=3).raise_if_findings()
    racing = run(body.format(""), threads=32, grid=3)
    assert racing.finding_counts == {"race": 96}
    outside = run(body.format("bar.sync 0;"), threads=33)
    assert outside.finding_counts == {"out-of-bounds": 2}
    unwritten = run(".shared .align 4 .b8 fast[128]; ld.shared.u32 %r3, [fast+4];")
    assert unwritten.finding_counts == {"uninitialised": 1}


def test_dynamic_shared_memory():
    before = ".extern .shared .align 16 .b8 dynamic[];\n.shared .align 4 .b8 fixed[4];\n"
    body = "st.shared.u8 [fixed], 1; st.shared.u8 [dynamic+{}], 1;"
    run(body.format(7), before=before, shared_bytes=8).raise_if_findings()
    result = run(body.format(8), before=before, shared_bytes=8)
    assert result.finding_counts == {"out-of-bounds": 1}


# ---- atomics -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        ("add.u32", 5 + sum(range(64))),
        ("min.u32", 0),
        ("max.s32", 63),
        ("and.b32", 0),
        ("or.b32", 63),
        ("xor.b32", 5),
        ("exch.b32", 63),
    ],
)
def test_atomics_take_turns(arena, operation, expected):
    a = arena.allocate(4, data=np.array([5], np.uint32))
    old = arena.allocate(256)
    body = f"""{THREAD} mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd1;
      atom.global.{operation} %r1, [%rd0], %r0; st.global.u32 [%rd5], %r1;
    """
    run(body, a.address, old.address, memory=arena, threads=64).raise_if_findings()
    assert arena.read(a.address, 4).view(np.uint32)[0] == expected
    assert arena.read(old.address, 4).view(np.uint32)[0] == 5
    reduction = f"{THREAD} red.global.{operation} [%rd0], %r0;"
    arena.write(a.address, np.array([5], np.uint32))
    run(reduction, a.address, memory=arena, threads=64).raise_if_findings()
    assert arena.read(a.address, 4).view(np.uint32)[0] == expected


def test_compare_and_swap_makes_a_lock_free_sum(arena):
    a = arena.allocate(8, data=bytes(8))
    body = f"""{THREAD} cvt.u64.u32 %rd5, %r0; mov.u64 %rd6, 0;
    again:
      add.s64 %rd7, %rd6, %rd5; mov.u64 %rd8, %rd6;
      atom.global.cas.b64 %rd6, [%rd0], %rd8, %rd7;
      setp.ne.s64 %p1, %rd6, %rd8; @%p1 bra again;
    """
    run(body, a.address, memory=arena, threads=64).raise_if_findings()
    assert arena.read(a.address, 8).view(np.uint64)[0] == sum(range(64))


def test_float_atomics(arena):
    data = arena.allocate(16, data=np.array([0.5, 0], np.float64))
    body = f"""{THREAD} cvt.rn.f32.u32 %r1, %r0; red.global.add.f32 [%rd0+8], %r1;
      cvt.rn.f64.u32 %rd5, %r0; red.global.add.f64 [%rd0], %rd5;
    """
    run(body, data.address, memory=arena, threads=64).raise_if_findings()
    values = arena.read(data.address, 16)
    assert values.view(np.float64)[0] == 0.5 + sum(range(64))
    assert values[8:12].view(np.float32)[0] == sum(range(64))


# ---- memory of any size and place ----------------------------------------------------------------


@pytest.mark.parametrize("address", [4, 1 << 31, 0xFFFF_FF00, 1 << 32, (1 << 47) + 4])
def test_memory_at_any_address(arena, address):
    a = arena.place(address, 1024, data=words(256))
    body = f"""{THREAD} mul.wide.u32 %rd5, %r0, 4; add.s64 %rd5, %rd5, %rd0;
      ld.global.u32 %r1, [%rd5]; add.s32 %r1, %r1, 1; st.global.u32 [%rd5], %r1;
    """
    run(body, a.address, memory=arena, threads=256).raise_if_findings()
    assert (arena.read(address, 1024).view(np.uint32) == words(256) + 1).all()


def test_a_huge_region_has_pages_only_where_it_is_touched(arena):
    size = (1 << 36) + 12

    def fill(offset: int, nbytes: int) -> Array:
        return (np.arange(offset, offset + nbytes) // 4 % 251).astype(np.uint8)

    region = arena.place_lazy((1 << 40) + 4, size, name="huge", fill=fill)
    body = """ld.global.u32 %r1, [%rd0]; ld.global.u32 %r2, [%rd1];
      st.global.u32 [%rd1+-4], %r1; st.global.u32 [%rd0+4], %r2; ld.global.u32 %r3, [%rd1+4];"""
    last = region.end - 4
    result = run(body, region.address, last, memory=arena)
    assert result.finding_counts == {"out-of-bounds": 1}
    assert result.findings[0].address == region.end
    assert len(region.touched) == 2
    assert len(region.buffer) <= 16 * region.PAGE
    assert (arena.read(last - 4, 4) == fill(0, 4)).all()
    assert (arena.read(region.address + 8, 4) == fill(8, 4)).all()
    far = region.address + (1 << 35)
    assert (arena.read(far, 8) == fill(1 << 35, 8)).all()
    arena.write(far, b"changed!")
    assert arena.read(far, 8).tobytes() == b"changed!"


def test_a_huge_region_without_contents_is_uninitialised(arena):
    region = arena.place_lazy(1 << 40, 1 << 33)
    body = "st.global.u32 [%rd0+8], 7; ld.global.u32 %r1, [%rd0+8]; ld.global.u32 %r1, [%rd0+12];"
    for offset in (0, 1 << 32):
        result = run(body, region.address + offset, memory=arena)
        assert result.finding_counts == {"uninitialised": 1}


# ---- traffic -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "offset", "sectors"),
    [(4, 0, 4), (4, 4, 5), (8, 0, 8), (32, 0, 32), (128, 0, 32), (0, 0, 1)],
)
def test_sectors_of_a_warp(arena, stride, offset, sectors):
    a = arena.allocate(8192, data=bytes(8192))
    body = f"""{GLOBAL_THREAD} mov.u32 %r5, %laneid; mul.wide.u32 %rd5, %r5, {stride};
      add.s64 %rd5, %rd5, %rd0; ld.global.u32 %r6, [%rd5+{offset}];
    """
    load = run(body, a.address, memory=arena, threads=64, grid=2).counts.load
    assert (load.bytes, load.requests, load.sectors) == (512, 4, 4 * sectors)
    assert load.efficiency == 128 / (32 * sectors)


def test_sectors_do_not_depend_on_the_order_of_lanes(arena):
    a = arena.allocate(128, data=bytes(128))
    body = f"""{THREAD} mul.lo.s32 %r1, %r0, 13; and.b32 %r1, %r1, 31; mul.wide.u32 %rd5, %r1, 4;
      add.s64 %rd5, %rd5, %rd0; ld.global.u32 %r6, [%rd5];
    """
    assert run(body, a.address, memory=arena, threads=32).counts.load.sectors == 4


def test_bytes_of_blocks_and_instructions(arena):
    a = arena.allocate(4096, data=bytes(4096))
    body = f"""{GLOBAL_THREAD} setp.ge.u32 %p1, %r0, 48; mul.wide.u32 %rd5, %r0, 8;
      add.s64 %rd5, %rd5, %rd0; @%p1 bra done; ld.global.u64 %rd6, [%rd5];
      red.global.add.u64 [%rd5], %rd6;
    done: ret;
    """
    counts = run(body, a.address, memory=arena, threads=32, grid=3).counts
    assert counts.block_bytes.tolist() == [512, 256, 0]
    assert counts.imbalance == 2
    assert counts.bytes == counts.load.bytes + counts.atomic.bytes == 768
    assert counts.instructions["ret"] == 96
    assert counts.instructions["ld.global.u64"] == 48
    assert "st.global.u64" not in counts.instructions
