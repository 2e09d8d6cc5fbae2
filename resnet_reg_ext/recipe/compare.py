"""Several runs that differ in regularisation alone, and what may be concluded from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student

from . import plots
from .checks import check_seeds, settled
from .files import RecipeError, Stopped, is_unused, locked, prepare_folder, write_text
from .processes import is_rank_zero
from .results import Result, made_with, to_json
from .settings import OPTIONS_FILES, Run, same_run, save_options
from .train import FULL_CHECKPOINT, WEIGHTS, check, finish, train

COLUMNS = {
    "train acc": ("train_accuracy", "{:.3f}"),
    "test acc": ("test_accuracy", "{:.3f}"),
    "gap": ("gap", "{:+.3f}"),
    "test loss": ("test_loss", "{:.3f}"),
    "macro-F1": ("test_f1", "{:.3f}"),
    "zeros": ("zeros", "{:.3f}"),
    "ms/step": ("step_ms", "{:.0f}"),
}
Results = Mapping[str, Sequence[Result]]
"""By name, one result a seed."""


@dataclass(frozen=True)
class Planned:
    """A run of several."""

    name: str
    run: Run
    folder: Path
    start: Path | None = None
    """A checkpoint to take the weights from."""


def compare(run: Run, seeds: int, out: Path, resume: bool = False) -> list[Path]:
    """Trains under none, L2, L1 and elastic net; prints the verdict; returns the files written.

    Args:
        run: everything they share, and the ``l1`` and ``weight_decay`` of those that have them.
        seeds: how many, from ``run.seed`` on. A seed decides split, wrong labels, initial weights
            and order, which the four have in common.
        out: the output folder.
        resume: leave out what is finished there, go on with what isn't.

    Raises:
        RecipeError: something that the user can put right.
        Stopped: a signal came.
    """
    if not (run.l1 and run.weight_decay):
        raise RecipeError("compare needs --l1 and --weight-decay above 0")
    check_seeds(run, seeds)
    run = settled(run)
    variants = {
        "none": replace(run, l1=0.0, weight_decay=0.0),
        "L2": replace(run, l1=0.0),
        "L1": replace(run, weight_decay=0.0),
        "elastic net": run,
    }
    plan = [
        Planned(name, replace(variant, seed=seed), out / f"seed{seed}" / name.replace(" ", "-"))
        for seed in range(run.seed, run.seed + seeds)
        for name, variant in variants.items()
    ]
    with _begun(plan, out, OPTIONS_FILES["compare"], {**asdict(run), "seeds": seeds}, resume):
        results = _train_all(plan, out, resume)
        return _write_comparison(results, seeds, out) if is_rank_zero() else []


def _write_comparison(results: Results, seeds: int, out: Path) -> list[Path]:
    text = report(results, verdicts(results))
    print(f"\n{text}")
    subtitle = conditions(results)
    written = [
        plots.training_curves(results, out / "training_curves.png", subtitle),
        plots.gap_bars(results, out / "gap_bars.png", subtitle),
        plots.confusion(
            {name: _sum([r.confusion for r in rs]) for name, rs in results.items()},
            results["none"][0].classes,
            out / "confusion.png",
            f"{subtitle}{', summed over them' if seeds > 1 else ''}",
        ),
        plots.sparsity_by_layer(_zeros(results), out / "sparsity_by_layer.png", subtitle),
    ]
    return [*written, *_save(results, text, out, "compare")]


def path(
    run: Run, l1s: Sequence[float], seeds: int, out: Path, *, cold: bool, resume: bool = False
) -> list[Path]:
    """Trains under increasing L1, each from the weights before; returns the files written.

    Args:
        run: everything they share.
        l1s: increasing coefficients.
        seeds: how many, from ``run.seed`` on.
        out: the output folder.
        cold: start each as ``run.weights`` says instead.
        resume: leave out what is finished there, go on with what isn't.

    Raises:
        RecipeError: something that the user can put right.
        Stopped: a signal came.
    """
    if len({f"{l1:g}" for l1 in l1s}) < len(l1s):
        raise RecipeError(
            "--l1 has values whose first six digits are the same: each needs a folder"
        )
    check_seeds(run, seeds)
    run = settled(run)
    plan = []
    for seed in range(run.seed, run.seed + seeds):
        start = None
        for l1 in l1s:
            folder = out / f"seed{seed}" / f"l1-{l1:g}"
            plan.append(Planned(f"l1={l1:g}", replace(run, l1=l1, seed=seed), folder, start))
            start = None if cold else folder / "last.ckpt"
    options = {k: v for k, v in asdict(run).items() if k != "l1"}
    options |= {"l1": list(l1s), "seeds": seeds, "cold": cold}
    with _begun(plan, out, OPTIONS_FILES["path"], options, resume):
        results = _train_all(plan, out, resume)
        if not is_rank_zero():
            return []
        how = "each trained alone" if cold else "each started from the weights of the one before"
        text = report(results, [*verdicts(results), f"Increasing L1, {how}."])
        print(f"\n{text}")
        written = plots.path(results, l1s, out / "path.png", conditions(results))
        return [written, *_save(results, text, out, "path")]


def _finished(planned: Planned, resume: bool) -> bool:
    return resume and (planned.folder / "result.json").is_file()


@contextmanager
def _begun(
    plan: Sequence[Planned],
    out: Path,
    options_file: str,
    options: Mapping[str, object],
    resume: bool,
) -> Iterator[None]:
    """Holds the output folder, with the settings in it, once the first run is known to be right."""
    if not is_rank_zero():
        yield
        return

    def refuse_if_used() -> None:
        if not resume and not is_unused(out):
            raise RecipeError(f"--out {out} isn't empty: give another, or --resume {out}")

    refuse_if_used()
    left = [planned.run for planned in plan if not _finished(planned, resume)]
    if left:
        check(left[0])
    prepare_folder(out, len(left) * WEIGHTS + 2 * FULL_CHECKPOINT)
    with locked(out):
        refuse_if_used()  # another run may have been here since
        save_options(options, out / options_file)
        yield


def _train_all(plan: Sequence[Planned], out: Path, resume: bool) -> dict[str, list[Result]]:
    """Trains what isn't finished."""
    finished = [_finished(planned, resume) for planned in plan]
    results: dict[str, list[Result]] = {}
    for index, (planned, done) in enumerate(zip(plan, finished, strict=True)):
        label = f"{planned.name}, seed {planned.run.seed}"
        if done:
            result = finish(planned.folder)
            if other := same_run(result.run, planned.run):
                raise RecipeError(f"{planned.folder} holds the result of another run: {other}")
        else:
            if is_rank_zero():
                print(f"\n[{index + 1} of {len(plan)}] {label}", flush=True)
            try:
                result = train(
                    planned.run,
                    planned.folder,
                    name=label,
                    resume=resume and (planned.folder / "last.ckpt").is_file(),
                    keep_best=False,
                    start=planned.start,
                )
            except Stopped as stopped:
                raise Stopped(stopped.number, out) from None
        results.setdefault(planned.name, []).append(result)
    return results


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
    rows = [["", "l1", "weight decay", *COLUMNS]]
    for name, runs in results.items():
        rows.append([name, f"{runs[0].run.l1:g}", f"{runs[0].run.weight_decay:g}"])
        rows[-1] += [spread(values(runs, metric), form) for metric, form in COLUMNS.values()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)))
    return "\n".join(f"| {line} |" for line in lines)


