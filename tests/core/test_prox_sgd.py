"""The native kernel, pure PyTorch and the NumPy reference give the same bits."""

import itertools
import random
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import reference
import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import assert_same, values

from resnet_reg_ext import ProxSGD
from resnet_reg_ext.backends import native
from resnet_reg_ext.functional import prox_sgd_

pytestmark = pytest.mark.sanitized

CHUNK = 32768
TRAJECTORIES = (
    {"momentum": 0.0, "dampening": 0.3, "nesterov": False},  # has no effect, as in SGD
    {"momentum": 0.9, "dampening": 0.0, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.3, "nesterov": False},
    {"momentum": 0.9, "dampening": 1.0, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
)
DECAYS = (
    {"weight_decay": 0.0, "l2_mode": "coupled"},
    {"weight_decay": 0.0, "l2_mode": "proximal"},
    {"weight_decay": 0.02, "l2_mode": "coupled"},
    {"weight_decay": 0.02, "l2_mode": "proximal"},
)


def gain(momentum, dampening, **_):
    return (1 - dampening) / (1 - momentum) if momentum else 1.0


OPTIONS = [
    # A threshold of 0.03 whatever the trajectory is, where it can be: dampening of 1 has none.
    {"lr": 0.1, **trajectory, **decay, "l1": l1 / (gain(**trajectory) or 1), "maximize": maximize}
    for trajectory, decay, l1, maximize in itertools.product(
        TRAJECTORIES, DECAYS, (0.0, 0.3), (False, True)
    )
]


def name_of(options):
    words = [f"momentum{options['momentum']}"]
    words += [f"dampening{options['dampening']}"] if options["dampening"] else []
    words += ["nesterov"] if options["nesterov"] else []
    words += [f"{options['l2_mode']}{options['weight_decay']}", f"l1_{options['l1']:.2g}"]
    words += ["maximize"] if options["maximize"] else []
    return "-".join(words)


def torch_dtype(dtype):
    return getattr(torch, dtype)


def specials(dtype, threshold):
    """Zeros, infinities, NaN, subnormals, extremes, and values at and beside the threshold."""
    info = torch.finfo(torch_dtype(dtype))
    t = torch.tensor(threshold, dtype=torch.float64).to(torch_dtype(dtype))
    beside = [torch.nextafter(t.float(), torch.tensor(x)).item() for x in (0.0, 1.0)]
    some = [0.0, np.inf, np.nan, info.max, info.tiny, info.smallest_normal / 4]
    some += [info.smallest_normal * info.eps, t.item(), *beside, 1.0]
    signed = torch.tensor([s * x for x in some for s in (1.0, -1.0)], dtype=torch.float64)
    return signed.to(torch_dtype(dtype))


def tensors(sizes, dtype, seed, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(torch_dtype(dtype))
        for size in sizes
    ]


def check_trajectory(start, gradients, dtype, options):
    """Steps three times over and compares parameters and momentum after every step."""
    native, pure = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    optimizers = [
        ProxSGD(native, **options, fused=True),
        ProxSGD(pure, **options, fused=False),
    ]
    expected = [(values(p), None) for p in start]
    for number, grads in enumerate(gradients):
        expected = [
            reference.step(p, values(g), m, dtype, **options)
            for (p, m), g in zip(expected, grads, strict=True)
        ]
        for params, optimizer, way in zip(
            (native, pure), optimizers, ("native", "pure"), strict=True
        ):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            optimizer.step()
            for i, (p, (p_expected, m_expected)) in enumerate(zip(params, expected, strict=True)):
                where = f"{way}, step {number}, tensor {i}"
                assert_same(p, p_expected, f"{where}: parameter")
                assert_same(p.grad, grads[i], f"{where}: gradient")
                if options["momentum"]:
                    buffer = optimizer.state[p]["momentum_buffer"]
                    assert buffer.dtype == p.dtype
                    assert_same(buffer, m_expected, f"{where}: momentum")
                else:
                    assert not optimizer.state[p]
    return expected


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_backends_equal_reference_bit_by_bit(options, dtype):
    sizes = [(0,), (), (9,), (67,), (4, 3, 3, 3)]
    steps = 8
    gradients = [tensors(sizes, dtype, seed) for seed in range(1, steps + 1)]
    expected = check_trajectory(tensors(sizes, dtype, 0), gradients, dtype, options)
    everything = np.concatenate([p.ravel() for p, _ in expected])
    assert np.isfinite(everything).all()
    zeros = np.count_nonzero(everything == 0)
    if options["l1"] * gain(**options) > 0:
        assert 0 < zeros < everything.size
    else:
        assert zeros == 0


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize(
    "options", [o for o in OPTIONS if o["maximize"] == o["nesterov"]], ids=name_of
)
def test_special_values_pass_alike(options, dtype):
    some = specials(dtype, options["lr"] * (options["l1"] * gain(**options)))
    start = some.repeat_interleave(len(some))  # every pair of special parameter and gradient
    gradient = some.repeat(len(some))
    check_trajectory([start], [[gradient], [gradient.flip(0)]], dtype, options)


RECIPE = {
    "lr": 0.1,
    "momentum": 0.9,
    "dampening": 0.0,
    "nesterov": False,
    "weight_decay": 0.02,
    "l2_mode": "coupled",
    "l1": 0.01,
    "maximize": False,
}


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_sizes_around_a_vector(dtype):
    sizes = [(0,), (1,)] + [(n + d,) for n in (2, 4, 8, 16, 32, 64, 128) for d in (-1, 0, 1)]
    gradients = [tensors(sizes, dtype, seed) for seed in (1, 2, 3)]
    check_trajectory(tensors(sizes, dtype, 0), gradients, dtype, RECIPE)


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_sizes_around_a_chunk(size, dtype):
    gradients = [tensors([(size,)], dtype, seed) for seed in (1, 2, 3)]
    check_trajectory(tensors([(size,)], dtype, 0), gradients, dtype, RECIPE)


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_many_small_tensors_and_one_large(dtype):
    sizes = [(i % 70,) for i in range(400)] + [(CHUNK + 3,), (0,), (1,), (0,)]
    gradients = [tensors(sizes, dtype, seed) for seed in (1, 2)]
    check_trajectory(tensors(sizes, dtype, 0), gradients, dtype, RECIPE)


@pytest.mark.parametrize("fused", [True, False])
def test_dtypes_mixed_in_one_group(fused):
    params = [torch.nn.Parameter(tensors([(50,)], d, 0)[0]) for d in reference.DTYPES * 2]
    optimizer = ProxSGD(params, **RECIPE, fused=fused)
    expected = [(values(p), None) for p in params]
    for seed in (1, 2, 3):
        for i, (p, dtype) in enumerate(zip(params, reference.DTYPES * 2, strict=True)):
            p.grad = tensors([(50,)], dtype, seed)[0]
            expected[i] = reference.step(
                expected[i][0], values(p.grad), expected[i][1], dtype, **RECIPE
            )
        optimizer.step()
    for p, (p_expected, m_expected) in zip(params, expected, strict=True):
        assert_same(p, p_expected)
        assert_same(optimizer.state[p]["momentum_buffer"], m_expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("threshold_at", [1.0, -1.0])
def test_a_tie_with_the_threshold_is_plus_zero(threshold_at, fused):
    p = torch.full((9,), threshold_at * 0.25)
    prox_sgd_([p], [torch.zeros(9)], lr=0.5, l1=0.5, fused=fused)
    assert_same(p, torch.zeros(9))
    p = torch.full((9,), threshold_at * float(np.nextafter(np.float32(0.25), np.float32(1))))
    prox_sgd_([p], [torch.zeros(9)], lr=0.5, l1=0.5, fused=fused)
    assert_same(p, torch.full((9,), threshold_at * 2.0**-25 * 1.0))


def any_float(width):
    return st.one_of(
        st.floats(width=width),
        st.floats(-1, 1, width=width),
        st.sampled_from([0.0, -0.0, 0.125, -0.125, 0.25, -0.25, 1.0]),
    )


@st.composite
def laid_out(draw, shape, dtype):
    """A tensor of this shape whose dimensions lie in memory in some order, with gaps or not."""
    width = {"float64": 64, "float16": 16}.get(dtype, 32)
    array = draw(hnp.arrays(np.dtype(f"f{width // 8}"), shape, elements=any_float(width)))
    order = draw(st.permutations(range(len(shape))))
    gap = draw(st.sampled_from([1, 1, 1, 2]))
    memory = torch.empty([shape[i] for i in order] + [gap], dtype=torch_dtype(dtype))
    back = [order.index(i) for i in range(len(shape))]
    tensor = memory[..., 0].permute(back)
    return tensor.copy_(torch.from_numpy(array.copy(order="C")))


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from(reference.DTYPES))
    shapes = draw(st.lists(hnp.array_shapes(min_dims=0, max_dims=4, max_side=4), max_size=4))
    shapes += draw(st.sampled_from([[], [(0,)], [(2, 0, 3)], [(67,)]]))
    triples = [[draw(laid_out(shape, dtype)) for _ in range(3)] for shape in shapes]
    rate = st.one_of(st.just(0.0), st.floats(0, 100), st.sampled_from([0.125, 0.5, 1.0]))
    momentum = draw(st.one_of(st.just(0.0), st.just(0.5), st.floats(0, 0.999)))
    nesterov = momentum > 0 and draw(st.booleans())
    options = {
        "lr": draw(rate),
        "momentum": momentum,
        "dampening": 0.0 if nesterov else draw(st.one_of(st.just(0.0), st.floats(0, 1))),
        "weight_decay": draw(rate),
        "nesterov": nesterov,
        "l1": draw(rate),
        "l2_mode": draw(st.sampled_from(["coupled", "proximal"])),
        "maximize": draw(st.booleans()),
    }
    return dtype, triples, options, draw(st.booleans())


@hypothesis.settings(max_examples=150)
@hypothesis.given(problems())
def test_any_shape_layout_value_and_option(problem):
    dtype, triples, options, first = problem
    expected = [
        reference.step(values(p), values(g), None if first else values(m), dtype, **options)
        for p, g, m in triples
    ]
    for fused in (None, False):
        copies = [
            [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in three]
            for three in triples
        ]
        prox_sgd_(
            [p for p, _, _ in copies],
            [g for _, g, _ in copies],
            [m for _, _, m in copies],
            **options,
            first_step=first,
            fused=fused,
        )
        for i, (p, g, m) in enumerate(copies):
            assert_same(p, expected[i][0], f"fused={fused}, tensor {i}: parameter")
            assert_same(g, triples[i][1], f"fused={fused}, tensor {i}: gradient")
            if options["momentum"] != 0:
                assert_same(m, expected[i][1], f"fused={fused}, tensor {i}: momentum")
            else:
                assert_same(m, triples[i][2], f"fused={fused}, tensor {i}: momentum unused")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("l1", [0.0, 1e-3])
@pytest.mark.parametrize("fused", [True, False])
def test_nan_and_infinity_pass_as_in_sgd(dtype, l1, fused):
    some = [1.0, float("nan"), float("inf"), -float("inf")]
    start = torch.tensor(some, dtype=torch_dtype(dtype)).repeat_interleave(4)
    grad = torch.tensor(some, dtype=torch_dtype(dtype)).repeat(4)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a = ProxSGD([ours], lr=0.1, momentum=0.9, weight_decay=0.01, l1=l1, fused=fused)
    b = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01, foreach=False)
    for _ in range(3):
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        a.step()
        b.step()
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isposinf(), theirs.isposinf())
        assert torch.equal(ours.isneginf(), theirs.isneginf())


