"""The step inside torch.compile: the same bits as outside, and no recompiling for a tensor lr.

``aot_eager`` takes the way of functionalisation, which a mutating operator must stand; inductor,
slower to compile, is tried once.
"""

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from reference import assert_same
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from resnet_reg_ext import ProxSGD, param_groups, sparsity

BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


def graphs():
    """How often something was compiled."""
    return counters["stats"]["unique_graphs"]


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
    )
    return model.to(dtype)


def backward(model, number):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(6, 3, 5, 5, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    cross_entropy(model(images), torch.arange(6) % 5).backward()


def compiled(function, **options):
    return torch.compile(function, **{"fullgraph": True, "backend": BACKEND, **options})


def assert_same_run(ours, expected, message=""):
    for (model, optimizer), (other, theirs) in [(ours, expected)]:
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert_same(p, q, f"{message} {name}")
            assert optimizer.state.get(p, {}).keys() == theirs.state.get(q, {}).keys()
            for key, value in theirs.state.get(q, {}).items():
                assert_same(optimizer.state[p][key], value, f"{message} {name} {key}")


def take_steps(step, ours, expected, numbers):
    """The same steps, compiled and not."""
    for number in numbers:
        for model, _ in (ours, expected):
            backward(model, number)
        step()
        expected[1].step()


def pair(make, dtype=torch.float32):
    """Two runs alike; the first is to be compiled."""
    models = net(dtype), net(dtype)
    return [(model, make(model)) for model in models]


OPTIONS = {
    "plain": {},
    "no momentum": {"momentum": 0.0, "l1": 0.1},
    "nesterov": {"nesterov": True, "weight_decay": 1e-2},
    "dampening": {"dampening": 0.25},
    "proximal": {"l2_mode": "proximal", "weight_decay": 1e-2},
    "fused": {"fused": True},
    "pure": {"fused": False},
    "bfloat16 momentum": {"momentum_dtype": torch.bfloat16},
    "towards the start": {"toward": "start", "weight_decay": 1e-2},
    "towards the start, no momentum": {"toward": "start", "momentum": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_bits_as_outside(options):
    ours, expected = pair(lambda m: ProxSGD(m.parameters(), lr=0.05, **{"l1": 1e-2, **options}))
    step = compiled(ours[1].step)
    for number in range(4):
        take_steps(step, ours, expected, [number])
        assert_same_run(ours, expected, f"step {number}")
    # That of the first step, which creates state if there is any, and that of the others.
    has_state = options.get("momentum") != 0 or "toward" in options
    assert graphs() == (2 if has_state else 1)
    assert sparsity(ours[1]).zeros > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_master_weights_and_other_types(dtype):
    ours, expected = pair(
        lambda m: ProxSGD(m.parameters(), lr=0.05, l1=1e-2, master_weights=True), dtype
    )
    step = compiled(ours[1].step)
    take_steps(step, ours, expected, range(3))
    assert_same_run(ours, expected)
    assert graphs() == 2


def test_inductor():
    ours, expected = pair(lambda m: ProxSGD(m.parameters(), lr=torch.tensor(0.05), l1=1e-2))
    step = compiled(ours[1].step, backend="inductor")
    for number in range(4):
        for model, optimizer in (ours, expected):
            backward(model, number)
            optimizer.param_groups[0]["lr"].fill_(0.05 / (number + 1))
        step()
        expected[1].step()
        assert_same_run(ours, expected, f"step {number}")
    assert graphs() == 2


# Schedulers wrap `step` in what can't be compiled, so it is compiled before they are there.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_nothing_is_compiled_anew_over_100_values_of_a_tensor_lr_and_l1():
    def make(model):
        return ProxSGD(param_groups(model, l1=torch.tensor(1e-2)), lr=torch.tensor(0.05))

    ours, expected = pair(make)
    step = compiled(ours[1].step)
    schedules = [
        OneCycleLR(o, 0.1, total_steps=110, cycle_momentum=False) for _, o in (ours, expected)
    ]
    seen = set()
    for number in range(105):
        for (model, optimizer), schedule in zip((ours, expected), schedules, strict=True):
            backward(model, number % 7)
            optimizer.param_groups[0]["l1"].fill_(1e-2 / (1 + number))
            seen.add(float(optimizer.param_groups[0]["lr"]))
            step() if optimizer is ours[1] else optimizer.step()
            schedule.step()
        if number == 4:
            warm = graphs()
            counters["recompiles"].clear()
    assert_same_run(ours, expected)
    assert len(seen) > 100
    assert graphs() == warm == 2
    assert not counters["recompiles"]


CHANGES = {
    "lr": lambda o, number: o.param_groups[0].update(lr=0.05 / (1 + number)),
    "l1 and weight decay": lambda o, number: o.param_groups[0].update(
        l1=1e-2 / (1 + number), weight_decay=1e-3 * number
    ),
    "momentum": lambda o, number: o.param_groups[0].update(momentum=0.1 * number),
    "frozen zeros": lambda o, number: o.param_groups[0].update(frozen_zeros=number % 2 == 1),
    "state": lambda o, number: o.state.clear(),
}


@pytest.mark.parametrize(
    ("change", "backend"), [*((change, BACKEND) for change in CHANGES), ("lr", "inductor")]
)
def test_what_is_no_tensor_may_change_between_compiled_steps(change, backend):
    """It compiles anew, as torch.optim.SGD does, or not: never is an old value used."""
    ours, expected = pair(lambda m: ProxSGD(m.parameters(), lr=0.05, l1=1e-2))
    step = compiled(ours[1].step, backend=backend)
    for number in range(5):
        for _, optimizer in (ours, expected):
            CHANGES[change](optimizer, number)
        take_steps(step, ours, expected, [number])
        assert_same_run(ours, expected, f"step {number}")


def test_an_lr_that_the_same_graph_has_changed():
    """The step must use the new value, and not the one that the tensor held before the graph."""
    ours, expected = pair(lambda m: ProxSGD(m.parameters(), lr=torch.tensor(0.1), l1=1e-2))

    def step_of(optimizer, lr):
        def step():
            lr.mul_(0.5)
            optimizer.step()

        return step

    step = compiled(step_of(ours[1], ours[1].param_groups[0]["lr"]))
    other = step_of(expected[1], expected[1].param_groups[0]["lr"])
    for number in range(3):
        for model, _ in (ours, expected):
            backward(model, number)
        step()
        other()
    assert_same_run(ours, expected)
    assert ours[1].param_groups[0]["lr"].item() == pytest.approx(0.0125)


def test_gradients_clipped_in_the_same_graph():
    ours, expected = pair(lambda m: ProxSGD(m.parameters(), lr=0.05, l1=1e-2))

    def step_of(model, optimizer):
        def step():
            norm = torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()
            optimizer.step(grad_coefficient=(0.1 / (norm + 1e-6)).clamp(max=1.0))

        return step

    step, other = compiled(step_of(*ours)), step_of(*expected)
    for number in range(3):
        for model, _ in (ours, expected):
            backward(model, number)
        step()
        other()
    assert_same_run(ours, expected)


def test_forward_gradients_and_step_in_one_graph():
    ours, expected = pair(lambda m: ProxSGD(m.parameters(), lr=0.05, l1=1e-2))

    def training_step(model, optimizer):
        def step(images):
            loss = cross_entropy(model(images), torch.arange(6) % 5)
            params = list(model.parameters())
            for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = g
            optimizer.step()
            return loss.detach()

        return step

    step, other = torch.compile(training_step(*ours), backend=BACKEND), training_step(*expected)
    for number in range(5):
        images = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(number))
        assert_same(step(images), other(images))
    assert_same_run(ours, expected)


def test_parameters_without_a_gradient_and_those_that_get_one_later():
    ours, expected = pair(lambda m: ProxSGD(m.parameters(), lr=0.05, l1=1e-2))
    step = compiled(ours[1].step)
    for number in range(5):
        for model, _ in (ours, expected):
            backward(model, number)
            if number < 3:
                model[0].weight.grad = None
        step()
        expected[1].step()
        for p, q in zip(ours[0].parameters(), expected[0].parameters(), strict=True):
            assert_same(p, q, f"step {number}")
    assert not torch.equal(ours[0][0].weight, net()[0].weight)


def test_a_checkpoint_loaded_after_compiling():
    ours, expected = pair(lambda m: ProxSGD(m.parameters(), lr=0.05, l1=1e-2))
    step = compiled(ours[1].step)
    take_steps(step, ours, expected, range(2))
    checkpoint = pickle.dumps((ours[0].state_dict(), ours[1].state_dict()))
    take_steps(step, ours, expected, [2])
    for model, optimizer in (ours, expected):
        weights, state = pickle.loads(checkpoint)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
    take_steps(step, ours, expected, range(3))
    assert_same_run(ours, expected)


def test_zeros_counted_before_a_compiled_step_are_counted_anew():
    model, optimizer = pair(lambda m: ProxSGD(m.parameters(), lr=0.5, track_sparsity=True))[0]
    backward(model, 0)
    optimizer.step()
    few = optimizer.sparsity().zeros
    optimizer.param_groups[0]["l1"] = 0.1
    step = compiled(optimizer.step)
    for number in (1, 2):
        backward(model, number)
        step()
    assert optimizer.sparsity().zeros == sum(int((p == 0).sum()) for p in model.parameters()) > few


def test_a_group_added_and_a_step_outside_after_compiling():
    ours, expected = pair(lambda m: ProxSGD(m[0].parameters(), lr=0.05, l1=1e-2))
    step = compiled(ours[1].step)
    for number in range(6):
        for model, optimizer in (ours, expected):
            backward(model, number)
            if number == 2:
                optimizer.add_param_group({"params": list(model[4].parameters()), "l1": 1e-3})
        ours[1].step() if number == 4 else step()
        expected[1].step()
    for p, q in zip(ours[0].parameters(), expected[0].parameters(), strict=True):
        assert_same(p, q)


def test_bad_options_are_refused_when_it_runs_before_anything_changes():
    model, optimizer = pair(lambda m: ProxSGD([{"params": [p]} for p in m.parameters()], lr=0.05))[
        0
    ]
    step = compiled(optimizer.step)
    for number in range(2):
        backward(model, number)
        step()
    optimizer.param_groups[3]["lr"] = -1.0
    backward(model, 2)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"param_groups\[3\]: lr is -1.0"):
        step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert_same(p, q)


def test_a_refused_first_step_leaves_no_state():
    """The new buffers would be left unwritten and taken for momentum later."""
    model, optimizer = pair(lambda m: ProxSGD(m.parameters(), lr=-0.0))[0]
    step = compiled(optimizer.step)
    backward(model, 0)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"param_groups\[0\]: lr is -1.0"):
        step()
    assert optimizer.state_dict()["state"] == {}


