"""On a real GPU: what the PTX interpreter can't show. Skipped, visibly, where there is none."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from resnet_reg_ext import ProxSGD
from resnet_reg_ext.backends import native
from resnet_reg_ext.functional import prox_sgd_

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver"
)

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [
    {"lr": 0.1, "l1": 0.3, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9, "l1": 0.03, "weight_decay": 0.1, "nesterov": True},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "l1": 0.06, "maximize": True},
    {"lr": 0.1, "momentum": 0.7, "l1": 0.1, "weight_decay": 0.5, "l2_mode": "proximal"},
]


def bucket(dtype: torch.dtype, device: str = "cpu") -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = [0, 1, 3, 4, 5, 1023, 4096, 4097, 100_003]
    return [
        [torch.randn(n, generator=generator).to(dtype).to(device) for n in sizes] for _ in range(3)
    ]


def test_the_build_can_use_this_gpu():
    assert native.why_cuda_unusable(torch.cuda.current_device()) == ""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_equal_the_cpu_backends(dtype, options):
    on_cpu, on_gpu = bucket(dtype), bucket(dtype, "cuda")
    for p, g, m in (on_cpu, on_gpu):
        for step in range(3):
            prox_sgd_(
                p,
                g,
                m if "momentum" in options else None,
                first_step=not step,
                fused=True,
                **options,
            )
    for cpu, gpu in zip(on_cpu[0] + on_cpu[2], on_gpu[0] + on_gpu[2], strict=True):
        assert torch.equal(cpu, gpu.cpu())


def test_the_step_waits_for_its_own_stream_only():
    p, g = torch.zeros(1 << 22, device="cuda"), torch.zeros(1 << 22, device="cuda")
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # the gradient arrives late, on the step's stream
        g.fill_(1.0)
        prox_sgd_([p], [g], lr=1.0, fused=True)
    torch.cuda.current_stream().wait_stream(side)
    assert (p == -1.0).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_step_runs_where_the_tensors_are():
    p, g = torch.zeros(10, device="cuda:1"), torch.ones(10, device="cuda:1")
    with torch.cuda.device(0):
        prox_sgd_([p], [g], lr=1.0, fused=True)
        assert torch.cuda.current_device() == 0
    assert (p == -1.0).all()


def test_buffers_made_anew_for_each_step_are_safe():
    """Gradients that are freed while the kernel may still run are reused in stream order."""
    w = torch.nn.Parameter(torch.zeros(1 << 20, device="cuda"))
    optimizer = ProxSGD([w], lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.0, fused=True)
    for _ in range(50):
        w.grad = torch.ones_like(w)
        optimizer.step()
        optimizer.zero_grad()
        torch.full_like(w, 1e9)
    assert (w == -50.0).all()


def optimizer_on(device, dtypes, **options):
    """Two groups of parameters of many sizes and layouts, the same values on each device."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(), (0,), (1,), (5, 3), (4, 3, 2, 5), (64, 32, 3, 3), (100_003,)]
    shapes += [(i % 7 + 1,) for i in range(700)]  # more than one table takes
    lists = [], []
    for i, shape in enumerate(shapes):
        value = torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)]).to(device)
        if i % 2 and len(shape) == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        lists[i % 2].append(torch.nn.Parameter(value))
    options = {"lr": 0.1, "l1": 0.01, "weight_decay": 0.02, **options}
    nesterov = options.get("momentum") != 0.0
    groups = [{"params": lists[0]}, {"params": lists[1], "l1": 0.0, "nesterov": nesterov}]
    return ProxSGD(groups, **options)


def give_gradients(optimizer, step, scale=1.0):
    """The same on each device; contiguous, so that some are laid out unlike their parameter."""
    generator = torch.Generator().manual_seed(step)
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            grad = scale * torch.randn(p.shape, generator=generator)
            late = i % 5 == 4 and step == 0
            p.grad = None if late else grad.to(p.dtype).to(p.device)


