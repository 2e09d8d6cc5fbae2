"""scikit-learn's 1,797 handwritten digits, and who wrote them."""

from __future__ import annotations

from bisect import bisect_right

import torch
from sklearn.datasets import load_digits

from .files import RecipeError
from .settings import Run
from .splits import TEST_SEED, Split, split_in_two, subset

# Few are trained on, so that a ResNet-50 overfits within minutes.
DIGITS_TRAIN_SIZE, DIGITS_VAL_SIZE, DIGITS_TEST_SIZE = 200, 200, 500
# Of the 14 forms, where they are kept apart: 7 to test on, 5 to choose by, 2 to train on.
DIGITS_VAL_FRACTION, DIGITS_TEST_FRACTION = 0.35, 0.5
# Each of the collection's forms has the same digits in the same order, so that the labels tell
# where one begins. One form is one hand: more than half of all nearest neighbours of a class are in
# the same one of these 14 forms.
FORMS = (0, 130, 256, 386, 516, 646, 776, 905, 1029, 1157, 1287, 1415, 1545, 1667)
WRITERS = "the digits of one form, which one hand wrote, are in one set"


def every_digit() -> tuple[Split, tuple[str, ...], list[str]]:
    """The images, the names of their classes, and names that tell the form: writer03/0391."""
    raw = load_digits()
    # Grey levels from 0 to 16; the transform enlarges them like any image.
    pixels = (torch.tensor(raw.images).unsqueeze(1) * (255 / 16)).to(torch.uint8)
    every = Split(list(pixels.expand(-1, 3, -1, -1)), torch.tensor(raw.target, dtype=torch.int64))
    names = [f"writer{bisect_right(FORMS, i):02}/{i:04}" for i in range(len(every))]
    return every, tuple(str(name) for name in raw.target_names), names


def draw_digits(
    every: Split, classes: tuple[str, ...], run: Run
) -> tuple[Split, Split, Split | None]:
    """Training, validation and test images: by shares where they are asked for, else by number."""
    defaults = {"train": DIGITS_TRAIN_SIZE, "val": DIGITS_VAL_SIZE, "test": DIGITS_TEST_SIZE}
    asked = {"train": run.train_size, "val": run.val_size, "test": run.test_size}

    def cut(split: Split, part: str) -> Split:
        size = asked[part]
        size = min(defaults[part], len(split)) if size is None else size
        return subset(split, classes, size, TEST_SEED if part == "test" else run.seed, part)

    rest, test = every, None
    if every.groups is not None or run.val_fraction or run.test_fraction:
        left = 1.0
        if run.test_size != 0:
            share = run.test_fraction or DIGITS_TEST_FRACTION
            rest, test = split_in_two(rest, classes, TEST_SEED, "test", share)
            left -= share
        share = (run.val_fraction or DIGITS_VAL_FRACTION) / left
        if share >= 1:
            raise RecipeError(
                f"--val-fraction {run.val_fraction or DIGITS_VAL_FRACTION} and --test-fraction "
                f"{run.test_fraction or DIGITS_TEST_FRACTION} leave nothing to train on"
            )
        train, val = split_in_two(rest, classes, run.seed, "val", share)
        return cut(train, "train"), cut(val, "val"), None if test is None else cut(test, "test")
    sizes = {part: defaults[part] if size is None else size for part, size in asked.items()}
    if sizes["test"]:
        rest, test = split_in_two(rest, classes, TEST_SEED, "test", sizes["test"])
    train, val = split_in_two(rest, classes, run.seed, "val", sizes["val"], sizes["train"])
    return train, val, test
