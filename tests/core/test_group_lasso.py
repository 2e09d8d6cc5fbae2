"""Group lasso in the optimizer: what is refused, what is saved, and the ways around the step."""

import copy
import io
import pickle
import re

import pytest
import torch
from reference import assert_same
from test_all_or_nothing import One, Refusing
from torch import nn

from resnet_reg_ext import ProxSGD, functional, sparsity
from resnet_reg_ext.functional import group_soft_threshold, soft_threshold

OPTIONS = {"lr": 0.1, "momentum": 0.9, "l1": 0.0, "weight_decay": 0.0, "group_lasso": 0.05}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def net():
    """A convolution with its norm, and a layer that is in no set."""
    return [
        nn.Parameter(drawn(*s, seed=i)) for i, s in enumerate([(6, 3, 3, 3), (6,), (6,), (4, 6)])
    ]


def set_grads(params, step=0):
    for i, p in enumerate(params):
        p.grad = drawn(*p.shape, seed=100 * step + i + 7).to(p.dtype)


def optimizer_of(params, **options):
    """The set lies in two groups, which differ in l1 and weight decay."""
    options = {**OPTIONS, **options}
    conv, weight, bias, other = params
    return ProxSGD(
        [
            {"params": [conv, other], "rows": [3, None], "l1": 0.01, "weight_decay": 0.02},
            {"params": [weight, bias], "rows": [3, 3]},
        ],
        **options,
    )


def groups_of(params):
    return torch.cat(
        [p.detach().double().flatten(1) if p.dim() > 1 else p[:, None] for p in params[:3]], 1
    )


def test_a_step_by_hand():
    """One step without momentum: the maps of functional.py on what plain SGD gives."""
    params = net()
    set_grads(params)
    moved = [p.detach() - 0.5 * p.grad for p in params]
    moved[0], moved[3] = (soft_threshold(v, 0.5 * 0.1) for v in (moved[0], moved[3]))
    groups = torch.cat([moved[0].flatten(1), moved[1][:, None], moved[2][:, None]], 1)
    size = 27 + 2
    expected = group_soft_threshold(groups, 0.5 * 2.0 * size**0.5)
    conv, weight, bias, other = params
    optimizer = ProxSGD(
        [
            {"params": [conv, other], "rows": [0, None], "l1": 0.1},
            {"params": [weight, bias], "rows": [0, 0], "l1": 0.0},
        ],
        lr=0.5,
        momentum=0.0,
        weight_decay=0.0,
        group_lasso=2.0,
    )
    optimizer.step()
    # float32: the sums here are of another order.
    torch.testing.assert_close(groups_of(params).float(), expected, rtol=1e-6, atol=1e-7)
    assert 0 < (expected == 0).all(1).sum() < 6
    assert torch.equal(groups_of(params) == 0, expected == 0)
    assert_same(other, moved[3])


def test_group_soft_threshold():
    x = drawn(5, 4, 3).double().requires_grad_()
    t = torch.tensor([0.0, 0.5, 1.0, 100.0, 2.0])
    norms = x.detach().flatten(1).norm(dim=1)
    expected = x.detach() * (1 - t / norms).clamp(min=0)[:, None, None]
    torch.testing.assert_close(group_soft_threshold(x, t), expected)
    torch.testing.assert_close(
        group_soft_threshold(x.transpose(0, 2), t, -1).mT.mT, expected.transpose(0, 2)
    )
    assert torch.autograd.gradcheck(lambda v: group_soft_threshold(v, t), x)
    zeros = torch.zeros(2, 3, requires_grad=True)
    result = group_soft_threshold(zeros, 0.0)
    result.sum().backward()
    assert not result.isnan().any()
    assert not zeros.grad.isnan().any()
    odd = torch.tensor([[float("nan"), 1.0], [float("inf"), 1.0], [-0.0, 0.1]])
    new = group_soft_threshold(odd, 0.5)
    assert new[0].isnan().all()
    assert_same(new[1:], torch.tensor([[float("inf"), 1.0], [0.0, 0.0]]))
    for bad in (-1.0, float("nan"), torch.ones(3)):
        with pytest.raises(ValueError, match=r"^threshold"):
            group_soft_threshold(odd[:2], bad)
    assert "group_soft_threshold" in functional.__all__


