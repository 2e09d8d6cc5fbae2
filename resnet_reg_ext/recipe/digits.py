"""scikit-learn's 1,797 handwritten digits, and who wrote them."""

from __future__ import annotations

from bisect import bisect_right

import torch
from sklearn.datasets import load_digits

from .settings import Run
from .splits import TEST_SEED, Split, split_in_two, subset

# Few are trained on, so that a ResNet-50 overfits within minutes.
DIGITS_TRAIN_SIZE, DIGITS_VAL_SIZE, DIGITS_TEST_SIZE = 200, 200, 500
# Of the forms, where they are kept apart: a half to test on, a quarter to choose by.
DIGITS_VAL_FRACTION, DIGITS_TEST_FRACTION = 0.25, 0.5
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
    by_share = every.groups is not None or run.val_fraction or run.test_fraction
    train_size = DIGITS_TRAIN_SIZE if run.train_size is None else run.train_size
    val_size = DIGITS_VAL_SIZE if run.val_size is None else run.val_size
    test_size = DIGITS_TEST_SIZE if run.test_size is None else run.test_size
    rest, test = every, None
    if by_share:
        shares = run.test_fraction or DIGITS_TEST_FRACTION, run.val_fraction or DIGITS_VAL_FRACTION
        left = 1.0
        if run.test_size != 0:
            rest, test = split_in_two(rest, classes, TEST_SEED, "test", shares[0])
            test = subset(test, classes, min(test_size, len(test)), TEST_SEED, "test")
            left -= shares[0]
        train, val = split_in_two(rest, classes, run.seed, "val", shares[1] / left)
        return (
            subset(train, classes, min(train_size, len(train)), run.seed, "train"),
            subset(val, classes, min(val_size, len(val)), run.seed, "val"),
            test,
        )
    if test_size:
        rest, test = split_in_two(rest, classes, TEST_SEED, "test", test_size)
    train, val = split_in_two(rest, classes, run.seed, "val", val_size, train_size)
    return train, val, test