def test_a_momentum_that_is_a_tensor_and_comes_to_be_zero():
    """The graph can't be guarded against it: the operator finds out before anything changes."""
    model, optimizer = pair(lambda m: ProxSGD(m.parameters(), momentum=torch.tensor(0.5)))[0]
    step = compiled(optimizer.step)
    for number in range(2):
        backward(model, number)
        step()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["momentum"].zero_()
    with pytest.raises(RuntimeError, match=r"momentum is 0.0, but was not 0 when the step"):
        step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert_same(p, q)


def test_a_start_asked_for_after_compiling():
    """The master weights are the start then, not what they round to."""
    options = {"lr": 0.05, "l1": 0.1, "master_weights": True}
    ours, expected = pair(lambda m: ProxSGD(m.named_parameters(), **options), torch.bfloat16)
    step = compiled(ours[1].step)
    take_steps(step, ours, expected, range(2))
    for _, optimizer in (ours, expected):
        optimizer.param_groups[0]["toward"] = "start"
    take_steps(step, ours, expected, range(2, 5))
    assert_same_run(ours, expected)
    state = [ours[1].state[p] for p in ours[0].parameters()]
    assert all(s["start"].dtype is torch.float32 for s in state)
    assert any((s["start"] != s["start"].bfloat16()).any() for s in state)