def held(optimizer):
    """Parameters and state, on the CPU."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for p in params for v in optimizer.state.get(p, {}).values()]
    return [t.detach().cpu() for t in (*params, *state)]


def assert_equal_bits(a, b):
    for left, right in zip(held(a), held(b), strict=True):
        assert left.dtype is right.dtype
        assert torch.equal(left, right)


STORAGE = {
    "all dtypes": (DTYPES, {}),
    "master weights": ([torch.bfloat16, torch.float16, torch.float32], {"master_weights": True}),
    "bfloat16 momentum": ([torch.float32], {"momentum_dtype": torch.bfloat16}),
    "both": ([torch.bfloat16], {"master_weights": True, "momentum_dtype": torch.bfloat16}),
    "zeros counted": (DTYPES, {"track_sparsity": True}),
    "proximal": (DTYPES, {"l2_mode": "proximal", "maximize": True}),
    "without momentum": (DTYPES, {"momentum": 0.0}),
    "start": (DTYPES, {"toward": "start", "track_sparsity": True}),
    "start and masters": ([torch.bfloat16], {"toward": "start", "master_weights": True}),
    "start, proximal": (DTYPES, {"toward": "start", "l2_mode": "proximal"}),
}


@pytest.mark.parametrize("storage", STORAGE)
def test_the_optimizer_gives_the_cpus_bits(storage):
    dtypes, options = STORAGE[storage]
    on_cpu, on_gpu = (optimizer_on(d, dtypes, fused=True, **options) for d in ("cpu", DEVICE))
    for step in range(4):
        for optimizer in (on_cpu, on_gpu):
            give_gradients(optimizer, step)
            optimizer.step(grad_coefficient=0.75)
    assert_equal_bits(on_cpu, on_gpu)
    assert on_cpu.sparsity().to_dict() == on_gpu.sparsity().to_dict()
    assert on_gpu.sparsity().zeros > 0


def test_frozen_zeros():
    optimizers = [optimizer_on(d, [torch.float32], fused=True, l1=0.5) for d in ("cpu", DEVICE)]
    for optimizer in optimizers:
        for step in range(4):
            give_gradients(optimizer, step)
            optimizer.step()
            if step == 1:
                optimizer.freeze_zeros()
    assert_equal_bits(*optimizers)


def test_lr_l1_and_a_coefficient_in_device_memory():
    """Read when the kernel runs; the bits are those of the same numbers from the host."""
    on_host, on_device = (optimizer_on(DEVICE, [torch.float32], fused=True) for _ in range(2))
    lr = torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
    l1 = torch.tensor(0.01, dtype=torch.float64, device=DEVICE)
    for group in on_device.param_groups:
        group["lr"] = lr
    on_device.param_groups[0]["l1"] = l1
    for step in range(4):
        give_gradients(on_host, step)
        give_gradients(on_device, step)
        on_host.step(grad_coefficient=0.5)
        on_device.step(grad_coefficient=torch.tensor(0.5, device=DEVICE))
        lr.mul_(0.5)
        l1.mul_(2.0)
        for group in on_host.param_groups:
            group["lr"] *= 0.5
        on_host.param_groups[0]["l1"] *= 2.0
    assert_equal_bits(on_host, on_device)


@pytest.mark.parametrize("first_on", ["cpu", "gpu"])
def test_a_group_on_both_devices_with_an_lr_on_one(first_on):
    lr = torch.tensor(0.5, device=DEVICE)
    params = [torch.nn.Parameter(torch.zeros(3, device=d)) for d in ("cpu", DEVICE)]
    if first_on == "gpu":
        params.reverse()
    optimizer = ProxSGD(params, lr=lr, momentum=0.0, weight_decay=0.0, l1=0.0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [p.tolist() for p in params] == [[-0.5] * 3] * 2


@pytest.mark.parametrize("options", [{"fused": True}, {"capturable": True}, {}], ids=str)
def test_a_gradient_scaler(options):
    """Unscales and skips inside the step or before it; either way as without a scale."""
    scaled, plain = (optimizer_on(DEVICE, [torch.float32], **options) for _ in range(2))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.zeros(1, device=DEVICE))  # makes the scale's tensor
    for step in range(5):
        before = held(scaled)
        scale = scaler.get_scale()
        give_gradients(scaled, step, scale)
        overflows = step in (0, 2)
        if overflows:
            scaled.param_groups[0]["params"][0].grad.fill_(float("inf"))
        scaler.step(scaled)
        scaler.update()
        if overflows:
            assert scaler.get_scale() == scale / 2
            assert all(map(torch.equal, held(scaled), before))
        else:
            give_gradients(plain, step)
            plain.step()
    assert_equal_bits(scaled, plain)


def test_a_captured_graph_follows_lr():
    w = torch.nn.Parameter(torch.zeros(1000, device=DEVICE))
    w.grad = torch.ones_like(w)
    lr = torch.tensor(1.0, device=DEVICE)
    optimizer = ProxSGD(
        [w], lr, momentum=0.5, weight_decay=0.0, l1=0.0, fused=True, capturable=True
    )
    optimizer.step()  # makes the momentum buffers
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    assert (w == -1.0).all()  # capturing runs nothing
    graph.replay()
    torch.cuda.synchronize()
    assert (w == -2.5).all()
    lr.fill_(2.0)
    graph.replay()
    torch.cuda.synchronize()
    assert (w == -6.0).all()


def test_capturing_what_would_not_follow_is_refused():
    w = torch.nn.Parameter(torch.zeros(1000, device=DEVICE))
    w.grad = torch.ones_like(w)
    optimizer = ProxSGD([w], lr=1.0, momentum=0.5, weight_decay=0.0, l1=0.0)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(RuntimeError, match=r"param_groups\[0\].*capturable is False"):
            optimizer.step()
        w.grad.add_(0.0)  # an empty graph would be warned of
    assert (w == -1.0).all()


def test_a_start_that_a_graph_would_take_anew_is_refused():
    w = torch.nn.Parameter(torch.zeros(1000, device=DEVICE))
    w.grad = torch.ones_like(w)
    optimizer = ProxSGD([w], lr=1.0, momentum=0.0, l1=0.1, toward="start", capturable=True)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with pytest.raises(RuntimeError, match=r"param_groups\[0\].*one step before the capture"):
            optimizer.step()
        w.grad.add_(0.0)  # an empty graph would be warned of
    assert (w == 0.0).all()


def test_all_groups_are_one_launch():
    optimizer = optimizer_on(DEVICE, [torch.float32], fused=True)
    for group in optimizer.param_groups:
        group["params"] = group["params"][:80]
    for step in range(2):
        give_gradients(optimizer, step)
        optimizer.step()
    give_gradients(optimizer, 2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    # Some gradients are laid out unlike their parameter: those are copied.
    launches = [e.name for e in profile.events() if e.name.startswith("prox_sgd")]
    assert len(launches) in (1, 2)


@pytest.mark.parametrize("found_inf", [0.5, 2.0, float("nan")])
def test_whatever_found_inf_holds_that_is_not_0_skips_the_step(found_inf):
    optimizer = optimizer_on(DEVICE, [torch.float32], fused=True)
    give_gradients(optimizer, 1)
    optimizer.step()
    before = held(optimizer)
    optimizer.grad_scale = torch.tensor(1.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(found_inf, device=DEVICE)
    give_gradients(optimizer, 2)
    optimizer.step()
    assert all(map(torch.equal, held(optimizer), before))


def test_misaligned_tensors_nans_and_signed_zeros():
    special = torch.tensor([float("nan"), 0.0, -0.0, float("inf"), -float("inf"), 1e-40, 1.0])
    values = special.repeat(700)
    for skews in [(0, 1, 0), (1, 1, 1), (1, 0, 0), (0, 0, 3), (0, 0, 0)]:
        sides = []
        for device in ("cpu", DEVICE):
            p, g, m = (values.roll(i).to(device)[skew:][:4000] for i, skew in enumerate(skews))
            prox_sgd_([p], [g], [m], lr=0.1, momentum=0.9, l1=0.1, weight_decay=0.1, fused=True)
            sides.append((p.cpu(), m.cpu()))
        for a, b in zip(*sides, strict=True):
            assert torch.equal(a.isnan(), b.isnan())
            bits = [t.nan_to_num(7.0).view(torch.int32) for t in (a, b)]
            assert torch.equal(*bits)


def test_more_than_2_to_the_31_elements():
    count = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 3 * 2 * count:
        pytest.skip("needs 13 GB of the GPU's memory")
    p = torch.zeros(count, dtype=torch.bfloat16, device=DEVICE)
    g = torch.ones(count, dtype=torch.bfloat16, device=DEVICE)
    prox_sgd_([p], [g], lr=1.0, l1=0.25, fused=True)
    assert p.min() == p.max() == -0.75


def test_a_captured_graph_counts_zeros_and_takes_a_coefficient_of_the_host():
    """A number's copy in device memory would be read after it was freed."""
    w = torch.nn.Parameter(torch.full((1000,), 3.0, device=DEVICE))
    w.grad = torch.ones_like(w)
    optimizer = ProxSGD(
        [w], lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.5, capturable=True, track_sparsity=True
    )
    graph = torch.cuda.CUDAGraph()
    coefficient = torch.tensor(0.5)  # on the CPU
    with torch.cuda.graph(graph):
        optimizer.step(grad_coefficient=coefficient)
    del coefficient
    for step in range(3):
        torch.full((4,), 1e9, device=DEVICE)  # takes memory that was freed
        graph.replay()
        assert (w == 2.0 - step).all()
    assert optimizer.sparsity().zeros == 1000


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_no_context_is_made_on_device_0():
    """It takes half a gigabyte there."""
    script = (
        "import ctypes, torch; from resnet_reg_ext.functional import prox_sgd_\n"
        "p, g = (torch.ones(9, device='cuda:1') for _ in range(2))\n"
        "prox_sgd_([p], [g], lr=1.0, fused=True); torch.cuda.synchronize(1)\n"
        "flags, active = ctypes.c_uint(), ctypes.c_int()\n"
        "driver = ctypes.CDLL('libcuda.so.1')\n"
        "driver.cuDevicePrimaryCtxGetState(0, ctypes.byref(flags), ctypes.byref(active))\n"
        "assert not active.value\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
