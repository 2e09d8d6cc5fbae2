"""One run, from settings to a result."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from . import tensorboard
from .callbacks import Checkpoints, History, Patience, Progress, StopOnSignal, WholeFiles
from .checkpoints import Checkpoint, keep_weights_alone, load_checkpoint
from .checks import check_images, check_resumable, settled
from .data import load_images
from .files import RecipeError, Stopped, locked, prepare_folder
from .loaders import ImageData, evaluation_loader
from .model import Classifier, regularised, shape_as
from .predictions import save_predictions
from .processes import ignored_ranks, is_rank_zero, trainer_processes
from .removal import removal_of
from .results import Result, made_with
from .settings import DIGITS, OPTIONS_FILES, Run, save_options
from .splits import Images, Split
from .weights import load_weights

# Momentum doubles a full checkpoint; the next one is written beside it before the rename.
FULL_CHECKPOINT, WEIGHTS = 190_000_000, 95_000_000


def train(
    run: Run,
    out: Path,
    *,
    name: str = "train",
    resume: bool = False,
    keep_best: bool = True,
    start: Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Trains a ResNet-50 as a run says, and writes everything about it to a folder.

    On a CPU the same run with the same number of threads and processes gives the same weights, bit
    by bit, interrupted and resumed or not.

    Args:
        run: the settings.
        out: the folder for ``run.yaml``, ``last.ckpt``, ``best.ckpt``, ``result.json`` and logs.
        name: stands before the progress bar.
        resume: go on from ``last.ckpt`` in that folder.
        keep_best: keep the best weights and the optimizer's state. Without it ``last.ckpt`` is cut
            down to the weights at the end.
        start: a checkpoint whose weights to start from, instead of ``run.weights``.
        callbacks: Lightning callbacks of your own.

    Raises:
        RecipeError: something that the user can put right.
        Stopped: a signal came; ``last.ckpt`` is what to resume from.
    """
    be_quiet()
    last = out / "last.ckpt"
    before = _before(out, resume)
    run = settled(run, before)
    images = load_images(run)
    check_images(run, images)
    if before is not None:
        check_resumable(before, last, images)
    classifier = Classifier(run, images.classes, images.source)
    if before is not None:
        shape_as(classifier, before, last)
    weights = _initial_weights(classifier, last if resume else None, start)
    removal = removal_of(run, classifier, images.train, resumed=resume)
    prepare_folder(out, 2 * FULL_CHECKPOINT + (2 * WEIGHTS if keep_best else 0))
    with locked(out) if is_rank_zero() else nullcontext():
        if not resume:
            _before(out, resume)  # another run may have been here since
        if is_rank_zero():
            save_options(asdict(run), out / OPTIONS_FILES["train"])
            said = [one.describe() for one in removal]
            for line in (*describe(run, images), *said, weights):
                print(f"  {line}", flush=True)
        history = History()
        ours = [history, *removal, tensorboard.ZerosByLayer(), Checkpoints(out, best=keep_best)]
        if run.early_stopping:
            ours.append(Patience(run.early_stopping))
        # Last: what it saves has then been counted, what the bar shows has been saved.
        ours += [*callbacks, StopOnSignal(last), Progress(name)]
        trainer = _trainer(run, out, ours)
        _fit(trainer, classifier, ImageData(images, run), last if resume else None, history)
        result, logits = _result(run, images, classifier, history, trainer)
        if is_rank_zero():
            left = [one.outcome(classifier) for one in removal]
            for line in (*left, *_outcome(result, trainer)):
                print(f"  {line}", flush=True)
            tensorboard.log_result(trainer, run, result.last)
            save_predictions(out, images.test, logits, images.classes)
            # In this order: what has no result yet can still be resumed. A run that is killed
            # between both is finished by ``finish``.
            result.save(out)
            if not keep_best:
                keep_weights_alone(last)
    return result


def finish(out: Path) -> Result:
    """The result of a run that has one, its checkpoint cut down where a kill came before that.

    Raises:
        RecipeError: the result is damaged, or another run holds the folder.
    """
    result = Result.load(out)
    if is_rank_zero():
        with locked(out):
            if (out / "last.ckpt").is_file():
                keep_weights_alone(out / "last.ckpt")
    return result


