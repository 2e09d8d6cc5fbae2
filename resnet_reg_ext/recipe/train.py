"""One run, from settings to a result."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from . import tensorboard
from .callbacks import Checkpoints, History, Patience, Progress, StopOnSignal, WholeFiles
from .channel_methods import removal_of
from .checkpoints import Checkpoint, keep_weights_alone, load_checkpoint
from .checks import check_images, check_resumable, settled
from .data import load_images
from .describe import describe, outcome
from .files import RecipeError, Stopped, locked, prepare_folder
from .forecast import Watch, count_steps, foretold
from .loaders import ImageData, class_weights
from .measure import measured
from .model import Classifier, shape_as
from .predictions import save_predictions
from .processes import is_rank_zero, trainer_processes
from .results import Result, made_with
from .settings import OPTIONS_FILES, Run, save_options
from .splits import Images
from .weights import load_weights

# Momentum doubles a full checkpoint; the next one is written beside it before the rename.
FULL_CHECKPOINT, WEIGHTS = 190_000_000, 95_000_000


def train(
    run: Run,
    out: Path,
    *,
    name: str = "train",
    resume: bool = False,
    keep: str = "all",
    test: bool = True,
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
        keep: what stays at the end: "all"; "weights", where ``last.ckpt`` is cut down to them; or
            "result" without checkpoints.
        test: measure the test images at the end. Without it they are not looked at: a run that a
            choice is made by.
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
    if not test:
        images = replace(images, test=None)
    check_images(run, images)
    if before is not None:
        check_resumable(before, last, images)
    # A former run's trainer and model refer to each other. Few objects, but hundreds of megabytes:
    # Python's collector, which counts objects, would come late.
    gc.collect()
    classifier = Classifier(run, images.classes, images.source, class_weights(run, images.train))
    if before is not None:
        shape_as(classifier, before, last)
    weights = _initial_weights(classifier, last if resume else None, start)
    removal = removal_of(run, classifier, images.train, resumed=resume)
    ahead = [] if resume else foretold(classifier, count_steps(run, len(images.train)))
    prepare_folder(out, 2 * FULL_CHECKPOINT + 2 * WEIGHTS)
    with locked(out) if is_rank_zero() else nullcontext():
        if not resume:
            _before(out, resume)  # another run may have been here since
        if is_rank_zero():
            save_options(asdict(run), out / OPTIONS_FILES["train"])
            planned = [one.describe() for one in removal]
            _say([*describe(run, images), *planned, weights, *ahead])
        history, checkpoints = History(), Checkpoints(out)
        around = [history, *removal, tensorboard.ZerosByLayer(), checkpoints]
        around += [*_patience(run), Watch(), *callbacks]
        # Last: what it saves has then been counted, what the bar shows has been saved.
        trainer = _trainer(run, out, [*around, StopOnSignal(last), Progress(name)])
        _fit(trainer, classifier, ImageData(images, run), last if resume else None, history)
        result, logits = _result(images, classifier, history, checkpoints, trainer)
        if is_rank_zero():
            _say([*(one.outcome(classifier) for one in removal), *outcome(result)])
            tensorboard.log_result(trainer, run, result.reported.last)
            save_predictions(out, images.held_out, logits, images.classes)
            _end(result, out, keep)
    return result


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"  {line}", flush=True)


def _end(result: Result, out: Path, keep: str) -> None:
    """Leaves a run's result."""
    # In this order: what has no result yet can still be resumed. A run that is killed between both
    # is finished by ``finish``.
    result.save(out)
    _keep(out, keep)


def _patience(run: Run) -> list[Callback]:
    return [Patience(run.early_stopping)] if run.early_stopping else []


def _keep(out: Path, keep: str) -> None:
    if keep == "result":
        for name in ("last.ckpt", "best.ckpt"):
            (out / name).unlink(missing_ok=True)
    elif keep == "weights" and (out / "last.ckpt").is_file():
        keep_weights_alone(out / "last.ckpt")


def finish(out: Path, keep: str = "weights") -> Result:
    """The result of a run that has one, its checkpoint cut down where a kill came before that.

    Args:
        out: its folder.
        keep: as of :func:`train`.

    Raises:
        RecipeError: the result is damaged, or another run holds the folder.
    """
    result = Result.load(out)
    if is_rank_zero():
        with locked(out):
            _keep(out, keep)
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
    images: Images,
    classifier: Classifier,
    history: History,
    checkpoints: Checkpoints,
    trainer: pl.Trainer,
) -> tuple[Result, Tensor]:
    """Measures the weights at the end, and then the best ones. Nothing is chosen any more.

    Returns:
        The result, and the held-out images' logits by the weights that are reported.
    """
    if not history.rows:
        raise RecipeError(f"{trainer.ckpt_path} is damaged: it has no step left, and no evaluation")
    device = trainer.strategy.root_device
    epoch = float(checkpoints.best_epoch)
    end, logits_end = measured(classifier, images, device, epoch)
    best, logits_best = end, logits_end
    if epoch != history.rows[-1]["epoch"]:
        classifier.load_state_dict(load_checkpoint(checkpoints.folder / "best.ckpt").state_dict)
        best, logits_best = measured(classifier, images, device, epoch)
    result = Result(
        classifier.run,
        _counts(images),
        history.rows,
        history.step_ms,
        end.zeros_by_layer,
        end.confusion,
        made_with(),
        end.test,
        best,
        end.validation_error,
    )
    return result, logits_best if classifier.run.early_stopping else logits_end


def check(run: Run) -> tuple[Images, Classifier]:
    """Refuses a run that can't be made, for its machine, data or weights; else what it begins with.

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
    return images, classifier


def _counts(images: Images) -> dict[str, Any]:
    return {
        "classes": list(images.classes),
        "train_images": len(images.train),
        "wrong_labels": images.train.wrong,
        "validation_images": len(images.validation),
        "test_images": 0 if images.test is None else len(images.test),
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
