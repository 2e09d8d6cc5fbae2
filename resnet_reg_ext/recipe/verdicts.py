"""What may be concluded from several runs: tables, differences, and what they must exceed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

import numpy as np
from scipy.stats import t as student

from .errors import mean_error
from .results import Result

COLUMNS = {
    "train acc": ("train_accuracy", "{:.3f}"),
    "val acc": ("validation_accuracy", "{:.3f}"),
    "test acc": ("test_accuracy", "{:.3f}"),
    "gap": ("gap", "{:+.3f}"),
    "loss": ("held_out_loss", "{:.3f}"),
    "macro-F1": ("held_out_f1", "{:.3f}"),
    "zeros": ("zeros", "{:.3f}"),
    "ms/step": ("step_ms", "{:.0f}"),
}
Results = Mapping[str, Sequence[Result]]
"""By name, one result a seed."""


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation; the mean alone of one value."""
    text = form.format(mean(values))
    if len(values) > 1:
        text += f" ± {form.replace('+', '').format(stdev(values))}"
    return text


def values(results: Sequence[Result], metric: str) -> list[float]:
    """A metric of the last evaluation, one value a seed."""
    return [r.last[metric] for r in results]


def table(results: Results) -> str:
    """A Markdown table, one row a name."""
    held_out = held_out_of(results)
    columns = dict(COLUMNS)
    if held_out != "test":
        del columns["test acc"]
    for title in ("loss", "macro-F1"):
        columns = {f"{held_out} {t}" if t == title else t: c for t, c in columns.items()}
    rows = [["", "l1", "weight decay", *columns]]
    for name, runs in results.items():
        rows.append([name, f"{runs[0].run.l1:g}", f"{runs[0].run.weight_decay:g}"])
        rows[-1] += [spread(values(runs, metric), form) for metric, form in columns.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)))
    return "\n".join(f"| {line} |" for line in lines)


def held_out_of(results: Results) -> str:
    """The images that the figures of all runs are of: "test", else "validation"."""
    every = [result.held_out for runs in results.values() for result in runs]
    return "test" if set(every) == {"test"} else "validation"


def verdicts(results: Results) -> list[str]:
    """One sentence a name, against the first.

    A difference counts as seen where it exceeds its margin: with one seed that of the held-out
    images, which covers their choice but not the seed's; with several the larger of that and
    Student's. The loss has Student's alone, and none with one seed: results hold no image's loss.
    """
    (base_name, base), *others = results.items()
    held_out = held_out_of(results)
    return [
        f"{name} against {base_name}: {difference(base, runs, held_out)}; "
        f"{mean(values(runs, 'zeros')):.1%} of the regularised weights are exactly zero."
        for name, runs in others
    ]


def difference(base: Sequence[Result], runs: Sequence[Result], held_out: str) -> str:
    """The differences in held-out accuracy and gap, over several seeds also in loss, in words."""
    parts = []
    for what, metric, up, down in (
        (f"{held_out} accuracy", f"{held_out}_accuracy", "higher", "lower"),
        ("gap", "gap", "larger", "smaller"),
        (f"{held_out} loss", "held_out_loss", "higher", "lower"),
    ):
        found = [b - a for a, b in zip(values(base, metric), values(runs, metric), strict=True)]
        margins = [_seeds_margin(found)] if len(found) > 1 else []
        if metric != "held_out_loss":
            margins.append(images_margin(base, runs))
        if not margins:
            continue
        middle, margin = mean(found), max(margins)
        if not abs(middle) > margin:
            seen = f"no difference seen ({middle:+.3f}, within ±{margin:.3f})"
        else:
            seen = f"{up if middle > 0 else down} ({middle:+.3f} ± {margin:.3f})"
        parts.append(f"{what}: {seen}")
    return "; ".join(parts)


