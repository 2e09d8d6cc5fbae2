"""The result of a run: ``result.json``, checked whole when it is read."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .checkpoints import class_names
from .files import RecipeError, write_text
from .settings import Run, run_from_file

METRICS = ("accuracy", "loss", "f1")
ROW = ("epoch", *(f"{split}_{m}" for split in ("train", "test") for m in METRICS), "zeros")
_COUNTS = ("train_images", "wrong_labels", "test_images")


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
        """Reads ``result.json``.

        Raises:
            RecipeError: it is damaged, or another program's.
        """
        path = folder / "result.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(f"can't read {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path} is damaged: {error!s:.200}") from None
        names = {field.name for field in fields(cls)}
        if not isinstance(content, Mapping) or set(content) != names:
            raise RecipeError(f"{path} is no result of a run: it must have {', '.join(names)}")
        if why := _why_damaged(content):
            raise RecipeError(f"{path} is damaged: {why}")
        classes = class_names(content["data"]["classes"], path)
        if len(content["confusion"]) != len(classes):
            raise RecipeError(f"{path} is damaged: its confusion is not of {len(classes)} classes")
        history = [_row(row) for row in content["history"]]
        return cls(**{**content, "run": run_from_file(content["run"], path), "history": history})


def _row(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in row.items()}


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
    zeros = content["zeros_by_layer"]
    if not isinstance(zeros, Mapping) or not zeros or not all(map(_is_number, zeros.values())):
        return "its zeros_by_layer must be a number for each layer"
    if not isinstance(confusion, list) or not all(
        isinstance(row, list) and len(row) == len(confusion) and all(map(_is_count, row))
        for row in confusion
    ):
        return "its confusion must be a square of whole numbers"
    if not isinstance(content["made_with"], Mapping):
        return f"its made_with is a {type(content['made_with']).__name__}"
    return ""


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
