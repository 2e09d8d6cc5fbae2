"""Gradient scaling, master weights, the momentum's dtype, counted and frozen zeros."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import reference
import torch
from reference import assert_same

from resnet_reg_ext import L1Scheduler, ProxSGD, sparsity

pytestmark = pytest.mark.reads_tensors

ACTIVITIES = [torch.profiler.ProfilerActivity.CPU]
BACKENDS = pytest.mark.parametrize("fused", [True, False])


def randn(n, seed, dtype=torch.float32):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameter(n, seed, dtype=torch.float32):
    return torch.nn.Parameter(randn(n, seed, dtype))


# ---- gradient scaling ---------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, None, False])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_scaled_training_decides_as_sgd_with_the_same_scaler(fused, capturable):
    """Infinities at some steps, the first included: the same steps skipped, the same scales."""
    p, q = (torch.nn.Parameter(torch.linspace(-1, 1, 33)) for _ in range(2))
    ours = ProxSGD([p], 0.1, 0.9, weight_decay=0.01, l1=0.0, fused=fused, capturable=capturable)
    theirs = torch.optim.SGD([q], 0.1, 0.9, weight_decay=0.01, foreach=False)
    assert ours._step_supports_amp_scaling is (fused is True or capturable)
    scalers = [torch.amp.GradScaler("cpu", 8.0, growth_interval=3) for _ in range(2)]
    for step in range(20):
        for optimizer, scaler, w in ((ours, scalers[0], p), (theirs, scalers[1], q)):
            optimizer.zero_grad()
            factor = torch.inf if step in (0, 4, 5, 11) else 1.0
            scaler.scale((w**2).sum() * factor).backward()
            before = w.grad.clone()
            scaler.step(optimizer)
            if ours._step_supports_amp_scaling and optimizer is ours:
                assert_same(w.grad, before)  # unscaled on the way, not in place
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert_same(p, q, f"step {step}")
        assert ("momentum_buffer" in ours.state[p]) is (step > 0)


@BACKENDS
def test_the_scale_is_divided_out_before_weight_decay_and_threshold(fused):
    p = parameter(1000, 0)
    optimizer = ProxSGD([p], 0.1, l1=0.05, weight_decay=0.1, fused=fused)
    w, m = p.detach().numpy().copy(), None
    for step in range(3):
        g = randn(1000, 7 + step)
        p.grad = g * 48.0
        # What a GradScaler sets; its own scales are powers of two, which divide exactly.
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(48.0), torch.tensor(0.0)
        optimizer.step()
        w, m = reference.step(
            w,
            (g * 48.0).numpy(),
            m,
            "float32",
            lr=0.1,
            momentum=0.9,
            l1=0.05,
            weight_decay=0.1,
            grad_scale=48.0,
        )
        assert_same(p, w)


def test_a_scale_that_is_not_positive_is_refused_before_anything_changes():
    p = parameter(5, 0)
    optimizer = ProxSGD([p], fused=True)
    p.grad = torch.ones(5)
    before = p.detach().clone()
    optimizer.grad_scale = torch.tensor(0.0)
    with pytest.raises(ValueError, match=r"grad_scale is 0\.0: must be above 0"):
        optimizer.step()
    assert_same(p, before)
    assert not optimizer.state


@BACKENDS
@pytest.mark.parametrize("as_tensor", [True, False])
def test_clipping_by_a_coefficient_is_clip_grad_norm(fused, as_tensor):
    ours = [parameter(n, n) for n in (7, 1000)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = ProxSGD(ours, 0.1, l1=0.01, fused=fused)
    b = ProxSGD(theirs, 0.1, l1=0.01, fused=fused)
    for step in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = randn(p.numel(), 50 + step)
            q.grad = p.grad.clone()
        norm = torch.linalg.vector_norm(torch.cat([p.grad for p in ours]))
        coefficient = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0, foreach=False)
        a.step(grad_coefficient=coefficient if as_tensor else coefficient.item())
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            # The norm is summed in another order there: a last place of the coefficient.
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            assert torch.equal(p == 0, q == 0)


def test_a_coefficient_must_be_a_number():
    optimizer = ProxSGD([parameter(5, 0)])
    with pytest.raises(ValueError, match=r"grad_coefficient is tensor\(.*j\): must be a number"):
        optimizer.step(grad_coefficient=torch.tensor(1j))
    optimizer.step(grad_coefficient=np.float64(0.5))
    optimizer.step(grad_coefficient=np.array(0.5))
    with pytest.raises(ValueError, match=r"grad_coefficient is a tensor of shape \(2,\)"):
        optimizer.step(grad_coefficient=torch.ones(2))
    with pytest.raises(ValueError, match="grad_coefficient is 'half': must be a number"):
        optimizer.step(grad_coefficient="half")


def test_a_master_weight_that_the_live_options_do_not_ask_for_is_dropped():
    p = parameter(5, 0, torch.bfloat16)
    with_master, without = ProxSGD([p], master_weights=True), ProxSGD([p])
    p.grad = torch.ones_like(p)
    with_master.step()
    without.load_state_dict(with_master.state_dict())
    assert set(without.state[p]) == {"momentum_buffer"}
    assert without.state[p]["momentum_buffer"].dtype is torch.bfloat16


# ---- master weights and the momentum's dtype ----------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("momentum_dtype", [None, torch.float32, torch.bfloat16])
def test_master_weights_are_float32s_training(dtype, momentum_dtype, fused):
    if fused and dtype is torch.float16 and momentum_dtype is torch.bfloat16:
        fused = None  # the one combination without a kernel
    name = {None: "float32", torch.float32: "float32", torch.bfloat16: "bfloat16"}[momentum_dtype]
    p = parameter(515, 0, dtype)
    optimizer = ProxSGD(
        [p], 0.1, l1=0.01, master_weights=True, momentum_dtype=momentum_dtype, fused=fused
    )
    w, m = p.detach().float().numpy().copy(), None
    for step in range(5):
        p.grad = randn(515, 20 + step, dtype)
        optimizer.step()
        w, m = reference.step(
            w,
            p.grad.float().numpy(),
            m,
            "float32",
            lr=0.1,
            momentum=0.9,
            l1=0.01,
            weight_decay=1e-4,
            momentum_dtype=name,
        )
        assert_same(optimizer.state[p]["master_weight"], w)
        assert_same(optimizer.state[p]["momentum_buffer"], m)
        assert_same(p, reference.rounded(w, str(dtype).split(".")[1]))


@BACKENDS
def test_bfloat16_momentum_of_float32_parameters(fused):
    p = parameter(1030, 0)
    optimizer = ProxSGD([p], 0.1, l1=0.01, momentum_dtype=torch.bfloat16, fused=fused)
    w, m = p.detach().numpy().copy(), None
    for step in range(5):
        p.grad = randn(1030, 30 + step)
        optimizer.step()
        options = {"lr": 0.1, "momentum": 0.9, "l1": 0.01, "weight_decay": 1e-4}
        w, m = reference.step(w, p.grad.numpy(), m, "float32", momentum_dtype="bfloat16", **options)
        assert_same(p, w)
    assert optimizer.state[p]["momentum_buffer"].dtype is torch.bfloat16


def test_momentum_of_float64_parameters_is_float64():
    p = parameter(50, 0, torch.float64)
    optimizer = ProxSGD([p], momentum_dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype is torch.float64


def test_small_steps_move_a_bfloat16_weight_only_with_a_master():
    """lr times the gradient is 1e-4 of the weight: below half a last place of bfloat16, 1/512."""
    moved = {}
    for master in (True, False):
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = ProxSGD(
            [p], 1e-4, 0.0, weight_decay=0.0, l1=0.0, master_weights=master, fused=True
        )
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[master] = p[0].item()
    assert moved[False] == 1.0
    assert moved[True] == pytest.approx(0.98, abs=2**-8)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"master_weights": True}),
        (torch.bfloat16, {"master_weights": True, "momentum_dtype": torch.bfloat16}),
        (torch.float32, {"momentum_dtype": torch.bfloat16}),
    ],
    ids=["master", "master and bfloat16 momentum", "bfloat16 momentum"],
)
@pytest.mark.parametrize("way", ["checkpoint", "pickle", "deepcopy"])
def test_state_of_another_dtype_comes_back_to_the_bit(dtype, options, way):
    p = parameter(300, 0, dtype)
    optimizer = ProxSGD([p], 0.1, l1=0.01, **options)
    for step in range(3):
        p.grad = randn(300, 40 + step, dtype)
        optimizer.step()
    if way == "checkpoint":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        q = torch.nn.Parameter(p.detach().clone())
        other = ProxSGD([q], 0.5, **options)
        other.load_state_dict(torch.load(file, weights_only=True))
    else:
        again = copy.deepcopy if way == "deepcopy" else lambda o: pickle.loads(pickle.dumps(o))
        other = again(optimizer)
        (q,) = other.param_groups[0]["params"]
    for key, value in optimizer.state[p].items():
        assert other.state[q][key].dtype is value.dtype, key
        assert_same(other.state[q][key], value, key)
    for step in range(3):
        p.grad = randn(300, 60 + step, dtype)
        q.grad = p.grad.clone()
        optimizer.step()
        other.step()
        assert_same(p, q)


def test_a_checkpoint_of_sgd_becomes_what_the_live_options_say():
    p = parameter(50, 0)
    sgd = torch.optim.SGD([p], 0.1, 0.9)
    p.grad = randn(50, 1)
    sgd.step()
    optimizer = ProxSGD([p], momentum_dtype=torch.bfloat16)
    optimizer.load_state_dict(sgd.state_dict())
    buffer = optimizer.state[p]["momentum_buffer"]
    assert buffer.dtype is torch.bfloat16
    assert_same(buffer, sgd.state[p]["momentum_buffer"].bfloat16())


def test_a_master_weight_that_another_optimizer_has_carried_along_is_not_believed():
    """SGD keeps what it doesn't know, cast to the parameter's dtype, and trains the parameter."""
    p = parameter(50, 0, torch.bfloat16)
    optimizer = ProxSGD([p], 0.1, master_weights=True)
    p.grad = randn(50, 1, torch.bfloat16)
    optimizer.step()
    sgd = torch.optim.SGD([p], 0.1, 0.9)
    sgd.load_state_dict(optimizer.state_dict())
    assert "master_weight" in sgd.state[p]  # or this shows nothing
    for _ in range(5):
        sgd.step()
    trained = p.detach().clone()
    again = ProxSGD([p], master_weights=True)
    again.load_state_dict(sgd.state_dict())
    assert_same(
        again.state[p]["momentum_buffer"].bfloat16(), sgd.state[p]["momentum_buffer"], "momentum"
    )
    again.param_groups[0]["lr"] = 0.0
    p.grad = torch.zeros_like(p)
    again.step()
    assert_same(p, trained)
    assert_same(again.state[p]["master_weight"], trained.float())


@pytest.mark.parametrize("fused", [None, False])
def test_a_master_weight_is_left_behind_by_steps_in_float32(fused):
    model = torch.nn.Linear(20, 20, bias=False).bfloat16()
    optimizer = ProxSGD(model.parameters(), 0.1, master_weights=True, fused=fused)

    def step(lr):
        optimizer.param_groups[0]["lr"] = lr
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()

    step(0.1)
    model.weight.grad = None
    model.float()
    step(0.1)
    model.weight.grad = None
    model.bfloat16()
    trained = model.weight.detach().clone()
    step(0.0)
    assert_same(model.weight, trained)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, "bfloat16"])
def test_an_unknown_momentum_dtype_is_named(dtype):
    with pytest.raises(ValueError, match=r"momentum_dtype is .*must be None, torch.float32 or"):
        ProxSGD([parameter(3, 0)], momentum_dtype=dtype)


def test_a_master_weight_of_another_shape_is_named():
    p = parameter(3, 0, torch.bfloat16)
    optimizer = ProxSGD([p], master_weights=True)
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["master_weight"] = torch.ones(4)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"\['params'\]\[0\]: master_weight's shape is \(4,\)"):
        optimizer.step()
    assert_same(p, before)


# ---- zeros: counted and frozen ------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_zeros_counted_in_the_step_are_those_that_are_there(dtype, fused):
    sizes = (1, 0, 100_003, 64)
    params = [parameter(n, n, dtype) for n in sizes]
    optimizer = ProxSGD(params, 0.1, l1=0.5, track_sparsity=True, fused=fused)
    for step in range(3):
        for p in params:
            p.grad = randn(p.numel(), step, dtype)
        optimizer.step()
        known = optimizer._zeros_known()
        assert {id(p): known[p].item() for p in params} == {
            id(p): int(np.count_nonzero(reference.values(p) == 0)) for p in params
        }
    assert optimizer.sparsity() == sparsity(optimizer)
    assert 0 < optimizer.sparsity().fraction < 1


@pytest.mark.parametrize("strange", ["another layout", "expanded", "both"])
def test_zeros_are_counted_where_the_native_kernel_can_not_take_all(strange):
    params = [parameter(40, n).detach().view(8, 5).requires_grad_() for n in range(3)]
    grads = [randn(40, n).view(8, 5) for n in range(3)]
    if strange != "expanded":
        grads[0] = grads[0].t().contiguous().t()
    if strange != "another layout":
        grads[1] = torch.ones(1).expand(8, 5)
    optimizer = ProxSGD(params, 0.1, l1=0.5, track_sparsity=True)
    for _ in range(2):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        known = optimizer._zeros_known()
        assert [known[p].item() for p in params] == [int((p == 0).sum()) for p in params]
    assert all(known[p].item() > 0 for p in params)


@pytest.mark.parametrize("fused", [True, False])
def test_counting_takes_no_memory_for_each_element(fused):
    w = torch.nn.Parameter(torch.zeros(1 << 22))
    w.grad = torch.ones_like(w)
    optimizer = ProxSGD([w], momentum=0.0, track_sparsity=True, fused=fused)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True, activities=ACTIVITIES) as profile:
        optimizer.step()
        optimizer.sparsity()
        sparsity(optimizer)
        sparsity(torch.nn.ParameterList([w]))
    sizes = [event.cpu_memory_usage for event in profile.events()]
    # Pure PyTorch works in chunks, in memory of a quarter of a million elements.
    assert max(sizes) <= 4 << 18


def test_a_count_is_not_believed_after_two_weights_were_swapped():
    first, second = (torch.nn.Parameter(torch.full((4,), value)) for value in (1.0, 0.0))
    for p in (first, second):
        p.grad = torch.zeros(4)
    optimizer = ProxSGD([first], momentum=0.0, track_sparsity=True)
    other = ProxSGD([second], momentum=0.0)
    optimizer.step()
    other.step()
    assert optimizer.sparsity().zeros == 0
    first.data, second.data = second.data, first.data
    assert optimizer.sparsity().zeros == 4


def test_a_count_is_not_believed_where_new_weights_took_the_old_ones_place():
    """Memory that is given back is given out again, at the same address."""
    w = torch.nn.Parameter(torch.ones(5000))
    w.grad = torch.zeros_like(w)
    optimizer = ProxSGD([w], momentum=0.0, l1=0.0, weight_decay=0.0, track_sparsity=True)
    optimizer.step()
    address = w.data_ptr()
    w.data = torch.ones(5000)
    kept = []
    for _ in range(100):
        kept.append(torch.zeros(5000))
        if kept[-1].data_ptr() == address:
            break
    w.data = kept[-1]
    assert optimizer.sparsity().zeros == 5000


def test_a_count_is_not_believed_after_the_weights_have_changed():
    p, q = parameter(100, 0), parameter(100, 1)
    optimizer = ProxSGD([p, q], 0.1, l1=0.5, track_sparsity=True)
    for w in (p, q):
        w.grad = torch.ones(100)
    optimizer.step()
    with torch.no_grad():
        p.zero_()
    assert [layer.zeros for layer in optimizer.sparsity().layers] == [
        100,
        int((q == 0).sum()),
    ]


@BACKENDS
@pytest.mark.parametrize("l1_of_b", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_frozen_zeros_stay_and_the_others_lose_the_bias(fused, l1_of_b):
    """On (w - a)^2 / 2 training ends at the soft threshold of a; refitted, at a on its support."""
    a = torch.tensor([3.0, -2.0, 0.5, 0.05, -0.04, 0.0])
    w = torch.nn.Parameter(torch.zeros(6))
    b = torch.nn.Parameter(torch.zeros(1))
    optimizer = ProxSGD(
        [{"params": [w], "l1": 0.1}, {"params": [b], "l1": l1_of_b}],
        0.1,
        weight_decay=0.0,
        fused=fused,
    )

    def train():
        for _ in range(300):
            w.grad, b.grad = (w - a).detach(), (b - 1).detach()
            optimizer.step()

    train()
    torch.testing.assert_close(w.detach(), torch.tensor([2.9, -1.9, 0.4, 0, 0, 0]))
    optimizer.freeze_zeros()
    assert [g["frozen_zeros"] for g in optimizer.param_groups] == [True, False]
    assert optimizer.param_groups[0]["l1"] == 0.1
    train()
    torch.testing.assert_close(w.detach(), torch.tensor([3.0, -2.0, 0.5, 0, 0, 0]))
    assert w[3:].tolist() == [0.0, 0.0, 0.0]
    again = ProxSGD([{"params": [w], "l1": 0.1}, {"params": [b], "l1": 0.0}])
    again.load_state_dict(optimizer.state_dict())
    assert [g["frozen_zeros"] for g in again.param_groups] == [True, False]
    again = ProxSGD([{"params": [w], "l1": torch.tensor(0.1)}, {"params": [b], "l1": l1_of_b}])
    again.freeze_zeros()
    assert [g["frozen_zeros"] for g in again.param_groups] == [True, False]
    optimizer.param_groups[1]["frozen_zeros"] = True
    optimizer.freeze_zeros(False)
    assert [g["frozen_zeros"] for g in optimizer.param_groups] == [False, False]
    train()
    torch.testing.assert_close(w.detach(), torch.tensor([2.9, -1.9, 0.4, 0, 0, 0]))


def test_zeros_are_frozen_after_a_schedule_that_took_l1_to_0():
    w, b = parameter(4, 0), parameter(4, 1)
    optimizer = ProxSGD([{"params": [w]}, {"params": [b], "l1": 0.0}], l1=0.1)
    schedule = L1Scheduler(optimizer, torch.optim.lr_scheduler.PolynomialLR, total_iters=2)
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["l1"] == 0
    optimizer.freeze_zeros()
    assert [g["frozen_zeros"] for g in optimizer.param_groups] == [True, False]


def test_freezing_zeros_where_no_group_has_an_l1_is_an_error():
    optimizer = ProxSGD([parameter(4, 0)], l1=0.0)
    with pytest.raises(ValueError, match="no parameter group has an l1 or a group_lasso above 0"):
        optimizer.freeze_zeros()
    optimizer.freeze_zeros(False)
    assert optimizer.param_groups[0]["frozen_zeros"] is False
