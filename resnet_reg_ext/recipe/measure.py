"""What a classifier does on images, once it is trained."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multiclass_f1_score,
)

from .errors import mean_error
from .loaders import evaluation_loader
from .model import Classifier, regularised
from .results import Best, OnTest
from .settings import Run
from .splits import Images, Split


def predict(
    classifier: Classifier, split: Split, run: Run, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits (count, classes) and labels (count,) of a split, on the CPU."""
    classifier.to(device).eval()
    dtype = classifier.model.fc.weight.dtype  # float64 with --precision 64-true
    logits, labels = [], []
    with torch.inference_mode():
        for images, truth in evaluation_loader(split, run):
            logits.append(classifier(images.to(device, dtype)).float().cpu())
            labels.append(truth)
    return torch.cat(logits), torch.cat(labels)


def measured(
    classifier: Classifier, images: Images, device: torch.device, epoch: float
) -> tuple[Best, Tensor]:
    """What some weights do on validation and test images; the logits of the held-out ones."""
    run, count = classifier.run, len(images.classes)
    zeros = {layer.name: layer.fraction for layer in regularised(classifier).layers}
    logits, labels = predict(classifier, images.validation, run, device)
    losses = cross_entropy(logits, labels, reduction="none")
    error = mean_error(losses.double().numpy(), images.validation.groups)
    test = None
    if images.test is not None:
        logits, labels = predict(classifier, images.test, run, device)
        right, groups = logits.argmax(1) == labels, images.test.groups
        test = OnTest(
            right.float().mean().item(),
            cross_entropy(logits, labels).item(),
            multiclass_f1_score(logits, labels, count, average="macro").item(),
            right.int().tolist(),
            None if groups is None else groups.tolist(),
        )
    confusion = multiclass_confusion_matrix(logits, labels, count).tolist()
    best = Best(epoch, zeros, confusion, test, error if math.isfinite(error) else None)
    return best, logits
