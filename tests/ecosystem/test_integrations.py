"""Other people's programs, unmodified. Needs the ``integration`` extra.

Where a program can be followed by hand, its weights are compared with those of a plain loop or of
torch's SGD in the same program, bit by bit.
"""

from __future__ import annotations

import re
import socket
import warnings
from pathlib import Path

import accelerate
import ddp_worker
import lightning
import pytest
import timm
import torch
import torchvision
import transformers
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from reference import assert_same
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db
from torch.utils.data import DataLoader, TensorDataset

from resnet_reg_ext import L1Scheduler, ProxSGD, TargetSparsity, param_groups, sparsity

ROOT = Path(__file__).resolve().parents[2]
SGD_OPTIONS = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-2}
BATCHES, EPOCHS = 4, 3


def prox(model, l1=0.0, **options):
    return ProxSGD(model.parameters(), **SGD_OPTIONS, l1=l1, **options)


def sgd(model):
    return torch.optim.SGD(model.parameters(), **SGD_OPTIONS, foreach=False)


@pytest.fixture(autouse=True)
def one_thread(runtime):
    """A busy machine makes two threads wait for each other at every small layer."""
    torch.set_num_threads(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def data(size=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4 * BATCHES, 3, size, size, generator=generator)
    return TensorDataset(images, torch.randint(5, (4 * BATCHES,), generator=generator))


def loader():
    return DataLoader(data(), batch_size=4)


def by_hand(make_optimizer, *, clip=None, every_step=None, together=1):
    """What the trainers do, in a loop."""
    model = net()
    optimizer = make_optimizer(model)
    schedule = CosineAnnealingLR(optimizer, EPOCHS * BATCHES // together)
    steered = every_step(optimizer) if every_step else None
    for _ in range(EPOCHS):
        for number, (images, labels) in enumerate(loader(), start=1):
            (cross_entropy(model(images), labels) / together).backward()
            if number % together:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if steered is not None:
                steered.step()
    return model


def assert_same_model(model, expected):
    for (name, tensor), other in zip(
        model.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert_same(tensor, other, name)


# ---------------------------------------------------------------------------------------------
# Lightning


class Module(lightning.LightningModule):
    def __init__(self, make_optimizer, every_step=None):
        super().__init__()
        self.model = net()
        self.make_optimizer, self.every_step = make_optimizer, every_step

    def training_step(self, batch, index):
        images, labels = batch
        return cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.model)
        schedules = [CosineAnnealingLR(optimizer, EPOCHS * BATCHES)]
        if self.every_step:
            schedules.append(self.every_step(optimizer))
        return [optimizer], [{"scheduler": s, "interval": "step"} for s in schedules]


def fit(tmp_path, module, checkpoint=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on workers, loggers and precision
        trainer = lightning.Trainer(
            **{"max_epochs": EPOCHS, **options},
            accelerator="cpu",
            devices=1,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        trainer.fit(module, loader(), ckpt_path=checkpoint)
    return trainer


STEERINGS = {
    "none": None,
    "L1Scheduler": lambda o: L1Scheduler(o, CosineAnnealingLR, T_max=20),
    "TargetSparsity": lambda o: TargetSparsity(o, 0.6, steps=10),
}


@pytest.mark.parametrize("steering", STEERINGS)
def test_lightning_gives_the_weights_of_a_plain_loop(tmp_path, steering):
    module = Module(lambda m: prox(m, l1=1e-2), STEERINGS[steering])
    fit(tmp_path, module, enable_checkpointing=False, gradient_clip_val=0.5)
    expected = by_hand(lambda m: prox(m, l1=1e-2), clip=0.5, every_step=STEERINGS[steering])
    assert_same_model(module.model, expected)
    assert sparsity(expected).zeros > 20


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("fused", [None, False])
def test_lightning_in_mixed_precision_with_clipping_as_with_torchs_sgd(tmp_path, precision, fused):
    """On CPUs Lightning's ``precision="16-mixed"`` is bfloat16; its plugin has a real scaler."""

    def train(make_optimizer):
        module = Module(make_optimizer)
        if precision == "16-mixed":
            # The start is too large for float16: the first steps are skipped.
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
            options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        else:
            options = {"precision": precision}
        trainer = fit(
            tmp_path, module, enable_checkpointing=False, gradient_clip_val=0.5, **options
        )
        return module.model, trainer

    ours, trainer = train(lambda m: prox(m, fused=fused))
    theirs, _ = train(sgd)
    assert_same_model(ours, theirs)
    if precision == "16-mixed":
        assert 0 < trainer.precision_plugin.scaler.get_scale() < 2.0**24
    sparse, _ = train(lambda m: prox(m, l1=2e-2, fused=fused))
    assert sparsity(sparse).zeros > 20


@pytest.mark.parametrize("steering", STEERINGS)
def test_lightning_resumes_from_a_checkpoint(tmp_path, steering):
    def new():
        return Module(lambda m: prox(m, l1=1e-2), STEERINGS[steering])

    whole, first, second = new(), new(), new()
    fit(tmp_path, whole, enable_checkpointing=False)
    trainer = fit(tmp_path, first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")
    fit(tmp_path, second, checkpoint=tmp_path / "epoch.ckpt")
    assert_same_model(second.model, whole.model)


# ---------------------------------------------------------------------------------------------
# Hugging Face


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = net()

    def forward(self, pixels, labels):
        logits = self.model(pixels)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class InOrder(transformers.Trainer):
    """Without the shuffling, so that a plain loop sees the same batches."""

    def _get_train_sampler(self, *arguments):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def hugging_face(
    tmp_path, make_optimizer, every_step=None, resume=None, trainer=InOrder, **options
):
    model = WithLoss()
    optimizer = make_optimizer(model)
    schedule = CosineAnnealingLR(optimizer, EPOCHS * BATCHES)
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=4,
        max_grad_norm=0.5,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )
    rows = [{"pixels": image, "labels": label} for image, label in data()]
    trainer = trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=resume)
    return model.model


def test_hugging_face_trainer_gives_the_weights_of_a_plain_loop(tmp_path):
    model = hugging_face(tmp_path, lambda m: prox(m, l1=1e-2))
    assert_same_model(model, by_hand(lambda m: prox(m, l1=1e-2), clip=0.5))
    assert sparsity(model).zeros > 20


def test_hugging_face_trainer_as_with_torchs_sgd_shuffling_included(tmp_path):
    results = [
        hugging_face(tmp_path, make, trainer=transformers.Trainer, bf16=True)
        for make in (prox, sgd)
    ]
    assert_same_model(*results)


def test_hugging_face_trainer_makes_the_optimizer_and_resumes(tmp_path):
    def train(folder, **options):
        model = WithLoss()
        arguments = transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=4,
            num_train_epochs=EPOCHS,
            save_strategy="epoch",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        rows = [{"pixels": image, "labels": label} for image, label in data()]
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=rows,
            optimizer_cls_and_kwargs=(ProxSGD, {**SGD_OPTIONS, "l1": 1e-2}),
        )
        trainer.train(**options)
        assert isinstance(trainer.optimizer.optimizer, ProxSGD)
        return model

    whole = train(tmp_path)
    resumed = train(tmp_path, resume_from_checkpoint=str(tmp_path / f"checkpoint-{BATCHES}"))
    assert_same_model(resumed, whole)
    assert sparsity(whole).zeros > 20


@pytest.mark.parametrize("steering", ["L1Scheduler", "TargetSparsity"])
def test_accelerate_loop_gives_the_weights_of_a_plain_one(tmp_path, steering):
    model = net()
    optimizer = prox(model, l1=1e-2)
    schedule = CosineAnnealingLR(optimizer, EPOCHS * BATCHES // 2)
    steered = STEERINGS[steering](optimizer)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, schedule, batches = accelerator.prepare(model, optimizer, schedule, loader())
    accelerator.register_for_checkpointing(steered)

    def epoch():
        for images, labels in batches:
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(images), labels))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            if accelerator.sync_gradients:
                steered.step()

    epoch()
    accelerator.save_state(str(tmp_path))
    epoch()
    accelerator.load_state(str(tmp_path))  # what has happened since is undone
    for _ in range(1, EPOCHS):
        epoch()
    expected = by_hand(
        lambda m: prox(m, l1=1e-2), clip=0.5, every_step=STEERINGS[steering], together=2
    )
    assert_same_model(accelerator.unwrap_model(model), expected)
    assert sparsity(expected).zeros > 20


def test_accelerate_is_told_of_a_step_that_an_infinity_skipped():
    """It learns that from whether ``step`` was called, and leaves its schedules alone then."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = net()
    optimizer = prox(model, l1=1e-2)
    # As Accelerator.prepare makes it on a GPU; on a CPU it knows no float16.
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    schedule = AcceleratedScheduler(ExponentialLR(optimizer, 0.5), wrapped)
    skipped, rates = [], []
    for number, (images, labels) in enumerate(loader()):
        wrapped.zero_grad()
        scaler.scale(cross_entropy(model(images), labels)).backward()
        if number == 1:
            model[0].weight.grad[0, 0, 0, 0] = float("inf")
        wrapped.step()
        schedule.step()
        skipped.append(wrapped.step_was_skipped)
        rates.append(optimizer.param_groups[0]["lr"])
    assert accelerator.device.type == "cpu"
    assert skipped == [number == 1 for number in range(BATCHES)]
    assert rates[1] == rates[0] == 0.5 * SGD_OPTIONS["lr"] > rates[2]


# ---------------------------------------------------------------------------------------------
# timm, torchvision, averages


def timm_run(make_optimizer):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=5)
    optimizer = make_optimizer(model)
    average = ModelEmaV3(model, decay=0.9)
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=EPOCHS, warmup_epochs=1, updates_per_epoch=BATCHES
    )
    images, labels = data(size=32).tensors
    for epoch in range(2):
        for x, y in zip(images.split(8), labels.split(8), strict=True):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
            average.update(model)
        schedule.step(epoch + 1)
    return model, average, optimizer


def test_timm_model_schedule_and_average_as_with_torchs_sgd():
    model, average, optimizer = timm_run(prox)
    expected, expected_average, expected_optimizer = timm_run(sgd)
    assert_same_model(model, expected)
    assert_same_model(average, expected_average)
    rate = optimizer.param_groups[0]["lr"]
    assert rate == expected_optimizer.param_groups[0]["lr"] != SGD_OPTIONS["lr"]


def test_timm_model_becomes_sparse():
    model, _, optimizer = timm_run(
        lambda m: ProxSGD(param_groups(m, l1=1e-2, weight_decay=1e-4), lr=0.05)
    )
    assert sparsity(optimizer).regularised.fraction > 0.05
    norms = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((weight != 0).all() for weight in norms)


def test_torchvisions_resnet50_as_with_torchs_sgd():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])
    models = []
    for make_optimizer in (prox, sgd):
        torch.manual_seed(0)
        model = torchvision.models.resnet50(num_classes=10)
        optimizer = make_optimizer(model)
        for _ in range(2):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        models.append(model)
    assert_same_model(*models)


@pytest.mark.parametrize(
    "options",
    [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}],
    ids=["equal weights", "exponential"],
)
def test_weight_averaging_as_with_torchs_sgd(options):
    averages = []
    for make_optimizer in (prox, sgd):
        model = net()
        optimizer = make_optimizer(model)
        average = AveragedModel(model, **options)
        schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
        for images, labels in loader():
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
        update_bn(loader(), average)
        averages.append(average)
    assert_same_model(*averages)
    assert not torch.equal(averages[0].module[0].weight, net()[0].weight)


# ---------------------------------------------------------------------------------------------
# torch's own tests of its optimizers

SGD_INFO = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
# What torch's SGD has by default and ProxSGD has not.
SGD_DEFAULTS = {"momentum": 0.0, "weight_decay": 0.0, "l1": 0.0}
# The same refusals in other words.
WORDS = {
    "Tensor lr must be 1-element": r"lr is a tensor of shape \(2,\): must be a number",
    "Invalid momentum value: -0.5": r"momentum is -0.5: must be finite and not negative",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    "case", SGD_INFO.optim_inputs_func(device="cpu"), ids=lambda case: case.desc
)
def test_torchs_inputs_for_sgd(case, fused, dtype):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(size, generator=generator, dtype=dtype) for size in ((10, 5), (10,), ())]
    lists = [[nn.Parameter(t.clone()) for t in start] for _ in range(2)]
    optimizers = (
        ProxSGD(lists[0], **{**SGD_DEFAULTS, **case.kwargs}, fused=fused),
        torch.optim.SGD(lists[1], **case.kwargs, foreach=False),
    )
    for number in range(8):
        for params, optimizer in zip(lists, optimizers, strict=True):
            for i, p in enumerate(params):
                # One has no gradient for a while, as in torch's own test.
                p.grad = None if i == 1 and number in (0, 4) else p.detach() * 1.3 + number - 3
            optimizer.step()
        for ours, theirs in zip(*lists, strict=True):
            assert_same(ours, theirs, f"step {number}")


def error_cases():
    return SGD_INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("case", error_cases(), ids=lambda case: case.optimizer_error_input.desc)
def test_torchs_error_inputs_for_sgd(case):
    assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = case.optimizer_error_input
    params = [nn.Parameter(torch.randn(2, 3))] if given.params is None else given.params
    message = WORDS.get(case.error_regex, case.error_regex)
    error = case.error_type
    if issubclass(error, Warning):
        # torch still warns of a parameter that is listed twice; here it is an error.
        error = ValueError
        message = "is the same parameter as"
    with pytest.raises(error, match=message):
        ProxSGD(params, **{**SGD_DEFAULTS, **given.kwargs})


# ---------------------------------------------------------------------------------------------
# The page


def sections():
    """The page's first block, and the blocks of each section by its title: (words, code)."""
    text = (ROOT / "docs" / "integrations.md").read_text()
    before, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    blocks = re.compile(r"^```python *(.*)\n([\s\S]*?)^```$", re.MULTILINE)
    ((_, setup),) = blocks.findall(before)
    found = {}
    for part in parts:
        title = part.splitlines()[0]
        assert part.count("```") == 2 * len(blocks.findall(part)), f"{title}: a block unlike others"
        found[title] = blocks.findall(part)
    return setup, found


SETUP, SECTIONS = sections()


def is_for(word, title):
    """Whether a section's blocks are marked for torchrun or cuda."""
    return any(words == f"{{ .{word} }}" for words, _ in SECTIONS[title])


def code_of(title):
    return "\n\n".join([SETUP, *(code for _, code in SECTIONS[title])])


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(
            title,
            marks=pytest.mark.skipif(
                is_for("cuda", title) and not torch.cuda.is_available(), reason="torch finds no GPU"
            ),
        )
        for title, blocks in SECTIONS.items()
        if blocks and not is_for("torchrun", title)
    ],
)
def test_the_page_runs_as_it_stands(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stepped = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(optimizer))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
            exec(compile(code_of(title), f"docs/integrations.md, {title}", "exec"), {})
    finally:
        hook.remove()
    assert any(isinstance(optimizer, ProxSGD) for optimizer in stepped)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_what_the_page_starts_with_torchrun_runs_as_it_stands(tmp_path):
    """In one start for all sections, as starting takes longer than they do."""
    titles = [title for title in SECTIONS if is_for("torchrun", title)]
    # torchrun's own store is for one process group; here each section makes one.
    lines = ["import os", "os.environ['TORCHELASTIC_USE_AGENT_STORE'] = 'False'"]
    for title in titles:
        lines += [f"os.environ['MASTER_PORT'] = '{free_port()}'"]
        lines += [f"exec(compile({code_of(title)!r}, {title!r}, 'exec'), {{}})"]
        lines += [f"print({'finished ' + title!r}, flush=True)"]
    script = tmp_path / "train.py"
    script.write_text("\n".join(lines))
    output = ddp_worker.launch(script)
    assert len(titles) >= 2
    assert all(output.count(f"finished {title}") == 2 for title in titles)
