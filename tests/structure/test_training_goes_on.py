"""The optimizer goes along: training after a removal is training without it."""

import copy

import pytest
import torch
from networks import Tiny, kill, with_statistics
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import StepLR

from resnet_reg_ext import ProxSGD, channels, compact, zero_dead_columns

EXAMPLE = torch.rand(1, 3, 8, 8)
DEAD = {"stem": [1], "down": [0, 5]}


@torch.no_grad()
def group_shrink(model, sets, threshold, by_norms):
    """The proximal map of a group lasso over each channel's producers or norms, in plain loops."""
    tensors = dict(model.named_parameters())
    for one in sets:
        for i in range(one.size):
            rows = [
                tensors[index.tensor].select(index.dim, row)
                for index in (by_norms and one.closing_norms) or one.producers
                for row in index.indices[i]
            ]
            norm = sum(float(row.square().sum()) for row in rows) ** 0.5
            for row in rows:
                row.mul_(max(0.0, 1 - threshold / norm) if norm else 0.0)


def step(model, optimizer, sets, x, y, by_norms):
    loss = cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    group_shrink(model, sets, 0.055, by_norms)
    zero_dead_columns(model, sets, optimizer)
    return loss.item()


def dead_of(model, sets, numbers):
    """Dead channels by the numbers that they had in the whole model."""
    dead = set()
    tensors = dict(model.named_parameters())
    for one in sets:
        for i in range(one.size):
            if all(
                not tensors[index.tensor].select(index.dim, row).any()
                for index in one.producers
                for row in index.indices[i]
            ):
                dead.add((one.name, numbers[one.name][i]))
    return dead


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "sgd_nesterov": lambda p: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True
    ),
    "prox_nesterov": lambda p: ProxSGD(p, lr=0.05, weight_decay=1e-3, nesterov=True, l1=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("by_norms", [False, True], ids=["channels", "norms"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_twenty_steps_after_a_removal_are_those_without(kind, activation, by_norms):
    model = Tiny(activation=activation).double().train()
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64)
    y = torch.randint(4, (16,))
    sets = channels(model, EXAMPLE)
    optimizer = OPTIMIZERS[kind](model.parameters())
    numbers = {one.name: list(range(one.size)) for one in sets}
    for _ in range(5):
        step(model, optimizer, sets, x, y, by_norms)
    # Their own momentum would bring them back, and what reads the stem counts in down's norms.
    kill(model, sets, {"down": [3], "stem": [0]}, by_norms)
    zero_dead_columns(model, sets, optimizer)

    whole, whole_optimizer = copy.deepcopy((model, optimizer))
    result = compact(model, EXAMPLE, optimizer, sets=sets)
    small, small_sets = result.model, channels(result.model, EXAMPLE)
    gone = {(name, i) for name, removed in result.report.removed.items() for i in removed}
    assert gone
    left = {one.name: [i for i in range(one.size) if (one.name, i) not in gone] for one in sets}
    for _ in range(20):
        expected = step(whole, whole_optimizer, sets, x, y, by_norms)
        assert (
            abs(step(small, optimizer, small_sets, x, y, by_norms) - expected) <= 1e-12 * expected
        )
    died = dead_of(whole, sets, numbers)
    assert died > gone  # more die in these steps
    assert dead_of(small, small_sets, left) == died - gone


def prepared(optimizer_class=torch.optim.SGD, dtype=torch.float32, **options):
    """A model in training with dead channels, its sets, and its optimizer with state."""
    model = with_statistics(Tiny()).to(dtype).train()
    sets = channels(model, EXAMPLE)
    optimizer = optimizer_class(model.named_parameters(), **{"lr": 0.1, **options})
    cross_entropy(model(torch.rand(4, 3, 8, 8, dtype=dtype)), torch.arange(4)).backward()
    optimizer.step()
    kill(model, sets, DEAD)
    return model, sets, optimizer


STEM = [i for i in range(12) if i not in range(4, 8)]
DOWN = [i for i in range(16) if i not in (0, 5)]


def test_the_optimizer_is_changed_in_place():
    model, sets, optimizer = prepared(momentum=0.9)
    scheduler = StepLR(optimizer, 1, gamma=0.5)
    (group,) = groups = optimizer.param_groups
    params, state = group["params"], optimizer.state
    momentum = state[model.down.weight]["momentum_buffer"].clone()
    untouched = state[model.fc.bias]["momentum_buffer"]
    new = compact(model, EXAMPLE, optimizer, sets=sets).model
    assert optimizer.param_groups is groups
    assert optimizer.param_groups[0] is group
    assert group["params"] is params
    assert optimizer.state is state
    assert params == list(new.parameters())
    assert group["param_names"] == [name for name, _ in new.named_parameters()]
    assert list(state) == params
    assert torch.equal(state[new.down.weight]["momentum_buffer"], momentum[DOWN][:, STEM])
    assert state[new.fc.bias]["momentum_buffer"] is untouched
    optimizer.zero_grad()
    cross_entropy(new(torch.rand(4, 3, 8, 8)), torch.arange(4)).backward()
    optimizer.step()
    scheduler.step()
    assert group["lr"] == 0.05
    optimizer.load_state_dict(optimizer.state_dict())


def test_groups_and_parameters_of_others_stay():
    model, sets, _ = prepared()
    head = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [{"params": [model.down.weight], "lr": 0.3}, {"params": [*head.parameters()]}],
        lr=0.1,
        momentum=0.9,
    )
    head(torch.rand(1, 2)).sum().backward()
    optimizer.step()
    new = compact(model, EXAMPLE, optimizer, sets=sets).model
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]
    assert optimizer.param_groups[0]["params"] == [new.down.weight]
    assert optimizer.param_groups[1]["params"] == list(head.parameters())
    assert "momentum_buffer" in optimizer.state[head.weight]


