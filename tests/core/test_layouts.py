"""Whatever order the elements have in memory, each gets its own gradient and momentum."""

import gc
import itertools
import os
import subprocess
import sys
import textwrap
import weakref

import pytest
import torch
from reference import assert_same
from torch import nn

from resnet_reg_ext import ProxSGD
from resnet_reg_ext.backends import native
from resnet_reg_ext.backends.bucket import Bucket
from resnet_reg_ext.functional import prox_sgd_

pytestmark = [pytest.mark.reads_tensors, pytest.mark.sanitized]

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "l1": 0.01}
SHAPE = (4, 3, 2, 5)


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def permuted(tensor, order):
    """The same values; in memory the dimensions lie in this order."""
    memory = tensor.permute(order).contiguous()
    return memory.permute([order.index(i) for i in range(len(order))])


def with_gaps(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def offset(tensor):
    """The same values, one element behind the start of their storage."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


LAYOUTS = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: permuted(t, (2, 0, 3, 1)),
    "reversed": lambda t: permuted(t, (3, 2, 1, 0)),
    "unaligned": offset,
}


def step_by_step(layouts, dtype=torch.float32, fused=True, steps=3):
    """Three steps with parameter, gradient and momentum so laid out; returns p and m."""
    lay = [LAYOUTS[name] for name in layouts]
    p, m = lay[0](randn(SHAPE, 0, dtype)), lay[2](randn(SHAPE, 1, dtype))
    strides = p.stride(), m.stride()
    for seed in range(steps):
        prox_sgd_([p], [lay[1](randn(SHAPE, 2 + seed, dtype))], [m], **OPTIONS, fused=fused)
    assert (p.stride(), m.stride()) == strides
    return p, m


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "layouts", list(itertools.product(LAYOUTS, repeat=3)), ids=lambda names: "-".join(names)
)
def test_every_dense_layout_goes_the_native_way(layouts, dtype):
    expected = step_by_step(("contiguous",) * 3, dtype, fused=False)
    for fused in (True, False):
        for actual, wanted in zip(step_by_step(layouts, dtype, fused), expected, strict=True):
            assert_same(actual, wanted, f"fused={fused}")


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("param_layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_optimizer(param_layout, grad_layout, fused):
    """The momentum buffer is the optimizer's own here."""
    expected, p = (
        nn.Parameter(randn(SHAPE, 0)),
        nn.Parameter(LAYOUTS[param_layout](randn(SHAPE, 0))),
    )
    plain, optimizer = (
        ProxSGD([expected], **OPTIONS, fused=False),
        ProxSGD([p], **OPTIONS, fused=fused),
    )
    for seed in range(1, 4):
        expected.grad = randn(SHAPE, seed)
        p.grad = LAYOUTS[grad_layout](randn(SHAPE, seed))
        plain.step()
        optimizer.step()
        assert_same(p, expected)
    buffer = optimizer.state[p]["momentum_buffer"]
    assert_same(buffer, plain.state[expected]["momentum_buffer"])
    assert buffer.untyped_storage().nbytes() == 4 * buffer.numel()


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("dims", [(), (0,), (1, 2), (0, 1, 2, 3)], ids=str)
def test_expanded_gradient(dims, fused):
    """As of a sum: one number that stands for many, stride 0."""
    shape = [1 if i in dims else n for i, n in enumerate(SHAPE)]
    grad = randn(shape, 1).expand(SHAPE)
    p, q = randn(SHAPE, 0), randn(SHAPE, 0)
    m, n = torch.zeros(SHAPE), torch.zeros(SHAPE)
    for first in (True, False):
        prox_sgd_([p], [grad], [m], **OPTIONS, first_step=first, fused=fused)
        prox_sgd_([q], [grad.clone()], [n], **OPTIONS, first_step=first, fused=False)
        assert_same(p, q)
        assert_same(m, n)


@pytest.mark.parametrize("fused", [True, None, False])
def test_gradient_of_a_sum_through_autograd(fused):
    p, q = nn.Parameter(randn(SHAPE, 0)), nn.Parameter(randn(SHAPE, 0))
    (p.grad,) = torch.autograd.grad(p.sum(), p)
    assert p.grad.stride() == (0, 0, 0, 0)
    q.grad = torch.ones(SHAPE)
    ProxSGD([p], **OPTIONS, fused=fused).step()
    ProxSGD([q], **OPTIONS, fused=False).step()
    assert_same(p, q)


EXPANDED = {
    "of a sum": lambda n: torch.tensor(0.3).expand(n, 1),
    "by columns": lambda n: randn((n, 1), 5).expand(n, 3),
    "by rows": lambda n: randn((1, 3), 5).expand(n, 3),
}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", EXPANDED)
def test_expanded_gradients_of_all_sizes_are_rounded_once(case, dtype, fused):
    """torch rounds product and sum apart where strides are 0 and a vector isn't full."""
    for n in (1, 7, 12, 33, 1000, 5001):
        grad = EXPANDED[case](n).to(dtype)
        for options in (FLAT, OPTIONS, {**OPTIONS, "nesterov": True}):
            p, q = randn(grad.shape, 0, dtype), randn(grad.shape, 0, dtype)
            m, k = torch.zeros_like(p), torch.zeros_like(q)
            prox_sgd_([p], [grad], [m], **options, fused=fused)
            prox_sgd_([q], [grad.contiguous()], [k], **options, fused=True)
            assert_same(p, q, f"{n}")
            assert_same(m, k, f"{n}")


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [4096, 4097, 300_000])
def test_negated_gradients_of_all_sizes_keep_their_sign(size, dtype, fused):
    """torch's copy to another dtype forgets the sign of a contiguous negated view."""
    grad = randn((size,), 1, dtype)
    p, q = randn((size,), 0, dtype), randn((size,), 0, dtype)
    prox_sgd_([p], [torch._neg_view(grad)], **FLAT, fused=fused)
    prox_sgd_([q], [-grad], **FLAT, fused=fused)
    assert_same(p, q)


