"""scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels that come with the library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate

CLASSES = 10


@dataclass(frozen=True)
class Digits:
    """Images as float32 (count, 3, size, size), labels as int64 (count,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    wrong_labels: int
    """How many training labels were made wrong on purpose; the test labels are all true."""
    train_rows: tuple[int, ...]
    """Which of the 1,797 images are trained on."""
    test_rows: tuple[int, ...]


def load_digits(
    *,
    image_size: int = 32,
    train_size: int = 120,
    test_size: int = 400,
    label_noise: float = 0.0,
    seed: int = 0,
) -> Digits:
    """Splits the digits, each class in its share, and makes images that a ResNet takes.

    The pixels are standardised, enlarged bilinearly and repeated in three channels.

    Args:
        image_size: height and width in pixels.
        train_size: how many images to train on; fewer make a model overfit sooner.
        test_size: how many other images to test on.
        label_noise: share of the training labels to exchange for another class, in [0, 1].
        seed: decides the split and the exchanged labels.

    Raises:
        ValueError: there are not as many images, or fewer than classes, or the share is wrong.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    if not 0 <= label_noise <= 1:
        raise ValueError(f"load_digits: label_noise must be in [0, 1], got {label_noise}")
    raw = load()
    train, test = train_test_split(
        range(len(raw.target)),
        train_size=train_size,
        test_size=test_size,
        stratify=raw.target,
        random_state=seed,
    )
    pixels = torch.tensor(raw.images, dtype=torch.float32)  # grey levels from 0 to 16
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    images = interpolate(pixels.unsqueeze(1), size=(image_size, image_size), mode="bilinear")
    images = images.expand(-1, 3, -1, -1)
    labels = torch.tensor(raw.target, dtype=torch.int64)

    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(train_size, generator=generator)[: round(label_noise * train_size)]
    train_labels = labels[train]
    # Adding 1 to 9 modulo 10 always gives another class.
    shift = torch.randint(1, CLASSES, wrong.shape, generator=generator)
    train_labels[wrong] = (train_labels[wrong] + shift) % CLASSES
    return Digits(
        images[train].contiguous(),
        train_labels,
        images[test].contiguous(),
        labels[test],
        len(wrong),
        tuple(train),
        tuple(test),
    )