def with_set(*shapes_and_options):
    """Groups of one parameter each, all in one set."""
    return [
        {"params": [nn.Parameter(drawn(*shape))], "rows": [0], **options}
        for shape, options in shapes_and_options
    ]


REFUSED = {
    "first dimensions": (
        with_set(((4, 2), {}), ((5,), {})),
        r"\[1\]\['params'\]\[0\]: its first dimension is 5, and that of param_groups\[0\]",
    ),
    "lr": (with_set(((4, 2), {}), ((4,), {"lr": 0.2})), r"its lr is 0.2, and that of .* is 0.1"),
    "momentum": (with_set(((4, 2), {}), ((4,), {"momentum": 0.5})), r"its momentum is 0.5"),
    "dampening": (with_set(((4, 2), {}), ((4,), {"dampening": 0.5})), r"its dampening is 0.5"),
    "group_lasso": (
        with_set(((4, 2), {}), ((4,), {"group_lasso": 0.0})),
        r"its group's group_lasso is 0.0, and that of",
    ),
    "frozen": (
        with_set(((4, 2), {}), ((4,), {"frozen_zeros": True})),
        r"its group's frozen_zeros is True",
    ),
    "storage": (
        with_set(((4, 2), {}), ((4,), {"momentum_dtype": torch.bfloat16})),
        r"its storage is parameter torch.float32, momentum buffer torch.bfloat16",
    ),
    "no dimensions": (with_set(((), {})), r"has no dimensions"),
    "weights": (
        with_set(((4, 2), {"row_weights": [2.0]}), ((4,), {"row_weights": [3.0]})),
        r"its row_weights differ",
    ),
    "number of weights": (
        with_set(((4, 2), {"row_weights": [[1.0, 2.0]]})),
        r"row_weights has 2 numbers: must have 4",
    ),
}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_changes(what, fused):
    groups, message = REFUSED[what]
    groups = copy.deepcopy(groups)
    free = nn.Parameter(torch.ones(3))
    groups.insert(0, {"params": [free], "rows": None})
    message = (
        message.replace(r"\[1\]", r"\[2\]")
        .replace(r"\[0\]\[", r"\[1\]\[")
        .replace("groups\\[0\\]", "groups\\[1\\]")
    )
    params = [group["params"][0] for group in groups]
    before = [p.detach().clone() for p in params]
    optimizer = ProxSGD(groups, fused=fused, **OPTIONS)
    set_grads(params)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert not optimizer.state
    for p, old in zip(params, before, strict=True):
        assert_same(p, old)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rows": [1]}, r"rows has 1 entries: must have 2"),
        ({"rows": [1, True]}, r"rows\[1\] is True: must be an int or None"),
        ({"rows": 1}, r"rows is a int: must be a list"),
        (
            {"rows": [1, 1], "row_weights": [-1.0, None]},
            r"row_weights\[0\] is -1.0: must be finite",
        ),
        ({"rows": [1, 1], "row_weights": [["a"], None]}, r"row_weights\[0\] is \['a'\]"),
        ({"rows": [1, 1], "group_lasso": -1.0}, r"group_lasso is -1.0: must be finite and not neg"),
        ({"rows": None}, r"group_lasso is 0.05, but no group has rows"),
        ({}, r"group_lasso is 0.05, but no group has rows"),
    ],
)
def test_refused_at_construction(group, message):
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=rf"^ProxSGD: param_groups\[0\]: {message}"):
        ProxSGD([{"params": params, **group}], **OPTIONS)


def test_a_gradient_on_some_parameters_of_a_set_is_refused_and_on_none_passed_over():
    params = net()
    optimizer = optimizer_of(params)
    set_grads(params)
    params[1].grad = None
    with pytest.raises(
        ValueError,
        match=re.escape("param_groups[1]['params'][0]: has no gradient, but param_groups[0]"),
    ):
        optimizer.step()
    assert not optimizer.state
    before = [p.detach().clone() for p in params]
    for p in params[:3]:
        p.grad = None
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params[:3], before, strict=False))
    assert not torch.equal(params[3], before[3])


def _reshape(param, optimizer):
    for tensor in (param, param.grad, optimizer.state[param]["momentum_buffer"]):
        tensor.data = tensor.data.reshape(4, 9)


