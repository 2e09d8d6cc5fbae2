"""The trials of a search for strengths: which one a rule chooses, and how they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .arms import strength_options
from .settings import Run


@dataclass(frozen=True)
class Trial:
    """One strength of one regulariser, and what it gave."""

    name: str
    place: int
    """In the grid, from 0; -1 for the run without a penalty."""
    l1: float
    weight_decay: float
    loss: float
    error: float
    accuracy: float
    zeros: float
    seconds: float


def choose(trials: Sequence[Trial], rule: str) -> Trial:
    """The trial that a rule chooses; the run without a penalty only sets the mark."""
    best = min(trials, key=lambda trial: trial.loss)
    strengths = sorted((t for t in trials if t.place >= 0), key=lambda trial: trial.place)
    if rule == "best":
        return min(strengths, key=lambda trial: trial.loss)
    within = [trial for trial in strengths if trial.loss <= best.loss + best.error]
    return within[-1] if within else min(strengths, key=lambda trial: trial.loss)


def compare_options(run: Run, chosen: Mapping[str, Trial]) -> dict[str, Any]:
    """The options of a comparison with these strengths."""
    options = asdict(replace(run, l1=chosen["L1"].l1, weight_decay=chosen["L2"].weight_decay))
    others = {n: (t.l1, t.weight_decay) for n, t in chosen.items() if n not in ("L1", "L2")}
    return {**options, **strength_options(others)}


def summary(trials: Sequence[Trial], chosen: Mapping[str, Trial], rule: str) -> str:
    """What was tried, in a Markdown table, and what was chosen."""
    head = ["", "l1", "weight decay", "val loss", "± s.e.", "val acc", "zeros", "chosen"]
    rows = [head]
    for trial in sorted(trials, key=lambda t: (["none", *chosen].index(t.name), t.place)):
        mark = "yes" if chosen.get(trial.name) == trial else ""
        figures = [f"{trial.loss:.3f}", f"{trial.error:.3f}", f"{trial.accuracy:.3f}"]
        strengths = [f"{trial.l1:g}", f"{trial.weight_decay:g}"]
        rows.append([trial.name, *strengths, *figures, f"{trial.zeros:.3f}", mark])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)))
    how = (
        "the strongest penalty whose validation loss is within one standard error of the lowest"
        if rule == "1se"
        else "the lowest validation loss"
    )
    lines = [f"| {line} |" for line in lines]
    return "\n".join(
        [
            *lines,
            "",
            f"- Chosen: {how}, the run without a penalty counted in. Validation images alone were "
            "looked at.",
            *_at_the_edge(trials, chosen),
        ]
    )


def _at_the_edge(trials: Sequence[Trial], chosen: Mapping[str, Trial]) -> list[str]:
    """Notes on choices beside which nothing was tried."""
    notes = []
    for name, trial in chosen.items():
        places = [t.place for t in trials if t.name == name]
        if len(places) > 1 and trial.place in (min(places), max(places)):
            end = "strongest" if trial.place == max(places) else "weakest"
            notes.append(f"- {name}: the {end} that was tried; a better one may lie beyond it.")
    return notes
