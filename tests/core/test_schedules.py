"""What changes l1 while training, and torch's own schedulers of lr."""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from reference import assert_same
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from resnet_reg_ext import L1Scheduler, ProxSGD, TargetSparsity, param_groups, sparsity

# ---------------------------------------------------------------------------------------------
# torch's schedulers

LR_SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 7], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.25, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.25, total_iters=7),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 8)],
        milestones=[4],
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=13),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10, power=2.0),
}


def test_no_scheduler_of_torch_is_forgotten():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} == set(LR_SCHEDULERS)


def loss_of(number):
    """Falls, stays and falls again, so that a plateau is found."""
    return (3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5)[number]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_scheduler_of_torch_gives_the_trajectory_of_torchs_sgd(name, fused):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator) for size in ((9,), (3, 5))]
    noise = torch.randn(12, 9, generator=generator)
    lists = [[nn.Parameter(t.clone()) for t in start] for _ in range(2)]
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}
    optimizers = (
        ProxSGD([{"params": [p]} for p in lists[0]], **options, l1=0.0, fused=fused),
        torch.optim.SGD([{"params": [p]} for p in lists[1]], **options, foreach=False),
    )
    schedulers = [LR_SCHEDULERS[name](o) for o in optimizers]
    rates = set()
    for number in range(12):
        for params, optimizer, scheduler in zip(lists, optimizers, schedulers, strict=True):
            params[0].grad = params[0].detach() * 1.7 + noise[number]
            params[1].grad = params[1].detach() * 0.3 - 1
            optimizer.step()
            metric = [loss_of(number)] if name == "ReduceLROnPlateau" else []
            scheduler.step(*metric)
        for ours, theirs in zip(*lists, strict=True):
            assert_same(ours, theirs, f"step {number}")
        rates.add(optimizers[0].param_groups[0]["lr"])
    assert len(rates) > 1


# ---------------------------------------------------------------------------------------------
# L1Scheduler


def optimizer_with(*coefficients, lr=0.1):
    return ProxSGD([{"params": [nn.Parameter(torch.ones(3))], "l1": c} for c in coefficients], lr)


def values(optimizer):
    return [group["l1"] for group in optimizer.param_groups]


def follow(optimizer, schedule, steps):
    """The first group's l1, from construction on."""
    seen = [optimizer.param_groups[0]["l1"]]
    for _ in range(steps):
        optimizer.step()
        schedule.step()
        seen.append(optimizer.param_groups[0]["l1"])
    return seen


def test_warm_up():
    optimizer = optimizer_with(0.8)
    seen = follow(
        optimizer,
        L1Scheduler(optimizer, lr_scheduler.LinearLR, start_factor=0.25, total_iters=3),
        5,
    )
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rel=1e-12)


def test_cosine():
    optimizer = optimizer_with(0.8)
    seen = follow(optimizer, L1Scheduler(optimizer, lr_scheduler.CosineAnnealingLR, T_max=10), 10)
    expected = [0.4 * (1 + math.cos(math.pi * t / 10)) for t in range(11)]
    assert seen == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_warm_up_and_then_steps():
    def schedule(o):
        parts = [lr_scheduler.LinearLR(o, 0.5, total_iters=2), lr_scheduler.StepLR(o, 2)]
        return lr_scheduler.SequentialLR(o, parts, milestones=[2])

    optimizer = optimizer_with(0.8)
    seen = follow(optimizer, L1Scheduler(optimizer, schedule), 7)
    assert seen == pytest.approx([0.4, 0.6, 0.8, 0.8, 0.08, 0.08, 0.008, 0.008], rel=1e-9)


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_moves_l1_as_each_scheduler_of_torch_moves_lr(name):
    """Bit by bit what the same scheduler makes of an lr of that value, or of lr itself."""
    optimizer = optimizer_with(0.02, 0.0, 0.04)
    other = torch.optim.SGD([{"params": [torch.ones(1)], "lr": lr} for lr in (0.02, 0.04)])
    schedule, expected = L1Scheduler(optimizer, LR_SCHEDULERS[name]), LR_SCHEDULERS[name](other)
    for number in range(12):
        assert [optimizer.param_groups[i]["l1"] for i in (0, 2)] == [
            group["lr"] for group in other.param_groups
        ]
        assert schedule.get_lr() == schedule._last_lr == [g["lr"] for g in other.param_groups]
        # Not every class of torch has base_lrs.
        assert schedule.base_lrs == getattr(expected, "base_lrs", schedule.base_lrs)
        metric = [loss_of(number)] if name == "ReduceLROnPlateau" else []
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as that the optimizer has not stepped
            # torch 2.5's SequentialLR warns of how it calls its own parts.
            warnings.filterwarnings("ignore", message="The epoch parameter")
            optimizer.step()
            schedule.step(*metric)
            other.step()
            expected.step(*metric)
    assert optimizer.param_groups[1]["l1"] == 0
    assert all(g["lr"] == 0.1 and g["momentum"] == 0.9 for g in optimizer.param_groups)


