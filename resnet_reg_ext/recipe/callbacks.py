"""What happens around the steps: progress, history, checkpoints, stopping."""

from __future__ import annotations

import math
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, EarlyStopping
from tqdm import tqdm

from .checkpoints import save_checkpoint
from .files import RecipeError, Stopped
from .model import Classifier, regularised
from .results import ROW, why_no_history
from .terminal import leave_terminal


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints beside their place and renames them, so that none is ever half there."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Writes one; a full disk leaves the former file."""
        save_checkpoint(checkpoint, Path(path))


class StopOnSignal(Callback):
    """Ctrl-C, SIGTERM and SIGHUP stop after the step under way, with a checkpoint to go on from.

    After an epoch's last step its evaluation comes first. A second Ctrl-C or SIGTERM stops at once.
    A second SIGHUP does not: a terminal that closes sends one itself, and its shell another.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.received = 0
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # nohup ignores SIGHUP: the run outlives its terminal.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        if number == signal.SIGHUP:
            leave_terminal()
        else:
            signal.signal(number, self.before[number])

    def _give_back(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Stops if a signal came, unless the epoch ends here."""
        if not trainer.is_last_batch:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops if a signal came, the evaluation behind."""
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: pl.Trainer) -> None:
        """Stops in all processes after the same step."""
        received = trainer.strategy.reduce_boolean_decision(self.received > 0, all=False)
        if received:
            trainer.save_checkpoint(self.checkpoint)
            raise Stopped(self.received or signal.SIGTERM, self.checkpoint.parent)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gives the signals back.

        Before Lightning does: its own handler, put back after that, would hold the trainer, and so
        the model, for as long as the process lives.
        """
        self._give_back()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Gives the signals back."""
        self._give_back()


class Patience(EarlyStopping):
    """Early stopping whose count of evaluations, and whose end, a resumption keeps.

    Args:
        evaluations: how many may pass without a lower validation loss.
    """

    def __init__(self, evaluations: int) -> None:
        # Before the epoch ends, when its checkpoint is written.
        super().__init__("validation_loss", patience=evaluations, check_on_train_epoch_end=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stays stopped."""
        if self.stopped_epoch:
            trainer.should_stop = True


class Checkpoints(Callback):
    """Keeps the last state after each epoch that is evaluated, and the best weights.

    Args:
        folder: where ``last.ckpt`` (to resume from) and ``best.ckpt`` (weights alone, of the lowest
            validation loss) go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lowest: float | None = None
        self.best_epoch = 0
        """The epoch of ``best.ckpt``, counted from 1; 0 before there is one."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"lowest": self.lowest, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        self.lowest, self.best_epoch = state_dict["lowest"], state_dict["best_epoch"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes what is due."""
        if not evaluated(trainer):
            return
        loss = float(trainer.callback_metrics["validation_loss"])
        is_shrinking = isinstance(pl_module, Classifier) and pl_module.is_shrinking
        # Any loss is better than NaN, as that of an epoch that diverged.
        is_lowest = self.lowest is None or math.isnan(self.lowest) or loss < self.lowest
        if is_lowest and not is_shrinking:
            self.lowest, self.best_epoch = loss, trainer.current_epoch + 1
            trainer.save_checkpoint(self.folder / "best.ckpt", weights_only=True)
        trainer.save_checkpoint(self.folder / "last.ckpt")


def evaluated(trainer: pl.Trainer) -> bool:
    """Whether the epoch that ends was evaluated."""
    every = trainer.check_val_every_n_epoch or 1
    return (trainer.current_epoch + 1) % every == 0


class History(Callback):
    """What each evaluation measured, and how long steps took."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.step_times: list[float] = []
        self.started = 0.0
        self.has_begun = False
        """Whether training has begun, all of a checkpoint restored."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes that nothing is left to restore."""
        self.has_begun = True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from there."""
        rows = state_dict["rows"]
        if rows != [] and (why := why_no_history(rows)):
            raise RecipeError(f"the checkpoint is damaged: {why}")
        self.rows = rows

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Notes the time."""
        self.started = _now(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Forward, backward and the optimizer are behind."""
        self.step_times.append(_now(pl_module) - self.started)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds a row."""
        if trainer.sanity_checking:
            return
        row = {"epoch": float(trainer.current_epoch + 1)}
        row |= {name: float(trainer.callback_metrics[name]) for name in ROW[1:]}
        self.rows.append(row)

    @property
    def step_ms(self) -> float:
        """Median time of a step."""
        return 1000 * median(self.step_times) if self.step_times else 0.0


def _now(module: pl.LightningModule) -> float:
    """The time once the device has done what it was given."""
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


class Progress(Callback):
    """One bar over all steps, with loss, accuracy, zeros and the time left.

    A terminal that closes, or a log on a full disk, ends no run.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: tqdm[Any] | None = None
        self.zeros = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar."""
        if trainer.is_global_zero:
            with suppress(OSError):
                self.bar = tqdm(
                    total=int(trainer.estimated_stepping_batches),
                    initial=trainer.global_step,
                    desc=self.name,
                    unit="step",
                    # A log file gets a line now and then, a terminal gets a moving bar.
                    mininterval=0.5 if sys.stderr.isatty() else 15,
                )

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Counts zeros, which takes about as long as reading all weights."""
        assert isinstance(pl_module, Classifier)
        if self.bar is not None:
            self.zeros = regularised(pl_module).fraction

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Moves the bar."""
        if self.bar is None:
            return
        loss, accuracy = (float(trainer.callback_metrics[n]) for n in ("loss", "accuracy"))
        with suppress(OSError):
            self.bar.set_postfix_str(
                f"loss {loss:.3f}, accuracy {accuracy:.2f}, zeros {self.zeros:.0%}", refresh=False
            )
            self.bar.update()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Prints what was measured, for those who read a log."""
        if self.bar is None or not evaluated(trainer):
            return
        measured = trainer.callback_metrics
        with suppress(OSError):
            tqdm.write(
                f"  epoch {trainer.current_epoch + 1}: "
                f"accuracy {measured['train_accuracy']:.3f} train, "
                f"{measured['validation_accuracy']:.3f} validation; validation loss "
                f"{measured['validation_loss']:.3f}; "
                f"zeros {measured['zeros']:.1%}"
            )
            sys.stdout.flush()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Closes the bar."""
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Closes the bar: there is no teardown then."""
        self.teardown(trainer, pl_module, "fit")
