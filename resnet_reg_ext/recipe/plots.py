"""Plots of a comparison, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .train import Result

# Okabe and Ito's palette: told apart by colour-blind readers too, and dark enough on white.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")


def plot_all(results: Mapping[str, Result], folder: Path, subtitle: str) -> list[Path]:
    """Draws training curves, gap bars and sparsity by layer.

    Args:
        results: runs by the name that the legend shows, at most four.
        folder: where the files go.
        subtitle: what the runs were made with, one line.

    Returns:
        The paths written.
    """
    from matplotlib.figure import Figure  # without pyplot: needs no display

    paths = []
    for name, draw, size in (
        ("training_curves", _training_curves, (10, 4.2)),
        ("gap_bars", _gap_bars, (7, 4.5)),
        ("sparsity_by_layer", _sparsity_by_layer, (10, 4.5)),
    ):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, results)
        # The layout keeps room for a figure's title, not for free text.
        figure.suptitle(f"{figure.get_suptitle()}\n{subtitle}", fontsize=10)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def _training_curves(figure: Any, results: Mapping[str, Result]) -> None:
    figure.suptitle("Training (dashed) and test (solid) after each evaluated epoch")
    accuracy, loss = figure.subplots(1, 2)
    for (name, result), colour in zip(results.items(), COLOURS, strict=False):
        epochs = [e.epoch for e in result.history]
        for axes, train, test in (
            (accuracy, "train_accuracy", "test_accuracy"),
            (loss, "train_loss", "test_loss"),
        ):
            axes.plot(epochs, [getattr(e, train) for e in result.history], "--", color=colour)
            axes.plot(
                epochs,
                [getattr(e, test) for e in result.history],
                "o-",
                color=colour,
                label=name,
                markersize=4,
            )
    accuracy.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.03))
    # Before batch norm's running statistics have settled, losses can be huge.
    loss.set(xlabel="epoch", ylabel="cross-entropy (log scale)", yscale="log")
    for axes in (accuracy, loss):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    loss.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))


def _gap_bars(figure: Any, results: Mapping[str, Result]) -> None:
    figure.suptitle("Training and test accuracy, and the gap between them")
    axes = figure.subplots()
    for x, (result, colour) in enumerate(zip(results.values(), COLOURS, strict=False)):
        train, test = result.last.train_accuracy, result.last.test_accuracy
        for side, value, alpha, label in ((-0.2, train, 0.45, "training"), (0.2, test, 1, "test")):
            axes.bar(x + side, value, 0.38, color=colour, alpha=alpha)
            axes.text(x + side, value + 0.01, f"{label}\n{value:.3f}", ha="center", va="bottom")
    axes.set_xticks(
        range(len(results)),
        [f"{n}\ngap {r.gap:.3f}\nzeros {r.last.zeros:.0%}" for n, r in results.items()],
    )
    axes.set(ylabel="accuracy", ylim=(0, 1.15), xlim=(-0.6, len(results) - 0.4))
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.spines[["top", "right"]].set_visible(False)


def _sparsity_by_layer(figure: Any, results: Mapping[str, Result]) -> None:
    figure.suptitle("Exact zeros in each regularised layer, input to output")
    axes = figure.subplots()
    layers = list(next(iter(results.values())).zeros_by_layer)
    for (name, result), colour, marker in zip(results.items(), COLOURS, "osD^", strict=False):
        share = [100 * result.zeros_by_layer[layer] for layer in layers]
        axes.plot(share, marker=marker, color=colour, label=name, markersize=4, linewidth=1)
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
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