def test_groups_keep_their_initial_value_and_their_own_schedule():
    optimizer = optimizer_with(0.1, 0.0, 0.2)
    schedule = L1Scheduler(
        optimizer, lr_scheduler.LambdaLR, lr_lambda=[lambda t: 2.0**t, lambda t: 3.0**t]
    )
    optimizer.step()
    schedule.step()
    assert values(optimizer) == [0.2, 0.0, pytest.approx(0.6)]
    assert schedule.get_last_l1() == [0.2, pytest.approx(0.6)]
    assert [g.get("initial_l1") for g in optimizer.param_groups] == [0.1, None, 0.2]


def test_a_floor_does_not_regularise_groups_without_l1():
    """Cosine down to 0.05 would lift a 0 up to it."""
    optimizer = optimizer_with(0.1, 0.0)
    schedule = L1Scheduler(optimizer, lr_scheduler.CosineAnnealingLR, T_max=4, eta_min=0.05)
    follow(optimizer, schedule, 4)
    assert values(optimizer) == [pytest.approx(0.05), 0.0]


def test_an_l1_that_is_a_tensor_is_changed_in_place():
    """So that a captured graph, which reads it, follows."""
    l1 = torch.tensor(0.5)
    optimizer = ProxSGD([nn.Parameter(torch.ones(3))], l1=l1)
    schedule = L1Scheduler(optimizer, lr_scheduler.ExponentialLR, gamma=0.5)
    follow(optimizer, schedule, 2)
    assert optimizer.param_groups[0]["l1"] is l1
    assert l1.item() == 0.125
    TargetSparsity(optimizer, 0.9, steps=10).step()
    assert optimizer.param_groups[0]["l1"] is l1
    assert l1.item() > 0.125


@pytest.mark.parametrize("l1", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
def test_a_schedule_that_rounding_takes_below_0_ends_at_0(l1):
    optimizer = ProxSGD([nn.Parameter(torch.ones(3))], l1=l1)
    schedule = L1Scheduler(
        optimizer, lr_scheduler.LinearLR, start_factor=0.3, end_factor=0.0, total_iters=3
    )
    for _ in range(3):
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
        schedule.step()
    assert schedule._stand_in.param_groups[0]["lr"] < 0  # or this shows nothing
    assert values(optimizer) == [0.0]
    optimizer.step()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_an_lr_that_rounding_takes_below_0_counts_as_0(fused, as_tensor):
    """LinearLR down to 0 multiplies its way there; torch's SGD goes on, and so does ProxSGD."""
    p = nn.Parameter(torch.tensor([0.5, 0.0]))
    lr = torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1
    optimizer = ProxSGD([p], lr, l1=0.01, fused=fused)
    schedule = lr_scheduler.LinearLR(optimizer, end_factor=0.0, total_iters=4)
    for _ in range(4):
        p.grad = torch.tensor([1.0, 1e-3])
        optimizer.step()
        schedule.step()
    assert -1e-15 < optimizer.param_groups[0]["lr"] < 0  # or this shows nothing
    before = p.detach().clone()
    p.grad = torch.tensor([1.0, 1e-3])
    optimizer.step()
    assert_same(p, before)
    assert p[1] == 0


def test_an_lr_below_0_is_refused_under_a_schedule_too():
    p = nn.Parameter(torch.ones(2))
    optimizer = ProxSGD([p], 0.1)
    schedule = lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - 1.001 * epoch)
    optimizer.step()
    schedule.step()
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"lr is -9\.99.*e-05: must be finite and not negative"):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0]


def test_a_schedule_of_another_optimizer_is_refused():
    """It would move lr, and l1 would stay."""
    optimizer = optimizer_with(0.1)
    with pytest.raises(TypeError, match="schedule made a ExponentialLR: must make a scheduler of"):
        L1Scheduler(optimizer, lambda _: lr_scheduler.ExponentialLR(optimizer, 0.5))
    with pytest.raises(TypeError, match="schedule made a NoneType: must make a scheduler of"):
        L1Scheduler(optimizer, lambda _: None)


def test_chaining_by_torch_is_refused_and_the_right_way_told():
    optimizer = optimizer_with(0.1)
    lr_scheduler.StepLR(optimizer, 5)  # leaves the initial lr that SequentialLR asks for
    parts = [L1Scheduler(optimizer, lr_scheduler.StepLR, step_size=2) for _ in range(2)]
    with pytest.raises(TypeError, match=r"L1Scheduler\(optimizer, lambda o: SequentialLR\(o"):
        lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


