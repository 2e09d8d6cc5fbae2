"""The plots of a run, as SVG."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .keys import OURS
from .markdown import SCALING_NAMES, title

# The background is transparent. Grey text and saturated lines can be read on white and on black.
INK = "#7a8087"
COLOURS = {OURS: "#2f81f7", "sgd_fused": "#e8830c", "foreach_threshold": "#a05ad6"}
OTHERS, LIMIT_COLOUR = "#e8830c", "#e5534b"
STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.framealpha": 0,
    "font.size": 10,
    "svg.hashsalt": "bench",
    "svg.fonttype": "none",
}


def plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the ratios and the cost against size as SVG; nothing without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plots: matplotlib isn't installed", file=sys.stderr)
        return []
    made = []
    drawings = {"ratios": _draw_ratios, "size": _draw_sizes}
    with plt.rc_context(STYLE):
        for name, draw in drawings.items():
            if name == "size" and "sizes" not in results:
                continue
            figure = draw(plt, results)
            path = folder / f"{results['device']}-{name}.svg"
            figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)
            made.append(path)
    return made


def _draw_ratios(plt: Any, results: dict[str, Any]) -> Any:
    """The rows' times over ProxSGD's, with their spread."""
    table = results["tables"][0]
    rows = [r for r in table["rows"] if "ms" in r and r["key"] != OURS]
    # A ratio of ours over theirs of q is theirs over ours of 1/q.
    rows.sort(key=lambda r: r["ours_over"]["q50"])
    medians = [1 / r["ours_over"]["q50"] for r in rows]
    low = [m - 1 / r["ours_over"]["q80"] for m, r in zip(medians, rows, strict=True)]
    high = [1 / r["ours_over"]["q20"] - m for m, r in zip(medians, rows, strict=True)]
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2))
    colours = [COLOURS[OURS] if r["name"].startswith("ProxSGD") else OTHERS for r in rows]
    names = [r["name"] for r in rows]
    axes.barh(names, medians, xerr=(low, high), color=colours, ecolor=INK, capsize=3)
    for position, (median, more) in enumerate(zip(medians, high, strict=True)):
        # Right of the whisker, and of the line where the row's column ends before it.
        axes.text(1.04 * max(median + more, 1), position, f"{median:.2f}", va="center")
    axes.axvline(1, color=LIMIT_COLOUR, linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(0.5, 2 * max(m + h for m, h in zip(medians, high, strict=True)))
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        "time of a step over that of ProxSGD, native, with L1 (red line)\n"
        "median; whiskers: 20 % to 80 %; blue: other forms of ProxSGD"
    )
    axes.set_title(title(table), fontsize=10)
    return figure


def _draw_sizes(plt: Any, results: dict[str, Any]) -> Any:
    """Nanoseconds an element against elements, with the limit that memory bandwidth sets."""
    points = [p for p in results["sizes"]["points"] if "us" in p]
    sizes = [p["elements"] for p in points]
    figure, axes = plt.subplots(figsize=(8, 4.5))

    def ns(key: str, q: str) -> list[float]:
        return [1e3 * p["us"][key][q] / p["elements"] for p in points]

    for key, name in SCALING_NAMES.items():
        axes.plot(sizes, ns(key, "q50"), marker="o", color=COLOURS[key], label=name)
        axes.fill_between(sizes, ns(key, "q20"), ns(key, "q80"), color=COLOURS[key], alpha=0.2)
    main = results["tables"][0]
    if "limit" in main:
        floor = 1e6 * main["limit"]["ms"]["q50"] / main["elements"]
        axes.axhline(
            floor,
            color=LIMIT_COLOUR,
            linestyle="--",
            label=f"memory: {main['limit']['bytes_an_element']} bytes an element at "
            f"{main['limit']['gb_per_s']['q50']:.1f} GB/s",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_plain)
    threads = results["sizes"]["threads"]
    axes.set_title(
        f"One float32 tensor, {threads} thread{'s' if threads > 1 else ''}: median; "
        "shaded: 20 % to 80 %",
        fontsize=10,
    )
    axes.set_xlabel("elements of the tensor")
    axes.set_ylabel("time of a step, ns an element")
    axes.legend()
    return figure


def _plain(value: float, _position: int) -> str:
    """A number with K or M for thousands or millions: 0.1, 10, 10 K, 10 M."""
    for unit, name in ((1e6, " M"), (1e3, " K")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
