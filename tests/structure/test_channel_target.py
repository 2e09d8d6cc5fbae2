"""TargetSparsity of channels and of multiply-adds, and the weights that keep layers alive."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from resnet_reg_ext import ProxSGD, TargetSparsity, channels, compact, importance, param_groups
from resnet_reg_ext.recipe.cost import count_multiply_adds

EXAMPLE = torch.rand(1, 3, 8, 8)


# A problem whose strength is known: no gradient, so that the penalty alone moves the rows.


def rows_of_known_norms():
    """Three parameters in two sets of 60 and 40 rows, in float64, and each row's ‖w_g‖/a_g."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (60, 5), "b": (60,), "c": (40, 2, 3)}
    params = {
        name: nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for name, shape in shapes.items()
    }
    weights = 0.5 + torch.rand(40, generator=generator, dtype=torch.float64)
    first = np.hypot(
        np.linalg.norm(params["a"].detach().numpy(), axis=1), params["b"].detach().abs().numpy()
    )
    second = np.linalg.norm(params["c"].detach().numpy().reshape(40, -1), axis=1)
    ratios = np.concatenate([first / math.sqrt(6), second / weights.numpy()])
    groups = [
        {"params": [("a", params["a"]), ("c", params["c"])], "rows": [7, 2]},
        {"params": [("b", params["b"])], "rows": [7], "l1": 0.0},
    ]
    groups[0]["row_weights"] = [None, weights]
    return params, groups, ratios


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_strength_is_that_of_the_closed_form(momentum):
    params, groups, ratios = rows_of_known_norms()
    optimizer = ProxSGD(
        groups, lr=0.1, momentum=momentum, weight_decay=0.0, l1=0.0, group_lasso=123.0
    )
    rates = [0.1 * 0.99**t for t in range(150)]
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.99)
    # Reached after 0.8 of the steps from 10 to 110, that is at 90.
    steering = TargetSparsity(
        optimizer, 0.4, steps=110, begin=10, every=4, of="channels", lrs=rates
    )
    expected = np.sort(ratios)[39] / sum(rates[10:90]) * (1 - momentum)
    shares, strengths = [], []
    for _ in range(100):
        strengths.append([group["group_lasso"] for group in optimizer.param_groups])
        for param in params.values():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        schedule.step()
        steering.step()
        shares.append(steering.share)
    assert strengths[:10] == [[0.0, 0.0]] * 10
    np.testing.assert_allclose(strengths[10:90], expected, rtol=1e-9)
    # The rounding of each step's threshold may leave the last row for the next count.
    assert shares[84] < 0.4
    assert shares[95] == 0.4
    first = (params["a"] == 0).all(1) & (params["b"] == 0)
    gone = torch.cat([first, (params["c"] == 0).flatten(1).all(1)])
    assert set(gone.nonzero().flatten().tolist()) == set(np.argsort(ratios)[:40].tolist())
    assert [group["frozen_zeros"] for group in optimizer.param_groups] == [True, True]
    assert steering.reached


# Small networks on images that a rule labels.


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 48, 3, padding=1, bias=False),
        nn.BatchNorm2d(48),
        nn.ReLU(),
        nn.Conv2d(48, 80, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(80),
        nn.ReLU(),
        nn.Conv2d(80, 120, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(120, 4),
    )


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(80, 3, 8, 8, generator=generator)
    return images, images.mean((2, 3)).argmax(1) + (images[:, 0, 0, 0] > 1).long()


class Training:
    """Everything of a run that is steered; ``go`` trains."""

    STEPS = 150

    def __init__(self, model, of, target, every=None, **options):
        self.model = model
        sets = channels(model, EXAMPLE)
        groups = param_groups(model, l1=0.0, group_lasso=1.0, sets=sets, **options)
        self.optimizer = ProxSGD(groups, lr=0.05)
        self.schedule = lr_scheduler.CosineAnnealingLR(self.optimizer, self.STEPS)
        self.steering = TargetSparsity(
            self.optimizer,
            target,
            steps=120,
            begin=20,
            of=of,
            sets=sets if of == "macs" else None,
            every=every,
        )
        self.count = 0

    def go(self, data, steps):
        images, labels = data
        for _ in range(steps):
            rows = slice(20 * (self.count % 4), 20 * (self.count % 4) + 20)
            self.optimizer.zero_grad()
            cross_entropy(self.model(images[rows]), labels[rows]).backward()
            self.optimizer.step()
            self.schedule.step()
            self.steering.step()
            self.count += 1

    def state(self):
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load(self, state):
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])

    PARTS = ("model", "optimizer", "schedule", "steering")