def verdicts(results: Results) -> list[str]:
    """One sentence a name, against the first.

    A difference counts as seen where it exceeds its margin: with one seed that of the test images,
    which covers their choice but not the seed's; with several the larger of that and Student's.
    """
    (base_name, base), *others = results.items()
    lines = []
    for name, runs in others:
        parts = []
        for what, metric, up, down in (
            ("test accuracy", "test_accuracy", "higher", "lower"),
            ("gap", "gap", "larger", "smaller"),
        ):
            differences = [
                b - a for a, b in zip(values(base, metric), values(runs, metric), strict=True)
            ]
            margin = _images_margin(base, runs)
            if len(differences) > 1:
                margin = max(margin, _seeds_margin(differences))
            difference = mean(differences)
            if abs(difference) <= margin:
                seen = f"no difference seen ({difference:+.3f}, within ±{margin:.3f})"
            else:
                seen = f"{up if difference > 0 else down} ({difference:+.3f} ± {margin:.3f})"
            parts.append(f"{what}: {seen}")
        zeros = mean(values(runs, "zeros"))
        lines.append(
            f"{name} against {base_name}: {'; '.join(parts)}; "
            f"{zeros:.1%} of the regularised weights are exactly zero."
        )
    return lines


def _seeds_margin(differences: Sequence[float]) -> float:
    """Half the 95 % confidence interval of the mean over the seeds, which pair the runs."""
    count = len(differences)
    return float(student.ppf(0.975, count - 1)) * stdev(differences) / math.sqrt(count)


