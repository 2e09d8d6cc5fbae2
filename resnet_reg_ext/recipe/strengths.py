"""Strengths for a run that has none yet, from its initial weights."""

from __future__ import annotations

from .checks import settled
from .data import load_images
from .forecast import count_steps, default_strengths
from .model import Classifier
from .settings import Run
from .train import be_quiet
from .weights import load_weights


def strengths_by_weights(run: Run) -> Run:
    """The run with an l1 and a weight decay that its initial weights suggest.

    Raises:
        RecipeError: the run can't be made.
    """
    be_quiet()
    run = settled(run)
    images = load_images(run)
    classifier = Classifier(run, images.classes)
    load_weights(classifier, run.weights)
    return default_strengths(classifier, count_steps(run, len(images.train)))
