"""A step that raises has changed nothing, and one that doesn't has stepped every parameter."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import assert_same
from torch import nn

from resnet_reg_ext import ProxSGD, param_groups
from resnet_reg_ext.backends import native
from resnet_reg_ext.backends.device_values import DeviceValues
from resnet_reg_ext.functional import prox_sgd_

OPTIONS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02, "l1": 0.01}


class One(torch.Tensor):
    """Overrides ``__torch_function__``, and refuses operations with strangers, as torch does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


class Other(torch.Tensor):
    """Unrelated to the other subclass, with torch's own ``__torch_function__``."""


class Refusing(torch.Tensor):
    """A wrapper whose ``__torch_dispatch__`` refuses some operations."""

    @staticmethod
    def __new__(cls, inner, refused):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner, made.refused = inner, refused
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        refused = next(a.refused for a in torch.utils._pytree.tree_leaves(args) if type(a) is cls)
        if any(word in str(func) for word in refused):
            raise NotImplementedError(f"refused: {func}")

        def unwrapped(value):
            return value.inner if isinstance(value, cls) else value

        mapped = torch.utils._pytree.tree_map(unwrapped, (args, kwargs or {}))
        result = func(*mapped[0], **mapped[1])
        if func.overloadpacket.__name__.endswith("_") and args and isinstance(args[0], cls):
            return args[0]
        return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: cls(t, refused), result)


def plain(size):
    p = nn.Parameter(torch.linspace(-1, 1, size))
    p.grad = torch.linspace(1, -2, size)
    return p


def with_grad(change):
    def make(size):
        p = plain(size)
        grad = change(p.grad)
        try:
            p.grad = grad
        except (RuntimeError, TypeError):  # torch lets only through .data what autograd never makes
            p = plain(size)
            p.grad.data = grad
        return p

    return make


def gapped(size):
    p = nn.Parameter(torch.linspace(-1, 1, 2 * size)[::2])
    p.grad = torch.linspace(1, -2, size)
    return p


KINDS = {
    "plain": plain,
    "without a gradient": lambda size: nn.Parameter(torch.ones(size)),
    "gapped": gapped,
    "float64": lambda size: with_dtype(size, torch.float64),
    "bfloat16": lambda size: with_dtype(size, torch.bfloat16),
    "gradient: negated": with_grad(torch._neg_view),
    "gradient: expanded": with_grad(lambda g: torch.ones(()).expand(g.shape)),
    "gradient: subclass": with_grad(lambda g: g.as_subclass(One)),
    "gradient: another subclass": with_grad(lambda g: g.as_subclass(Other)),
    "gradient: sparse": with_grad(lambda g: g.to_sparse()),
    "gradient: refuses mul": with_grad(lambda g: Refusing(g, ["mul"])),
    "gradient: refuses add and sub": with_grad(lambda g: Refusing(g, ["add", "sub"])),
}


def with_dtype(size, dtype):
    p = nn.Parameter(torch.linspace(-1, 1, size).to(dtype))
    p.grad = torch.linspace(1, -2, size).to(dtype)
    return p


STATES = {
    "as it is": lambda state: None,
    "momentum: float64": lambda state: change_buffer(state, lambda m: m.double()),
    "momentum: of another shape": lambda state: change_buffer(state, lambda m: m[:1]),
    "momentum: negated": lambda state: change_buffer(state, torch._neg_view),
    "momentum: text": lambda state: change_buffer(state, lambda m: "text"),
    "momentum: subclass": lambda state: change_buffer(state, lambda m: m.as_subclass(One)),
    "momentum: refuses mul": lambda state: change_buffer(state, lambda m: Refusing(m, ["mul"])),
    "momentum: none": lambda state: state.pop("momentum_buffer", None),
}


def change_buffer(state, change):
    if "momentum_buffer" in state:
        state["momentum_buffer"] = change(state["momentum_buffer"])


def values_of(tensor):
    if type(tensor) is Refusing:
        tensor = tensor.inner
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        return tensor
    return tensor.detach().as_subclass(torch.Tensor).resolve_neg().clone()