@pytest.mark.parametrize("fused", [True, False, None])
def test_autograd_notices_the_step(fused):
    p = torch.nn.Parameter(torch.randn(5))
    optimizer = ProxSGD([p], fused=fused)
    for _ in range(2):
        loss = (p * p).sum()  # saves p
        p.grad = torch.ones(5)
        before = p._version
        optimizer.step()
        assert p._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    buffer = optimizer.state[p]["momentum_buffer"]
    version = buffer._version
    p.grad = torch.ones(5)
    optimizer.step()
    assert buffer._version > version


@pytest.mark.parametrize("fused", [True, False, None])
def test_gradients_that_carry_a_graph(fused):
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    optimizer, detached = ProxSGD([p], l1=0.1, fused=fused), ProxSGD([q], l1=0.1, fused=fused)
    for _ in range(3):
        (p.grad,) = torch.autograd.grad((p**3).sum(), p, create_graph=True)
        q.grad = p.grad.detach().clone()
        assert p.grad.requires_grad
        optimizer.step()
        detached.step()
        assert p.is_leaf
        assert p.requires_grad
        assert not optimizer.state[p]["momentum_buffer"].requires_grad
        assert_same(p, q)


@pytest.mark.parametrize("fused", [None, False])
def test_a_lazily_negated_gradient_is_read_with_its_sign(fused):
    start, grad = torch.linspace(-1, 1, 9), torch.linspace(2, 3, 9)
    p, q = start.clone(), start.clone()
    negated = torch._neg_view(grad)  # what x.conj().imag is
    assert negated.is_neg()
    prox_sgd_([p], [negated], lr=0.1, fused=fused)
    prox_sgd_([q], [-grad], lr=0.1, fused=fused)
    assert_same(p, q)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"lr": 0.1, "weight_decay": 0.0}], ids=str)
