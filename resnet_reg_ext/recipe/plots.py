"""Plots, as PNG files. Drawn without pyplot: they need no display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..atomic_write import atomic_write

if TYPE_CHECKING:
    from .results import Result

# Okabe and Ito's palette: told apart by colour-blind readers too, and dark enough on white.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP*X"
MOST_IN_A_KEY = 40  # classes
Results = Mapping[str, Sequence["Result"]]


def _save(figure: Any, path: Path, title: str, subtitle: str) -> Path:
    subtitle = _drawable(subtitle)
    # The layout keeps room for a figure's title, not for free text.
    figure.suptitle(f"{title}\n{subtitle}", fontsize=10, wrap=True, **_as_it_is(subtitle))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=96, format="png", pil_kwargs={"optimize": True})
    return path


def _figure(width: float, height: float) -> Any:
    return Figure(figsize=(width, height), layout="constrained")


def _as_it_is(*texts: str) -> dict[str, Any]:
    """Options for a user's texts: no dollar sign begins a formula, each letter has its glyph."""
    families = ["sans-serif"]
    lacking = {ord(letter) for text in texts for letter in text if letter.isprintable()}
    lacking -= _letters(findfont(FontProperties(family=families)))
    for font in fontManager.ttflist if lacking else ():
        upright = font.style == "normal" and font.weight in (400, 500)
        # matplotlib's last resort has a box for each letter.
        if upright and not font.name.startswith("Last Resort") and lacking & _letters(font.fname):
            families.append(font.name)
            lacking -= _letters(font.fname)
    return {"parse_math": False, "family": families}


@cache
def _letters(file: str) -> frozenset[int]:
    """Code points that a font has glyphs for."""
    return frozenset(get_font(file).get_charmap())


def _nested(count: int) -> list[dict[str, Any]]:
    """Options for lines in the order drawn: each narrower than the last, so that none is hidden."""
    return [
        {
            "color": colour,
            "marker": marker,
            "linewidth": 1 + 0.8 * left,
            "markersize": 4 + 2.5 * left,
        }
        for left, colour, marker in zip(reversed(range(count)), COLOURS, MARKERS, strict=False)
    ]


def training_curves(results: Results, path: Path, subtitle: str) -> Path:
    """Accuracy and loss over the epochs, the mean over seeds with their range shaded."""
    figure = _figure(10, 4.4)
    for axes, metric in zip(figure.subplots(1, 2), ("accuracy", "loss"), strict=True):
        drawn: list[float] = []
        for (name, runs), look in zip(results.items(), _nested(len(results)), strict=True):
            length = min(len(r.history) for r in runs)
            epochs = [row["epoch"] for row in runs[0].history[:length]]
            for split, style, face in (
                ("train", "--", "white"),
                ("validation", "-", look["color"]),
            ):
                points = [[r.history[i][f"{split}_{metric}"] for r in runs] for i in range(length)]
                label = name if split == "validation" else None
                line = [mean(p) for p in points]
                axes.plot(epochs, line, linestyle=style, markerfacecolor=face, label=label, **look)
                drawn += line
                if len(runs) > 1 and split == "validation":
                    low, high = [min(p) for p in points], [max(p) for p in points]
                    axes.fill_between(
                        epochs, low, high, color=look["color"], alpha=0.12, linewidth=0
                    )
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if metric == "accuracy":
            axes.set(ylabel="accuracy", ylim=(0, 1.03))
        else:
            axes.set_ylabel("cross-entropy")
            # Before batch norm's running statistics have settled, losses can be huge.
            if max(drawn) >= 10 * min(drawn) > 0:
                axes.set(ylabel="cross-entropy (log scale)", yscale="log")
            axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    title = "Training images (dashed) and validation images (solid) after each evaluated epoch"
    if any(len(runs) > 1 for runs in results.values()):
        title += "; shaded: from the lowest to the highest seed"
    return _save(figure, path, title, subtitle)