@pytest.mark.filterwarnings("ignore:.*leaves out the channels of 6")
@pytest.mark.parametrize("of", ["channels", "macs"])
@pytest.mark.parametrize(("target", "kind"), [(0.5, "channels"), (0.8, "channels"), (0.5, "norms")])
def test_the_share_is_reached_within_a_point(data, of, target, kind):
    model = network()
    scores = importance(model, [data]) if target == 0.8 else None
    run = Training(model, of, target, importance=scores, min_keep=0.1, groups=kind)
    run.go(data, Training.STEPS)
    result = compact(model, EXAMPLE)
    before, after = result.report.channels
    assert before == 248
    # The last layer's 120 have no norm.
    share = (before - after) / (248 if kind == "channels" else 128)
    if of == "macs":  # counted by torch, not by the sets
        share = 1 - count_multiply_adds(result.model, 8) / count_multiply_adds(model, 8)
    assert share == pytest.approx(target, abs=0.01)
    assert run.steering.share == pytest.approx(share, abs=1e-12)
    assert run.steering.reached
    # With norms alone the convolutions' zeros, which nothing has made, aren't frozen.
    steered = [g for g in run.optimizer.param_groups if any(n is not None for n in g["rows"])]
    assert len(steered) == (2 if kind == "channels" else 1)
    assert all(group["frozen_zeros"] for group in steered)


@pytest.mark.parametrize(("of", "stop"), [("channels", 10), ("macs", 61), ("channels", 140)])
def test_a_resumed_run_is_the_uninterrupted_one(data, of, stop):
    run = Training(network(), of, 0.6, every=3, min_keep=0.1)
    run.go(data, stop)
    saved = pickle.dumps(run.state())
    run.go(data, Training.STEPS - stop)
    again = Training(network(), of, 0.6, every=3, min_keep=0.1)
    again.load(pickle.loads(saved))
    again.count = stop
    again.go(data, Training.STEPS - stop)
    assert again.steering.state_dict() == run.steering.state_dict()
    assert again.steering.share == pytest.approx(0.6, abs=0.01)
    for ours, theirs in zip(again.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("of", ["channels", "macs"])
def test_channels_that_are_taken_out_meanwhile_count_as_gone(data, of):
    run = Training(network(), of, 0.6, min_keep=0.1)
    run.go(data, 90)
    dense = network()
    assert 0 < run.steering.share < 0.6
    result = compact(run.model, EXAMPLE, run.optimizer)
    share = run.steering.share
    run.model = result.model
    run.go(data, 1)
    assert run.steering.share >= share
    # Another removal, and a resumption between both.
    saved = pickle.dumps({name: getattr(run, name).state_dict() for name in Training.PARTS})
    again = Training(copy.deepcopy(run.model), of, 0.1, min_keep=0.0)
    again.steering.target = 0.6
    again.load(pickle.loads(saved))
    again.count = run.count
    again.go(data, Training.STEPS - again.count)
    small = compact(again.model, EXAMPLE).model
    if of == "macs":
        left = count_multiply_adds(small, 8) / count_multiply_adds(dense, 8)
    else:
        left = channels(small, EXAMPLE).total / 248
    assert 1 - left == pytest.approx(0.6, abs=0.01)


def test_a_lost_layer_is_told_while_it_trains_and_is_kept_by_the_guard(data):
    def trained(**options):
        model = network()
        scores = {"0": torch.full((48,), 0.01), "3": torch.ones(80), "6": torch.ones(120)}
        run = Training(model, "channels", 0.5, importance=scores, **options)
        run.go(data, 100)
        return model

    with pytest.warns(UserWarning, match=r"all 48 channels of .*\(0.weight\) are zero"):
        assert not trained()[0].weight.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = trained(min_keep=0.1)[0].weight
    assert int(kept.flatten(1).any(1).sum()) == 5


def test_weights_by_scores_rank_the_channels_by_them(data):
    model = network()
    scores = {name: of_set.sqrt() for name, of_set in importance(model, [data]).items()}
    scores["0"][3] = 0.0
    options = {"l1": 0.0, "group_lasso": 1.0, "example_inputs": EXAMPLE}
    plain, groups = (
        param_groups(model, **options, **more) for more in ({}, {"importance": scores})
    )
    penalty = []
    for given in (plain, groups):
        by_name = {
            name: (p.detach().double().flatten(1) if p.dim() > 1 else p.detach()[:, None], w)
            for group in given
            for (name, p), w in zip(group["params"], group["row_weights"], strict=True)
        }
        total = 0.0
        for one in channels(model, EXAMPLE):
            names = [producer.tensor for producer in one.producers]
            norms = torch.cat([by_name[name][0] for name in names], 1).norm(dim=1)
            total += float((torch.as_tensor(by_name[names[0]][1]) * norms).sum())
            if given is groups:
                ratios = norms / by_name[names[0]][1]
                rest = scores[one.name] > 0
                constant = (ratios / scores[one.name])[rest]
                torch.testing.assert_close(constant / constant[0], torch.ones_like(constant))
                assert torch.equal(ratios.argmin(), scores[one.name].argmin())
        penalty.append(total)
    assert penalty[1] == pytest.approx(penalty[0], rel=1e-6)
    # A tenth of each set, the highest scores, isn't penalised.
    (weights, *_), *_ = [
        group["row_weights"]
        for group in param_groups(model, **options, importance=scores, min_keep=0.1)
    ]
    free = (weights == 0).nonzero().flatten().tolist()
    assert sorted(free) == sorted(scores["0"].argsort(descending=True)[:5].tolist())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"of": "layers"}, ValueError, "of is 'layers': must be 'weights', 'channels' or 'macs'"),
        (
            {"of": "channels", "sets": ()},
            ValueError,
            r"sets are for of='macs', and of is 'channels'",
        ),
        ({"of": "macs", "sets": 3}, TypeError, "sets is a int: must be what channels"),
        ({"of": "channels", "lrs": [0.1] * 9}, ValueError, "lrs has 9 numbers: must have 10"),
        ({"of": "channels", "lrs": [-1.0] * 10}, ValueError, r"lrs has -1.0: must have 10"),
        ({"of": "channels", "lrs": 0.1}, TypeError, "lrs is 0.1: must be numbers"),
        ({"lrs": [0.1] * 10}, ValueError, "lrs are for of='channels'"),
        ({"of": "channels", "target": 0.95}, ValueError, r"target is 0.95, .* let 0.8992 go"),
        ({"of": "channels", "target": 1}, ValueError, "target is 1: must be above 0 and below 1"),
    ],
)
def test_arguments_out_of_range(change, error, message):
    optimizer = ProxSGD(
        param_groups(network(), group_lasso=1.0, example_inputs=EXAMPLE, min_keep=0.1)
    )
    before = copy.deepcopy([group["group_lasso"] for group in optimizer.param_groups])
    with pytest.raises(error, match=f"TargetSparsity: {message}"):
        TargetSparsity(optimizer, **{"target": 0.5, "steps": 10, **change})
    assert [group["group_lasso"] for group in optimizer.param_groups] == before


