"""Channels taken out while a run trains, and norms' statistics that keep up with it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch.optim import Optimizer
from tqdm import tqdm

from ..structure import Compacted
from ..structure.channel_sets import without
from ..structure.compaction_report import count_parameters
from .channel_choice import (
    MULTIPLE_OF,
    RANKED_BATCHES,
    batches_of,
    check_share,
    find_channels,
    refresh_statistics,
    scores_of,
    take_out,
)
from .cost import count_multiply_adds, shortened
from .files import RecipeError
from .model import Classifier
from .processes import count_processes
from .settings import Run
from .shapes import to_channels_last
from .splits import Split

_STAGES = 5  # at most: each ranks all channels


def stages(epochs: int) -> list[int]:
    """The epochs, counted from 0, that begin with a removal: from a tenth to four tenths of all.

    Ranking needs weights that have learnt something, and the small model needs the longest part
    of the training.
    """
    first = max(1, round(0.1 * epochs))
    last = max(first, round(0.4 * epochs))
    count = min(_STAGES, last - first + 1)
    steps = max(1, count - 1)
    return [first + round(i * (last - first) / steps) for i in range(count)]


def share_after(stage: int, count: int, share: float) -> float:
    """The share of all channels that is gone after a stage, counted from 1.

    1 - (1 - stage/count)³ of the share: much at first, little at the end. Source: Zhu and Gupta,
    *To prune, or not to prune*, 2017.
    """
    return share * (1 - (1 - stage / count) ** 3)


def check_removal(run: Run) -> None:
    """Refuses settings that ``--channels`` can't be combined with.

    Raises:
        RecipeError: names the option.
    """
    if run.channels is None:
        return
    for wrong, option, reason in (
        (run.epochs < 2, f"--epochs {run.epochs}", "the first epoch is trained with all channels"),
        (run.freeze != "none", f"--freeze {run.freeze}", "frozen layers can't make up for a loss"),
        (
            run.steered_to is not None,
            "--target-sparsity",
            "the share of zeros is another one after each removal",
        ),
        (
            run.early_stopping is not None,
            "--early-stopping",
            "channels go by a plan of all epochs",
        ),
        (
            count_processes(run) > 1,
            f"--devices {count_processes(run)}",
            "DistributedDataParallel keeps the shapes that it began with",
        ),
    ):
        if wrong:
            raise RecipeError(f"--channels can't be combined with {option}: {reason}")


class ChannelRemoval(Callback):
    """Takes a share of the channels out in stages, each at the start of an epoch (--method taylor).

    What is left of the model and its optimizer's state goes on as it is. Stages that a checkpoint
    has behind it aren't done again.

    Args:
        classifier: the model to begin with, or that of the checkpoint that is resumed from.
        run: has ``channels``, the share.
        split: the training images.

    Raises:
        RecipeError: torch-pruning isn't installed.
    """

    def __init__(self, classifier: Classifier, run: Run, split: Split) -> None:
        assert run.channels is not None
        self.run, self.split = run, split
        self.stages = stages(run.epochs)
        self.sets = find_channels(classifier)
        self.sizes = {one.name: one.size for one in self.sets}
        self.done = 0
        self.until = self.stages[-1]
        """The last epoch after which statistics lag."""

    def check(self) -> None:
        """Refuses a share that the sets' smallest sizes don't allow.

        Raises:
            RecipeError: says how much can go.
        """
        assert self.run.channels is not None
        check_share("--channels", self.run.channels, self.sets, MULTIPLE_OF)

    def describe(self) -> str:
        """What will be done."""
        first, last = self.stages[0] + 1, self.stages[-1] + 1
        when = f"as epoch {first} begins" if first == last else f"from epoch {first} to {last}"
        return (
            f"channels: {self.run.channels:.1%} are taken out {when}, the least important first "
            f"({self.run.method})"
        )

    def outcome(self, classifier: Classifier) -> str:
        """What is left."""
        size = self.run.image_size
        return (
            f"channels: {self.sets.total} of {sum(self.sizes.values())} are left, "
            f"{shortened(count_parameters(classifier.model))} parameters, "
            f"{shortened(count_multiply_adds(classifier.model, size))} multiply-adds at {size} px"
        )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"sizes": self.sizes, "done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        sizes, done = state_dict["sizes"], state_dict["done"]
        known = isinstance(sizes, Mapping) and all(
            type(sizes.get(one.name)) is int and sizes[one.name] >= one.size for one in self.sets
        )
        if not known or type(done) is not int or not 0 <= done <= len(self.stages):
            raise RecipeError("the checkpoint is damaged: its channels or stages are impossible")
        self.sizes, self.done = dict(sizes), done

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells that what comes now is not yet the model that was asked for."""
        assert isinstance(pl_module, Classifier)
        pl_module.is_shrinking = self.done < len(self.stages)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Does the stages that are due."""
        assert isinstance(pl_module, Classifier)
        due = sum(1 for epoch in self.stages if epoch <= trainer.current_epoch)
        if due > self.done:
            self._shrink(pl_module, trainer.optimizers[0], trainer.current_epoch, due)
            self.done = due
            pl_module.is_shrinking = due < len(self.stages)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refreshes the norms' statistics as long as channels go.

        They are running averages, which lag behind: evaluation would sit at chance while the
        training loss is low.
        """
        assert isinstance(pl_module, Classifier)
        if self.stages[0] <= trainer.current_epoch <= self.until:
            refresh_statistics(pl_module, self.split, self.run)

    def _shrink(self, classifier: Classifier, optimizer: Optimizer, epoch: int, due: int) -> None:
        assert self.run.channels is not None
        total = sum(self.sizes.values())
        share = share_after(due, len(self.stages), self.run.channels)
        batches = islice(batches_of(self.split, self.run, epoch), RANKED_BATCHES)
        scores = scores_of(classifier, batches, self.sets)
        left = total - round(share * total)
        taken = take_out(classifier, self.sets, scores, left, self.sizes, optimizer=optimizer)
        self.go_on(classifier, taken, f"epoch {epoch + 1} begins")

    def go_on(self, classifier: Classifier, taken: Compacted, when: str) -> None:
        """Takes the smaller model, and says how small it is."""
        classifier.model = taken.model
        to_channels_last(classifier.model)
        self.sets = without(self.sets, taken.report.removed)
        if taken.report.shortcuts:
            self.sets = find_channels(classifier)
        with suppress(OSError):
            tqdm.write(
                f"  {when} with {self.sets.total} of {sum(self.sizes.values())} channels, "
                f"{shortened(count_parameters(classifier.model))} parameters"
            )
