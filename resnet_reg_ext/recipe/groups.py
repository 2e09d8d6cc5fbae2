"""Images that show one scene, or are of one hand: kept together by every split."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor

from .files import RecipeError, printable

_MOST_FOLDS = 20  # a part of a split is right to a twentieth of the images


def group_names(names: Sequence[str], pattern: str) -> list[str]:
    """The group of each image.

    Args:
        names: the images' paths below their class folders.
        pattern: searched for in each name: its first group in parentheses, else all that it
            matches, names the group.

    Raises:
        RecipeError: a name doesn't match.
    """
    found = []
    for name in names:
        match = re.search(pattern, name)
        if match is None:
            raise RecipeError(
                f"--group-by {pattern} matches nothing in {printable(name)}: each image needs a "
                "group"
            )
        found.append((match[1] or "") if match.re.groups else match[0])
    return found


def names_below(root: Path, paths: Iterable[Any]) -> list[str]:
    """Paths as ``group_names`` takes them, of images in class folders in ``root``."""
    return ["/".join(path.relative_to(root).parts[1:]) for path in paths]


def draw_groups(labels: Tensor, groups: Tensor, share: float, seed: int) -> list[bool]:
    """Which images go into a part with about a share of them, no group divided.

    scikit-learn's StratifiedGroupKFold makes folds whose classes are as evenly mixed as the groups
    allow; the part is as many of them as come closest to the share.

    Raises:
        RecipeError: there are too few groups.
    """
    count = len(set(groups.tolist()))
    largest = int(torch.bincount(labels).max())
    folds = min(count, largest, _MOST_FOLDS)
    if folds < 2:
        raise RecipeError(
            f"--group-by: {count} group of {len(labels)} images can't be split; at least two are "
            "needed"
        )
    chosen = max(1, min(folds - 1, round(share * folds)))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    within = [False] * len(labels)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*least populated class.*")
        parts = splitter.split(labels.numpy(), labels.numpy(), groups.numpy())
        for (_, rows), _ in zip(parts, range(chosen), strict=False):
            for row in rows:
                within[row] = True
    return within


def shared_groups(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """Notes on groups that are in two parts, as folders may have them."""
    notes, parts = [], list(groups)
    for i, first in enumerate(parts):
        for second in parts[i + 1 :]:
            both = sorted(set(groups[first]) & set(groups[second]))
            if both:
                notes.append(
                    f"{len(both)} groups are in {first} and in {second}, such as "
                    f"{printable(both[0])}: what is measured on {second} will be too good"
                )
    return notes