def as_on_cuda(tensor):
    address, _, _, *rest = native._describe(tensor)
    return (address, 2, 0, *rest)


@pytest.mark.skipif(not native.why_cuda_unusable(0), reason="this build can use the GPU")
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "contiguous"])
@pytest.mark.parametrize("which", ["gradient", "momentum"])
def test_every_parameter_is_stepped_on_a_device_that_the_build_can_not_use(
    monkeypatch, layout, which
):
    """Whatever its layout. The tensors are on the CPU, and described as on a CUDA device."""
    reader = native._C.TensorReader(None, as_on_cuda, lambda i: 0, torch.Tensor, nn.Parameter)
    monkeypatch.setattr(native, "_reader", reader)
    monkeypatch.setattr(native, "warn_unusable_cuda", lambda device: None)
    start, grad, buffer = (randn(SHAPE, seed) for seed in range(3))
    results = []
    for fused in (None, False):
        params = [start.contiguous(memory_format=torch.channels_last), randn((5,), 3)]
        grads = [grad.clone(), randn((5,), 4)]
        buffers = [buffer.clone(), torch.zeros(5)]
        changed = grads if which == "gradient" else buffers
        changed[0] = LAYOUTS[layout](changed[0])
        prox_sgd_(params, grads, buffers, **OPTIONS, fused=fused)
        assert all((p != q).any() for p, q in zip(params, (start, randn((5,), 3)), strict=True))
        results.append([*params, *buffers])
    for a, b in zip(*results, strict=True):
        assert_same(a, b)
    p = start.contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="fused=True, but its CUDA device can't be used"):
        prox_sgd_([p], [grad], lr=0.1, fused=True)
    assert_same(p, start)


@pytest.mark.parametrize("which", ["parameter", "gradient", "momentum", "all"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16],
    ids=["float32", "float64", "bfloat16", "float16"],
)
def test_gaps(which, dtype):
    def make(name, seed):
        tensor = randn(SHAPE, seed, dtype)
        return with_gaps(tensor) if which in (name, "all") else tensor

    results = []
    for gaps in (False, True):
        p, m = (
            (make(n, s) if gaps else randn(SHAPE, s, dtype))
            for n, s in (("parameter", 0), ("momentum", 1))
        )
        for seed in (2, 3):
            g = make("gradient", seed) if gaps else randn(SHAPE, seed, dtype)
            prox_sgd_([p], [g], [m], **OPTIONS, fused=None)
        results.append((p, m))
    for actual, wanted in zip(results[1], results[0], strict=True):
        assert_same(actual, wanted)