def test_an_option_of_minus_zero_after_one_of_zero(options):
    """They compare equal, but a step with one may give another zero than with the other."""
    key = next(key for key, value in options.items() if value == 0)
    values = torch.tensor([0.0, -0.0, 1.0, -1.0])
    for value in (0.0, -0.0, 0.0):
        results = []
        for fused in (True, False):
            p = values.clone()
            prox_sgd_([p], [values.flip(0)], **{**options, key: value}, fused=fused)
            results.append(p)
        assert_same(*results)


def test_narrow_types_are_nearer_the_truth_than_sgd():
    for dtype in (torch.bfloat16, torch.float16):
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(5000, generator=generator).to(dtype)
        grads = [torch.randn(5000, generator=generator).to(dtype) for _ in range(4)]
        params = [torch.nn.Parameter(start.clone().to(d)) for d in (torch.float64, dtype, dtype)]
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        exact = torch.optim.SGD([params[0]], **options)
        ours = ProxSGD([params[1]], **options, l1=0.0)
        theirs = torch.optim.SGD([params[2]], **options, foreach=False)
        for g in grads:
            for p in params:
                p.grad = g.to(p.dtype)
            for optimizer in (exact, ours, theirs):
                optimizer.step()
        errors = [(p.double() - params[0]).abs().mean().item() for p in params[1:]]
        assert errors[0] < errors[1]


