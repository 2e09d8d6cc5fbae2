"""FSDP2, tensor parallelism and distributed checkpoints: two gloo processes against one."""

from __future__ import annotations

import re
from pathlib import Path

import ddp_worker
import dtensor_worker
import pytest
import torch
from ddp_worker import OPTIONS, STEPS, WORLD, batch, net
from dtensor_worker import GRADS, SAVED, SAVED_AT, VALUES
from reference import assert_same
from torch import nn
from torch.nn.functional import cross_entropy

from resnet_reg_ext import ProxSGD, sparsity

WORKER = Path(__file__).with_name("dtensor_worker.py")


@pytest.fixture(autouse=True)
def one_thread(runtime):
    torch.set_num_threads(1)


def train(model, optimizer, steps=range(STEPS), coefficient=None, skipped=()):
    """One process that sees both processes' batches."""
    dtype = next(model.parameters()).dtype
    params = list(model.parameters())
    for step in steps:
        optimizer.zero_grad()
        for rank in range(WORLD):
            images, labels = batch(step, rank)
            loss = cross_entropy(model(images.to(dtype)), labels)
            for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
                # Halving is exact: it may come before the sum or after.
                p.grad = g / WORLD if p.grad is None else p.grad + g / WORLD
        if step not in skipped:
            optimizer.step(**({} if coefficient is None else coefficient(params)))


