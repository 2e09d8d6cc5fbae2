"""Coupled rows: NumPy, pure PyTorch and the native core, at any number of threads, agree."""

import os

import numpy as np
import pytest
import reference
import torch
from reference import assert_same, values
from storages import STORAGES

from resnet_reg_ext import _C, ProxSGD

pytestmark = pytest.mark.sanitized

SPECIAL = [0.0, -0.0, 1e-40, -6e-8, 1e-3, float("inf"), float("nan")]
# Around a lane's, a segment's and a vector's ends; 1 is that of norms and biases.
WIDTHS = [1, 2, 3, 15, 16, 17, 31, 48, 147, 511, 512, 513, 576, 1024, 1030]
# Of each storage; each is several sets of several tensors and two steps (docs/verification.md).
CASES = int(os.environ.get("RESNET_REG_EXT_TEST_DRAWN_CASES", "40"))


def case(rng, storage):
    """Sets of parameters as NumPy arrays with gradients for two steps, and options of groups."""
    dtype, how = STORAGES[storage]
    momentum = float(rng.choice([0.0, 0.5, 0.9]))
    shared = {
        "lr": float(rng.choice([0.1, 0.3, 1.0])),
        "momentum": momentum,
        "dampening": float(rng.choice([0.0, 0.3])),
        "group_lasso": float(rng.choice([0.01, 0.3, 1.0])),
        **how,
    }
    groups = []
    for _ in range(2):  # of one k, and otherwise as unlike as they may be
        nesterov = momentum != 0 and shared["dampening"] == 0 and rng.random() < 0.3
        groups.append(
            {
                **shared,
                "params": [],
                "rows": [],
                "row_weights": [],
                "l1": float(rng.choice([0.0, 0.0, 0.02])),
                "weight_decay": float(rng.choice([0.0, 0.1])),
                "l2_mode": str(rng.choice(["coupled", "proximal"])),
                "nesterov": bool(nesterov),
                "maximize": bool(rng.random() < 0.2),
                "toward": str(rng.choice(["zero", "start"])),
                "starts": [],
            }
        )
    grads = []
    for number in range(int(rng.integers(1, 4))):
        rows = int(rng.choice([1, 2, 5, 17]))
        weights = None
        if rng.random() < 0.5:
            weights = [float(w) for w in rng.choice([0.0, 0.5, 2.0, 30.0], rows)]
        for _ in range(int(rng.integers(1, 4))):
            width = int(rng.choice(WIDTHS))
            group = groups[int(rng.integers(2))]
            drawn = [
                rng.standard_normal((rows, width)) * 10.0 ** rng.integers(-3, 2, (rows, 1))
                for _ in range(3)
            ]
            for array in drawn:
                if rng.random() < 0.3:
                    array.flat[:: int(rng.integers(5, 90))] = rng.choice(SPECIAL[:5])
                if rng.random() < 0.05:
                    array.flat[int(rng.integers(array.size))] = rng.choice(SPECIAL)
                if rng.random() < 0.2:
                    array[int(rng.integers(rows))] = 0.0
            param, *of_steps = (torch.tensor(array).to(getattr(torch, dtype)) for array in drawn)
            group["params"].append(param)
            group["starts"].append(start_of(rng, param, "master_weights" in how))
            group["rows"].append(number)
            group["row_weights"].append(weights if rng.random() < 0.7 else None)
            grads.append((group, len(group["params"]) - 1, of_steps))
        if weights is not None:  # at least one says it
            group["row_weights"][-1] = weights
    return [group for group in groups if group["params"]], grads


def start_of(rng, param, master):
    """The parameter, something near or far, or zeros of either sign, by turns; NaN becomes 1."""
    near = param.double() * torch.tensor(rng.choice([0.98, 1.0, 1.01], param.shape))
    far = torch.tensor(rng.standard_normal(param.shape))
    zeros = torch.tensor(rng.choice([0.0, -0.0], param.shape))
    choices = torch.stack([param.double(), near, far, zeros])
    which = torch.tensor(rng.integers(0, 4, (1, *param.shape)))
    if rng.random() < 0.5:
        which[:] = int(rng.integers(4))
    drawn = choices.gather(0, which)[0].nan_to_num(nan=1.0)
    return drawn.to(torch.float32 if master else param.dtype)


def step_by_backend(groups, grads, *, fused, count=False):
    """Parameters and state after each of two steps, and the zeros that were counted."""
    ours = [
        {**group, "params": [torch.nn.Parameter(p.clone()) for p in group["params"]]}
        for group in groups
    ]
    by_id = {id(group): mine for group, mine in zip(groups, ours, strict=True)}
    optimizer = ProxSGD(
        [{k: v for k, v in g.items() if k != "starts"} for g in ours],
        fused=fused,
        track_sparsity=count,
    )
    towards = {}
    for group in ours:
        for p, start in zip(group["params"], group["starts"], strict=True):
            towards[p] = 0
            if group["toward"] == "start":
                optimizer.state[p]["start"] = start.clone()
                towards[p] = start.to(p.dtype)
    history = []
    for step in range(2):
        for group, index, of_steps in grads:
            by_id[id(group)]["params"][index].grad = of_steps[step]
        optimizer.step()
        for group in ours:
            for p in group["params"]:
                history.append(p.detach().clone())
                history += [t.clone() for _, t in sorted(optimizer.state[p].items())]
                if count:
                    at_target = int((p == towards[p]).sum())
                    assert optimizer._zeros_known()[p].item() == at_target
    return history


