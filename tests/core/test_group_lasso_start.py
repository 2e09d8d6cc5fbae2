"""The group lasso of the distance from a start: what comes back to it, what is saved, and how."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import reference
import torch
from reference import assert_same
from storages import STORAGES
from test_all_or_nothing import One
from torch import nn

from resnet_reg_ext import ProxSGD, TargetSparsity, sparsity

OPTIONS = {"lr": 0.1, "momentum": 0.9, "l1": 0.0, "weight_decay": 0.0, "group_lasso": 0.05}
SHAPES = [(6, 3, 3, 3), (6,), (6,), (4, 6)]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net(dtype=torch.float32):
    """A convolution with its norm, and a layer that is in no set."""
    return [nn.Parameter(drawn(*s, seed=i).to(dtype)) for i, s in enumerate(SHAPES)]


def optimizer_of(params, **options):
    """The set lies in two groups, which differ in l1, weight decay and l2_mode."""
    conv, weight, bias, other = params
    return ProxSGD(
        [
            {"params": [conv, other], "rows": [3, None], "l1": 0.01, "weight_decay": 0.02},
            {"params": [weight, bias], "rows": [3, 3], "l2_mode": "proximal"},
        ],
        **{**OPTIONS, "toward": "start", **options},
    )


def take_steps(optimizer, params, numbers, scale=1.0):
    """Gradients that leave every second channel almost alone."""
    for number in numbers:
        for i, p in enumerate(params):
            rows = (torch.arange(len(p)) % 2 * 0.999 + 0.001).view(-1, *[1] * (p.dim() - 1))
            p.grad = (scale * rows * drawn(*p.shape, seed=100 * number + i + 7)).to(p.dtype)
        optimizer.step()


def history_of(optimizer, params):
    """Parameters and their state, but for their start."""
    state = [[v for k, v in optimizer.state[p].items() if k != "start"] for p in params]
    return [t.detach().clone() for p, of_p in zip(params, state, strict=True) for t in (p, *of_p)]


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_by_hand(fused):
    """Without momentum, in float64: each channel's distance, shortened by lr·group_lasso·a_g."""
    params = [nn.Parameter(p.detach().double()) for p in net()[:3]]
    start = [p.detach().clone() + 0.1 * drawn(*p.shape, seed=i) for i, p in enumerate(params)]
    optimizer = ProxSGD(
        [{"params": params, "rows": [0, 0, 0], "row_weights": [2.0, None, None]}],
        **{**OPTIONS, "lr": 0.5, "momentum": 0.0, "group_lasso": 0.4},
        toward="start",
        fused=fused,
    )
    for p, s in zip(params, start, strict=True):
        optimizer.state[p]["start"] = s.clone()
        p.grad = torch.zeros_like(p)

    def distances(values):
        return np.concatenate(
            [(v - s).numpy().reshape(6, -1) for v, s in zip(values, start, strict=True)], 1
        )

    before = distances([p.detach() for p in params])
    norms = np.linalg.norm(before, axis=1, keepdims=True)
    assert 0 < (norms <= 0.4).sum() < 6
    optimizer.step()
    after = distances([p.detach() for p in params])
    assert np.allclose(after, before * np.maximum(1 - 0.4 / norms, 0), rtol=0, atol=1e-15)
    assert np.array_equal((after == 0).all(1), (norms <= 0.4).ravel())


SPECIAL = torch.tensor([0.0, -0.0, 1e-40, -6e-8, float("inf"), float("nan")])


@pytest.mark.sanitized
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
def test_with_a_start_of_zeros_the_bits_are_those_towards_zero(storage, fused):
    dtype, how = STORAGES[storage]
    results = []
    for toward in ("zero", "start"):
        params = net(getattr(torch, dtype))
        with torch.no_grad():
            for i, p in enumerate(params):
                p.view(-1)[i::5] = SPECIAL[:4].repeat(99)[: len(p.view(-1)[i::5])].to(p.dtype)
            params[0][3, 0, 0] = SPECIAL[3:].to(p.dtype)
            params[1][4] = SPECIAL[4]
        for frozen in (False, True):
            optimizer = optimizer_of(params, toward=toward, fused=fused, track_sparsity=True, **how)
            for group in optimizer.param_groups:
                group["frozen_zeros"] = frozen
            if toward == "start":
                for p in params:
                    weight = torch.float32 if "master_weights" in how else p.dtype
                    optimizer.state[p]["start"] = torch.zeros_like(p, dtype=weight)
            take_steps(optimizer, params, range(2))
            results += [history_of(optimizer, params)]
            results[-1].append(torch.tensor(float(optimizer.sparsity().zeros)))
    for towards_zero, towards_start in zip(results[:2], results[2:], strict=True):
        for a, b in zip(towards_zero, towards_start, strict=True):
            assert_same(a, b, storage)


