"""What a checkpoint does: by class, by feature, by layer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_precision,
    multiclass_recall,
)

from ..sparsity import Sparsity
from . import plots
from .data import default_split, load_split
from .files import prepare_folder, write_text
from .model import load_classifier, regularised
from .train import be_quiet, predict


def evaluate(
    checkpoint: Path, data: str | None, split: str | None, corrupt: str, out: Path
) -> list[Path]:
    """Measures a checkpoint on a split; prints tables; returns the files written.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` of a run.
        data: images as of ``train``; None takes those that the run names.
        split: "train", "val" or "test"; None is "test" where the data has it, else "val".
        corrupt: "refuse" or "skip" unreadable images.
        out: the output folder.

    Raises:
        RecipeError: something that the user can put right.
    """
    be_quiet()
    classifier = load_classifier(checkpoint)
    classes = list(classifier.classes)
    run = replace(classifier.run, corrupt=corrupt)
    if data is not None and data != run.data:
        run = replace(run, data=data, val_fraction=None, train_size=None, test_size=None)
    split = split or default_split(run)
    images = load_split(run, split, classes)
    prepare_folder(out, 10_000_000)

    # What goes into the last linear layer: the output of the last pooling.
    features: list[torch.Tensor] = []
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
    zeros: Sparsity = regularised(classifier.cpu())

    width = max(len("class"), *map(len, classes))
    rows = [f"{'class':<{width}}  precision  recall  images"]
    rows += [
        f"{name:<{width}}  {p:>9.3f}  {r:>6.3f}  {sum(row):>6}"
        for name, p, r, row in zip(classes, precision, recall, matrix, strict=True)
    ]
    head = f"accuracy {accuracy:.3f} on {len(labels)} images of {run.data} ({split})"
    cells = max(len(str(n)) for row in matrix for n in row)
    confusion = ["confusion matrix, a row a true class, a column a predicted one:"] + [
        f"{name:<{width}}  " + " ".join(f"{n:>{cells}}" for n in row)
        for name, row in zip(classes, matrix, strict=True)
    ]
    text = "\n".join([head, "", *rows, "", *confusion, "", str(zeros)])
    print(text)
    subtitle = f"{checkpoint.name}, {len(labels)} images ({split}), accuracy {accuracy:.3f}"
    points = torch.cat(features).numpy()
    projections = {}
    if len(points) >= 3:
        projections["PCA"] = PCA(2).fit_transform(points)
        perplexity = min(30.0, (len(points) - 1) / 3)
        projections["t-SNE"] = TSNE(2, perplexity=perplexity, random_state=0).fit_transform(points)
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
    content = {
        "checkpoint": str(checkpoint),
        "data": run.data,
        "split": split,
        "accuracy": accuracy,
        "classes": {
            name: {"precision": p, "recall": r}
            for name, p, r in zip(classes, precision, recall, strict=True)
        },
        "confusion": matrix,
        "sparsity": zeros.to_dict(),
    }
    write_text(out / "evaluation.json", json.dumps(content, indent=1) + "\n")
    write_text(out / "evaluation.txt", text + "\n")
    return [*written, out / "evaluation.json", out / "evaluation.txt"]
