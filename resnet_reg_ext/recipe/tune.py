"""The strength of each regulariser, found on the validation images; test images are not looked at.

Each strength is trained from the same start, unless that is not wanted, and the choice is glmnet's
(Friedman, Hastie, Tibshirani 2010): the strongest penalty whose validation loss is within one
standard error of the lowest.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .arms import TOWARD_START, pulls_to_start, strength_of
from .checks import settled
from .compare import (
    Planned,
    begun,
    check_group_lasso,
    compare,
    is_finished,
    trained,
)
from .files import RecipeError, Stopped, is_unused, prepare_folder, write_text
from .forecast import (
    DECAYED,
    count_steps,
    default_strengths,
    l1_for_share,
    travel,
    two_digits,
)
from .processes import is_rank_zero
from .results import Result, to_json
from .settings import OPTIONS_FILES, Run, save_options
from .train import check
from .trials import Trial, choose, compare_options, summary
from .verdicts import conditions

# L1's grid goes from a tenth to thrice the strength that reaches this share of the initial weights;
# from scratch the weights grow first, so that most of them must be within reach.
_SHARE, _SHARE_FROM_SCRATCH = 1 / 3, 0.9
_L1_DECADES, _L2_DECADES = (-1.0, 0.5), (-0.5, 1.0)


@dataclass(frozen=True)
class Budget:
    """How much a search may cost; it ends early where the next run would go beyond."""

    points: int = 5
    """Strengths of each regulariser."""
    minutes: float | None = None
    steps: int | None = None


def grids(run: Run, points: int) -> dict[str, list[tuple[float, float]]]:
    """(l1, weight decay) of each regulariser, weakest first, evenly spaced in their logarithms."""
    images, classifier = check(run)
    steps = count_steps(run, len(images.train))
    share = _SHARE_FROM_SCRATCH if run.weights == "none" else _SHARE
    middle, moved = l1_for_share(classifier, steps, share), travel(run, steps)
    if not moved:
        raise RecipeError("--lr 0 has nothing to tune: no strength moves a weight")
    l1s = [two_digits(middle * f) for f in np.logspace(*_L1_DECADES, points)]
    decays = [two_digits(DECAYED / moved * f) for f in np.logspace(*_L2_DECADES, points)]
    found = {
        "L2": [(0.0, decay) for decay in decays],
        "L1": [(l1, 0.0) for l1 in l1s],
        # One line through the plane, so that it costs no more than the others.
        "elastic net": [
            (two_digits(l1 / 2), two_digits(decay / 2))
            for l1, decay in zip(l1s, decays, strict=True)
        ],
    }
    if pulls_to_start(run):
        found |= {"L2-SP": found["L2"], "L1-SP": found["L1"]}
    return found


def strengths_by_weights(run: Run) -> Run:
    """The run with an l1 and a weight decay that its initial weights suggest, without a search.

    Raises:
        RecipeError: the run can't be made.
    """
    images, classifier = check(run)
    return default_strengths(classifier, count_steps(run, len(images.train)))


def order(points: int, *, warm: bool) -> list[int]:
    """The places of a grid in the order tried.

    The middle comes first, then whichever is farthest from those before, so that a search that runs
    out of its budget has seen the whole range; upwards where each starts from the one before.
    """
    if warm:
        return list(range(points))
    places = [points // 2]
    while len(places) < points:
        left = [place for place in range(points) if place not in places]
        places.append(max(left, key=lambda place: min(abs(place - other) for other in places)))
    return places


def tune(
    run: Run, budget: Budget, out: Path, *, warm: bool = False, rule: str = "1se", resume: bool
) -> dict[str, tuple[float, float]]:
    """Finds (l1, weight decay) of each regulariser; prints and writes what was tried.

    Args:
        run: everything that the runs share; its own strengths don't matter.
        budget: how much it may cost. The first strength of each regulariser is tried in any case.
        out: the output folder: ``tune.md``, ``tune.json``, and for each regulariser the file that
            `train` takes; ``tuned-compare.yaml`` is for `compare`.
        warm: start each strength from the weights of the one before.
        rule: "1se", or "best" for the lowest validation loss itself.
        resume: go on there.

    Raises:
        RecipeError: something that the user can put right.
        Stopped: a signal came.
    """
    if run.target_sparsity is not None:
        raise RecipeError("--target-sparsity finds an l1 of its own: there is nothing to tune")
    run = settled(replace(run, l1=0.0, weight_decay=0.0))
    grid = grids(run, budget.points)
    if warm:  # they start from other weights than those to be pulled to
        grid = {name: values for name, values in grid.items() if name not in TOWARD_START}
    plan = _planned(run, grid, out, warm=warm)
    options = {k: v for k, v in asdict(run).items() if k not in ("l1", "weight_decay")}
    options |= {**asdict(budget), "warm": warm, "rule": rule}
    with begun(plan, out, OPTIONS_FILES["tune"], options, resume, None if warm else 2):
        trials = _try(plan, budget, out, resume=resume)
        chosen = {
            name: choose([t for t in trials if t.name in ("none", name)], rule) for name in grid
        }
        strengths = {name: (t.l1, t.weight_decay) for name, t in chosen.items()}
        if is_rank_zero():
            _write(run, trials, chosen, rule, out)
        return strengths


def _planned(
    run: Run, grid: Mapping[str, Sequence[tuple[float, float]]], out: Path, *, warm: bool
) -> list[Planned]:
    plan = [Planned("none", run, out / "none")]
    points = len(next(iter(grid.values())))
    for place in order(points, warm=warm):
        for name, strengths in grid.items():
            l1, weight_decay = strengths[place]
            folder = out / _folder_of(name, place)
            before = out / (_folder_of(name, place - 1) if place else "none")
            start = before / "last.ckpt" if warm else None
            trial = replace(run, **strength_of(name, l1, weight_decay))
            plan.append(Planned(name, trial, folder, start))
    return plan


def _folder_of(name: str, place: int) -> str:
    """The folder's name of a strength; ``place`` is -1 of the run without a penalty."""
    return "none" if place < 0 else f"{name.replace(' ', '-')}-{place + 1}"