@pytest.mark.parametrize("make", [L1Scheduler, TargetSparsity])
def test_an_l1_in_whole_numbers_can_not_be_moved(make):
    optimizer = ProxSGD([nn.Parameter(torch.ones(3))], l1=torch.tensor(1))
    options = {"schedule": lr_scheduler.StepLR} if make is L1Scheduler else {"steps": 10}
    with pytest.raises(TypeError, match=r"param_groups\[0\]: l1 is a tensor of torch.int64"):
        make(optimizer, **options)


def test_beside_a_scheduler_of_lr():
    optimizer = optimizer_with(0.1)
    schedules = [
        L1Scheduler(optimizer, lr_scheduler.ExponentialLR, gamma=0.5),
        lr_scheduler.ExponentialLR(optimizer, 0.25),
    ]
    for _ in range(2):
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert (optimizer.param_groups[0]["l1"], optimizer.param_groups[0]["lr"]) == (0.025, 0.00625)


def test_the_step_uses_the_scheduled_l1():
    optimizer = ProxSGD(
        [nn.Parameter(torch.ones(3))], lr=1.0, momentum=0.0, weight_decay=0.0, l1=0.25
    )
    schedule = L1Scheduler(optimizer, lr_scheduler.StepLR, step_size=1, gamma=0.5)
    p = optimizer.param_groups[0]["params"][0]
    for expected in (0.75, 0.625, 0.5625):
        p.grad = torch.zeros(3)
        optimizer.step()
        schedule.step()
        assert p.tolist() == [expected] * 3


def resumed(state, make_schedule, coefficients, l1_of_a_new_one=0.7):
    """A new optimizer and schedule that have loaded a pickled checkpoint."""
    optimizer_state, schedule_state = pickle.loads(pickle.dumps(state))
    optimizer = optimizer_with(*(l1_of_a_new_one if c else 0.0 for c in coefficients))
    schedule = make_schedule(optimizer)
    optimizer.load_state_dict(optimizer_state)
    schedule.load_state_dict(schedule_state)
    return optimizer, schedule


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_resuming_goes_on_as_if_nothing_had_happened(name):
    optimizer = optimizer_with(0.1, 0.0, 0.2)
    schedule = L1Scheduler(optimizer, LR_SCHEDULERS[name])

    def step(optimizer, schedule, number):
        optimizer.step()
        schedule.step(*([loss_of(number)] if name == "ReduceLROnPlateau" else []))

    for number in range(5):
        step(optimizer, schedule, number)
    again, schedule_again = resumed(
        (optimizer.state_dict(), schedule.state_dict()),
        lambda o: L1Scheduler(o, LR_SCHEDULERS[name]),
        (0.1, 0.0, 0.2),
    )
    assert values(again) == values(optimizer)
    for number in range(5, 11):
        step(optimizer, schedule, number)
        step(again, schedule_again, number)
        assert values(again) == values(optimizer)
    assert schedule_again.last_epoch == 11


@pytest.mark.parametrize("name", ["LinearLR", "LambdaLR", "OneCycleLR"])
def test_resuming_where_the_optimizer_was_loaded_before_the_schedule_was_made(name):
    optimizer = optimizer_with(0.1)
    schedule = L1Scheduler(optimizer, LR_SCHEDULERS[name])
    follow(optimizer, schedule, 5)
    again = optimizer_with(0.1)
    again.load_state_dict(optimizer.state_dict())
    schedule_again = L1Scheduler(again, LR_SCHEDULERS[name])  # sets the first l1
    schedule_again.load_state_dict(schedule.state_dict())
    assert values(again) == values(optimizer)
    assert follow(again, schedule_again, 4) == follow(optimizer, schedule, 4)


def test_resuming_where_a_schedule_had_come_to_zero():
    """Made after the optimizer's checkpoint is loaded, it knows its group by the initial l1."""
    optimizer = optimizer_with(0.1, 0.0)
    schedule = L1Scheduler(optimizer, lr_scheduler.CosineAnnealingWarmRestarts, T_0=4)
    follow(optimizer, schedule, 3)
    optimizer.param_groups[0]["l1"] = 0.0
    again = optimizer_with(0.1, 0.0)
    again.load_state_dict(optimizer.state_dict())
    schedule_again = L1Scheduler(again, lr_scheduler.CosineAnnealingWarmRestarts, T_0=4)
    schedule_again.load_state_dict(schedule.state_dict())
    again.step()
    schedule_again.step()
    assert values(again) == [0.1, 0.0]


