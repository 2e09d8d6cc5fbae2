"""The commands of the recipe by name, and ``resnet-reg evaluate``, ``predict`` and ``patch``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

# The modules that need the extra `train` are imported once the options are parsed: --help works
# without them.
from . import channel_commands, training_commands
from .command_line import add_corrupt, folder, is_rank_zero, list_files, parser_of
from .files import RecipeError, Stopped
from .libraries import import_libraries
from .settings import SPLITS, Number, expanded
from .terminal import escape_what_cannot_be_shown, one_line


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
    if is_rank_zero():
        with suppress(OSError):
            print(text, file=sys.stderr)
    return code


def _evaluate(arguments: list[str]) -> None:
    parser = parser_of("evaluate")
    parser.add_argument("checkpoint", type=expanded, metavar="CHECKPOINT")
    parser.add_argument("--data", help="as of `train` (default: what it was trained on)")
    parser.add_argument(
        "--split",
        choices=SPLITS,
        help="which images (default: test where the data has it, else val)",
    )
    add_corrupt(parser)
    parser.add_argument(
        "--test-size",
        type=Number(int, 1),
        help="measure on so many of these images, drawn class by class",
    )
    parser.add_argument(
        "--out", type=folder, help="output folder (default: evaluate/ beside the checkpoint)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an evaluation that is there"
    )
    args = parser.parse_args(arguments)
    import_libraries()
    from .evaluate import evaluate

    list_files(
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
    parser = parser_of("predict")
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


_COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    **training_commands.COMMANDS,
    "evaluate": _evaluate,
    "patch": _patch,
    "predict": _predict,
    **channel_commands.COMMANDS,
}
