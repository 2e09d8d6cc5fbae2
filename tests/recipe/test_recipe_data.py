"""The recipe's images: splits, wrong labels, order, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from resnet_reg_ext.recipe.data import default_split, load_images, load_split
from resnet_reg_ext.recipe.files import RecipeError
from resnet_reg_ext.recipe.loaders import EpochBatches, ImageDataset, evaluation_loader
from resnet_reg_ext.recipe.settings import Run
from resnet_reg_ext.recipe.splits import spoil_labels


def make_images(folder, classes, count=6, size=12):
    """A folder of class folders; each image is of one grey level."""
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((size, size, 3), 40 * c + i, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def run_for(folder, **changes):
    return Run(**{"data": str(folder), "batch_size": 2, "image_size": 8, **changes})


def refused(run):
    with pytest.raises(RecipeError) as error:
        load_images(run)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_digits_are_split_class_by_class_without_overlap():
    images = load_images(Run(train_size=200, test_size=500))
    assert (len(images.train), len(images.test)) == (200, 500)
    # The classes have 174 to 183 of the 1,797 images.
    for split, count in ((images.train, 200), (images.test, 500)):
        shares = torch.bincount(split.labels, minlength=10) / count
        assert shares.min() >= 174 / 1797 - 1 / count
        assert shares.max() <= 183 / 1797 + 1 / count
    train, test = ({image.data_ptr() for image in s.images} for s in (images.train, images.test))
    assert not train & test
    assert len(train) + len(test) == 700


def test_the_split_follows_the_seed():
    first, again, other = (load_images(Run(seed=seed)).train for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.images, again.images, strict=True))
    assert torch.equal(first.labels, again.labels)
    assert not all(torch.equal(a, b) for a, b in zip(first.images, other.images, strict=True))


def test_label_noise_changes_as_many_labels_as_asked_and_no_test_label():
    clean, noisy = load_images(Run()), load_images(Run(label_noise=0.3))
    assert noisy.train.wrong == 60
    assert (clean.train.labels != noisy.train.labels).sum() == 60
    assert torch.equal(clean.test.labels, noisy.test.labels)
    assert clean.train.wrong == 0


def test_wrong_labels_follow_the_seed_of_the_run(tmp_path):
    """Where nothing is split, the seed decides the wrong labels alone."""
    for split in ("train", "val"):
        make_images(tmp_path / split, list("abcde"), count=10)
    clean = load_images(run_for(tmp_path)).train
    first, again, other = (
        load_images(run_for(tmp_path, label_noise=0.4, seed=seed)).train for seed in (1, 1, 2)
    )
    assert first.images == other.images == clean.images
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.labels, other.labels)
    # Other images are chosen, not other classes for the same ones only.
    assert not torch.equal(first.labels != clean.labels, other.labels != clean.labels)
    # Each wrong class is drawn for one image or another, and the right one for none.
    offsets = (spoil_labels(clean, 1.0, 5, seed=1).labels - clean.labels) % 5
    assert set(offsets.tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_to_evaluate_on_are_true(split, tmp_path):
    make_images(tmp_path, ["a", "b"], count=20)
    for run, names in (
        (Run(label_noise=0.5), [str(digit) for digit in range(10)]),
        (run_for(tmp_path, val_fraction=0.5, label_noise=0.5), ["a", "b"]),
    ):
        truth = load_images(replace(run, label_noise=0.0))
        assert not torch.equal(load_images(run).train.labels, truth.train.labels)
        found = load_split(run, split, names)
        assert torch.equal(found.labels, getattr(truth, split).labels)
        assert found.wrong == 0


def test_digits_reach_from_black_to_white():
    images = load_images(Run(train_size=700, test_size=700))
    levels = torch.unique(torch.stack([*images.train.images, *images.test.images]))
    # scikit-learn's are whole numbers from 0 to 16.
    assert sorted(set(load_digits().images.ravel())) == list(range(17))
    assert levels.tolist() == [255 * level // 16 for level in range(17)]


def test_a_split_folder_is_read_as_it_is(tmp_path):
    make_images(tmp_path / "train", ["cat", "dog"])
    make_images(tmp_path / "val", ["dog"], count=3)
    images = load_images(run_for(tmp_path))
    assert images.classes == ("cat", "dog")
    assert len(images.train) == 12
    # A class of the training that the test lacks is no fault, and the labels stay the training's.
    assert images.test.labels.tolist() == [1, 1, 1]


def test_val_is_tested_on_and_test_is_left_for_evaluate(tmp_path):
    run = run_for(tmp_path)
    make_images(tmp_path / "train", ["cat", "dog"])
    make_images(tmp_path / "val", ["cat", "dog"], count=3)
    assert default_split(run) == "val"
    assert not load_images(run).notes
    make_images(tmp_path / "test", ["cat", "dog"], count=2)
    assert default_split(run) == "test"
    images = load_images(run)
    assert "tested on val; test is left" in images.notes[0]
    assert {path.parent.parent for path in images.train.images} == {tmp_path / "train"}
    assert {path.parent.parent for path in images.test.images} == {tmp_path / "val"}
    for split, count in (("train", 12), ("val", 6), ("test", 4)):
        found = load_split(run, split, ["cat", "dog"])
        assert len(found) == count
        assert {path.parent.parent for path in found.images} == {tmp_path / split}


def test_test_is_tested_on_where_there_is_no_val(tmp_path):
    for split in ("train", "test"):
        make_images(tmp_path / split, ["cat", "dog"])
    run = run_for(tmp_path)
    assert default_split(run) == "test"
    assert {path.parent.parent for path in load_images(run).test.images} == {tmp_path / "test"}


def test_one_folder_is_split_by_a_fraction(tmp_path):
    make_images(tmp_path, ["a", "b", "c"], count=10)
    images = load_images(run_for(tmp_path, val_fraction=0.3))
    assert torch.bincount(images.train.labels).tolist() == [7, 7, 7]
    assert torch.bincount(images.test.labels).tolist() == [3, 3, 3]
    assert not set(images.train.images) & set(images.test.images)
    smaller = load_images(run_for(tmp_path, val_fraction=0.3, train_size=9))
    assert torch.bincount(smaller.train.labels).tolist() == [3, 3, 3]


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


@pytest.mark.parametrize("augment", ["shift", "standard"])
def test_augmentation_depends_on_the_draw_alone(augment):
    dataset = ImageDataset(load_images(Run()).train, 32, augment)
    torch.manual_seed(1)
    first = dataset[0, 7][0]
    before = torch.get_rng_state()
    assert torch.equal(dataset[0, 7][0], first)
    assert torch.equal(torch.get_rng_state(), before)
    assert any(not torch.equal(dataset[0, draw][0], first) for draw in range(5))


@pytest.mark.parametrize("augment", ["shift", "standard"])
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


def test_what_is_no_data_set_is_refused(tmp_path):
    assert "is not a folder" in refused(run_for(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(run_for(tmp_path / "empty", val_fraction=0.5))
    one = make_images(tmp_path / "one", ["cat"])
    assert "one class only (cat)" in refused(run_for(one, val_fraction=0.5))
    two = make_images(tmp_path / "two", ["cat", "dog"])
    assert "--val-fraction" in refused(run_for(two))
    make_images(tmp_path / "half" / "train", ["cat", "dog"])
    assert "neither val nor test" in refused(run_for(tmp_path / "half"))
    (tmp_path / "two" / "cow").mkdir()
    assert f"{two / 'cow'} has no image" in refused(run_for(two, val_fraction=0.5))


@pytest.mark.parametrize("name", ["Train", "training", "validation", "TEST"])
def test_a_split_of_another_name_is_not_taken_for_a_class(name, tmp_path):
    for folder in (name, "other"):
        make_images(tmp_path / folder, ["cat", "dog"])
    said = refused(run_for(tmp_path, val_fraction=0.5))
    assert f"a folder {name}, which looks like a split" in said
    assert "must be called train, val and test" in said


def test_a_folder_around_the_class_folders_is_named(tmp_path):
    for folder in ("one", "two"):
        make_images(tmp_path / folder, ["cat", "dog"])
    said = refused(run_for(tmp_path, val_fraction=0.5))
    assert f"is {tmp_path / 'one'} the folder of class folders?" in said


def test_images_without_class_folders_are_not_called_nothing(tmp_path):
    (image,) = make_images(tmp_path / "made", ["cat"], count=1).glob("cat/*.png")
    (tmp_path / "loose").mkdir()
    image.rename(tmp_path / "loose" / "0.png")
    assert "has images but no folders" in refused(run_for(tmp_path / "loose", val_fraction=0.5))


def test_hidden_files_are_no_images_and_hidden_folders_no_classes(tmp_path):
    make_images(tmp_path, ["cat", "dog"])
    make_images(tmp_path / "cat", [".thumbnails"])
    make_images(tmp_path, [".ipynb_checkpoints"])
    (tmp_path / "dog" / "._0.png").write_bytes(b"as macOS writes beside each file")
    images = load_images(run_for(tmp_path, val_fraction=0.5))
    assert images.classes == ("cat", "dog")
    assert len(images.train) + len(images.test) == 12


def test_a_class_that_the_training_lacks_is_refused(tmp_path):
    make_images(tmp_path / "train", ["cat", "dog"])
    make_images(tmp_path / "val", ["cat", "emu"])
    assert "emu (known: cat, dog)" in refused(run_for(tmp_path))


def test_an_unreadable_image_is_named_or_left_out(tmp_path):
    make_images(tmp_path, ["a", "b"])
    bad = tmp_path / "a" / "0.png"
    bad.write_bytes(bad.read_bytes()[:40])
    assert f"can't read image {bad}" in refused(run_for(tmp_path, val_fraction=0.5))
    images = load_images(run_for(tmp_path, val_fraction=0.5, corrupt="skip"))
    assert len(images.train) + len(images.test) == 11
    assert str(bad) in images.notes[0]


def test_sizes_that_cannot_be_are_refused(tmp_path):
    make_images(tmp_path, ["a", "b"])
    folder = run_for(tmp_path, val_fraction=0.5)
    assert "--train-size 99" in refused(Run(**{**vars(folder), "train_size": 99}))
    assert "--batch-size 7 is more than the 6" in refused(Run(**{**vars(folder), "batch_size": 7}))
    assert "can't split 1797 images" in refused(Run(train_size=1790))
    said = refused(Run(**{**vars(folder), "test_size": 1}))
    assert "can't split 6 images of 2 classes, 3 to 3 of each, with --test-size 1:" in said
