"""``report.html``: what a command did and found, in one file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from . import report_page as parts
from . import report_plots
from .files import RecipeError, read_json, write_text
from .intervals import of_share
from .predictions import load_mistakes
from .run_folders import EVALUATION, RunFolder, RunRecord, command_of, read_run_folder

REPORT = "report.html"
_METRICS = {"accuracy": "accuracy", "loss": "cross-entropy", "f1": "macro-F1"}


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` into the output folder of a command, from the files in it.

    Raises:
        RecipeError: it is no such folder, or a file in it is damaged.
    """
    is_evaluation = command_of(folder) == "evaluate"
    page = _of_evaluation(folder) if is_evaluation else _of_runs(read_run_folder(folder))
    write_text(folder / REPORT, _template().render(page=page))
    return folder / REPORT


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("resnet_reg_ext.recipe", "."),
        autoescape=True,  # names of classes and files are anyone's
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja")


def _of_runs(content: RunFolder) -> parts.Page:
    arms = content.arms
    first = next(iter(arms.values()))[0]
    sparsity, layers = parts.layers(_zeros(arms))
    mistakes = [
        (name + (f", seed {runs[0].settings['seed']}" if len(runs) > 1 else ""), runs[0].mistakes)
        for name, runs in arms.items()
        if runs[0].mistakes is not None
    ]
    return parts.Page(
        command=content.command,
        subtitle=content.conditions or _conditions(first),
        verdict=content.verdict or _verdict(first),
        tables=[_table(arms)],
        plots=_plots(content, first),
        confusions=[
            parts.confusion(name, runs[0].classes, _sum([run.confusion for run in runs]))
            for name, runs in arms.items()
        ],
        sparsity=sparsity,
        layers=layers,
        mistakes=mistakes,
        images=f"{first.held_out_images} {first.held_out} images"
        + (" of each seed" if len(next(iter(arms.values()))) > 1 else ""),
        repeat=parts.command_line(content.command, content.options),
        settings=parts.settings(content.options),
        made_with=parts.versions(first.made_with),
    )


def _plots(content: RunFolder, first: RunRecord) -> list[tuple[str, Markup]]:
    arms, drawn = content.arms, []
    if content.command == "path":
        drawn = [
            ("Accuracy and gap against the strength", report_plots.against_strength(arms, "gap")),
            ("Exact zeros against the strength", report_plots.against_strength(arms, "zeros")),
        ]
    sides = f"training images dashed, {first.watched} images solid"
    drawn += [
        (f"Accuracy: {sides}", report_plots.curves(arms, "accuracy")),
        (f"Loss: {sides}", report_plots.curves(arms, "loss")),
        (
            f"The gap from training accuracy (hollow) to {first.held_out} accuracy (filled)",
            report_plots.gap(arms),
        ),
        ("Exact zeros in the regularised weights", report_plots.curves(arms, "zeros")),
    ]
    return [(caption, Markup(svg)) for caption, svg in drawn]


def _table(arms: Mapping[str, Sequence[RunRecord]]) -> parts.Table:
    """One row an arm: strengths, and what came out at the end."""
    held_out = next(iter(arms.values()))[0].held_out
    columns = {
        "train accuracy": ("train_accuracy", "{:.3f}"),
        f"{held_out} accuracy": ("held_out_accuracy", "{:.3f}"),
        "gap": ("gap", "{:+.3f}"),
        f"{held_out} loss": ("held_out_loss", "{:.3f}"),
        "macro-F1": ("held_out_f1", "{:.3f}"),
        "exact zeros": ("zeros", "{:.1%}"),
        "ms a step": ("step_ms", "{:.0f}"),
    }
    rows = []
    for name, runs in arms.items():
        row = [name or "this run"]
        row += [f"{runs[0].settings[strength]:g}" for strength in ("l1", "weight_decay")]
        for metric, form in columns.values():
            row.append(parts.spread([run.final[metric] for run in runs], form))
        rows.append(row)
    return parts.Table(["", "l1", "weight decay", *columns], rows)


def _conditions(run: RunRecord) -> str:
    start = "from scratch" if run.settings["weights"] == "none" else "fine-tuned"
    wrong = run.data.get("wrong_labels")
    spoilt = f" ({wrong} labels made wrong on purpose)" if wrong else ""
    return (
        f"ResNet-50 {start}, {run.data['train_images']} training images{spoilt}, "
        f"{run.held_out_images} {run.held_out} images, seed {run.settings['seed']}"
    )


