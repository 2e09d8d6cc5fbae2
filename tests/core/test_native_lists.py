"""The compiled core by itself, on lists of arrays that a describer of our own tells it about."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from resnet_reg_ext import _C

pytestmark = [pytest.mark.sanitized]

DLPACK = {"float32": (2, 32), "float64": (2, 64), "float16": (2, 16)}
CPU, CUDA = 1, 2
COUNT = 161  # ResNet-50's parameters


class Array(np.ndarray):
    """An array, with the device that the describer says it is on."""

    device = (CPU, 0)


def array(values, dtype="float32", device=(CPU, 0)):
    made = np.array(values, dtype).view(Array)
    made.device = device
    return made


def describe(a):
    strides = tuple(s // a.itemsize for s in a.strides)
    return a.ctypes.data, *a.device, *DLPACK[a.dtype.name], a.shape, strides


def reader(describer=describe):
    return _C.TensorReader(None, describer, lambda device: 0, Array, Array)


def options(**chosen):
    names = [name for name in dir(_C.Options) if not name.startswith("_")]
    defaults = dict.fromkeys(names, 0) | {"grad_scale": 1.0, "grad_coefficient": 1.0}
    return _C.Options(**(defaults | chosen))


def read(params, grads, momentum_buffers=None, master_params=None, num_zeros=0, starts=None):
    return reader().read(params, grads, momentum_buffers, master_params, num_zeros, starts)


def step(reading, threads=1, **chosen):
    _C.prox_sgd_(reader(), [(reading, options(**chosen), {})], threads)


@pytest.mark.parametrize("odd", [0, 1, 127, 128, 140, 160])
def test_the_odd_one_of_many_parameters_is_named_and_all_others_are_stepped(odd):
    params = [array([1.0, 2.0]) for _ in range(COUNT)]
    grads = [array([1.0, 1.0]) for _ in range(COUNT)]
    grads[odd] = array([1.0, 1.0, 1.0])
    reading = read(params, grads)
    assert [misfit.index for misfit in reading.misfits] == [odd]
    step(reading, lr=0.5)
    for i, p in enumerate(params):
        assert p.tolist() == ([1.0, 2.0] if i == odd else [0.5, 1.5]), i


def test_every_parameter_has_its_own_count_of_zeros():
    """Of parameters that fit, wholly zero ones among them, and of no others."""
    params = [array(np.arange(i % 5 + 1) % (i % 3 + 1)) for i in range(COUNT)]
    params[7], params[150] = array(np.zeros(9)), array(np.zeros(70))
    grads = [array(np.zeros(p.shape)) for p in params]
    grads[139] = array(np.zeros(99))
    num_zeros = np.zeros(COUNT, np.int64)
    step(read(params, grads, num_zeros=num_zeros.ctypes.data), lr=1.0)
    wanted = [0 if i == 139 else np.count_nonzero(p == 0) for i, p in enumerate(params)]
    assert num_zeros.tolist() == wanted


@pytest.mark.parametrize("other", [(CUDA, 1), (CPU, 0)])
@pytest.mark.parametrize("at", ["gradient", "momentum buffer"])
def test_tensors_of_one_parameter_are_on_one_device(at, other):
    on_first = [array([1.0], device=(CUDA, 0)) for _ in range(3)]
    on_first[1 if at == "gradient" else 2] = array([1.0], device=other)
    param, grad, momentum_buffer = on_first
    (misfit,) = read([param], [grad], [momentum_buffer]).misfits
    assert "another shape, device or dtype" in misfit.reason
    assert not misfit.cuda_unusable


def with_gaps(a):
    return np.stack([a, a], -1).view(Array)[..., 0]


LAYOUTS = {
    "gradient": lambda a, b: ([a], [b], [a.copy()], None),
    "momentum buffer": lambda a, b: ([a], [a.copy()], [b], None),
    "a gradient with gaps": lambda a, b: ([a], [with_gaps(a)], None, None),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_another_layout_is_the_reason_only_if_there_is_no_other(case):
    a, b = array(np.ones((2, 3))), array(np.ones((3, 2))).T
    (misfit,) = read(*LAYOUTS[case](a, b)).misfits
    assert misfit.layout_only

    # Without memory.
    def nowhere(tensor):
        return (0, *describe(tensor)[1:])

    (misfit,) = reader(nowhere).read(*LAYOUTS[case](a, b), 0).misfits
    assert not misfit.layout_only
    assert "can't be read" in misfit.reason
    # The parameter itself with gaps.
    (misfit,) = read([with_gaps(a)], [b]).misfits
    assert "not dense" in misfit.reason


@pytest.mark.skipif(not _C.why_cuda_unusable(0), reason="this build can use the GPU")
@pytest.mark.parametrize("case", LAYOUTS)
def test_on_an_unusable_cuda_device_another_layout_is_not_the_reason(case):
    def on_cuda(tensor):
        address, _, _, *rest = describe(tensor)
        return (address, CUDA, 0, *rest)

    a, b = array(np.ones((2, 3))), array(np.ones((3, 2))).T
    (misfit,) = reader(on_cuda).read(*LAYOUTS[case](a, b), 0).misfits
    assert misfit.cuda_unusable
    assert not misfit.layout_only


@pytest.mark.parametrize("shape", [(2**16, 2**16), (2**32,), (2**20, 2**13)], ids=str)
def test_sizes_are_not_cut_to_32_bits(shape):
    """A tensor of 2^32 elements isn't an empty one, which would need no usable memory."""
    strides = (shape[-1], 1)[-len(shape) :]

    def huge(tensor):
        return 0, CPU, 0, 2, 32, shape, strides

    (misfit,) = reader(huge).read([array([1.0])], [array([1.0])], None, None, 0).misfits
    assert "can't be read" in misfit.reason


