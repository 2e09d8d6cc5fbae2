"""Plots for the report: SVG inside a page, in the page's colours, small enough for a phone."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any
from xml.etree import ElementTree

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .plots import COLOURS, MARKERS
from .run_folders import RunRecord

Arms = Mapping[str, Sequence[RunRecord]]
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)

# Colours in which matplotlib draws, and the style sheet's variables that stand there in the page.
_INK, _GRID, _PAPER = "#010203", "#040506", "#070809"
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)", _PAPER: "var(--paper)"}
_VARIABLES |= {colour.lower(): f"var(--c{i})" for i, colour in enumerate(COLOURS)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # letters stay letters: searchable, in the reader's font
    "font.size": 9,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_SIZE = (4.3, 3.3)  # inches; a phone shows it at three quarters


def curves(arms: Arms, metric: str) -> str:
    """A metric over the epochs: training images dashed, held-out images solid, means over seeds.

    Args:
        arms: runs by name.
        metric: "accuracy", "loss" or "zeros".
    """

    def draw(axes: Any) -> None:
        sides = [("", "-")] if metric == "zeros" else [("train_", "--"), ("watched_", "-")]
        lowest, highest = [], []
        for index, (name, runs) in enumerate(arms.items()):
            length = min(len(run.history) for run in runs)
            epochs = [row["epoch"] for row in runs[0].history[:length]]
            for side, style in sides:
                points = [
                    [run.history[i][f"{side}{metric}"] for run in runs] for i in range(length)
                ]
                line = [mean(p) * (100 if metric == "zeros" else 1) for p in points]
                look = _look(index, len(arms)) | {
                    "markerfacecolor": _PAPER if style == "--" else None
                }
                label = name if style == "-" else None
                axes.plot(epochs, line, style, label=label, **look)
                finite = [value for value in line if value == value and abs(value) < float("inf")]
                lowest += [min(finite)] if finite else []
                highest += [max(finite)] if finite else []
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if metric == "loss":
            axes.set_ylabel("cross-entropy")
            # Before batch norm's running statistics have settled, losses can be huge.
            if lowest and max(highest) >= 10 * min(lowest) > 0:
                axes.set(ylabel="cross-entropy (log scale)", yscale="log")
        elif metric == "zeros":
            axes.set(ylabel="exact zeros, %", ylim=(-3, 103))
        else:
            axes.set(ylabel="accuracy", ylim=(0, 1.03))

    return _drawn(draw, f"{metric}-curve", len(arms) if len(arms) > 1 else 0)


def gap(arms: Arms) -> str:
    """Training and held-out accuracy as two ends of a bar, whose length is the gap."""

    def draw(axes: Any) -> None:
        for y, runs in enumerate(arms.values()):
            colour = COLOURS[y % len(COLOURS)]
            train, held_out = (
                [run.final[f"{side}_accuracy"] for run in runs] for side in ("train", "held_out")
            )
            low, high = mean(held_out), mean(train)
            axes.plot([low, high], [y, y], color=colour, linewidth=5, alpha=0.35)
            for values, face in ((train, _PAPER), (held_out, colour)):
                error = stdev(values) if len(values) > 1 else None
                axes.errorbar(
                    mean(values), y, xerr=error, fmt="o", color=colour, markerfacecolor=face
                )
            axes.annotate(
                f"gap {high - low:+.3f}",
                ((low + high) / 2, y),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set_yticks(range(len(arms)), [name or "this run" for name in arms])
        axes.set(ylim=(len(arms) - 0.4, -0.6), xlabel="accuracy")
        left = min(run.final["held_out_accuracy"] for runs in arms.values() for run in runs)
        axes.set_xlim(max(0.0, 0.9 * left - 0.05) if left == left else 0.0, 1.03)
        axes.grid(axis="x", alpha=0.6)

    height = 1.1 + 0.45 * max(2, len(arms))
    return _drawn(draw, "gap", 0, (_SIZE[0], height))


def sparsity_by_layer(arms: Mapping[str, Mapping[str, float]]) -> str:
    """Share of zeros in each regularised layer, input to output, by name of the arm."""
    layers = list(next(iter(arms.values())))
    stages = [layer.split(".")[0] for layer in layers]
    starts = [i for i, stage in enumerate(stages) if i == 0 or stage != stages[i - 1]]
    ends = [*starts[1:], len(stages)]

    def draw(axes: Any) -> None:
        for index, shares in enumerate(arms.values()):
            label = list(arms)[index]
            line = [100 * shares[layer] for layer in layers]
            axes.plot(line, label=label, **(_look(index, len(arms)) | {"markersize": 2.5}))
        middles = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
        names = [stages[start] for start in starts]
        # The first and the last stage are one layer each, beside which there is no room.
        axes.set_xticks(middles, names, rotation=35, ha="right", rotation_mode="anchor")
        for start in starts[1:]:
            axes.axvline(start - 0.5, color=_GRID, linewidth=1, zorder=0)
        axes.grid(axis="y", alpha=0.6)
        axes.set(ylabel="exact zeros, %", ylim=(-3, 103))

    return _drawn(draw, "sparsity", len(arms) if len(arms) > 1 else 0)


def against_strength(arms: Arms, metric: str) -> str:
    """Accuracies and gap, or zeros, against the strength of L1 (a path)."""
    strengths = [float(runs[0].settings["l1"]) for runs in arms.values()]
    lines = [("train_accuracy", "training", 4, "--"), ("held_out_accuracy", "held out", 1, "-")]
    lines.append(("gap", "gap", 3, "-"))
    if metric == "zeros":
        lines = [("zeros", "exact zeros", 1, "-")]

    def draw(axes: Any) -> None:
        # Evenly spaced: the values are usually spaced by factors, and 0 has no logarithm.
        places = range(len(strengths))
        scale = 100 if metric == "zeros" else 1
        for name, label, colour, style in lines:
            points = [[scale * run.final[name] for run in runs] for runs in arms.values()]
            errors = [stdev(p) for p in points] if min(map(len, points)) > 1 else None
            look = {"color": COLOURS[colour], "markerfacecolor": _PAPER if style == "--" else None}
            axes.errorbar(
                places,
                [mean(p) for p in points],
                errors,
                fmt=f"{MARKERS[colour]}{style}",
                label=label,
                capsize=3,
                markersize=4,
                **look,
            )
        axes.set_xticks(places, [f"{value:g}" for value in strengths])
        axes.set_xlabel("l1 (values evenly spaced)")
        axes.grid(alpha=0.6)
        axes.set_ylabel("exact zeros, %" if metric == "zeros" else "accuracy, gap")

    return _drawn(draw, f"path-{metric}", len(lines) if len(lines) > 1 else 0)


def _look(index: int, count: int) -> dict[str, Any]:
    """Options for a line: each narrower than the one before, so that none is hidden."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.2 + 0.5 * (count - 1 - index),
    }