def test_a_gapped_parameter_is_refused_by_fused_true():
    p = with_gaps(randn(SHAPE, 0))
    before = p.clone()
    with pytest.raises(RuntimeError, match="not dense"):
        prox_sgd_([p], [randn(SHAPE, 1)], lr=0.1, fused=True)
    assert_same(p, before)


def test_what_lies_in_the_gaps_stays():
    whole = randn((4, 10), 0)
    before = whole.clone()
    prox_sgd_([whole[:, ::2]], [randn((4, 5), 1)], lr=0.1, l1=0.1)
    assert torch.equal(whole[:, 1::2], before[:, 1::2])
    assert not torch.equal(whole[:, ::2], before[:, ::2])


def test_a_slice_of_a_flat_buffer_changes_nothing_beside_it():
    for begin, end in ((0, 7), (1, 9), (3, 70), (5, 5)):
        for fused in (True, False):
            flat, other = randn((100,), 0), randn((100,), 0)
            prox_sgd_([flat[begin:end]], [randn((100,), 1)[begin:end]], **FLAT, fused=fused)
            prox_sgd_([other], [randn((100,), 1)], **FLAT, fused=False)
            assert_same(flat[begin:end], other[begin:end])
            assert_same(flat[:begin], randn((100,), 0)[:begin])
            assert_same(flat[end:], randn((100,), 0)[end:])


FLAT = {"lr": 0.1, "weight_decay": 0.02, "l1": 0.01}


def test_one_bucket_of_all_kinds():
    """Native, laid out anew and pure tensors between one another keep their places."""
    shapes = [SHAPE] * 6 + [(), (0, 3), (7,)]
    results = []
    for fused in (None, False):
        params = [randn(s, i) for i, s in enumerate(shapes)]
        grads = [randn(s, 20 + i) for i, s in enumerate(shapes)]
        momenta = [randn(s, 40 + i) for i, s in enumerate(shapes)]
        params[1] = with_gaps(params[1])
        params[2] = LAYOUTS["channels_last"](params[2])
        grads[3] = randn((1, 1, 1, 5), 23).expand(SHAPE)
        momenta[4] = LAYOUTS["permuted"](momenta[4])
        momenta[5] = momenta[5].double()
        params[8] = params[8].double()
        grads[8] = grads[8].double()
        momenta[8] = momenta[8].double()
        prox_sgd_(params, grads, momenta, **OPTIONS, fused=fused)
        results.append((params, momenta))
    for i in range(len(shapes)):
        for kind in (0, 1):
            assert_same(results[0][kind][i], results[1][kind][i], f"tensor {i}")


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    ("param_dtype", "other_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
    ],
    ids=["float32 beside bfloat16", "bfloat16 beside float32", "float32 beside float16"],
)
def test_gradient_or_momentum_of_another_dtype(param_dtype, other_dtype, fused):
    """Widening is exact, so the step must be float32's, rounded once at the end."""
    p, m = randn((77,), 0, param_dtype), randn((77,), 1, other_dtype)
    g = randn((77,), 2, other_dtype)
    wide = [p.clone().float(), m.clone().float()]
    prox_sgd_([wide[0]], [g.float()], [wide[1]], **OPTIONS, fused=True)
    prox_sgd_([p], [g], [m], **OPTIONS, fused=fused)
    assert_same(p, wide[0].to(param_dtype))
    assert_same(m, wide[1].to(other_dtype))
    with pytest.raises(RuntimeError, match="has another shape, device or dtype"):
        prox_sgd_([p], [g], [m], **OPTIONS, fused=True)


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((4, 3, 1, 1), (3, 1, 3, 3)), ((4, 1), (1, 77)), ((1,), (5,)), ((1, 1, 6), (9, 1000, 1))],
    ids=str,
)
def test_strides_of_size_one_say_nothing(shape, strides):
    results = []
    for lay in (lambda t: torch.empty_strided(shape, strides).copy_(t), lambda t: t):
        p = randn(shape, 0)
        m = lay(randn(shape, 2))
        prox_sgd_([p], [lay(randn(shape, 1))], [m], **OPTIONS, fused=True)
        results.append((p, m))
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("fused", [True, False, None])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scalars_and_empty_tensors(shape, momentum, fused):
    p, q = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    ours = ProxSGD([p], lr=0.1, momentum=momentum, l1=0.0, weight_decay=0.1, fused=fused)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=momentum, weight_decay=0.1, foreach=False)
    for _ in range(2):
        p.grad, q.grad = torch.ones(shape), torch.ones(shape)
        ours.step()
        theirs.step()
        assert_same(p, q)


