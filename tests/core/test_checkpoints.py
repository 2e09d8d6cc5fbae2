"""Checkpoints, pickles and copies; those of ``torch.optim.SGD`` too."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from reference import assert_same
from torch import nn

from resnet_reg_ext import ProxSGD

pytestmark = pytest.mark.reads_tensors

FUSED = pytest.mark.parametrize("fused", [None, True, False])
SHAPES = [(5, 3), (), (7,), (0,), (2, 3, 3, 3)]
OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}


def params_of(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def copies_of(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def train(optimizer, begin=0, steps=3):
    for number in range(begin, begin + steps):
        generator = torch.Generator().manual_seed(number)
        for group in optimizer.param_groups:
            for p in group["params"]:
                noise = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.grad = p.detach() * 1.5 + noise
        optimizer.step()


def all_params(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_equal_optimizers(a, b):
    for i, (p, q) in enumerate(zip(all_params(a), all_params(b), strict=True)):
        assert_same(p, q, f"tensor {i}: parameter")
        m, n = (o.state[t].get("momentum_buffer") for o, t in ((a, p), (b, q)))
        assert (m is None) == (n is None)
        if m is not None:
            assert m.dtype == n.dtype
            assert_same(m, n, f"tensor {i}: momentum")


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@FUSED
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_round_trip_goes_on_as_if_nothing_had_been(dtype, fused):
    a = ProxSGD(params_of(dtype=dtype), **OPTIONS, l1=0.01, l2_mode="proximal", fused=fused)
    train(a)
    b = ProxSGD(copies_of(all_params(a)), lr=7.0, fused=fused)
    b.load_state_dict(through_a_file(a.state_dict()))
    assert_equal_optimizers(a, b)
    train(a, begin=3)
    train(b, begin=3)
    assert_equal_optimizers(a, b)


def test_state_is_sgds():
    ours, theirs = ProxSGD(params_of(), **OPTIONS), torch.optim.SGD(params_of(), **OPTIONS)
    train(ours)
    train(theirs)
    for p, q in zip(all_params(ours), all_params(theirs), strict=True):
        assert list(ours.state[p]) == list(theirs.state[q]) == ["momentum_buffer"]
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()


@FUSED
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_from_sgd(momentum, fused):
    theirs = torch.optim.SGD(
        params_of(), lr=0.1, momentum=momentum, weight_decay=0.02, foreach=False
    )
    train(theirs)
    ours = ProxSGD(copies_of(all_params(theirs)), lr=9.0, momentum=0.5, l1=0.0, fused=fused)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    group = ours.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, momentum, 0.02)
    assert_equal_optimizers(ours, theirs)
    train(ours, begin=3)
    train(theirs, begin=3)
    assert_equal_optimizers(ours, theirs)


@FUSED
def test_from_sgd_keeps_each_groups_own_values(fused):
    theirs = torch.optim.SGD(
        [{"params": params_of()}, {"params": params_of(1), "lr": 0.2}], lr=0.1, fused=True
    )
    ours = ProxSGD(
        [
            {"params": params_of(), "l1": 0.25, "l2_mode": "proximal", "fused": fused},
            {"params": params_of(1), "l1": 0.5, "fused": False},
        ],
        l1=0.125,
    )
    ours.load_state_dict(theirs.state_dict())
    kept = [(g["l1"], g["l2_mode"], g["fused"], g["lr"]) for g in ours.param_groups]
    assert kept == [(0.25, "proximal", fused, 0.1), (0.5, "coupled", False, 0.2)]
    assert ours.defaults["l1"] == 0.125
    train(ours)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("foreach", [False, None])
def test_to_sgd(momentum, foreach):
    ours = ProxSGD(params_of(), lr=0.1, momentum=momentum, weight_decay=0.02, l1=0.0)
    train(ours)
    theirs = torch.optim.SGD(copies_of(all_params(ours)), lr=9.0, foreach=foreach)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    assert_equal_optimizers(ours, theirs)
    train(ours, begin=3)
    train(theirs, begin=3)
    for p, q in zip(all_params(ours), all_params(theirs), strict=True):
        if foreach is False:
            assert_same(p, q)
        else:
            assert torch.allclose(p, q, rtol=1e-6)  # torch's foreach may round differently


def test_to_sgd_and_back():
    ours = ProxSGD(params_of(), **OPTIONS, l1=0.01)
    train(ours)
    theirs = torch.optim.SGD(copies_of(all_params(ours)), lr=9.0)
    theirs.load_state_dict(ours.state_dict())
    back = ProxSGD(copies_of(all_params(ours)), l1=0.5)
    back.load_state_dict(theirs.state_dict())
    assert_equal_optimizers(ours, back)
    for group, saved in zip(back.param_groups, ours.param_groups, strict=True):
        # SGD keeps what it doesn't know in its groups, and hands it on.
        assert (group["lr"], group["l1"]) == (saved["lr"], 0.01)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("fused", (True, False)),
        ("capturable", (True, False)),
        ("track_sparsity", (True, False)),
        ("master_weights", (True, False)),
        ("momentum_dtype", (torch.bfloat16, None)),
    ],
)
def test_how_to_compute_is_the_live_groups(option, values):
    a, b = (ProxSGD(params_of(), **{option: value}) for value in values)
    train(a)
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0][option] is values[1]
    a.load_state_dict(b.state_dict())
    assert a.param_groups[0][option] is values[0]
    train(a)
    train(b)


def test_own_checkpoint_brings_l1_and_l2_mode():
    a = ProxSGD(params_of(), l1=0.25, l2_mode="proximal")
    train(a)
    b = ProxSGD(params_of(), l1=0.5)
    b.load_state_dict(a.state_dict())
    assert (b.param_groups[0]["l1"], b.param_groups[0]["l2_mode"]) == (0.25, "proximal")


def test_loading_leaves_the_checkpoint_alone():
    theirs = torch.optim.SGD(params_of(), **OPTIONS)
    train(theirs)
    saved = theirs.state_dict()
    keys = set(saved["param_groups"][0])
    ours = ProxSGD(params_of(), l1=0.01)
    ours.load_state_dict(saved)
    ours.param_groups[0]["lr"] = 5.0
    assert set(saved["param_groups"][0]) == keys
    assert saved["param_groups"][0]["lr"] == 0.1
    assert set(saved["state"][0]) == {"momentum_buffer"}


def test_checkpoint_of_float32_for_a_model_in_bfloat16():
    """Optimizer casts the state to the parameter's dtype, as SGD's does."""
    a = ProxSGD(params_of(), **OPTIONS)
    train(a)
    b = ProxSGD(params_of(dtype=torch.bfloat16), fused=True)
    b.load_state_dict(a.state_dict())
    assert b.state[all_params(b)[0]]["momentum_buffer"].dtype == torch.bfloat16
    train(b)


def test_checkpoint_with_part_of_the_state():
    """Parameters that were frozen when it was saved make their first step after it."""
    a, b = ProxSGD(params_of(), **OPTIONS), torch.optim.SGD(params_of(), **OPTIONS, foreach=False)
    for optimizer in (a, b):
        first, *_ = all_params(optimizer)
        first.grad = torch.ones_like(first)
        optimizer.param_groups[0]["l1"] = 0.0
        optimizer.step()
    c = ProxSGD(copies_of(all_params(a)), l1=0.0)
    c.load_state_dict(a.state_dict())
    train(c)
    train(b)
    assert_equal_optimizers(c, b)


@FUSED
@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_go_on_alike(copy_of, fused):
    a = ProxSGD(
        [{"params": params_of(), "l1": 0.02}, {"params": params_of(1), "l2_mode": "proximal"}],
        **OPTIONS,
        fused=fused,
    )
    train(a)
    b = copy_of(a)
    assert type(b) is ProxSGD
    assert a.defaults.items() <= b.defaults.items()  # torch adds one of its own
    strip = [{k: v for k, v in g.items() if k != "params"} for g in a.param_groups]
    assert [{k: v for k, v in g.items() if k != "params"} for g in b.param_groups] == strip
    assert not {id(p) for p in all_params(a)} & {id(p) for p in all_params(b)}
    assert_equal_optimizers(a, b)
    train(a, begin=3)
    train(b, begin=3)
    assert_equal_optimizers(a, b)


def test_model_and_optimizer_copied_together_stay_connected():
    model = nn.Linear(3, 2)
    optimizer = ProxSGD(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    model_2, optimizer_2 = copy.deepcopy((model, optimizer))
    assert optimizer_2.param_groups[0]["params"][0] is model_2.weight
    before = model.weight.detach().clone()
    model_2(torch.ones(3)).sum().backward()
    optimizer_2.step()
    assert_same(model.weight, before)
    assert not torch.equal(model_2.weight, before)


def test_names_survive_a_round_trip():
    model = nn.Linear(3, 2)
    a = ProxSGD(model.named_parameters())
    assert a.param_groups[0]["param_names"] == ["weight", "bias"]
    b = ProxSGD(model.named_parameters())
    b.load_state_dict(a.state_dict())
    assert b.param_groups[0]["param_names"] == ["weight", "bias"]
    nameless = ProxSGD(model.parameters())
    b.load_state_dict(nameless.state_dict())
    assert b.param_groups[0]["param_names"] == ["weight", "bias"]


def test_state_dict_hooks_run():
    seen = []
    a = ProxSGD(params_of(), **OPTIONS)
    train(a)
    a.register_state_dict_post_hook(lambda optimizer, state: seen.append("saved"))
    b = ProxSGD(params_of(), **OPTIONS)
    b.register_load_state_dict_pre_hook(lambda optimizer, state: seen.append("before"))
    b.register_load_state_dict_post_hook(lambda optimizer: seen.append("after"))
    b.load_state_dict(a.state_dict())
    assert seen == ["saved", "before", "after"]


@pytest.mark.parametrize("options", [{"master_weights": True}, {}], ids=str)
def test_what_a_load_hook_does_to_the_state_stays(options):
    """The hook sees the state as it is to be: in its own dtypes, the checkpoint's bits."""

    def optimizer():
        return ProxSGD([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], **options)

    a, b = optimizer(), optimizer()
    train(a)
    (saved,) = a.state.values()
    seen = []

    def reset(loaded):
        (state,) = loaded.state.values()
        seen.append({key: value.clone() for key, value in state.items()})
        state["momentum_buffer"] = torch.zeros_like(state["momentum_buffer"])

    b.register_load_state_dict_post_hook(reset)
    b.load_state_dict(a.state_dict())
    assert seen[0].keys() == saved.keys()
    for key, value in saved.items():
        assert_same(seen[0][key], value)
    (state,) = b.state.values()
    assert_same(state["momentum_buffer"], torch.zeros_like(saved["momentum_buffer"]))


def test_a_load_hook_may_add_state_that_the_checkpoint_lacks():
    w = nn.Parameter(torch.ones(3))
    optimizer = ProxSGD([w], momentum_dtype=torch.bfloat16)

    def add(loaded):
        loaded.state[w]["momentum_buffer"] = torch.ones(3)

    optimizer.register_load_state_dict_post_hook(add)
    optimizer.load_state_dict(ProxSGD([nn.Parameter(torch.ones(3))]).state_dict())
    assert_same(optimizer.state[w]["momentum_buffer"], torch.ones(3))


OLD = torch.load(Path(__file__).parent / "data" / "checkpoints_0_1_0.pt", weights_only=True)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("case", OLD)
def test_a_checkpoint_of_version_0_1_0_goes_on_bit_by_bit(case, fused):
    """The file holds what 0.1.0 saved after three steps, and where two more steps led it."""
    saved = OLD[case]
    params = [nn.Parameter(p.clone()) for p in saved["params"]]
    named = list(zip(("w", "b"), params, strict=True))
    optimizer = ProxSGD(named, lr=1.0, fused=fused, **saved["options"])
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
    for grads in saved["grads"]:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
    for p, end in zip(params, saved["end"], strict=True):
        assert_same(p, end, case)