def test_master_weights_go_along():
    model, sets, optimizer = prepared(ProxSGD, torch.bfloat16, l1=0.0, master_weights=True)
    for name, rows in (("down", [0, 5]), ("norm3", [0, 5])):
        for parameter in model.get_submodule(name).parameters():
            optimizer.state[parameter]["master_weight"][rows] = 0
    kept = compact(model, EXAMPLE, optimizer, sets=sets)
    # The stem's master weights aren't zero: the next step would bring it back.
    assert kept.report.removed == {"down": (0, 5)}
    new = kept.model
    master = optimizer.state[new.down.weight]["master_weight"]
    assert master.dtype == torch.float32
    assert torch.equal(master.bfloat16(), new.down.weight)
    cross_entropy(new(torch.rand(4, 3, 8, 8).bfloat16()), torch.arange(4)).backward()
    optimizer.step()
    assert torch.equal(master.bfloat16(), new.down.weight)


def test_prox_sgd_counts_zeros_of_the_new_parameters():
    model, sets, optimizer = prepared(ProxSGD, l1=1e-3, track_sparsity=True)
    before = optimizer.sparsity().size
    result = compact(model, EXAMPLE, optimizer, sets=sets)
    assert optimizer.sparsity().size == result.report.parameters[1] < before
    cross_entropy(result.model(torch.rand(4, 3, 8, 8)), torch.arange(4)).backward()
    optimizer.step()
    expected = sum(int((p == 0).sum()) for p in result.model.parameters())
    assert optimizer.sparsity().zeros == expected


def test_any_state_of_the_parameters_shape_goes_along():
    model, sets, optimizer = prepared(torch.optim.AdamW)
    optimizer.state[model.down.weight]["start"] = torch.arange(16 * 12).view(16, 12, 1, 1)
    start = optimizer.state[model.down.weight]["start"]
    new = compact(model, EXAMPLE, optimizer, sets=sets).model
    state = optimizer.state[new.down.weight]
    assert torch.equal(state["start"], start[DOWN][:, STEM])
    assert state["exp_avg_sq"].shape == new.down.weight.shape
    assert state["step"] == 1


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (torch.optim.Adafactor, {}, "state 'row_var' of stem.weight is"),
        (torch.optim.Muon, None, ""),
        (torch.optim.LBFGS, {"max_iter": 1}, "state 'd' of stem.weight is"),
    ],
    ids=["adafactor", "muon", "lbfgs"],
)
def test_state_that_cant_be_cut_is_refused_before_anything_changes(kind, options, named):
    model = Tiny()
    sets = channels(model, EXAMPLE)
    parameters = [p for p in model.parameters() if options is not None or p.dim() == 2]
    optimizer = kind(parameters, **(options or {}))

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(torch.rand(4, 3, 8, 8)), torch.arange(4))
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.step(closure)
    kill(model, sets, DEAD)
    if not named:  # its momentum is of the parameter's shape
        new = compact(model, EXAMPLE, optimizer, sets=sets).model
        assert optimizer.state[new.fc.weight]["momentum_buffer"].shape == (4, 14)
        return
    groups = [list(group["params"]) for group in optimizer.param_groups]
    keys = list(optimizer.state)
    with pytest.raises(ValueError, match=named):
        compact(model, EXAMPLE, optimizer, sets=sets)
    assert all(
        a is b
        for group, before in zip(optimizer.param_groups, groups, strict=True)
        for a, b in zip(group["params"], before, strict=True)
    )
    assert all(a is b for a, b in zip(optimizer.state, keys, strict=True))


def test_a_grad_scaler_goes_on_between_unscaling_and_the_step():
    runs = []
    for removed in (False, True):
        torch.manual_seed(5)
        model, sets, optimizer = prepared(momentum=0.9)
        zero_dead_columns(model, sets, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for round_ in range(3):
            optimizer.zero_grad()
            x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(round_))
            loss = cross_entropy(model(x), torch.arange(4))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if removed and round_ == 1:
                model = compact(model, EXAMPLE, optimizer).model
                assert model.down.out_channels == 14
            scaler.step(optimizer)
            scaler.update()
        runs.append((loss.item(), scaler.get_scale()))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    assert runs[1][1] == runs[0][1]


def test_columns_of_dead_channels_and_their_state_become_zero():
    model, sets, optimizer = prepared(momentum=0.9)
    model.eval()
    with torch.no_grad():
        model.down.weight[5] = 1.0  # behind a norm that is zero
    x = torch.rand(2, 3, 8, 8)
    before = model(x)
    alive = model.fc.weight[:, DOWN].clone()
    assert zero_dead_columns(model, sets, optimizer) == 3
    assert not model.fc.weight[:, [0, 5]].any()
    assert not optimizer.state[model.fc.weight]["momentum_buffer"][:, [0, 5]].any()
    assert not model.down.weight[[0, 5]].any()
    assert not optimizer.state[model.down.weight]["momentum_buffer"][[0, 5]].any()
    assert not model.fc.weight.grad[:, [0, 5]].any()
    assert torch.equal(model.fc.weight[:, DOWN], alive)
    assert torch.equal(model(x), before)