def snapshot(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return (
        [values_of(p) for p in params],
        [
            {key: values_of(value) for key, value in optimizer.state.get(p, {}).items()}
            for p in params
        ],
    )


def assert_same_snapshot(now, before):
    for p, q in zip(now[0], before[0], strict=True):
        assert_same(p, q)
    for ours, theirs in zip(now[1], before[1], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, torch.Tensor):
                assert_same(ours[key], value, key)
            else:
                assert ours[key] == value


BAD_OPTIONS = [{}, {}, {}, {"lr": -1.0}, {"momentum": 1.0}, {"l1": float("nan")}, {"lr": "fast"}]


@settings(max_examples=300)
@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5),
    sizes=st.lists(st.sampled_from([1, 3, 20, 5000]), min_size=5, max_size=5),
    states=st.lists(st.sampled_from(sorted(STATES)), min_size=5, max_size=5),
    groups=st.integers(1, 2),
    options=st.sampled_from(BAD_OPTIONS),
    fused=st.sampled_from([None, False, True]),
    steps_before=st.integers(0, 1),
    maximize=st.booleans(),
)
def test_all_or_nothing(kinds, sizes, states, groups, options, fused, steps_before, maximize):
    params = [KINDS[kind](size) for kind, size in zip(kinds, sizes, strict=False)]
    lists = [params[:1], params[1:]] if groups == 2 and len(params) > 1 else [params]
    optimizer = ProxSGD([{"params": ps} for ps in lists], **OPTIONS, maximize=maximize)
    for _ in range(steps_before):
        grads = [p.grad for p in params]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p, grad, state in zip(params, grads, states, strict=False):
            p.grad = grad
            STATES[state](optimizer.state[p])
    for group in optimizer.param_groups:
        group["fused"] = fused
    optimizer.param_groups[-1].update(options)
    before = snapshot(optimizer)
    expected = [
        (p, values_of(p), values_of(p.grad), values_of(optimizer.state.get(p, {}).get(KEY)))
        for p in params
        if p.grad is not None
    ]
    try:
        optimizer.step()
    except (RuntimeError, ValueError, TypeError):
        assert_same_snapshot(snapshot(optimizer), before)
        return
    for p, value, grad, buffer in expected:
        first = buffer is None
        buffer = torch.zeros_like(value) if first else buffer
        prox_sgd_(
            [value], [grad], [buffer], **OPTIONS, maximize=maximize, first_step=first, fused=False
        )
        assert_same(values_of(p), value)
        assert_same(values_of(optimizer.state[p][KEY]), buffer)


KEY = "momentum_buffer"


@pytest.mark.parametrize("fused", [None, False])
def test_two_subclasses_in_one_list(fused):
    """In one list operation they would meet; the large tensor before them would have changed."""
    large, one, other = plain(5000), plain(3), plain(3)
    one.grad, other.grad = one.grad.as_subclass(One), other.grad.as_subclass(Other)
    copies = [copy.deepcopy(p) for p in (large, one, other)]
    ProxSGD([large, one, other], **OPTIONS, fused=fused).step()
    for p, q in zip((large, one, other), copies, strict=True):
        values, grads = [values_of(q)], [values_of(q.grad if q.grad is not None else p.grad)]
        prox_sgd_(values, grads, [torch.zeros(q.shape)], **OPTIONS, first_step=True)
        assert_same(values_of(p), values[0])


class ChangesTensors:
    """A number whose ``__float__`` replaces a parameter's memory."""

    def __init__(self, params):
        self.params = params

    def __float__(self):
        for p in self.params:
            p.data = torch.full((1 << 20,), 7.0)
            p.grad = torch.zeros(1 << 20)
        return 0.01


@pytest.mark.parametrize("option", ["lr", "l1", "weight_decay", "momentum"])
@pytest.mark.parametrize("changed", ["earlier group", "same group"])
def test_an_option_whose_float_changes_tensors(option, changed):
    """Every option is read before any tensor's address is."""
    params = [nn.Parameter(torch.ones(1 << 16)) for _ in range(3)]
    optimizer = ProxSGD(
        [{"params": params[:2]}, {"params": params[2:]}], **OPTIONS, l2_mode="proximal"
    )
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.param_groups[1][option] = ChangesTensors(
        params[:2] if changed == "earlier group" else params[2:]
    )
    optimizer.step()
    for p in params:
        assert torch.isfinite(p).all()
        assert p.unique().numel() == 1


@pytest.mark.parametrize("keyword", ["foreach", "differentiable", "betas", "learning_rate"])
def test_an_unknown_keyword_is_refused(keyword):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'") as caught:
        ProxSGD([nn.Parameter(torch.ones(1))], **{keyword: True})
    if keyword in ("foreach", "differentiable"):
        assert {"foreach": "fused", "differentiable": "torch.optim.SGD"}[keyword] in str(
            caught.value
        )