def _drawn(
    draw: Callable[[Any], None],
    name: str,
    in_key: int,
    size: tuple[float, float] = _SIZE,
) -> str:
    """Draws axes, with a key below where there is more than one line, and makes the page's SVG.

    Args:
        draw: draws into axes.
        name: begins the ids in the SVG, which must differ within a page.
        in_key: how many lines have a name.
        size: inches.
    """
    rows = -(-in_key // 3)
    style: Any = {**_STYLE, "svg.hashsalt": name}
    with rc_context(style):
        figure = Figure(figsize=(size[0], size[1] + 0.2 * rows), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        if in_key:
            figure.legend(loc="outside lower center", ncols=-(-in_key // rows))
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    return _for_page(file.getvalue(), name)


def _for_page(text: str, name: str) -> str:
    """The svg element alone: no fixed size, ids of its own, colours by the style sheet."""
    svg = ElementTree.fromstring(text)
    for parent in svg.iter():
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    referred = re.compile(r"url\(#")
    for element in svg.iter():
        for key, value in element.attrib.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == f"{{{_XLINK}}}href":
                value = value.replace("#", f"#{name}-", 1)
            else:
                value = referred.sub(f"url(#{name}-", value)
                for colour, variable in _VARIABLES.items():
                    value = value.replace(colour, variable)
            element.set(key, value)
    for key in ("width", "height", "version"):
        svg.attrib.pop(key, None)
    svg.set("aria-hidden", "true")  # the figure's caption and the tables tell the same
    return ElementTree.tostring(svg, encoding="unicode")
