"""The bits depend neither on the number of threads nor on the instruction set nor on the reader."""

import os
import subprocess
import sys
import zlib

import pytest
import reference
import torch
from reference import assert_same
from storages import STORAGES

from resnet_reg_ext import _C, ProxSGD
from resnet_reg_ext.backends import native
from resnet_reg_ext.functional import prox_sgd_

pytestmark = [pytest.mark.reads_tensors, pytest.mark.sanitized]

CHUNK = 32768
# Chunks inside a tensor, chunks of many tensors, and tensors that cross a chunk's end.
SIZES = [
    (3 * CHUNK + 5,),
    (0,),
    (1,),
    *[(i,) for i in range(1, 400, 3)],
    (CHUNK,),
    (CHUNK - 1,),
    (7,),
]
OPTIONS = {
    "recipe": {"momentum": 0.9, "weight_decay": 0.02, "l1": 0.01},
    "nesterov, proximal": {
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.02,
        "l1": 0.01,
        "l2_mode": "proximal",
        "maximize": True,
    },
    "dampening, no l1": {"momentum": 0.9, "dampening": 0.3, "l1": 0.0},
    "no momentum": {"momentum": 0.0, "weight_decay": 0.02, "l1": 0.1},
}
LEVELS = [level for level in _C.simd_levels() if level != "none"]  # those with a kernel


def trajectory(dtype, options, fused=True, steps=2):
    generator = torch.Generator().manual_seed(0)

    def randn(size):
        return torch.randn(size, generator=generator).to(getattr(torch, dtype))

    params = [torch.nn.Parameter(randn(size)) for size in SIZES]
    optimizer = ProxSGD(params, lr=0.1, **options, fused=fused)
    for _ in range(steps):
        for p in params:
            p.grad = randn(p.shape)
        optimizer.step()
    buffers = [optimizer.state[p].get("momentum_buffer") for p in params]
    return params + [b for b in buffers if b is not None]


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_thread_count_and_level(options, dtype):
    torch.set_num_threads(1)
    expected = trajectory(dtype, OPTIONS[options], fused=False)
    for level in LEVELS:
        _C.set_simd_level(level)
        assert _C.simd_level() == level
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            actual = trajectory(dtype, OPTIONS[options])
            for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
                assert_same(a, b, f"{level}, {threads} threads, tensor {i}")


@pytest.fixture
def flushing():
    """Subnormal results become zero, and subnormal operands are taken for zero.

    Set as a user would, when there are threads already: new ones would take it over.
    """
    torch.set_num_threads(4)
    p = torch.zeros(64 * CHUNK)
    prox_sgd_([p], [torch.ones_like(p)], lr=1.0, fused=True)
    if not torch.set_flush_denormal(True):
        pytest.fail("this processor can't flush subnormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("runtime", "flushing")
@pytest.mark.parametrize("level", LEVELS)
def test_float16s_subnormals_are_no_subnormals_to_compute_with(level):
    """In float32 they are ordinary numbers, gradients of ordinary size among them."""
    _C.set_simd_level(level)
    small = torch.arange(0, 1100, dtype=torch.int16).view(torch.float16)  # and some normal ones
    p, g = torch.zeros_like(small), small.clone()
    prox_sgd_([p], [g], lr=1.0, fused=True)
    assert_same(p, torch.where(small == 0, small, -small))


@pytest.mark.usefixtures("runtime", "flushing")
@pytest.mark.parametrize("level", LEVELS)
def test_all_threads_flush_subnormals_if_the_caller_does(level):
    """torch.set_flush_denormal changes the thread that calls it, none of those that wait."""
    _C.set_simd_level(level)
    # By its bits, as a number it would be zero.
    g = torch.full((64 * CHUNK,), 1000, dtype=torch.int32).view(torch.float32)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        p = torch.zeros_like(g)
        prox_sgd_([p], [g], lr=1.0, fused=True)
        assert (p.view(torch.int32) == 0).all()


def extremes(dtype):
    """Every exponent, and at each the ends and the middle of the significands, of both signs."""
    if dtype in ("float16", "bfloat16"):
        bits = torch.arange(-(2**15), 2**15, 3).to(torch.int16)
    elif dtype == "float32":
        bits = torch.arange(-(2**31), 2**31, 2**31 // 4096 * 41 + 977).to(torch.int32)
    else:
        bits = torch.arange(-(2**15), 2**15, 7).mul(2**48).add(12345678901)
    return bits.view(getattr(torch, dtype))


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_extreme_values_at_every_level(level, dtype):
    """The narrow types' rounding is the kernel's own; not only in the middle range."""
    _C.set_simd_level(level)
    some = extremes(dtype)
    for options in (
        {"lr": 1.0, "weight_decay": 0.7},
        {"lr": 0.3, "momentum": 0.7, "l1": 1e-6},
        {"lr": 2.0**-20, "momentum": 0.5, "nesterov": True, "weight_decay": 3.0},
    ):
        options = {"momentum": 0.0, "l1": 0.0, "weight_decay": 0.0, **options}
        results = []
        for fused in (True, False):
            p = torch.nn.Parameter(some.clone())
            optimizer = ProxSGD([p], **options, fused=fused)
            for shift in (1, 4567 % len(some), len(some) // 2):
                p.grad = some.roll(shift)
                optimizer.step()
                results.append(p.detach().clone())
        half = len(results) // 2
        for a, b in zip(results[:half], results[half:], strict=True):
            assert_same(a, b, level)


# The kernel's variants; the test has first and later steps, counting and not.
VARIANTS = {
    "plain": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "all": {"momentum": 0.9, "nesterov": True, "l2_mode": "proximal", "maximize": True},
    "no momentum": {"momentum": 0.0},
    "no momentum, all": {"momentum": 0.0, "l2_mode": "proximal"},
}


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("storage", STORAGES)
def test_every_kernel_gives_the_bits_and_the_zeros_of_pure_pytorch(storage, variant, level):
    _C.set_simd_level(level)
    dtype, options = STORAGES[storage]
    special = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -6e-8])
    # Whole vectors, whole lines and every remainder of both; special values at many places.
    sizes = [*range(1, 36), 63, 64, 65, 1000]

    def values(seed):
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(n, generator=generator) for n in sizes]
        for i, t in enumerate(drawn):
            t[i % 3 :: 5] = special[(i + seed) % len(special)]
        return [t.to(getattr(torch, dtype)) for t in drawn]

    results = []
    for fused, count in ((False, False), (True, False), (True, True)):
        params = [torch.nn.Parameter(t) for t in values(0)]
        optimizer = ProxSGD(
            params,
            lr=0.1,
            weight_decay=0.02,
            l1=0.05,
            **VARIANTS[variant],
            **options,
            fused=fused,
            track_sparsity=count,
        )
        history = []
        for step in range(3):
            for p, grad in zip(params, values(1 + step), strict=True):
                p.grad = grad
            optimizer.step()
            states = [t for p in params for t in optimizer.state[p].values()]
            history += [p.detach().clone() for p in params] + [t.clone() for t in states]
            if count:
                known = optimizer._zeros_known()  # by the kernel; a recount isn't in it
                assert [known[p].item() for p in params] == [int((p == 0).sum()) for p in params]
        results.append(history)
    assert any((p == 0).any() for p in params)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same(a, b, f"{storage}, {variant}, {level}")


