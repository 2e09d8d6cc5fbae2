"""From channels to the group lasso of the optimizer, and on through a removal of channels."""

import copy
import math

import pytest
import torch
from networks import Tiny, with_statistics
from torch import nn
from torch.nn.functional import cross_entropy

from resnet_reg_ext import ProxSGD, channels, compact, param_groups, zero_dead_columns

EXAMPLE = torch.rand(1, 3, 32, 32)


def by_name(groups, key):
    return {
        name: value
        for group in groups
        for (name, _), value in zip(group["params"], group[key], strict=True)
    }


def test_every_channel_of_a_resnet_is_a_group():
    from torchvision.models import resnet18

    model = resnet18(num_classes=10)
    groups = param_groups(model, l1=1e-5, group_lasso=1e-3, example_inputs=EXAMPLE)
    assert [group["group_lasso"] for group in groups] == [1e-3, 1e-3]
    rows, weights = by_name(groups, "rows"), by_name(groups, "row_weights")
    sets = channels(model, EXAMPLE)
    params = dict(model.named_parameters())
    for one in sets:
        names = [producer.tensor for producer in one.producers]
        assert len({rows[name] for name in names}) == 1
        size = sum(params[name].numel() for name in names) / one.size
        assert {weights[name] for name in names} == {math.sqrt(size)}
    assert len({number for number in rows.values() if number is not None}) == len(sets)
    assert [name for name, number in rows.items() if number is None] == ["fc.weight", "fc.bias"]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ProxSGD(groups, lr=0.1, group_lasso=0.0, fused=True).step()
    stream = next(one for one in sets if one.name == "layer1.1.conv2" or one.name == "conv1")
    excluded = param_groups(
        model, group_lasso=1e-3, example_inputs=EXAMPLE, exclude=stream.producers[0].tensor
    )
    rows = by_name(excluded, "rows")
    assert all(rows[producer.tensor] is None for producer in stream.producers)


def test_what_is_no_row_is_left_out_and_said():
    with pytest.warns(UserWarning, match="leaves out the channels of stem"):
        groups = param_groups(Tiny(), group_lasso=1e-3, example_inputs=EXAMPLE)
    rows = by_name(groups, "rows")
    assert rows["down.weight"] == rows["norm3.weight"] is not None
    assert rows["stem.weight"] is rows["conv2.weight"] is None


def test_norms_alone_are_groups():
    model = with_statistics(plain())
    with pytest.warns(UserWarning, match="leaves out the channels of 3: groups='norms' needs"):
        groups = param_groups(
            model, l1=1e-5, group_lasso=1e-3, example_inputs=EXAMPLE.double(), groups="norms"
        )
    rows, weights = by_name(groups, "rows"), by_name(groups, "row_weights")
    assert {name for name, number in rows.items() if number is not None} == {"1.weight", "1.bias"}
    assert rows["1.weight"] == rows["1.bias"]
    assert weights["1.weight"] == weights["1.bias"] == math.sqrt(2)
    (first,) = [group for group in groups if "0.weight" in dict(group["params"])]
    assert first["l1"] == 1e-5

    scores = {"0": 1.0 + torch.arange(12.0).flip(0), "3": torch.ones(10)}
    with pytest.warns(UserWarning, match="leaves out the channels of 3"):
        groups = param_groups(
            model,
            group_lasso=1e-3,
            example_inputs=EXAMPLE.double(),
            groups="norms",
            importance=scores,
            min_keep=0.25,
        )
    of_set = by_name(groups, "row_weights")["1.weight"]
    norms = torch.stack([model[1].weight, model[1].bias]).norm(dim=0).detach()
    ratios = norms / of_set / scores["0"]
    assert torch.equal(of_set[:3], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(ratios[3:], ratios[3:4].expand(9))


def test_refusals():
    with pytest.raises(ValueError, match="example_inputs is None"):
        param_groups(Tiny(), group_lasso=1e-3)
    with pytest.raises(ValueError, match="group_lasso is -1"):
        param_groups(Tiny(), group_lasso=-1, example_inputs=EXAMPLE)
    with pytest.raises(ValueError, match="groups is 'norm': must be 'channels' or 'norms'"):
        param_groups(Tiny(), group_lasso=1e-3, example_inputs=EXAMPLE, groups="norm")
    with pytest.raises(ValueError, match="and groups are for group_lasso, which is 0"):
        param_groups(Tiny(), groups="norms")
    bare = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with (
        pytest.warns(UserWarning, match="leaves out the channels of 0: groups='norms'"),
        pytest.raises(ValueError, match=r"no channels whose rows can be penalised \(0: groups="),
    ):
        param_groups(bare, group_lasso=1e-3, example_inputs=EXAMPLE, groups="norms")
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    with pytest.raises(ValueError, match="no channels whose rows can be penalised"):
        param_groups(model, group_lasso=1e-3, example_inputs=EXAMPLE)


def plain():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 10, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 4),
    ).double()


