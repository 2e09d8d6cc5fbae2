"""Several runs that differ in regularisation alone, one after the other, and their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

from . import plots
from .ahead import cost
from .arms import GROUP_LASSO, Strengths, arms, strength_options
from .checks import check_seeds, settled
from .files import RecipeError, Stopped, is_unused, locked, prepare_folder, write_text
from .processes import is_rank_zero
from .results import Result, made_with, to_json
from .settings import OPTIONS_FILES, Run, same_run, save_options
from .train import FULL_CHECKPOINT, WEIGHTS, check, finish, train
from .verdicts import Results, conditions, difference, held_out_of, report, verdicts

EARLY = "none, stopped early"


@dataclass(frozen=True)
class Planned:
    """A run of several."""

    name: str
    run: Run
    folder: Path
    start: Path | None = None
    """A checkpoint to take the weights from."""


def check_group_lasso(run: Run, share: float | None) -> None:
    """Refuses an arm "group lasso" that can't be trained.

    Raises:
        RecipeError: names the option that stands against it, or the package that is missing.
    """
    if share is None:
        return
    if run.channels is not None:
        raise RecipeError("--group-lasso can't be combined with --channels, which is for all arms")
    check(arms(run, group_lasso=share)[GROUP_LASSO])


def compare(
    run: Run,
    seeds: int,
    out: Path,
    resume: bool = False,
    strengths: Strengths | None = None,
    group_lasso: float | None = None,
) -> list[Path]:
    """Trains under none, L2, L1, elastic net; prints the verdict; returns the files written.

    "none, stopped early" is the run without a penalty at the epoch that the validation images
    choose, which takes no run of its own.

    Args:
        run: everything they share, and the ``l1`` and ``weight_decay`` of those that have them.
        seeds: how many, from ``run.seed`` on. A seed decides which images are trained on and which
            are for validation, wrong labels, initial weights and order; the arms have them in
            common, and all seeds the test images.
        out: the output folder.
        resume: leave out what is finished there, go on with what isn't.
        strengths: of arms that have others than those of ``run``.
        group_lasso: the share of channels that an arm "group lasso" takes out; None for no such.

    Raises:
        RecipeError: something that the user can put right.
        Stopped: a signal came.
    """
    if not (run.l1 and run.weight_decay):
        raise RecipeError("compare needs --l1 and --weight-decay above 0")
    check_seeds(run, seeds)
    run = settled(run)
    check_group_lasso(run, group_lasso)
    plan = [
        Planned(name, replace(arm, seed=seed), out / f"seed{seed}" / name.replace(" ", "-"))
        for seed in range(run.seed, run.seed + seeds)
        for name, arm in arms(run, strengths, group_lasso).items()
    ]
    options = {**asdict(run), "seeds": seeds}
    options |= {"group_lasso": group_lasso, **strength_options(strengths or {})}
    with begun(plan, out, OPTIONS_FILES["compare"], options, resume):
        results = train_all(plan, out, resume)
        return _write_comparison(results, seeds, out) if is_rank_zero() else []


def reported(trained: Results) -> dict[str, Sequence[Result]]:
    """What is told of each arm, and of the one without a penalty as stopped early."""
    results: dict[str, Sequence[Result]] = {
        name: [result.reported for result in runs] for name, runs in trained.items()
    }
    none = trained["none"]
    if not any(result.run.early_stopping or result.best is None for result in none):
        results[EARLY] = [result.stopped_early for result in none]
    return results


def _write_comparison(trained: Results, seeds: int, out: Path) -> list[Path]:
    results = reported(trained)
    text = report(results, [*verdicts(results), *_against_early(results), *_channels(trained)])
    print(f"\n{text}")
    subtitle = conditions(results)
    written = [
        plots.training_curves(trained, out / "training_curves.png", subtitle),
        plots.gap_bars(results, out / "gap_bars.png", subtitle),
        plots.confusion(
            {name: _sum([r.confusion for r in rs]) for name, rs in results.items()},
            results["none"][0].classes,
            out / "confusion.png",
            f"{subtitle}{', summed over them' if seeds > 1 else ''}",
        ),
        plots.sparsity_by_layer(_zeros(trained), out / "sparsity_by_layer.png", subtitle),
    ]
    return [*written, *_save(trained, text, out, "compare")]


def _against_early(results: Results) -> list[str]:
    """Each penalty against the run without one whose end the validation images chose."""
    if EARLY not in results:
        return []
    held_out, control = held_out_of(results), results[EARLY]
    return [
        f"{name} against {EARLY}: {difference(control, runs, held_out)}."
        for name, runs in results.items()
        if name not in ("none", EARLY)
    ]


def _channels(trained: Results) -> list[str]:
    """What the group lasso has taken out, as its zeros are those of the weights left."""
    if GROUP_LASSO not in trained:
        return []
    share = trained[GROUP_LASSO][0].run.channels
    return [f"{GROUP_LASSO}: {share:.0%} of the channels were to go; zeros are of what is left."]


def path(
    run: Run, l1s: Sequence[float], seeds: int, out: Path, *, warm: bool, resume: bool = False
) -> list[Path]:
    """Trains under increasing L1, each from the same start; returns the files written.

    Args:
        run: everything they share.
        l1s: increasing coefficients.
        seeds: how many, from ``run.seed`` on.
        out: the output folder.
        warm: start each from the weights of the one before instead, so that the last has had the
            epochs of all.
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
            start = folder / "last.ckpt" if warm else None
    options = {k: v for k, v in asdict(run).items() if k != "l1"}
    options |= {"l1": list(l1s), "seeds": seeds, "warm": warm}
    with begun(plan, out, OPTIONS_FILES["path"], options, resume):
        results = train_all(plan, out, resume)
        if not is_rank_zero():
            return []
        how = "each started from the weights of the one before" if warm else "each from the start"
        results = {name: [r.reported for r in runs] for name, runs in results.items()}
        text = report(results, [*verdicts(results), f"Increasing L1, {how}."])
        print(f"\n{text}")
        written = plots.path(results, l1s, out / "path.png", conditions(results))
        return [written, *_save(results, text, out, "path")]


