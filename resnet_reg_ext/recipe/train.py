"""One run, from settings to a result."""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from .. import __version__
from .callbacks import Checkpoints, History, Patience, Progress, StopOnSignal, WholeFiles
from .data import ImageData, Images, Split, evaluation_loader, load_images
from .files import RecipeError, prepare_folder, write_text
from .model import Classifier, load_checkpoint, load_weights, regularised, source_of
from .settings import DIGITS, OPTIONS_FILES, Run, save_options

# Momentum doubles a full checkpoint; the next one is written beside it before the rename.
FULL_CHECKPOINT, WEIGHTS = 190_000_000, 95_000_000
LAYER4_STRIDE = 32  # so many pixels of the image are one in a ResNet-50's last stage


@dataclass(frozen=True)
class Result:
    """What a run gave; ``result.json`` holds the same."""

    run: Run
    data: dict[str, Any]
    """Counts of images, classes and wrong labels."""
    history: list[dict[str, float]]
    """One row an evaluation: epoch, {train,test}_{accuracy,loss,f1}, zeros."""
    step_ms: float
    """Median time of a step since the start or the resumption."""
    zeros_by_layer: dict[str, float]
    """Share of exact zeros by parameter, regularised weights only, input to output."""
    confusion: list[list[int]]
    """Test images by true class (row) and predicted class (column)."""
    made_with: dict[str, Any]

    @property
    def last(self) -> dict[str, float]:
        """The last evaluation, with the gap between training and test accuracy."""
        row = self.history[-1]
        return {**row, "gap": row["train_accuracy"] - row["test_accuracy"], "step_ms": self.step_ms}

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return list(self.data["classes"])

    def save(self, folder: Path) -> None:
        """Writes ``result.json``."""
        write_text(folder / "result.json", to_json(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Result:
        """Reads ``result.json``."""
        content = json.loads((folder / "result.json").read_text())
        history = [
            {name: math.nan if value is None else value for name, value in row.items()}
            for row in content["history"]
        ]
        return cls(**{**content, "run": Run(**content["run"]), "history": history})


def to_json(content: Any, indent: int | None = None) -> str:
    """A JSON file's text. JSON knows neither NaN nor infinity: null stands for them."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(content, indent=indent) + "\n"


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
    _check_machine(run)
    last = out / "last.ckpt"
    if resume and not last.is_file():
        raise RecipeError(f"nothing to resume in {out}: it has no last.ckpt")
    # A run that was killed before its first checkpoint has left nothing that could be lost.
    held = [name for name in ("last.ckpt", "result.json") if (out / name).exists()]
    if not resume and held and is_first_process():
        raise RecipeError(f"--out {out} holds a run already: give another, or --resume {out}")
    images = load_images(run)
    classifier = Classifier(run, images.classes, images.source)
    if resume:
        _check_resumable(last, images)
        weights = f"resumed from {last}"
    elif start is not None:
        weights = load_weights(classifier, str(start))
    else:
        weights = load_weights(classifier, run.weights)
    prepare_folder(out, 2 * FULL_CHECKPOINT + (2 * WEIGHTS if keep_best else 0))
    if is_first_process():
        save_options(asdict(run), out / OPTIONS_FILES["train"])
        for line in (*describe(run, images), weights):
            print(f"  {line}", flush=True)

    history = History()
    ours: list[Callback] = [history, Checkpoints(out, best=keep_best)]
    if run.early_stopping:
        ours.append(Patience(run.early_stopping))
    # Last: what it saves has then been counted, what the bar shows has been saved.
    ours += [*callbacks, StopOnSignal(last), Progress(name)]
    trainer = pl.Trainer(
        max_epochs=run.epochs,
        check_val_every_n_epoch=_divisor(run.epochs, run.evaluate_every),
        num_sanity_val_steps=0,
        precision=run.precision,  # type: ignore[arg-type]
        accelerator=run.accelerator,
        **_processes(run),
        callbacks=ours,
        logger=[
            TensorBoardLogger(out, name="tensorboard", version=""),
            CSVLogger(out, name="csv", flush_logs_every_n_steps=20),
        ],
        log_every_n_steps=1,
        plugins=[WholeFiles()],
        default_root_dir=out,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    trainer.fit(
        classifier,
        datamodule=ImageData(images, run),
        ckpt_path=str(last) if resume else None,
        weights_only=True,
    )
    zeros = regularised(classifier)
    result = Result(
        run,
        _counts(images),
        history.rows,
        history.step_ms,
        {layer.name: layer.fraction for layer in zeros.layers},
        confusion_matrix(classifier, images.test, run, trainer.strategy.root_device),
        made_with(),
    )
    if is_first_process() and not math.isfinite(result.last["train_loss"]):
        print("  the loss is not finite any more: training has diverged; try a lower --lr")
    # In this order: what has no result yet can still be resumed.
    if is_first_process():
        result.save(out)
    if not keep_best:
        trainer.save_checkpoint(last, weights_only=True)
    return result


def check(run: Run) -> None:
    """Refuses a run that can't be made, for its machine, data or weights.

    Raises:
        RecipeError: says what to put right.
    """
    be_quiet()
    _check_machine(run)
    load_weights(Classifier(run, load_images(run).classes), run.weights)


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


def confusion_matrix(
    classifier: Classifier, split: Split, run: Run, device: torch.device
) -> list[list[int]]:
    """Images by true class (row) and predicted class (column)."""
    logits, labels = predict(classifier, split, run, device)
    matrix: list[list[int]] = multiclass_confusion_matrix(
        logits, labels, len(classifier.classes)
    ).tolist()
    return matrix


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
    return [*lines, *images.notes]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _some(names: Sequence[str], most: int = 10) -> str:
    """Names in a row, not too many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def made_with() -> dict[str, Any]:
    """Versions and machine, for reports."""
    return {
        "resnet_reg_ext": __version__,
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def is_first_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


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


def _processes(run: Run) -> dict[str, Any]:
    """The Trainer's arguments; torchrun has decided on its own how many processes there are."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {"devices": run.devices, "strategy": run.strategy}
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    return {"devices": here, "num_nodes": everywhere // here, "strategy": "ddp"}


def _check_machine(run: Run) -> None:
    processes = int(os.environ.get("WORLD_SIZE", run.devices))
    if run.batch_size % processes:
        raise RecipeError(
            f"--batch-size {run.batch_size} can't be shared evenly by {processes} processes"
        )
    one_value = run.image_size <= LAYER4_STRIDE and run.freeze != "layer4"
    if run.batch_size // processes < 2 and one_value:
        raise RecipeError(
            f"--batch-size {run.batch_size} leaves one image to each of {processes} processes, and "
            f"--image-size {run.image_size} one pixel of it to the last batch norms, which need "
            f"two: give at least {2 * processes} images or {LAYER4_STRIDE + 1} pixels"
        )
    gpus = torch.cuda.device_count()
    if run.accelerator == "gpu" and gpus < run.devices:
        raise RecipeError(f"--accelerator gpu: {run.devices} wanted, torch finds {gpus}")


def _check_resumable(last: Path, images: Images) -> None:
    checkpoint = load_checkpoint(last)
    if "optimizer_states" not in checkpoint:
        raise RecipeError(f"{last} holds the weights of a finished run: nothing to resume")
    if tuple(checkpoint["classes"]) != images.classes:
        raise RecipeError(
            f"{last} has the classes {', '.join(checkpoint['classes'])}, but the data "
            f"{', '.join(images.classes)}"
        )
    before, now = source_of(checkpoint), images.source
    if before and now and before.digest != now.digest:
        raise RecipeError(
            f"--data {now.folder} is not what {last} was trained on: images have come, gone or "
            "changed; put them back, or train anew with another --out"
        )


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
