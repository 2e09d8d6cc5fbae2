"""What an l1 will do to a network, told before it does it; and warnings while it does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from tqdm import tqdm

from .. import param_groups
from .model import Classifier, rates, regularised
from .settings import Run

FINE_TUNING_SHARE = 1 / 3  # of the initial weights, within the default l1's reach
_WIPED = 0.995
DECAYED = 0.1  # of a weight, by the default weight decay over the whole run


@dataclass(frozen=True)
class Forecast:
    """How far L1 alone moves a weight over a run, and which weights that reaches.

    A step shrinks a weight by lr·l1·k, k = 1 / (1 - momentum): over the run by l1·k·Σlr. A weight
    that is smaller at the start becomes 0 unless its gradient holds it.
    """

    reach: float
    """l1·k·Σlr"""
    share: float
    """Of the regularised weights, those smaller than the reach."""
    by_layer: dict[str, float]
    """The same for each layer."""


def count_steps(run: Run, images: int) -> int:
    """Steps of a run that trains on so many images."""
    return run.epochs * (images // run.batch_size)


def travel(run: Run, steps: int) -> float:
    """k·Σlr: how far a weight moves under a constant gradient of 1."""
    return sum(rates(run, steps)) * run.lr / (1 - run.momentum)


def forecast(classifier: Classifier, steps: int) -> Forecast:
    """The forecast for a classifier with its initial weights."""
    run = classifier.run
    reach = run.l1 * travel(run, steps)
    weights = _weights(classifier)
    below = {name: int((value.abs() < reach).sum()) for name, value in weights.items()}
    sizes = {name: value.numel() for name, value in weights.items()}
    by_layer = {name: below[name] / max(1, sizes[name]) for name in weights}
    return Forecast(reach, sum(below.values()) / max(1, sum(sizes.values())), by_layer)


def l1_for_share(classifier: Classifier, steps: int, share: float) -> float:
    """The l1 whose reach is just above a share of the initial weights; 0 where lr is 0."""
    every = torch.cat([value.detach().abs().flatten() for value in _weights(classifier).values()])
    reach = float(every.kthvalue(max(1, round(share * len(every)))).values)
    moved = travel(classifier.run, steps)
    return reach / moved if moved else 0.0


def default_strengths(classifier: Classifier, steps: int) -> Run:
    """The classifier's run with an l1 and a weight decay that are sensible for its weights."""
    moved = travel(classifier.run, steps)
    l1 = l1_for_share(classifier, steps, FINE_TUNING_SHARE)
    weight_decay = DECAYED / moved if moved else 0.0
    return replace(classifier.run, l1=two_digits(l1), weight_decay=two_digits(weight_decay))


def two_digits(value: float) -> float:
    """A strength as one would write it."""
    return float(f"{value:.1e}")


def _weights(classifier: Classifier) -> dict[str, Tensor]:
    group, *_ = param_groups(classifier.model)
    return {name: parameter for name, parameter in group["params"] if parameter.requires_grad}


def foretold(classifier: Classifier, steps: int) -> list[str]:
    """What the user should know of a run's l1 before it begins."""
    run = classifier.run
    if not run.l1 or run.steered_to is not None or run.toward == "start":
        return []
    ahead = forecast(classifier, steps)
    grown = " (weights that are random at the start grow: fewer will)" if _from_scratch(run) else ""
    lines = [
        f"l1 {run.l1:g} reaches {ahead.share:.1%} of the initial weights: they are smaller than "
        f"l1·k·Σlr = {ahead.reach:.2g}, and become 0 unless the loss holds them{grown}"
    ]
    wiped = [name for name, share in ahead.by_layer.items() if share >= _WIPED]
    if wiped and not _from_scratch(run):
        lines.append(
            f"warning: this l1 is about to wipe {_some(wiped)}: almost all of its initial weights "
            f"are within reach; --l1 {l1_for_share(classifier, steps, FINE_TUNING_SHARE):.2g} "
            "reaches a third of all weights"
        )
    return lines


def _from_scratch(run: Run) -> bool:
    return run.weights == "none"


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more layers" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def at_chance(accuracy: float, counts: Sequence[int]) -> bool:
    """Whether an accuracy can't be told from that of guessing the commonest class.

    Args:
        accuracy: on a set of images.
        counts: its images by class.
    """
    images = max(1, sum(counts))
    guess = max(counts) / images
    return accuracy <= guess + 2 * math.sqrt(guess * (1 - guess) / images)


def advice(run: Run) -> str:
    """What may help a run that learns nothing."""
    if run.steered_to is not None:
        return "give a lower --target-sparsity, or more --epochs"
    if run.channels is not None and run.method == "prox":
        return "give a lower --channels, or more --epochs"
    if run.l1:
        return "give a smaller --l1, or more --epochs"
    return "give another --lr, or more --epochs"


class Watch(Callback):
    """Warns of a layer that a penalty has wiped out, and of a run that stays at chance."""

    def __init__(self) -> None:
        self.wiped: set[str] = set()
        self.seen: set[str] = set()
        self.warned = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Looks at the layers, and from half of the epochs on at the accuracy."""
        if not trainer.is_global_zero or trainer.sanity_checking:
            return
        assert isinstance(pl_module, Classifier)
        run, epoch = pl_module.run, trainer.current_epoch + 1
        zeros = {la.name: la.fraction for la in regularised(pl_module).layers}
        # A block whose channels are all taken out is its shortcut from then on.
        empty = [*wiped_layers(zeros), *sorted(self.seen - set(zeros))]
        self.seen |= set(zeros)
        if new := [name for name in empty if name not in self.wiped]:
            self.wiped.update(new)
            tqdm.write(
                f"  warning: {_some(new)} wholly zero after epoch {epoch}: what goes through "
                f"such a layer is lost; {advice(run)}"
            )
        if self.warned or 2 * epoch < run.epochs:
            return
        labels = trainer.datamodule.images.validation.labels  # type: ignore[attr-defined]
        accuracy = float(trainer.callback_metrics["validation_accuracy"])
        if at_chance(accuracy, torch.bincount(labels).tolist()):
            self.warned = True
            tqdm.write(
                f"  warning: after {epoch} of {run.epochs} epochs the validation accuracy "
                f"{accuracy:.3f} can't be told from guessing"
            )


def wiped_layers(zeros: dict[str, float]) -> list[str]:
    """The layers all of whose weights are zero."""
    return [name for name, share in zeros.items() if share == 1]
