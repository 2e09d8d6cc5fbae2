"""What the user is told of a run before it begins, and at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .forecast import advice, at_chance, wiped_layers
from .processes import ignored_ranks
from .results import Result
from .settings import DIGITS, Run, option_name
from .splits import Images

# What regularises beside the penalties.
_BESIDE = ("augment", "mixup", "label_smoothing", "dropout", "class_weights", "freeze", "warmup")
NO_TEST = (
    "tested on: nothing. The validation images choose the weights, so their figures are not "
    "unbiased; a folder test/ or --test-fraction gives some that are"
)


def describe(run: Run, images: Images) -> list[str]:
    """What will be done, and how overfitting is brought out if it is."""
    name = f"scikit-learn's {DIGITS}" if run.data == DIGITS else run.data
    wrong = ""
    if images.train.wrong:
        wrong = (
            f", {images.train.wrong} of them with a label made wrong on purpose (training accuracy "
            "is measured on the labels as trained on)"
        )
    steps, over = divmod(len(images.train), run.batch_size)
    left = f"; {over} of them, others each time, are left over in each epoch" if over else ""
    lines = [
        f"images: {name}, {len(images.classes)} classes ({_some(images.classes)}), "
        f"{run.image_size} px, seed {run.seed}",
        f"trained on: {len(images.train)} images{wrong}{left}",
        f"chosen by: {len(images.validation)} validation images (best.ckpt, early stopping)",
        _tested(images),
        f"training: l1 {run.l1:g}, weight decay {run.weight_decay:g}, lr {run.lr:g}, momentum "
        f"{run.momentum:g}, {_count(run.epochs, 'epoch')} of {_count(steps, 'step')}, "
        f"batch {run.batch_size}",
    ]
    used = [n for n in _BESIDE if getattr(run, n) != getattr(Run(), n)]
    if used:
        options = ", ".join(f"{option_name(name)} {getattr(run, name)}" for name in used)
        lines.append(f"beside it: {options}")
    if run.toward == "start":
        lines.append("weights are pulled towards their initial values, not towards zero")
    if run.steered_to is not None:
        lines.append(f"l1 is steered until {run.steered_to:.1%} of the weights are zero")
    return [*lines, *images.notes, *filter(None, [ignored_ranks()])]


def _tested(images: Images) -> str:
    if images.test is None:
        return NO_TEST
    return f"tested on: {len(images.test)} other images, once, at the end; no label changed"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _some(names: Sequence[str], most: int = 10) -> str:
    """Names in a row, not too many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def outcome(result: Result) -> list[str]:
    """What the user should know of a result: a loss that isn't finite, a target that was missed."""
    lines, run = [], result.run
    if not math.isfinite(result.last["train_loss"]):
        lines.append("the loss is not finite any more: training has diverged; try a lower --lr")
    zeros = result.last["zeros"]
    # TargetSparsity freezes within half a point of the target.
    if run.steered_to is not None and zeros < run.steered_to - 0.005:
        epochs = int(result.last["epoch"])
        why = "give more --epochs, or a larger --l1 to start from"
        if epochs < run.epochs:
            why = f"--early-stopping ended the run after {epochs} of {run.epochs} epochs"
        lines.append(f"--target-sparsity {run.steered_to:g} was missed: zeros {zeros:.1%}; {why}")
    lines += _wrong(result)
    return lines


def _wrong(result: Result) -> list[str]:
    """A network that learned nothing, or lost a layer, which no figure alone tells."""
    end, lines = result.reported, []
    if wiped := wiped_layers(end.zeros_by_layer):
        lines.append(f"warning: all weights are zero in {_some(wiped, 3)}; {advice(result.run)}")
    figures, held_out = end.last, end.held_out
    if at_chance(figures["held_out_accuracy"], [sum(row) for row in end.confusion]):
        lines.append(
            f"warning: the {held_out} accuracy {figures['held_out_accuracy']:.3f} (loss "
            f"{figures['held_out_loss']:.3g}) can't be told from guessing; {advice(result.run)}"
        )
    return lines