def step_by_numpy(groups, grads, dtype_name):
    """The same from the formulas, for parameters without masters."""
    arrays = {}
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            arrays[g, i] = [values(p).reshape(len(p), -1), None]
    index_of = {id(group): g for g, group in enumerate(groups)}
    of_step = {(index_of[id(group)], i): steps for group, i, steps in grads}
    keep = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "l1", "l2_mode", "maximize")
    history = []
    for step in range(2):
        for number in sorted({r for group in groups for r in group["rows"]}):
            places = [
                (g, i)
                for g, group in enumerate(groups)
                for i, r in enumerate(group["rows"])
                if r == number
            ]
            given = [w for g, i in places if (w := groups[g]["row_weights"][i]) is not None]
            rows = len(arrays[places[0]][0])
            width = sum(arrays[place][0].shape[1] for place in places)
            weights = given[0] if given else np.full(rows, np.sqrt(width))
            members = []
            for g, i in places:
                options = {key: groups[g][key] for key in keep}
                options["momentum_dtype"] = (
                    "bfloat16" if groups[g].get("momentum_dtype") else dtype_name
                )
                if groups[g]["toward"] == "start":
                    options["start"] = values(groups[g]["starts"][i]).reshape(rows, -1)
                p, m = arrays[g, i]
                grad = values(of_step[g, i][step]).reshape(rows, -1)
                members.append((p, grad, m, dtype_name, options))
            result = reference.row_step(
                members, weights, group_lasso=groups[places[0][0]]["group_lasso"]
            )
            for place, (p, m) in zip(places, result, strict=True):
                arrays[place] = [p, m]
        for g, group in enumerate(groups):
            for i in range(len(group["params"])):
                history += [a for a in arrays[g, i] if a is not None]
                if groups[g]["toward"] == "start":
                    history.append(values(groups[g]["starts"][i]))
    return history


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("storage", STORAGES)
def test_every_backend_at_every_number_of_threads(storage):
    rng = np.random.default_rng([*storage.encode()])
    torch.set_num_threads(1)
    killed = 0
    for number in range(CASES):
        groups, grads = case(rng, storage)
        pure = step_by_backend(groups, grads, fused=False)
        if "master" not in storage:
            name = STORAGES[storage][0]
            for a, b in zip(pure, step_by_numpy(groups, grads, name), strict=True):
                assert_same(values(a).reshape(b.shape), b, f"pure, case {number}")
        killed += sum(int((t == 0).all(1).sum()) for t in pure if t.shape[1] > 1)
        torch.set_num_threads(1 + number % 8)
        native = step_by_backend(groups, grads, fused=True, count=number % 2 == 0)
        torch.set_num_threads(1)
        for a, b in zip(native, pure, strict=True):
            assert_same(a, b, f"native, case {number}")
    assert killed > CASES // 4


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("toward", ["zero", "start"])
@pytest.mark.parametrize("storage", STORAGES)
def test_pieces_and_threads_change_no_bits(storage, toward):
    """Sets of many rows, of long rows, and of many parameters as a residual stream has."""
    name, how = STORAGES[storage]
    dtype = getattr(torch, name)
    shapes = [[(700, 3, 5, 5), (700,), (700,)], [(3, 40_001)], [(64, 300), *[(64,)] * 8, (64, 65)]]

    def trajectory(fused, threads, count=False):
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(3)

        def drawn(shape):
            return torch.randn(shape, generator=generator).to(dtype)

        params = [torch.nn.Parameter(drawn(shape)) for of_set in shapes for shape in of_set]
        rows = [number for number, of_set in enumerate(shapes) for _ in of_set]
        optimizer = ProxSGD(
            [{"params": params, "rows": rows}],
            lr=0.1,
            group_lasso=0.4,
            l1=0.01,
            fused=fused,
            track_sparsity=count,
            toward=toward,
            **how,
        )
        towards = [p.detach().clone() * (toward == "start") for p in params]
        for _ in range(2):
            for p in params:
                p.grad = drawn(p.shape) * (torch.arange(len(p)) % 3 != 0).view(
                    -1, *[1] * (p.dim() - 1)
                ).to(dtype)
            optimizer.step()
        if count:
            known = optimizer._zeros_known()
            at_target = [int((p == t).sum()) for p, t in zip(params, towards, strict=True)]
            assert [known[p].item() for p in params] == at_target
        assert sum(int((p == t).sum()) for p, t in zip(params, towards, strict=True)) > 100
        return params + [t for p in params for t in optimizer.state[p].values()]

    expected = trajectory(False, 1)
    for threads in (1, 2, 3, 5, 8):
        for a, b in zip(trajectory(True, threads, threads == 3), expected, strict=True):
            assert_same(a, b, f"{threads} threads")


def test_the_native_core_takes_them():
    """Or the tests above would compare pure PyTorch with itself."""
    assert _C.why_cpu_unusable() == ""
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = torch.zeros(4, 3)
    optimizer = ProxSGD([{"params": [p], "rows": [0]}], lr=1.0, group_lasso=10.0, fused=True)
    optimizer.step()
    assert (p == 0).all()
    assert not torch.signbit(p).any()
