"""``python -m bench channels``: accuracy, latency and training time against channels taken out.

``target`` is about the group lasso: how near its steering comes to the share that was asked for.

One training run is one piece: ``--one`` makes the next that is missing and ends, and a run that was
stopped goes on. When all are there, latency is measured, all models in turn, and the figures go to
``docs/results/channels``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import ROOT, machine, suite

LATENCY_SIZE = 224  # pixels: what a ResNet-50 is commonly asked for
ROUNDS = 15
BATCHES = (1, 8)


@dataclass(frozen=True)
class Experiment:
    """The shares of channels that are taken out, and the training that all of them get."""

    shares: tuple[float | None, ...]
    options: dict[str, Any]
    small: dict[str, Any]
    """What is changed to try it out within a minute."""


_SMALL = {"epochs": 2, "train_size": 20, "test_size": 20, "batch_size": 10, "image_size": 16}
EXPERIMENTS = {
    "digits": Experiment(
        (None, 0.8),
        {"epochs": 20, "evaluate_every": 20},
        _SMALL,
    ),
    "target": Experiment(
        (0.5, 0.8),
        {"epochs": 20, "evaluate_every": 20, "method": "prox"},
        _SMALL,
    ),
    "frontier": Experiment(
        (None, 0.3, 0.5, 0.7),
        {
            "epochs": 40,
            "evaluate_every": 40,
            "image_size": 64,
            "train_size": 160,
            "test_size": 1000,
            "val_fraction": 0.1,
            "test_fraction": 0.6,
            "lr": 0.01,
            "weight_decay": 1e-4,
        },
        _SMALL,
    ),
}


@dataclass(frozen=True)
class Piece:
    """One training run."""

    share: float | None
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return "dense" if self.share is None else f"{self.share:g}"

    @property
    def is_done(self) -> bool:
        return (self.folder / "result.json").is_file()


def main(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if options.what == "report":
        from . import channels_report

        for path in channels_report.write(options.out, ROOT / "docs" / "channels.md"):
            print(f"written: {path}")
        return 0
    from resnet_reg_ext.recipe.files import RecipeError, Stopped

    torch.set_num_threads(1)
    try:
        return _experiment(options)
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command goes on", file=sys.stderr)
        return 128 + stopped.number
    except RecipeError as error:
        print(f"python -m bench channels: {error}", file=sys.stderr)
        return 2


def _experiment(options: argparse.Namespace) -> int:
    from resnet_reg_ext.recipe.settings import Run

    chosen = EXPERIMENTS[options.what]
    settings = dict(chosen.options)
    if options.what == "frontier":
        if not (options.data and options.weights):
            print("python -m bench channels frontier needs --data and --weights", file=sys.stderr)
            return 2
        settings |= {"data": options.data, "weights": options.weights}
    if options.small:
        settings |= chosen.small
    run = Run(**settings, accelerator="cpu")
    folder = options.folder / (f"{options.what}-small" if options.small else options.what)
    pieces = [
        Piece(share, seed, folder / f"seed{seed}" / ("dense" if share is None else f"{share:g}"))
        for seed in range(options.seeds)
        for share in chosen.shares
    ]
    missing = [piece for piece in pieces if not piece.is_done]
    for piece in missing[: 1 if options.one else None]:
        print(f"[{pieces.index(piece) + 1} of {len(pieces)}] {piece.folder}", flush=True)
        _train(piece, replace(run, channels=piece.share, seed=piece.seed))
    left = [piece for piece in pieces if not piece.is_done]
    if left or (missing and options.one):
        print(f"{len(left)} of {len(pieces)} runs are left", flush=True)
        return 0
    collected = (
        _collect_target(pieces)
        if options.what == "target"
        else _collect(options.what, pieces, options.small)
    )
    results = suite.rounded(collected)
    path = (folder if options.small else options.out) / f"{options.what}.json"
    suite.write_json(results, path)
    print(f"written: {path}")
    return 0


def _train(piece: Piece, run: Any) -> None:
    from resnet_reg_ext.recipe.train import train

    with _cpu_seconds(piece.folder):
        resume = (piece.folder / "last.ckpt").is_file()
        train(run, piece.folder, keep="weights", resume=resume)


@contextmanager
def _cpu_seconds(folder: Path) -> Iterator[None]:
    """Adds this process's CPU time to what a run took before it was stopped."""
    file = folder.with_suffix(folder.suffix + ".cpu.json")
    before = json.loads(file.read_text()) if file.is_file() else 0.0
    start = time.process_time()
    try:
        yield
    finally:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(before + time.process_time() - start))


def _collect(name: str, pieces: list[Piece], small: bool) -> dict[str, Any]:
    """All figures of an experiment, latency included."""
    from resnet_reg_ext.recipe import latency, verdicts
    from resnet_reg_ext.recipe.model import load_classifier
    from resnet_reg_ext.recipe.results import Result

    results: dict[str, list[Result]] = {}
    models: dict[str, nn.Module] = {}
    rows = []
    for piece in pieces:
        result = Result.load(piece.folder)
        results.setdefault(piece.name, []).append(result)
        rows.append(_row(piece, result))
        if piece.share is not None or piece.seed == 0:  # dense models differ in their values alone
            model = load_classifier(piece.folder / "last.ckpt").model
            models[f"{piece.name}, seed {piece.seed}"] = model
    size, rounds = (32, 2) if small else (LATENCY_SIZE, ROUNDS)
    measured = latency.measure(models, size, threads=1, rounds=rounds, batches=BATCHES)
    run = {k: v for k, v in asdict(results["dense"][0].run).items() if k not in _PATHS}
    return {
        "experiment": name,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine.machine("cpu"),
        "run": run,
        "classes": results["dense"][0].classes,
        "conditions": verdicts.conditions(results),
        "verdicts": [line.partition(";")[0] for line in verdicts.verdicts(results)],
        "runs": rows,
        "latency": {
            "image_size": size,
            "threads": 1,
            "rounds": rounds,
            "models": [asdict(one) for one in measured],
        },
    }


def _row(piece: Piece, result: Any) -> dict[str, Any]:
    """What is told of each run."""
    cpu = piece.folder.with_suffix(piece.folder.suffix + ".cpu.json")
    return {
        "variant": piece.name,
        "seed": piece.seed,
        **{key: result.last[key] for key in ("train_accuracy", "test_accuracy", "test_loss")},
        "test_images": result.data["test_images"],
        "cpu_seconds": json.loads(cpu.read_text()),
    }


def _collect_target(pieces: list[Piece]) -> dict[str, Any]:
    """The shares of channels that were asked for, and those that the runs ended with."""
    from resnet_reg_ext.recipe import verdicts
    from resnet_reg_ext.recipe.channel_choice import find_channels
    from resnet_reg_ext.recipe.model import Classifier, load_classifier
    from resnet_reg_ext.recipe.results import Result

    results = [Result.load(piece.folder) for piece in pieces]
    total = find_channels(Classifier(results[0].run, results[0].classes)).total
    rows = []
    for piece, result in zip(pieces, results, strict=True):
        left = find_channels(load_classifier(piece.folder / "last.ckpt")).total
        rows.append({**_row(piece, result), "asked": piece.share, "share": 1 - left / total})
    seeds = len({piece.seed for piece in pieces})
    return {
        "experiment": "target",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine.machine("cpu"),
        "run": {k: v for k, v in asdict(results[0].run).items() if k not in _PATHS},
        "channels": total,
        "conditions": verdicts.conditions({"runs": results[:seeds]}),
        "runs": rows,
    }


_PATHS = ("data", "weights", "seed", "channels")
