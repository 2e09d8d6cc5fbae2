"""README's two plots, for light and for dark pages, from the committed results."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from .keys import OURS
from .plots import COLOURS, STYLE

FOLDER = Path("docs/images")
COMPARISON = Path("docs/results/digits/compare.json")
THEMES = {"light": ("#1f2328", "#d1d9e0"), "dark": ("#e6edf3", "#3d444d")}
SHORT_NAMES = {
    OURS: "ProxSGD, with L1",
    "sgd_fused": "SGD(fused=True), no L1",
    "compile_whole": "torch.compile(SGD + L1 by hand)",
    "compile_tensor": "torch.compile(SGD + soft-threshold)",
    "softshrink": "SGD(fused=True) + softshrink",
    "pat": "torchao PAT, lasso",
}
OTHERS = "#8b949e"


def draw(results: dict[str, Any], folder: Path = FOLDER) -> list[Path]:
    """Draws accuracy and step time, each for light and dark; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    runs = json.loads(COMPARISON.read_text(encoding="utf-8"))["runs"]
    made = []
    for theme, (ink, faint) in THEMES.items():
        names = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
        style = {**STYLE, **dict.fromkeys(names, ink), "axes.edgecolor": faint, "font.size": 11}
        with plt.rc_context(style):
            drawings = {"accuracy": _accuracy(plt, runs, ink), "speed": _speed(plt, results)}
            for name, figure in drawings.items():
                path = folder / f"{name}-{theme}.svg"
                figure.savefig(path, metadata={"Date": None})
                plt.close(figure)
                made.append(path)
    return made


def _axes(plt: Any, title: str) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    return figure, axes


def _accuracy(plt: Any, runs: dict[str, Any], ink: str) -> Any:
    """Test and training accuracy, the gap between them, test loss, and the share of zeros."""
    first = next(iter(runs.values()))
    images = first[0]["data"]["train_images"]
    figure, axes = _axes(plt, f"ResNet-50, {images} digits, each at its tuned strength")
    low = 1.0
    for row, seeds in enumerate(runs.values()):
        ends = [{**seed["history"][-1], **seed["test"]} for seed in seeds]
        train, test, loss, zeros = (
            statistics.mean(end[key] for end in ends)
            for key in ("train_accuracy", "test_accuracy", "test_loss", "zeros")
        )
        low = min(low, test)
        colour = COLOURS[OURS] if zeros > 0.01 else OTHERS
        axes.plot([test, train], [row, row], color=colour, linewidth=3, alpha=0.5)
        axes.plot([test], [row], "o", color=colour, markersize=9)
        axes.plot([train], [row], "o", color=colour, markersize=9, markerfacecolor="none")
        middle = (test + train) / 2
        axes.text(middle, row - 0.18, f"gap {train - test:.3f}", ha="center", color=ink)
        axes.annotate(
            f"{test:.3f}",
            (test, row),
            (-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            color=ink,
        )
        right = f"loss {loss:.2f}, {100 * zeros:.0f} % zeros"
        axes.annotate(right, (1, row), (12, 0), textcoords="offset points", va="center", color=ink)
    axes.set_yticks(range(len(runs)), list(runs))
    axes.set_ylim(len(runs) - 0.6, -0.6)
    ticks = [tick / 20 for tick in range(math.floor(20 * low), 21)]
    span = 1 - ticks[0]
    axes.set_xlim(ticks[0] - 0.2 * span, 1 + 0.75 * span)
    axes.set_xticks(ticks)
    axes.set_xlabel(f"accuracy: ● test   ○ training; means of {len(first)} seeds")
    return figure


def _speed(plt: Any, results: dict[str, Any]) -> Any:
    """Medians of a step's time."""
    main = results["tables"][0]
    cores = results["machine"]["cores"]
    figure, axes = _axes(plt, f"One optimizer step, {main['model']}, {cores} CPU cores")
    rows = {row["key"]: row for row in main["rows"]}
    times = [rows[key]["ms"]["q50"] for key in SHORT_NAMES]
    colours = [COLOURS[OURS] if key == OURS else OTHERS for key in SHORT_NAMES]
    axes.barh(range(len(times)), times, color=colours, height=0.65)
    for row, ms in enumerate(times):
        axes.text(ms + 1.5, row, f"{ms:.1f}", va="center")
    axes.set_yticks(range(len(times)), list(SHORT_NAMES.values()))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(times))
    axes.set_xlabel("ms, median; less is better")
    return figure
