"""The parts of a report's page, and how figures are written in it."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from markupsafe import Markup

from . import report_plots
from .predictions import Mistake
from .settings import option_name

MOST_CELLS = 20  # classes; beyond, the most frequent mistakes are listed alone
_MOST_PAIRS = 10


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows; the others are numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Confusion:
    """A confusion matrix as it is shown."""

    name: str
    classes: Sequence[str]
    rows: Sequence[Sequence[tuple[int, float]]]
    """Counts and shares of the true class; empty where there are too many classes."""
    pairs: Sequence[tuple[str, str, int]]
    """True class, predicted class, images: the most frequent mistakes."""


@dataclass(frozen=True)
class Page:
    """Everything that the template shows."""

    command: str
    subtitle: str
    verdict: Sequence[str]
    tables: Sequence[Table]
    plots: Sequence[tuple[str, Markup]]
    """Captions and SVG."""
    confusions: Sequence[Confusion]
    sparsity: Markup
    layers: Table
    mistakes: Sequence[tuple[str, Sequence[Mistake]]]
    """By name of the run; empty where the folder doesn't tell."""
    images: str
    """The images that mistakes and confusion matrices are of."""
    repeat: Sequence[str]
    """The command line that repeats it, in the parts between which a line may break."""
    settings: Sequence[tuple[str, str]]
    made_with: str


def confusion(name: str, classes: Sequence[str], matrix: Sequence[Sequence[int]]) -> Confusion:
    """A matrix of counts, by true class (row) and predicted class (column)."""
    rows = [[(n, n / max(1, sum(row))) for n in row] for row in matrix]
    wrong = [
        (classes[i], classes[j], n)
        for i, row in enumerate(matrix)
        for j, n in enumerate(row)
        if n and i != j
    ]
    wrong.sort(key=lambda pair: -pair[2])
    shown = rows if len(classes) <= MOST_CELLS else []
    return Confusion(name, classes, shown, wrong[:_MOST_PAIRS])


def layers(zeros: Mapping[str, Mapping[str, float]]) -> tuple[Markup, Table]:
    """Zeros by layer and name of the run, as a plot and as a table."""
    names = [name or "exact zeros" for name in zeros]
    first = next(iter(zeros.values()))
    rows = [[layer, *(f"{shares[layer]:.1%}" for shares in zeros.values())] for layer in first]
    return Markup(report_plots.sparsity_by_layer(zeros)), Table(["layer", *names], rows)


def number(value: float | None, form: str = "{:.3f}") -> str:
    """A number, or what stands where there is none."""
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return form.format(value)


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    text = number(mean(values), form)
    if len(values) > 1:
        text += f" ± {number(stdev(values), form.replace('+', ''))}"
    return text


def command_line(command: str, options: Mapping[str, Any], files: Sequence[str] = ()) -> list[str]:
    """A command with all its options spelt out, as a shell takes it; one part an option."""
    words = [shlex.join(["resnet-reg", command, *files])]
    for name, value in options.items():
        if value is None or value is False:
            continue
        several = value if isinstance(value, list) else [] if value is True else [value]
        words.append(shlex.join([option_name(name), *map(str, several)]))
    return [*words, "--out NEW-FOLDER"]


def settings(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Options by their names; what was not given is left out."""
    return [
        (option_name(name), " ".join(map(str, value)) if isinstance(value, list) else str(value))
        for name, value in options.items()
        if value is not None
    ]


def versions(made_with: Mapping[str, Any]) -> str:
    """What made a result, in a line."""
    return ", ".join(f"{name} {value}" for name, value in made_with.items())
