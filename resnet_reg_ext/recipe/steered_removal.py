"""Channels that a group lasso takes to zero while a run trains, and that are then taken out."""

from __future__ import annotations

from itertools import islice
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from ..structure import compact
from ..structure.coupled_rows import row_weights
from .channel_choice import MIN_KEEP, RANKED_BATCHES, batches_of, check_share, scores_of
from .files import RecipeError
from .model import ChannelTarget, Classifier
from .removal import ChannelRemoval
from .settings import Run
from .splits import Split


class SteeredRemoval(ChannelRemoval):
    """Steers a group lasso to a share of the channels, and takes out what is zero (--method prox).

    Before it begins, each channel's weight in the penalty is set by the root of its Taylor score,
    and the most important tenth of each set is left alone. After each epoch the channels that are
    zero are taken out. Once the share is reached the penalty ends, and what is left trains on
    without it.

    Args:
        classifier: the model to begin with, or that of the checkpoint that is resumed from. Its
            ``channel_target`` is set.
        run: has ``channels``, the share.
        split: the training images.

    Raises:
        RecipeError: torch-pruning isn't installed.
    """

    def __init__(self, classifier: Classifier, run: Run, split: Split) -> None:
        super().__init__(classifier, run, split)
        assert run.channels is not None
        self.first = self.stages[0]
        self.last = max(self.first + 1, self.stages[-1])
        self.until = run.epochs
        self.is_weighted = False
        self.done_in: int | None = None
        """The epoch that the share was reached in."""
        classifier.channel_target = ChannelTarget(self.sets, run.channels, self.first, self.last)

    def check(self) -> None:
        """Refuses a share that what isn't penalised doesn't allow.

        Raises:
            RecipeError: says how much can go.
        """
        assert self.run.channels is not None
        check_share("--channels", self.run.channels, self.sets, 1)

    def describe(self) -> str:
        """What will be done."""
        first, last = self.first + 1, self.last
        when = f"in epoch {first}" if first == last else f"from epoch {first} to {last}"
        return (
            f"channels: {self.run.channels:.1%} are taken to zero {when}, by a group lasso that is "
            f"steered there ({self.run.method}), and out"
        )

    def outcome(self, classifier: Classifier) -> str:
        """What is left, and whether that is what was asked for."""
        assert self.run.channels is not None
        total = sum(self.sizes.values())
        missing = self.run.channels - (1 - self.sets.total / total)
        late = f"; {missing:.1%} fewer went than asked for: give more --epochs"
        return super().outcome(classifier) + (late if missing > 0.01 else "")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"sizes": self.sizes, "is_weighted": self.is_weighted, "done_in": self.done_in}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        weighted, done = state_dict["is_weighted"], state_dict["done_in"]
        super().load_state_dict({"sizes": state_dict["sizes"], "done": 0})
        known = done is None or (type(done) is int and 0 <= done < self.run.epochs)
        if type(weighted) is not bool or not known:
            raise RecipeError("the checkpoint is damaged: its channels' progress is impossible")
        self.is_weighted, self.done_in = weighted, done
        self.until = self.run.epochs if done is None else done

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tells that what comes now is not yet the model that was asked for."""
        assert isinstance(pl_module, Classifier)
        pl_module.is_shrinking = self.done_in is None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes nothing out: that is done as epochs end."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets the weights of the channels, before the step after which the strength is set."""
        assert isinstance(pl_module, Classifier)
        is_last = batch_idx + 1 == trainer.num_training_batches
        if is_last and trainer.current_epoch + 1 == self.first and not self.is_weighted:
            self._weigh(pl_module, trainer.optimizers[0], trainer.current_epoch)
            self.is_weighted = True

    def _weigh(self, classifier: Classifier, optimizer: Optimizer, epoch: int) -> None:
        batches = islice(batches_of(self.split, self.run, epoch), RANKED_BATCHES)
        scores = scores_of(classifier, batches, self.sets)
        coupled = {
            one.name: {
                index.tensor: classifier.model.get_parameter(index.tensor)
                for index in one.producers
            }
            for one in self.sets
        }
        roots = {name: of_set.sqrt() for name, of_set in scores.items()}
        weights = row_weights(coupled, roots, MIN_KEEP)
        by_name = {name: weights[one] for one, of_set in coupled.items() for name in of_set}
        for group in optimizer.param_groups:
            group["row_weights"] = [by_name.get(name) for name in group["param_names"]]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Takes out what is zero as an epoch ends, before it is evaluated."""
        assert isinstance(pl_module, Classifier)
        epoch, optimizer = trainer.current_epoch, trainer.optimizers[0]
        if not trainer.is_last_batch or epoch < self.first or self.done_in is not None:
            return
        taken = compact(pl_module.model, None, optimizer, sets=self.sets)
        self.go_on(pl_module, taken, f"epoch {epoch + 1} ends")
        is_last = epoch + 1 == self.run.epochs
        if is_last or all(group["frozen_zeros"] for group in optimizer.param_groups):
            self.done_in = self.until = epoch
            pl_module.is_shrinking = False
            for group in optimizer.param_groups:
                group.update(group_lasso=0.0, rows=None, row_weights=None, frozen_zeros=False)
