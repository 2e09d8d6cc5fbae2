"""Settings as command-line options and as a YAML file."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NoReturn

from .files import RecipeError
from .former import upgraded_settings
from .settings import (
    DIGITS,
    FOLDER_IMAGE_SIZE,
    RULES,
    Choice,
    Run,
    expanded,
    option_name,
)

# A strength that depends on the initial weights: see forecast.default_strengths.
BY_WEIGHTS = "by the initial weights"
# By group, each option's help; %(default)s is left to add_run_options.
_HELP = {
    "data": {
        "data": "'digits', or a folder: train/, val/ and test/, or a folder for each class, which "
        "--val-fraction and --test-fraction split",
        "val_fraction": "share of the images that choose checkpoints and strengths, drawn class by "
        "class where there is no val/",
        "test_fraction": "share of the images that are measured once, at the end, and that nothing "
        "is chosen by; the same for every --seed",
        "group_by": "regular expression on file names (and folders inside a class): images for "
        "which it finds the same text, or the same first group, are never split; the digits' "
        "names begin with writer01 to writer14; 'none': no groups",
        "train_size": "train on as many images, drawn class by class",
        "val_size": "validate on as many images, drawn class by class",
        "test_size": "test on as many images, drawn class by class; 0: no test images",
        "label_noise": "share of training labels to make wrong on purpose",
        "corrupt": "what to do about unreadable images",
        "image_size": "height and width in pixels: the shorter side is resized to it, the middle "
        "cut out",
        "augment": "shift: by up to an eighth; flip: left to right; standard: random crop, resize "
        "and flip; trivial: torchvision's TrivialAugmentWide on top of that",
        "mixup": "mix images and labels in pairs, by torchvision's MixUp with this alpha; 0: don't",
    },
    "training": {
        "weights": "initial weights: 'imagenet' (downloaded by torchvision), a state dict in a .pt "
        "or .safetensors file, or 'none'",
        "freeze": "freeze everything up to this stage",
        "label_smoothing": "share of each label that is spread over all classes",
        "dropout": "share of the features that is dropped before the head",
        "class_weights": "balanced: each class counts the same in the loss, however many images it "
        "has",
        "l1": "coefficient of the L1 norm",
        "target_sparsity": "share of the regularised weights to be zero within 80 %% of the steps: "
        "l1 is steered from --l1 on, and the zeros are then frozen",
        "channels": "share of the channels to take out while training, within 40 %% of the epochs, "
        "so that the model gets smaller and epochs cheaper; needs the extra 'compact'",
        "method": "how channels are chosen: the least important by the Taylor expansion of the "
        "loss, in stages; or those that a group lasso takes to zero, steered to the share (prox)",
        "weight_decay": "coefficient of half the squared L2 norm",
        "toward": "what l1 and weight decay pull the weights towards: zero, or their initial "
        "values (start), those of a new class head excepted",
        "lr": "learning rate at the start; falls to 0 along a cosine",
        "warmup": "epochs over which the learning rate rises from near 0 first",
        "momentum": "momentum",
        "epochs": "passes over the training images",
        "batch_size": "images a step, all processes together",
        "evaluate_every": "epochs between evaluations; lowered to divide --epochs",
        "early_stopping": "stop after as many evaluations without a lower validation loss, and "
        "take the weights of the lowest",
        "seed": "decides split, wrong labels, initial weights and order",
    },
    "machine": {
        "precision": "as Lightning's",
        "accelerator": "as Lightning's",
        "devices": "processes or GPUs",
        "strategy": "as Lightning's",
        "workers": "processes that load images",
    },
}


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print, and names the option that was meant."""

    def error(self, message: str) -> NoReturn:
        """Raises a RecipeError."""
        raise RecipeError(f"{message} ({self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As usual; an option that isn't known is named with those that are like it."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = next((u for u in unknown if u.startswith("-")), "").partition("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self.suggestion(option)}")
        return parsed

    def suggestion(self, option: str) -> str:
        """Which options look like one that isn't known; "" for none."""
        known = [name for action in self._actions for name in action.option_strings]
        word = "--" + option.lstrip("-").replace("_", "-").lower()
        like = difflib.get_close_matches(word, known, n=2)
        return f"; did you mean {' or '.join(like)}?" if like else ""


def add_run_options(parser: argparse.ArgumentParser, defaults: Run, *, l1: bool = True) -> None:
    """Adds an option for each field of ``Run``, and ``--config``.

    Args:
        parser: where to.
        defaults: what holds where an option is not given.
        l1: whether to add ``--l1``, which the regularisation path has a list of.
    """
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; options given win")
    of_folder = _folder_defaults(defaults)
    for title, texts in _HELP.items():
        group = parser.add_argument_group(title)
        for name, text in texts.items():
            if name == "l1" and not l1:
                continue
            default, rule = getattr(defaults, name), RULES[name]
            shown = "" if default is None else f" (default: {default})"
            if name in of_folder:
                shown = f" (default: {default} for the digits, {of_folder[name]} for a folder)"
                default = None
            checked: dict[str, Any] = (
                {"choices": rule.words} if isinstance(rule, Choice) else {"type": rule}
            )
            group.add_argument(option_name(name), default=default, help=text + shown, **checked)


def _folder_defaults(defaults: Run) -> dict[str, Any]:
    """Defaults of a folder of images that differ from those of the digits."""
    changed = {"image_size": FOLDER_IMAGE_SIZE, "group_by": "none", "label_noise": 0.0}
    if defaults.l1:
        changed |= {"l1": BY_WEIGHTS, "weight_decay": BY_WEIGHTS}
    return {name: value for name, value in changed.items() if getattr(defaults, name) != value}


def run_from(args: argparse.Namespace, defaults: Run, **changes: Any) -> Run:
    """The run that parsed options describe; ``defaults`` as for :func:`add_run_options`."""
    values = {f.name: getattr(args, f.name) for f in fields(Run) if hasattr(args, f.name)}
    for name, of_folder in _folder_defaults(defaults).items():
        if name in values and values[name] is None:
            values[name] = getattr(defaults, name) if values["data"] == DIGITS else of_folder
            if values[name] == BY_WEIGHTS:  # once they are loaded
                values[name] = 0.0
    return Run(**{**values, **changes})


def config_arguments(path: str, parser: Parser) -> list[str]:
    """A YAML file's options as command-line arguments, so that they are checked alike.

    Raises:
        RecipeError: it can't be read, is not a mapping, or has an option that isn't known.
    """
    content = upgraded_settings(_read_yaml(path))
    known = {a.dest: a for a in parser._actions if a.dest not in ("config", "help", "resume")}
    arguments: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known or not known[name].option_strings:
            raise RecipeError(
                f"--config {path}: no such option: {key!s:.100}{parser.suggestion(name)}"
            )
        option, is_flag = known[name].option_strings[0], known[name].nargs == 0
        if value is None or (value is False and is_flag):
            continue
        if value is True and is_flag:
            arguments.append(option)
            continue
        several = isinstance(value, list) and known[name].nargs is not None
        values = value if several else [value]
        for item in values:
            if is_flag or isinstance(item, bool) or not isinstance(item, str | int | float):
                # YAML 1.1 reads yes, no, on and off as booleans.
                raise RecipeError(
                    f"--config {path}: {option} can't be YAML's {_yaml_name(item)}; a word that "
                    "YAML takes for something else needs quotes"
                )
        arguments += [option, *map(str, values)] if several else [f"{option}={value}"]
    return arguments


def _yaml_name(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else type(value).__name__


def _read_yaml(path: str) -> Mapping[Any, Any]:
    import yaml  # --help works without it

    try:
        text = expanded(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"can't read --config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"--config {path} is not YAML: {error}") from None
    try:
        content = yaml.safe_load(text)
    # Impossible dates and numbers of thousands of digits are ValueErrors of Python's own.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"--config {path} is not YAML: {reason:.300}") from None
    if not isinstance(content, Mapping):
        raise RecipeError(f"--config {path} must map options to values")
    return content