def test_many_dimensions():
    shape = (1, 2) * 8
    p, q, g = randn(shape, 0), randn(shape, 0), randn(shape, 1)
    order = list(range(16))[::-1]
    prox_sgd_([permuted(p, order)], [g], lr=0.1, fused=True)  # a copy: just runs
    p = permuted(p, order)
    prox_sgd_([p], [g], **FLAT, fused=True)
    prox_sgd_([q], [g], **FLAT, fused=False)
    assert_same(p, q)


class Bottleneck(nn.Module):
    """A residual block of ResNet-50's kind: 1x1, 3x3 and 1x1 convolutions."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.shortcut = nn.Conv2d(channels, 4 * width, 1, stride=stride, bias=False)

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


def small_resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        Bottleneck(8, 4, 1),
        Bottleneck(16, 4, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def gradients_of(make, weight_format, input_format, size):
    """A model and its gradients, as its backward pass lays them out."""
    torch.manual_seed(0)
    model = make().to(memory_format=weight_format)
    x = randn((2, 3, size, size), 0).contiguous(memory_format=input_format)
    nn.functional.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    return model


@pytest.mark.parametrize("input_format", FORMATS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_residual_network_in_every_format(weight_format, input_format):
    model = gradients_of(small_resnet, FORMATS[weight_format], FORMATS[input_format], 32)
    optimizer = ProxSGD(model.named_parameters(), **OPTIONS, fused=True)
    # Plain copies, made from the very same numbers.
    plain = [
        nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
        for p in model.parameters()
    ]
    reference = ProxSGD(plain, **OPTIONS, fused=False)
    for _ in range(2):
        for p, q in zip(model.parameters(), plain, strict=True):
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        reference.step()
        for (name, p), q in zip(model.named_parameters(), plain, strict=True):
            assert_same(p, q, name)


def resnet50():
    try:
        from torchvision.models import resnet50
    except ImportError:
        # Its shapes without torchvision: three 1x1, 3x3 and 1x1 convolutions at full width.
        return nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            Bottleneck(64, 64, 1),
            Bottleneck(256, 128, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(512, 1000),
        )
    return resnet50()


@pytest.mark.usefixtures("runtime")
def test_resnet50_in_every_format():
    torch.set_num_threads(1)  # the passes are small; threads would only wait for one another
    torch.manual_seed(0)
    model = resnet50()
    for weight_format, input_format in itertools.product(FORMATS.values(), repeat=2):
        model.to(memory_format=weight_format)
        model.zero_grad()
        x = randn((2, 3, 32, 32), 0).contiguous(memory_format=input_format)
        model(x).square().mean().backward()
        optimizer = ProxSGD(model.named_parameters(), **OPTIONS, fused=True)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        for (name, p), q in zip(model.named_parameters(), before, strict=True):
            prox_sgd_([q], [p.grad], [torch.zeros_like(q)], **OPTIONS, first_step=True, fused=False)
            assert torch.equal(p, q), name


def test_right_where_torchs_fused_sgd_pairs_by_address():
    """A channels_last parameter with a contiguous gradient.

    torch.optim.SGD(fused=True) on a CPU walks both by address, so elements get one another's
    gradients (torch 2.13, 2.14). Nothing is asserted of it: it may be mended.
    """
    start = torch.arange(2 * 3 * 2 * 2, dtype=torch.float32).view(2, 3, 2, 2)
    grad = start * 10
    p = nn.Parameter(start.contiguous(memory_format=torch.channels_last))
    p.grad = grad.clone()
    ProxSGD([p], lr=0.1, momentum=0.9, weight_decay=0.0, l1=0.0, fused=True).step()
    q = nn.Parameter(start.contiguous(memory_format=torch.channels_last))
    q.grad = grad.clone()
    torch.optim.SGD([q], lr=0.1, momentum=0.9, foreach=False).step()
    assert_same(p, q)
    # The exact answer, whoever computes it: start - 0.1 * 10 * start, rounded once.
    assert torch.allclose(p, torch.zeros_like(start), atol=1e-5)  # 0.1 is not exact in float32


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tensor_that_pure_pytorch_cuts_in_pieces(dtype, format):
    """More elements than it works on at a time, which don't divide evenly, among small ones."""
    shapes = (70, 1, 1, 1), (700, 131, 3, 3), (3, 5, 1, 1)
    results = []
    for fused in (True, False):
        params = [nn.Parameter(randn(s, 0, dtype).to(memory_format=format)) for s in shapes]
        optimizer = ProxSGD(params, **OPTIONS, fused=fused)
        for step in range(2):
            for p in params:
                p.grad = randn(p.shape, 1 + step, dtype).to(memory_format=format)
            optimizer.step()
        results.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    for fast, pure in zip(*results, strict=True):
        assert_same(fast, pure)


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True, "maximize": True},
        {"momentum": 0.0, "l2_mode": "proximal"},
        {"momentum_dtype": torch.bfloat16, "dampening": 0.5},
    ],
    ids=str,
)
def test_large_tensors_that_pure_pytorch_cannot_cut(options):
    """Transposed, or a gradient of another layout than the parameter; a small one after them."""
    results = []
    for fused in (None, False):
        params = [
            nn.Parameter(randn((601, 613), 0).t()),
            nn.Parameter(randn((260, 120, 3, 3), 1).to(memory_format=torch.channels_last)),
            nn.Parameter(randn((7, 5, 3, 3), 2).to(memory_format=torch.channels_last)),
        ]
        optimizer = ProxSGD(params, **{**OPTIONS, **options}, fused=fused)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = randn(p.shape, 10 * step + i)  # contiguous, unlike any of the parameters
            optimizer.step(grad_coefficient=0.75)
        results.append([*params, *(s["momentum_buffer"] for s in optimizer.state.values() if s)])
    assert (results[0][0] == 0).any()
    for fast, pure in zip(*results, strict=True):
        assert_same(fast, pure)