def _before(out: Path, resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from; refuses a folder whose run would be overwritten."""
    last = out / "last.ckpt"
    if resume:
        if not last.is_file():
            raise RecipeError(f"nothing to resume in {out}: it has no last.ckpt")
        return load_checkpoint(last)
    # A run that was killed before its first checkpoint has left nothing that could be lost.
    held = [name for name in ("last.ckpt", "result.json") if (out / name).exists()]
    if held and is_rank_zero():
        raise RecipeError(f"--out {out} holds a run already: give another, or --resume {out}")
    return None


def _initial_weights(classifier: Classifier, last: Path | None, start: Path | None) -> str:
    """Fills in the weights to start from, unless Lightning will; says which."""
    if last is not None:
        return f"resumed from {last}"
    if start is not None:  # a run before that has diverged is reported, not refused halfway
        return load_weights(classifier, str(start), must_be_finite=False)
    return load_weights(classifier, classifier.run.weights)


def _trainer(run: Run, out: Path, callbacks: list[Callback]) -> pl.Trainer:
    processes, environment = trainer_processes(run)
    # fsspec takes a relative path that begins with a protocol's name, or with ~, for another.
    out = out.absolute()
    return pl.Trainer(
        max_epochs=run.epochs,
        check_val_every_n_epoch=_divisor(run.epochs, run.evaluate_every),
        num_sanity_val_steps=0,
        precision=run.precision,  # type: ignore[arg-type]
        accelerator=run.accelerator,
        **processes,
        callbacks=callbacks,
        logger=[
            tensorboard.logger(out),
            CSVLogger(out, name="csv", flush_logs_every_n_steps=20),
        ],
        log_every_n_steps=1,
        plugins=[WholeFiles(), environment],
        default_root_dir=out,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )


def _fit(
    trainer: pl.Trainer,
    classifier: Classifier,
    data: ImageData,
    last: Path | None,
    history: History,
) -> None:
    """Trains. Lightning restores a checkpoint unchecked: what it stumbles over is a damaged one."""
    ckpt_path = None if last is None else str(last.absolute())
    try:
        trainer.fit(classifier, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except (RecipeError, OSError, Stopped):
        raise
    except Exception as error:
        if last is None or history.has_begun:
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise RecipeError(
            f"can't resume from {last}, which is damaged or another version's: "
            f"{type(error).__name__}: {reason:.200}"
        ) from error


def _result(
    run: Run, images: Images, classifier: Classifier, history: History, trainer: pl.Trainer
) -> tuple[Result, Tensor]:
    """The result, and the logits of the images that it is tested on."""
    if not history.rows:
        raise RecipeError(f"{trainer.ckpt_path} is damaged: it has no step left, and no evaluation")
    zeros = regularised(classifier)
    logits, labels = predict(classifier, images.test, run, trainer.strategy.root_device)
    result = Result(
        run,
        _counts(images),
        history.rows,
        history.step_ms,
        {layer.name: layer.fraction for layer in zeros.layers},
        multiclass_confusion_matrix(logits, labels, len(images.classes)).tolist(),
        made_with(),
    )
    return result, logits


def _outcome(result: Result, trainer: pl.Trainer) -> list[str]:
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
    return lines


def check(run: Run) -> None:
    """Refuses a run that can't be made, for its machine, data or weights.

    Raises:
        RecipeError: says what to put right.
    """
    be_quiet()
    run = settled(run)
    images = load_images(run)
    check_images(run, images)
    classifier = Classifier(run, images.classes)
    load_weights(classifier, run.weights)
    removal_of(run, classifier, images.train)


def predict(
    classifier: Classifier, split: Split, run: Run, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits (count, classes) and labels (count,) of a split, on the CPU."""
    classifier.to(device).eval()
    dtype = classifier.model.fc.weight.dtype  # float64 with --precision 64-true
    logits, labels = [], []
    with torch.inference_mode():
        for images, truth in evaluation_loader(split, run):
            logits.append(classifier(images.to(device, dtype)).float().cpu())
            labels.append(truth)
    return torch.cat(logits), torch.cat(labels)


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
        f"tested on: {len(images.test)} images, no label changed",
        f"training: l1 {run.l1:g}, weight decay {run.weight_decay:g}, lr {run.lr:g}, momentum "
        f"{run.momentum:g}, {_count(run.epochs, 'epoch')} of {_count(steps, 'step')}, "
        f"batch {run.batch_size}",
    ]
    if run.steered_to is not None:
        lines.append(f"l1 is steered until {run.steered_to:.1%} of the weights are zero")
    return [*lines, *images.notes, *filter(None, [ignored_ranks()])]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _some(names: Sequence[str], most: int = 10) -> str:
    """Names in a row, not too many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _counts(images: Images) -> dict[str, Any]:
    return {
        "classes": list(images.classes),
        "train_images": len(images.train),
        "wrong_labels": images.train.wrong,
        "test_images": len(images.test),
    }


def _divisor(epochs: int, at_most: int) -> int:
    """The evaluation interval: one that the last epoch is a multiple of."""
    return next(n for n in range(min(at_most, epochs), 0, -1) if epochs % n == 0)


def be_quiet() -> None:
    """Leaves out what Lightning tells about itself, and advice that doesn't apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        # The order of images depends on seed and epoch alone: any step can be resumed from.
        ".*your dataloader is not resumable.*",
        ".*does not have many workers.*",
        # Frozen stages are in evaluation mode on purpose.
        ".*module\\(s\\) in eval mode.*",
        ".*sync_dist=True.*",
        # DDP and 1x1 kernels: the strides differ where the size is 1.
        ".*Grad strides do not match bucket view strides.*",
        ".*GPU available but not used.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)
