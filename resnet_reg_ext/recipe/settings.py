"""Everything that defines a run, and the check of each setting, wherever it comes from."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .files import RecipeError, write_text
from .former import upgraded_settings

DIGITS = "digits"
FOLDER_IMAGE_SIZE = 224  # what ImageNet's weights were trained on
# The file in the output folder that holds a command's settings; `--resume` takes them from there.
OPTIONS_FILES = {
    "train": "run.yaml",
    "compare": "compare.yaml",
    "tune": "tune.yaml",
    "path": "path.yaml",
}
SPLITS = ("train", "val", "test")
STAGES = ("none", "conv1", "layer1", "layer2", "layer3", "layer4")
AUGMENTATIONS = ("none", "shift", "flip", "standard", "trivial")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
METHODS = ("taylor", "prox")  # of --channels
LARGEST_SHARE = 0.85  # of channels to take out
LARGEST_SEED = 2**32 - 1  # NumPy's, which draws the splits
PUBLISHED = ("none", "imagenet")  # values of --weights that name no file


@dataclass(frozen=True)
class Run:
    """One training run; ``run.yaml`` holds these fields. The options' help explains them."""

    data: str = DIGITS
    val_fraction: float | None = None
    test_fraction: float | None = None
    group_by: str = "none"
    train_size: int | None = None
    val_size: int | None = None
    test_size: int | None = None
    label_noise: float = 0.0
    corrupt: str = "refuse"
    weights: str = "none"
    freeze: str = "none"
    l1: float = 0.0
    target_sparsity: float | None = None
    channels: float | None = None
    method: str = "taylor"
    weight_decay: float = 0.0
    toward: str = "zero"
    lr: float = 0.02
    warmup: float = 0.0
    momentum: float = 0.9
    epochs: int = 20
    batch_size: int = 20
    image_size: int = 32
    augment: str = "none"
    mixup: float = 0.0
    label_smoothing: float = 0.0
    dropout: float = 0.0
    class_weights: str = "none"
    evaluate_every: int = 1
    early_stopping: int | None = None
    seed: int = 0
    precision: str = "32-true"
    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    workers: int = 0

    @property
    def steered_to(self) -> float | None:
        """``target_sparsity`` where there is an l1 to steer; the runs without are compared with."""
        return self.target_sparsity if self.l1 else None


# Which machine a run is made on, and where its files lie, make it no other run.
_OF_MACHINE = ("data", "weights", "corrupt", "accelerator", "devices", "strategy", "workers")


def same_run(first: Run, second: Run) -> str:
    """The first setting in which two runs differ that decides what comes out; "" for none."""
    for field in fields(Run):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if a != b and field.name not in _OF_MACHINE:
            return f"{option_name(field.name)} {a}, not {b}"
    return ""


@dataclass(frozen=True)
class Number:
    """A number in [low, high]; ``above`` and ``below`` leave the ends out."""

    kind: Callable[[str], float]
    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def why_not(self, value: Any, shown: str | None = None) -> str:
        """What would be right where a value isn't; "" where it is."""
        shown = repr(value) if shown is None else shown
        right = (int,) if self.kind is int else (int, float)
        if not isinstance(value, right) or isinstance(value, bool):
            what = "a whole number" if self.kind is int else "a number"
            return f"must be {what}, got {shown}"
        # A file may hold whole numbers that no float can be.
        outside = not self.low <= value <= min(self.high, sys.float_info.max)
        if outside or (self.above and value == self.low) or (self.below and value == self.high):
            limits = f"{'above' if self.above else 'at least'} {self.low}"
            if not math.isinf(self.high):
                limits += f" and {'below' if self.below else 'at most'} {self.high}"
            return f"must be {limits}, got {shown}"
        return ""

    def __call__(self, text: str) -> Any:
        """A type for argparse."""
        try:
            number = self.kind(text)
        except ValueError:
            number, why = math.nan, self.why_not(None, repr(text[:100]))
        else:
            why = self.why_not(number, text)
        if why:
            raise argparse.ArgumentTypeError(why)
        return number


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def why_not(self, value: Any) -> str:
        """What would be right where a value isn't; "" where it is."""
        if isinstance(value, str) and value in self.words:
            return ""
        return f"must be one of {', '.join(self.words)}, got {value!r}"


@dataclass(frozen=True)
class Text:
    """A path or a name."""

    def why_not(self, value: Any) -> str:
        """What would be right where a value isn't; "" where it is."""
        if isinstance(value, str) and value and "\0" not in value:
            return ""
        return f"must be a name or a path, got {value!r}"

    def __call__(self, text: str) -> str:
        """A type for argparse."""
        if why := self.why_not(text):
            raise argparse.ArgumentTypeError(why)
        return text


@dataclass(frozen=True)
class Pattern(Text):
    """A regular expression."""

    def why_not(self, value: Any) -> str:
        """What would be right where a value isn't; "" where it is."""
        if why := super().why_not(value):
            return why.replace("a name or a path", "a regular expression")
        try:
            re.compile(value)
        except re.error as error:
            return f"must be a regular expression, got {value!r:.100}: {error}"
        return ""