def test_state_of_other_groups_is_refused():
    state = L1Scheduler(optimizer_with(0.1, 0.0), lr_scheduler.StepLR, step_size=1).state_dict()
    other = L1Scheduler(optimizer_with(0.0, 0.1), lr_scheduler.StepLR, step_size=1)
    with pytest.raises(ValueError, match=r"param_groups \[0\], but those with an l1 are \[1\]"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: L1Scheduler(o, lr_scheduler.StepLR, step_size=1),
        lambda o: TargetSparsity(o, 0.5, steps=10),
    ],
    ids=["L1Scheduler", "TargetSparsity"],
)
def test_what_can_not_be_steered_is_refused(make):
    with pytest.raises(ValueError, match="no parameter group has an l1 above 0"):
        make(optimizer_with(0.0))
    # param_groups leaves an l1 in its groups, which SGD keeps and does nothing with.
    for options in ({}, {"l1": 0.1}):
        with pytest.raises(TypeError, match="torch's SGD, which applies no l1: must be ProxSGD"):
            make(torch.optim.SGD([{"params": [torch.ones(1)], **options}], lr=0.1))
    with pytest.raises(TypeError, match="optimizer is a Linear: must be ProxSGD"):
        make(nn.Linear(1, 1))


# ---------------------------------------------------------------------------------------------
# Both, to programs that know torch's schedulers

BOTH = {
    "L1Scheduler": lambda o: L1Scheduler(o, lr_scheduler.StepLR, step_size=2),
    "TargetSparsity": lambda o: TargetSparsity(o, 0.5, steps=10),
}


@pytest.fixture(params=BOTH)
def make(request):
    return BOTH[request.param]


def test_has_what_every_scheduler_of_torch_has(make):
    scheduler = make(optimizer_with(0.1, 0.0, 0.2))
    theirs = lr_scheduler.LambdaLR(optimizer_with(0.1), lambda epoch: 1.0)
    of_all = set(dir(theirs)) - {"lr_lambdas", "verbose"}  # verbose is only in older torch
    assert [name for name in of_all if not hasattr(scheduler, name)] == []
    assert scheduler.base_lrs == [0.1, 0.2]
    assert scheduler._step_count == theirs._step_count == 1
    for _ in range(3):
        scheduler.optimizer.step()
        scheduler.step()
    assert scheduler._step_count == 4
    assert scheduler.get_lr() == scheduler.get_last_lr() == scheduler.get_last_l1()


def test_what_is_about_to_set_lr_to_l1_is_told_how_to_step(make):
    """This flag is set by torch and others around get_lr, where they set lr to its values."""
    scheduler = make(optimizer_with(0.1, 0.2))
    scheduler._get_lr_called_within_step = True
    with pytest.raises(TypeError, match=r"moves l1: .* step\(\) after each optimizer.step"):
        scheduler.get_lr()
    assert scheduler.get_lr() == [0.1, 0.2]


@pytest.mark.one_torch
def test_ignites_wrapper_does_not_set_lr_to_l1(make):
    handlers = pytest.importorskip("ignite.handlers")
    scheduler = make(optimizer_with(0.01))
    wrapper = handlers.LRScheduler(scheduler)
    with pytest.raises(TypeError, match=r"with pytorch-ignite: trainer.add_event_handler\("):
        wrapper(None)
    assert scheduler.optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.one_torch
def test_ignite_steps_it_as_it_is_told(make):
    engine = pytest.importorskip("ignite.engine")
    expected, optimizer = optimizer_with(0.01), optimizer_with(0.01)
    scheduler = make(optimizer)
    trainer = engine.Engine(lambda engine, batch: optimizer.step())
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, lambda engine: scheduler.step())
    trainer.run(range(5))
    follow(expected, make(expected), 5)
    assert values(optimizer) == values(expected) != [0.01]


