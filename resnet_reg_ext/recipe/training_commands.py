"""``resnet-reg train``, ``compare``, ``tune`` and ``path``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

# The modules that need the extra `train` are imported once the options are parsed: --help works
# without them.
from .command_line import (
    add_out,
    is_rank_zero,
    list_files,
    list_with_report,
    parser_of,
    settle,
)
from .files import RecipeError
from .libraries import import_libraries
from .options import Parser, add_run_options, run_from
from .settings import (
    DIGITS,
    LARGEST_SHARE,
    OPTIONS_FILES,
    PUBLISHED,
    Number,
    Run,
    expanded,
    option_name,
)

if TYPE_CHECKING:
    from .results import Result
    from .tune import Budget

# Chosen so that the unregularised ResNet-50 overfits visibly within minutes: docs/recipe.md.
COMPARED = Run(group_by=r"writer\d+", l1=2e-3, weight_decay=1e-2)
TUNE_MINUTES = 18.0  # of two cores, on some hundred images of 64 px
_NO_CHANNELS = "--channels isn't for --warm, where runs start from each other's weights"


def _train(arguments: list[str]) -> None:
    parser = parser_of("train")
    add_run_options(parser, Run())
    parser.add_argument(
        "--patch",
        action="store_true",
        help="also write patch.safetensors, as `patch save` does: where the weights differ from "
        "the --weights file's",
    )
    add_out(parser, "out/train")
    args = settle(parser, arguments, "train")
    if args.patch and (args.weights in PUBLISHED or args.channels is not None):
        raise RecipeError("--patch needs --weights FILE, and can't be combined with --channels")
    import_libraries()
    from .report import write_report
    from .results import Result
    from .tensorboard import log_plots
    from .train import train

    run = run_from(args, Run())
    if run.target_sparsity != run.steered_to:
        raise RecipeError("--target-sparsity needs an --l1 above 0 to start from")
    if args.resume is not None and (args.out / "result.json").is_file():
        print(f"{args.out} is finished\n\n{_ends(Result.load(args.out))}")
        if is_rank_zero() and not (args.out / "report.html").exists():
            write_report(args.out)  # killed before it, or finished by an older version
        return
    has_begun = (args.out / "last.ckpt").is_file()
    if args.resume is not None and not has_begun and is_rank_zero():
        print(f"{args.out} has no last.ckpt yet: from the beginning, with the settings it has")
    result = train(run, args.out, resume=args.resume is not None and has_begun)
    if is_rank_zero():
        print(f"\n{_ends(result)}")
        log_plots(args.out, result)
        write_report(args.out)
        names = [OPTIONS_FILES["train"], "result.json", "best.ckpt", "last.ckpt", "tensorboard"]
        names += ["predictions.csv", "mistakes.json", "report.html"]
        if args.patch:
            from .patch_command import write_patch

            names.append("patch.safetensors")
            ended = "best.ckpt" if run.early_stopping else "last.ckpt"
            print(write_patch(args.out / ended, expanded(run.weights), args.out / names[-1]))
        # One since the start and one since each resumption, the oldest first.
        logs = sorted(args.out.glob("csv/*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        list_files([*(args.out / name for name in names), *logs])


def _ends(result: Result) -> str:
    """The run's last weights and its best ones, in a table."""
    from .verdicts import table

    rows = {"last.ckpt": [result]}
    if result.best is not None:
        rows[f"best.ckpt (epoch {result.best.epoch:.0f})"] = [result.stopped_early]
    return table(rows)


def _by_weights(args: argparse.Namespace, run: Run, *strengths: str) -> Run:
    """The run with strengths that its initial weights suggest, where none were given."""
    names = [name for name in strengths if getattr(args, name) is None]
    if not names or run.data == DIGITS:
        return run
    from .tune import strengths_by_weights

    found = strengths_by_weights(run)
    if is_rank_zero():
        given = ", ".join(f"{option_name(name)} {getattr(found, name):g}" for name in names)
        print(f"strengths by the initial weights: {given}", flush=True)
    return replace(run, **{name: getattr(found, name) for name in names})


def _add_search(parser: Parser, minutes: float) -> None:
    parser.add_argument(
        "--points",
        type=Number(int, 2),
        default=5,
        help="strengths of each regulariser (default: %(default)s)",
    )
    parser.add_argument(
        "--minutes",
        type=Number(float, 0, above=True),
        default=minutes,
        help="the search ends early where its next run would go beyond (default: %(default)s)",
    )
    parser.add_argument("--steps", type=Number(int, 1), help="the same, in training steps")
    parser.add_argument(
        "--rule",
        choices=("1se", "best"),
        default="1se",
        help="1se: the strongest penalty within one standard error of the lowest validation loss; "
        "best: the lowest itself (default: %(default)s)",
    )


def _budget(args: argparse.Namespace) -> Budget:
    from .tune import Budget

    return Budget(args.points, args.minutes, args.steps)


def _add_arms(parser: Parser) -> None:
    """Options of what `compare` compares."""
    parser.add_argument(
        "--seeds", type=Number(int, 1), default=1, help="how many, from --seed on (default: 1)"
    )
    parser.add_argument(
        "--elastic-net",
        type=Number(float, 0, above=True),
        nargs=2,
        metavar=("L1", "WD"),
        help="l1 and weight decay of the arm that has both (default: --l1 and --weight-decay)",
    )
    for name, kind in (("l2", "weight decay"), ("l1", "l1")):
        parser.add_argument(
            f"--{name}-sp",
            type=Number(float, 0, above=True),
            help=f"{kind} of the arm {name.upper()}-SP, which pulls towards the initial weights "
            f"where --weights gives any (default: --{kind.replace(' ', '-')})",
        )
    parser.add_argument(
        "--group-lasso",
        type=Number(float, 0, LARGEST_SHARE, above=True),
        metavar="SHARE",
        help="adds the arm 'group lasso': no l1 or weight decay, and this share of the channels "
        "taken out as by --channels SHARE --method prox",
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="find each arm's own best strength on the validation images first, as `tune` does",
    )


