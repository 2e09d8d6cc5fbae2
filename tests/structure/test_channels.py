"""The sets of coupled channels, against a finder of our own on torch.fx's graph."""

import operator

import pytest
import torch
from networks import SIDE, Tiny, network
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.utils import parametrizations, prune

from resnet_reg_ext import channels, remove
from resnet_reg_ext.structure.channel_sets import without


class _Ids:
    """Each channel of each activation has a number; what is added has one number in the end."""

    def __init__(self):
        self.parent, self.atoms, self.fixed = [], {}, set()

    def new(self, count):
        self.parent += range(len(self.parent), len(self.parent) + count)
        return list(range(len(self.parent) - count, len(self.parent)))

    def root(self, i):
        while self.parent[i] != i:
            i = self.parent[i]
        return i

    def note(self, ids, role, tensor, dim):
        for position, i in enumerate(ids):
            self.atoms.setdefault(i, set()).add((role, tensor, dim, position))

    def channels(self):
        fixed = {self.root(i) for i in self.fixed}
        joined = {}
        for i, atoms in self.atoms.items():
            joined.setdefault(self.root(i), set()).update(atoms)
        return {frozenset(atoms) for root, atoms in joined.items() if root not in fixed}


def _module(ids, name, module, of_input):
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        if getattr(module, "groups", 1) > 1:
            assert module.groups == module.in_channels == module.out_channels
            outputs = of_input
        else:
            ids.note(of_input, "consumer", f"{name}.weight", 1)
            outputs = ids.new(module.weight.shape[0])
        ids.note(outputs, "producer", f"{name}.weight", 0)
        if module.bias is not None:
            ids.note(outputs, "producer", f"{name}.bias", 0)
        return outputs
    if isinstance(module, nn.BatchNorm2d):
        for tensor, role in (
            ("weight", "producer"),
            ("bias", "producer"),
            ("running_mean", "statistics"),
            ("running_var", "statistics"),
        ):
            ids.note(of_input, role, f"{name}.{tensor}", 0)
    else:
        assert isinstance(
            module, (nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.Dropout)
        )
    return of_input


def by_fx(model, example):
    """All channels that can be taken out, each as the set of what it is made of."""
    graph = fx.symbolic_trace(model)
    ShapeProp(graph).propagate(example)
    modules, ids, of = dict(graph.named_modules()), _Ids(), {}
    for node in graph.graph.nodes:
        inputs = [of[argument] for argument in node.args if isinstance(argument, fx.Node)]
        if node.op == "placeholder":
            of[node] = ids.new(example.shape[1])
            ids.fixed.update(of[node])
        elif node.op == "call_module":
            of[node] = _module(ids, node.target, modules[node.target], inputs[0])
        elif node.op == "output":
            ids.fixed.update(inputs[0])
        elif node.target in (operator.add, operator.iadd):
            for one, other in zip(*inputs, strict=True):
                ids.parent[ids.root(one)] = ids.root(other)
            of[node] = inputs[0]
        elif node.target is torch.flatten:
            shape = node.args[0].meta["tensor_meta"].shape
            of[node] = [i for i in inputs[0] for _ in range(shape[2] * shape[3])]
        else:
            assert node.target is nn.functional.adaptive_avg_pool2d
            of[node] = inputs[0]
    return ids.channels()


def plain(sets):
    """The same of what is tested."""
    found = set()
    for one in sets:
        for i in range(one.size):
            found.add(
                frozenset(
                    (role, index.tensor, index.dim, position)
                    for role, indices in (
                        ("producer", one.producers),
                        ("consumer", one.consumers),
                        ("statistics", one.statistics),
                    )
                    for index in indices
                    for position in index.indices[i]
                )
            )
    return found


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vgg_bn", "mobilenet_v2"])
def test_the_sets_are_those_of_another_finder(name):
    model, sets = network(name)
    assert plain(sets) == by_fx(model, torch.rand(2, 3, SIDE, SIDE, dtype=torch.float64))


@pytest.mark.parametrize("name", ["resnet50", "timm_resnet50"])
def test_a_resnet50_has_37_sets_of_11456_channels(name):
    sets = network(name)[1]
    assert (len(sets), sets.total) == (37, 11_456)


def test_multiply_adds_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model, sets = network("resnet50")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.rand(1, 3, SIDE, SIDE, dtype=torch.float64))
    assert sum(sets.multiply_adds.values()) * 2 == counter.get_total_flops()


def test_a_group_of_a_convolution_is_one_channel():
    model = Tiny()
    by_name = {one.name: one for one in channels(model, torch.rand(2, 3, 8, 8))}
    # 3 channels of conv1 feed 4 of conv2, which are in the residual stream with the stem's.
    assert by_name["stem"].size == 3
    rows = {index.tensor: index.indices for index in by_name["stem"].producers}
    assert rows["conv1.bias"] == ((0, 1, 2), (3, 4, 5), (6, 7, 8))
    assert rows["conv2.weight"] == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))