def gap_bars(results: Results, path: Path, subtitle: str) -> Path:
    """Training and held-out accuracy side by side, with the spread over seeds."""
    figure = _figure(max(6.5, 1.8 * len(results)), 4.6)
    axes = figure.subplots()
    labels = []
    for x, ((name, runs), colour) in enumerate(zip(results.items(), COLOURS, strict=False)):
        held_out = runs[0].held_out
        for side, split, alpha in ((-0.2, "train", 0.45), (0.2, held_out, 1.0)):
            accuracies = [r.last[f"{split}_accuracy"] for r in runs]
            value, error = mean(accuracies), stdev(accuracies) if len(runs) > 1 else 0.0
            bars = axes.bar(x + side, value, 0.38, color=colour, alpha=alpha)
            if error:
                axes.errorbar(x + side, value, error, color="0.2", capsize=3)
            axes.bar_label(bars, [f"{split}\n{value:.3f}"], padding=3 + 200 * error, fontsize=8)
        gap, zeros = (mean(r.last[m] for r in runs) for m in ("gap", "zeros"))
        labels.append(f"{name}\ngap {gap:+.3f}\nzeros {zeros:.0%}")
    axes.set_xticks(range(len(results)), labels)
    axes.set(ylabel="accuracy", ylim=(0, 1.2), xlim=(-0.6, len(results) - 0.4))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.spines[["top", "right"]].set_visible(False)
    held_out = next(iter(results.values()))[0].held_out
    title = f"Training and {held_out} accuracy, and the gap between them"
    if any(len(runs) > 1 for runs in results.values()):
        title += "; whiskers: one standard deviation over the seeds"
    return _save(figure, path, title, subtitle)


def sparsity_by_layer(zeros: Mapping[str, Mapping[str, float]], path: Path, subtitle: str) -> Path:
    """Share of zeros in each regularised layer, by name of the run."""
    figure = _figure(10, 4.4)
    axes = figure.subplots()
    layers = list(next(iter(zeros.values())))
    for (name, shares), look in zip(zeros.items(), _nested(len(zeros)), strict=True):
        line = [100 * shares[layer] for layer in layers]
        axes.plot(line, markerfacecolor="white", label=name, **look)
    # One label a stage, at its middle; all 54 names would not be legible.
    stages = [layer.split(".")[0] for layer in layers]
    starts = [i for i, stage in enumerate(stages) if i == 0 or stage != stages[i - 1]]
    ends = [*starts[1:], len(stages)]
    axes.set_xticks(
        [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)],
        [stages[start] for start in starts],
    )
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="0.8", linewidth=1, zorder=0)
    axes.grid(axis="y", alpha=0.3)
    axes.set(xlabel="layers by stage", ylabel="exact zeros, %", ylim=(-3, 103))
    if len(zeros) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return _save(figure, path, "Exact zeros in each regularised layer, input to output", subtitle)