def _images_margin(first: Sequence[Result], second: Sequence[Result]) -> float:
    """Two standard errors of the difference of two proportions over the test images of all seeds.

    Each proportion gets one image more that is right and one that is wrong (Agresti and Caffo
    2000), lest it be 0 where all or none are right. That shrinks a difference by the factor
    images / (images + 2); here the margin grows instead.
    """
    images: int = sum(r.data["test_images"] for r in first)
    right = [
        sum(r.last["test_accuracy"] * r.data["test_images"] for r in rs) for rs in (first, second)
    ]
    shares = [(count + 1) / (images + 2) for count in right]
    error = math.sqrt(sum(p * (1 - p) for p in shares) / (images + 2))
    return 2 * error * (images + 2) / images


def conditions(results: Results) -> str:
    """What the results were made with, in a line."""
    runs = next(iter(results.values()))
    run, data = runs[0].run, runs[0].data
    wrong = f" ({data['wrong_labels']} labels made wrong)" if data["wrong_labels"] else ""
    start = "from scratch" if run.weights == "none" else "fine-tuned"
    seeds = f"seed {run.seed}" if len(runs) == 1 else f"{len(runs)} seeds"
    return (
        f"ResNet-50 {start}, {data['train_images']} training images{wrong}, "
        f"{data['test_images']} test images, {seeds}"
    )


def report(results: Results, verdict: Sequence[str]) -> str:
    """The table and what it says, in Markdown."""
    runs = next(iter(results.values()))
    lines = [conditions(results), "", table(results), "", *(f"- {line}" for line in verdict)]
    if runs[0].data["wrong_labels"]:
        lines += [
            "- Labels were made wrong on purpose, to bring overfitting out. Training accuracy is "
            "measured on the labels as trained on, test accuracy on true ones."
        ]
    if len(runs) == 1:
        lines += [
            "- This is one seed; another may rank the runs otherwise: --seeds 3 shows the spread."
        ]
    else:
        lines += [
            "- ± is the standard deviation over the seeds; in a verdict, what a difference must "
            "exceed to be seen."
        ]
    return "\n".join(lines)


def _save(results: Results, text: str, out: Path, name: str) -> list[Path]:
    content = {
        "made_with": made_with(),
        "runs": {n: [asdict(r) for r in runs] for n, runs in results.items()},
    }
    write_text(out / f"{name}.json", to_json(content))
    write_text(out / f"{name}.md", text + "\n")
    return [out / f"{name}.json", out / f"{name}.md"]


def _zeros(results: Results) -> dict[str, dict[str, float]]:
    """Share of zeros by name and layer, the mean over seeds."""
    return {
        name: {
            layer: mean(r.zeros_by_layer[layer] for r in runs) for layer in runs[0].zeros_by_layer
        }
        for name, runs in results.items()
    }


def _sum(matrices: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    return [
        [sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)
    ]
