"""The plot and the tables of docs/channels.md, from the committed JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from . import markdown
from .markdown import grid
from .plots import COLOURS, INK, STYLE

WAYS = {"eager": "eager", "folded": "folded norms, channels_last", "onnxruntime": "onnxruntime"}
PLOT = "accuracy-latency.svg"
TARGET = "target"
TITLES = {"digits": "Digits, from scratch", "frontier": "Fine-tuning on few images"}
COMMANDS = {
    "digits": "python -m bench channels digits",
    "frontier": "python -m bench channels frontier --data DIR --weights FILE",
    TARGET: "python -m bench channels target",
}


def write(folder: Path, page: Path) -> list[Path]:
    """Draws the plot and replaces the page's block; returns the files.

    Raises:
        ValueError: the page has no place for the block.
    """
    results = read(folder)
    plot = _draw(with_latency(results), folder / PLOT)
    new = markdown.with_block(page.read_text(encoding="utf-8"), "channels", block(results))
    page.write_text(new, encoding="utf-8")
    return [plot, page]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The experiments that have figures."""
    return {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in (*TITLES, TARGET)
        if (folder / f"{name}.json").is_file()
    }


def summary(results: dict[str, Any]) -> list[dict[str, Any]]:
    """By variant, the dense one first: means over seeds, and ratios to the dense model."""
    rows: list[dict[str, Any]] = []
    variants = list(dict.fromkeys(run["variant"] for run in results["runs"]))
    for variant in variants:
        runs = [run for run in results["runs"] if run["variant"] == variant]
        models = [
            model
            for model in results["latency"]["models"]
            if model["name"].startswith(f"{variant}, seed ")
        ]
        row: dict[str, Any] = {
            "variant": variant,
            "accuracy": [run["test_accuracy"] for run in runs],
            "cpu": [run["cpu_seconds"] for run in runs],
            "parameters": mean(model["parameters"] for model in models),
            "multiply_adds": mean(model["multiply_adds"] for model in models),
        }
        for way in WAYS:
            for batch in ("1", "8"):
                took = [model["milliseconds"][way][batch] for model in models]
                row[f"{way} {batch}"] = mean(took)
                if rows:
                    row[f"{way} {batch} ratio"] = mean(rows[0][f"{way} {batch}"] / t for t in took)
        rows.append(row)
    return rows


def block(results: dict[str, dict[str, Any]]) -> str:
    """Tables, verdicts and conditions of all experiments, in Markdown."""
    parts = []
    figures = with_latency(results)
    if figures:
        parts.append(f"![Accuracy against latency](results/channels/{PLOT})")
    for name, of_experiment in figures.items():
        parts += [f"### {TITLES[name]}", *_section(name, of_experiment)]
    if TARGET in results:
        parts += [
            "### The group lasso, steered to a share",
            *_target_section(results[TARGET], results.get("digits")),
        ]
    parts += [
        f"{title}: no figures are committed yet; made by `{COMMANDS[name]}`."
        for name, title in {**TITLES, TARGET: "The group lasso, steered to a share"}.items()
        if name not in results
    ]
    return "\n\n".join(parts)


