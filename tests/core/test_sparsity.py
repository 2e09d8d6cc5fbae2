"""What is exactly zero, layer by layer."""

import json

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from resnet_reg_ext import L1Scheduler, ProxSGD, Sparsity, param_groups, sparsity
from resnet_reg_ext.sparsity import count

pytestmark = pytest.mark.reads_tensors


def model_with_zeros():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
        model[0].weight[0] = 0.0
        model[0].weight[1, 0] = -0.0
        model[0].weight[1, 1] = 1e-45  # the smallest subnormal isn't zero
        model[0].weight[1, 2] = float("nan")
        model[1].bias[2] = 0.0
    return model


def test_of_a_model():
    found = sparsity(model_with_zeros())
    assert isinstance(found, Sparsity)
    assert [(r.name, r.zeros, r.size) for r in found.layers] == [
        ("0.weight", 5, 20),
        ("0.bias", 0, 5),
        ("1.weight", 0, 5),
        ("1.bias", 1, 5),
    ]
    assert found.layers[0].fraction == 0.25
    assert (found.zeros, found.size) == (6, 35)
    assert found.fraction == 6 / 35


def test_text_is_a_summary():
    model = model_with_zeros()
    assert str(sparsity(model)).splitlines() == [
        "             parameters         zeros          size   zeros %",
        "total                 4             6            35     17.14",
        "table() lists the parameters",
    ]
    optimizer = ProxSGD(param_groups(model, l1=0.1), lr=0.1)
    assert str(sparsity(optimizer)).splitlines()[1:-1] == [
        "regularised           1             5            20     25.00",
        "others                3             1            15      6.67",
        "total                 4             6            35     17.14",
    ]


def test_the_table_has_all_parameters():
    assert sparsity(model_with_zeros()).table().splitlines() == [
        "parameter         zeros          size   zeros %",
        "0.weight              5            20     25.00",
        "0.bias                0             5      0.00",
        "1.weight              0             5      0.00",
        "1.bias                1             5     20.00",
        "total                 6            35     17.14",
    ]


def test_text_of_large_numbers():
    model = nn.Linear(1000, 2000, bias=False)
    nn.init.zeros_(model.weight)
    *_, last = sparsity(model).table().splitlines()
    assert last.split() == ["total", "2,000,000", "2,000,000", "100.00"]


def test_dict_is_ready_for_json():
    found = sparsity(model_with_zeros()).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["zeros"] == 6
    assert found["size"] == 35
    assert found["fraction"] == 6 / 35
    assert found["layers"]["0.weight"] == {"zeros": 5, "size": 20, "fraction": 0.25}
    assert list(found["layers"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_of_an_optimizer_with_names():
    model = model_with_zeros()
    optimizer = ProxSGD(param_groups(model, l1=0.25))
    found = sparsity(optimizer)
    assert [(r.name, r.l1) for r in found.layers] == [
        ("0.weight", 0.25),
        ("0.bias", 0.0),
        ("1.weight", 0.0),
        ("1.bias", 0.0),
    ]
    assert [r.name for r in found.regularised.layers] == ["0.weight"]
    assert found.regularised.fraction == 0.25
    assert (found.zeros, found.size) == (6, 35)


def test_of_an_optimizer_without_names():
    model = model_with_zeros()
    optimizer = ProxSGD([{"params": [model[0].weight]}, {"params": list(model[1].parameters())}])
    names = [r.name for r in sparsity(optimizer).layers]
    assert names == [
        "param_groups[0]['params'][0]",
        "param_groups[1]['params'][0]",
        "param_groups[1]['params'][1]",
    ]


def test_layers_of_one_name_are_told_apart():
    nets = [nn.Linear(2, 2, bias=False), nn.Linear(3, 3, bias=False)]
    found = sparsity(ProxSGD([{"params": net.named_parameters()} for net in nets]))
    layers = found.to_dict()["layers"]
    assert {name: layer["size"] for name, layer in layers.items()} == {
        "param_groups[0]: weight": 4,
        "param_groups[1]: weight": 9,
    }
    assert [layer.name for layer in found.layers] == list(layers)


def test_of_another_optimizer():
    found = sparsity(torch.optim.SGD(model_with_zeros().parameters(), lr=0.1))
    assert (found.zeros, found.size) == (6, 35)
    assert found.regularised.layers == ()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float16, torch.bfloat16], ids=lambda d: str(d)
)
def test_dtypes(dtype):
    model = nn.Linear(2, 2, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, -0.0], [1.0, 0.0]]))
    assert sparsity(model).zeros == 3