def test_the_model_is_left_as_it_was():
    model = Tiny().train()
    calls = []
    model.conv1.register_forward_hook(lambda *_: calls.append(1))
    model.norm1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        channels(model, torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.norm1.training
    assert not model.norm1.weight.requires_grad
    assert model.conv1.weight.requires_grad
    assert not calls
    assert torch.equal(random, torch.get_rng_state())


class Two(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between):
        super().__init__()
        self.first, self.between = nn.Conv2d(3, 6, 3), between
        self.second, self.fc = nn.Conv2d(6, 5, 1), nn.Linear(5, 2)

    def forward(self, x):
        x = torch.relu(self.second(self.between(self.first(x))))
        return self.fc(x.mean((2, 3)))


class Roll(nn.Module):
    def forward(self, x):
        return x.roll(1, dims=1)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, 1, 1))

    def forward(self, x):
        return x * self.scale


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


@pytest.mark.parametrize(
    ("between", "named"),
    [
        (nn.Sigmoid(), "second doesn't get zeros"),
        (nn.Softmax(1), "second doesn't get zeros"),
        (nn.GroupNorm(2, 6), "between is a GroupNorm"),
        (Roll(), "second doesn't get zeros"),
        (Scaled(), "between.scale is a parameter outside of layers"),
        (Standardised(6, 6, 1), "between is a Standardised, whose forward is its own"),
        (parametrizations.weight_norm(nn.Conv2d(6, 6, 1)), "between's weight isn't"),
        (nn.LocalResponseNorm(3), "the outputs change"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_stands_in_the_way_is_named(between, named):
    found = channels(Two(between), torch.rand(2, 3, 8, 8))
    reasons = " / ".join(str(one) for one in found.excluded)
    assert named in reasons
    assert [one.name for one in found] == ["second"]


def test_masked_tied_and_reused_layers_are_excluded_by_name():
    masked = Two(nn.Identity())
    prune.random_unstructured(masked.first, "weight", amount=0.5)
    tied = Two(nn.Conv2d(6, 6, 1))
    tied.between.bias = tied.first.bias
    reused = Two(nn.Conv2d(6, 6, 1))
    reused.between = nn.Sequential(reused.between, nn.ReLU(), reused.between)
    for model, named in (
        (masked, "first's weight isn't a plain parameter"),
        (tied, "first.bias and between.bias are one parameter"),
        (reused, "between.0 is used more than once"),
    ):
        found = channels(model, torch.rand(2, 3, 8, 8))
        assert any(named in str(one) for one in found.excluded), str(found)
        assert "first" not in [one.name for one in found]


@pytest.mark.parametrize("kind", [nn.InstanceNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_norms_by_channel_and_prelu_are_followed(kind):
    between = nn.Sequential(kind(6, affine=True), nn.PReLU(6), nn.Dropout2d())
    by_name = {one.name: one for one in channels(Two(between), torch.rand(2, 3, 8, 8))}
    tensors = {index.tensor for index in by_name["first"].all}
    assert {"between.0.weight", "between.0.bias", "between.1.weight"} <= tensors
    assert "between.1.weight" not in {index.tensor for index in by_name["first"].producers}


def test_transposed_convolutions_are_followed():
    model = Two(nn.Sequential(nn.ConvTranspose2d(6, 7, 2), nn.ReLU(), nn.Conv2d(7, 6, 1)))
    by_name = {one.name: one for one in channels(model, torch.rand(2, 3, 8, 8))}
    assert by_name["between.0"].producers[0].dim == 1
    assert by_name["first"].consumers[0].dim == 0


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (nn.DataParallel, "DataParallel: must be what it wraps, .module"),
        (torch.compile, "OptimizedModule: must be what it wraps, ._orig_mod"),
    ],
)
def test_wrappers_are_refused_by_name(wrap, named):
    with pytest.raises(ValueError, match=named):
        channels(wrap(Tiny()), torch.rand(2, 3, 8, 8))


def test_inputs_by_keyword_and_several():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Tiny()

        def forward(self, one, other):
            return self.net(one + other)

    x = torch.rand(2, 3, 8, 8)
    expected = plain(channels(Sum(), (x, x)))
    assert plain(channels(Sum(), {"one": x, "other": x})) == expected


@pytest.mark.parametrize("name", ["resnet18", "densenet", "vgg_bn"])
def test_the_sets_that_are_left_need_no_search(name):
    """Of layers that read several sets, too, and of those that a flattened image feeds."""
    model, found = network(name)
    result = remove(model, None, share=0.4, sets=found)
    left = without(found, result.report.removed)
    assert left.total < found.total
    x = torch.rand(2, 3, SIDE, SIDE)
    assert left.sets == channels(result.model, x).sets