def _drawable(text: str) -> str:
    """Bytes of a file's name that are no UTF-8, escaped: matplotlib refuses them."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _short(name: str, most: int = 15) -> str:
    name = _drawable(name)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def confusion(
    matrices: Mapping[str, Sequence[Sequence[int]]],
    classes: Sequence[str],
    path: Path,
    subtitle: str,
) -> Path:
    """Confusion matrices in rows of two, coloured by the share of each true class."""
    columns = min(2, len(matrices))
    rows = -(-len(matrices) // columns)
    count = len(classes)
    side = max(3.4, min(9.0, 1.6 + 0.34 * count))
    figure = _figure(max(5.6, side * columns + 0.8), side * rows + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False)
    # A label for every class as long as they can be read.
    ticks = range(0, count, max(1, count // 30))
    names = [_short(classes[i]) for i in ticks]
    rotation = 90 if any(len(name) > 3 for name in names) else 0
    literal = _as_it_is(*names)
    image = None
    for axes, (name, matrix) in zip(grid.flat, matrices.items(), strict=False):
        shares = [[n / max(1, sum(row)) for n in row] for row in matrix]
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if count <= 20:
            for i, row in enumerate(matrix):
                for j, n in enumerate(row):
                    if n:
                        colour = "white" if shares[i][j] > 0.5 else "black"
                        axes.text(j, i, n, ha="center", va="center", color=colour, fontsize=7)
        axes.set_xticks(ticks, names, rotation=rotation, fontsize=8, **literal)
        axes.set_yticks(ticks, names, fontsize=8, **literal)
        axes.set(xlabel="predicted", ylabel="true", title=name)
    for axes in list(grid.flat)[len(matrices) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=grid, label="share of the true class", shrink=0.8)
    return _save(figure, path, "Confusion matrix, counts of images", subtitle)


def features(
    projections: Mapping[str, Any],
    labels: Sequence[int],
    classes: Sequence[str],
    path: Path,
    subtitle: str,
) -> Path:
    """The features of the last pooling layer in two dimensions, by true class."""
    figure = _figure(10.5, 4.6)
    # Ten colours are told apart; a marker's shape then tells the tens.
    looks: list[dict[str, Any]] = [
        {"color": f"C{label % 10}", "marker": MARKERS[label // 10 % len(MARKERS)]}
        for label in range(len(classes))
    ]
    for axes, (method, points) in zip(figure.subplots(1, 2), projections.items(), strict=True):
        for label, look in enumerate(looks):
            chosen = [i for i, other in enumerate(labels) if other == label]
            axes.scatter(points[chosen, 0], points[chosen, 1], s=12, alpha=0.75, **look)
        axes.set(title=method, xlabel="first dimension", ylabel="second dimension")
        axes.set_xticks([])
        axes.set_yticks([])
    title = "Features of the last pooling layer, by true class"
    if len(classes) > MOST_IN_A_KEY:
        title += f" ({len(classes)} classes, too many for a key)"
    else:
        names = [_short(name, 25) for name in classes]
        key = figure.legend(
            [Line2D([], [], linestyle="", markersize=4, **look) for look in looks],
            list(map(str, range(len(names)))),  # older matplotlib leaves out what begins with _
            loc="outside right center",
            ncols=-(-len(classes) // 20),
            fontsize=8,
        )
        literal = _as_it_is(*names)
        for text, name in zip(key.get_texts(), names, strict=True):
            text.set(text=name, **literal)
    return _save(figure, path, title, subtitle)


def path(results: Results, l1s: Sequence[float], path: Path, subtitle: str) -> Path:
    """Accuracy, gap and zeros against the strength of L1."""
    figure = _figure(10, 4.4)
    left, right = figure.subplots(1, 2)
    # Evenly spaced: the values are usually spaced by factors, and 0 has no logarithm.
    places = range(len(l1s))
    runs = list(results.values())
    held_out = runs[0][0].held_out
    for axes, metric, label, colour, style in (
        # Not the colours that mean none, L2 and L1 in the other plots.
        (left, "train_accuracy", "training accuracy", COLOURS[4], "o--"),
        (left, "held_out_accuracy", f"{held_out} accuracy", COLOURS[6], "o-"),
        (left, "gap", "gap", COLOURS[7], "s-"),
        (right, "zeros", "exact zeros", COLOURS[6], "o-"),
    ):
        unit = 100 if metric == "zeros" else 1
        points = [[unit * r.last[metric] for r in group] for group in runs]
        seeds = min(map(len, points))
        errors = [stdev(p) for p in points] if seeds > 1 else None
        axes.errorbar(
            places,
            [mean(p) for p in points],
            errors,
            fmt=style,
            color=colour,
            label=label,
            capsize=3,
            markersize=4,
        )
    for axes in (left, right):
        axes.set_xticks(places, [f"{v:g}" for v in l1s])
        axes.set_xlabel("l1 (values evenly spaced)")
        axes.grid(alpha=0.3)
    left.set_ylabel("accuracy, gap")
    left.axhline(0, color="0.6", linewidth=1)
    left.legend()
    right.set(ylabel="exact zeros in the regularised weights, %", ylim=(-3, 103))
    title = "Regularisation path"
    if any(len(group) > 1 for group in runs):
        title += "; whiskers: one standard deviation over the seeds"
    return _save(figure, path, title, subtitle)
