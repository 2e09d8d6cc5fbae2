"""95 % intervals of what is measured on a set of images: what another such set could give.

As in ``compare``'s verdicts, two standard errors stand for 95 %, and proportions get images added
so that the interval isn't empty where all or none are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 1000
Interval = tuple[float, float]


def of_share(right: int, count: int) -> Interval:
    """Of a proportion: two images that are right and two that are wrong are added.

    p = (right + 2) / (count + 4), p ± 2·sqrt(p (1 - p) / (count + 4)) (Agresti and Coull 1998).
    """
    p = (right + 2) / (count + 4)
    error = 2 * math.sqrt(p * (1 - p) / (count + 4))
    return max(0.0, p - error), min(1.0, p + error)


def of_mean(values: Sequence[float]) -> Interval | None:
    """Of a mean: two standard errors to each side; None of one value, or where it isn't finite."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) < 2 or not np.isfinite(array).all():
        return None
    error = 2 * float(array.std(ddof=1)) / math.sqrt(len(array))
    return float(array.mean()) - error, float(array.mean()) + error


def of_macro_f1(confusion: Sequence[Sequence[int]], seed: int = 0) -> Interval | None:
    """Of macro-F1: the middle 95 % over images drawn anew, as many with replacement (bootstrap).

    F1 is a function of the confusion matrix, whose cells are then multinomial. None of one image.

    Args:
        confusion: counts by true class (row) and predicted class (column).
        seed: of the draws.
    """
    cells = np.asarray(confusion, dtype=np.int64)
    count = int(cells.sum())
    if count < 2:
        return None
    rows, columns = np.nonzero(cells)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, cells[rows, columns] / count, size=_RESAMPLES)
    scores = [_macro_f1(rows, columns, counts, len(cells)) for counts in drawn]
    low, high = np.quantile(scores, (0.025, 0.975))
    return float(low), float(high)


def _macro_f1(rows: np.ndarray, columns: np.ndarray, counts: np.ndarray, classes: int) -> float:
    """The mean F1 of the classes that are there or predicted, as torchmetrics takes it."""
    true = np.bincount(rows, counts, classes)
    predicted = np.bincount(columns, counts, classes)
    same = rows == columns
    right = np.bincount(rows[same], counts[same], classes)
    present = true + predicted > 0
    return float((2 * right[present] / (true + predicted)[present]).mean())
