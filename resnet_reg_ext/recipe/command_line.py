"""What the commands of the recipe have in common: options, folders, and the list of files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .files import RecipeError
from .libraries import import_libraries
from .options import Parser, config_arguments
from .settings import OPTIONS_FILES, expanded


def parser_of(command: str) -> Parser:
    """The parser of a command."""
    return Parser(prog=f"resnet-reg {command}", allow_abbrev=False)


def parse(parser: Parser, arguments: list[str]) -> argparse.Namespace:
    """Parses options; those of ``--config`` come first, so that the command line's win."""
    finder = Parser(prog=parser.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    config = finder.parse_known_args(arguments)[0].config
    if config is not None:
        import_libraries()  # YAML's among them
        arguments = [*config_arguments(config, parser), *arguments]
    args: argparse.Namespace = parser.parse_args(arguments)
    return args


def folder(text: str) -> Path:
    """A type for argparse: a folder of this machine."""
    # Path("") is the current folder.
    if not text:
        raise argparse.ArgumentTypeError("must name a folder, got ''")
    # Path would make a folder s3: of s3://bucket.
    if "\0" in text or "://" in text:
        raise argparse.ArgumentTypeError(f"must be a folder of this machine, got {text!r}")
    return expanded(text)


def add_out(parser: Parser, default: str) -> None:
    """Adds ``--out`` and ``--resume``."""
    parser.add_argument(
        "--out", type=folder, default=default, help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--resume",
        type=folder,
        metavar="DIR",
        help="go on with the interrupted output folder DIR, as its settings say; "
        "no other option may be given",
    )


def add_corrupt(parser: Parser) -> None:
    """Adds ``--corrupt``."""
    parser.add_argument(
        "--corrupt",
        choices=("refuse", "skip"),
        default="refuse",
        help="what to do about unreadable images (default: %(default)s)",
    )


def settle(parser: Parser, arguments: list[str], command: str) -> argparse.Namespace:
    """Options as given, or those of the folder to resume."""
    args = parse(parser, arguments)
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
    args = parse(parser, ["--config", str(folder / OPTIONS_FILES[command])])
    args.resume, args.out = folder, folder
    return args


def is_rank_zero() -> bool:
    """Whether this process is the one that talks."""
    try:
        from . import processes
    except (ImportError, OSError, RuntimeError):  # without the extra there is one process
        return True
    return processes.is_rank_zero()


def list_files(paths: Sequence[Path]) -> None:
    """Tells which files were written."""
    if is_rank_zero():
        print("\nWritten:", *paths, sep="\n  ")


def list_with_report(written: Sequence[Path], out: Path) -> None:
    """Writes the report, and tells which files were written."""
    if is_rank_zero():
        from .report import write_report
        from .tensorboard import log_pictures

        if pictures := [path for path in written if path.suffix == ".png"]:
            log_pictures(out, pictures)
        list_files([*written, write_report(out)])