@pytest.mark.one_torch
def test_accelerates_wrapper_counts_the_steps_that_it_leaves_out(make, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    # GradientAccumulationPlugin(adjust_scheduler=True) doesn't come to it, as True is its default.
    monkeypatch.setitem(accelerator.gradient_state.plugin_kwargs, "adjust_scheduler", True)
    optimizer = optimizer_with(0.01)
    model = nn.Linear(1, 1)
    scheduler = make(optimizer)
    wrapped, stepper = accelerator.prepare(optimizer, scheduler)
    for _ in range(4):
        with accelerator.accumulate(model):
            wrapped.step()
            stepper.step()
    assert (scheduler.last_epoch, scheduler._step_count) == (2, 5)
    assert stepper.get_lr() == stepper.get_last_lr() == values(optimizer)


@pytest.mark.one_torch
@pytest.mark.filterwarnings("ignore")  # Lightning's advice on workers and loggers
def test_lightnings_monitor_logs_lr_once_under_the_name_that_both_have(make, tmp_path):
    """The monitor writes the optimizer's lr, under the name of every scheduler."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def training_step(self, batch, index):
            return self.linear(batch).square().mean()

        def on_train_batch_end(self, *_):
            _, steering = self.lr_schedulers()
            self.log("l1", steering.get_last_l1()[0])

        def configure_optimizers(self):
            optimizer = ProxSGD(self.parameters(), lr=0.1, l1=0.01)
            both = (lr_scheduler.ExponentialLR(optimizer, 0.5), make(optimizer))
            return [optimizer], [{"scheduler": s, "interval": "step", "name": "lr"} for s in both]

    monitor = lightning.pytorch.callbacks.LearningRateMonitor()
    trainer = lightning.Trainer(
        max_steps=4,
        accelerator="cpu",
        log_every_n_steps=1,
        callbacks=[monitor],
        logger=lightning.pytorch.loggers.CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(4, 2)))
    assert set(trainer.callback_metrics) == {"lr", "l1"}
    assert trainer.callback_metrics["lr"] == 0.1 * 0.5**3
    (optimizer,) = trainer.optimizers
    assert trainer.callback_metrics["l1"] == torch.tensor(optimizer.param_groups[0]["l1"])


@pytest.mark.parametrize("name", BOTH)
def test_a_state_of_version_0_1_0_is_loaded(name):
    """It has neither _step_count nor L1Scheduler's base_lrs."""
    optimizer = optimizer_with(0.01)
    scheduler = BOTH[name](optimizer)
    follow(optimizer, scheduler, 3)
    state = pickle.loads(pickle.dumps(scheduler.state_dict()))
    keys = {
        "L1Scheduler": {"groups", "l1", "last_epoch", "schedule"},
        "TargetSparsity": {
            *("groups", "last_epoch", "_start_l1", "_reached", "_start_share"),
            *("_share", "_size", "_slope", "_log_factor"),
        },
    }[name]
    old = {key: state[key] for key in keys}
    other = optimizer_with(0.01)
    again = BOTH[name](other)
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(old)
    assert again.state_dict() == state
    assert follow(other, again, 3) == follow(optimizer, scheduler, 3)


# ---------------------------------------------------------------------------------------------
# TargetSparsity


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def small_resnet():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 2),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@pytest.fixture(scope="module")
def digits():
    """200 of the 1,797 digits to train on and 400 others to test on: images, labels."""
    raw = load_digits()
    rows = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))[:600]
    images = torch.tensor(raw.images, dtype=torch.float32)[rows]  # grey levels from 0 to 16
    images = ((images - 4.9) / 6).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(raw.target)[rows]
    return (images[:200], labels[:200]), (images[200:], labels[200:])


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


REACH, END, BATCH = 400, 500, 40


def train_on_digits(digits, target, l1):
    """The share of zeros after every step, the optimizer, and the accuracy on the test images."""
    (images, labels), (test_images, test_labels) = digits
    model = small_resnet()
    optimizer = ProxSGD(param_groups(model, l1=l1, weight_decay=1e-4), lr=0.05)
    steering = TargetSparsity(optimizer, target, steps=REACH)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, END)
    shares = []
    while len(shares) < END:
        for rows in torch.randperm(200).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            steering.step()
            schedule.step()
            shares.append(steering.share)
    model.eval()
    with torch.no_grad():
        hits = model(test_images).argmax(1) == test_labels
    return shares, optimizer, hits.float().mean().item()


@pytest.mark.one_torch
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("target", "l1"), [(0.5, 1e-4), (0.8, 1e-6), (0.95, 1e-4)], ids=["0.5", "0.8", "0.95"]
)
def test_the_asked_share_of_zeros_is_reached_and_held_on_digits(digits, target, l1):
    shares, optimizer, accuracy = train_on_digits(digits, target, l1)
    assert all(abs(share - target) <= 0.01 for share in shares[REACH - 1 :])
    regularised = optimizer.param_groups[0]["params"]
    zeros = sum(int((p == 0).sum()) for p in regularised)
    assert shares[-1] == zeros / sum(p.numel() for p in regularised)
    assert [group["frozen_zeros"] for group in optimizer.param_groups] == [True, False]
    assert accuracy > 0.8


def lasso(l1, **options):
    """½‖w - a‖²: its minimiser with l1 is zero exactly where |a| <= l1."""
    a = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(torch.zeros_like(a))
    return a, ProxSGD([p], lr=0.05, weight_decay=0.0, l1=l1, **options)


def steer(optimizer, steering, a, steps):
    p = optimizer.param_groups[0]["params"][0]
    for _ in range(steps):
        p.grad = p.detach() - a
        optimizer.step()
        steering.step()
        yield float((p == 0).sum()) / p.numel()


@pytest.mark.parametrize("lr", [1e-18, 0.05], ids=["missed", "reached"])
def test_a_missed_target_is_told_once(lr):
    """Where nothing moves, as after a learning rate that has decayed, no l1 makes zeros."""
    a, optimizer = lasso(l1=0.1)
    optimizer.param_groups[0]["params"][0].data.fill_(1.0)
    optimizer.param_groups[0]["lr"] = lr
    steering = TargetSparsity(optimizer, 0.7, steps=500)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shares = list(steer(optimizer, steering, a, 520))
    messages = [str(w.message) for w in caught]
    if lr > 1e-18:
        assert abs(shares[-1] - 0.7) <= 0.01
        assert messages == []
    else:
        (message,) = messages
        assert "after 500 steps 0.0% of the weights are zero, not 70.0%" in message
        assert "l1 has come to " in message
        assert caught[0].filename == __file__


