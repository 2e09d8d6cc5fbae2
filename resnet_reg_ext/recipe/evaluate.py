"""What a checkpoint does: by class, by feature, by layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_precision,
    multiclass_recall,
)

from ..sparsity import Sparsity
from . import plots
from .data import load_split
from .files import prepare_folder, write_text
from .model import load_classifier, regularised
from .train import be_quiet, predict, to_json


def evaluate(
    checkpoint: Path, data: str | None, split: str | None, corrupt: str, out: Path
) -> list[Path]:
    """Measures a checkpoint on a split; prints tables; returns the files written.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` of a run.
        data: images as of ``train``; None takes those that the run names.
        split: "train", "val" or "test"; None is "test" where the data has it, else "val". Other
            images than the run's are taken whole where they have no folders for splits.
        corrupt: "refuse" or "skip" unreadable images.
        out: the output folder.

    Raises:
        RecipeError: something that the user can put right.
    """
    be_quiet()
    classifier = load_classifier(checkpoint)
    classes = list(classifier.classes)
    run = replace(classifier.run, corrupt=corrupt)
    images = load_split(run, split, classes, data, classifier.source)
    data, split = run.data if data is None else data, images.name
    prepare_folder(out, 10_000_000)

    # What goes into the last linear layer: the output of the last pooling.
    features: list[Tensor] = []
    hook = classifier.model.fc.register_forward_pre_hook(
        lambda _, inputs: features.append(inputs[0].float().cpu())
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logits, labels = predict(classifier, images, run, device)
    hook.remove()
    count = len(classes)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    precision = multiclass_precision(logits, labels, count, average="none").tolist()
    recall = multiclass_recall(logits, labels, count, average="none").tolist()
    matrix = multiclass_confusion_matrix(logits, labels, count).tolist()
    # Of a class without images there is nothing to recall.
    recall = [r if any(row) else None for r, row in zip(recall, matrix, strict=True)]
    zeros: Sparsity = regularised(classifier.cpu())
    projections, missing = _project(torch.cat(features))

    width = max(len("class"), *map(len, classes))
    rows = [f"{'class':<{width}}  precision  recall  images"]
    shown = ["\N{EN DASH}" if r is None else f"{r:.3f}" for r in recall]
    rows += [
        f"{name:<{width}}  {p:>9.3f}  {r:>6}  {sum(row):>6}"
        for name, p, r, row in zip(classes, precision, shown, matrix, strict=True)
    ]
    head = [f"accuracy {accuracy:.3f} on {len(labels)} images of {data} ({split})"]
    head += [f"  {note}" for note in images.notes]
    if missing:
        head.append(f"  features.png is left out: {missing}")
    cells = max(len(str(n)) for row in matrix for n in row)
    confusion = ["confusion matrix, a row a true class, a column a predicted one:"] + [
        f"{name:<{width}}  " + " ".join(f"{n:>{cells}}" for n in row)
        for name, row in zip(classes, matrix, strict=True)
    ]
    text = "\n".join([*head, "", *rows, "", *confusion, "", str(zeros)])
    print(text)
    subtitle = f"{checkpoint.name}, {len(labels)} images ({split}), accuracy {accuracy:.3f}"
    written = [
        plots.confusion({"": matrix}, classes, out / "confusion.png", subtitle),
        plots.sparsity_by_layer(
            {"": {la.name: la.fraction for la in zeros.layers}},
            out / "sparsity_by_layer.png",
            subtitle,
        ),
    ]
    if projections:
        written.append(
            plots.features(projections, labels.tolist(), classes, out / "features.png", subtitle)
        )
    else:  # one of a former evaluation would be taken for this one's
        (out / "features.png").unlink(missing_ok=True)
    content = {
        "checkpoint": str(checkpoint),
        "data": data,
        "split": split,
        "accuracy": accuracy,
        "classes": {
            name: {"precision": p, "recall": r}
            for name, p, r in zip(classes, precision, recall, strict=True)
        },
        "confusion": matrix,
        "sparsity": zeros.to_dict(),
    }
    write_text(out / "evaluation.json", to_json(content, indent=1))
    write_text(out / "evaluation.txt", text + "\n")
    return [*written, out / "evaluation.json", out / "evaluation.txt"]


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
