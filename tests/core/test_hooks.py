"""The step's hooks and its range in profiles, as every torch optimizer has them."""

import json
from functools import partial

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from resnet_reg_ext import ProxSGD

KINDS = {"ours": partial(ProxSGD, l1=0.0), "torch": torch.optim.SGD}


@pytest.fixture(params=KINDS)
def optimizer(request):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return KINDS[request.param]([p], lr=0.5, momentum=0.9, weight_decay=0.0)


def test_hooks_of_all_kinds_run_in_the_order_of_torch(optimizer):
    seen = []
    p = optimizer.param_groups[0]["params"][0]

    def note(name):
        return lambda o, args, kwargs: seen.append((name, o is optimizer, p[0].item()))

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [
        ("global pre", True, 1.0),
        ("pre", True, 1.0),
        ("post", True, 0.5),
        ("global post", True, 0.5),
    ]
    optimizer.step()
    assert len(seen) == 4  # and none once they are removed


@pytest.mark.parametrize("register", ["pre", "post", "global pre", "global post"])
def test_each_hook_alone_is_enough_to_be_called(optimizer, register):
    seen = []
    how = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[register]
    optimizer.step()
    handle = how(lambda o, args, kwargs: seen.append(o))
    try:
        optimizer.step()
    finally:
        handle.remove()
    assert seen == [optimizer]


def test_a_pre_hook_may_replace_the_arguments():
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    optimizer = ProxSGD([p], lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.0)
    optimizer.register_step_pre_hook(
        lambda o, args, kwargs: (args, {**kwargs, "grad_coefficient": 0.25})
    )
    optimizer.step()
    assert p.item() == 0.75


def test_a_hook_that_a_closure_registers_is_called(optimizer):
    seen = []

    def closure():
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(kwargs))
        return 1.0

    assert optimizer.step(closure) == 1.0
    assert optimizer.step(closure=closure) == 1.0
    assert len(seen) == 3  # one in the first step, two in the second


def ranges(events):
    return [e.name for e in events if e.name.startswith("Optimizer.step")]


def test_a_profile_shows_the_step_under_its_name(optimizer):
    name = type(optimizer).__name__
    optimizer.step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        optimizer.step()
    assert ranges(profile.events()) == [f"Optimizer.step#{name}.step"] * 2
    assert all(e.is_user_annotation for e in profile.events() if e.name.startswith("Optimizer."))
    optimizer.step()  # outside of it
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
    assert ranges(profile.function_events) == [f"Optimizer.step#{name}.step"]


def test_an_execution_trace_shows_the_step_under_its_name(optimizer, tmp_path):
    """What watches without a profiler sees the range too."""
    observer = torch.profiler.ExecutionTraceObserver()
    observer.register_callback(str(tmp_path / "trace.json"))
    observer.start()
    optimizer.step()
    observer.stop()
    observer.unregister_callback()
    nodes = json.loads((tmp_path / "trace.json").read_text())["nodes"]
    name = f"Optimizer.step#{type(optimizer).__name__}.step"
    assert [n["name"] for n in nodes if n["name"].startswith("Optimizer")] == [name]


def test_an_error_in_the_step_leaves_no_range_open():
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = ProxSGD([p], lr=0.5, momentum=0.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match=r"lr is -1\.0") as raised:
            optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
    assert raised  # the traceback, and what it holds, lived through the second step
    steps = [e.time_range for e in profile.events() if e.name.startswith("Optimizer.step")]
    assert len(steps) == 2
    assert steps[0].end <= steps[1].start


def test_a_subclass_with_a_step_of_its_own():
    class Halving(ProxSGD):
        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.mul_(0.5)
            return closure and closure()

    p = torch.nn.Parameter(torch.ones(2))
    optimizer = Halving([p])
    seen = []
    optimizer.step()
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(p.tolist()))
    assert optimizer.step(lambda: 3.0) == 3.0
    assert seen == [[0.25, 0.25]]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert ranges(profile.events()) == ["Optimizer.step#Halving.step"]
    assert (type(optimizer).step.__name__, type(optimizer).step.hooked) == ("step", True)
