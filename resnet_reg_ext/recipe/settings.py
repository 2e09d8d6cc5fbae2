"""Everything that defines a run, as command-line options and as a YAML file."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .files import RecipeError, write_text

DIGITS = "digits"
FOLDER_IMAGE_SIZE = 224  # what ImageNet's weights were trained on
# What a command's settings are in, in its output folder; `--resume` takes them from there.
OPTIONS_FILES = {"train": "run.yaml", "compare": "compare.yaml", "path": "path.yaml"}
STAGES = ("none", "conv1", "layer1", "layer2", "layer3", "layer4")
AUGMENTATIONS = ("none", "shift", "standard")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


@dataclass(frozen=True)
class Run:
    """One training run; ``run.yaml`` holds these fields. The options' help explains them."""

    data: str = DIGITS
    val_fraction: float | None = None
    train_size: int | None = None
    test_size: int | None = None
    label_noise: float = 0.0
    corrupt: str = "refuse"
    weights: str = "none"
    freeze: str = "none"
    l1: float = 0.0
    target_sparsity: float | None = None
    weight_decay: float = 0.0
    lr: float = 0.02
    momentum: float = 0.9
    epochs: int = 20
    batch_size: int = 20
    image_size: int = 32
    augment: str = "none"
    evaluate_every: int = 5
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


def in_range(
    kind: Callable[[str], float],
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> Callable[[str], Any]:
    """A type for argparse: a number in [low, high]; ``above`` and ``below`` leave the ends out."""
    limits = f"{'above' if above else 'at least'} {low}"
    if not math.isinf(high):
        limits += f" and {'below' if below else 'at most'} {high}"

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None
        outside = not low <= number <= high or math.isinf(number)
        if outside or (above and number == low) or (below and number == high):
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return number

    return parse


def add_run_options(parser: argparse.ArgumentParser, defaults: Run, *, l1: bool = True) -> None:
    """Adds an option for each field of ``Run``, and ``--config``.

    Args:
        parser: where to.
        defaults: what holds where an option is not given.
        l1: whether to add ``--l1``, which the regularisation path has a list of.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; options given win")
    data = parser.add_argument_group("data")
    training = parser.add_argument_group("training")
    machine = parser.add_argument_group("machine")

    def add(group: Any, name: str, text: str, **options: Any) -> None:
        default = getattr(defaults, name)
        shown = "" if default is None else f" (default: {default})"
        if name in of_folder:
            shown = f" (default: {default} for the digits, {of_folder[name]} for a folder)"
            default = None
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, default=default, help=text + shown, **options)

    of_folder = _folder_defaults(defaults)
    count, seed = in_range(int, 1), in_range(int, 0, 2**32 - 1)
    share, rate = in_range(float, 0, 1), in_range(float, 0)
    add(
        data,
        "data",
        "'digits', or a folder: train/ with val/ or test/, or one folder a class, "
        "which --val-fraction splits",
    )
    add(
        data,
        "val_fraction",
        "share of the images to test on, drawn class by class",
        type=in_range(float, 0, 1, above=True, below=True),
    )
    add(data, "train_size", "train on as many images, drawn class by class", type=count)
    add(data, "test_size", "test on as many images, drawn class by class", type=count)
    add(data, "label_noise", "share of training labels to make wrong on purpose", type=share)
    add(data, "corrupt", "what to do about unreadable images", choices=("refuse", "skip"))
    add(
        data,
        "image_size",
        "height and width in pixels: the shorter side is resized to it, the middle cut out",
        type=in_range(int, 8),
    )
    add(
        data,
        "augment",
        "shift: by up to an eighth; standard: random crop, resize and flip",
        choices=AUGMENTATIONS,
    )
    add(
        training,
        "weights",
        "initial weights: 'imagenet' (downloaded by torchvision), a state dict in a .pt or "
        ".safetensors file, or 'none'",
    )
    add(training, "freeze", "freeze everything up to this stage", choices=STAGES)
    if l1:
        add(training, "l1", "coefficient of the L1 norm", type=rate)
    add(
        training,
        "target_sparsity",
        "share of the regularised weights to be zero within 80 %% of the steps: l1 is steered from "
        "--l1 on, and the zeros are then frozen",
        type=in_range(float, 0.01, 1, below=True),
    )
    add(training, "weight_decay", "coefficient of half the squared L2 norm", type=rate)
    add(training, "lr", "learning rate at the start; falls to 0 along a cosine", type=rate)
    add(training, "momentum", "momentum", type=in_range(float, 0, 1, below=True))
    add(training, "epochs", "passes over the training images", type=count)
    add(training, "batch_size", "images a step, all processes together", type=in_range(int, 2))
    add(
        training,
        "evaluate_every",
        "epochs between evaluations; lowered to divide --epochs",
        type=count,
    )
    add(
        training,
        "early_stopping",
        "stop after as many evaluations without a lower test loss",
        type=count,
    )
    add(training, "seed", "decides split, wrong labels, initial weights and order", type=seed)
    add(machine, "precision", "as Lightning's", choices=PRECISIONS)
    add(machine, "accelerator", "as Lightning's", choices=("auto", "cpu", "gpu"))
    add(machine, "devices", "processes or GPUs", type=count)
    add(machine, "strategy", "as Lightning's", choices=("auto", "ddp"))
    add(machine, "workers", "processes that load images", type=in_range(int, 0))


def _folder_defaults(defaults: Run) -> dict[str, Any]:
    """What isn't the same for a folder of images as for the digits, where it isn't given."""
    changed = {"image_size": FOLDER_IMAGE_SIZE, "label_noise": 0.0}
    return {name: value for name, value in changed.items() if getattr(defaults, name) != value}


def run_from(args: argparse.Namespace, defaults: Run, **changes: Any) -> Run:
    """The run that parsed options describe; ``defaults`` as for :func:`add_run_options`."""
    values = {f.name: getattr(args, f.name) for f in fields(Run) if hasattr(args, f.name)}
    for name, of_folder in _folder_defaults(defaults).items():
        if values[name] is None:
            values[name] = getattr(defaults, name) if values["data"] == DIGITS else of_folder
    return Run(**{**values, **changes})


def config_arguments(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """A YAML file's options as command-line arguments, so that they are checked alike.

    Raises:
        RecipeError: it can't be read, is not a mapping, or has an option that isn't known.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise RecipeError(f"can't read --config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"--config {path} is not YAML: {reason}") from None
    if not isinstance(content, Mapping):
        raise RecipeError(f"--config {path} must map options to values")
    known = {action.dest: action for action in parser._actions}
    arguments: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in ("config", "help") or name not in known:
            raise RecipeError(f"--config {path}: no such option: {key}")
        option = known[name].option_strings[0]
        if value is None or value is False:
            continue
        if value is True:
            arguments.append(option)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            arguments += [option, *map(str, value)]
        else:
            arguments.append(f"{option}={value}")
    return arguments


def save_options(options: Mapping[str, Any], path: Path) -> None:
    """Writes the file that repeats a command with ``--config FILE``."""
    write_text(path, yaml.safe_dump(dict(options), sort_keys=False))
