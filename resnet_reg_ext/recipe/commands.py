"""``resnet-reg train``, ``compare``, ``path``, ``evaluate``, ``predict`` and ``patch``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

# The modules that need the extra `train` are imported once the options are parsed: --help works
# without them.
from . import channel_commands
from .files import RecipeError, Stopped
from .libraries import import_libraries
from .options import Parser, add_run_options, config_arguments, run_from
from .settings import OPTIONS_FILES, SPLITS, Number, Run, expanded
from .terminal import escape_what_cannot_be_shown, one_line

# Chosen so that the unregularised ResNet-50 overfits visibly within minutes: docs/recipe.md.
COMPARED = Run(label_noise=0.3, l1=6e-3, weight_decay=3e-3)


def main(command: str, arguments: Sequence[str]) -> int:
    """Runs one of the commands; returns its exit code.

    Returns:
        0; 1 where some images were passed over; 2 on bad input; 128 + a signal.
    """
    escape_what_cannot_be_shown()
    try:
        return _COMMANDS[command](list(arguments)) or 0
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


def _say(text: str, code: int) -> int:
    if _is_rank_zero():
        with suppress(OSError):
            print(text, file=sys.stderr)
    return code


def _is_rank_zero() -> bool:
    try:
        from .processes import is_rank_zero
    except (ImportError, OSError, RuntimeError):  # without the extra there is one process
        return True
    return is_rank_zero()


def _parser(command: str) -> Parser:
    return Parser(prog=f"resnet-reg {command}", allow_abbrev=False)


def _parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """Parses options; those of ``--config`` come first, so that the command line's win."""
    finder = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config = finder.parse_known_args(arguments)[0].config
    if config is not None:
        import_libraries()  # YAML's among them
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
    import_libraries()
    from .compare import table
    from .report import write_report
    from .results import Result
    from .tensorboard import log_plots
    from .train import train

    run = run_from(args, Run())
    if run.target_sparsity != run.steered_to:
        raise RecipeError("--target-sparsity needs an --l1 above 0 to start from")
    if args.resume is not None and (args.out / "result.json").is_file():
        print(f"{args.out} is finished\n\n{table({'run': [Result.load(args.out)]})}")
        if _is_rank_zero() and not (args.out / "report.html").exists():
            write_report(args.out)  # killed before it, or finished by an older version
        return
    has_begun = (args.out / "last.ckpt").is_file()
    if args.resume is not None and not has_begun and _is_rank_zero():
        print(f"{args.out} has no last.ckpt yet: from the beginning, with the settings it has")
    result = train(run, args.out, resume=args.resume is not None and has_begun)
    if _is_rank_zero():
        print(f"\n{table({'run': [result]})}")
        log_plots(args.out, result)
        write_report(args.out)
        names = [OPTIONS_FILES["train"], "result.json", "best.ckpt", "last.ckpt", "tensorboard"]
        names += ["predictions.csv", "mistakes.json", "report.html"]
        # One since the start and one since each resumption, the oldest first.
        logs = sorted(args.out.glob("csv/*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        _list_files([*(args.out / name for name in names), *logs])


def _compare(arguments: list[str]) -> None:
    parser = _parser("compare")
    add_run_options(parser, COMPARED)
    parser.add_argument(
        "--seeds", type=Number(int, 1), default=1, help="how many, from --seed on (default: 1)"
    )
    _add_out(parser, "out/compare")
    args = _settle(parser, arguments, "compare")
    import_libraries()
    from .compare import compare

    run = run_from(args, COMPARED)
    _list_with_report(compare(run, args.seeds, args.out, args.resume is not None), args.out)


def _path(arguments: list[str]) -> None:
    parser = _parser("path")
    add_run_options(parser, COMPARED, l1=False)
    parser.add_argument(
        "--l1",
        type=Number(float, 0),
        nargs="+",
        default=[0.0, 2e-3, 4e-3, 8e-3],
        help="coefficients, each larger than the one before (default: 0 0.002 0.004 0.008)",
    )
    parser.add_argument(
        "--seeds", type=Number(int, 1), default=1, help="how many, from --seed on (default: 1)"
    )
    parser.add_argument(
        "--cold", action="store_true", help="start each alike, not from the one before"
    )
    _add_out(parser, "out/path")
    args = _settle(parser, arguments, "path")
    import_libraries()
    from .compare import path

    if args.channels is not None:
        raise RecipeError("--channels isn't for path, whose runs start from each other's weights")
    if args.l1 != sorted(set(args.l1)):
        raise RecipeError(f"--l1 must increase, got {' '.join(f'{v:g}' for v in args.l1)}")
    _list_with_report(
        path(
            run_from(args, COMPARED, l1=0.0),
            args.l1,
            args.seeds,
            args.out,
            cold=args.cold,
            resume=args.resume is not None,
        ),
        args.out,
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
        "--test-size",
        type=Number(int, 1),
        help="measure on so many of these images, drawn class by class",
    )
    parser.add_argument(
        "--out", type=_folder, help="output folder (default: evaluate/ beside the checkpoint)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an evaluation that is there"
    )
    args = parser.parse_args(arguments)
    import_libraries()
    from .evaluate import evaluate

    _list_files(
        evaluate(
            args.checkpoint,
            args.data,
            args.split,
            args.corrupt,
            args.out or args.checkpoint.parent / "evaluate",
            test_size=args.test_size,
            overwrite=args.overwrite,
        )
    )


def _predict(arguments: list[str]) -> int:
    parser = _parser("predict")
    parser.description = "Progress and images that are passed over are told on standard error."
    parser.add_argument("checkpoint", type=expanded, metavar="CHECKPOINT")
    parser.add_argument(
        "images",
        type=expanded,
        nargs="+",
        metavar="IMAGES",
        help="image files, and folders of them",
    )
    parser.add_argument(
        "--out", type=expanded, metavar="FILE", help="file to write (default: standard output)"
    )
    parser.add_argument(
        "--format", choices=("csv", "json"), help="default: by the suffix of --out, else csv"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    parser.add_argument(
        "--workers", type=Number(int, 0), default=0, help="processes that load images (default: 0)"
    )
    args = parser.parse_args(arguments)
    import_libraries()
    from .predict import predict

    passed_over = predict(
        args.checkpoint,
        args.images,
        args.out,
        form=args.format,
        overwrite=args.overwrite,
        workers=args.workers,
    )
    return 1 if passed_over else 0


def _patch(arguments: list[str]) -> None:
    from . import patch_command

    patch_command.run(arguments)


def _list_with_report(written: Sequence[Path], out: Path) -> None:
    """Writes the report too."""
    if _is_rank_zero():
        from .report import write_report
        from .tensorboard import log_pictures

        log_pictures(out, [path for path in written if path.suffix == ".png"])
        _list_files([*written, write_report(out)])


def _listing(command: Callable[[list[str]], list[Path]]) -> Callable[[list[str]], None]:
    """The command, which tells the files that it has written."""

    def run(arguments: list[str]) -> None:
        if paths := command(arguments):
            _list_files(paths)

    return run


def _list_files(paths: Sequence[Path]) -> None:
    if _is_rank_zero():
        print("\nWritten:", *paths, sep="\n  ")


_COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "train": _train,
    "compare": _compare,
    "path": _path,
    "evaluate": _evaluate,
    "patch": _patch,
    "predict": _predict,
    **{name: _listing(command) for name, command in channel_commands.COMMANDS.items()},
}