@pytest.mark.parametrize("fused", [True, False])
def test_channels_that_need_not_move_are_their_start_counted_and_frozen(fused):
    params = net()
    start = [p.detach().clone() for p in params]
    optimizer = optimizer_of(params, group_lasso=0.1, fused=fused, track_sparsity=True)
    take_steps(optimizer, params, range(4), scale=1.5)

    def at_start():
        same = [(p == s).flatten(1).all(1) if p.dim() > 1 else p == s
                for p, s in zip(params[:3], start[:3], strict=True)]  # fmt: skip
        return torch.stack(same).all(0)

    assert at_start().tolist() == [True, False] * 3
    for p, s in zip(params[:3], start[:3], strict=True):
        assert_same(p[::2], s[::2])  # the sign of a zero too
    expected = sum(int((p == s).sum()) for p, s in zip(params, start, strict=True))
    assert optimizer.sparsity().zeros == sparsity(optimizer).zeros == expected
    optimizer.freeze_zeros()
    take_steps(optimizer, params, range(4, 7), scale=3.0)
    assert at_start().tolist() == [True, False] * 3
    assert (params[1][1::2] != start[1][1::2]).all()


@pytest.mark.parametrize("storage", ["float32", "bfloat16 master and momentum"])
@pytest.mark.parametrize("saved_by", ["state_dict", "torch.save", "pickle"])
def test_a_resumed_run_is_pulled_to_its_true_start(storage, saved_by):
    dtype, how = STORAGES[storage]
    params = net(getattr(torch, dtype))
    optimizer = optimizer_of(params, **how)
    take_steps(optimizer, params, range(3))
    if saved_by == "pickle":
        params, other = pickle.loads(pickle.dumps((params, optimizer)))
        resumed = other
    else:
        state = copy.deepcopy(optimizer.state_dict())
        if saved_by == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file)
        resumed_params = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = optimizer_of(resumed_params, **how)
        resumed.load_state_dict(state)
        params, other = resumed_params, resumed
    others = net(getattr(torch, dtype))
    unbroken = optimizer_of(others, **how)
    take_steps(unbroken, others, range(6))
    take_steps(resumed, params, range(3, 6))
    for a, b in zip(history_of(resumed, params), history_of(unbroken, others), strict=True):
        assert_same(a, b)
    assert_same(resumed.state[params[0]]["start"], net(getattr(torch, dtype))[0].float()
                if "master_weights" in how else net()[0])  # fmt: skip


@pytest.mark.parametrize("fused", [True, False])
def test_members_towards_zero_and_towards_their_start_share_groups(fused):
    """New layers in a pretrained stream: a channel's norm has the new weights and the moves."""
    old, new = (nn.Parameter(drawn(8, 5, seed=i).double()) for i in range(2))
    start = old.detach().clone()
    optimizer = ProxSGD(
        [
            {"params": [old], "rows": [0], "toward": "start", "row_weights": [1.0]},
            {"params": [new], "rows": [0]},
        ],
        **{**OPTIONS, "momentum": 0.0, "lr": 1.0, "group_lasso": 2.8},
        fused=fused,
    )
    old.grad = drawn(8, 5, seed=3).double()
    new.grad = torch.zeros_like(new)
    before = torch.cat([-old.grad, new.detach().clone()], 1)
    optimizer.step()
    after = torch.cat([old.detach() - start, new.detach()], 1)
    factors = (1 - 2.8 / before.norm(dim=1, keepdim=True)).clamp(min=0)
    assert 0 < (factors == 0).sum() < 8
    assert torch.allclose(after, factors * before, rtol=0, atol=1e-14)
    assert torch.equal((after == 0).all(1), (factors == 0).ravel())
    assert "start" not in optimizer.state[new]


def test_a_start_asked_for_while_training_is_the_weights_of_then():
    params = net()
    optimizer = optimizer_of(params, toward="zero")
    take_steps(optimizer, params, range(2))
    then = [p.detach().clone() for p in params]
    for group in optimizer.param_groups:
        group["toward"] = "start"
    take_steps(optimizer, params, range(2, 3))
    for p, value in zip(params, then, strict=True):
        assert_same(optimizer.state[p]["start"], value)


