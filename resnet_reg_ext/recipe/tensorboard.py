"""What TensorBoard shows beside the metrics: zeros by layer, plots, and the HPARAMS tab."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from . import plots
from .model import Classifier, regularised
from .results import Result
from .settings import Run

FOLDER = "tensorboard"


def logger(folder: Path) -> TensorBoardLogger:
    """TensorBoard's logger, whose files lie in the folder ``tensorboard``."""
    # Its own metric hp_metric, which says nothing here, would be the only one in HPARAMS.
    return TensorBoardLogger(folder, name=FOLDER, version="", default_hp_metric=False)


class ZerosByLayer(Callback):
    """Logs each regularised layer's share of zeros, in percent, at each evaluation."""

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs them."""
        assert isinstance(pl_module, Classifier)
        board = _board(trainer.loggers)
        if trainer.sanity_checking or not trainer.is_global_zero or board is None:
            return
        for layer in regularised(pl_module).layers:
            board.experiment.add_scalar(
                f"zeros by layer/{layer.name}", 100 * layer.fraction, trainer.global_step
            )


def log_result(trainer: pl.Trainer, run: Run, figures: Mapping[str, Any]) -> None:
    """Gives the HPARAMS tab a run's settings and what came of them.

    Args:
        trainer: whose loggers are used.
        run: the settings.
        figures: what to compare runs by; what is no finite number is left out.
    """
    board = _board(trainer.loggers)
    if board is None:
        return
    metrics = {
        f"result/{name}": value
        for name, value in figures.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
    settings = {name: value for name, value in asdict(run).items() if value is not None}
    board.log_hyperparams(settings, metrics, trainer.global_step)
    board.finalize("")


def log_pictures(folder: Path, pictures: Sequence[Path]) -> None:
    """Shows plots, which are PNG files, in the IMAGES tab.

    Args:
        folder: the output folder.
        pictures: the files; their names are the plots' names.
    """
    with SummaryWriter(str(folder.absolute() / FOLDER)) as writer:
        for path in pictures:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            writer.add_image(path.stem, pixels, dataformats="HWC")


def log_plots(folder: Path, result: Result) -> None:
    """Draws a run's plots for the IMAGES tab."""
    with tempfile.TemporaryDirectory() as drawn:
        place = Path(drawn)
        log_pictures(
            folder,
            [
                plots.training_curves({"run": [result]}, place / "training_curves.png", ""),
                plots.confusion(
                    {"": result.confusion}, result.classes, place / "confusion.png", ""
                ),
                plots.sparsity_by_layer(
                    {"": result.zeros_by_layer}, place / "sparsity_by_layer.png", ""
                ),
            ],
        )


def _board(loggers: Sequence[Any]) -> TensorBoardLogger | None:
    return next((one for one in loggers if isinstance(one, TensorBoardLogger)), None)
