"""The result of a run: ``result.json``, checked whole when it is read."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .checkpoints import class_names
from .files import RecipeError, read_json, write_text
from .former import upgraded_result
from .settings import Run, run_from_file

METRICS = ("accuracy", "loss", "f1")
ROW = ("epoch", *(f"{split}_{m}" for split in ("train", "validation") for m in METRICS), "zeros")
_COUNTS = ("train_images", "wrong_labels", "validation_images", "test_images")
_OF_TEST = tuple(f"test_{m}" for m in METRICS)


@dataclass(frozen=True)
class OnTest:
    """What some weights do on the test images, measured once, at the end."""

    test_accuracy: float
    test_loss: float
    test_f1: float
    right: list[int]
    """1 for each image that is classified right, else 0; in the order of the images."""
    groups: list[int] | None = None
    """Numbers of the images' groups, where they have any."""

    @property
    def figures(self) -> dict[str, float]:
        """The figures by their names."""
        return {name: getattr(self, name) for name in _OF_TEST}


@dataclass(frozen=True)
class Best:
    """The weights of the lowest validation loss, which ``best.ckpt`` keeps."""

    epoch: float
    """That of a row of the history."""
    zeros_by_layer: dict[str, float]
    confusion: list[list[int]]
    test: OnTest | None
    validation_error: float | None = None
    """The standard error of the mean loss of the validation images."""