def test_a_target_that_is_missed_by_some_points_is_told():
    a, optimizer = lasso(l1=0.1)
    steering = TargetSparsity(optimizer, 0.7, steps=500)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, share in enumerate(steer(optimizer, steering, a, 500)):
            if number > 50 and share > 0.62:
                optimizer.param_groups[0]["lr"] = 1e-18
    assert 0.62 < share < 0.68
    (message,) = [str(w.message) for w in caught]
    assert f"after 500 steps {share:.1%} of the weights are zero, not 70.0%" in message


def test_tells_whether_the_target_was_reached_also_before_the_last_step():
    a, optimizer = lasso(0.01)
    steering = TargetSparsity(optimizer, 0.7, steps=400)
    assert not steering.reached
    for share in steer(optimizer, steering, a, 120):
        assert steering.reached == (abs(share - 0.7) <= 0.02)
    assert share < 0.68  # as where training is stopped early
    for share in steer(optimizer, steering, a, 280):
        assert steering.reached == (abs(share - 0.7) <= 0.02)
    assert steering.reached


def masked(p):
    p.data = torch.where(torch.arange(p.numel()) % 4 == 0, 0.0, p.data)


def averaged(p):
    p.data.copy_(torch.relu(p.data))


def through_numpy(p):
    p.detach().numpy()[:700] = 0


def by_another_process(p):
    """Hogwild: what shares the memory changes it, as here another tensor on it."""
    torch.utils.dlpack.from_dlpack(p.data).clamp_(max=0)


def loaded(p):
    nn.ParameterList([p]).load_state_dict({"0": torch.zeros(p.shape)})


UNNOTICED = [masked, averaged, through_numpy, by_another_process, loaded]


@pytest.mark.parametrize("change", UNNOTICED)
def test_changes_that_autograd_does_not_see_are_counted(change):
    p = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    optimizer = ProxSGD([p], lr=0.1, l1=1e-4, track_sparsity=True)
    steering = TargetSparsity(optimizer, 0.5, steps=10)
    p.grad = torch.full((1000,), 0.01)
    optimizer.step()
    assert sparsity(optimizer).zeros < 10
    change(p)
    steering.step()
    zeros = int((p == 0).sum())
    assert zeros > 200
    assert steering.share == zeros / 1000
    assert sparsity(optimizer).zeros == zeros


def steering_of_two(l1=0.01, steps=300):
    """Two layers of one steered group, each drawn to values of its own."""
    generator = torch.Generator().manual_seed(3)
    aims = [torch.randn(500, generator=generator) for _ in range(2)]
    params = [nn.Parameter(a.clone()) for a in aims]
    optimizer = ProxSGD(params, lr=0.05, weight_decay=0.0, l1=l1)
    steering = TargetSparsity(optimizer, 0.7, steps=steps, freeze=False)

    def step():
        for p, a in zip(params, aims, strict=True):
            p.grad = p.detach() - a if p.requires_grad else None
        optimizer.step()
        steering.step()

    return params, optimizer, steering, step


def test_a_frozen_layer_is_not_counted_and_l1_does_not_run_away():
    """It can't become sparse, so its share would raise l1 until nothing is left of the other."""
    (first, second), optimizer, steering, step = steering_of_two()
    first.requires_grad_(False)
    for _ in range(300):
        step()
    assert steering.share == pytest.approx(0.7, abs=0.02)
    assert steering.share == float((second == 0).sum()) / 500
    assert (first != 0).all()
    l1 = values(optimizer)[0]
    first.requires_grad_(True)
    for _ in range(300):
        step()
        assert values(optimizer)[0] < 1.5 * l1
    assert steering.share == pytest.approx(0.7, abs=0.02)
    assert steering.share == float((first == 0).sum() + (second == 0).sum()) / 1000


@pytest.mark.parametrize("how", ["frozen", "lr"])
def test_l1_stays_while_nothing_can_move(how):
    params, optimizer, steering, step = steering_of_two()
    for p in params:
        p.requires_grad_(how != "frozen")
    if how == "lr":
        optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(100):
        step()
    assert values(optimizer) == [0.01]
    assert steering.share is None
    for p in params:
        p.requires_grad_(True)
    optimizer.param_groups[0]["lr"] = 0.05
    for _ in range(200):
        step()
    assert steering.share == pytest.approx(0.7, abs=0.02)