def test_the_levels_of_this_processor():
    if os.uname().machine == "x86_64":
        has_avx2 = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
        assert _C.simd_levels() == (["none", "avx2"] if has_avx2 else ["none"])
    else:
        assert _C.simd_levels() == ["none", "portable"]


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("name", ["avx1024", "baseline", ""])
def test_an_unknown_level_is_refused(name):
    before = _C.simd_level()
    with pytest.raises(ValueError, match=rf"SIMD level '{name}' is unknown: .* has 'none'"):
        _C.set_simd_level(name)
    assert _C.simd_level() == before


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_without_a_kernel_for_the_processor_steps_are_pure_pytorch(dtype):
    """As on a processor below AVX2."""
    assert _C.why_cpu_unusable() == ""
    native = trajectory(dtype, OPTIONS["recipe"], fused=True)
    _C.set_simd_level("none")
    assert "SIMD level 'none'" in _C.why_cpu_unusable()
    for a, b in zip(trajectory(dtype, OPTIONS["recipe"], fused=None), native, strict=True):
        assert_same(a, b)
    with pytest.raises(RuntimeError, match=r"fused=True, but .* SIMD level 'none'"):
        trajectory(dtype, OPTIONS["recipe"], fused=True)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_without_the_exchange_api(dtype):
    """As with a torch before 2.13: tensors are described in Python."""
    results = []
    for enable in (True, False):
        native.use_exchange_api(enable)
        results.append(trajectory(dtype, OPTIONS["recipe"]))
    assert not native.has_exchange_api()
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert_same(a, b, f"tensor {i}")


def test_the_switch_that_hides_the_exchange_api_took_effect():
    hidden = os.environ.get("RESNET_REG_EXT_TEST_NO_EXCHANGE_API") == "1"
    torch_has_it = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert native.has_exchange_api() == (torch_has_it and not hidden)
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13):
        assert torch_has_it


PROBE = """
import zlib, torch
from resnet_reg_ext import _C, ProxSGD
p = torch.nn.Parameter(torch.linspace(-1, 1, 100_003))
optimizer = ProxSGD([p], lr=0.1, l1=0.02, weight_decay=0.3)
for i in range(3):
    p.grad = torch.sin(torch.arange(100_003) * (i + 1.0)).mul(8).round().div(8)
    optimizer.step()
print(_C.simd_level(), zlib.crc32(p.detach().numpy().tobytes()))
"""


def run_probe(tmp_path, **environment):
    return subprocess.run(
        [sys.executable, "-c", PROBE],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.new_process
def test_environment_variable_picks_the_level(tmp_path):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 100_003))
    optimizer = ProxSGD([p], lr=0.1, l1=0.02, weight_decay=0.3, fused=False)
    for i in range(3):
        p.grad = torch.sin(torch.arange(100_003) * (i + 1.0)).mul(8).round().div(8)
        optimizer.step()
    checksum = str(zlib.crc32(p.detach().numpy().tobytes()))
    for level in _C.simd_levels():
        result = run_probe(tmp_path, RESNET_REG_EXT_SIMD=level, OMP_NUM_THREADS="2")
        assert result.stdout.split() == [level, checksum], result.stderr


@pytest.mark.new_process
def test_environment_variable_with_an_unknown_level(tmp_path):
    result = run_probe(tmp_path, RESNET_REG_EXT_SIMD="avx1024")
    assert result.returncode != 0
    assert "RESNET_REG_EXT_SIMD" in result.stderr.splitlines()[-1]
    assert "'avx1024' is unknown" in result.stderr.splitlines()[-1]
