"""Predictions image by image: tables of them, and the images that are wrong most confidently."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from PIL import Image
from torch import Tensor

from ..atomic_write import atomic_write
from .files import RecipeError, printable, write_text
from .images import load_image
from .splits import Split

PREDICTIONS, MISTAKES = "predictions.csv", "mistakes.json"
MOST_MISTAKES, THUMBNAIL = 12, 112  # images, pixels of the longer side


@dataclass(frozen=True)
class Mistake:
    """An image whose true class the network thought unlikely."""

    image: str
    """Its path; for the digits, its number in the split."""
    true: str
    predicted: str
    probability: float
    """What the network gave the class that it predicted."""
    thumbnail: str
    """A data URI."""
    is_tiny: bool = False
    """Whether the image is so small that its pixels are shown as squares."""


def check_finite(logits: Tensor, what: object) -> None:
    """Refuses logits that are no prediction.

    Raises:
        RecipeError: some are NaN or infinite.
    """
    if not logits.isfinite().all():
        raise RecipeError(
            f"the network gives NaN or infinity for {what}, as after training that diverged"
        )


def rounded(probability: float) -> float:
    """A probability as it is written: six digits, what float32 tells."""
    return float(f"{probability:.6g}")


class Table:
    """Writes predictions as rows of CSV, or as a JSON list, while they come.

    Args:
        file: where to.
        classes: the class names.
        form: "csv" or "json".
    """

    def __init__(self, file: TextIO, classes: Sequence[str], form: str) -> None:
        self.file, self.classes, self.form = file, list(classes), form
        self.rows = 0
        if form == "csv":
            self.writer = csv.writer(file, lineterminator="\n")

    def add(self, image: str, probabilities: Sequence[float], true: str | None = None) -> None:
        """Writes one image's row."""
        shares = [rounded(p) for p in probabilities]
        best = max(range(len(shares)), key=probabilities.__getitem__)
        row: dict[str, Any] = {"image": image}
        if true is not None:
            row["true"] = true
        row |= {"predicted": self.classes[best], "probability": shares[best]}
        if self.form == "json":
            row["probabilities"] = dict(zip(self.classes, shares, strict=True))
            self.file.write(("[\n" if not self.rows else ",\n") + json.dumps(row))
        else:
            if not self.rows:
                self.writer.writerow([*row, *(f"p({name})" for name in self.classes)])
            self.writer.writerow([*row.values(), *shares])
        self.rows += 1

    def end(self) -> None:
        """Ends the list."""
        if self.form == "json":
            self.file.write("\n]\n" if self.rows else "[]\n")
        self.file.flush()


def save_predictions(
    folder: Path, split: Split, logits: Tensor, classes: Sequence[str]
) -> list[Path]:
    """Writes what a network said of each image of a split, and its most confident mistakes.

    Args:
        folder: where ``predictions.csv`` and ``mistakes.json`` go.
        split: the images and their true labels.
        logits: float32 (images, classes).
        classes: the class names.

    Returns:
        The files.
    """
    probabilities = logits.softmax(1)
    names = [_name(image, row) for row, image in enumerate(split.images)]
    truth = [classes[label] for label in split.labels.tolist()]
    with (
        atomic_write(folder / PREDICTIONS) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        table = Table(file, classes, "csv")
        for name, true, row in zip(names, truth, probabilities.tolist(), strict=True):
            table.add(name, row, true)
    mistakes = [
        Mistake(
            names[row],
            truth[row],
            classes[label],
            rounded(float(probabilities[row, label])),
            *thumbnail(split.images[row]),
        )
        for row, label in _most_confident(probabilities, split.labels)
    ]
    write_text(folder / MISTAKES, json.dumps([asdict(m) for m in mistakes], indent=1) + "\n")
    return [folder / PREDICTIONS, folder / MISTAKES]


def load_mistakes(folder: Path) -> list[Mistake] | None:
    """What ``save_predictions`` wrote; None where there is nothing, as of older versions.

    Raises:
        RecipeError: the file is damaged.
    """
    path = folder / MISTAKES
    if not path.is_file():
        return None
    try:
        return [_mistake(item) for item in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, RecursionError) as error:
        raise RecipeError(f"{path} is damaged: {error!s:.200}") from None


def _mistake(item: Mapping[str, Any]) -> Mistake:
    mistake = Mistake(**item)
    kinds = {"probability": (int, float), "is_tiny": (bool,)}
    for name, value in asdict(mistake).items():
        if not isinstance(value, kinds.get(name, (str,))):
            raise ValueError(f"{name} is {value!r:.50}")
    # Anything else would be fetched when the report is opened.
    if not mistake.thumbnail.startswith("data:image/png;base64,"):
        raise ValueError("a thumbnail must be a data URI of a PNG")
    return mistake


def _most_confident(probabilities: Tensor, labels: Tensor) -> list[tuple[int, int]]:
    """Rows and predicted labels of the wrong predictions, the surest first."""
    best, predicted = probabilities.max(1)
    wrong = (predicted != labels) & best.isfinite()
    order = torch.argsort(torch.where(wrong, best, -1.0), descending=True, stable=True)
    rows = order[: min(int(wrong.sum()), MOST_MISTAKES)].tolist()
    return [(row, int(predicted[row])) for row in rows]


def _name(image: Path | Tensor, row: int) -> str:
    return printable(str(image)) if isinstance(image, Path) else f"image {row}"


def thumbnail(image: Path | Tensor) -> tuple[str, bool]:
    """A small picture as a data URI (PNG), and whether it is shown enlarged."""
    if isinstance(image, Path):
        picture = load_image(image)
    else:
        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    is_tiny = max(picture.size) <= THUMBNAIL // 2
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    if not is_tiny:
        # A palette of 128 colours is a third of the size, and seldom seen at this size.
        picture = picture.quantize(128)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode(), is_tiny