_COUNT, _SHARE, _RATE = Number(int, 1), Number(float, 0, 1), Number(float, 0)
RULES: dict[str, Number | Choice | Text] = {
    "data": Text(),
    "val_fraction": Number(float, 0, 1, above=True, below=True),
    "test_fraction": Number(float, 0, 1, above=True, below=True),
    "group_by": Pattern(),
    "train_size": _COUNT,
    "val_size": _COUNT,
    "test_size": Number(int, 0),
    "label_noise": _SHARE,
    "corrupt": Choice(("refuse", "skip")),
    "weights": Text(),
    "freeze": Choice(STAGES),
    "l1": _RATE,
    "target_sparsity": Number(float, 0.01, 1, below=True),
    "channels": Number(float, 0, LARGEST_SHARE, above=True),
    "method": Choice(METHODS),
    "weight_decay": _RATE,
    "toward": Choice(("zero", "start")),
    "lr": _RATE,
    "warmup": _RATE,
    "momentum": Number(float, 0, 1, below=True),
    "epochs": _COUNT,
    "batch_size": Number(int, 2),
    "image_size": Number(int, 8),
    "augment": Choice(AUGMENTATIONS),
    "mixup": _RATE,
    "label_smoothing": Number(float, 0, 1, below=True),
    "dropout": Number(float, 0, 1, below=True),
    "class_weights": Choice(("none", "balanced")),
    "evaluate_every": _COUNT,
    "early_stopping": _COUNT,
    "seed": Number(int, 0, LARGEST_SEED),
    "precision": Choice(PRECISIONS),
    "accelerator": Choice(("auto", "cpu", "gpu")),
    "devices": _COUNT,
    "strategy": Choice(("auto", "ddp")),
    "workers": Number(int, 0),
}


def option_name(field: str) -> str:
    """A field's name on the command line."""
    return f"--{field.replace('_', '-')}"


def run_from_file(content: Any, where: object) -> Run:
    """The run that a file describes; settings that an older version didn't have get the default.

    Args:
        content: what the file holds under ``run``.
        where: the file, for the error.

    Raises:
        RecipeError: it is no description of a run, names an unknown setting or an impossible value.
    """
    if not isinstance(content, Mapping):
        raise RecipeError(f"{where} is damaged: its run is a {type(content).__name__}")
    content = upgraded_settings(content)
    for name in content:
        if name not in RULES:
            raise RecipeError(f"{where} has a run with an unknown setting: {name!r:.100}")
    run = Run(**content)
    check_run(run, f"{where}: ")
    return run


def check_run(run: Run, where: str = "") -> None:
    """Refuses impossible settings.

    Raises:
        RecipeError: names the first one.
    """
    defaults = Run()
    for name, rule in RULES.items():
        value = getattr(run, name)
        if value is None and getattr(defaults, name) is None:
            continue
        if why := rule.why_not(value):
            raise RecipeError(f"{where}{option_name(name)}: {why:.300}")
    if run.warmup >= run.epochs:
        raise RecipeError(
            f"{where}--warmup {run.warmup:g} must be less than the {run.epochs} of --epochs"
        )
    if run.toward == "start":
        _check_start(run, where)
    shares = [share for share in (run.val_fraction, run.test_fraction) if share is not None]
    if sum(shares) >= 1:
        raise RecipeError(
            f"{where}--val-fraction {shares[0]} and --test-fraction {shares[1]} leave nothing to "
            "train on"
        )


def _check_start(run: Run, where: str) -> None:
    for wrong, option, reason in (
        (run.weights == "none", "--weights none", "there is no start worth keeping to"),
        (run.target_sparsity is not None, "--target-sparsity", "it asks for zeros"),
        (run.channels is not None, "--channels", "channels that are taken out have no start"),
    ):
        if wrong:
            raise RecipeError(f"{where}--toward start can't be combined with {option}: {reason}")


def expanded(path: str) -> Path:
    """A path whose ``~`` is expanded, which YAML and ``--out=~/x`` leave to the program.

    Raises:
        RecipeError: there is no home folder of such a name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise RecipeError(
            f"{path}: there is no home folder of that name; for a file of that name give ./{path}"
        ) from None


def with_absolute_paths(run: Run) -> Run:
    """The run as it is recorded, which means the same from any folder."""
    data = run.data if run.data == DIGITS else str(expanded(run.data).absolute())
    weights = run.weights if run.weights in PUBLISHED else str(expanded(run.weights).absolute())
    return replace(run, data=data, weights=weights)


def save_options(options: Mapping[str, Any], path: Path) -> None:
    """Writes the file that repeats a command with ``--config FILE``."""
    import yaml  # --help works without it

    write_text(path, yaml.safe_dump(dict(options), sort_keys=False))