def test_float16_is_rounded_to_nearest_whatever_the_current_rounding_mode_is():
    """A step of length 0 rounds master weights to parameters."""
    masters = array(np.linspace(1, 2, 999))
    params, grads = array(np.zeros(999), "float16"), array(np.ones(999), "float16")
    wanted = masters.astype(np.float16)
    reading = read([params], [grads], None, [masters])
    assert reading.misfits == []
    chosen = options()
    libm = ctypes.CDLL("libm.so.6")
    before = libm.fegetround()
    upward = 0x800 if sys.platform == "linux" and _C.simd_level() == "avx2" else 0x400000
    assert libm.fesetround(upward) == 0
    try:
        _C.prox_sgd_(reader(), [(reading, chosen, {})], 1)
    finally:
        libm.fesetround(before)
    assert np.array_equal(params, wanted)


THREADS = """
import os
import numpy as np
import test_native_lists as t
p, g = t.array(np.zeros(1 << 20)), t.array(np.ones(1 << 20))
before = len(os.listdir("/proc/self/task"))
t.step(t.read([p], [g]), threads=5, lr=1.0)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(_C.openmp_runtime() == "none", reason="built without OpenMP")
def test_a_step_takes_the_threads_that_it_may():
    result = subprocess.run(
        [sys.executable, "-c", THREADS],
        cwd=__file__.rpartition("/")[0],
        env={
            **os.environ,
            "PYTHONPATH": ":".join(sys.path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.stdout == "4\n", result.stderr


POOL = r"""
#include <omp.h>
#include <xmmintrin.h>
extern "C" void flush(bool on) {
  _mm_setcsr(on ? _mm_getcsr() | 0x8040u : _mm_getcsr() & ~0x8040u);
}
extern "C" int flushing_threads(int threads) {
  int count = 0;
#pragma omp parallel num_threads(threads) reduction(+ : count)
  count += (_mm_getcsr() & 0x8000u) != 0;
  return count;
}
"""


@pytest.mark.skipif(_C.openmp_runtime() == "none", reason="built without OpenMP")
@pytest.mark.skipif(_C.simd_level() != "avx2", reason="reads x86's control register")
def test_threads_flush_subnormals_as_their_caller_and_then_in_their_own_mode(tmp_path):
    """As another OpenMP program in the process, whose threads they are, too, finds them."""
    source, library = tmp_path / "pool.cpp", tmp_path / "pool.so"
    source.write_text(POOL)
    command = ["g++", "-shared", "-fPIC", "-fopenmp", "-O1", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    pool = ctypes.CDLL(str(library))
    size = 1 << 20
    tiny = np.full(size, 1000, np.uint32).view(np.float32)
    chosen = options(lr=1.0)
    assert pool.flushing_threads(4) == 0
    p, g = array(np.zeros(size)), array(tiny)
    reading = read([p], [g])
    pool.flush(True)
    try:
        _C.prox_sgd_(reader(), [(reading, chosen, {})], 4)
    finally:
        pool.flush(False)
    assert (p.view(np.uint32) << 1 == 0).all()
    assert pool.flushing_threads(4) == 0
    step(reading, threads=4, lr=1.0)
    assert (p.view(np.uint32) << 1 != 0).all()


def test_other_python_threads_run_during_a_step():
    """One that watches the memory sees a step half done, which the GIL would hide."""
    p, g = array(np.zeros(1 << 24)), array(np.ones(1 << 24))
    reading = read([p], [g])
    seen = 0
    for attempt in range(1, 101):
        worker = threading.Thread(target=step, args=(reading,), kwargs={"lr": 1.0})
        worker.start()
        while worker.is_alive() and not seen:
            seen = int(p[0] == -attempt and p[-1] != -attempt)
        worker.join()
        if seen:
            return
    pytest.fail("never seen half done")


class Meddling:
    """A number whose conversion would run Python code."""

    def __float__(self):
        raise AssertionError("converted")

    __index__ = __float__


@pytest.mark.parametrize("devices", [{}, {0: _C.DeviceValues()}])
def test_no_python_runs_between_reading_and_stepping(devices):
    p = array([1.0])
    reading = read([p], [array([1.0])])
    with pytest.raises(TypeError):
        _C.prox_sgd_(reader(), [(reading, options(), devices)], Meddling())
    with pytest.raises(TypeError):
        _C.prox_sgd_(reader(), [(reading, Meddling(), devices)], 1)
    assert p.tolist() == [1.0]


@pytest.mark.parametrize("wrong", ["missing", "unknown", "of another type"])
def test_options_are_all_given_and_by_name(wrong):
    names = {name: 0 for name in dir(_C.Options) if not name.startswith("_")}
    if wrong == "missing":
        del names["l1"]
    elif wrong == "unknown":
        names["learning_rate"] = 0.1
    else:
        names["l1"] = "strong"
    with pytest.raises(TypeError, match="l1" if wrong != "unknown" else "learning_rate"):
        _C.Options(**names)
    with pytest.raises(TypeError):
        _C.Options(0.1)


@pytest.mark.parametrize("size", [1, 15, 16, 37, 70])
def test_weights_return_exactly_to_their_starts_and_are_counted(size):
    """In vectors and one by one. 1.1 - (1.1 - 0.3) isn't 0.3."""
    start = array(np.resize([0.3, -0.7, 1e-3], size))
    p, g = array(np.resize([1.1, -0.7, 0.2], size)), array(np.resize([0.0, 0.25, 4.0], size))
    num_zeros = np.zeros(1, np.int64)
    reading = read([p], [g], num_zeros=num_zeros.ctypes.data, starts=[start])
    assert not reading.misfits
    step(reading, lr=1.0, l1=1.0)
    away = np.arange(size) % 3 == 2
    np.testing.assert_array_equal(p[~away], start[~away])
    np.testing.assert_allclose(p[away], 0.2 - 4.0 + 1.0, rtol=1e-6)  # one rounding or two
    assert num_zeros[0] == np.count_nonzero(~away)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (array([1.0, 2.0], "float64"), "another shape, device or dtype"),
        (array([1.0]), "another shape, device or dtype"),
        (array([1.0, 2.0], device=(CUDA, 0)), "another shape, device or dtype"),
        (array([1.0, 0.0, 2.0])[::2], "another memory layout"),
    ],
    ids=["dtype", "shape", "device", "layout"],
)
def test_an_odd_start_is_told(start, said):
    (misfit,) = read([array([1.0, 2.0])], [array([0.0, 0.0])], starts=[start]).misfits
    assert said in misfit.reason
    assert misfit.layout_only is ("layout" in said)