def is_finished(planned: Planned, resume: bool) -> bool:
    """Whether a resumed run's folder holds its result."""
    return resume and (planned.folder / "result.json").is_file()


@contextmanager
def begun(
    plan: Sequence[Planned],
    out: Path,
    options_file: str,
    options: Mapping[str, object],
    resume: bool,
    kept: int | None = None,
) -> Iterator[None]:
    """Holds the output folder, with the settings in it, once the first run is known to be right.

    Says what the runs will take. ``kept`` is how many of them leave checkpoints; None is all.
    """
    if not is_rank_zero():
        yield
        return

    def refuse_if_used() -> None:
        if not resume and not is_unused(out):
            raise RecipeError(f"--out {out} isn't empty: give another, or --resume {out}")

    refuse_if_used()
    left = [planned.run for planned in plan if not is_finished(planned, resume)]
    said = cost(left, *check(left[0])) if left else ""
    weights = 2 * (len(left) if kept is None else min(kept, len(left))) * WEIGHTS
    prepare_folder(out, weights + 2 * FULL_CHECKPOINT)
    with locked(out):
        refuse_if_used()  # another run may have been here since
        save_options(options, out / options_file)
        if said:
            print(said, flush=True)
        yield


def trained(
    planned: Planned,
    out: Path,
    label: str,
    *,
    resume: bool,
    keep: str = "weights",
    test: bool = True,
) -> Result:
    """The result of a planned run: what its folder holds where it is finished, else trained now.

    Args:
        planned: the run.
        out: the folder of all of them, which is resumed after a signal.
        label: told before it is trained.
        resume: take what is finished there, go on with what was begun.
        keep: as of :func:`train`, as is ``test``.
        test: see ``keep``.

    Raises:
        RecipeError: the folder holds another run's result, or what :func:`train` raises.
        Stopped: a signal came.
    """
    if is_finished(planned, resume):
        result = finish(planned.folder, keep)
        if other := same_run(result.run, planned.run):
            raise RecipeError(f"{planned.folder} holds the result of another run: {other}")
        return result
    if is_rank_zero():
        print(f"\n{label}", flush=True)
    try:
        return train(
            planned.run,
            planned.folder,
            name=planned.name,
            resume=resume and (planned.folder / "last.ckpt").is_file(),
            keep=keep,
            test=test,
            start=planned.start,
        )
    except Stopped as stopped:
        raise Stopped(stopped.number, out) from None


def train_all(plan: Sequence[Planned], out: Path, resume: bool) -> dict[str, list[Result]]:
    """Trains what isn't finished."""
    results: dict[str, list[Result]] = {}
    for index, planned in enumerate(plan):
        label = f"[{index + 1} of {len(plan)}] {planned.name}, seed {planned.run.seed}"
        results.setdefault(planned.name, []).append(trained(planned, out, label, resume=resume))
    return results


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