MEMORY_PROBE = """
import torch
from resnet_reg_ext import ProxSGD

def peak():
    # Not ru_maxrss: a new process starts with its parent's.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1])

def growth(step):
    before = peak()
    for _ in range(3):
        step()
    return peak() - before

def fused(value):
    optimizer.param_groups[0]["fused"] = value
    optimizer.step()

torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.ones(1_000_000)) for _ in range(20)]
for p in params:
    p.grad = torch.ones(1_000_000)
optimizer = ProxSGD(params, fused=True)
optimizer.step()
for step in (lambda: fused(True), lambda: fused(False), lambda: torch._foreach_neg(params)):
    print(growth(step))
"""


@pytest.mark.new_process
def test_what_memory_a_step_needs_beyond_the_state(tmp_path):
    out = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE], cwd=tmp_path, stdout=subprocess.PIPE, check=True
    )
    native, pure, copy = (int(kib) for kib in out.stdout.split())
    assert native < 1024  # on 240 MB of parameters, gradients and momentum
    assert pure < 16_000  # pieces of 1 MB, and what torch loads at its first use of an operation
    assert copy > 70_000  # the probe does see 80 MB


def test_the_native_step_needs_no_torch_allocation():
    params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(50)]
    for p in params:
        p.grad = torch.ones(1000)
    optimizer = ProxSGD(params, fused=True)
    optimizer.step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        optimizer.step()
    assert sum(max(0, e.self_cpu_memory_usage) for e in profile.events()) < 4096