CHANGES = {
    "another set": lambda group, _: group["rows"].__setitem__(1, 1),
    "leaves its set": lambda group, _: group["rows"].__setitem__(0, None),
    "tuples": lambda group, _: group.update(rows=(1, 1, 5)),
    "number": lambda group, _: group["row_weights"].__setitem__(2, 0.5),
    "tensor in place": lambda group, _: group["row_weights"][0].mul_(0.25),
    "list in place": lambda group, _: group["row_weights"][1].__setitem__(2, 0.0),
    "order of the parameters": lambda group, _: group["params"].reverse(),
    "shape": lambda group, optimizer: _reshape(group["params"][2], optimizer),
    "l1": lambda group, _: group.update(group_lasso=0.0, l1=0.1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_groups_may_be_changed_between_steps(what):
    """A step takes what the groups say by then, as that of an optimizer made of them does."""
    params = [nn.Parameter(drawn(*shape)) for shape in ((3, 5), (3, 7), (6, 6))]
    weights = [torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), [1.0, 2.0, 3.0], None]
    if what == "order of the parameters":
        weights = None
    optimizer = ProxSGD([{"params": params, "rows": [1, 2, 3], "row_weights": weights}], **OPTIONS)
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    unchanged = copy.deepcopy(optimizer)
    CHANGES[what](optimizer.param_groups[0], optimizer)
    anew = copy.deepcopy(optimizer)
    if what == "order of the parameters":
        unchanged.param_groups[0]["params"].reverse()
    results = []
    for each in (optimizer, anew, unchanged):
        stepped = each.param_groups[0]["params"]
        for p, q in zip(stepped, optimizer.param_groups[0]["params"], strict=True):
            p.grad = q.grad.reshape(p.shape)
        each.step()
        results.append([p.detach().flatten() for p in stepped])
    for a, b in zip(*results[:2], strict=True):
        assert_same(a, b)
    if what not in ("order of the parameters", "tuples"):
        assert not all(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


def test_groups_are_checked_when_they_change():
    params = net()
    optimizer = optimizer_of(params)
    set_grads(params)
    optimizer.step()
    for key, wrong, message in (
        ("rows", [3, 3.0], r"rows\[1\] is 3.0: must be an int"),
        ("rows", [3], "rows has 1 entries"),
        ("row_weights", [-1.0, None], r"row_weights\[0\] is -1.0"),
        ("row_weights", [[1.0, 2.0], None], "row_weights has 2 numbers: must have 6"),
    ):
        group = optimizer.param_groups[0]
        right = group.get(key)
        group[key] = wrong
        for _ in range(2):  # the second time too
            with pytest.raises(ValueError, match=message):
                optimizer.step()
        group[key] = right
        optimizer.step()


@pytest.mark.parametrize("how", ["state_dict", "weights_only", "pickle", "deepcopy", "hook"])
def test_checkpoints_go_on_bit_by_bit(how):
    options = {"group_lasso": 0.3, "momentum_dtype": torch.bfloat16}
    params = net()
    optimizer = optimizer_of(params, **options)
    optimizer.param_groups[0]["row_weights"] = [[1.0, 0.0, 2.0, 0.5, 1.0, 3.0], None]
    for step in range(2):
        set_grads(params, step)
        optimizer.step()
    if how in ("pickle", "deepcopy"):
        other = (
            pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
        )
        copies = [p for group in other.param_groups for p in group["params"]]
        copies = [copies[0], *copies[2:], copies[1]]
    else:
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        other = optimizer_of(copies, **options)  # without weights: those are in the checkpoint
        saved = optimizer.state_dict()
        if how == "weights_only":
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        if how == "hook":
            other.register_load_state_dict_pre_hook(lambda _, state: copy.deepcopy(state))
        other.load_state_dict(saved)
    for step in (2, 3):
        for of, opt in ((params, optimizer), (copies, other)):
            set_grads(of, step)
            opt.step()
    for a, b in zip(params, copies, strict=True):
        assert_same(a, b)


def test_a_checkpoint_of_sgd_keeps_what_is_coupled():
    params = net()
    optimizer = optimizer_of(params, group_lasso=5.0)
    conv, weight, bias, other = net()
    sgd = torch.optim.SGD(
        [{"params": [conv, other]}, {"params": [weight, bias]}], lr=0.1, momentum=0.9
    )
    optimizer.load_state_dict(sgd.state_dict())
    assert optimizer.param_groups[1]["rows"] == [3, 3]
    set_grads(params)
    optimizer.step()
    assert (groups_of(params) == 0).all()


def test_first_steps_master_weights_and_layouts_mix_in_one_set():
    """State that exists for some parameters only; gradients in another layout; no native step."""
    results = []
    for fused, layout in ((False, torch.contiguous_format), (True, torch.channels_last)):
        params = net()
        params[0].data = params[0].data.contiguous(memory_format=torch.contiguous_format)
        optimizer = optimizer_of(params, fused=fused, group_lasso=0.3, track_sparsity=True)
        set_grads(params)
        optimizer.step()
        del optimizer.state[params[1]]
        set_grads(params, 1)
        params[0].grad = params[0].grad.contiguous(memory_format=layout)
        optimizer.step()
        assert optimizer.sparsity().to_dict() == sparsity(optimizer).to_dict()
        results.append([*params, *(optimizer.state[p]["momentum_buffer"] for p in params)])
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


def test_weights_may_be_a_view_with_gaps():
    weights = torch.tensor([1.0, 99.0, 2.0, 99.0, 0.0, 99.0, 3.0, 99.0], dtype=torch.float64)
    results = []
    for given, fused in (
        (weights[::2], True),
        (weights[::2].tolist(), True),
        (weights[::2], False),
    ):
        p = nn.Parameter(drawn(4, 9))
        p.grad = drawn(4, 9, seed=1)
        group = {"params": [p], "rows": [0], "row_weights": [given]}
        ProxSGD([group], **OPTIONS, fused=fused).step()
        results.append(p)
    for p in results[1:]:
        assert_same(p, results[0])


def test_rows_that_are_not_contiguous_take_pure_pytorch():
    p = nn.Parameter(drawn(3, 4).t())
    optimizer = ProxSGD([{"params": [p], "rows": [0]}], **OPTIONS)
    same = nn.Parameter(p.detach().contiguous())
    other = ProxSGD([{"params": [same], "rows": [0]}], **OPTIONS)
    for step in range(2):
        set_grads([p, same], step)
        same.grad = p.grad.contiguous()
        optimizer.step()
        other.step()
    assert_same(p, same)
    optimizer.param_groups[0]["fused"] = True
    with pytest.raises(RuntimeError, match=r"fused=True, but its rows aren't contiguous"):
        optimizer.step()


@pytest.mark.parametrize("fused", [True, False])
def test_frozen_zeros_keep_channels_at_zero_and_stop_the_shrinkage(fused):
    params = net()
    optimizer = optimizer_of(params, fused=fused, group_lasso=0.3)
    optimizer.param_groups[0]["row_weights"] = [[0.0, 99.0, 0.0, 1.0, 99.0, 1.0], None]
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    dead = (groups_of(params) == 0).all(1)
    assert 0 < dead.sum() < 6
    optimizer.freeze_zeros()
    assert all(group["frozen_zeros"] for group in optimizer.param_groups)
    before, zero = groups_of(params), groups_of(params) == 0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
        optimizer.state[p]["momentum_buffer"].zero_()
    optimizer.step()
    assert torch.equal(groups_of(params), before)  # group_lasso no longer shrinks
    set_grads(params, 9)
    optimizer.step()
    assert torch.equal(groups_of(params) == 0, zero)


@pytest.mark.parametrize("fused", [True, None])
def test_grad_scaler_and_grad_coefficient(fused):
    results = []
    for scaled in (True, False):
        params = net()
        optimizer = optimizer_of(params, fused=fused, group_lasso=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(3):
            set_grads(params, step)
            if scaled:
                scaler.scale(torch.ones(()))  # makes its tensors
                for p in params:
                    p.grad *= scaler.get_scale()
                if step == 1:
                    params[2].grad[3] = float("inf")
                scaler.step(optimizer)
                scaler.update()
            elif step != 1:
                optimizer.step()
        set_grads(params, 5)
        if not scaled:
            for p in params:
                p.grad *= 0.25
        optimizer.step(**({"grad_coefficient": 0.25} if scaled else {}))
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


def test_state_that_a_step_makes_and_channels_that_die_in_bfloat16():
    params = [nn.Parameter(p.detach().bfloat16()) for p in net()]
    optimizer = optimizer_of(params, master_weights=True, group_lasso=0.3)
    optimizer.param_groups[0]["row_weights"] = [[0.0, 99.0, 0.0, 1.0, 99.0, 1.0], None]
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    masters = [optimizer.state[p]["master_weight"] for p in params]
    assert all(m.dtype is torch.float32 for m in masters)
    dead = (groups_of(params) == 0).all(1)
    assert 0 < dead.sum() < 6
    assert torch.equal((groups_of(masters) == 0).all(1), dead)


def test_a_compiled_step_is_the_same():
    results = []
    for compiled in (True, False):
        params = net()
        optimizer = optimizer_of(params, group_lasso=0.3)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for number in range(2):
            set_grads(params, number)
            step()
        results.append(params)
    for a, b in zip(*results, strict=True):
        assert_same(a, b)


def test_zero_counts_include_dead_groups():
    params = net()
    optimizer = optimizer_of(params, group_lasso=1e4, track_sparsity=True, fused=True)
    set_grads(params)
    optimizer.step()
    by_name = {layer.name: layer.zeros for layer in optimizer.sparsity().layers}
    assert by_name["param_groups[0]['params'][0]"] == 6 * 27
    assert by_name["param_groups[1]['params'][1]"] == 6
    assert (groups_of(params) == 0).all()


def test_a_parameter_without_a_shape_yet_is_passed_over():
    layer = nn.LazyLinear(6)
    conv, weight, bias, _ = params = net()
    group = {"params": [conv, weight, bias, layer.weight], "rows": [0, 0, 0, 1]}
    optimizer = ProxSGD([group], **OPTIONS)
    set_grads(params)
    optimizer.step()
    before = conv.detach().clone()
    layer(drawn(2, 5)).sum().backward()
    optimizer.step()
    assert not torch.equal(conv, before)
    assert "momentum_buffer" in optimizer.state[layer.weight]


def test_tensors_of_subclasses():
    """Pure PyTorch steps them as it does plain ones; one that refuses changes nothing."""
    expected = net()[:3]
    before = [p.detach().clone() for p in expected]
    results = {}
    for kind in ("plain", "subclass", "wrapper", "refusing"):
        params = net()[:3]
        inner = params[1]
        if kind == "subclass":
            params[1] = nn.Parameter(inner.detach().as_subclass(One))
        elif kind != "plain":
            params[1] = nn.Parameter(
                Refusing(inner.detach(), ["mul"] if kind == "refusing" else [])
            )
        optimizer = ProxSGD([{"params": params, "rows": [0, 0, 0]}], **OPTIONS)
        set_grads(params)
        if kind in ("wrapper", "refusing"):
            params[1].grad = Refusing(params[1].grad, params[1].refused)
        if kind == "refusing":
            with pytest.raises(NotImplementedError):
                optimizer.step()
            assert not optimizer.state
        else:
            optimizer.step()
        if kind in ("wrapper", "refusing"):
            params[1] = params[1].inner
        results[kind] = [torch.as_tensor(p.detach()) for p in params]
    for kind in ("subclass", "wrapper"):
        for a, b in zip(results[kind], results["plain"], strict=True):
            assert_same(a.as_subclass(torch.Tensor), b)
    for a, b in zip(results["refusing"], before, strict=True):
        assert_same(a, b)


def test_a_start_beside_coupled_rows():
    """Groups without rows may have one: they step as without the group lasso elsewhere."""
    results = []
    for group_lasso in (0.05, 0.0):
        params = net()
        conv, weight, bias, other = params
        optimizer = ProxSGD(
            [
                {"params": [conv, weight, bias], "rows": [0, 0, 0]},
                {"params": [other], "toward": "start", "l1": 0.3, "weight_decay": 0.1},
            ],
            **{**OPTIONS, "group_lasso": group_lasso},
        )
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        assert "start" in optimizer.state[other]
        assert "start" not in optimizer.state[conv]
        results.append(params)
    assert torch.equal(results[0][3], results[1][3])
    assert not torch.equal(results[0][0], results[1][0])
    assert (results[0][3] == net()[3]).any()
