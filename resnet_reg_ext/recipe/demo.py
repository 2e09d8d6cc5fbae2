"""The demo: one ResNet-50 trained without and with regularisation, and what that did."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from .data import Digits, load_digits
from .plots import plot_all
from .train import Result, Settings, train

NONE = Settings()
ELASTIC_NET = replace(NONE, l1=2e-3, weight_decay=1e-3)
RUNS = {
    "none": NONE,
    "L2": replace(ELASTIC_NET, l1=0.0),
    "L1": replace(ELASTIC_NET, weight_decay=0.0),
    "elastic net": ELASTIC_NET,
}
SHORT = ("none", "elastic net")
"""The runs that five minutes on two cores are enough for."""
DATA: dict[str, Any] = {"image_size": 32, "train_size": 120, "test_size": 400, "label_noise": 0.0}
QUICK_DATA: dict[str, Any] = {
    "image_size": 32,
    "train_size": 20,
    "test_size": 20,
    "label_noise": 0.0,
}


class DemoError(Exception):
    """Something that the user can put right, in one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns its exit code: 0, or 2 where it could not run."""
    args = _parser().parse_args(argv)
    try:
        _check_extra()
        if args.device == "cuda" and not torch.cuda.is_available():
            raise DemoError("--device cuda: torch finds no CUDA device here")
        _check_writable(args.out)
        _demo(args)
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resnet-reg demo", description=__doc__)
    parser.add_argument("--epochs", type=_positive, help=f"default: {NONE.epochs}")
    parser.add_argument("--seed", type=_not_negative, default=0, help="default: %(default)s")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        help="folder for results and plots (default: %(default)s)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--all", action="store_true", help="L2 and L1 alone too; takes twice the time"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two steps on 20 images: shows only that it runs"
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _not_negative(text: str) -> int:
    # numpy, which draws the split, takes seeds of 32 bits.
    if not 0 <= (number := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**32 - 1, got {number}")
    return number


def _check_extra() -> None:
    """Checks that the libraries of the ``demo`` extra are there, before anything takes time."""
    for module in ("torchvision", "sklearn", "tqdm", "matplotlib"):
        try:
            importlib.import_module(module)
        # A torchvision built for another torch raises a RuntimeError or OSError.
        except (ImportError, OSError, RuntimeError) as error:
            raise DemoError(
                f"{module} can't be imported ({error}); "
                "the demo needs: pip install 'resnet_reg_ext[demo]'"
            ) from None


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise DemoError(f"can't write to --out {folder}: {error.strerror}") from None


def _demo(args: argparse.Namespace) -> None:
    data_settings = QUICK_DATA if args.quick else DATA
    data = load_digits(**data_settings, seed=args.seed)
    changes: dict[str, Any] = {"seed": args.seed}
    if args.quick:
        changes |= {"epochs": 1, "batch_size": 10}
    if args.epochs:
        changes["epochs"] = args.epochs
    names = RUNS if args.all else SHORT
    runs = {name: replace(RUNS[name], **changes) for name in names}

    print(describe(data, next(iter(runs.values())), args.device), flush=True)
    width = max(map(len, runs))
    results = {
        name: train(f"{name:<{width}}", data, settings, device=args.device)
        for name, settings in runs.items()
    }

    print(f"\n{table(results)}\n")
    print(*verdicts(results, len(data.test_labels)), sep="\n")
    if args.quick:
        print("--quick: too short to learn anything; it shows only that everything runs.")
    wrong = f"{data.wrong_labels} labels made wrong, " if data.wrong_labels else ""
    subtitle = (
        f"ResNet-50 from scratch, {len(data.train_labels)} real digit images, "
        f"{wrong}one seed ({args.seed})"
    )
    try:
        written = plot_all(results, args.out, subtitle)
        written.append(args.out / "results.json")
        written[-1].write_text(json.dumps(_to_dict(results, data_settings), indent=2) + "\n")
    except OSError as error:
        raise DemoError(f"can't write to --out {args.out}: {error.strerror}") from None
    print("\nWritten:", *written, sep="\n  ")


def describe(data: Digits, settings: Settings, device: str) -> str:
    """What will be done, and how overfitting is brought out."""
    wrong = (
        f", {data.wrong_labels} of them with a label made wrong on purpose"
        if data.wrong_labels
        else ""
    )
    where = f"cpu, {torch.get_num_threads()} threads" if device == "cpu" else device
    return (
        "ResNet-50 from scratch on scikit-learn's digits, trained with ProxSGD\n"
        f"  training images  {len(data.train_labels)}{wrong}; so few, so that it overfits\n"
        f"  test images      {len(data.test_labels)}, all labels true\n"
        f"  training         {settings.epochs} epochs, batch {settings.batch_size}, "
        f"lr {settings.lr:g}, momentum {settings.momentum:g}, on {where}\n"
        f"  seed             {settings.seed}, for the split, the weights and the order;\n"
        "                   it is one seed, another may rank the runs otherwise"
    )


def table(results: Mapping[str, Result]) -> str:
    """The comparison, one row a run."""
    head = ("", "l1", "weight decay", "train acc", "test acc", "gap", "test loss", "zeros")
    rows: list[tuple[str, ...]] = [(*head, "optimizer ms", "step ms", "run s")]
    for name, r in results.items():
        rows.append(
            (
                name,
                f"{r.settings.l1:g}",
                f"{r.settings.weight_decay:g}",
                f"{r.last.train_accuracy:.3f}",
                f"{r.last.test_accuracy:.3f}",
                f"{r.gap:.3f}",
                f"{r.last.test_loss:.3f}",
                f"{r.last.zeros:.1%}",
                f"{r.optimizer_ms:.1f}",
                f"{r.step_ms:.0f}",
                f"{r.seconds:.0f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def verdicts(results: Mapping[str, Result], test_size: int) -> list[str]:
    """One sentence a regularised run, against the first run.

    A difference counts as seen only where it exceeds two standard errors of the difference of two
    proportions over the test images. That covers the choice of test images; it does not cover the
    seed.
    """
    (base_name, base), *others = results.items()
    lines = []
    for name, result in others:
        p, q = base.last.test_accuracy, result.last.test_accuracy
        margin = 2 * math.sqrt((p * (1 - p) + q * (1 - q)) / test_size)
        accuracy = _seen(q - p, margin, "higher", "lower")
        gap = _seen(result.gap - base.gap, margin, "larger", "smaller")
        lines.append(
            f"{name} against {base_name}: test accuracy: {accuracy}; gap: {gap}; "
            f"{result.last.zeros:.1%} of the regularised weights are exactly zero."
        )
    return lines


def _seen(difference: float, margin: float, up: str, down: str) -> str:
    if abs(difference) <= margin:
        return f"no difference seen ({difference:+.3f}, within ±{margin:.3f})"
    return f"{up if difference > 0 else down} ({difference:+.3f}, beyond ±{margin:.3f})"


def _to_dict(results: Mapping[str, Result], data_settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "data": dict(data_settings),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "runs": {
            name: {
                "settings": asdict(r.settings),
                "train_accuracy": r.last.train_accuracy,
                "test_accuracy": r.last.test_accuracy,
                "gap": r.gap,
                "test_loss": r.last.test_loss,
                "zeros": r.last.zeros,
                "optimizer_ms": r.optimizer_ms,
                "step_ms": r.step_ms,
                "seconds": r.seconds,
                "history": [asdict(epoch) for epoch in r.history],
                "zeros_by_layer": r.zeros_by_layer,
            }
            for name, r in results.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