def _seeds_margin(differences: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean over the seeds, which pair the runs."""
    count = len(differences)
    return float(student.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)


def images_margin(first: Sequence[Result], second: Sequence[Result]) -> float:
    """What a difference of accuracies must exceed, as the held-out images are a choice of many.

    Where all runs were measured on the same test images, these pair the runs; else the two
    proportions are taken for independent ones.
    """
    tests = [result.test for result in (*first, *second)]
    known = [test for test in tests if test is not None]
    if len(known) == len(tests) and len({len(test.right) for test in known}) == 1:
        count = len(first)
        right = np.array([test.right for test in known], dtype=float)
        return paired_margin(right[count:].mean(0) - right[:count].mean(0), known[0].groups)
    return _unpaired_margin(first, second)


def paired_margin(differences: np.ndarray, groups: Sequence[int] | None) -> float:
    """Two standard errors of the mean of the images' differences.

    One image more that only the first run has right and one that only the second has, of half a
    weight each, keep it above 0 where the runs agree on all images (Agresti and Min 2005). That
    shrinks a difference by the factor images / (images + 2); here the margin grows instead. Images
    of one group count as one draw (cluster-robust), and Student's t takes the place of 2.

    Args:
        differences: (images,), the second run's right or wrong, 1 or 0, less the first's.
        groups: the image's groups; None where each stands alone.
    """
    images = len(differences)
    if groups is None:
        mean_square = (float((differences**2).sum()) + 1) / (images + 2)
        shrunk = float(differences.sum()) / (images + 2)
        error = math.sqrt((mean_square - shrunk**2) / (images + 2))
        return 2 * error * (images + 2) / images
    count = len(set(groups))
    if count < 2:
        return math.inf
    error = math.hypot(mean_error(differences, groups), 1 / images)
    return float(student.ppf(0.975, count - 1)) * error


def _unpaired_margin(first: Sequence[Result], second: Sequence[Result]) -> float:
    """Two standard errors of the difference of two proportions over the images of all seeds.

    Each proportion gets one image more that is right and one that is wrong (Agresti and Caffo
    2000), lest it be 0 where all or none are right. That shrinks a difference by the factor
    images / (images + 2); here the margin grows instead.
    """

    def count(result: Result) -> int:
        return int(result.data[f"{result.held_out}_images"])

    images = sum(map(count, first))
    right = [sum(r.last["held_out_accuracy"] * count(r) for r in rs) for rs in (first, second)]
    shares = [(number + 1) / (images + 2) for number in right]
    error = math.sqrt(sum(p * (1 - p) for p in shares) / (images + 2))
    return 2 * error * (images + 2) / images


def conditions(results: Results) -> str:
    """What the results were made with, in a line."""
    runs = next(iter(results.values()))
    run, data = runs[0].run, runs[0].data
    wrong = f" ({data['wrong_labels']} labels made wrong)" if data["wrong_labels"] else ""
    start = "from scratch" if run.weights == "none" else "fine-tuned"
    seeds = f"seed {run.seed}" if len(runs) == 1 else f"{len(runs)} seeds"
    tested = f"{data['test_images']} test" if data["test_images"] else "no test"
    return (
        f"ResNet-50 {start}, {data['train_images']} training images{wrong}, "
        f"{data['validation_images']} validation images, {tested} images, {seeds}"
    )


def report(results: Results, verdict: Sequence[str]) -> str:
    """The table and what it says, in Markdown."""
    runs = next(iter(results.values()))
    lines = [conditions(results), "", table(results), "", *(f"- {line}" for line in verdict)]
    if held_out_of(results) != "test":
        lines += [
            "- There are no test images: these figures are of the validation images, which choose "
            "the weights. No figure here is unbiased; a folder test/ or --test-fraction gives one."
        ]
    if runs[0].data["wrong_labels"]:
        lines += [
            "- Labels were made wrong on purpose, to bring overfitting out. Training accuracy is "
            "measured on the labels as trained on, every other figure on true ones."
        ]
    if len(runs) == 1:
        lines += [
            "- This is one seed; another may rank the runs otherwise: --seeds 3 shows the spread."
        ]
    else:
        lines += [
            "- ± is the standard deviation over the seeds; in a verdict, what a difference must "
            "exceed to be seen: for the loss that of the seeds alone."
        ]
    return "\n".join(lines)
