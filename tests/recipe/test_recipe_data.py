"""The recipe's images: splits, groups, wrong labels, and what is refused."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from resnet_reg_ext.recipe.data import default_split, load_images, load_split
from resnet_reg_ext.recipe.digits import FORMS
from resnet_reg_ext.recipe.files import RecipeError
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
    images = load_images(Run(train_size=200, val_size=300, test_size=500))
    parts = [(images.train, 200), (images.validation, 300), (images.test, 500)]
    seen = set()
    # The classes have 174 to 183 of the 1,797 images.
    for split, count in parts:
        assert len(split) == count
        shares = torch.bincount(split.labels, minlength=10) / count
        assert shares.min() >= 174 / 1797 - 2 / count
        assert shares.max() <= 183 / 1797 + 2 / count
        seen |= {image.data_ptr() for image in split.images}
    assert len(seen) == 1000


def test_the_split_follows_the_seed():
    first, again, other = (load_images(Run(seed=seed)).train for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.images, again.images, strict=True))
    assert torch.equal(first.labels, again.labels)
    assert not all(torch.equal(a, b) for a, b in zip(first.images, other.images, strict=True))


def pixels(split):
    return [image.tolist() for image in split.images]


@pytest.mark.parametrize("groups", ["none", r"^\d"])
def test_the_test_images_are_those_of_every_seed_and_no_seed_chooses_by_them(groups, tmp_path):
    """Strengths that one seed's validation images chose are then no other's test images' choice."""
    make_images(tmp_path, ["a", "b"], count=10)
    folder = run_for(tmp_path, val_fraction=0.2, test_fraction=0.3, group_by=groups)
    for run in (Run(group_by="none" if groups == "none" else "writer.."), folder):
        loaded = [load_images(replace(run, seed=seed)) for seed in range(4)]
        names = [
            [set(map(str, part.images if run is folder else pixels(part))) for part in parts]
            for parts in ((each.train, each.validation, each.test) for each in loaded)
        ]
        tests = names[0][2]
        assert all(test == tests for _, _, test in names)
        assert not any(tests & (train | validation) for train, validation, _ in names)
        assert not any(train & validation for train, validation, _ in names)
        assert len({frozenset(train) for train, _, _ in names}) > 1


def test_images_of_one_group_are_never_split(tmp_path):
    make_images(tmp_path, ["a", "b"], count=24)
    run = run_for(tmp_path, val_fraction=0.25, test_fraction=0.25, group_by=r"(\d)\.png")
    for seed in range(3):
        images = load_images(replace(run, seed=seed))
        parts = (images.train, images.validation, images.test)
        groups = [{path.stem[-1] for path in part.images} for part in parts]
        assert sum(map(len, groups)) == 10  # no last digit is in two of them
        assert [len(part) for part in parts] == pytest.approx([24, 12, 12], abs=6)
        # Numbers of the groups go with the images, for what is measured on them.
        assert len(set(images.test.groups.tolist())) == len(groups[2])
        assert all(len(set(part.labels.tolist())) == 2 for part in parts)
    assert "--group-by (\\d)\\.png: 10 groups" in images.notes
    assert "matches nothing in 0.png" in refused(replace(run, group_by="scene"))
    assert "1 group of 48 images can't be split" in refused(replace(run, group_by="png"))


def test_groups_that_are_in_two_folders_are_named(tmp_path):
    for split in ("train", "val", "test"):
        make_images(tmp_path / split, ["a", "b"], count=4 if split == "test" else 2)
    notes = load_images(run_for(tmp_path, group_by=r"^\d")).notes
    assert "2 groups are in training and in test, such as 0: what is measured on test" in notes[2]


def test_forms_of_digits_are_told_from_their_labels():
    """Each has the same digits in the same order, but for a few that are missing."""
    targets = "".join(map(str, load_digits().target))
    for begin, end in pairwise((*FORMS, len(targets))):
        assert 122 <= end - begin <= 130
        assert targets[begin:end].count("9095565098984177") == 1
    # Their nearest neighbours tell that a form is of one hand: by chance 1 of 14 would be in it.
    data, target = load_digits(return_X_y=True)
    squares = (data**2).sum(1)
    distances = squares[:, None] + squares - 2 * data @ data.T
    distances[target[:, None] != target] = np.inf
    np.fill_diagonal(distances, np.inf)
    form = np.searchsorted(FORMS, np.arange(len(data)), side="right")
    assert (form[distances.argmin(1)] == form).mean() > 0.5
    images = load_images(Run(group_by=r"writer\d+"))
    forms = [len(part.groups.unique()) for part in (images.train, images.validation, images.test)]
    assert forms == [2, 5, 7]
    assert "--val-size 900 is more than the" in refused(Run(group_by="writer..", val_size=900))
    assert set(images.test.labels.tolist()) == set(range(10))


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


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_to_evaluate_on_are_true(split, tmp_path):
    make_images(tmp_path, ["a", "b"], count=20)
    for run, names in (
        (Run(label_noise=0.5), [str(digit) for digit in range(10)]),
        (run_for(tmp_path, val_fraction=0.5, label_noise=0.5), ["a", "b"]),
    ):
        truth = load_images(replace(run, label_noise=0.0))
        assert not torch.equal(load_images(run).train.labels, truth.train.labels)
        found = load_split(run, split, names)
        assert torch.equal(
            found.labels, {"train": truth.train, "val": truth.validation}[split].labels
        )
        assert found.wrong == 0


