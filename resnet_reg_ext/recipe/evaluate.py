"""What a checkpoint does: by class, by feature, by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from ..sparsity import Sparsity
from . import intervals, plots
from .data import load_split
from .files import RecipeError, locked, prepare_folder, write_text
from .measure import predict
from .model import Classifier, load_classifier, regularised
from .predictions import MISTAKES, PREDICTIONS, save_predictions
from .provenance import remarks
from .report import REPORT, write_report
from .results import made_with, to_json
from .settings import DIGITS, Run, expanded
from .splits import Split, subset
from .train import be_quiet


@dataclass(frozen=True)
class Scores:
    """What a classifier does on a split."""

    figures: dict[str, float]
    """Accuracy, mean cross-entropy (loss) and macro-F1 (f1)."""
    intervals: dict[str, tuple[float, float] | None]
    """Of the same, at 95 %; None where there is none."""
    precision: list[float]
    recall: list[float | None]
    """None of a class without images: there is nothing to recall."""
    confusion: list[list[int]]
    labels: list[int]
    logits: Tensor
    """float32 (images, classes)"""
    features: Tensor
    """float32 (images, 2048): the output of the last pooling."""


WRITTEN = (
    "evaluation.json",
    "evaluation.txt",
    PREDICTIONS,
    MISTAKES,
    "confusion.png",
    "sparsity_by_layer.png",
    "features.png",
    REPORT,
)


def evaluate(
    checkpoint: Path,
    data: str | None,
    split: str | None,
    corrupt: str,
    out: Path,
    *,
    test_size: int | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Measures a checkpoint on a split; prints tables; returns the files written.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` of a run.
        data: images as of ``train``; None takes those that the run was given, from anywhere.
        split: "train", "val" or "test"; None is "test" where the data has it, else "val". Other
            images than the run's are taken whole where they have no folders for splits.
        corrupt: "refuse" or "skip" unreadable images.
        out: the output folder.
        test_size: measure on so many of these images, drawn class by class from the run's seed.
        overwrite: replace an evaluation that is there.

    Raises:
        RecipeError: something that the user can put right.
    """
    be_quiet()

    def refuse_if_used() -> None:
        held = [name for name in WRITTEN if (out / name).exists()]
        if held and not overwrite:
            raise RecipeError(
                f"--out {out} holds {held[0]} already: give another --out, or --overwrite"
            )

    refuse_if_used()
    classifier = load_classifier(checkpoint)
    classes = classifier.classes
    trained = _with_images_found(classifier, checkpoint, data)
    run = replace(trained, corrupt=corrupt)
    if data is not None and data != DIGITS:
        data = str(expanded(data))
    images = load_split(run, split, classes, data, classifier.source)
    said = remarks(checkpoint, trained, classifier.source, data, images, classes)
    if test_size is not None:
        images = subset(images, classes, test_size, run.seed, "test")
    images = replace(images, notes=(*said, *images.notes))
    prepare_folder(out, 10_000_000)
    with locked(out):
        refuse_if_used()  # another evaluation may have been here since
        data = run.data if data is None else data
        written = _write(checkpoint, classifier, images, run, data, out, test_size)
        return [*written, write_report(out)]


def _with_images_found(classifier: Classifier, checkpoint: Path, data: str | None) -> Run:
    """The checkpoint's run, whose ``data`` is found from any folder.

    Checkpoints of 0.1.0 hold ``data`` as it was typed, relative to the folder then current, and the
    absolute path in ``source``.
    """
    run, source = classifier.run, classifier.source
    if data is not None or source is None or run.data == DIGITS:
        return run
    if not Path(source.folder).is_dir():
        raise RecipeError(
            f"the images of {checkpoint} were in {source.folder}, which is not there: give --data"
        )
    return replace(run, data=source.folder)


def _measure(classifier: Classifier, images: Split, run: Run) -> Scores:
    # What goes into the last linear layer is the output of the last pooling.
    features: list[Tensor] = []
    hook = classifier.model.fc.register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0].float().cpu())
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits, labels = predict(classifier, images, run, device)
    hook.remove()
    count = len(classifier.classes)
    recall = multiclass_recall(logits, labels, count, average="none").tolist()
    matrix = multiclass_confusion_matrix(logits, labels, count).tolist()
    right = int((logits.argmax(1) == labels).sum())
    losses = cross_entropy(logits, labels, reduction="none").double()
    return Scores(
        figures={
            "accuracy": right / len(labels),
            "loss": float(losses.mean()),
            "f1": float(multiclass_f1_score(logits, labels, count, average="macro")),
        },
        intervals={
            "accuracy": intervals.of_share(right, len(labels)),
            "loss": intervals.of_mean(losses.tolist()),
            "f1": intervals.of_macro_f1(matrix),
        },
        precision=multiclass_precision(logits, labels, count, average="none").tolist(),
        recall=[r if any(row) else None for r, row in zip(recall, matrix, strict=True)],
        confusion=matrix,
        labels=labels.tolist(),
        logits=logits,
        features=torch.cat(features),
    )


