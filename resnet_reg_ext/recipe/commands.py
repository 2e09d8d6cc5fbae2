"""``resnet-reg train``, ``compare``, ``tune``, ``path`` and ``evaluate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from . import compare, evaluate, tune
from .callbacks import Stopped
from .files import RecipeError
from .options import Parser, add_run_options, config_arguments, run_from
from .processes import is_rank_zero
from .results import Result
from .settings import DIGITS, OPTIONS_FILES, Number, Run, expanded, option_name
from .splits import SPLITS
from .strengths import strengths_by_weights
from .terminal import escape_what_cannot_be_shown, one_line
from .train import train
from .tune import Budget
from .verdicts import table

# Chosen so that the unregularised ResNet-50 overfits visibly within minutes: docs/recipe.md.
COMPARED = Run(group_by=r"writer\d+", l1=2e-3, weight_decay=1e-2)
TUNE_MINUTES = 18.0  # of two cores, on some hundred images of 64 px


def main(command: str, arguments: Sequence[str]) -> int:
    """Runs one of the commands; returns its exit code: 0, 2 on bad input, 128 + a signal."""
    escape_what_cannot_be_shown()
    try:
        _COMMANDS[command](list(arguments))
    except RecipeError as error:
        return _say(one_line(f"resnet-reg {command}: {error}"), 2)
    except Stopped as stopped:
        return _say(
            f"\nstopped by {stopped} after a whole step; to go on: "
            f"resnet-reg {command} --resume {stopped.folder}",
            128 + stopped.number,
        )
    except KeyboardInterrupt:
        return _say(f"resnet-reg {command}: interrupted", 130)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"resnet-reg {command}: {where}{error.strerror or error}", 2)
    return 0


def _say(text: str, code: int) -> int:
    if is_rank_zero():
        with suppress(OSError):
            print(text, file=sys.stderr)
    return code


def _parser(command: str) -> Parser:
    return Parser(prog=f"resnet-reg {command}", allow_abbrev=False)


def _parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """Parses options; those of ``--config`` come first, so that the command line's win."""
    finder = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config = finder.parse_known_args(arguments)[0].config
    if config is not None:
        arguments = [*config_arguments(config, parser), *arguments]
    args: argparse.Namespace = parser.parse_args(arguments)
    return args


def _folder(text: str) -> Path:
    # Path("") is the current folder.
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    # Path would make a folder s3: of s3://bucket.
    if "\0" in text or "://" in text:
        raise argparse.ArgumentTypeError(f"must be a folder of this machine, got {text!r}")
    return expanded(text)


def _add_out(parser: Parser, default: str) -> None:
    parser.add_argument(
        "--out", type=_folder, default=default, help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--resume",
        type=_folder,
        metavar="DIR",
        help="go on with the interrupted output folder DIR, as its settings say; "
        "no other option may be given",
    )


def _settle(parser: Parser, arguments: list[str], command: str) -> argparse.Namespace:
    """Options as given, or those of the folder to resume."""
    args = _parse(parser, arguments)
    if args.resume is None:
        return args
    folder = args.resume
    if len(arguments) > (1 if arguments[0].startswith("--resume=") else 2):
        raise RecipeError("--resume DIR takes all settings from DIR: give no other option")
    if not (folder / OPTIONS_FILES[command]).is_file():
        for other, name in OPTIONS_FILES.items():
            if (folder / name).is_file():
                raise RecipeError(f"{folder} is `{other}`'s: resnet-reg {other} --resume {folder}")
        raise RecipeError(f"nothing to resume in {folder}: it has no {OPTIONS_FILES[command]}")
    args = _parse(parser, ["--config", str(folder / OPTIONS_FILES[command])])
    args.resume, args.out = folder, folder
    return args


