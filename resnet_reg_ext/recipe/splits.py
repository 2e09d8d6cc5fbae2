"""Training, validation and test images: drawn class by class, labels made wrong on request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from .files import RecipeError
from .groups import draw_groups
from .settings import option_name

WHOLE = "all images"
# In sentences, and in the names of figures.
WORDS = {"train": "training", "val": "validation", "test": "test"}
# The test images are drawn by this seed, whatever the run's: what one run trains on or chooses by
# is then no other's test.
TEST_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images and labels of one split. ``images`` are paths, or uint8 tensors (3, h, w)."""

    images: Sequence[Path | Tensor]
    labels: Tensor
    """int64 (count,)"""
    wrong: int = 0
    """The number of labels made wrong on purpose."""
    name: str = ""
    """One of ``SPLITS``, or ``WHOLE``; set by ``load_split``."""
    notes: tuple[str, ...] = ()
    """For the user: files ignored, images skipped, classes missing."""
    groups: Tensor | None = None
    """int64 (count,): images of one number show one scene; None where nothing is known of them."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Sequence[int]) -> Split:
        """The images of some rows, in that order."""
        images = [self.images[i] for i in rows]
        groups = None if self.groups is None else self.groups[list(rows)]
        return replace(self, images=images, labels=self.labels[list(rows)], groups=groups)


@dataclass(frozen=True)
class Source:
    """The files of a run. A checkpoint keeps it, so that changed files are noticed later."""

    folder: str
    """The absolute path."""
    digest: str
    """SHA-256 of the images' relative paths, file sizes and labels."""


@dataclass(frozen=True)
class Images:
    """The images that a run trains on, chooses by, and is measured on at its end."""

    classes: tuple[str, ...]
    train: Split
    validation: Split
    """Chooses checkpoints, ends runs early, and chooses strengths."""
    test: Split | None = None
    """Read once, at the end; None where there are no such images."""
    notes: tuple[str, ...] = ()
    """For the user: images skipped, folders left unused."""
    source: Source | None = None
    """None for the digits."""

    @property
    def held_out(self) -> Split:
        """The test images; the validation images where there are none."""
        return self.validation if self.test is None else self.test


def spoil_labels(split: Split, share: float, classes: int, seed: int) -> Split:
    """Replaces a share of the labels by another class each, drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    count = round(share * len(split))
    rows = torch.randperm(len(split), generator=generator)[:count]
    labels = split.labels.clone()
    # An offset from 1 to classes - 1, modulo classes, always gives another class.
    labels[rows] += torch.randint(1, classes, (count,), generator=generator)
    return replace(split, labels=labels % classes, wrong=count)


def split_in_two(
    split: Split,
    classes: Sequence[str],
    seed: int,
    part: str,
    size: float,
    train_size: int | None = None,
) -> tuple[Split, Split]:
    """Draws a part, class by class and no group divided; a note says if either lacks a class.

    Args:
        split: the images to draw from.
        classes: the names of the classes.
        seed: decides which images go where.
        part: "val" or "test".
        size: how many of the images, or what share of them where it is below 1.
        train_size: how many of the others to keep; None keeps all.

    Returns:
        The others, and the part.

    Raises:
        RecipeError: there are too few images or groups.
    """
    if split.groups is not None:
        share = size if size < 1 else size / len(split)
        within = draw_groups(split.labels, split.groups, share, seed)
        rest, drawn = (
            split.take([row for row, inside in enumerate(within) if inside == side])
            for side in (False, True)
        )
    else:
        try:
            rest, drawn = _draw(split, seed, train_size=train_size, test_size=size)
        except ValueError:
            why = (
                "each class needs two images, each part one of each class, and both together no "
                "more than there are"
            )
            asked = f"{option_name(f'{part}_fraction' if size < 1 else f'{part}_size')} {size}"
            if train_size is not None:
                asked = f"{option_name('train_size')} {train_size} and {asked}"
            raise RecipeError(_unsplittable(split, asked, why)) from None
    return (
        _note_lost(split, rest, classes, "training"),
        _note_lost(split, drawn, classes, WORDS[part]),
    )


def subset(split: Split, classes: Sequence[str], size: int | None, seed: int, part: str) -> Split:
    """Draws ``size`` images, class by class; None keeps all. A note says if a class is lost.

    Args:
        split: the images to draw from.
        classes: the names of the classes.
        size: the number of images to keep.
        seed: decides which.
        part: "train", "val" or "test".

    Raises:
        RecipeError: there are fewer images, or more classes than ``size``.
    """
    option = option_name(f"{part}_size")
    if size is None or size == len(split):
        return split
    if size > len(split):
        raise RecipeError(f"{option} {size} is more than the {len(split)} images there are")
    kept = "train_size" if part == "train" else "test_size"
    try:
        first, second = _draw(split, seed, **{kept: size})
    except ValueError:  # scikit-learn wants one image of each class in the remainder too
        if size < len(set(split.labels.tolist())):
            raise RecipeError(
                _unsplittable(split, f"{option} {size}", "each class needs one image")
            ) from None
        return split.take(_stratified(split.labels, size, seed))
    return _note_lost(split, first if part == "train" else second, classes, WORDS[part])


def check_trainable(train: Split, classes: Sequence[str]) -> None:
    """Refuses training images that lack a class: the network could never predict it.

    Raises:
        RecipeError: names the classes.
    """
    present = set(train.labels.tolist())
    if missing := [name for label, name in enumerate(classes) if label not in present]:
        raise RecipeError(
            f"none of the {len(train)} training images is of {', '.join(missing)}: give a smaller "
            "--val-fraction or --test-fraction, a larger --train-size, or more images of the class"
        )


def _stratified(labels: Tensor, size: int, seed: int) -> list[int]:
    """Rows: one of each class, the others in proportion (largest remainders)."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = [order[labels[order] == label].tolist() for label in sorted(set(labels.tolist()))]
    to_share, left = size - len(by_class), len(labels) - len(by_class)
    shares = [divmod(to_share * (len(rows) - 1), left) for rows in by_class]
    counts = [1 + whole for whole, _ in shares]
    largest = sorted(range(len(shares)), key=lambda i: shares[i][1], reverse=True)
    for i in largest[: size - sum(counts)]:
        counts[i] += 1
    return sorted(row for rows, count in zip(by_class, counts, strict=True) for row in rows[:count])


def _draw(split: Split, seed: int, **sizes: Any) -> tuple[Split, Split]:
    first, second = train_test_split(
        range(len(split)), stratify=split.labels.numpy(), random_state=seed, **sizes
    )
    return split.take(first), split.take(second)


def _note_lost(before: Split, after: Split, classes: Sequence[str], what: str) -> Split:
    """Adds a note to a part that has no image of a class that was there before."""
    lost = sorted(set(before.labels.tolist()) - set(after.labels.tolist()))
    if not lost:
        return after
    names = ", ".join(classes[label] for label in lost)
    note = f"none of the {len(after)} {what} images is of {names}: too few for such a split"
    return replace(after, notes=(*after.notes, note))


def _unsplittable(split: Split, asked: str, why: str) -> str:
    counts = Counter(split.labels.tolist()).values()
    return (
        f"can't split {len(split)} images of {len(counts)} classes, {min(counts)} to {max(counts)} "
        f"of each, with {asked}: {why}"
    )
