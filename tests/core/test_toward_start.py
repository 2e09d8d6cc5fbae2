"""toward="start": the step's bits in every backend, and what counts and freezes on it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
from reference import assert_same
from storages import STORAGES
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from resnet_reg_ext import _C, L1Scheduler, ProxSGD, TargetSparsity, sparsity
from resnet_reg_ext.functional import prox_sgd_

pytestmark = [pytest.mark.reads_tensors]

LEVELS = [level for level in _C.simd_levels() if level != "none"]
VARIANTS = {
    "plain": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "all": {"momentum": 0.9, "nesterov": True, "l2_mode": "proximal", "maximize": True},
    "no l1": {"momentum": 0.9, "l1": 0.0},
    "proximal alone": {"momentum": 0.9, "l1": 0.0, "l2_mode": "proximal"},
    "no momentum": {"momentum": 0.0},
    "no momentum, proximal": {"momentum": 0.0, "l2_mode": "proximal", "weight_decay": 1e-9},
}
# Whole vectors, whole lines and the remainders of both; one that pure PyTorch takes in a chunk.
SIZES = [*range(1, 20), 63, 64, 65, 5000]
SPECIAL = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -6e-8])


def drawn(seed, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    tensors = [scale * torch.randn(n, generator=generator) for n in SIZES]
    for i, t in enumerate(tensors):
        t[i % 3 :: 5] = SPECIAL[(i + seed) % len(SPECIAL)]
    return [t.to(getattr(torch, dtype)) for t in tensors]


def run(dtype, options, steps=3, grads=0.1, **more):
    """Parameters and state after each step, and what is at its start after the last."""
    params = [nn.Parameter(t) for t in drawn(0, dtype)]
    optimizer = ProxSGD(
        params,
        **{"lr": 0.1, "weight_decay": 0.02, "l1": 0.05, "toward": "start"} | options | more,
    )
    history = []
    for step in range(steps):
        for p, grad in zip(params, drawn(1 + step, dtype, grads), strict=True):
            p.grad = grad
        optimizer.step()
        history += [p.detach().clone() for p in params]
        history += [t.clone() for p in params for t in optimizer.state[p].values()]
    return optimizer, params, history


def by_reference(storage, options, steps=3, grads=0.1):
    dtype, more = STORAGES[storage]
    master, momentum_dtype = "master_weights" in more, more.get("momentum_dtype")
    weight = "float32" if master else dtype
    named = str(momentum_dtype or f"torch.{weight}").removeprefix("torch.")
    options = {"lr": 0.1, "weight_decay": 0.02, "l1": 0.05} | options
    result = []
    for i, t in enumerate(drawn(0, dtype)):
        start = p = reference.values(t)
        m = None
        for step in range(steps):
            g = reference.values(drawn(1 + step, dtype, grads)[i])
            p, m = reference.step(p, g, m, weight, momentum_dtype=named, start=start, **options)
        result.append(reference.rounded(p, dtype))
    return result


@pytest.mark.sanitized
@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("storage", STORAGES)
def test_the_bits_are_the_references_in_every_backend(storage, variant):
    dtype, options = STORAGES[storage]
    options = {**VARIANTS[variant], **options}
    _, params, expected = run(dtype, options, fused=False)
    for p, wanted in zip(params, by_reference(storage, VARIANTS[variant]), strict=True):
        assert_same(p, wanted, f"pure, {storage}, {variant}")
    for level in LEVELS:
        _C.set_simd_level(level)
        for count in (False, True):
            optimizer, ours, history = run(dtype, options, fused=True, track_sparsity=count)
            for a, b in zip(history, expected, strict=True):
                assert_same(a, b, f"{storage}, {variant}, {level}, counting: {count}")
    known = optimizer._zeros_known()  # by the kernel; a recount isn't in it
    starts = [t.to(p.dtype) for t, p in zip(drawn(0, dtype), ours, strict=True)]
    at_start = [int((p == s).sum()) for p, s in zip(ours, starts, strict=True)]
    assert [known[p].item() for p in ours] == at_start
    if options.get("l1") != 0:
        assert 0 < sum(at_start) < sum(SIZES)


@pytest.mark.sanitized
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("storage", STORAGES)
def test_with_a_start_of_zeros_the_bits_are_those_towards_zero(storage, variant, fused):
    dtype, options = STORAGES[storage]
    master = "master_weights" in options
    results = []
    for towards_zeros in (False, True):
        params = drawn(0, dtype)
        masters = [p.float() for p in params] if master else None
        weights = masters or params
        momentum_dtype = options.get("momentum_dtype") or weights[0].dtype
        buffers = [torch.zeros_like(p, dtype=momentum_dtype) for p in params]
        for frozen in (False, True):
            prox_sgd_(
                params,
                drawn(1, dtype),
                buffers,
                **{"lr": 0.1, "weight_decay": 0.02, "l1": 0.05} | VARIANTS[variant],
                master_weights=masters,
                starts=[torch.zeros_like(w) for w in weights] if towards_zeros else None,
                frozen_zeros=frozen,
                fused=fused,
            )
        results.append([*params, *buffers, *(masters or [])])
    for a, b in zip(*results, strict=True):
        assert_same(a, b, f"{storage}, {variant}")


def weights(dtype=torch.float32, size=400):
    generator = torch.Generator().manual_seed(0)
    return nn.Parameter(torch.randn(size, generator=generator).to(dtype))


def steps(optimizer, params, numbers, scale=1.0):
    for number in numbers:
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(1000 * i + number)
            p.grad = scale * torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_weights_without_a_force_stay_exactly_at_their_start(fused):
    """Values whose distances round: start + soft_threshold(v - start) would be off by a bit."""
    w = weights(size=20_000)
    start = w.detach().clone()
    optimizer = ProxSGD([w], 0.1, l1=0.5, weight_decay=0.0, toward="start", fused=fused)
    steps(optimizer, [w], range(5), scale=0.05)
    assert_same(w, start)
    steps(optimizer, [w], range(5, 10), scale=3.0)
    assert 0.1 < (w != start).float().mean() < 0.9
    assert_same(optimizer.state[w]["start"], start)


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_at_its_start_is_counted_and_frozen(fused):
    near, far = weights(), weights(size=30)
    before = [w.detach().clone() for w in (near, far)]
    optimizer = ProxSGD(
        [
            {"params": [("near", near)], "toward": "start"},
            {"params": [("far", far)], "toward": "zero"},
        ],
        0.1,
        l1=0.3,
        fused=fused,
        track_sparsity=True,
    )
    assert [layer.zeros for layer in optimizer.sparsity().layers] == [400, 0]  # none has moved
    steps(optimizer, [near, far], range(6))
    at_start = int((near == before[0]).sum())
    for counted in (optimizer.sparsity(), sparsity(optimizer)):
        assert [layer.zeros for layer in counted.layers] == [at_start, int((far == 0).sum())]
        rows = counted.table().splitlines()
        assert rows[1].endswith("at their start")
        assert "start" not in rows[2]
    assert 0 < at_start < 400
    there = near == before[0]
    optimizer.freeze_zeros()
    steps(optimizer, [near, far], range(6, 12))
    assert_same(near[there], before[0][there])
    assert (near != before[0]).sum() == 400 - at_start  # the others are trained on


def test_a_count_against_another_start_is_not_believed():
    w = weights()
    optimizer = ProxSGD([w], 0.1, l1=0.3, toward="start", track_sparsity=True)
    steps(optimizer, [w], range(3))
    assert w in optimizer._zeros_known()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["start"] = w.detach().clone()
    optimizer.load_state_dict(state)
    assert optimizer.sparsity().zeros == 400
    optimizer.param_groups[0]["toward"] = "zero"
    assert optimizer.sparsity().zeros == int((w == 0).sum())


def test_the_start_is_what_is_loaded_before_the_first_step():
    """A pretrained checkpoint may come after the optimizer, and a layer may be unfrozen later."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 2))
    optimizer = ProxSGD(model.parameters(), 0.1, l1=0.1, toward="start")
    pretrained = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(pretrained)
    late = model[1].weight
    for number in range(3):
        late.requires_grad_(number > 1)
        model.zero_grad()
        model(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert_same(optimizer.state[p]["start"], pretrained[name], name)


def test_target_sparsity_and_schedules_steer_the_weights_at_their_start():
    generator = torch.Generator().manual_seed(1)
    w = weights(size=2000)
    goal = w.detach() + torch.randn(2000, generator=generator)
    optimizer = ProxSGD([w], 0.05, momentum=0.9, l1=1e-3, weight_decay=0.0, toward="start")
    steering = TargetSparsity(optimizer, 0.8, steps=400)
    start = w.detach().clone()
    for _ in range(500):
        w.grad = w.detach() - goal
        optimizer.step()
        steering.step()
    assert steering.reached
    assert abs((w == start).float().mean().item() - 0.8) < 0.02

    optimizer = ProxSGD([w], 0.05, l1=1.0, toward="start")
    schedule = L1Scheduler(optimizer, LinearLR, start_factor=1.0, end_factor=0.0, total_iters=10)
    for _ in range(10):
        w.grad = torch.zeros_like(w)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["l1"] == 0.0


@pytest.mark.parametrize("wrong", ["here", None, True, 0])
def test_another_target_is_refused(wrong):
    w = weights()
    with pytest.raises(ValueError, match=rf"ProxSGD: toward is {wrong!r}: must be one of"):
        ProxSGD([w], toward=wrong)
    optimizer = ProxSGD([w])
    w.grad = torch.ones_like(w)
    before = w.detach().clone()
    optimizer.param_groups[0]["toward"] = wrong
    with pytest.raises(ValueError, match=r"param_groups\[0\]: toward is"):
        optimizer.step()
    assert_same(w, before)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (torch.zeros(3), "start's shape is \\(3,\\)"),
        (torch.zeros(400, dtype=torch.int32), "start's dtype is torch.int32"),
        ("w", "start is 'w': must be a tensor"),
    ],
    ids=["shape", "dtype", "no tensor"],
)
def test_a_start_of_something_else_is_refused_before_anything_changes(start, said):
    w, other = weights(), weights()
    optimizer = ProxSGD([other, w], toward="start")
    steps(optimizer, [other, w], range(1))
    kept, there = other.detach().clone(), optimizer.state[w]["start"]
    where = r"param_groups\[0\]\['params'\]\[1\]"
    if said.startswith("start's shape"):  # torch's loading casts other things
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][1]["start"] = start
        with pytest.raises(ValueError, match=f"{where}: {said}"):
            optimizer.load_state_dict(state)
        assert optimizer.state[w]["start"] is there
    optimizer.state[w]["start"] = start
    with pytest.raises(ValueError, match=f"{where}: {said}"):
        steps(optimizer, [other, w], range(1, 2))
    assert_same(other, kept)