def with_latency(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The experiments that have a dense model beside the others."""
    return {name: of_experiment for name, of_experiment in results.items() if name in TITLES}


def _target_section(results: dict[str, Any], ranked: dict[str, Any] | None) -> list[str]:
    """The table; beside it the same runs without removal, and by Taylor expansion."""
    rows = []
    others = [] if ranked is None else ranked["runs"]
    for asked in sorted({run["asked"] for run in results["runs"]}):
        runs = [run for run in results["runs"] if run["asked"] == asked]
        got = ", ".join(f"{100 * run['share']:.2f} %" for run in runs)
        farthest = max(abs(run["share"] - asked) for run in runs)
        accuracy = spread([run["test_accuracy"] for run in runs])
        row = [f"{100 * asked:.0f} %", got, f"{100 * farthest:.2f} points", accuracy]
        for variant in (f"{asked:g}", "dense"):
            beside = [run["test_accuracy"] for run in others if run["variant"] == variant]
            row.append(spread(beside) if beside else "not run")
        rows.append(row)
    run = results["run"]
    return [
        f"{results['conditions']}, {run['image_size']} px, {run['epochs']} epochs, batch "
        f"{run['batch_size']}, lr {run['lr']:g}, `--method prox`. Of {results['channels']:,} "
        "channels.",
        grid(
            [
                "asked",
                "taken out, by seed",
                "farthest off",
                "test accuracy",
                "by Taylor expansion",
                "dense",
            ],
            rows,
        ),
        f"{results['machine']['cpu']}, torch {results['machine']['versions']['torch']}, "
        f"{results['date']}. Made by `{COMMANDS[TARGET]}`.",
    ]


def _section(name: str, results: dict[str, Any]) -> list[str]:
    rows, of_latency, machine = summary(results), results["latency"], results["machine"]
    head = ["channels off", "test accuracy", "multiply-adds", "parameters", "training, CPU time"]
    table = []
    for row in rows:
        cpu = mean(row["cpu"]) / mean(rows[0]["cpu"])
        table.append(
            [
                share_of(row["variant"]),
                spread(row["accuracy"]),
                f"{row['multiply_adds'] / 1e9:.2f} G",
                f"{row['parameters'] / 1e6:.2f} M",
                f"{mean(row['cpu']):.0f} s" if row is rows[0] else f"{cpu:.2f} of dense",
            ]
        )
    fast = [
        [
            share_of(row["variant"]),
            *(_took(row, f"{way} {batch}") for way in WAYS for batch in ("1", "8")),
        ]
        for row in rows
    ]
    ways = [f"{WAYS[way]}, {batch}" for way in WAYS for batch in ("1", "8")]
    run = results["run"]
    return [
        f"{results['conditions']}, {run['image_size']} px, {run['epochs']} epochs, batch "
        f"{run['batch_size']}, lr {run['lr']:g}, weight decay {run['weight_decay']:g}, momentum "
        f"{run['momentum']:g}. Mean ± standard deviation over seeds, weights of the last epoch.",
        grid(head, table),
        *_verdict_lines(results),
        f"Milliseconds a call at {of_latency['image_size']} px, for 1 and for 8 images:",
        grid(["channels off", *ways], fast),
        f"Latency: {of_latency['threads']} thread, all models in turn in one run of "
        f"{of_latency['rounds']} rounds, medians; the number of times as fast is the mean over the "
        f"seeds' models. {machine['cpu']}, torch {machine['versions']['torch']}, "
        f"{results['date']}; the machine had other work to do. Made by `{COMMANDS[name]}`.",
    ]


def _verdict_lines(results: dict[str, Any]) -> list[str]:
    lines = [
        f"- {share_of(line.partition(' ')[0])} off{_rest(line)}" for line in results["verdicts"]
    ]
    return ["\n".join(lines)] if lines else []


def _rest(line: str) -> str:
    return " " + line.partition(" ")[2] + "."


def share_of(variant: str) -> str:
    """A variant's name for a reader."""
    return "none" if variant == "dense" else f"{100 * float(variant):.0f} %"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    more = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{more}"


def _took(row: dict[str, Any], key: str) -> str:
    text = f"{row[key]:.0f}" if row[key] >= 100 else f"{row[key]:.3g}"
    return f"{text} ({row[f'{key} ratio']:.1f} x)" if f"{key} ratio" in row else text


def _draw(results: dict[str, dict[str, Any]], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, max(1, len(results)), figsize=(4.8 * max(1, len(results)), 3.6), squeeze=False
        )
        for axes, (name, of_experiment) in zip(panels[0], results.items(), strict=False):
            _draw_panel(axes, TITLES[name], of_experiment)
        panels[0][0].set_ylabel("test accuracy")
        figure.tight_layout()
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
    return path


def _draw_panel(axes: Any, title: str, results: dict[str, Any]) -> None:
    rows = summary(results)
    colour = next(iter(COLOURS.values()))
    x = [row["onnxruntime 1"] for row in rows]
    y = [mean(row["accuracy"]) for row in rows]
    errors = [stdev(row["accuracy"]) if len(row["accuracy"]) > 1 else 0 for row in rows]
    axes.errorbar(x, y, yerr=errors, color=colour, marker="o", capsize=3, linewidth=1)
    for row, left, height, error in zip(rows, x, y, errors, strict=True):
        axes.scatter([left] * len(row["accuracy"]), row["accuracy"], s=10, color=INK, zorder=3)
        label = "dense" if row["variant"] == "dense" else f"{share_of(row['variant'])} off"
        top = max(height + error, *row["accuracy"])
        offset = {"textcoords": "offset points", "xytext": (0, 6), "ha": "center"}
        axes.annotate(label, (left, top), **offset)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{value:.3g}" for value in x])
    axes.minorticks_off()
    axes.margins(x=0.35, y=0.15)
    size = results["latency"]["image_size"]
    axes.set_xlabel(f"ms an image, onnxruntime, 1 thread, {size} px")
    axes.set_title(title, fontsize=10)
