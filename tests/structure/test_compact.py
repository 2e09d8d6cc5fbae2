"""Taking out channels that are zero changes no output, on ten architectures."""

import copy
import threading

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from networks import NAMES, SIDE, Tiny, kill, network, with_statistics
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from resnet_reg_ext import channels, compact, zero_dead_columns

EXAMPLE = torch.rand(1, 3, 8, 8)


@st.composite
def dead_channels(draw, sets):
    """For each set none, some, or all of its channels, by chance."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shares = draw(
        st.lists(
            st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0]), min_size=len(sets), max_size=len(sets)
        )
    )
    return {
        one.name: torch.randperm(one.size, generator=generator)[: round(share * one.size)].tolist()
        for one, share in zip(sets, shares, strict=True)
    }


def outputs(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_equal_without_the_dead_channels(name):
    model, sets = network(name)
    x = torch.rand(3, 3, SIDE, SIDE, dtype=torch.float64)

    # A failure isn't shrunk: each try holds two models.
    @settings(max_examples=3, phases=[Phase.generate])
    @given(dead_channels(sets), st.booleans())
    def check(dead, by_norms):
        killed = kill(copy.deepcopy(model), sets, dead, by_norms)
        result = compact(killed, None, sets=sets)
        expected, got = outputs(killed, x), outputs(result.model, x)
        assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
        for one in sets:
            # Of a set that is dead as a whole the first channel stays.
            stays = {0} if len(dead[one.name]) == one.size else set()
            assert set(result.report.removed.get(one.name, ())) == set(dead[one.name]) - stays
        single, small = killed.float(), result.model.float()
        expected, got = outputs(single, x.float()), outputs(small, x.float())
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(got.argmax(1), expected.argmax(1))

    check()


@pytest.mark.parametrize("by_norms", [False, True], ids=["whole", "norms"])
@pytest.mark.parametrize("name", ["resnet18", "resnext", "mobilenet_v2"])
def test_a_training_step_is_equal_without_the_dead_channels(name, by_norms):
    model, sets = network(name)
    generator = torch.Generator().manual_seed(3)
    dead = {
        s.name: torch.randperm(s.size, generator=generator)[: s.size // 2].tolist() for s in sets
    }
    killed = kill(copy.deepcopy(model), sets, dead, by_norms)
    small = compact(killed, None, sets=sets).model
    x = torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64)
    results = []
    for each in (killed, small):
        each.train()
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        loss = each(x).square().sum()
        loss.backward()
        results.append((loss.detach(), next(iter(each.parameters())).grad))
    (one, gradient), (other, small_gradient) = results
    assert abs(one - other) <= 1e-12 * one
    stay = [i for i in range(len(gradient)) if i not in dead[sets[0].name]]
    torch.testing.assert_close(small_gradient, gradient[stay], rtol=1e-9, atol=1e-12)


def test_layers_that_mix_channels_keep_them_and_are_named():
    model, _ = network("convnext")
    killed = copy.deepcopy(model)
    with torch.no_grad():
        killed.features[0][0].weight[3] = 0
        killed.features[0][0].bias[3] = 0
    report = compact(killed, torch.rand(1, 3, SIDE, SIDE)).report
    assert not report.removed
    assert "features.0.1 is a LayerNorm2d" in str(report)


def tiny(**options):
    model = with_statistics(Tiny(**options)).double()
    return model, channels(model, EXAMPLE)


def test_flags_formats_and_hooks_are_kept():
    model, sets = tiny()
    model = model.to(torch.bfloat16).to(memory_format=torch.channels_last).train()
    model.norm1.eval()
    model.conv1.weight.requires_grad_(False)
    model.conv1.weight.note = "mine"
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    kill(model, sets, {"stem": [1], "down": [0, 5]})

    class Recorder:
        def __init__(self):
            self.shapes = []

        def record(self, module, inputs, output):
            self.shapes.append(tuple(output.shape))

    recorder, seen = Recorder(), []
    model.down.register_forward_hook(recorder.record)
    model.conv1.register_forward_pre_hook(lambda *_: seen.append(1))
    new = compact(model, EXAMPLE).model
    assert new.training
    assert not new.norm1.training
    assert new.norm2.training
    trainable = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in new.named_parameters()} == trainable
    assert new.conv1.weight.note == "mine"
    assert new.conv2.weight.shape == (8, 3, 3, 3)
    assert new.conv2.groups == 2
    assert new.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert new.down.weight.dtype == torch.bfloat16
    assert torch.equal(new.stem.weight.grad, torch.ones(8, 3, 3, 3, dtype=torch.bfloat16))
    assert new.stem.weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert not recorder.shapes
    new(torch.rand(2, 3, 8, 8, dtype=torch.bfloat16))
    assert recorder.shapes == [(2, 14, 4, 4)]
    assert seen == [1]


def test_what_a_copy_would_lose_is_refused_by_name():
    model, sets = tiny()
    own = copy.deepcopy(model)
    down = own.down
    own.conv1.register_forward_hook(lambda *_: down.weight)
    hooked = copy.deepcopy(model)
    hooked.fc.weight.register_hook(lambda gradient: gradient)
    accumulated = copy.deepcopy(model)
    accumulated.fc.bias.register_post_accumulate_grad_hook(lambda p: None)
    locked = copy.deepcopy(model)
    locked.lock = threading.Lock()
    for each, named in (
        (own, "conv1 has a hook"),
        (hooked, "fc.weight has a hook"),
        (accumulated, "fc.bias has a hook"),
        (locked, "Tiny can't be copied: cannot pickle"),
    ):
        with pytest.raises(ValueError, match=named):
            compact(each, EXAMPLE, sets=sets)


def test_what_a_forward_pass_has_left_behind_is_no_obstacle():
    model, _ = tiny()
    model.norm0.last = model(EXAMPLE.double())
    prune.l1_unstructured(model.fc, "weight", amount=0.3)
    model(EXAMPLE.double())
    found = channels(model, EXAMPLE)
    assert [one.name for one in found.excluded] == ["down", "fc"]
    kill(model.eval(), found, {"stem": [1]})
    new = compact(model, EXAMPLE).model
    assert new.stem.out_channels == 8
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(new(x), model(x), rtol=1e-12, atol=1e-12)


def test_the_given_model_is_left_as_it_was():
    model, sets = tiny()
    kill(model, sets, {"stem": [0], "down": [1, 2, 3]})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = compact(model, EXAMPLE).model
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tensor", ["norm3.bias", "norm3.weight"])
def test_a_channel_that_would_leave_a_constant_stays(tensor):
    model, sets = tiny()
    kill(model, sets, {"down": [2, 3]})
    with torch.no_grad():
        dict(model.named_parameters())[tensor][3] = 0.5
    result = compact(model.eval(), EXAMPLE)
    assert result.report.removed == {"down": (2,)}
    assert result.report.constant == {"down": (3,)}
    assert "down: 1 channels would leave a constant" in str(result.report)
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_convolutions_bias_leaves_a_constant_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.Flatten())
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[0].bias[1] = 0
        model[0].bias[2] = 1
    report = compact(model, torch.rand(1, 3, 2, 2)).report
    assert report.removed == {"0": (1,)}
    assert report.constant == {"0": (2,)}


def test_nan_is_no_zero_and_minus_zero_is_one():
    model, sets = tiny()
    kill(model, sets, {"down": [2, 3, 4, 5]}, by_norms=True)
    with torch.no_grad():
        model.norm3.weight[2] = -0.0
        model.norm3.bias[3] = torch.nan
        # The norm's zero makes NaN of these.
        model.down.weight[4, 0] = torch.nan
        model.down.weight[5, 1] = torch.inf
    assert compact(model, EXAMPLE).report.removed == {"down": (2,)}
    assert zero_dead_columns(model, sets) == 1


@pytest.mark.parametrize(("dead", "left"), [(1, 16), (8, 8), (9, 8), (15, 8), (16, 8)])
def test_rows_stay_a_multiple(dead, left):
    model, sets = tiny()
    kill(model.eval(), sets, {"down": list(range(dead))})
    result = compact(model, EXAMPLE, multiple_of=8)
    assert result.model.down.out_channels == result.model.norm3.num_features == left
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)


def test_groups_of_several_rows_stay_a_multiple():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 1, groups=8), nn.Conv2d(32, 2, 1))
    (sets,) = channels(model, EXAMPLE)
    kill(model, [sets], {"0": [0, 2, 3, 4, 5]})
    new = compact(model, EXAMPLE, multiple_of=8).model
    assert (new[0].out_channels, new[1].groups) == (16, 4)


@pytest.mark.parametrize("multiple_of", [0, -8, 1.5, True])
def test_a_multiple_must_be_a_whole_number(multiple_of):
    with pytest.raises(ValueError, match="multiple_of is"):
        compact(Tiny(), EXAMPLE, multiple_of=multiple_of)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet", "timm_resnet50"])
def test_a_block_whose_branch_is_dead_becomes_its_shortcut(name):
    block, inner, last = {
        "resnet18": ("layer1.1", ["layer1.1.conv1"], "layer1.1.bn2"),
        "timm_resnet50": ("layer2.0", ["layer2.0.conv1", "layer2.0.conv2"], "layer2.0.bn3"),
        "mobilenet_v2": ("features.3", ["features.3.conv.0.0"], "features.3.conv.3"),
        "efficientnet": ("features.2.1", ["features.2.1.block.0.0"], "features.2.1.block.3.1"),
    }[name]
    model, sets = network(name)
    dead = {one.name: list(range(one.size)) for one in sets if one.name in inner}
    assert len(dead) == len(inner)
    killed = kill(copy.deepcopy(model), sets, dead)
    norm = killed.get_submodule(last)
    x = torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64)
    # A norm behind the branch leaves a constant: the block stays, with a channel of zeros.
    result = compact(killed, None, sets=sets)
    assert not result.report.shortcuts
    assert result.report.kept_zero == dict.fromkeys(inner, 1)
    torch.testing.assert_close(result.model(x), killed(x), rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        norm.bias.zero_()
        norm.running_mean.zero_()
    optimizer = torch.optim.SGD(killed.named_parameters(), lr=0.1, momentum=0.9)
    result = compact(killed, None, optimizer, sets=sets)
    assert result.report.shortcuts == (block,)
    assert f"only its shortcut is left of {block}" in str(result.report)
    torch.testing.assert_close(result.model(x), killed(x), rtol=1e-11, atol=1e-11)
    (group,) = optimizer.param_groups
    assert group["params"] == list(result.model.parameters())
    assert group["param_names"] == [n for n, _ in result.model.named_parameters()]
    assert channels(result.model, torch.rand(1, 3, SIDE, SIDE)).total < sets.total
    # It trains on: an activation in place must not change what other layers have kept.
    for one in (killed, result.model):
        one.zero_grad()
        one(x).square().sum().backward()
    stem = next(name for name, p in killed.named_parameters() if p.dim() > 1)
    expected = killed.get_parameter(stem).grad
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        result.model.get_parameter(stem).grad, expected, rtol=0, atol=1e-9 * scale
    )


def test_a_moving_average_loses_the_same_channels():
    model, sets = tiny()
    average = AveragedModel(model)
    average.update_parameters(model)
    kill(model, sets, {"stem": [0], "down": [3, 4]})
    average.update_parameters(model)
    expected = average.module.down.weight.clone()
    new = compact(model, EXAMPLE, average=average).model
    assert {n: p.shape for n, p in average.module.named_parameters()} == {
        n: p.shape for n, p in new.named_parameters()
    }
    stay = [i for i in range(16) if i not in (3, 4)]
    assert torch.equal(average.module.down.weight, expected[stay][:, 4:])
    assert average.n_averaged == 2
    average.update_parameters(new)
    average(torch.rand(2, 3, 8, 8, dtype=torch.float64))


def test_another_models_average_sets_or_optimizer_are_refused():
    model, sets = tiny()
    kill(model, sets, {"down": [3, 4]})
    wide = Tiny()
    wide.fc = nn.Linear(16, 9)
    other = torch.optim.SGD(Tiny().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"average isn't of this model: fc.weight is \(9, 16\)"):
        compact(model, EXAMPLE, average=AveragedModel(wide))
    with pytest.raises(ValueError, match="none of the model's parameters"):
        compact(model, EXAMPLE, other)
    with pytest.raises(ValueError, match=r"sets are another model's: stem.weight has 0"):
        compact(nn.Sequential(nn.Linear(2, 2)), EXAMPLE, sets=sets)
    with pytest.raises(TypeError, match="optimizer is a str"):
        compact(model, EXAMPLE, "sgd")


def test_the_report_counts_what_is_there():
    model, sets = tiny()
    kill(model, sets, {"stem": [1], "down": [0, 5]})
    result = compact(model, EXAMPLE)
    report = result.report
    assert report.channels == (sets.total, sets.total - 3)
    assert report.parameters[1] == sum(p.numel() for p in result.model.parameters())
    again = channels(result.model, EXAMPLE)
    assert report.multiply_adds == (
        sum(sets.multiply_adds.values()),
        sum(again.multiply_adds.values()),
    )
    table = str(report).splitlines()
    assert table[0].split() == ["layer", "channels", "parameters", "multiply-adds"]
    down = next(line for line in table if line.startswith("down"))
    assert down.split()[1:4] == ["16", "→", "14"]