def test_sets_that_have_no_common_rows_are_refused():
    odd = [nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(5))]
    for rows, weights, message in (
        ([0, 0], None, "its first dimension is 5, and that of .* is 4"),
        ([0, None], [[1.0] * 3, None], "row_weights has 3 numbers: must have 4"),
    ):
        group = {"params": odd, "rows": rows, "row_weights": weights}
        optimizer = ProxSGD([group], group_lasso=1.0)
        with pytest.raises(ValueError, match=rf"param_groups\[0\]\['params'\].*{message}"):
            TargetSparsity(optimizer, steps=10, of="channels")
        assert optimizer.param_groups[0]["group_lasso"] == 1.0


def test_what_is_not_the_models_is_refused():
    model = network()
    sets = channels(model, EXAMPLE)
    optimizer = ProxSGD(param_groups(model, group_lasso=1.0, sets=sets))
    options = {"steps": 10, "of": "macs"}
    other = nn.Sequential(*network()[:-1], nn.Linear(120, 5))
    other[0], other[1] = nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40)
    other[3] = nn.Conv2d(40, 80, 3)
    with pytest.raises(ValueError, match=r"another model's: 0 has 40 channels, and 0.weight 48"):
        TargetSparsity(optimizer, sets=channels(other, EXAMPLE), **options)
    named = nn.Sequential(nn.Sequential(*network()))
    with pytest.raises(ValueError, match=r"sets have a 0.0.weight, and the optimizer has no"):
        TargetSparsity(optimizer, sets=channels(named, EXAMPLE), **options)
    plain = ProxSGD(model.parameters(), l1=0.1)
    with pytest.raises(ValueError, match="no parameter group has rows and a group_lasso above 0"):
        TargetSparsity(plain, steps=10, of="channels")
    state = TargetSparsity(plain, steps=10).state_dict()
    with pytest.raises(ValueError, match="the state is that of='weights', and of is 'channels'"):
        TargetSparsity(optimizer, steps=10, of="channels").load_state_dict(state)
    scores = importance(model, [], method="magnitude", sets=sets)
    for change, message in (
        ({"0": scores["0"][1:]}, r"importance of set 0 is \(47,\): must be a tensor of shape"),
        ({"0": -scores["0"]}, "importance of set 0 has values that are negative or not finite"),
        ({name: 0 * of_set for name, of_set in scores.items()}, "importance is 0 of all channels"),
    ):
        with pytest.raises(ValueError, match=message):
            param_groups(model, group_lasso=1.0, sets=sets, importance={**scores, **change})
    with pytest.raises(ValueError, match="min_keep is 1: must be a share"):
        param_groups(model, group_lasso=1.0, sets=sets, min_keep=1)
    with pytest.raises(
        ValueError, match="importance, min_keep and groups are for group_lasso, which is 0"
    ):
        param_groups(model, min_keep=0.1)