@pytest.mark.filterwarnings("ignore:.*leaves out the channels of 3")
@pytest.mark.parametrize(
    ("kind", "per_row"), [("channels", False), ("channels", True), ("norms", False)]
)
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
def test_training_after_a_removal_is_training_without(kind, per_row, activation):
    model = with_statistics(plain())
    model[2] = activation()
    example = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    # So that some die, and not all.
    strength = 0.1 if kind == "norms" else 0.03 if per_row else 0.04
    groups = param_groups(
        model,
        l1=1e-4,
        weight_decay=0.01,
        group_lasso=strength,
        example_inputs=example,
        groups=kind,
    )
    if per_row:
        sizes = {name: len(p) for name, p in model.named_parameters()}
        for group in groups:
            names = [name for name, _ in group["params"]]
            group["row_weights"] = [
                None if n not in (0, 1) else [w * (1 + i % 3 / 2) for i in range(sizes[name])]
                for name, n, w in zip(names, group["rows"], group["row_weights"], strict=True)
            ]
    optimizer = ProxSGD(groups, lr=0.05)
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(16, 3, 8, 8, generator=generator, dtype=torch.float64)
    y = torch.randint(4, (16,), generator=generator)

    def step(model, optimizer, sets):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        zero_dead_columns(model, sets, optimizer)

    sets = channels(model, example)
    for _ in range(12):
        step(model, optimizer, sets)
    whole, kept = copy.deepcopy((model, optimizer))
    result = compact(model, example, optimizer, sets=sets)
    small = result.model
    assert 0 < len(result.report.removed["0"]) < 11
    removed = sum(p.numel() for p in whole.parameters()) - sum(
        p.numel() for p in small.parameters()
    )
    assert removed > 100
    of_small = channels(small, example)
    for _ in range(3):
        step(whole, kept, sets)
        step(small, optimizer, of_small)
    # The order in which a processor adds.
    torch.testing.assert_close(small.eval()(x), whole.eval()(x), rtol=0, atol=1e-12)


def test_towards_the_start_norms_belong_to_channels_and_new_layers_go_to_zero():
    model = plain()
    example = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    given = {"group_lasso": 2.0, "example_inputs": example, "toward": "start", "new": "7.*"}
    groups = param_groups(model, l1=0.1, weight_decay=0.2, **given)
    assert {(g["toward"], g["l1"]): [n for n, _ in g["params"]] for g in groups} == {
        ("start", 0.1): ["0.weight", "3.weight"],
        ("zero", 0.1): ["7.weight"],
        ("start", 0.0): ["1.weight", "1.bias", "3.bias"],
        ("zero", 0.0): ["7.bias"],
    }
    assert all(g["group_lasso"] == 2.0 for g in groups)
    start = copy.deepcopy(model.state_dict())
    optimizer = ProxSGD(groups, lr=0.05)
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        optimizer.zero_grad()
        x = torch.rand(16, 3, 8, 8, generator=generator, dtype=torch.float64)
        cross_entropy(model(x), torch.randint(4, (16,), generator=generator)).backward()
        optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    assert moved == {"7.weight", "7.bias"}  # no channel has cause enough
    assert (model[7].weight != start["7.weight"]).all()


def test_channels_of_new_and_of_pretrained_layers_may_be_one_set():
    """A new layer whose outputs are added to a pretrained stream."""

    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.old = nn.Conv2d(3, 6, 3, padding=1)
            self.adapter = nn.Conv2d(3, 6, 1)
            self.head = nn.Conv2d(6, 2, 1)

        def forward(self, x):
            return self.head(torch.relu(self.old(x) + self.adapter(x)))

    model = Stream()
    groups = param_groups(
        model, group_lasso=50.0, example_inputs=EXAMPLE, toward="start", new=["adapter.*", "head.*"]
    )
    rows = by_name(groups, "rows")
    coupled = ["old.weight", "old.bias", "adapter.weight", "adapter.bias"]
    assert len({rows[name] for name in coupled}) == 1
    start = copy.deepcopy(model.state_dict())
    model(EXAMPLE).square().mean().backward()
    ProxSGD(groups, lr=0.1, fused=True).step()
    for name in coupled:
        wanted = start[name] if name.startswith("old") else torch.zeros(())
        assert (model.get_parameter(name) == wanted).all()
