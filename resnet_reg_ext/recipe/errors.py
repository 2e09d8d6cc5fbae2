"""Standard errors of means over images, some of which may show one scene."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def mean_error(values: Any, groups: Any = None) -> float:
    """The standard error of the mean of images' values.

    Args:
        values: (images,)
        groups: (images,), the images' groups, each of which counts as one draw (cluster-robust);
            None where each image stands alone.

    Returns:
        Infinity where there is only one draw.
    """
    values = np.asarray(values, dtype=float)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    totals = np.bincount(np.unique(groups, return_inverse=True)[1], weights=values - values.mean())
    count = len(totals)
    if count < 2:
        return math.inf
    return math.sqrt(float((totals**2).sum()) * count / (count - 1)) / len(values)