@pytest.mark.parametrize("fused", [True, False, None])
def test_closure(fused):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = ProxSGD([p], lr=0.1, momentum=0.0, weight_decay=0.0, l1=0.0, fused=fused)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():  # the closure has gradients all the same
        loss = optimizer.step(closure)
    assert loss.item() == 5.0
    assert torch.allclose(p, torch.tensor([0.8, -1.6]))  # 0.1 is not exact in float32
    assert optimizer.step() is None


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [3, 5000])
def test_a_default_device_is_none_of_the_steps_business(size, fused):
    """As where a user has called torch.set_default_device; what the step needs it puts itself."""
    plain, under = (torch.nn.Parameter(torch.linspace(-1, 1, size)) for _ in range(2))
    optimizers = [ProxSGD([w], 0.1, l1=0.1, nesterov=True, fused=fused) for w in (plain, under)]
    for w in (plain, under):
        w.grad = torch.ones(size)
    for _ in range(2):
        optimizers[0].step(grad_coefficient=0.5)
        with torch.device("meta"):
            optimizers[1].step(grad_coefficient=0.5)
    assert torch.equal(plain, under)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("fused", [True, False])
def test_a_coefficient_does_not_depend_on_the_default_dtype(dtype, fused):
    weights = []
    for default in (torch.float32, dtype):
        w = torch.nn.Parameter(torch.zeros(3, dtype=torch.float32))
        w.grad = torch.ones(3, dtype=torch.float32)
        optimizer = ProxSGD([w], 1.0, momentum=0.0, weight_decay=0.0, l1=0.0, fused=fused)
        torch.set_default_dtype(default)
        try:
            optimizer.step(grad_coefficient=1e6 + 0.125)
        finally:
            torch.set_default_dtype(torch.float32)
        weights.append(w.detach())
    assert torch.equal(*weights)
    assert weights[0][0] == -(1e6 + 0.125)


def test_parameters_in_a_tuple():
    """torch's own step only goes through them, whatever they are in."""
    w = torch.nn.Parameter(torch.zeros(3))
    w.grad = torch.ones(3)
    optimizer = ProxSGD([w], lr=1.0, momentum=0.5, weight_decay=0.0, l1=0.0)
    optimizer.param_groups[0]["params"] = (w,)
    optimizer.step()
    optimizer.step()
    assert w.tolist() == [-2.5] * 3


def test_lazy_modules():
    """Their parameters have no shape yet when the optimizer is made."""
    torch.manual_seed(0)
    net = torch.nn.LazyLinear(2)
    optimizer = ProxSGD(net.parameters(), lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.0)
    net(torch.ones(1, 3)).sum().backward()
    before = net.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.weight, before - 1)


