"""Which channels matter, and the removal of those that matter least."""

import math

import pytest
import torch
from networks import Tiny, kill, with_statistics
from torch import nn
from torch.nn.functional import cross_entropy

from resnet_reg_ext import channels, importance, remove

EXAMPLE = torch.rand(1, 3, 8, 8)


@pytest.fixture
def tiny():
    model = with_statistics(Tiny()).double().eval()
    return model, channels(model, EXAMPLE)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(4)
    return [
        (
            torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(4, (4,), generator=generator),
        )
        for _ in range(3)
    ]


def test_taylor_is_the_squared_change_of_the_loss_to_first_order(tiny, batches):
    model, sets = tiny
    scores = importance(model, batches, sets=sets)
    norm, expected = model.norm3, torch.zeros(16, dtype=torch.float64)
    for x, y in batches:
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        # The same by a small step towards zero along the channel's weight and bias.
        for i in range(16):
            with torch.no_grad():
                values = norm.weight[i].clone(), norm.bias[i].clone()
                losses = []
                for factor in (1 + 1e-4, 1 - 1e-4):
                    norm.weight[i], norm.bias[i] = values[0] * factor, values[1] * factor
                    losses.append(cross_entropy(model(x), y))
                norm.weight[i], norm.bias[i] = values
                expected[i] += ((losses[0] - losses[1]) / 2e-4) ** 2
    torch.testing.assert_close(scores["down"], expected, rtol=1e-4, atol=1e-9)


def test_taylor_without_norms_takes_rows_and_bias(batches):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.SiLU(), nn.Conv2d(5, 4, 1)).double()
    model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())
    scores = importance(model, batches)
    expected = 0
    for x, y in batches:
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        conv = model[0]
        change = (conv.weight * conv.weight.grad).sum((1, 2, 3)) + conv.bias * conv.bias.grad
        expected = expected + change.detach() ** 2
    torch.testing.assert_close(scores["0"], expected)


def test_magnitude_is_the_root_mean_square_of_the_producers(tiny):
    model, sets = tiny
    scores = importance(model, [], method="magnitude", sets=sets)
    rows = torch.cat(
        [model.down.weight.flatten(1), model.norm3.weight[:, None], model.norm3.bias[:, None]], 1
    )
    torch.testing.assert_close(scores["down"], rows.square().mean(1).sqrt().detach())


@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_left_as_it_was(tiny, batches, train):
    model, sets = tiny
    model.train(train)
    model.norm3.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = importance(model, batches, sets=sets)
    assert all(torch.equal(before[name], v) for name, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.norm3.weight.requires_grad
    assert model.training is train
    assert scores["down"].any()  # frozen layers are scored as well


def test_batches_are_counted(tiny, batches):
    model, sets = tiny
    one = importance(model, batches, sets=sets, max_batches=1)
    torch.testing.assert_close(one, importance(model, batches[:1], sets=sets))
    every = importance(model, batches, sets=sets)
    torch.testing.assert_close(importance(model, (batch for batch in batches)), every)
    for loader in ([], iter(())):
        with pytest.raises(ValueError, match="loader has no batch"):
            importance(model, loader, sets=sets)
    with pytest.raises(ValueError, match="method is 'l1': must be"):
        importance(model, batches, method="l1")


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.7])
def test_the_share_that_is_asked_is_taken_out(tiny, share):
    model, sets = tiny
    report = remove(model, EXAMPLE, share=share, sets=sets, min_keep=0.1).report
    assert report.channels == (sets.total, sets.total - round(share * sets.total))


def test_the_least_important_go_and_the_others_are_as_they_were(tiny):
    model, sets = tiny
    scores = {one.name: torch.full((one.size,), 1.0) for one in sets}
    scores["down"][[3, 7, 11]] = 0.5
    result = remove(model, EXAMPLE, share=3 / sets.total, importance=scores)
    assert result.report.removed == {"down": (3, 7, 11)}
    # Removal of a channel is setting it to zero.
    kill(model, sets, {"down": [3, 7, 11]})
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("macs", [0.0, 0.3, 0.6])
def test_the_multiply_adds_that_are_asked_are_taken_out(tiny, macs):
    model, sets = tiny
    result = remove(model, EXAMPLE, macs=macs)
    before, after = result.report.multiply_adds
    assert after <= (1 - macs) * before
    # With one channel less it wouldn't have been enough.
    gone = sum(map(len, result.report.removed.values()))
    if gone:
        less = remove(model, EXAMPLE, share=(gone - 1) / sets.total).report
        assert less.multiply_adds[1] > (1 - macs) * before
    again = channels(result.model, EXAMPLE)
    assert sum(again.multiply_adds.values()) == after


def test_a_tenth_of_every_set_stays(tiny):
    model, sets = tiny
    scores = {one.name: torch.full((one.size,), 1.0) for one in sets}
    scores["down"].zero_()
    result = remove(model, EXAMPLE, share=14 / sets.total, importance=scores)
    assert result.model.down.out_channels == math.ceil(0.1 * 16)
    with pytest.raises(ValueError, match=r"min_keep=0.5 lets \d+ go: must be at most 0"):
        remove(model, EXAMPLE, share=0.9, min_keep=0.5)
    with pytest.raises(ValueError, match="of the multiply-adds go: must be at most"):
        remove(model, EXAMPLE, macs=0.99)


def test_rows_stay_a_multiple(tiny):
    model, _ = tiny
    result = remove(model, EXAMPLE, share=0.6, multiple_of=4)
    assert result.model.down.out_channels % 4 == 0
    assert result.model.down.out_channels < 16


def test_the_optimizer_goes_along(tiny, batches):
    model, sets = tiny
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = batches[0]
    cross_entropy(model(x), y).backward()
    optimizer.step()
    scores = importance(model, batches, sets=sets)
    new = remove(model, EXAMPLE, share=0.5, importance=scores, optimizer=optimizer).model
    assert optimizer.param_groups[0]["params"] == list(new.parameters())
    cross_entropy(new(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "must have one of share and macs"),
        ({"share": 0.5, "macs": 0.5}, "must have one of share and macs"),
        ({"share": 1.0}, "share is 1.0: must be"),
        ({"share": -0.1}, "share is -0.1: must be"),
        ({"share": math.nan}, "share is nan: must be"),
        ({"macs": 1.5}, "macs is 1.5: must be"),
        ({"share": 0.5, "min_keep": 2}, "min_keep is 2: must be"),
        ({"share": 0.5, "multiple_of": 0}, "multiple_of is 0: must be"),
        ({"share": 0.5, "importance": {}}, "importance of set stem is NoneType: must be"),
        (
            {"share": 0.5, "importance": {"stem": torch.ones(2)}},
            r"importance of set stem is \(2,\): must be a tensor of shape \(3,\)",
        ),
        (
            {"share": 0.5, "importance": {"stem": torch.tensor([math.nan, 1, 1])}},
            "importance of set stem has values that aren't finite",
        ),
    ],
)
def test_options_out_of_range_are_refused(tiny, options, named):
    with pytest.raises(ValueError, match=named):
        remove(tiny[0], EXAMPLE, **options)