def test_empty_parameters_and_models():
    model = nn.Module()
    assert (sparsity(model).zeros, sparsity(model).size, sparsity(model).fraction) == (0, 0, 0.0)
    assert sparsity(model).table().splitlines()[-1].split() == ["total", "0", "0", "0.00"]
    assert "0.00" in str(sparsity(model))
    model.empty = nn.Parameter(torch.zeros(0, 3))
    model.scalar = nn.Parameter(torch.tensor(0.0))
    found = sparsity(model)
    assert [(r.zeros, r.size, r.fraction) for r in found.layers] == [(0, 0, 0.0), (1, 1, 1.0)]


def test_a_model_does_not_tell_what_is_regularised():
    """An empty answer would look like no zeros."""
    with pytest.raises(ValueError, match="only an optimizer tells what is regularised"):
        _ = sparsity(model_with_zeros()).regularised


def test_what_a_schedule_has_taken_to_0_was_regularised():
    weights = [nn.Parameter(torch.zeros(n)) for n in (3, 5)]
    optimizer = ProxSGD([{"params": [weights[0]], "l1": 0.1}, {"params": [weights[1]], "l1": 0.0}])
    schedule = L1Scheduler(optimizer, LinearLR, start_factor=1.0, end_factor=0.0, total_iters=1)
    optimizer.step()
    schedule.step()
    found = sparsity(optimizer)
    assert [(r.l1, r.regularised) for r in found.layers] == [(0.0, True), (0.0, False)]
    assert found.regularised.size == 3


def test_a_parameter_that_was_appended_without_a_name():
    optimizer = ProxSGD(nn.Linear(2, 2, bias=False).named_parameters())
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(3)))
    names = [layer.name for layer in sparsity(optimizer).layers]
    assert names == ["weight", "param_groups[0]['params'][1]"]


def test_shared_parameters_count_once():
    layer = nn.Linear(3, 3, bias=False)
    nn.init.zeros_(layer.weight)
    found = sparsity(nn.Sequential(layer, layer))
    assert [(r.name, r.zeros) for r in found.layers] == [("0.weight", 9)]


def test_changes_nothing():
    model = model_with_zeros()
    versions = [p._version for p in model.parameters()]
    sparsity(model)
    assert [p._version for p in model.parameters()] == versions
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("source", [3, None, [torch.zeros(3)], {}], ids=str)
def test_refusals(source):
    with pytest.raises(TypeError, match=f"{type(source).__name__} is neither a module nor"):
        sparsity(source)


def test_a_step_makes_exact_zeros_that_are_counted():
    p = nn.Parameter(torch.linspace(-1, 1, 101))
    optimizer = ProxSGD([("w", p)], lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.505)
    p.grad = torch.zeros(101)
    optimizer.step()
    assert sparsity(optimizer).to_dict()["layers"] == {
        "w": {"zeros": 51, "size": 101, "fraction": 51 / 101}
    }


def test_known_counts_are_taken_and_the_others_read():
    """As ProxSGD.sparsity() does with the counts of its last step."""
    params = {name: nn.Parameter(torch.zeros(3)) for name in ("first", "second")}
    optimizer = ProxSGD(params.items())
    found = count(optimizer, {params["first"]: torch.tensor(2)})
    assert [(layer.name, layer.zeros) for layer in found.layers] == [("first", 2), ("second", 3)]
    assert count(optimizer, {}) == sparsity(optimizer)
    assert sparsity(optimizer).zeros == 6
