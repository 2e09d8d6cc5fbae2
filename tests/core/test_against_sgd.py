"""With ``l1=0``, ProxSGD is ``torch.optim.SGD(foreach=False)``, bit by bit."""

import itertools

import pytest
import torch
from reference import assert_same
from torch import nn
from torch.optim import lr_scheduler

from resnet_reg_ext import ProxSGD

TRAJECTORIES = (
    {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
    {"momentum": 0.0, "dampening": 0.5, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": False},
    {"momentum": 0.77, "dampening": 0.1, "nesterov": False},
    {"momentum": 0.5, "dampening": 1.0, "nesterov": False},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": True},
    {"momentum": 0.31, "dampening": 0.0, "nesterov": True},
)
OPTIONS = [
    {"lr": 0.1, **trajectory, "weight_decay": weight_decay, "maximize": maximize}
    for trajectory, weight_decay, maximize in itertools.product(
        TRAJECTORIES, (0.0, 1e-4, 0.3), (False, True)
    )
]
SIZES = [(), (1,), (7,), (8,), (9,), (33,), (0,), (5, 3, 3, 3), (257,)]


def name_of(options):
    words = [f"momentum{options['momentum']}"]
    words += [f"dampening{options['dampening']}"] if options["dampening"] else []
    words += ["nesterov"] if options["nesterov"] else []
    words += [f"decay{options['weight_decay']}"]
    words += ["maximize"] if options["maximize"] else []
    return "-".join(words)


def randn(size, seed, dtype):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_equal_optimizers(ours, theirs, what=""):
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(group["params"], other["params"], strict=True)):
            assert_same(p, q, f"{what}, tensor {i}: parameter")
            buffer = ours.state[p].get("momentum_buffer")
            other_buffer = theirs.state[q].get("momentum_buffer")
            assert (buffer is None) == (other_buffer is None)
            if buffer is not None:
                assert_same(buffer, other_buffer, f"{what}, tensor {i}: momentum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_whole_trajectory(options, dtype):
    start = [randn(size, 0, dtype) for size in SIZES]
    lists = [[nn.Parameter(t.clone()) for t in start] for _ in range(3)]
    optimizers = [
        torch.optim.SGD(lists[0], **options, foreach=False),
        ProxSGD(lists[1], **options, l1=0.0, fused=True),
        ProxSGD(lists[2], **options, l1=0.0, fused=False),
    ]
    for number in range(12):
        noise = [randn(size, number + 1, dtype) for size in SIZES]
        for params in lists:
            for p, n in zip(params, noise, strict=True):
                p.grad = (p.detach() * 1.7 - 0.3) + 0.1 * n  # a difference would feed on itself
        for optimizer in optimizers:
            optimizer.step()
        for optimizer, way in zip(optimizers[1:], ("native", "pure"), strict=True):
            assert_equal_optimizers(optimizer, optimizers[0], f"{way}, step {number}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("fused", [True, False])
def test_special_values(dtype, fused):
    info = torch.finfo(dtype)
    some = [0.0, info.tiny, info.tiny / 4, info.smallest_normal * info.eps, info.max, 1.0]
    some += [float("inf"), float("nan")]
    some = torch.tensor([s * x for x in some for s in (1, -1)], dtype=dtype)
    ours, theirs = (nn.Parameter(some.repeat_interleave(len(some))) for _ in range(2))
    options = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.5}
    optimizers = [
        ProxSGD([ours], **options, l1=0.0, fused=fused),
        torch.optim.SGD([theirs], **options, foreach=False),
    ]
    for _ in range(3):
        ours.grad, theirs.grad = some.repeat(len(some)), some.repeat(len(some))
        for optimizer in optimizers:
            optimizer.step()
        assert_equal_optimizers(*optimizers)


def small_net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).to(dtype)


def train(optimizer, model, scheduler=None, steps=12):
    for number in range(steps):
        x = randn((4, 3, 6, 6), number, next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def groups(model):
    convolution, norm, linear = model[0], model[1], model[4]
    return [
        {"params": list(convolution.parameters()), "lr": 0.2, "nesterov": True},
        {"params": list(norm.parameters()), "weight_decay": 0.0, "momentum": 0.0},
        {"params": list(linear.parameters()), "maximize": True, "dampening": 0.1, "lr": 1e-3},
    ]


SCHEDULERS = {
    "none": lambda optimizer: None,
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 3, gamma=0.1),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 12),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.8),
    "warm-up then cosine": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
            lr_scheduler.CosineAnnealingLR(optimizer, 8),
        ],
        milestones=[4],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("fused", [True, False])
def test_groups_and_schedulers(scheduler, fused, dtype):
    optimizers = []
    for make in (
        lambda p: ProxSGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, l1=0.0, fused=fused),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, foreach=False),
    ):
        model = small_net(dtype)
        optimizers.append(make(groups(model)))
        train(optimizers[-1], model, SCHEDULERS[scheduler](optimizers[-1]))
    assert_equal_optimizers(*optimizers)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("momentum_too", [True, False], ids=["momentum cycled", "lr alone"])
def test_one_cycle(momentum_too, fused):
    optimizers = []
    for make in (
        lambda p: ProxSGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, l1=0.0, fused=fused),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, foreach=False),
    ):
        model = small_net(torch.float32)
        optimizers.append(make(model.parameters()))
        scheduler = lr_scheduler.OneCycleLR(
            optimizers[-1], max_lr=0.1, total_steps=12, cycle_momentum=momentum_too
        )
        train(optimizers[-1], model, scheduler, steps=11)
    assert_equal_optimizers(*optimizers)
    changed = optimizers[0].param_groups[0]["momentum"] != 0.9
    assert changed == momentum_too


@pytest.mark.parametrize("fused", [True, False])
def test_momentum_switched_off_and_on_and_parameters_unfrozen_late(fused):
    """A first step is a parameter's, not the list's; an old buffer is taken up again, as in SGD."""
    lists = [[nn.Parameter(randn((9,), i, torch.float32)) for i in range(4)] for _ in range(2)]
    optimizers = [
        ProxSGD(lists[0], lr=0.1, momentum=0.9, dampening=0.2, l1=0.0, fused=fused),
        torch.optim.SGD(
            lists[1], lr=0.1, momentum=0.9, dampening=0.2, weight_decay=1e-4, foreach=False
        ),
    ]
    for number in range(12):
        for params, optimizer in zip(lists, optimizers, strict=True):
            for i, p in enumerate(params):
                p.requires_grad_(number >= 2 * i)
                has_gradient = p.requires_grad and not (i == 1 and number % 3 == 0)
                p.grad = p.detach() * 1.3 + i if has_gradient else None
            optimizer.param_groups[0]["momentum"] = 0.0 if 4 <= number < 7 else 0.9
            optimizer.step()
        assert_equal_optimizers(*optimizers, f"step {number}")


def test_learning_rate_as_a_tensor():
    lists = [[nn.Parameter(randn((9,), 0, torch.float32))] for _ in range(2)]
    rates = [torch.tensor(0.125), 0.125]
    optimizers = [
        ProxSGD(lists[0], lr=rates[0], momentum=0.9, l1=0.0, weight_decay=0.1),
        torch.optim.SGD(lists[1], lr=rates[1], momentum=0.9, weight_decay=0.1, foreach=False),
    ]
    for number in range(4):
        for params, optimizer in zip(lists, optimizers, strict=True):
            params[0].grad = params[0].detach() * 1.3
            optimizer.step()
        rates[0].mul_(0.5)  # seen at the next step
        optimizers[1].param_groups[0]["lr"] *= 0.5
        assert_equal_optimizers(*optimizers, f"step {number}")
