"""The ResNet-50, where its weights come from, and how it is trained with ProxSGD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from torchvision.models import resnet50
from torchvision.transforms import v2

from .. import ProxSGD, Sparsity, TargetSparsity, param_groups, sparsity
from ..structure import Channels
from .checkpoints import Checkpoint, load_checkpoint
from .files import RecipeError
from .settings import STAGES, Run
from .shapes import FORMAT, description_of, give_shapes
from .splits import Source

_PRIME = 1_000_003
MEASURED = ("train", "validation")  # after an epoch; what a figure's name begins with


@dataclass(frozen=True)
class ChannelTarget:
    """A group lasso that is to take a share of the channels to zero.

    Attributes:
        sets: the model's channels.
        share: of all of them.
        first: the epoch, counted from 0, that it begins with.
        last: the epoch before which the share is to be reached.
    """

    sets: Channels
    share: float
    first: int
    last: int


class Classifier(pl.LightningModule):
    """A ResNet-50 classifier trained with ``ProxSGD``: the part to copy.

    Args:
        run: the hyperparameters.
        classes: class names, in the order of the labels.
        source: the files that it is trained on, where they are files.
        class_weights: (classes,), what each class counts in the training loss; None: all alike.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        run: Run,
        classes: Sequence[str],
        source: Source | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.run, self.classes, self.source = run, tuple(classes), source
        torch.manual_seed(run.seed)
        # Residual branches that start at zero: from scratch it learns in tens of steps.
        self.model = resnet50(num_classes=len(classes), zero_init_residual=True)
        self.model.to(memory_format=torch.channels_last)
        if run.dropout:  # before the head; a wrapper there would change the head's name
            self.model.avgpool = nn.Sequential(self.model.avgpool, nn.Dropout(run.dropout))
        self.mixup = v2.MixUp(alpha=run.mixup, num_classes=len(classes)) if run.mixup else None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.frozen = freeze(self.model, run.freeze)
        self.is_shrinking = False
        """Whether channels are still to be taken out: the weights aren't those asked for yet."""
        self.channel_target: ChannelTarget | None = None
        """Set where channels go by a group lasso."""
        # Two sets are measured after an epoch: the training images and the validation images.
        count = len(classes)
        self.scores = nn.ModuleList(
            MetricCollection(
                {
                    "accuracy": MulticlassAccuracy(count, average="micro"),
                    "f1": MulticlassF1Score(count, average="macro"),
                },
                prefix=f"{name}_",
            )
            for name in MEASURED
        )
        self.losses = nn.ModuleList([MeanMetric(), MeanMetric()])

    def configure_optimizers(self) -> Any:
        """``ProxSGD``; norms and biases are in a group of their own that is not regularised."""
        channels = self.channel_target
        groups = param_groups(
            self.model,
            l1=self.run.l1,
            weight_decay=self.run.weight_decay,
            toward=self.run.toward,
            new="fc.*" if self.run.toward == "start" else (),
            group_lasso=0.0 if channels is None else 1.0,  # where it begins doesn't matter
            sets=None if channels is None else channels.sets,
        )
        target = self.run.steered_to
        optimizer = ProxSGD(
            groups,
            lr=self.run.lr,
            momentum=self.run.momentum,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedules = [lr_schedule(optimizer, self.run, steps)]
        if target is not None:
            schedules.append(TargetSparsity(optimizer, target, steps=max(1, steps * 4 // 5)))
        if channels is not None:
            begin, end = (
                epoch * steps // self.run.epochs for epoch in (channels.first, channels.last)
            )
            schedules.append(
                TargetSparsity(
                    optimizer,
                    channels.share,
                    begin=begin,
                    steps=end,
                    of="channels",
                    lrs=rates(self.run, steps),
                )
            )
        # LearningRateMonitor logs the optimizer's lr under the name of each schedule, also of one
        # that moves l1: both have one name here.
        return [optimizer], [{"scheduler": s, "interval": "step", "name": "lr"} for s in schedules]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (count, classes) of images (count, 3, h, w)."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of a batch. The L1 and L2 terms are not in it: the optimizer minimises them."""
        images, labels = batch
        if self.run.dropout or self.mixup is not None:
            # The draws depend on seed, step and process alone: a resumed run makes the same.
            step = _PRIME * self.run.seed + self.global_step
            torch.manual_seed((step * self.trainer.world_size + self.global_rank) % 2**32)
        targets = labels
        if self.mixup is not None:
            images, targets = self.mixup(images, labels)
            labels = targets.argmax(1)
        logits = self(images)
        loss = cross_entropy(
            logits, targets, self.class_weights, label_smoothing=self.run.label_smoothing
        )
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log("loss", loss, on_step=True)
        self.log("accuracy", accuracy, on_step=True)
        for name in ("lr", "l1") if self.channel_target is None else ("lr", "l1", "group_lasso"):
            self.log(name, float(self.trainer.optimizers[0].param_groups[0][name]), on_step=True)
        return loss

    def on_validation_start(self) -> None:
        """Takes process 0's batch-norm statistics in all processes."""
        if self.trainer.world_size > 1:
            for statistic in self.model.buffers():
                torch.distributed.broadcast(statistic, src=0)

    def validation_step(
        self, batch: tuple[Tensor, Tensor], _: int, dataloader_idx: int = 0
    ) -> None:
        """Measures a batch of the training images (0) or of the validation images (1)."""
        images, labels = batch
        logits = self(images)
        self.scores[dataloader_idx].update(logits, labels)  # type: ignore[operator]
        losses = cross_entropy(logits, labels, reduction="none")
        self.losses[dataloader_idx].update(losses)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Logs what was measured."""
        for name, scores, loss in zip(MEASURED, self.scores, self.losses, strict=True):
            assert isinstance(scores, MetricCollection)
            assert isinstance(loss, MeanMetric)
            self.log_dict(scores.compute())
            self.log(f"{name}_loss", loss.compute())
            scores.reset()
            loss.reset()
        self.log("zeros", regularised(self).fraction)

    def train(self, mode: bool = True) -> Classifier:
        """As usual, but frozen stages keep their batch-norm statistics."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what ``load_classifier`` needs."""
        checkpoint["run"] = asdict(self.run)
        checkpoint["classes"] = list(self.classes)
        if (shapes := description_of(self.model)) is not None:
            checkpoint[FORMAT] = shapes
        if self.source is not None:
            checkpoint["source"] = asdict(self.source)


def lr_schedule(optimizer: torch.optim.Optimizer, run: Run, steps: int) -> LRScheduler:
    """Up linearly over ``--warmup`` epochs, then down to 0 along a cosine, step by step."""
    warmup = round(run.warmup * steps / run.epochs)
    cosine = CosineAnnealingLR(optimizer, max(1, steps - warmup))
    if not warmup:
        return cosine
    linear = LinearLR(optimizer, 1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], [warmup])


def rates(run: Run, steps: int) -> list[float]:
    """The lr of each step, over ``--lr``."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = lr_schedule(optimizer, run, steps)
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def freeze(model: nn.Module, stage: str) -> list[nn.Module]:
    """Freezes the parameters from the input up to a stage; returns the modules frozen."""
    last = STAGES.index(stage)
    names = [name for s in STAGES[1 : last + 1] for name in ([s, "bn1"] if s == "conv1" else [s])]
    modules = [model.get_submodule(name) for name in names]
    for module in modules:
        module.requires_grad_(False)
    return modules


def regularised(classifier: Classifier) -> Sparsity:
    """The exact zeros of the weights that L1 acts on, or would at ``l1 > 0``."""
    group, *_ = param_groups(classifier.model)
    names = {name for name, parameter in group["params"] if parameter.requires_grad}
    return Sparsity(tuple(la for la in sparsity(classifier.model).layers if la.name in names))


def shape_as(classifier: Classifier, checkpoint: Checkpoint, path: Path) -> None:
    """Takes the channels out of a classifier that a compact checkpoint doesn't have.

    Raises:
        RecipeError: the checkpoint's shapes and tensors don't fit together.
    """
    if checkpoint.shapes is not None:
        state = {n.removeprefix("model."): v for n, v in checkpoint.state_dict.items()}
        give_shapes(classifier.model, checkpoint.shapes, state, path)


def load_classifier(path: Path) -> Classifier:
    """The trained model of a checkpoint, dense or compact, ready for evaluation.

    Raises:
        RecipeError: the file is no checkpoint, or its model has another architecture.
    """
    checkpoint = load_checkpoint(path)
    classifier = Classifier(checkpoint.run, checkpoint.classes, checkpoint.source)
    shape_as(classifier, checkpoint, path)
    own, state = classifier.state_dict(), checkpoint.state_dict
    for name in sorted(set(own) ^ set(state)):
        raise RecipeError(f"{path} is not a ResNet-50's: {name} is missing or unknown")
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise RecipeError(
                f"{path} is another architecture's or class count's: {name} is "
                f"{tuple(state[name].shape)}, not {tuple(value.shape)}"
            )
    classifier.load_state_dict(state)
    return classifier.eval()
