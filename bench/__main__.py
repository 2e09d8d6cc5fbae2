"""The command ``python -m bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import ROOT
from .keys import COUPLED, EXPERIMENTS, MAIN, MODELS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "report":
        if options.check and not options.readme:
            parser.error("report --check needs --readme FILE")
        return _report(options)
    if options.command == "channels":
        from . import channels

        return channels.main(options)
    try:
        from . import machine

        machine.native_core()
    except ImportError as error:
        print(
            f"python -m bench: it measures the installed native step, which can't be imported: "
            f"{error}. Install it with: pip install .",
            file=sys.stderr,
        )
        return 2
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    return _against(options) if options.against else _run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times a step of the installed ProxSGD against its alternatives: each is "
        "checked, then all run in turn. Takes twelve minutes; other work on the machine distorts "
        "the figures. Libraries to compare with come with: pip install '.[bench]'",
    )
    parser.add_argument("--quick", action="store_true", help="two minutes instead of twelve")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--model", choices=tuple(MODELS), default="resnet50", help="of the main table"
    )
    parser.add_argument("--rounds", type=_count, help="the largest number of rounds")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--table-only", action="store_true", help="measure the main table alone")
    part.add_argument(
        "--coupled-only",
        action="store_true",
        help="measure the table of the group lasso on channels alone, on the CPU",
    )
    part.add_argument(
        "--against",
        type=Path,
        metavar="SITE",
        help="instead compare with another build, which lies in the folder SITE (made with: pip "
        "install --no-deps --target SITE WHEEL)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/bench"), help="folder of the JSON, page and plots"
    )
    commands = parser.add_subparsers(dest="command", metavar="report or channels")
    report = commands.add_parser(
        "report",
        help="write page and plots, and the tables of README.md and bench/README.md, from a "
        "run's JSON",
    )
    report.add_argument("--json", type=Path, default=Path("bench/results/cpu.json"))
    report.add_argument("--readme", type=Path, help="the file whose tables are replaced")
    report.add_argument("--check", action="store_true", help="write nothing, compare the tables")
    _add_channel_options(
        commands.add_parser(
            "channels", help="accuracy, latency and training time against channels taken out"
        )
    )
    return parser


def _add_channel_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=(*EXPERIMENTS, "report"))
    parser.add_argument("--seeds", type=_count, default=3)
    parser.add_argument("--data", help="of frontier: a folder of images, one folder a class")
    parser.add_argument("--weights", help="of frontier: a ResNet-50's state dict to start from")
    parser.add_argument("--one", action="store_true", help="make the next missing run alone")
    parser.add_argument("--small", action="store_true", help="try it out: a minute, no figures")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "channels", help="of the runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "docs" / "results" / "channels",
        help="folder of JSON and plot",
    )


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} must be 1 or more")
    return count


def _run(options: argparse.Namespace) -> int:
    from . import markdown, plan, suite
    from .progress import Progress

    chosen = (plan.QUICK if options.quick else plan.FULL).with_model(options.model)
    if options.rounds:
        chosen = chosen.with_rounds(options.rounds)
    only = COUPLED if options.coupled_only else MAIN if options.table_only else None
    results = suite.run(chosen, options.device, options.quick, Progress(), only)
    print(markdown.short(results))
    suite.save(results, options.out)
    return 0


def _against(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from . import against, markdown, models, suite
    from .progress import Progress

    effort = against.QUICK if options.quick else against.FULL
    if options.rounds:
        effort = replace(effort, rounds=options.rounds)
    sizes = models.shapes(options.model)
    try:
        results = against.run(options.against, sizes, effort, options.device, Progress())
    except against.CopyError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    results = suite.rounded({"model": options.model, **results})
    print(markdown.against(results))
    path = options.out / "against.json"
    suite.write_json(results, path)
    print(f"written: {path}", file=sys.stderr)
    return 0


def _report(options: argparse.Namespace) -> int:
    from . import report

    files = (options.readme, report.PAGE) if options.readme else ()
    if options.check:
        current = {file: report.is_current(file, options.json) for file in files}
        for file, agrees in current.items():
            print(f"{file} and {options.json} {'agree' if agrees else 'differ'}")
        return 0 if all(current.values()) else 1
    for file in files:
        changed = report.update(file, options.json)
        print(f"{file}: {'updated' if changed else 'is up to date'}")
    written = report.write(options.json)
    if files:
        written += report.draw_readme(options.json)
    for path in written:
        print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
