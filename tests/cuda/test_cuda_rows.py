"""Coupled rows on a real GPU: the bits of the CPU kernel. Skipped, visibly, where there is none."""

from __future__ import annotations

import pytest
import torch

from resnet_reg_ext import ProxSGD

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs an NVIDIA GPU and its driver"
)

DEVICE = "cuda"
SHAPES = [
    [(70, 3, 5, 5), (70,), (70,)],
    [(3, 40_001), (3,)],  # longer than a block holds
    [(64, 300), *[(64,)] * 8, (64, 65, 3, 3)],
    [(9, 4)],
]
STORAGES = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "float16": (torch.float16, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16 momentum": (torch.float32, {"momentum_dtype": torch.bfloat16}),
    "bfloat16 master": (torch.bfloat16, {"master_weights": True}),
    "float16 master": (torch.float16, {"master_weights": True}),
    "both": (torch.bfloat16, {"master_weights": True, "momentum_dtype": torch.bfloat16}),
}


def optimizer_on(device, dtype=torch.float32, **options):
    """Sets over two groups, some parameters in none, with weights for each row in one set."""
    generator = torch.Generator().manual_seed(1)
    groups = [{"params": [], "rows": [], "row_weights": []} for _ in range(2)]
    for number, shapes in enumerate([*SHAPES, [(7, 7)]]):
        for i, shape in enumerate(shapes):
            value = torch.randn(shape, generator=generator).to(dtype).to(device)
            if len(shape) == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            group = groups[i % 2]
            group["params"].append(torch.nn.Parameter(value))
            group["rows"].append(number if number < len(SHAPES) else None)
            weights = torch.linspace(0, 30, 70).tolist() if number == 0 and i == 0 else None
            group["row_weights"].append(weights)
    groups[1]["l1"] = 0.0
    options = {"lr": 0.1, "l1": 0.01, "weight_decay": 0.02, "group_lasso": 0.2, **options}
    return ProxSGD(groups, **{"fused": True, **options})


def give_gradients(optimizer, step, scale=1.0):
    """The same on each device; contiguous, so that some are laid out unlike their parameter."""
    generator = torch.Generator().manual_seed(step)
    for group in optimizer.param_groups:
        for p in group["params"]:
            grad = scale * torch.randn(p.shape, generator=generator)
            p.grad = grad.to(p.dtype).to(p.device)


def held(optimizer):
    """Parameters and state, on the CPU."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for p in params for v in optimizer.state.get(p, {}).values()]
    return [t.detach().cpu() for t in (*params, *state)]


def assert_equal_bits(a, b):
    for left, right in zip(held(a), held(b), strict=True):
        assert left.dtype is right.dtype
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"l2_mode": "proximal"},
        {"momentum": 0.0, "maximize": True},
        {"nesterov": True},
        {"toward": "start"},
        {"toward": "start", "l2_mode": "proximal", "momentum": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_cpus_bits(storage, options):
    dtype, how = STORAGES[storage]
    on_cpu, on_gpu = (
        optimizer_on(d, dtype, track_sparsity=True, **how, **options) for d in ("cpu", DEVICE)
    )
    for step in range(3):
        for optimizer in (on_cpu, on_gpu):
            give_gradients(optimizer, step)
            optimizer.step(grad_coefficient=0.75)
    assert_equal_bits(on_cpu, on_gpu)
    assert on_cpu.sparsity().to_dict() == on_gpu.sparsity().to_dict()
    assert on_gpu.sparsity().zeros > 0


def test_two_launches_a_step():
    optimizer = optimizer_on(DEVICE)
    for step in range(3):
        give_gradients(optimizer, step)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p).copy_(p.grad)
        if step < 2:
            optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.name.startswith("prox_sgd")]
    assert sorted(name.startswith("prox_sgd_rows") for name in names) == [False, True]


def test_values_in_device_memory_and_a_captured_graph():
    """The graph follows lr; weights for each row stay where it finds them."""
    on_host, captured = optimizer_on("cpu"), optimizer_on(DEVICE, capturable=True)
    lr = torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
    for group in captured.param_groups:
        group["lr"] = lr
    for optimizer in (on_host, captured):
        for step in range(2):
            give_gradients(optimizer, step)
            optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    lr.fill_(0.05)
    for group in on_host.param_groups:
        group["lr"] = 0.05
    for _ in range(2):
        graph.replay()
        on_host.step()
    torch.cuda.synchronize()
    assert_equal_bits(on_host, captured)


def test_a_gradient_scaler_skips_sets_and_the_rest_alike():
    scaled, plain = optimizer_on(DEVICE), optimizer_on(DEVICE)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.zeros(1, device=DEVICE))
    for step in range(4):
        before, scale = held(scaled), scaler.get_scale()
        give_gradients(scaled, step, scale)
        if step == 2:
            scaled.param_groups[0]["params"][0].grad.fill_(float("inf"))
        scaler.step(scaled)
        scaler.update()
        if step == 2:
            assert all(map(torch.equal, held(scaled), before))
        else:
            give_gradients(plain, step)
            plain.step()
    assert_equal_bits(scaled, plain)