@pytest.mark.parametrize("count", [127, 128, 129, 300])
@pytest.mark.parametrize("odd", [{}, {126: "gap"}, {125: "negated", 124: "none"}, {2: "layout"}])
def test_many_parameters_of_which_some_are_odd(count, odd):
    """The native core reads them in blocks; each has its own place, whatever lies before it."""

    def parameters():
        generator = torch.Generator().manual_seed(count)
        params = [torch.randn(3, 1 + i % 4, generator=generator) for i in range(count)]
        params = [torch.nn.Parameter(p) for p in params]
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator)
            if i % 7 == 3 or odd.get(i) == "none":
                p.grad = None
            elif odd.get(i) == "gap":
                p.data = torch.stack([p, p], -1)[..., 0]
            elif odd.get(i) == "negated":
                p.grad = torch._neg_view(p.grad)
            elif odd.get(i) == "layout":
                p.grad = torch.randn(p.shape[::-1], generator=generator).t()
                assert p.grad.stride() != p.stride()
        return params

    ours, pure = parameters(), parameters()
    native = ProxSGD(ours, **OPTIONS)
    reference = ProxSGD(pure, **OPTIONS, fused=False)
    for _ in range(3):
        native.step()
        reference.step()
    for p, q in zip(ours, pure, strict=True):
        assert_same(p, q)
        assert (p in native.state) is (q.grad is not None)
    assert any((p == 0).any() for p in ours)


