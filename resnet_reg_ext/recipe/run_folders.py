"""What the commands have left in an output folder, read for the report.

The names that result files use for their sets of images are adapted here alone. In files of 0.1.0
the images that chose the best epoch were called test; where they are called validation, test images
are others, measured once at the end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import RecipeError, read_json
from .predictions import Mistake, load_mistakes
from .settings import OPTIONS_FILES

EVALUATION = "evaluation.json"
Row = Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """What one run gave."""

    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    """Counts of images, classes and wrong labels."""
    history: Sequence[Row]
    """One row an evaluation: epoch, zeros, and train_* and watched_* for accuracy, loss and f1."""
    watched: str
    """What the images that were measured during training are called: "validation" or "test"."""
    held_out: str
    """What the images that the final figures are of are called."""
    final: Row
    """train_*, held_out_*, gap, zeros, step_ms."""
    zeros_by_layer: Mapping[str, float]
    confusion: Sequence[Sequence[int]]
    made_with: Mapping[str, Any]
    mistakes: Sequence[Mistake] | None = None
    """None where the folder doesn't tell."""

    @property
    def classes(self) -> list[str]:
        """Class names."""
        return list(self.data["classes"])

    @property
    def held_out_images(self) -> int:
        """The number of images that the final figures are of."""
        return sum(map(sum, self.confusion))


@dataclass(frozen=True)
class RunFolder:
    """What a training command gave: by name of the arm, one run a seed."""

    command: str
    folder: Path
    options: Mapping[str, Any]
    arms: Mapping[str, Sequence[RunRecord]]
    conditions: str = ""
    """What all arms had in common, in a line."""
    verdict: Sequence[str] = field(default_factory=list)
    """As the command printed it."""


def command_of(folder: Path) -> str:
    """The command whose output folder it is.

    Raises:
        RecipeError: it is none's, or its run is not finished.
    """
    if (folder / EVALUATION).is_file():
        return "evaluate"
    for command, options in OPTIONS_FILES.items():
        if (folder / options).is_file():
            result = _result_file(command)
            if not (folder / result).is_file():
                raise RecipeError(
                    f"{folder} has no {result}: `{command}` hasn't finished; to go on: "
                    f"resnet-reg {command} --resume {folder}"
                )
            return command
    raise RecipeError(f"{folder} is not the output folder of a resnet-reg command")


def read_run_folder(folder: Path) -> RunFolder:
    """Reads the output folder of ``train``, ``compare``, ``path`` or another training command.

    Raises:
        RecipeError: it is no such folder, or a file is damaged.
    """
    import yaml

    command = command_of(folder)
    try:
        text = (folder / OPTIONS_FILES[command]).read_text(encoding="utf-8")
        options = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"can't read {folder / OPTIONS_FILES[command]}: {reason:.200}") from None
    path = folder / _result_file(command)
    content = read_json(path)
    if command == "train":
        return RunFolder(command, folder, options, {"": [_record(content, path, folder)]})
    if not isinstance(content.get("runs"), Mapping):
        raise RecipeError(f"{path} is damaged: it has no runs")
    folders = _folders_of_runs(folder)
    arms = {
        name: [_record(run, path, folders.get(_key(run))) for run in runs]
        for name, runs in content["runs"].items()
    }
    conditions, verdict = _said(folder / f"{command}.md")
    return RunFolder(command, folder, options, arms, conditions, verdict)


def _result_file(command: str) -> str:
    return "result.json" if command == "train" else f"{command}.json"


def _record(content: Mapping[str, Any], path: Path, folder: Path | None) -> RunRecord:
    try:
        return _adapted(content, load_mistakes(folder) if folder else None)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        what = f"{type(error).__name__}: {error!s:.100}"
        raise RecipeError(f"{path} is damaged, or another version's: {what}") from None


def _adapted(content: Mapping[str, Any], mistakes: Sequence[Mistake] | None) -> RunRecord:
    watched = "validation" if "validation_accuracy" in content["history"][0] else "test"
    ends, test = content, content.get("test")
    rows = [_row(row, watched) for row in content["history"]]
    best = content.get("best")
    # A run that was to stop early is told by the weights that it stopped for.
    if content["run"].get("early_stopping") and best is not None:
        ends, test = {**content, **best}, best.get("test")
        rows = [row for row in rows if row["epoch"] <= best["epoch"]]
    held_out = "test" if test else watched
    source = _row(test, "test") if test else rows[-1]
    metrics = ("accuracy", "loss", "f1")
    final = {**rows[-1], **{f"held_out_{m}": source[f"watched_{m}"] for m in metrics}}
    final["gap"] = final["train_accuracy"] - final["held_out_accuracy"]
    final["step_ms"] = float(content["step_ms"])
    return RunRecord(
        settings=content["run"],
        data=content["data"],
        history=rows,
        watched=watched,
        held_out=held_out,
        final=final,
        zeros_by_layer={n: float(v) for n, v in ends["zeros_by_layer"].items()},
        confusion=[[int(n) for n in row] for row in ends["confusion"]],
        made_with=content["made_with"],
        mistakes=mistakes,
    )


def _row(row: Mapping[str, Any], watched: str) -> dict[str, float]:
    """A row of numbers whose watched set has one name; JSON has null for NaN."""
    return {
        name.replace(f"{watched}_", "watched_", 1): math.nan if value is None else float(value)
        for name, value in row.items()
        if value is None or isinstance(value, int | float)
    }


def _folders_of_runs(folder: Path) -> dict[str, Path]:
    """The runs' own folders, by their settings and results."""
    return dict(_runs_below(folder))


def _runs_below(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("result.json")):
        try:
            yield _key(read_json(path)), path.parent
        except (RecipeError, KeyError):
            continue  # not needed for more than pictures


def _key(run: Mapping[str, Any]) -> str:
    return json.dumps([run["run"], run["history"]], sort_keys=True)


def _said(path: Path) -> tuple[str, list[str]]:
    """The first line of a command's text, and its list of findings."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "", []
    return next(iter(lines), ""), [line[2:] for line in lines if line.startswith("- ")]
