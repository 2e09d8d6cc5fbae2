"""The images of a run: scikit-learn's digits or a folder, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from .files import RecipeError
from .folders import class_names, digest, other_classes, same_classes, scan
from .layouts import Layout, check_class_folders, find_layout, training_folders
from .settings import DIGITS, Run, option_name
from .splits import (
    WHOLE,
    Images,
    Source,
    Split,
    check_trainable,
    split_in_two,
    spoil_labels,
    subset,
    subsets,
)

# 1,797 images. Few are trained on, so that a ResNet-50 overfits within minutes.
DIGITS_TRAIN_SIZE, DIGITS_TEST_SIZE = 200, 500


def load_images(run: Run) -> Images:
    """Reads and splits the images, and makes labels wrong on request. The seed decides all of it.

    Raises:
        RecipeError: the folder, an image or a size can't be used.
    """
    images = _digits(run) if run.data == DIGITS else _folder(run)
    train, test = images.train, images.test
    if run.data != DIGITS:  # the digits are split to size at once
        train, test = subsets(train, test, images.classes, run)
    if len(train) < run.batch_size:
        raise RecipeError(
            f"--batch-size {run.batch_size} is more than the {len(train)} training images"
        )
    check_trainable(train, images.classes)
    notes = tuple(dict.fromkeys((*images.notes, *train.notes, *test.notes)))
    train = spoil_labels(train, run.label_noise, len(images.classes), run.seed)
    return replace(images, train=train, test=test, notes=notes)


def default_split(run: Run) -> str:
    """The split to evaluate on: test, or val where there is a folder for val alone."""
    if run.data == DIGITS or run.val_fraction is not None or not Path(run.data).is_dir():
        return "test"
    folders = find_layout(Path(run.data)).folders
    return "val" if "val" in folders and "test" not in folders else "test"


def load_split(
    run: Run,
    split: str | None,
    classes: Sequence[str],
    data: str | None = None,
    source: Source | None = None,
) -> Split:
    """One split for evaluation, with true labels.

    The run's own images are split as in training, even if their folder has been moved. Other images
    are not split: a folder without folders for splits is taken whole.

    Args:
        run: the run that was trained.
        split: "train", "val" or "test"; None is ``default_split``. Where the run splits the images
            itself, "val" and "test" are the same.
        classes: the class names that the model knows, in its order.
        data: other images, as of ``run.data``; None takes those of the run.
        source: the files that the run was trained on, where they are known.

    Raises:
        RecipeError: there is no such split, its classes are others, or the images that the run
            split have changed.
    """
    trained_on = _place(run.data) if source is None else source.folder
    same = data is None or _place(data) == trained_on
    run = run if data is None else replace(run, data=data)
    as_is = run if same else replace(run, val_fraction=None, train_size=None, test_size=None)
    split = split or default_split(as_is)
    if run.data == DIGITS:
        images = load_images(replace(as_is, label_noise=0.0, batch_size=2))
        if images.classes != tuple(classes):
            raise RecipeError(other_classes(run.data, images.classes, classes))
        part = images.train if split == "train" else images.test
        return replace(part, name=split, notes=images.notes)
    root = _root(run)
    layout = find_layout(root, classes)
    if layout.folders and as_is.val_fraction is None:
        return _load_folder(root, split, layout, as_is, classes)
    every = scan(root, classes, run.corrupt)
    unchanged = source is not None and source.digest == digest(root, every)
    if run.val_fraction is None or not (same or unchanged):
        return replace(every, name=WHOLE)
    found = class_names(root)
    if not same_classes(found, classes):
        raise RecipeError(other_classes(root, found, classes))
    if source is not None and not unchanged:
        raise RecipeError(
            f"--data {root} is not what it was in training: images have come, gone or changed, "
            "so that its split would be another; put them back, or give --data a folder of "
            "other images"
        )
    train, test = split_in_two(every, classes, run.seed, test_size=run.val_fraction)
    train, test = subsets(train, test, classes, run)
    return replace(train if split == "train" else test, name=split)


def _load_folder(root: Path, split: str, layout: Layout, run: Run, classes: Sequence[str]) -> Split:
    """One of the folders for train, val and test, cut down as in training."""
    if split not in layout.folders:
        raise RecipeError(
            f"--data {root} has no folder {split}; --split may be {' or '.join(layout.folders)}"
        )
    found = scan(layout.folders[split], classes, run.corrupt)
    part = {"train": "train_size", layout.tested: "test_size"}.get(split)
    size = getattr(run, part) if part else None
    if part is None or size is None or size == len(found):
        return replace(found, name=split)
    note = f"{size} of {len(found)} images, the same as in training: {option_name(part)} {size}"
    kept = subset(found, classes, size, run.seed, part)
    return replace(kept, name=split, notes=(*kept.notes, note))


def _digits(run: Run) -> Images:
    if run.val_fraction is not None:
        raise RecipeError("--val-fraction is for folders; digits take --train-size and --test-size")
    raw = load_digits()
    # Grey levels from 0 to 16; the transform enlarges them like any image.
    pixels = (torch.tensor(raw.images).unsqueeze(1) * (255 / 16)).to(torch.uint8)
    every = Split(list(pixels.expand(-1, 3, -1, -1)), torch.tensor(raw.target, dtype=torch.int64))
    classes = tuple(str(name) for name in raw.target_names)
    train, test = split_in_two(
        every,
        classes,
        run.seed,
        train_size=DIGITS_TRAIN_SIZE if run.train_size is None else run.train_size,
        test_size=DIGITS_TEST_SIZE if run.test_size is None else run.test_size,
    )
    folder = Path(DIGITS)
    shadowed = "images: scikit-learn's; for those in the folder ./digits give --data ./digits"
    return Images(classes, train, test, (shadowed,) if folder.is_dir() else ())


def _folder(run: Run) -> Images:
    root = _root(run)
    layout = find_layout(root)
    if not layout.is_split:
        classes = class_names(root)
        check_class_folders(root)
        if run.val_fraction is None:
            raise RecipeError(
                f"--data {root} has no folder train: give --val-fraction to split its classes"
            )
        every = scan(root, classes, run.corrupt)
        train, test = split_in_two(every, classes, run.seed, test_size=run.val_fraction)
        source = Source(_place(run.data), digest(root, every))
        return Images(classes, train, test, every.notes, source)
    if run.val_fraction is not None:
        raise RecipeError(f"--data {root} is split already: --val-fraction can't be given")
    train_folder, test_folder, notes = training_folders(root, layout)
    classes = class_names(train_folder)
    train = scan(train_folder, classes, run.corrupt)
    test = scan(test_folder, classes, run.corrupt)
    source = Source(_place(run.data), digest(root, train, test))
    return Images(classes, train, test, (*train.notes, *notes, *test.notes), source)


def _root(run: Run) -> Path:
    root = Path(run.data)
    if not root.is_dir():
        raise RecipeError(f"--data {root} is not a folder (nor {DIGITS!r})")
    return root


def _place(data: str) -> str:
    """The same string for the same folder, however its path is written."""
    return data if data == DIGITS else str(Path(data).resolve())
