"""Strengths for a run that has none yet, from its initial weights."""

from __future__ import annotations

from .forecast import count_steps, default_strengths
from .settings import Run
from .train import check


def strengths_by_weights(run: Run) -> Run:
    """The run with an l1 and a weight decay that its initial weights suggest.

    Raises:
        RecipeError: the run can't be made.
    """
    images, classifier = check(run)
    return default_strengths(classifier, count_steps(run, len(images.train)))