@pytest.mark.parametrize("fused", [None, False])
def test_a_graph_that_is_recorded_holds_the_step(fused):
    """A native kernel is nothing that torch's dispatch modes could see."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def step(p, g):
        p = p.clone()
        prox_sgd_([p], [g], lr=0.5, l1=0.5, fused=fused)
        return p

    p, g = torch.tensor([1.0, 0.1]), torch.tensor([1.0, 0.0])
    recorded = make_fx(step)(torch.zeros(2), torch.zeros(2))
    assert recorded(p, g).tolist() == step(p, g).tolist() == [0.25, 0.0]


def test_fake_tensors_mode_leaves_the_real_ones_alone():
    from torch._subclasses.fake_tensor import FakeTensorMode

    w = torch.nn.Parameter(torch.ones(3))
    w.grad = torch.ones(3)
    optimizer = ProxSGD([w], lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer.step()
    assert w.tolist() == [1.0] * 3


def test_a_closure_that_raises_changes_nothing():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = ProxSGD([p])
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert p.tolist() == [1.0, 1.0]
    assert not optimizer.state


@pytest.mark.parametrize("fused", [True, False])
def test_hooks_see_the_step_before_and_after(fused):
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = ProxSGD([p], lr=0.5, l1=0.0, weight_decay=0.0, fused=fused)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(p.tolist()))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(p.tolist()))
    optimizer.step()
    assert seen == [[1.0, 1.0], [0.5, 0.5]]


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_in_the_backward_pass(fused):
    """Each parameter steps as soon as its gradient is there."""
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(4)]
    halves = params[:2], params[2:]
    at_once = {p: ProxSGD([p], **RECIPE, fused=fused) for p in halves[0]}

    def hook(p):
        at_once[p].step()
        p.grad = None

    for p in halves[0]:
        p.register_post_accumulate_grad_hook(hook)
    together = ProxSGD(halves[1], **RECIPE, fused=fused)
    for _ in range(3):
        for half in halves:
            (half[0] * half[1]).sin().sum().backward()
        together.step()
        together.zero_grad()
    for p, q in zip(*halves, strict=True):
        assert_same(p, q)


@pytest.mark.parametrize("fused", [True, False, None])
def test_parameters_without_a_gradient_stay(fused):
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = ProxSGD(params, lr=0.1, l1=0.1, weight_decay=0.1, fused=fused)
    optimizer.step()
    assert not optimizer.state
    params[1].grad = torch.zeros(3)
    optimizer.step()
    assert [p.tolist() == [1.0] * 3 for p in params] == [True, False, True]
    assert list(optimizer.state) == [params[1]]


@pytest.mark.parametrize("order", ["as it came", "reversed"])
@pytest.mark.parametrize("options", [{}, {"track_sparsity": True}])
def test_gradients_that_come_and_go(order, options):
    """Whichever parameters have one, in three groups, and in whatever order the state is."""
    sizes = range(1, 13)

    def groups(params):
        return [{"params": params[i : i + 4]} for i in (0, 4, 8)]

    ours, theirs = (
        [torch.nn.Parameter(t) for t in tensors([(n,) for n in sizes], "float32", 0)]
        for _ in range(2)
    )
    common = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = ProxSGD(groups(ours), **common, l1=0.0, fused=True, **options)
    sgd = torch.optim.SGD(groups(theirs), **common, foreach=False)
    some = random.Random(0)
    for step in range(12):
        for n, p, q in zip(sizes, ours, theirs, strict=True):
            p.grad = q.grad = None
            if some.random() < 0.6:
                p.grad = torch.randn(n, generator=torch.Generator().manual_seed(100 * step + n))
                q.grad = p.grad.clone()
        if order == "reversed":
            entries = list(optimizer.state.items())
            optimizer.state.clear()
            optimizer.state.update(reversed(entries))
        versions = [p._version for p in ours]
        optimizer.step()
        sgd.step()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(p, q, f"step {step}, parameter {i}")
            assert (p._version > versions[i]) is (p.grad is not None)
            buffers = [o.state[t].get("momentum_buffer") for o, t in ((optimizer, p), (sgd, q))]
            assert (buffers[0] is None) is (buffers[1] is None)
            if buffers[0] is not None:
                assert_same(*buffers, f"step {step}, momentum buffer {i}")


@pytest.mark.parametrize("fused", [True, False, None])
def test_added_group(fused):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = ProxSGD([p], lr=0.5, momentum=0.0, weight_decay=0.0, l1=0.0, fused=fused)
    optimizer.add_param_group({"params": [q], "l1": 1.0})
    for t in (p, q):
        t.grad = torch.zeros(3)
    optimizer.step()
    assert p.tolist() == [1.0] * 3
    assert q.tolist() == [0.5] * 3
    assert optimizer.param_groups[1]["fused"] is fused
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("fused", [True, False])
def test_every_option_by_group(fused):
    """Each group goes its own way, as an optimizer of its own would."""
    chosen = OPTIONS[:: len(OPTIONS) // 20]
    start = tensors([(50,)] * len(chosen), "float32", 0)
    together, apart = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    one = ProxSGD(
        [{"params": [p], **o} for p, o in zip(together, chosen, strict=True)], fused=fused
    )
    many = [ProxSGD([p], **o, fused=False) for p, o in zip(apart, chosen, strict=True)]
    for seed in (1, 2, 3):
        for p, q, g in zip(
            together, apart, tensors([(50,)] * len(chosen), "float32", seed), strict=True
        ):
            p.grad, q.grad = g.clone(), g.clone()
        one.step()
        for optimizer in many:
            optimizer.step()
        for p, q, options in zip(together, apart, chosen, strict=True):
            assert_same(p, q, name_of(options))


def test_fused_differs_by_group():
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 20)) for _ in range(3)]
    groups = [
        {"params": [p], "fused": fused}
        for p, fused in zip(params, (True, False, None), strict=True)
    ]
    optimizer = ProxSGD(groups, **RECIPE)
    for _ in range(3):
        for p in params:
            p.grad = p.detach().sin()
        optimizer.step()
    assert_same(params[0], params[1])
    assert_same(params[0], params[2])


def test_defaults_and_order_of_arguments():
    p = torch.nn.Parameter(torch.ones(1))
    assert ProxSGD([p]).defaults == {
        "lr": 1e-3,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 1e-4,
        "nesterov": False,
        "l1": 1e-5,
        "l2_mode": "coupled",
        "group_lasso": 0.0,
        "rows": None,
        "row_weights": None,
        "maximize": False,
        "fused": None,
        "frozen_zeros": False,
        "capturable": False,
        "master_weights": False,
        "momentum_dtype": None,
        "track_sparsity": False,
        "toward": "zero",
    }
    ours = ProxSGD([p], 0.1, 0.8, 0.0, 0.3, True).defaults  # as SGD's first five
    theirs = torch.optim.SGD([p], 0.1, 0.8, 0.0, 0.3, True).defaults
    for key in ("lr", "momentum", "dampening", "weight_decay", "nesterov"):
        assert ours[key] == theirs[key]
    with pytest.raises(TypeError):
        ProxSGD([p], 0.1, 0.8, 0.0, 0.3, True, 1e-5)


def test_named_parameters():
    model = torch.nn.Linear(3, 2)
    optimizer = ProxSGD(model.named_parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert len(optimizer.state) == 2


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_scaler_skips_what_overflowed(fused):
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    ours = ProxSGD([p], lr=0.1, l1=0.01, fused=fused)
    plain = ProxSGD([q], lr=0.1, l1=0.01, fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)  # a power of two: unscaling is exact
    for number in range(4):
        ours.zero_grad()
        scaler.scale((p**2).sum()).backward()
        overflow = number == 1
        if overflow:
            p.grad[3] = float("inf")
        before = p.detach().clone()
        scaler.step(ours)
        scaler.update()
        if overflow:
            assert_same(p, before)
        else:
            plain.zero_grad()
            (q**2).sum().backward()
            plain.step()
        assert_same(p, q)


def test_the_native_module_is_there():
    assert native.available()


def test_reference_fma_is_exact():
    """The vectorised fma against rationals, on values of all sizes and on near-cancellations."""
    generator = np.random.default_rng(0)

    def some(n):
        x = generator.standard_normal(n) * 2.0 ** generator.integers(-1060, 1000, n)
        return np.concatenate([x, generator.standard_normal(n), np.array([0.0, -0.0, np.inf])])

    with np.errstate(all="ignore"):
        a, b, c = some(1500), some(1500)[::-1].copy(), some(1500)
        c = np.where(generator.random(c.size) < 0.4, -(a * b) * (1 + 2.0**-52), c)
        expected = [
            reference.fma_in_rationals(*x)
            for x in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
        ]
        assert_same(reference.fma64(a, b, c), np.array(expected))
        a, b, c = (x.astype(np.float32) for x in (a, b, c))
        a[:500] *= np.float32(2.0**-70)
        c[500:900] = -(a * b)[500:900]
        exact = [reference.fma64(*(x.astype(np.float64) for x in (a, b, c)))]
        result = reference.fma32(a, b, c)
        # Within half a unit in the last place of the float64 value, which decides all but ties.
        finite = np.isfinite(result) & np.isfinite(exact[0])
        gap = abs(result[finite].astype(np.float64) - exact[0][finite])
        unit = np.spacing(abs(result[finite])).astype(np.float64)
        assert (gap <= unit / 2 * (1 + 2.0**-20)).all()
    # 1 + 2^-24 + 2^-60 lies just above a tie: float64 would round the last term away.
    tie = reference.fma32(np.float32(2.0**-30), np.float32(2.0**-30), np.float32(1))
    assert tie == 1
    above = reference.fma32(
        np.float32(1 + 2.0**-23), np.float32(2.0**-24 * (1 + 2.0**-23)), np.float32(1)
    )
    assert above == np.float32(1 + 2.0**-23)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_reference_rounding_is_torchs(dtype):
    """Against torch's own conversion, on every sign, exponent and tie."""
    bits = np.arange(0, 2**32, 4093, dtype=np.int64).astype(np.uint32)
    ties = (np.arange(0, 2**16, dtype=np.uint32) << 16) | 0x8000
    half_ties = (np.arange(0, 2**19, 7, dtype=np.uint32) << 13) | 0x1000
    x = np.concatenate([bits, ties, half_ties]).view(np.float32)
    with np.errstate(all="ignore"):
        assert_same(reference.rounded(x, dtype), torch.from_numpy(x.copy()).to(torch_dtype(dtype)))