def test_a_start_in_another_layout_or_dtype_gives_the_same_bits():
    """It was saved from a channels_last model, or under other options."""
    made = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(3))
    results = []
    for change in (
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        torch.Tensor.double,
    ):
        p = nn.Parameter(made.clone())
        optimizer = ProxSGD([p], 0.1, l1=0.1, toward="start", track_sparsity=True)
        steps(optimizer, [p], range(1))
        optimizer.state[p]["start"] = change(optimizer.state[p]["start"])
        steps(optimizer, [p], range(1, 3))
        results.append((p.detach(), optimizer.sparsity().zeros))
    for p, zeros in results[1:]:
        assert_same(p, results[0][0])
        assert zeros == results[0][1] > 0


def test_no_state_is_kept_but_the_start():
    w, plain = weights(torch.bfloat16), weights()
    optimizer = ProxSGD(
        [{"params": [w], "master_weights": True}, {"params": [plain]}], 0.1, toward="start"
    )
    steps(optimizer, [w, plain], range(2))
    assert set(optimizer.state[w]) == {"momentum_buffer", "master_weight", "start"}
    assert optimizer.state[w]["start"].dtype is torch.float32
    assert optimizer.state[plain]["start"].dtype is torch.float32
    assert set(optimizer.state[plain]) == {"momentum_buffer", "start"}
    assert optimizer.state[plain]["start"].nbytes == plain.nbytes
    assert np.isfinite(reference.values(w)).all()
