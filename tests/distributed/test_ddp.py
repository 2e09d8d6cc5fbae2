"""Two processes against one, and what splits a step up: hooks, accumulation, many groups."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import ddp_worker
import pytest
import torch
from reference import assert_same
from torch import nn
from torch.nn.functional import cross_entropy

from resnet_reg_ext import ProxSGD, TargetSparsity, param_groups

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What each of two gloo processes was left with."""
    folder = tmp_path_factory.mktemp("ddp")
    ddp_worker.launch(WORKER, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(ddp_worker.WORLD)]


@pytest.fixture(autouse=True)
def one_thread(runtime):
    torch.set_num_threads(1)


def add_gradients(model, step):
    """Adds the mean of both processes' gradients, each computed apart, to the model's."""
    for rank in range(ddp_worker.WORLD):
        images, labels = ddp_worker.batch(step, rank)
        grads = torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            # Halving is exact: it makes no difference whether it comes before the sum or after.
            p.grad = g / ddp_worker.WORLD if p.grad is None else p.grad + g / ddp_worker.WORLD


def alone(make_optimizer, controller=None, steps_together=1):
    model = ddp_worker.net()
    optimizer = make_optimizer(model)
    steered = controller(optimizer) if controller else None
    for step in range(0, ddp_worker.STEPS, steps_together):
        optimizer.zero_grad()
        for number in range(step, step + steps_together):
            add_gradients(model, number)
        optimizer.step()
        if steered is not None:
            steered.step()
    return model, optimizer


def assert_same_model(state, model):
    for name, expected in model.state_dict().items():
        assert_same(state[name], expected, name)


def assert_same_state(state, optimizer):
    for key, expected in optimizer.state_dict()["state"].items():
        assert_same(state["state"][key]["momentum_buffer"], expected["momentum_buffer"], str(key))


def zeros_in(state):
    return sum(int((tensor == 0).sum()) for tensor in state.values())


def test_ddp_gives_the_weights_of_one_process(processes):
    model, optimizer = alone(lambda m: ProxSGD(m.parameters(), **ddp_worker.OPTIONS))
    for results in processes:
        assert_same_model(results["ddp"][0], model)
        assert_same_state(results["ddp"][1], optimizer)
    assert zeros_in(model.state_dict()) > 100


def test_ddp_without_l1_gives_the_weights_of_torchs_sgd(processes):
    model, optimizer = alone(
        lambda m: torch.optim.SGD(m.parameters(), **ddp_worker.SGD_OPTIONS, foreach=False)
    )
    for results in processes:
        assert_same_model(results["ddp, l1=0"][0], model)
        assert_same_state(results["ddp, l1=0"][1], optimizer)


def test_zero_redundancy_optimizer_shards_the_momentum_and_nothing_else_changes(processes):
    model, optimizer = alone(lambda m: ProxSGD(m.parameters(), **ddp_worker.OPTIONS))
    for results in processes:
        assert_same_model(results["zero"][0], model)
    held = [results["zero"][2] for results in processes]
    assert sum(held) == sum(p.numel() for p in model.parameters())
    assert min(held) > 0

    # What the first process gathered is a checkpoint of an ordinary ProxSGD.
    consolidated = processes[0]["zero"][1]
    fresh = ProxSGD(model.parameters(), **ddp_worker.OPTIONS)
    fresh.load_state_dict(consolidated)
    assert_same_state(fresh.state_dict(), optimizer)
    assert fresh.param_groups[0]["l1"] == ddp_worker.OPTIONS["l1"]


def test_accumulated_gradients_over_two_processes(processes):
    model, _ = alone(
        lambda m: ProxSGD(param_groups(m, l1=2e-2, weight_decay=1e-2), lr=0.1), steps_together=2
    )
    for results in processes:
        # Which of the four sums comes first differs, so the last bits do.
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(results["accumulated"][0][name], expected)
        for name, tensor in processes[0]["accumulated"][0].items():
            assert_same(results["accumulated"][0][name], tensor, name)


def test_every_process_steers_to_the_same_l1(processes):
    model, optimizer = alone(
        lambda m: ProxSGD(m.parameters(), **ddp_worker.OPTIONS),
        lambda optimizer: TargetSparsity(optimizer, 0.5, steps=100),
    )
    for results in processes:
        assert_same_model(results["steered"][0], model)
        l1 = results["steered"][1]["param_groups"][0]["l1"]
        assert l1 == optimizer.param_groups[0]["l1"] != ddp_worker.OPTIONS["l1"]


@pytest.mark.parametrize("fused", [True, False])
def test_optimizer_in_backward(fused):
    """A gradient is used up as soon as it is there; the steps are the same."""
    model, expected = ddp_worker.net(), ddp_worker.net()
    reference = ProxSGD(expected.parameters(), **ddp_worker.OPTIONS, fused=fused)
    optimizers = {p: ProxSGD([p], **ddp_worker.OPTIONS, fused=fused) for p in model.parameters()}

    def step_and_drop(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_and_drop)
    for step in range(ddp_worker.STEPS):
        images, labels = ddp_worker.batch(step, 0)
        cross_entropy(model(images), labels).backward()
        assert all(p.grad is None for p in model.parameters())
        reference.zero_grad()
        cross_entropy(expected(images), labels).backward()
        reference.step()
        assert_same_model(model.state_dict(), expected)
    assert zeros_in(model.state_dict()) > 100


@pytest.mark.parametrize("fused", [True, False])
def test_gradient_accumulation(fused):
    """Gradients that have summed up over backward passes are used as torch's SGD uses them."""
    models = ddp_worker.net(), ddp_worker.net()
    optimizers = (
        ProxSGD(models[0].parameters(), **ddp_worker.SGD_OPTIONS, l1=0.0, fused=fused),
        torch.optim.SGD(models[1].parameters(), **ddp_worker.SGD_OPTIONS, foreach=False),
    )
    for step in range(ddp_worker.STEPS):
        for model, optimizer in zip(models, optimizers, strict=True):
            images, labels = ddp_worker.batch(step, 0)
            (cross_entropy(model(images), labels) / 3).backward()
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=step != 2)
        assert_same_model(models[0].state_dict(), models[1])


def many_groups(count):
    """An optimizer of ``count`` groups of one tensor each, past its first step."""
    tensors = [nn.Parameter(torch.full((4,), 1.0)) for _ in range(count)]
    optimizer = ProxSGD([{"params": [p], "l1": 1e-3} for p in tensors], lr=0.1)
    for p in tensors:
        p.grad = torch.ones(4)
    optimizer.step()
    return optimizer


def calls_in_a_step(optimizer):
    """Python's and C's function calls in a step: the same number at every run."""
    calls = 0
    # A collection in between would call what other tests' objects are to be finalised with.
    gc.collect()
    gc.disable()

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


def seconds_of_a_step(optimizer):
    """The fastest of several, in this process's own time."""
    times = []
    for _ in range(9):
        start = time.process_time()
        optimizer.step()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("fused", [None, False])
def test_a_step_costs_each_group_the_same_however_many_there_are(fused):
    few, many = many_groups(250), many_groups(1000)
    for optimizer in (few, many):
        for group in optimizer.param_groups:
            group["fused"] = fused
    assert calls_in_a_step(many) <= 4 * calls_in_a_step(few)
    # Quadratic work inside one call, such as copying a list for each group, shows in time alone:
    # 16 times as much for 4 times the groups. In between is room for a busy machine.
    assert seconds_of_a_step(many) < 8 * seconds_of_a_step(few)
