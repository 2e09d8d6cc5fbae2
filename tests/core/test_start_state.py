"""The state `start`: checkpoints, pickles, other optimizers' checkpoints, changed options."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from reference import assert_same
from torch import nn

from resnet_reg_ext import ProxSGD
from resnet_reg_ext.functional import prox_sgd_

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "l1": 0.05}
KINDS = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16 master": (torch.bfloat16, {"master_weights": True}),
    "float16 master": (torch.float16, {"master_weights": True}),
}


def params_of(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 3), (), (70,), (0,), (2, 3, 3, 3)]
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def copies_of(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def all_params(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer, begin, end):
    for number in range(begin, end):
        for i, p in enumerate(all_params(optimizer)):
            generator = torch.Generator().manual_seed(100 * number + i)
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def assert_alike(one, other):
    for p, q in zip(all_params(one), all_params(other), strict=True):
        assert_same(p, q)
        assert one.state[p].keys() == other.state[q].keys()
        for key, value in one.state[p].items():
            assert value.dtype is other.state[q][key].dtype
            assert_same(value, other.state[q][key], key)


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["checkpoint", "pickle", "copy"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_keeps_its_true_start_to_the_bit(kind, way):
    dtype, options = KINDS[kind]
    whole = ProxSGD(params_of(dtype), **OPTIONS, **options, toward="start")
    train(whole, 0, 6)

    first = ProxSGD(params_of(dtype), **OPTIONS, **options, toward="start")
    train(first, 0, 3)
    if way == "checkpoint":
        second = ProxSGD(copies_of(all_params(first)), lr=7.0, **options)
        second.load_state_dict(through_a_file(first.state_dict()))
    else:
        second = pickle.loads(pickle.dumps(first)) if way == "pickle" else copy.deepcopy(first)
    train(second, 3, 6)
    assert_alike(second, whole)
    for p, start in zip(all_params(second), params_of(dtype), strict=True):
        assert_same(second.state[p]["start"], start.float() if options else start)


@pytest.mark.parametrize("master_weights", [False, True])
def test_after_a_checkpoint_of_sgd_the_start_is_the_parameter_as_it_is_then(master_weights):
    dtype = torch.bfloat16 if master_weights else torch.float32
    theirs = torch.optim.SGD(params_of(dtype), lr=0.1, momentum=0.9)
    train(theirs, 0, 3)
    ours = ProxSGD(
        copies_of(all_params(theirs)), lr=7.0, toward="start", master_weights=master_weights
    )
    ours.load_state_dict(theirs.state_dict())
    here = [p.detach().clone() for p in all_params(theirs)]
    train(ours, 3, 4)
    assert ours.param_groups[0]["toward"] == "start"
    for p, start in zip(all_params(ours), here, strict=True):
        assert_same(ours.state[p]["start"], start.float() if master_weights else start)

    theirs.load_state_dict(ours.state_dict())  # which keeps what it doesn't know
    train(theirs, 4, 5)
    ours.load_state_dict(theirs.state_dict())
    for p, start in zip(all_params(ours), here, strict=True):
        assert_same(ours.state[p]["start"], start.float() if master_weights else start)


def test_a_start_follows_the_options_that_say_how_to_compute():
    """From a run with master weights into one without, and back."""
    train(first := ProxSGD(params_of(torch.bfloat16), toward="start", master_weights=True), 0, 2)
    plain = ProxSGD(copies_of(all_params(first)), toward="start")
    plain.load_state_dict(first.state_dict())
    train(plain, 2, 3)
    back = ProxSGD(copies_of(all_params(first)), toward="start", master_weights=True)
    back.load_state_dict(plain.state_dict())
    train(back, 3, 4)
    for optimizer, dtype in (
        (first, torch.float32),
        (plain, torch.bfloat16),
        (back, torch.float32),
    ):
        assert {optimizer.state[p]["start"].dtype for p in all_params(optimizer)} == {dtype}


def test_an_optimizer_pickled_before_there_was_the_option_goes_on_towards_zero():
    optimizer, expected = ProxSGD(params_of(), **OPTIONS), ProxSGD(params_of(), **OPTIONS)
    del optimizer.param_groups[0]["toward"], optimizer.defaults["toward"]
    optimizer = pickle.loads(pickle.dumps(optimizer))
    train(optimizer, 0, 3)
    train(expected, 0, 3)
    assert_alike(optimizer, expected)


def test_a_step_that_is_refused_leaves_no_start():
    params = params_of()
    optimizer = ProxSGD(params, **OPTIONS, toward="start")
    for p in params:
        p.grad = torch.ones_like(p)
    params[2].grad = torch.ones(70).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    assert not optimizer.state


def test_an_infinity_at_the_first_step_leaves_no_start():
    params = params_of()
    optimizer = ProxSGD(params, **OPTIONS, toward="start", fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(2):
        loss = sum(p.sum() * (float("inf") if number == 0 else 1.0) for p in params)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert bool(optimizer.state) is (number == 1)
    for p, start in zip(params, params_of(), strict=True):
        assert_same(optimizer.state[p]["start"], start)


def test_the_start_is_kept_while_another_target_is_chosen():
    optimizer = ProxSGD(params_of(), **OPTIONS, toward="start")
    train(optimizer, 0, 2)
    optimizer.param_groups[0]["toward"] = "zero"
    train(optimizer, 2, 4)
    optimizer.param_groups[0]["toward"] = "start"
    train(optimizer, 4, 5)
    for p, start in zip(all_params(optimizer), params_of(), strict=True):
        assert_same(optimizer.state[p]["start"], start)


def test_the_function_refuses_other_starts():
    p, g = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match="1 params, but 2 starts"):
        prox_sgd_([p], [g], lr=0.1, starts=[p, p])
    with pytest.raises(TypeError, match=r"starts\[0\] is a list: must be a tensor"):
        prox_sgd_([p], [g], lr=0.1, starts=[[1.0]])
    with pytest.raises(ValueError, match=r"params\[0\]: start's shape is \(2,\)"):
        prox_sgd_([p], [g], lr=0.1, starts=[torch.ones(2)])
    assert_same(p, torch.ones(3))