def _verdict(run: RunRecord) -> list[str]:
    """What one run shows, in sentences."""
    accuracy, count = run.final["held_out_accuracy"], run.held_out_images
    low, high = of_share(round(accuracy * count), count)
    lines = [
        f"{run.held_out.capitalize()} accuracy {accuracy:.3f} ({low:.3f} to {high:.3f} at 95 %) on "
        f"{count} images; training accuracy {run.final['train_accuracy']:.3f}: the gap is "
        f"{run.final['gap']:+.3f}.",
        f"{run.final['zeros']:.1%} of the regularised weights are exactly zero.",
    ]
    losses = [row["watched_loss"] for row in run.history]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not math.isfinite(run.final["train_loss"]):
        lines.insert(0, "The loss is not finite: training has diverged; try a lower --lr.")
    elif finite and min(finite) < losses[-1]:
        best = run.history[losses.index(min(finite))]
        lines.append(
            f"The {run.watched} loss was lowest after epoch {best['epoch']:.0f} "
            f"({min(finite):.3f}; at the end {losses[-1]:.3f}): best.ckpt has those weights."
        )
    if run.held_out == run.watched:
        lines.append(
            f"The {run.watched} images were measured during training and choose best.ckpt: an "
            "unbiased figure of it needs images of its own (resnet-reg evaluate --data)."
        )
    return lines


def _of_evaluation(folder: Path) -> parts.Page:
    path = folder / EVALUATION
    content = read_json(path)
    try:
        return _page_of_evaluation(content, folder)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error!s:.100}"
        raise RecipeError(f"{path} is damaged, or another version's: {what}") from None


def _page_of_evaluation(content: Mapping[str, Any], folder: Path) -> parts.Page:
    classes, matrix = list(content["classes"]), content["confusion"]
    intervals = content["intervals"]
    measured = parts.Table(
        ["", "measured", "95 % interval"],
        [[what, parts.number(content[m]), _span(intervals[m])] for m, what in _METRICS.items()],
    )
    by_class = parts.Table(
        ["class", "precision", "recall", "images"],
        [
            [name, parts.number(s["precision"]), parts.number(s["recall"]), str(sum(row))]
            for (name, s), row in zip(content["classes"].items(), matrix, strict=True)
        ],
    )
    zeros = content["sparsity"]
    by_layer = {name: layer["fraction"] for name, layer in zeros["layers"].items()}
    sparsity, layers = parts.layers({"": by_layer})
    options = {name: content[name] for name in ("data", "split", "corrupt", "test_size")}
    if options["split"] not in ("train", "val", "validation", "test"):
        options["split"] = None  # images that were taken whole
    mistakes = load_mistakes(folder)
    images = f"{content['images']} images of {content['data']} ({content['split']})"
    return parts.Page(
        command="evaluate",
        subtitle=f"{content['checkpoint']}, on {images}",
        verdict=[
            f"Accuracy {content['accuracy']:.3f} ({_span(intervals['accuracy'])} at 95 %).",
            f"{zeros['fraction']:.1%} of the regularised weights are exactly zero.",
            *(f"{note[:1].upper()}{note[1:]}." for note in content["notes"]),
        ],
        tables=[measured, by_class],
        plots=[],
        confusions=[parts.confusion("", classes, matrix)],
        sparsity=sparsity,
        layers=layers,
        mistakes=[] if mistakes is None else [("", mistakes)],
        images=images,
        repeat=parts.command_line("evaluate", options, [content["checkpoint"]]),
        settings=parts.settings(options),
        made_with=parts.versions(content["made_with"]),
    )


def _span(interval: Sequence[float] | None) -> str:
    return "\N{EN DASH}" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _zeros(arms: Mapping[str, Sequence[RunRecord]]) -> dict[str, dict[str, float]]:
    """Share of zeros by arm and layer, the mean over seeds."""
    return {
        name: {
            layer: mean(run.zeros_by_layer[layer] for run in runs)
            for layer in runs[0].zeros_by_layer
        }
        for name, runs in arms.items()
    }


def _sum(matrices: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    return [
        [sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)
    ]