def _train(arguments: list[str]) -> None:
    parser = _parser("train")
    add_run_options(parser, Run())
    _add_out(parser, "out/train")
    args = _settle(parser, arguments, "train")
    run = run_from(args, Run())
    if run.target_sparsity != run.steered_to:
        raise RecipeError("--target-sparsity needs an --l1 above 0 to start from")
    if args.resume is not None and (args.out / "result.json").is_file():
        print(f"{args.out} is finished\n\n{_ends(Result.load(args.out))}")
        return
    has_begun = (args.out / "last.ckpt").is_file()
    if args.resume is not None and not has_begun and is_rank_zero():
        print(f"{args.out} has no last.ckpt yet: from the beginning, with the settings it has")
    result = train(run, args.out, resume=args.resume is not None and has_begun)
    if is_rank_zero():
        print(f"\n{_ends(result)}")
        names = (OPTIONS_FILES["train"], "result.json", "best.ckpt", "last.ckpt", "tensorboard")
        # One since the start and one since each resumption, the oldest first.
        logs = sorted(args.out.glob("csv/*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        _list_files([*(args.out / name for name in names), *logs])


def _ends(result: Result) -> str:
    """The run's last weights and its best ones, in a table."""
    rows = {"last.ckpt": [result]}
    if result.best is not None:
        rows[f"best.ckpt (epoch {result.best.epoch:.0f})"] = [result.stopped_early]
    return table(rows)


def _by_weights(args: argparse.Namespace, run: Run, *strengths: str) -> Run:
    """The run with strengths that its initial weights suggest, where none were given."""
    names = [name for name in strengths if getattr(args, name) is None]
    if not names or run.data == DIGITS:
        return run
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
    return Budget(args.points, args.minutes, args.steps)


def _compare(arguments: list[str]) -> None:
    parser = _parser("compare")
    add_run_options(parser, COMPARED)
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
    parser.add_argument(
        "--tune",
        action="store_true",
        help="find each arm's own best strength on the validation images first, as `tune` does",
    )
    _add_search(parser, TUNE_MINUTES)
    _add_out(parser, "out/compare")
    args = _settle(parser, arguments, "compare")
    _check_search(parser, args)
    run, resume = run_from(args, COMPARED), args.resume is not None
    if args.tune:
        _list_files(
            tune.tuned_comparison(
                run, args.seeds, _budget(args), args.out, rule=args.rule, resume=resume
            )
        )
        return
    strengths = {"elastic net": tuple(args.elastic_net)} if args.elastic_net else None
    run = _by_weights(args, run, "l1", "weight_decay")
    _list_files(compare.compare(run, args.seeds, args.out, resume, strengths))


def _check_search(parser: Parser, args: argparse.Namespace) -> None:
    """Refuses what a comparison would pass over: strengths with --tune, a budget without."""
    wrong: tuple[str, ...] = ("l1", "weight_decay", "elastic_net")
    why = "can't be given with --tune, which finds it"
    if not args.tune:
        wrong, why = ("points", "minutes", "steps", "rule"), "is for --tune"
    for name in wrong:
        if getattr(args, name) != parser.get_default(name):
            raise RecipeError(f"{option_name(name)} {why}")


def _tune(arguments: list[str]) -> None:
    parser = _parser("tune")
    add_run_options(parser, COMPARED, l1=False)
    _add_search(parser, TUNE_MINUTES)
    parser.add_argument("--warm", action="store_true", help="start each from the one before")
    _add_out(parser, "out/tune")
    args = _settle(parser, arguments, "tune")
    if args.weight_decay is not None:
        raise RecipeError("--weight-decay can't be given: it is one of the strengths to find")
    run, resume = run_from(args, COMPARED, l1=0.0), args.resume is not None
    tune.tune(run, _budget(args), args.out, warm=args.warm, rule=args.rule, resume=resume)
    _list_files(sorted(args.out.glob("tune*")))


def _path(arguments: list[str]) -> None:
    parser = _parser("path")
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
    _add_out(parser, "out/path")
    args = _settle(parser, arguments, "path")
    l1s = args.l1
    if l1s is not None and l1s != sorted(set(l1s)):
        raise RecipeError(f"--l1 must increase, got {' '.join(f'{v:g}' for v in l1s)}")
    run = _by_weights(args, run_from(args, COMPARED, l1=0.0), "weight_decay")
    if l1s is None:
        middle = COMPARED.l1 if run.data == DIGITS else strengths_by_weights(run).l1
        factors = (0.5, 1, 2) if run.data == DIGITS else (1 / 3, 1, 3)
        l1s = [0.0, *(float(f"{middle * factor:.1e}") for factor in factors)]
    _list_files(
        compare.path(run, l1s, args.seeds, args.out, warm=args.warm, resume=args.resume is not None)
    )


def _evaluate(arguments: list[str]) -> None:
    parser = _parser("evaluate")
    parser.add_argument("checkpoint", type=expanded, metavar="CHECKPOINT")
    parser.add_argument("--data", help="as of `train` (default: what it was trained on)")
    parser.add_argument(
        "--split",
        choices=SPLITS,
        help="which images (default: test where the data has it, else val)",
    )
    parser.add_argument(
        "--corrupt",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do about unreadable images (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=_folder, help="output folder (default: evaluate/ beside the checkpoint)"
    )
    args = parser.parse_args(arguments)
    out = args.out or args.checkpoint.parent / "evaluate"
    _list_files(evaluate.evaluate(args.checkpoint, args.data, args.split, args.corrupt, out))


def _list_files(paths: Sequence[Path]) -> None:
    if is_rank_zero():
        print("\nWritten:", *paths, sep="\n  ")


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "compare": _compare,
    "tune": _tune,
    "path": _path,
    "evaluate": _evaluate,
}