@dataclass(frozen=True)
class Result:
    """What a run gave; ``result.json`` holds the same."""

    run: Run
    data: dict[str, Any]
    """Counts of images, classes and wrong labels."""
    history: list[dict[str, float]]
    """One row an evaluation: epoch, {train,validation}_{accuracy,loss,f1}, zeros."""
    step_ms: float
    """Median time of a step since the start or the resumption."""
    zeros_by_layer: dict[str, float]
    """Share of exact zeros by parameter, regularised weights only, input to output."""
    confusion: list[list[int]]
    """Held-out images by true class (row) and predicted class (column)."""
    made_with: dict[str, Any]
    test: OnTest | None = None
    """Of the weights at the end; None where there are no test images."""
    best: Best | None = None
    """None in results of versions before it was kept."""
    validation_error: float | None = None
    """The standard error of the mean loss of the validation images, with the weights at the end."""

    @property
    def held_out(self) -> str:
        """The images that figures are of: "test", or "validation" where there are no others."""
        return "validation" if self.test is None else "test"

    @property
    def last(self) -> dict[str, float]:
        """The last evaluation, with the test figures if there are any.

        ``held_out_accuracy`` and the like are those of ``held_out``, and ``gap`` is training
        accuracy less held-out accuracy.
        """
        row = {**self.history[-1], **(self.test.figures if self.test else {})}
        row |= {f"held_out_{m}": row.get(f"{self.held_out}_{m}", math.nan) for m in METRICS}
        gap = row["train_accuracy"] - row["held_out_accuracy"]
        return {**row, "gap": gap, "step_ms": self.step_ms}

    @property
    def stopped_early(self) -> Result:
        """The same run as if it had ended with the weights that the validation images choose."""
        if self.best is None:
            return self
        until = [row for row in self.history if row["epoch"] <= self.best.epoch]
        return replace(
            self,
            history=until,
            zeros_by_layer=self.best.zeros_by_layer,
            confusion=self.best.confusion,
            test=self.best.test,
            validation_error=self.best.validation_error,
        )

    @property
    def reported(self) -> Result:
        """What is told of a run: its end, or its best weights where it was to stop early."""
        return self.stopped_early if self.run.early_stopping else self

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return list(self.data["classes"])

    def save(self, folder: Path) -> None:
        """Writes ``result.json``."""
        write_text(folder / "result.json", to_json(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Result:
        """Reads ``result.json``.

        Raises:
            RecipeError: it is damaged, or another program's.
        """
        path = folder / "result.json"
        content = upgraded_result(read_json(path))
        names = {field.name for field in fields(cls)}
        if set(content) != names:
            raise RecipeError(f"{path} is no result of a run: it must have {', '.join(names)}")
        if why := _why_damaged(content):
            raise RecipeError(f"{path} is damaged: {why}")
        classes = class_names(content["data"]["classes"], path)
        if len(content["confusion"]) != len(classes):
            raise RecipeError(f"{path} is damaged: its confusion is not of {len(classes)} classes")
        best = content["best"]
        if best is not None:
            best = Best(**{**best, "test": _test(best["test"])})
        return cls(
            **{
                **content,
                "run": run_from_file(content["run"], path),
                "history": [_row(row) for row in content["history"]],
                "test": _test(content["test"]),
                "best": best,
            }
        )


def _test(content: Mapping[str, Any] | None) -> OnTest | None:
    return None if content is None else OnTest(**_row(content))


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: math.nan if value is None and name != "groups" else value
        for name, value in row.items()
    }


def _why_damaged(content: Mapping[str, Any]) -> str:
    """The first part of a result that isn't what it must be; "" for none."""
    data, history, confusion = content["data"], content["history"], content["confusion"]
    if not isinstance(data, Mapping) or "classes" not in data:
        return "its data must name the classes"
    for name in _COUNTS:
        if not _is_count(data.get(name)):
            return f"its {name} must be a whole number, and is {data.get(name)!r:.50}"
    if why := why_no_history(history):
        return why
    if not _is_number(content["step_ms"]):
        return f"its step_ms must be a number, and is {content['step_ms']!r:.50}"
    if why := _why_no_layers(content["zeros_by_layer"]) or _why_no_matrix(confusion):
        return why
    if why := _why_no_test(content["test"], data["test_images"]):
        return why
    if why := _why_no_best(content["best"], content):
        return why
    error = content["validation_error"]
    if error is not None and not _is_number(error):
        return f"its validation_error must be a number, and is {error!r:.50}"
    if not isinstance(content["made_with"], Mapping):
        return f"its made_with is a {type(content['made_with']).__name__}"
    return ""


def _why_no_layers(zeros: Any) -> str:
    if not isinstance(zeros, Mapping) or not zeros or not all(map(_is_number, zeros.values())):
        return "its zeros_by_layer must be a number for each layer"
    return ""


def _why_no_matrix(confusion: Any) -> str:
    if not isinstance(confusion, list) or not all(
        isinstance(row, list) and len(row) == len(confusion) and all(map(_is_count, row))
        for row in confusion
    ):
        return "its confusion must be a square of whole numbers"
    return ""


def _why_no_test(test: Any, images: int) -> str:
    """Why something is no ``OnTest`` of so many images; none is needed where there are none."""
    if test is None:
        return "its test must tell of the test images" if images else ""
    if not isinstance(test, Mapping) or set(test) != {field.name for field in fields(OnTest)}:
        return f"its test must have {', '.join(field.name for field in fields(OnTest))}"
    for name in _OF_TEST:
        if not (_is_number(test[name]) or test[name] is None):
            return f"its test has {test[name]!r:.50} for {name}"
    for name in ("right", "groups"):
        value = test[name]
        if value is None and name == "groups":
            continue
        if not isinstance(value, list) or len(value) != images or not all(map(_is_count, value)):
            return f"its test must have a whole number for each of {images} images as {name}"
    return ""


def _why_no_best(best: Any, content: Mapping[str, Any]) -> str:
    """Why something is no ``Best`` of a result; old results have none."""
    if best is None:
        return ""
    if not isinstance(best, Mapping) or set(best) != {field.name for field in fields(Best)}:
        return f"its best must have {', '.join(field.name for field in fields(Best))}"
    for name in ("epoch", "validation_error"):
        if not (_is_number(best[name]) or (best[name] is None and name != "epoch")):
            return f"its best has {best[name]!r:.50} for {name}"
    if best["epoch"] not in [row["epoch"] for row in content["history"]]:
        return f"its best has an epoch without an evaluation: {best['epoch']!r:.50}"
    if (best["test"] is None) != (content["test"] is None):
        return "its best must have a test where it has one itself"
    why = _why_no_layers(best["zeros_by_layer"]) or _why_no_matrix(best["confusion"])
    if not why and len(best["confusion"]) != len(content["confusion"]):
        why = "its best has a confusion of another size"
    return why or _why_no_test(best["test"], content["data"]["test_images"])


def why_no_history(rows: Any) -> str:
    """Why something is no history of a run; "" where it is. JSON has null for NaN."""
    if not isinstance(rows, list) or not rows:
        return f"its history must have a row for each evaluation, and is {rows!r:.50}"
    for row in rows:
        if not isinstance(row, Mapping) or set(row) != set(ROW):
            return f"its history must have rows of {', '.join(ROW)}"
        for name, value in row.items():
            if not (_is_number(value) or (value is None and name != "epoch")):
                return f"its history has {value!r:.50} for {name}"
    return ""


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def to_json(content: Any, indent: int | None = None) -> str:
    """A JSON file's text. JSON knows neither NaN nor infinity: null stands for them."""
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    return json.dumps(content, indent=indent) + "\n"


def made_with() -> dict[str, Any]:
    """Versions and machine, for reports."""
    return {
        "resnet_reg_ext": __version__,
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