def test_another_layout_of_the_start_gives_the_same_bits_in_every_backend():
    results = []
    for fused in (True, False):
        for layout in (torch.contiguous_format, torch.channels_last):
            for of_start in (torch.contiguous_format, torch.channels_last):
                params = net()
                params[0].data = params[0].data.contiguous(memory_format=layout)
                optimizer = optimizer_of(params, fused=fused, track_sparsity=True)
                take_steps(optimizer, params, range(1))
                state = optimizer.state[params[0]]
                state["start"] = state["start"].contiguous(memory_format=of_start)
                take_steps(optimizer, params, range(1, 3))
                results.append((layout, params, optimizer.sparsity().zeros))
    # The order of a sum is that of the parameter's memory.
    for layout, params, zeros in results:
        (same,) = results[0 if layout is torch.contiguous_format else 2][1:2]
        for a, b in zip(params, same, strict=True):
            assert_same(a, b)
        assert zeros == results[0][2]


def test_a_tensor_of_a_subclass_steps_as_a_plain_one():
    plain, subclass = net(), net()
    subclass[1] = nn.Parameter(subclass[1].detach().as_subclass(One))
    for params in (plain, subclass):
        take_steps(optimizer_of(params), params, range(3))
    for a, b in zip(plain, subclass, strict=True):
        assert_same(a, torch.as_tensor(b.detach()).as_subclass(torch.Tensor))


def test_a_compiled_step_gives_the_same_bits():
    eager, compiled = net(), net()
    take_steps(optimizer_of(eager), eager, range(3))
    optimizer = optimizer_of(compiled)
    step = torch.compile(optimizer.step, fullgraph=False)
    for number in range(3):
        take_steps(Step(step), compiled, [number])
    for a, b in zip(eager, compiled, strict=True):
        assert_same(a, b)
    assert all("start" in optimizer.state[p] for p in compiled)


class Step:
    """What :func:`take_steps` calls."""

    def __init__(self, step):
        self.step = step


def test_a_start_of_another_shape_is_refused_before_anything_changes():
    params = net()
    optimizer = optimizer_of(params)
    take_steps(optimizer, params, range(1))
    before = history_of(optimizer, params)
    kept = optimizer.state[params[2]]["start"]
    optimizer.state[params[2]]["start"] = torch.zeros(5)
    where = r"param_groups\[1\]\['params'\]\[1\]: start's shape is \(5,\)"
    with pytest.raises(ValueError, match=where):
        take_steps(optimizer, params, range(1, 2))
    optimizer.state[params[2]]["start"] = kept
    for a, b in zip(history_of(optimizer, params), before, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("of", ["channels", "macs"])
def test_channels_are_steered_towards_zero_only(of):
    """At first every channel is at its start, which nothing would move."""
    said = rf"of is '{of}', and param_groups\[0\] has rows and toward='start': must be 'zero'"
    with pytest.raises(ValueError, match=said):
        TargetSparsity(optimizer_of(net()), 0.5, steps=10, of=of)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_are_added_in_the_order_of_the_parameters_memory(dtype):
    """A norm that is exactly the threshold, in a layout that no operation of torch's keeps."""
    shape = (200, 7, 3, 5, 2)
    spread = [10 ** drawn(*shape, seed=i) for i in (2, 3)]  # or all sums were exact
    start, away = ((drawn(*shape, seed=i) * spread[i]).to(dtype) for i in range(2))
    for fused in (True, False):
        p, s = ((t + 0).contiguous(memory_format=torch.channels_last_3d) for t in (away, start))
        moves = (p.float() - s.float()).permute(0, 2, 3, 4, 1).reshape(200, -1).numpy()
        norms = np.sqrt(reference.square_sums(moves))
        optimizer = ProxSGD(
            [{"params": [nn.Parameter(p)], "rows": [0], "row_weights": [norms.tolist()]}],
            **{**OPTIONS, "lr": 1.0, "momentum": 0.0, "group_lasso": 1.0},
            toward="start",
            fused=fused,
        )
        (p,) = optimizer.param_groups[0]["params"]
        optimizer.state[p]["start"] = s
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert_same(p, s)
    as_they_are_listed = (away.float() - start.float()).flatten(1).numpy()
    assert (np.sqrt(reference.square_sums(as_they_are_listed)) > norms).any()