def alone(dtype=torch.float32, options=OPTIONS, **how):
    model = net().to(dtype)
    optimizer = ProxSGD(model.named_parameters(), **options)
    train(model, optimizer, **how)
    return model, optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With checkpoints that one process has saved half-way."""
    folder = tmp_path_factory.mktemp("dtensor")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for kind, (dtype, options) in SAVED.items():
        model, optimizer = alone(dtype, {**OPTIONS, **options}, steps=range(SAVED_AT))
        dtensor_worker.save(model, optimizer, folder / f"{kind}_of_one")
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def processes(folder):
    """What each of two gloo processes was left with."""
    ddp_worker.launch(WORKER, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_same_outcome(found, model, optimizer, compare=assert_same):
    for name, p in model.named_parameters():
        compare(found[name]["weight"], p.detach())
        assert found[name].keys() - {"weight"} == optimizer.state[p].keys()
        for key, value in optimizer.state[p].items():
            compare(found[name][key], value)


@pytest.mark.parametrize("name", ["fsdp", "fsdp, tracked", "fsdp, pure"])
def test_fsdp_gives_the_bits_of_one_process(processes, name):
    model, optimizer = alone()
    zeros = sparsity(optimizer).to_dict()
    assert zeros["zeros"] > 100
    for results in processes:
        found, counts = results[name]
        assert_same_outcome(found, model, optimizer)
        assert counts == zeros


def test_fsdp_towards_the_start_gives_the_bits_of_one_process(processes):
    model, optimizer = alone(options={**OPTIONS, "toward": "start"})
    at_start = sparsity(optimizer).to_dict()
    assert at_start["zeros"] > 100
    for results in processes:
        found, counts = results["fsdp, start"]
        assert_same_outcome(found, model, optimizer)
        assert counts == at_start


def test_fsdp_with_master_weights(processes):
    model, optimizer = alone(torch.bfloat16, {**OPTIONS, "master_weights": True})
    for results in processes:
        found, counts = results["fsdp, master weights"]
        assert_same_outcome(found, model, optimizer)
        assert counts == sparsity(optimizer).to_dict()
        assert all(row["master_weight"].dtype is torch.float32 for row in found.values())


@pytest.mark.parametrize("name", ["coupled", "coupled, pure", "coupled, start"])
def test_coupled_rows_give_the_bits_of_one_process(processes, name):
    model = net()
    toward = "start" if name.endswith("start") else "zero"
    optimizer = ProxSGD(
        dtensor_worker.coupled_groups(model), **dtensor_worker.COUPLED, toward=toward
    )
    train(model, optimizer)
    target = net()[0].weight if toward == "start" else torch.tensor(0.0)
    dead = int((model[0].weight == target).flatten(1).all(1).sum())
    assert 0 < dead < 8
    for results in processes:
        assert_same_outcome(results[name], model, optimizer)


def test_channels_are_steered_as_in_one_process(processes):
    model = net()
    optimizer, state = dtensor_worker.steered(model, train)
    assert 0 < state["_share"] < 1
    for results in processes:
        found, found_state = results["steered"]
        assert found_state == state
        assert_same_outcome(found, model, optimizer)


def test_coupled_rows_that_are_not_divided_alike_are_refused(processes):
    for results in processes:
        columns, unlike, plain = results["uncoupled"]
        assert "placements are (Shard(dim=1),): must divide nothing but dimension 0" in columns
        assert "placements are (Replicate(),): must divide" in unlike
        assert "['params'][1]: must be a DTensor like the other parameters" in plain


@pytest.mark.parametrize("kind", SAVED)
def test_a_checkpoint_of_two_processes_goes_on_in_one(processes, folder, kind):
    dtype, options = SAVED[kind]
    model = net().to(dtype)
    optimizer = ProxSGD(model.parameters(), lr=0.7, momentum=0.2, **options)
    dtensor_worker.load(model, optimizer, folder / f"{kind}_of_two")
    assert optimizer.param_groups[0]["l1"] == OPTIONS["l1"]
    train(model, optimizer, range(SAVED_AT, STEPS))
    expected = alone(dtype, {**OPTIONS, **options})
    found = {
        name: {"weight": p.detach(), **optimizer.state[p]} for name, p in model.named_parameters()
    }
    assert_same_outcome(found, *expected)


@pytest.mark.parametrize("kind", SAVED)
def test_a_checkpoint_of_one_process_goes_on_in_two(processes, kind):
    dtype, options = SAVED[kind]
    model, optimizer = alone(dtype, {**OPTIONS, **options})
    for results in processes:
        assert_same_outcome(results[f"checkpoint of one, {kind}"], model, optimizer)


def test_a_gradient_divided_otherwise_than_its_parameter(processes):
    """Element by element each must meet its own gradient."""
    param = nn.Parameter(VALUES.clone())
    optimizer = ProxSGD([param], **OPTIONS)
    for _ in range(2):
        param.grad = GRADS.clone()
        optimizer.step()
    for results in processes:
        assert len(results["placements"]) == 12
        for ways, (found, zeros) in results["placements"].items():
            assert_same(found, param.detach(), str(ways))
            assert zeros == int((param == 0).sum())


def test_a_scalar_an_empty_part_and_an_ordinary_tensor(processes):
    values = [torch.tensor(0.5), VALUES[:1].clone(), VALUES.clone()]
    params = list(map(nn.Parameter, values))
    optimizer = ProxSGD(params, **OPTIONS)
    for _ in range(2):
        for p, g in zip(params, (torch.tensor(2.0), GRADS[:1], GRADS), strict=True):
            p.grad = g.clone()
        optimizer.step()
    for results in processes:
        found, zeros = results["odd ones"]
        for p, q in zip(found, params, strict=True):
            assert_same(p, q.detach())
        assert zeros == optimizer.sparsity().zeros


def test_tensor_parallel_layers(processes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = ProxSGD(model.named_parameters(), **OPTIONS)
    for step in range(STEPS):
        inputs = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        cross_entropy(model(inputs), torch.arange(8) % 5).backward()
        optimizer.step()
    for results in processes:
        found, zeros = results["tensor parallel"]
        # The second layer's sum is made in two parts, so the last bits differ.
        assert_same_outcome(found, model, optimizer, torch.testing.assert_close)
        assert zeros == sparsity(optimizer).zeros > 30


def test_clipping_by_a_coefficient_that_is_a_dtensor(processes):
    def coefficient(params):
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        return {"grad_coefficient": (0.1 / (norm + 1e-6)).clamp(max=1.0)}

    model, optimizer = alone(coefficient=coefficient)
    for results in processes:
        # The norm's sum is made in two parts.
        assert_same_outcome(results["clipped"], model, optimizer, torch.testing.assert_close)
    unclipped, _ = alone()
    assert not torch.allclose(model[0].weight, unclipped[0].weight)


@pytest.mark.parametrize("name", ["scaled", "scaled, fused"])
def test_an_infinity_in_one_process_skips_the_step_in_both(processes, name):
    model, optimizer = alone(skipped=(2,))
    for results in processes:
        found, scales = results[name]
        assert scales == [1024.0] * 2 + [512.0] * 4
        assert_same_outcome(found, model, optimizer)


REFUSALS = {
    "partial": r"\(w\): the parameter's placements are \(Partial\(sum\),\): a sum that is still",
    "plain momentum": r"\(w\): the parameter is a DTensor and its momentum_buffer is not",
    "momentum divided": r"\(w\): the momentum_buffer is a DTensor and its parameter is not",
    "plain checkpoint": r"\(w\): the parameter is a DTensor and its momentum_buffer is not",
    "divided checkpoint": r"\(w\): the momentum_buffer is a DTensor and its parameter is not",
    "momentum elsewhere": r"\(w\): momentum_buffer's placements are \(Shard\(dim=1\),\): must be "
    r"the parameter's, \(Shard\(dim=0\),\)",
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_parameter_and_change_nothing(processes, case):
    for results in processes:
        message, unchanged = results["refusals"][case]
        assert re.search(REFUSALS[case], message)
        assert unchanged