def test_an_empty_tensor_takes_no_place_wherever_it_is():
    """As on a device for which nothing was built: the others there go the pure way, and so may it.

    The tensors are made up, as no such device is at hand: what is read of one is what we say.
    """

    class Tensor:
        pass

    def on_cuda(tensor):
        return (0, 2, 0, 2, 32, (0, 3), (3, 1))

    reader = native._C.TensorReader(None, on_cuda, lambda device: 0, Tensor, Tensor)
    reading = reader.read([Tensor()], [Tensor()], None, None, 0)
    assert reading.misfits == []
    numbers = dict.fromkeys(["lr", "momentum", "dampening", "weight_decay", "l1"], 0.0)
    switches = ["nesterov", "maximize", "proximal", "frozen_zeros", "first_step"]
    options = native._C.Options(
        **numbers, **dict.fromkeys(switches, False), grad_scale=1.0, grad_coefficient=1.0
    )
    native._C.prox_sgd_(reader, [(reading, options, {})], 1)


def test_ctrl_c_while_tensors_are_read_is_not_lost():
    class Tensor:
        pass

    def interrupted(tensor):
        raise KeyboardInterrupt

    reader = native._C.TensorReader(None, interrupted, None, Tensor, Tensor)
    with pytest.raises(KeyboardInterrupt):
        reader.read([Tensor()], [Tensor()], None, None, 0)


def test_a_reading_keeps_its_tensors_alive():
    params, grads = [torch.ones(3)], [torch.ones(3)]
    alive = weakref.ref(grads[0])
    reading = native.read(Bucket(params, grads, None, None, False, str))
    del grads
    assert alive() is not None
    del reading
    assert alive() is None


@pytest.mark.new_process
@pytest.mark.parametrize("found", ["5", "object()", "None"])
def test_an_exchange_api_that_is_none_of_torchs_is_not_used(found):
    script = (
        f"import torch; torch.Tensor.__dlpack_c_exchange_api__ = {found}\n"
        "import resnet_reg_ext as r\n"
        "assert not r.backends.native.has_exchange_api()\n"
        "w = torch.nn.Parameter(torch.tensor([1.0, 0.05])); w.grad = torch.zeros(2)\n"
        "r.ProxSGD([w], lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.5, fused=True).step()\n"
        "assert w.tolist() == [0.5, 0.0], w\n"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# What other threads could do wherever torch lets them run: torch calls this mode at such places.
CHANGES = {
    "parameters cleared": lambda optimizer: optimizer.param_groups[0]["params"].clear(),
    "state cleared": lambda optimizer: optimizer.state.clear(),
    "all lists looked into": lambda optimizer: [
        list(found) for found in gc.get_objects() if type(found) is list
    ],
}


def test_changes_while_tensors_are_read_do_no_harm():
    """In a process of its own, which must not die."""
    script = textwrap.dedent("""
        import gc, itertools, torch
        from torch.overrides import TorchFunctionMode
        from resnet_reg_ext import ProxSGD
        from test_layouts import CHANGES

        class Change(TorchFunctionMode):
            def __init__(self, change, optimizer):
                super().__init__()
                self.change, self.optimizer, self.calls = change, optimizer, 0

            def __torch_function__(self, function, types, args=(), kwargs=None):
                self.calls += 1
                if self.calls in (3, 4, 150, 250, 290, 301, 450):  # the profiler's come first
                    self.change(self.optimizer)
                return function(*args, **(kwargs or {}))

        for name, momentum in itertools.product(CHANGES, (0.0, 0.5)):
            params = [torch.nn.Parameter(torch.ones(3)) for _ in range(300)]
            optimizer = ProxSGD(params, lr=0.25, momentum=momentum, weight_decay=0.0, l1=0.0)
            for p in params:
                p.grad = torch.ones(3)
            optimizer.step()
            gc.collect()
            gc.freeze()
            with Change(CHANGES[name], optimizer) as mode:
                optimizer.step()
            assert mode.calls > 2
            # Every parameter has been stepped once more, or not at all.
            values = {p.tolist()[0] for p in params}
            assert values <= {0.75, 0.5, 0.75 - 0.25 * (1 + momentum)}, (name, values)
            print(name, momentum, flush=True)
    """)
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    survived = "".join(f"{name} {momentum}\n" for name in CHANGES for momentum in (0.0, 0.5))
    assert (result.returncode, result.stdout) == (0, survived), result.stderr