def test_digits_reach_from_black_to_white():
    images = load_images(Run(train_size=700, val_size=700, test_size=0))
    levels = torch.unique(torch.stack([*images.train.images, *images.validation.images]))
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
    assert images.validation.labels.tolist() == [1, 1, 1]
    assert images.test is None


def test_each_set_has_the_folder_of_its_name(tmp_path):
    run = run_for(tmp_path)
    make_images(tmp_path / "train", ["cat", "dog"])
    make_images(tmp_path / "val", ["cat", "dog"], count=3)
    assert default_split(run) == "val"
    images = load_images(run)
    assert (images.notes, images.test) == ((), None)
    make_images(tmp_path / "test", ["cat", "dog"], count=2)
    assert default_split(run) == "test"
    images = load_images(run)
    for split, count, part in (
        ("train", 12, images.train),
        ("val", 6, images.validation),
        ("test", 4, images.test),
    ):
        found = load_split(run, split, ["cat", "dog"])
        assert len(found) == count
        assert part.images == found.images
        assert {path.parent.parent for path in found.images} == {tmp_path / split}
    assert load_images(replace(run, test_size=0)).test is None


def test_test_never_chooses_so_that_val_is_asked_for(tmp_path):
    for split in ("train", "test"):
        make_images(tmp_path / split, ["cat", "dog"], count=10)
    assert "no val, and test must not choose the weights that it measures: give --val-fraction" in (
        refused(run_for(tmp_path))
    )
    run = run_for(tmp_path, val_fraction=0.2)
    assert default_split(run) == "test"
    images = load_images(run)
    for split, part in (("train", images.train), ("val", images.validation), ("test", images.test)):
        found = load_split(run, split, ["cat", "dog"], None, images.source)
        assert found.images == part.images
    assert {path.parent.parent for path in images.validation.images} == {tmp_path / "train"}
    assert (len(images.train), len(images.validation), len(images.test)) == (16, 4, 20)


def test_one_folder_is_split_by_a_fraction(tmp_path):
    make_images(tmp_path, ["a", "b", "c"], count=10)
    images = load_images(run_for(tmp_path, val_fraction=0.3))
    assert torch.bincount(images.train.labels).tolist() == [7, 7, 7]
    assert torch.bincount(images.validation.labels).tolist() == [3, 3, 3]
    assert not set(images.train.images) & set(images.validation.images)
    assert images.test is None
    three = load_images(run_for(tmp_path, val_fraction=0.3, test_fraction=0.2))
    for part, count in ((three.train, 5), (three.validation, 3), (three.test, 2)):
        assert torch.bincount(part.labels).tolist() == [count] * 3
    smaller = load_images(run_for(tmp_path, val_fraction=0.3, train_size=9))
    assert torch.bincount(smaller.train.labels).tolist() == [3, 3, 3]


def test_what_is_no_data_set_is_refused(tmp_path):
    assert "is not a folder" in refused(run_for(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(run_for(tmp_path / "empty", val_fraction=0.5))
    one = make_images(tmp_path / "one", ["cat"])
    assert "one class only (cat)" in refused(run_for(one, val_fraction=0.5))
    two = make_images(tmp_path / "two", ["cat", "dog"])
    assert "--val-fraction" in refused(run_for(two))
    make_images(tmp_path / "half" / "train", ["cat", "dog"])
    assert "but no val: give --val-fraction" in refused(run_for(tmp_path / "half"))
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
    assert len(images.train) + len(images.validation) == 12


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
    assert len(images.train) + len(images.validation) == 11
    assert str(bad) in images.notes[0]


def test_sizes_that_cannot_be_are_refused(tmp_path):
    make_images(tmp_path, ["a", "b"])
    folder = run_for(tmp_path, val_fraction=0.5)
    assert "--train-size 99" in refused(Run(**{**vars(folder), "train_size": 99}))
    assert "--batch-size 7 is more than the 6" in refused(Run(**{**vars(folder), "batch_size": 7}))
    assert "can't split 1297 images" in refused(Run(train_size=1290))
    said = refused(Run(**{**vars(folder), "val_size": 1}))
    assert "can't split 6 images of 2 classes, 3 to 3 of each, with --val-size 1:" in said
