"""Checkpoints whose parameter groups are others than those of the optimizer that loads them."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD

from resnet_reg_ext import ProxSGD, param_groups

NO_PENALTY = {"l1": 0.0, "weight_decay": 0.0}


def network():
    """Norms between the weights, as in a ResNet, so that both groups take turns in the model."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        images = torch.randn(4, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()


def buffers(model, optimizer):
    """Momentum by the model's names."""
    return {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}


def assert_goes_on(first, second, a, b):
    """Both train on to the same bits."""
    kept, loaded = buffers(first, a), buffers(second, b)
    assert all(torch.equal(kept[name], loaded[name]) for name in kept)
    train(first, a, 3)
    train(second, b, 3)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("named", [False, True], ids=["by order", "by name"])
@pytest.mark.parametrize("fused", [None, False])
def test_a_checkpoint_of_sgd_goes_on_in_param_groups(named, fused):
    first = network()
    theirs = first.named_parameters() if named else first.parameters()
    sgd = SGD(theirs, lr=0.05, momentum=0.8, foreach=False)
    train(first, sgd, 3)
    saved = copy.deepcopy(sgd.state_dict())  # loading shares the tensors
    before = copy.deepcopy(saved)
    second = copy.deepcopy(first)
    groups = param_groups(second, **NO_PENALTY)
    ours = ProxSGD(groups, lr=1.0, momentum=0.1, fused=fused)
    assert len(ours.param_groups) == 2
    ours.load_state_dict(saved)
    assert [(g["lr"], g["momentum"]) for g in ours.param_groups] == [(0.05, 0.8)] * 2
    assert_goes_on(first, second, sgd, ours)
    # The checkpoint is as it was.
    assert str(saved["param_groups"]) == str(before["param_groups"])


def test_penalties_stay_those_of_the_groups():
    model = network()
    sgd = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.3)
    train(model, sgd, 1)
    ours = ProxSGD(param_groups(model, l1=0.01, weight_decay=0.02), lr=0.1)
    ours.load_state_dict(sgd.state_dict())
    penalties = [(g["l1"], g["weight_decay"]) for g in ours.param_groups]
    assert penalties == [(0.01, 0.02), (0.0, 0.0)]
    assert [len(g["param_names"]) for g in ours.param_groups] == [3, 6]


@pytest.mark.parametrize("named", [False, True], ids=["by order", "by name"])
def test_groups_go_into_one(named):
    first = network()
    ours = ProxSGD(param_groups(first, **NO_PENALTY), lr=0.05, momentum=0.8, weight_decay=0, l1=0)
    train(first, ours, 2)
    second = copy.deepcopy(first)
    sources = second.named_parameters() if named else second.parameters()
    single = ProxSGD(sources, lr=0.1, **NO_PENALTY)
    single.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert_goes_on(first, second, ours, single)


def test_names_tell_where_the_order_is_another():
    first = network()
    ours = ProxSGD(list(first.named_parameters()), lr=0.05, **NO_PENALTY)
    train(first, ours, 2)
    second = copy.deepcopy(first)
    backwards = ProxSGD(list(second.named_parameters())[::-1], lr=0.05, **NO_PENALTY)
    backwards.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert backwards.param_groups[0]["param_names"][0] == "8.bias"
    assert_goes_on(first, second, ours, backwards)


def test_many_layers_of_one_shape_are_told_by_order():
    """As many parameters as a ResNet-50 has; each momentum buffer has numbers of its own."""
    block = [[nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)] for _ in range(53)]
    model = nn.Sequential(*(layer for pair in block for layer in pair), nn.Linear(4, 4))
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, float(i))
    sgd.step()
    ours = ProxSGD(param_groups(model), lr=0.1)
    ours.load_state_dict(sgd.state_dict())
    assert i == 160
    for i, p in enumerate(model.parameters()):
        assert (ours.state[p]["momentum_buffer"] == i).all()


def test_parameters_without_state_and_optimizers_without_momentum():
    model = network()
    sgd = SGD(model.parameters(), lr=0.05, momentum=0.9)
    model[8].bias.requires_grad_(False)  # the last: whether it has state or not, order tells
    train(model, sgd, 1)
    ours = ProxSGD(param_groups(model), lr=0.1)
    ours.load_state_dict(sgd.state_dict())
    assert "momentum_buffer" not in ours.state[model[8].bias]
    plain = SGD(model.parameters(), lr=0.25)
    train(model, plain, 1)
    ours.load_state_dict(plain.state_dict())
    assert [(g["lr"], g["momentum"]) for g in ours.param_groups] == [(0.25, 0.0)] * 2


@pytest.mark.parametrize("case", ["ambiguous", "unnamed", "fewer", "several", "lr"])
def test_where_it_cannot_be_told_the_remedy_is_said_and_nothing_changes(case):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    weights, biases = ([getattr(layer, n) for layer in model] for n in ("weight", "bias"))
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
    # Each of the three layers may be the one that has a group of its own.
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    words = "nor do order and shapes in one way only: make the optimizer with groups like the"
    if case == "unnamed":
        groups = [{"params": [weights[2]]}, {"params": [*weights[:2], *biases]}]
        words = "names of parameters don't tell which is which: make"
    if case == "fewer":
        groups, words = [{"params": weights}], "1 param_groups of 6 parameters, the optimizer 1 "
    if case == "several":
        sgd = SGD([{"params": weights}, {"params": biases}], lr=0.1, momentum=0.9)
        words = "names of parameters don't tell which is which: make"
    if case == "lr":
        sgd = SGD([{"params": named[:3]}, {"params": named[3:], "lr": 0.2}], lr=0.1, momentum=0.9)
        groups, words = [{"params": named}], "with lr 0.1 and 0.2: must be one"
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    sgd.step()
    ours = ProxSGD(groups, lr=0.5)
    ours.step()
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="ProxSGD: ") as error:
        ours.load_state_dict(sgd.state_dict())
    assert words in str(error.value)
    assert "named_parameters() (torch >= 2.6), which keeps names" in str(error.value)
    assert math.isclose(ours.param_groups[0]["lr"], 0.5)
    for index, state in ours.state_dict()["state"].items():
        for key, value in state.items():
            assert value is before["state"][index][key] or torch.equal(
                value, before["state"][index][key]
            )