def test_master_weights_asked_for_after_compiling():
    ours, expected = pair(lambda m: ProxSGD(m.named_parameters(), lr=0.05), torch.bfloat16)
    step = compiled(ours[1].step)
    take_steps(step, ours, expected, range(2))
    for _, optimizer in (ours, expected):
        optimizer.param_groups[0]["master_weights"] = True
    take_steps(step, ours, expected, range(2))
    assert_same_run(ours, expected)


def test_no_state_is_left_where_there_is_none():
    """An empty entry would be taken for an initialised state, by distributed checkpoints too."""
    _, optimizer = pair(lambda m: ProxSGD(m.parameters(), lr=0.05))[0]
    compiled(optimizer.step)()  # no gradients yet
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("dynamic", [None, True])
def test_several_optimizers_in_one_process(dynamic):
    for _ in range(3):
        ours, expected = pair(lambda m: ProxSGD(m.parameters(), lr=0.05, l1=1e-2))
        step = compiled(ours[1].step, dynamic=dynamic)
        take_steps(step, ours, expected, range(3))
        assert_same_run(ours, expected)


def test_a_closure_and_hooks():
    ours, expected = pair(lambda m: ProxSGD(m.parameters(), lr=0.05, l1=1e-2))
    called = []
    for _, optimizer in (ours, expected):
        optimizer.register_step_post_hook(lambda *_: called.append(1))

    def step_of(model, optimizer):
        return lambda: optimizer.step(lambda: sum(p.sum() for p in model.parameters()))

    step, other = torch.compile(step_of(*ours), backend=BACKEND), step_of(*expected)
    for number in range(3):
        for model, _ in (ours, expected):
            backward(model, number)
        torch.testing.assert_close(step(), other())
    assert_same_run(ours, expected)
    assert len(called) == 6