def _try(plan: Sequence[Planned], budget: Budget, out: Path, *, resume: bool) -> list[Trial]:
    """Trains what the budget allows and isn't finished."""
    trials: list[Trial] = []
    # Weights to start the next one from are kept, else results alone.
    keep = "weights" if any(planned.start for planned in plan) else "result"
    spent = _Spent(out / "seconds.json")
    steps = 0
    for index, planned in enumerate(plan):
        done = is_finished(planned, resume)
        must = index < len({p.name for p in plan})  # none, and one of each
        if not done and not must and spent.is_over(budget, steps, trials):
            if is_rank_zero():
                print(f"\nthe budget ends here, with {index} of {len(plan)} runs made", flush=True)
            break
        label = f"{planned.name}, l1 {planned.run.l1:g}, weight decay {planned.run.weight_decay:g}"
        begin = time.monotonic()
        try:
            result = trained(
                planned,
                out,
                f"[{index + 1} of {len(plan)}] {label}",
                resume=resume,
                keep=keep,
                test=False,
            )
        finally:
            if not done:
                spent.add(planned.folder.name, time.monotonic() - begin)
        trials.append(_trial(planned, result, spent.seconds.get(planned.folder.name, 0.0)))
        steps += count_steps(planned.run, result.data["train_images"])
    return trials


class _Spent:
    """The seconds that each run has taken, resumptions included."""

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, dict[str, float]()
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                self.seconds = {str(name): float(value) for name, value in content.items()}
            except (ValueError, AttributeError, TypeError):
                raise RecipeError(f"{path} is damaged: delete it to go on") from None

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if is_rank_zero():
            write_text(self.path, to_json(self.seconds))

    def is_over(self, budget: Budget, steps: int, trials: Sequence[Trial]) -> bool:
        """Whether one more run, as long as the longest, goes beyond the budget."""
        if budget.steps is not None and steps + steps // max(1, len(trials)) > budget.steps:
            return True
        longest = max((trial.seconds for trial in trials), default=0.0)
        allowed = math.inf if budget.minutes is None else 60 * budget.minutes
        return sum(self.seconds.values()) + longest > allowed


def _trial(planned: Planned, result: Result, seconds: float) -> Trial:
    last = result.reported.last
    loss, error = last["validation_loss"], result.reported.validation_error
    place = -1 if planned.name == "none" else int(planned.folder.name.rpartition("-")[2]) - 1
    return Trial(
        planned.name,
        place,
        planned.run.l1,
        planned.run.weight_decay,
        loss if math.isfinite(loss) else math.inf,
        0.0 if error is None else error,
        last["validation_accuracy"],
        last["zeros"],
        seconds,
    )


def _write(
    run: Run, trials: Sequence[Trial], chosen: Mapping[str, Trial], rule: str, out: Path
) -> None:
    told = {"none": trials[0], **chosen}
    results = {name: [Result.load(out / _folder_of(t.name, t.place))] for name, t in told.items()}
    text = f"{conditions(results)}\n\n{summary(trials, chosen, rule)}"
    print(f"\n{text}")
    content: dict[str, Any] = {"rule": rule, "trials": [asdict(t) for t in trials]}
    content["chosen"] = {name: asdict(trial) for name, trial in chosen.items()}
    content["runs"] = {name: [asdict(result) for result in rs] for name, rs in results.items()}
    write_text(out / "tune.json", to_json(content, indent=1))
    write_text(out / "tune.md", text + "\n")
    for name, trial in chosen.items():
        tuned = replace(run, **strength_of(name, trial.l1, trial.weight_decay))
        save_options(asdict(tuned), out / f"tuned-{name.replace(' ', '-')}.yaml")
    save_options(compare_options(run, chosen), out / "tuned-compare.yaml")


def tuned_comparison(
    run: Run,
    seeds: int,
    budget: Budget,
    out: Path,
    *,
    rule: str = "1se",
    resume: bool,
    group_lasso: float | None = None,
) -> list[Path]:
    """A comparison in which each arm has its own best strength, found in ``out/tune`` before.

    Raises:
        RecipeError: something that the user can put right.
        Stopped: a signal came.
    """
    if not resume and not is_unused(out) and is_rank_zero():
        raise RecipeError(f"--out {out} isn't empty: give another, or --resume {out}")
    # Written once the first run is known to be right, and before the first one can be stopped.
    settings = {k: v for k, v in asdict(settled(run)).items() if k not in ("l1", "weight_decay")}
    settings |= {"seeds": seeds, "tune": True, "rule": rule, **asdict(budget)}
    settings["group_lasso"] = group_lasso
    check(run)
    check_group_lasso(run, group_lasso)
    if is_rank_zero():
        prepare_folder(out, 0)
        save_options(settings, out / OPTIONS_FILES["compare"])
    try:
        begun_before = (out / "tune" / OPTIONS_FILES["tune"]).is_file()
        found = tune(run, budget, out / "tune", rule=rule, resume=begun_before)
    except Stopped as stopped:
        raise Stopped(stopped.number, out) from None
    tuned = replace(run, l1=found["L1"][0], weight_decay=found["L2"][1])
    others = {name: values for name, values in found.items() if name not in ("L1", "L2")}
    return compare(tuned, seeds, out, resume=True, strengths=others, group_lasso=group_lasso)
