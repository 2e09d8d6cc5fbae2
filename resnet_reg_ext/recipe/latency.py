"""How long models take for images, beside the dense one, measured in turn in one run."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..structure.compaction_report import count_parameters
from .cost import count_multiply_adds, shortened
from .files import RecipeError
from .model import Classifier, load_classifier
from .onnx_export import need, session, write_onnx

EAGER, FOLDED, ONNX = "eager", "folded", "onnxruntime"
WAYS = (EAGER, FOLDED, ONNX)
DENSE = "dense"
BATCHES = (1, 8)
_SAMPLE_SECONDS = 0.02  # a sample has as many calls as take so long


@dataclass(frozen=True)
class Latency:
    """One model's figures."""

    name: str
    parameters: int
    multiply_adds: int
    """Of one image."""
    milliseconds: dict[str, dict[int, float]]
    """By way and batch: the median of all rounds, of one call."""


def measure(
    models: Mapping[str, nn.Module],
    image_size: int,
    *,
    threads: int = 1,
    rounds: int = 20,
    batches: Sequence[int] = BATCHES,
) -> list[Latency]:
    """Times models on the CPU, in three ways, for images of noise.

    ``eager``: the model as it is. ``folded``: norms folded into the convolutions before them
    (``torch.fx.experimental.optimization.fuse``), weights and images in channels_last.
    ``onnxruntime``: exported to ONNX.

    Each round calls every model in every way, so that what else the machine does hits all alike.

    Args:
        models: ResNet-50s in evaluation mode, by name.
        image_size: height and width in pixels.
        threads: of torch and of onnxruntime.
        rounds: how many.
        batches: numbers of images in a call.

    Raises:
        RecipeError: onnxruntime or what exports to it is missing.
    """
    need("onnx", "onnxscript", "onnxruntime")
    samples: dict[tuple[str, str, int], list[float]] = {}
    with TemporaryDirectory() as folder, _threads(threads), torch.inference_mode():
        calls = {
            (name, way, batch): call
            for name, model in models.items()
            for way, run in _ways(model, Path(folder), image_size, threads).items()
            for batch, call in _calls(run, way, batches, image_size)
        }
        repeats = {key: _repeats(call) for key, call in calls.items()}
        keys = list(calls)
        for number in range(rounds):
            # No call always comes after the same one.
            for key in keys if number % 2 == 0 else reversed(keys):
                seconds = _timed(calls[key], repeats[key])
                samples.setdefault(key, []).append(seconds / repeats[key])
    return [
        Latency(
            name,
            count_parameters(model),
            count_multiply_adds(model, image_size),
            {
                way: {batch: 1000 * median(samples[name, way, batch]) for batch in batches}
                for way in WAYS
            },
        )
        for name, model in models.items()
    ]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ways(
    model: nn.Module, folder: Path, image_size: int, threads: int
) -> dict[str, Callable[[torch.Tensor], Any]]:
    """The ways to run a model, each a function of images."""
    from torch.fx.experimental.optimization import fuse

    plain = copy.deepcopy(model).float().eval().to(memory_format=torch.contiguous_format)
    folded = fuse(copy.deepcopy(plain)).to(memory_format=torch.channels_last)
    file = folder / "model.onnx"
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_onnx(plain, image_size, file)
    running = session(file, threads)
    file.unlink()
    return {
        EAGER: plain,
        FOLDED: folded,
        ONNX: lambda images: running.run(None, {"images": images.numpy()}),
    }


def _calls(
    run: Callable[[torch.Tensor], Any], way: str, batches: Sequence[int], image_size: int
) -> Iterator[tuple[int, Callable[[], Any]]]:
    for batch in batches:
        images = torch.randn(
            (batch, 3, image_size, image_size), generator=torch.Generator().manual_seed(batch)
        )
        if way == FOLDED:
            images = images.to(memory_format=torch.channels_last)
        yield batch, partial(run, images)


def _repeats(call: Callable[[], Any]) -> int:
    call()
    return max(1, math.ceil(_SAMPLE_SECONDS / _timed(call, 1)))


def _timed(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return time.perf_counter() - start


def table(measured: Sequence[Latency], batches: Sequence[int] = BATCHES) -> str:
    """A Markdown table; in brackets how many times as fast as the first model."""
    first = measured[0]
    head = ["", "parameters", "multiply-adds"]
    head += [f"{way}, {batch}" for way in WAYS for batch in batches]
    rows = [head]
    for one in measured:
        row = [one.name, shortened(one.parameters), shortened(one.multiply_adds)]
        for way in WAYS:
            for batch in batches:
                took = one.milliseconds[way][batch]
                ratio = first.milliseconds[way][batch] / took
                shown = f"{took:.0f}" if took >= 100 else f"{took:.3g}"
                row.append(f"{shown} ms" + (f" ({ratio:.1f} x)" if one is not first else ""))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)))
    return "\n".join(f"| {line} |" for line in lines)


def latency(
    checkpoints: Sequence[Path], *, image_size: int | None, threads: int, rounds: int
) -> str:
    """The table of checkpoints beside the dense ResNet-50, with what it was measured with.

    Args:
        checkpoints: of runs.
        image_size: height and width in pixels; None takes the first checkpoint's.
        threads: see :func:`measure`.
        rounds: see :func:`measure`.

    Raises:
        RecipeError: something that the user can put right.
    """
    need("onnx", "onnxscript", "onnxruntime")
    classifiers = [load_classifier(path) for path in checkpoints]
    size = image_size or classifiers[0].run.image_size
    if len(set(checkpoints)) < len(checkpoints):
        raise RecipeError("a checkpoint is given twice")
    models: dict[str, nn.Module] = {
        DENSE: Classifier(classifiers[0].run, classifiers[0].classes).model.eval()
    }
    models |= {str(path): c.model for path, c in zip(checkpoints, classifiers, strict=True)}
    measured = measure(models, size, threads=threads, rounds=rounds)
    import onnxruntime

    said = (
        f"{size} px; {threads} {'thread' if threads == 1 else 'threads'} each; medians of {rounds} "
        f"rounds, all in turn; the number after the way is the images in a call; "
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    )
    return f"{table(measured)}\n\n{said}"