def shared(make):
    a = nn.Parameter(torch.randn(6, 4))
    return make(a)


SHARED = {
    "through .data": lambda a: [a, tied(a)],
    "transposed": lambda a: [a, nn.Parameter(a.data.t())],
    "a row": lambda a: [a, nn.Parameter(a.data[2])],
    "overlapping slices": lambda a: [nn.Parameter(a.data[:4]), nn.Parameter(a.data[3:])],
    "every other column, twice": lambda a: [
        nn.Parameter(a.data[:, ::2]),
        nn.Parameter(a.data[:, 2:]),
    ],
    "of another dtype": lambda a: [a, nn.Parameter(a.data.view(torch.float64))],
}
APART = {
    "slices": lambda a: [nn.Parameter(a.data[:3]), nn.Parameter(a.data[3:])],
    "columns between one another": lambda a: [
        nn.Parameter(a.data[:, ::2]),
        nn.Parameter(a.data[:, 1::2]),
    ],
    "empty": lambda a: [a, nn.Parameter(a.data[:0])],
    "meta": lambda a: [nn.Parameter(torch.ones(3, device="meta")) for _ in range(2)],
}


def tied(a):
    b = nn.Parameter(torch.empty(0))
    b.data = a.data
    return b


@pytest.mark.parametrize("case", SHARED)
def test_parameters_that_share_memory_are_refused(case):
    params = SHARED[case](nn.Parameter(torch.randn(6, 4)))
    with pytest.raises(ValueError, match=r"\(second\): shares memory with .*\(first\)"):
        ProxSGD(
            [("first", params[0]), ("between", nn.Parameter(torch.ones(2))), ("second", params[1])]
        )
    optimizer = ProxSGD(params[:1])
    with pytest.raises(
        ValueError, match=r"param_groups\[1\].*: shares memory with param_groups\[0\]"
    ):
        optimizer.add_param_group({"params": params[1:]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("case", APART)
def test_parameters_in_one_buffer_that_share_no_element_are_taken(case):
    params = APART[case](nn.Parameter(torch.randn(6, 4)))
    assert len(ProxSGD(params).param_groups[0]["params"]) == 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("share", [lambda a: a.data, lambda a: a.data[3:]], ids=["all", "a part"])
def test_memory_that_came_to_be_shared_after_construction(share, momentum):
    """Threads of the native kernel would write to it at once."""
    a, b, alone = (nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(3))
    optimizer = ProxSGD([("a", a), ("alone", alone), ("b", b)], **{**OPTIONS, "momentum": momentum})
    b.data = share(a)
    for p in (a, alone, b):
        p.grad = torch.ones(p.shape)
    with pytest.raises(ValueError, match=r"\[0\] \(a\): it shares memory with another parameter"):
        optimizer.step()
    for p in (a, alone):
        assert_same(p, torch.linspace(-1, 1, 9))
    assert not optimizer.state
    b.data = share(a).clone()
    optimizer.step()
    assert not torch.equal(alone, torch.linspace(-1, 1, 9))


def test_all_groups_are_one_call_of_the_core(monkeypatch):
    """So that a CUDA launch can take all of them; first steps and running ones too."""
    steps = []
    core = native._C.prox_sgd_

    def counted(reader, of_call, threads):
        steps.append(len(of_call))
        core(reader, of_call, threads)

    monkeypatch.setattr(native._C, "prox_sgd_", counted)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2))
    optimizer = ProxSGD(param_groups(model), lr=0.1, momentum=0.9, l1=0.01, fused=True)
    versions = [p._version for p in model.parameters()]
    for late in (True, False):
        model(torch.ones(2, 3, 8, 8)).sum().backward()
        if late:
            model[0].weight.grad = None
        optimizer.step()
        optimizer.zero_grad()
    assert steps == [2, 3]
    assert all(p._version > v for p, v in zip(model.parameters(), versions, strict=True))


def test_values_that_the_host_knows_stay_there():
    """Only those in a device's memory are left for the kernel to read."""
    values = DeviceValues(
        lr=torch.tensor(0.5, device="meta"), l1=torch.tensor(0.25), grad_coefficient=torch.ones(1)
    )
    known, others = values.split()
    assert known.lr is None
    assert known.l1 is values.l1
    assert known.grad_coefficient is values.grad_coefficient
    assert others.lr is values.lr
    assert others[1:] == (None,) * 4
