"""``resnet-reg bench``: what a step costs on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import models, report, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="resnet-reg bench",
        description="Times a step of ProxSGD against what one would use instead, each checked "
        "before, all in turn. Takes a minute or two; do nothing else meanwhile. Libraries to "
        "compare with come with: pip install '.[bench]' in the sources' folder",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="unset: the GPU if torch finds one, else the CPU"
    )
    parser.add_argument("--model", choices=tuple(models.TITLES), default="resnet50")
    parser.add_argument("--rounds", type=_count, help="how often all rows run at the most")
    parser.add_argument("--full", action="store_true", help="everything: twelve minutes")
    parser.add_argument(
        "--table-only", action="store_true", help="no host time, cost against size and number"
    )
    parser.add_argument("--out", type=Path, help="a folder for JSON, page and plots; unset: none")
    options = parser.parse_args(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")

    scale = run.FULL if options.full else run.QUICK
    main_table = replace(scale.tables[0], model=options.model)
    scale = replace(scale, tables=(main_table, *scale.tables[1:]))
    if options.rounds:
        tables = tuple(replace(t, rounds=options.rounds) for t in scale.tables)
        scale = replace(scale, tables=tables, rounds=options.rounds)
    measured = run.run(scale, device, not options.full, run.Progress(), options.table_only)
    results = run.rounded(measured)
    print(report.short(results))
    if options.out:
        run.save(results, options.out)
    return 0


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} must be 1 or more")
    return count