def _compare(arguments: list[str]) -> None:
    parser = parser_of("compare")
    add_run_options(parser, COMPARED)
    _add_arms(parser)
    _add_search(parser, TUNE_MINUTES)
    add_out(parser, "out/compare")
    args = settle(parser, arguments, "compare")
    _check_search(parser, args)
    _check_toward(args)
    import_libraries()
    from .arms import TOWARD_START, pulls_to_start
    from .compare import compare
    from .tune import tuned_comparison

    run, resume = run_from(args, COMPARED), args.resume is not None
    if args.tune:
        budget = _budget(args)
        written = tuned_comparison(
            run,
            args.seeds,
            budget,
            args.out,
            rule=args.rule,
            resume=resume,
            group_lasso=args.group_lasso,
        )
        list_with_report(sorted((args.out / "tune").glob("tune*")), args.out / "tune")
        list_with_report(written, args.out)
        return
    strengths = {"elastic net": tuple(args.elastic_net)} if args.elastic_net else {}
    strengths |= {"L2-SP": (0.0, args.l2_sp)} if args.l2_sp else {}
    strengths |= {"L1-SP": (args.l1_sp, 0.0)} if args.l1_sp else {}
    for name in set(TOWARD_START) & set(strengths):
        if not pulls_to_start(run):
            raise RecipeError(
                f"--{name.lower()} needs --weights, and neither --channels nor --target-sparsity"
            )
    run = _by_weights(args, run, "l1", "weight_decay")
    written = compare(run, args.seeds, args.out, resume, strengths, args.group_lasso)
    list_with_report(written, args.out)


def _check_search(parser: Parser, args: argparse.Namespace) -> None:
    """Refuses what a comparison would pass over: strengths with --tune, a budget without."""
    wrong: tuple[str, ...] = ("l1", "weight_decay", "elastic_net", "l2_sp", "l1_sp")
    why = "can't be given with --tune, which finds it"
    if not args.tune:
        wrong, why = ("points", "minutes", "steps", "rule"), "is for --tune"
    for name in wrong:
        if getattr(args, name) != parser.get_default(name):
            raise RecipeError(f"{option_name(name)} {why}")


def _check_toward(args: argparse.Namespace) -> None:
    if args.toward != "zero":
        raise RecipeError("--toward start is for train and path: here arms differ in it")


def _tune(arguments: list[str]) -> None:
    parser = parser_of("tune")
    add_run_options(parser, COMPARED, l1=False)
    _add_search(parser, TUNE_MINUTES)
    parser.add_argument("--warm", action="store_true", help="start each from the one before")
    add_out(parser, "out/tune")
    args = settle(parser, arguments, "tune")
    _check_toward(args)
    if args.weight_decay is not None:
        raise RecipeError("--weight-decay can't be given: it is one of the strengths to find")
    if args.warm and args.channels is not None:
        raise RecipeError(_NO_CHANNELS)
    import_libraries()
    from .tune import tune

    run, resume = run_from(args, COMPARED, l1=0.0), args.resume is not None
    tune(run, _budget(args), args.out, warm=args.warm, rule=args.rule, resume=resume)
    list_with_report(sorted(args.out.glob("tune*")), args.out)


def _path(arguments: list[str]) -> None:
    parser = parser_of("path")
    add_run_options(parser, COMPARED, l1=False)
    parser.add_argument(
        "--l1",
        type=Number(float, 0),
        nargs="+",
        help="coefficients, each larger than the one before (default: 0 0.001 0.002 0.004 for the "
        "digits; for a folder 0 and a third, one and three times the one that reaches a third of "
        "the initial weights)",
    )
    parser.add_argument(
        "--seeds", type=Number(int, 1), default=1, help="how many, from --seed on (default: 1)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--warm", action="store_true", help="start each from the one before")
    how.add_argument("--cold", action="store_true", help="start each alike, which is the default")
    add_out(parser, "out/path")
    args = settle(parser, arguments, "path")
    if args.warm and args.channels is not None:
        raise RecipeError(_NO_CHANNELS)
    if args.warm and args.toward == "start":
        raise RecipeError("--toward start isn't for --warm: runs start from each other's weights")
    l1s = args.l1
    if l1s is not None and l1s != sorted(set(l1s)):
        raise RecipeError(f"--l1 must increase, got {' '.join(f'{v:g}' for v in l1s)}")
    import_libraries()
    from .compare import path
    from .tune import strengths_by_weights

    run = _by_weights(args, run_from(args, COMPARED, l1=0.0), "weight_decay")
    if l1s is None:
        middle = COMPARED.l1 if run.data == DIGITS else strengths_by_weights(run).l1
        factors = (0.5, 1, 2) if run.data == DIGITS else (1 / 3, 1, 3)
        l1s = [0.0, *(float(f"{middle * factor:.1e}") for factor in factors)]
    resume = args.resume is not None
    list_with_report(path(run, l1s, args.seeds, args.out, warm=args.warm, resume=resume), args.out)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "compare": _compare,
    "tune": _tune,
    "path": _path,
}
