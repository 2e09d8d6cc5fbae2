"""From a model to parameter groups."""

import re

import pytest
import torch
from torch import nn

from resnet_reg_ext import ProxSGD, param_groups


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2, bias=False))


def split(groups):
    """Names of regularised and unregularised parameters."""
    names = {True: [], False: []}
    for group in groups:
        names[group["l1"] > 0 or group["weight_decay"] > 0] += [n for n, _ in group["params"]]
    return names[True], names[False]


def test_norms_and_biases_are_unregularised():
    model = Net()
    groups = param_groups(model, l1=0.25, weight_decay=0.5)
    assert split(groups) == (
        ["conv.weight", "head.0.weight", "head.2.weight"],
        ["conv.bias", "bn.weight", "bn.bias", "head.0.bias", "head.1.weight", "head.1.bias"],
    )
    assert [(g["l1"], g["weight_decay"]) for g in groups] == [(0.25, 0.5), (0.0, 0.0)]
    by_name = dict(model.named_parameters())
    for group in groups:
        for name, p in group["params"]:
            assert p is by_name[name]


def test_defaults_are_the_optimizers():
    groups = param_groups(Net())
    defaults = ProxSGD([nn.Parameter(torch.ones(1))]).defaults
    for key in ("l1", "weight_decay"):
        assert groups[0][key] == defaults[key]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.InstanceNorm1d(4, affine=True),
        nn.SyncBatchNorm(4),
        nn.RMSNorm(4),
    ],
    ids=lambda m: type(m).__name__,
)
def test_kinds_of_norms(norm):
    regularised, unregularised = split(param_groups(nn.Sequential(nn.Linear(4, 4), norm)))
    assert regularised == ["0.weight"]
    assert "1.weight" in unregularised


def test_other_biases():
    lstm, attention = nn.LSTM(3, 4), nn.MultiheadAttention(4, 2)
    regularised, unregularised = split(param_groups(lstm))
    assert set(regularised) == {"weight_ih_l0", "weight_hh_l0"}
    assert set(unregularised) == {"bias_ih_l0", "bias_hh_l0"}
    _, unregularised = split(param_groups(attention))
    assert set(unregularised) == {"in_proj_bias", "out_proj.bias"}


@pytest.mark.parametrize(
    ("patterns", "moved"),
    [
        (["conv.weight"], {"conv.weight"}),
        (["head.*"], {"head.0.weight", "head.2.weight"}),
        (["*.weight"], {"conv.weight", "head.0.weight", "head.2.weight"}),
        (["head.[0-1].weight", "conv.*"], {"conv.weight", "head.0.weight"}),
        (["bn.bias"], set()),
        ("head.*", {"head.0.weight", "head.2.weight"}),
    ],
    ids=["name", "layer", "leaf", "several", "unregularised anyway", "one string"],
)
def test_exclude(patterns, moved):
    before, _ = split(param_groups(Net()))
    regularised, unregularised = split(param_groups(Net(), exclude=patterns))
    assert set(before) - set(regularised) == moved
    assert moved <= set(unregularised)


class Same(nn.Module):
    """A parametrization that changes nothing."""

    def forward(self, x):
        return x


def test_what_is_parametrized_is_what_it_was():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    for module in model:
        for leaf in ("weight", "bias"):
            nn.utils.parametrize.register_parametrization(module, leaf, Same())
    regularised, unregularised = split(param_groups(model))
    assert regularised == ["0.parametrizations.weight.original"]
    assert len(unregularised) == 3


def test_a_parametrization_of_several_tensors():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    regularised, unregularised = split(param_groups(layer))
    assert unregularised == ["bias"]
    assert len(regularised) == 2


def test_one_parameter_under_two_names_of_one_module():
    layer = nn.Linear(3, 1)
    layer.weight = nn.Parameter(torch.ones(1))
    layer.bias = layer.weight
    assert split(param_groups(layer)) == ([], ["weight"])
    assert split(param_groups(layer, exclude="bias")) == ([], ["weight"])


def test_biases_are_told_by_a_word_not_by_letters():
    module = nn.Module()
    module.biased, module.bias_k = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    assert split(param_groups(module)) == (["biased"], ["bias_k"])


def test_patterns_from_a_generator():
    regularised, _ = split(param_groups(Net(), exclude=(p for p in ["conv.*", "head.*"])))
    assert regularised == []


@pytest.mark.parametrize("model", [list(Net().parameters()), Net().named_parameters()])
def test_parameters_alone_do_not_tell_what_they_are(model):
    with pytest.raises(TypeError, match=f"model is a {type(model).__name__}: must be a module"):
        param_groups(model)


@pytest.mark.parametrize("pattern", ["fc.*", "conv", "CONV.weight", ""])
def test_exclude_that_matches_nothing(pattern):
    with pytest.raises(ValueError, match=re.escape(repr(pattern))):
        param_groups(Net(), exclude=["conv.weight", pattern])


@pytest.mark.parametrize("model", [nn.Module(), nn.Sequential(nn.ReLU())], ids=["empty", "relu"])
def test_no_parameters(model):
    with pytest.raises(ValueError, match="no parameters"):
        param_groups(model)


def test_one_group_where_the_other_is_empty():
    assert len(param_groups(nn.Linear(2, 2, bias=False))) == 1
    (group,) = param_groups(nn.BatchNorm1d(3))
    assert group["l1"] == group["weight_decay"] == 0.0


def test_every_parameter_once_frozen_ones_too():
    model = Net()
    model.conv.weight.requires_grad_(False)
    members = [p for g in param_groups(model) for _, p in g["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    assert any(p is model.conv.weight for p in members)


def test_frozen_parameter_stays_and_moves_when_unfrozen():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    optimizer = ProxSGD(param_groups(model), lr=0.1)
    frozen = model[0].weight.detach().clone()

    def step():
        optimizer.zero_grad()
        model(torch.ones(3)).sum().backward()
        optimizer.step()

    step()
    assert torch.equal(model[0].weight, frozen)
    model[0].requires_grad_(True)
    step()
    assert not torch.equal(model[0].weight, frozen)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


def test_tied_parameters_are_there_once():
    (group,) = param_groups(Tied())
    assert [n for n, _ in group["params"]] == ["embedding.weight"]


@pytest.mark.parametrize("pattern", ["embedding.weight", "output.weight"])
def test_tied_parameters_are_excluded_by_either_name(pattern):
    (group,) = param_groups(Tied(), exclude=[pattern])
    assert group["l1"] == 0.0


def test_a_module_used_twice():
    layer = nn.Linear(3, 3)
    groups = param_groups(nn.Sequential(layer, nn.ReLU(), layer), exclude=["2.weight"])
    regularised, unregularised = split(groups)
    assert regularised == []
    assert unregularised == ["0.weight", "0.bias"]


def test_options_given_here_are_checked_by_the_optimizer():
    groups = param_groups(Net(), l1=-1.0)
    with pytest.raises(ValueError, match=re.escape("param_groups[0]: l1 is -1.0")):
        ProxSGD(groups)


def test_training_zeroes_only_what_is_regularised():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.LayerNorm(20), nn.Linear(20, 1))
    optimizer = ProxSGD(param_groups(model, l1=0.05), lr=0.05)
    x = torch.randn(64, 10)
    for _ in range(60):
        optimizer.zero_grad()
        (model(x)[:, 0] - x[:, 0]).square().mean().backward()
        optimizer.step()
    zeros = {n: int((p == 0).sum()) for n, p in model.named_parameters()}
    assert zeros["0.weight"] > 50
    for name in ("0.bias", "1.weight", "1.bias", "2.bias"):
        assert zeros[name] == 0