def test_a_run_in_which_nothing_could_move_is_told():
    params, optimizer, _, step = steering_of_two(steps=3)
    for p in params:
        p.requires_grad_(False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(5):
            step()
    (message,) = [str(w.message) for w in caught]
    assert "in 3 steps no weight of its groups could move" in message
    assert values(optimizer) == [0.01]


@pytest.mark.filterwarnings("ignore:TargetSparsity")
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_one_count_moves_l1_fourfold_at_the_most(steps):
    a, optimizer = lasso(0.01)
    steering = TargetSparsity(optimizer, 0.9, steps=steps)
    last = 0.01
    for _ in steer(optimizer, steering, a, steps):
        assert last / 4.001 <= values(optimizer)[0] <= last * 4.001
        last = values(optimizer)[0]
    assert last > 0.01


@pytest.mark.parametrize(
    ("target", "l1", "every"),
    [
        (0.1, 1e-5, None),
        (0.5, 1e-5, None),
        (0.5, 50.0, 3),
        (0.8, 0.3, None),
        (0.95, 1e-5, 3),
        (0.95, 50.0, None),
        (0.99, 0.3, None),
    ],
)
def test_finds_the_l1_that_is_known_to_give_the_share(target, l1, every):
    """From far below and far above; without noise every step is within a point."""
    a, optimizer = lasso(l1)
    reach = 500 * (every or 1)
    steering = TargetSparsity(optimizer, target, steps=reach, every=every, freeze=False)
    shares = list(steer(optimizer, steering, a, reach * 3 // 2))
    assert max(abs(share - target) for share in shares[reach - 1 :]) <= 0.01
    lowest, highest = torch.quantile(a.abs(), torch.tensor([target - 0.01, min(target + 0.01, 1)]))
    assert lowest <= optimizer.param_groups[0]["l1"] <= highest


def test_follows_the_curve_of_zhu_and_gupta():
    a, optimizer = lasso(0.3)
    steering = TargetSparsity(optimizer, 0.8, steps=1100, begin=100, freeze=False)
    shares = list(steer(optimizer, steering, a, 1100))
    start = shares[100]
    for step in (101, 300, 500, 899, 901, 1100):
        left = max(0.0, 1 - (step - 100) / 800)
        assert steering.asked(step) == pytest.approx(0.8 + (start - 0.8) * left**3, abs=1e-9)
    assert steering.asked(0) == steering.asked(100) == pytest.approx(start, abs=1e-12)
    assert steering.share == shares[-1]


def test_leaves_l1_alone_until_begin_and_between_the_counts():
    a, optimizer = lasso(0.3)
    steering = TargetSparsity(optimizer, 0.8, steps=50, begin=20, every=5)
    changed = []
    last = 0.3
    for number, _ in enumerate(steer(optimizer, steering, a, 41), start=1):
        if optimizer.param_groups[0]["l1"] != last:
            changed.append(number)
            last = optimizer.param_groups[0]["l1"]
        assert (steering.share is None) == (number < 25)
    assert changed == [25, 30, 35, 40]


def test_groups_keep_their_ratio_and_those_without_l1_stay_without():
    a = torch.randn(500, generator=torch.Generator().manual_seed(0))
    params = [nn.Parameter(torch.zeros_like(a)) for _ in range(3)]
    groups = [{"params": [p], "l1": c} for p, c in zip(params, (0.1, 0.0, 0.3), strict=True)]
    optimizer = ProxSGD(groups, lr=0.05, weight_decay=0.0)
    steering = TargetSparsity(optimizer, 0.6, steps=300, freeze=False)
    for _ in range(400):
        for p in params:
            p.grad = p.detach() - a
        optimizer.step()
        steering.step()
    first, second, third = values(optimizer)
    assert second == 0
    assert third / first == pytest.approx(3, rel=1e-12)
    assert steering.share == pytest.approx(0.6, abs=0.01)
    assert steering.share == sparsity(optimizer).regularised.fraction


def test_freezes_the_zeros_at_the_target_and_the_others_lose_the_bias():
    a, optimizer = lasso(0.01)
    steering = TargetSparsity(optimizer, 0.7, steps=400)
    shares = list(steer(optimizer, steering, a, 800))
    assert abs(shares[399] - 0.7) <= 0.005
    assert shares[399:] == [shares[399]] * 401
    # Nothing was frozen before half the time had passed.
    assert len(set(shares[:200])) > 100
    p = optimizer.param_groups[0]["params"][0].detach()
    # Without L1 the minimiser is a itself, on the support.
    torch.testing.assert_close(p[p != 0], a[p != 0])


def test_zeros_are_frozen_once_and_not_again_where_the_user_ends_it():
    a, optimizer = lasso(0.01)
    steering = TargetSparsity(optimizer, 0.7, steps=400)
    for _ in steer(optimizer, steering, a, 400):
        pass
    assert optimizer.param_groups[0]["frozen_zeros"]
    optimizer.freeze_zeros(False)
    for _ in steer(optimizer, steering, a, 200):
        pass
    assert not optimizer.param_groups[0]["frozen_zeros"]
    assert steering.share == pytest.approx(0.7, abs=0.01)


def test_a_group_that_is_given_an_l1_later_is_neither_steered_nor_counted():
    a, optimizer = lasso(0.01)
    other = nn.Parameter(torch.ones(4000))
    optimizer.add_param_group({"params": [other], "l1": 0.0})
    steering = TargetSparsity(optimizer, 0.7, steps=400)
    optimizer.param_groups[1]["l1"] = 0.5
    *_, last = steer(optimizer, steering, a, 400)
    assert steering.share == last == pytest.approx(0.7, abs=0.005)
    assert optimizer.param_groups[1]["l1"] == 0.5
    assert not optimizer.param_groups[1]["frozen_zeros"]


def test_a_group_whose_schedule_has_ended_at_zero_can_not_be_steered():
    optimizer = optimizer_with(0.1)
    schedule = L1Scheduler(optimizer, lr_scheduler.LinearLR, end_factor=0.0, total_iters=2)
    follow(optimizer, schedule, 2)
    with pytest.raises(ValueError, match="TargetSparsity: no parameter group has an l1 above 0"):
        TargetSparsity(optimizer, 0.5, steps=10)


@pytest.mark.parametrize(
    "options", [{"steps": 9.0}, {"steps": "9"}, {"steps": 9, "begin": 0.5}, {"every": True}]
)
def test_steps_must_be_whole_numbers(options):
    with pytest.raises(TypeError, match=r"TargetSparsity: .* must be a whole number"):
        TargetSparsity(optimizer_with(0.1), **{"steps": 10, **options})


def test_waits_while_zeros_are_frozen():
    """Then l1 does nothing, and the error would move it without end."""
    a, optimizer = lasso(0.3)
    steering = TargetSparsity(optimizer, 0.8, steps=500)
    for _ in steer(optimizer, steering, a, 100):
        pass
    before = (values(optimizer), steering.share)
    optimizer.freeze_zeros()
    for _ in steer(optimizer, steering, a, 50):
        pass
    assert (values(optimizer), steering.share) == before
    optimizer.freeze_zeros(False)
    *_, last = steer(optimizer, steering, a, 500)
    assert last == pytest.approx(0.8, abs=0.01)


def test_whole_numbers_may_be_numpys():
    steering = TargetSparsity(optimizer_with(0.1), 0.5, steps=np.int64(10), every=np.int32(2))
    assert (steering.steps, steering.every) == (10, 2)


@pytest.mark.filterwarnings("ignore:TargetSparsity")  # it is resumed in mid-air
@pytest.mark.parametrize("stop", [3, 60, 150, 200, 350])
def test_steering_resumes_bit_by_bit(stop):
    a, optimizer = lasso(0.01)
    steering = TargetSparsity(optimizer, 0.7, steps=300, begin=10, every=4)
    for _ in steer(optimizer, steering, a, stop):
        pass
    checkpoint = pickle.dumps(
        (optimizer.param_groups[0]["params"][0], optimizer.state_dict(), steering.state_dict())
    )
    expected = list(steer(optimizer, steering, a, 100))

    weights, optimizer_state, steering_state = pickle.loads(checkpoint)
    again = ProxSGD([weights], l1=5.0)
    steering_again = TargetSparsity(again, 0.7, steps=300, begin=10, every=4)
    again.load_state_dict(optimizer_state)
    steering_again.load_state_dict(steering_state)
    assert list(steer(again, steering_again, a, 100)) == expected
    assert values(again) == values(optimizer)
    assert_same(weights, optimizer.param_groups[0]["params"][0], "weights")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 0.0, "steps": 10}, "target is 0.0: must be above 0 and below 1"),
        ({"target": 1.0, "steps": 10}, "target is 1.0: must be above 0 and below 1"),
        ({"target": math.nan, "steps": 10}, "target is nan: must be above 0 and below 1"),
        ({"target": "half", "steps": 10}, "target is 'half': must be above 0 and below 1"),
        ({"steps": 0}, "begin is 0 and steps is 0: begin must be"),
        ({"steps": 10, "begin": 10}, "begin is 10 and steps is 10: begin must be"),
        ({"steps": 10, "begin": -1}, "begin is -1 and steps is 10: begin must be"),
        ({"steps": 10, "every": 0}, "every is 0: must be from 1 to steps - begin, which is 10"),
        ({"steps": 10, "begin": 4, "every": 7}, "every is 7: must be from 1 to .* which is 6"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=f"TargetSparsity: {message}"):
        TargetSparsity(optimizer_with(0.1), **options)
