"""Batches: how images are scaled and augmented, in which order they come."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from test_recipe_data import make_images, run_for

from resnet_reg_ext.recipe.data import load_images
from resnet_reg_ext.recipe.loaders import EpochBatches, ImageDataset, evaluation_loader
from resnet_reg_ext.recipe.settings import Run


def test_images_are_scaled_as_imagenets(tmp_path):
    make_images(tmp_path, ["a", "b"])
    split = load_images(run_for(tmp_path, val_fraction=0.5)).train
    pixels, label = ImageDataset(split, 8)[0, 0]
    grey = np.asarray(Image.open(split.images[0]))[0, 0, 0] / 255
    assert pixels.shape == (3, 8, 8)
    for channel, (mean, std) in enumerate(
        zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ):
        # float32 against float64
        assert pixels[channel] == pytest.approx((grey - mean) / std, abs=1e-5)
    assert label == split.labels[0]


@pytest.mark.parametrize("augment", ["shift", "flip", "standard", "trivial"])
def test_augmentation_depends_on_the_draw_alone(augment):
    dataset = ImageDataset(load_images(Run()).train, 32, augment)
    torch.manual_seed(1)
    first = dataset[0, 7][0]
    before = torch.get_rng_state()
    assert torch.equal(dataset[0, 7][0], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert any(not torch.equal(dataset[0, draw][0], first) for draw in range(5))


@pytest.mark.parametrize("augment", ["shift", "flip", "standard", "trivial"])
def test_evaluation_shows_each_image_once_in_order_and_as_it_is(augment):
    run = Run(augment=augment, train_size=30)
    split = load_images(run).train
    batches = list(evaluation_loader(split, run))
    plain = ImageDataset(split, run.image_size, "none")
    shown = torch.cat([images for images, _ in batches])
    assert torch.equal(shown, torch.stack([plain[row, 0][0] for row in range(30)]))
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)


def test_batches_are_shuffled_by_the_seed():
    first, again, other = (
        [key for batch in EpochBatches(60, 4, seed=seed) for key in batch] for seed in (1, 1, 2)
    )
    assert first == again
    rows, other_rows = [row for row, _ in first], [row for row, _ in other]
    assert sorted(rows) == sorted(other_rows) == list(range(60))
    assert len({tuple(rows), tuple(other_rows), tuple(range(60))}) == 3
    # Neighbours in a folder, which are of one class, are seldom so in an epoch.
    assert sum(abs(a - b) == 1 for a, b in pairwise(rows)) < 15
    # Each image is augmented in a way of its own, and in another with another seed.
    assert len({draw for _, draw in first} | {draw for _, draw in other}) == 120


def test_an_epoch_goes_on_where_it_was_left():
    whole, rest = EpochBatches(23, 4, seed=9), EpochBatches(23, 4, seed=9, step=5 * 2 + 3)
    whole.set_epoch(2)
    rest.set_epoch(2)
    batches = list(whole)
    assert list(rest) == batches[3:]
    assert len(batches) == len(whole) == len(rest) == 5
    assert len({row for batch in batches for row, _ in batch}) == 20
    whole.set_epoch(3)
    rest.set_epoch(3)
    assert list(rest) == list(whole) != batches


def test_processes_share_each_batch():
    one = list(EpochBatches(20, 4, seed=1))
    two = [list(EpochBatches(20, 4, seed=1, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in one]