def test_the_optimizer_can_be_collected():
    model, optimizer = pair(lambda m: ProxSGD(m.parameters(), lr=0.05))[0]
    step = compiled(lambda o: o.step())
    backward(model, 0)
    step(optimizer)
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("fused", [None, True])
def test_a_real_grad_scaler_around_a_compiled_step(fused):
    """The scaler looks at values, which breaks the graph; the first step may be skipped."""

    def train(compile_it):
        model = net()
        optimizer = ProxSGD(model.parameters(), lr=0.05, l1=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)

        def update():
            scaler.step(optimizer)
            scaler.update()

        run = torch.compile(update, backend=BACKEND) if compile_it else update
        scales = []
        for number in range(6):
            model.zero_grad()
            images = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(number))
            scaler.scale(cross_entropy(model(images), torch.arange(6) % 5)).backward()
            if number in (0, 3):
                model[0].weight.grad[0, 0, 0, 0] = float("inf")
            run()
            scales.append(scaler.get_scale())
        return (model, optimizer), scales

    ours, scales = train(True)
    expected, expected_scales = train(False)
    assert scales == expected_scales
    assert len(set(scales)) > 1
    assert_same_run(ours, expected)


def test_opcheck():
    from resnet_reg_ext.backends.op import prox_sgd_step

    plan = {
        "where": "",
        "options": {
            **{"momentum": 0.5, "dampening": 0.0, "weight_decay": 0.1, "l1": 0.01},
            **{"nesterov": False, "l2_mode": "coupled", "maximize": False, "frozen_zeros": False},
            **{"fused": None, "capturable": False},
        },
        "tensor_options": ["lr"],
        "buckets": [
            {
                "names": ["first", "second"],
                **{"first_step": False, "momentum": True, "master": False, "start": True},
            }
        ],
    }
    params = [torch.ones(3, 2), torch.ones(4)]
    arguments = (
        json.dumps([plan]),
        params,
        [torch.full_like(p, 0.3) for p in params],
        [torch.full_like(p, 0.1) for p in params],
        [],
        [torch.full_like(p, 0.9) for p in params],
        [torch.tensor(0.5)],
        None,
        torch.tensor(0.5),
        None,
    )
    assert isinstance(prox_sgd_step, torch.library.CustomOpDef)
    results = torch.library.opcheck(
        torch.ops.resnet_reg_ext.prox_sgd_step.default, copy.deepcopy(arguments)
    )
    assert set(results.values()) == {"SUCCESS"}


def test_importing_the_package_does_not_import_the_compiler():
    """It takes two seconds."""
    code = "import resnet_reg_ext, sys; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