def _write(
    checkpoint: Path,
    classifier: Classifier,
    images: Split,
    run: Run,
    data: str,
    out: Path,
    test_size: int | None,
) -> list[Path]:
    """Measures, prints and writes everything; returns the files."""
    scores = _measure(classifier, images, run)
    classes, count, split = list(classifier.classes), len(scores.labels), images.name
    zeros: Sparsity = regularised(classifier.cpu())
    projections, missing = _project(scores.features)
    head = [f"accuracy {scores.figures['accuracy']:.3f} on {count} images of {data} ({split})"]
    head += _figures(scores)
    head += [f"  {note}" for note in images.notes]
    if missing:
        head.append(f"  features.png is left out: {missing}")
    text = "\n".join([*head, "", *_tables(scores, classes), "", zeros.table()])
    print(text)
    subtitle = (
        f"{checkpoint.name}, {count} images ({split}), accuracy {scores.figures['accuracy']:.3f}"
    )
    written = [
        plots.confusion({"": scores.confusion}, classes, out / "confusion.png", subtitle),
        plots.sparsity_by_layer(
            {"": {la.name: la.fraction for la in zeros.layers}},
            out / "sparsity_by_layer.png",
            subtitle,
        ),
    ]
    if projections:
        written.append(
            plots.features(projections, scores.labels, classes, out / "features.png", subtitle)
        )
    else:  # one of a former evaluation would be taken for this one's
        (out / "features.png").unlink(missing_ok=True)
    by_class = zip(classes, scores.precision, scores.recall, strict=True)
    content = {
        "checkpoint": str(checkpoint.absolute()),
        "data": data,
        "split": split,
        "corrupt": run.corrupt,
        "test_size": test_size,
        "images": count,
        **scores.figures,
        "intervals": scores.intervals,
        "notes": list(images.notes),
        "classes": {name: {"precision": p, "recall": r} for name, p, r in by_class},
        "confusion": scores.confusion,
        "sparsity": zeros.to_dict(),
        "made_with": made_with(),
    }
    written += save_predictions(out, images, scores.logits, classes)
    write_text(out / "evaluation.txt", text + "\n")
    write_text(out / "evaluation.json", to_json(content, indent=1))
    return [*written, out / "evaluation.json", out / "evaluation.txt"]


def _figures(scores: Scores) -> list[str]:
    """Accuracy, loss and macro-F1 with their intervals, as lines."""
    lines = []
    for name, what in (("accuracy", "accuracy"), ("loss", "cross-entropy"), ("f1", "macro-F1")):
        interval = scores.intervals[name]
        span = f"  ({interval[0]:.3f} to {interval[1]:.3f} at 95 %)" if interval else ""
        lines.append(f"  {what:<13} {scores.figures[name]:.3f}{span}")
    return lines


def _tables(scores: Scores, classes: Sequence[str]) -> list[str]:
    """Precision and recall by class, and the confusion matrix, as lines."""
    matrix = scores.confusion
    width = max(len("class"), *map(len, classes))
    shown = ["\N{EN DASH}" if r is None else f"{r:.3f}" for r in scores.recall]
    rows = [
        f"{name:<{width}}  {p:>9.3f}  {r:>6}  {sum(row):>6}"
        for name, p, r, row in zip(classes, scores.precision, shown, matrix, strict=True)
    ]
    cells = max(len(str(n)) for row in matrix for n in row)
    confusion = [
        f"{name:<{width}}  " + " ".join(f"{n:>{cells}}" for n in row)
        for name, row in zip(classes, matrix, strict=True)
    ]
    return [
        f"{'class':<{width}}  precision  recall  images",
        *rows,
        "",
        "confusion matrix, a row a true class, a column a predicted one:",
        *confusion,
    ]


def _project(features: Tensor) -> tuple[dict[str, Any], str]:
    """Features (count, size) in two dimensions, by method; or why they can't be shown so."""
    if len(features) < 3:
        return {}, f"{len(features)} images are too few"
    if not features.isfinite().all():
        return {}, "the features are not finite, as after training that diverged"
    features = features.double()
    # Rounding gives about 1e-6; a projection would blow that up to look like structure.
    if features.std(0).norm() <= 1e-5 * features.norm(dim=1).mean():
        return {}, "the features of all images are the same, but for rounding"
    points = (features / features.abs().max()).numpy()  # squares of the largest would overflow
    pca = PCA(2)
    first = pca.fit_transform(points)
    shares = " and ".join(f"{share:.0%}" for share in pca.explained_variance_ratio_)
    tsne = TSNE(2, perplexity=min(30.0, (len(points) - 1) / 3), random_state=0)
    return {f"PCA, {shares} of the variance": first, "t-SNE": tsne.fit_transform(points)}, ""
