"""Classes that a draw leaves without images: named where they are validated on, else refused."""

import pytest
from test_recipe_data import make_images, refused, run_for

from resnet_reg_ext.recipe.data import load_images, load_split


def make_counts(root, counts):
    for name, count in counts.items():
        make_images(root, [name], count=count)
    return root


def test_a_class_that_a_split_leaves_without_validation_images_is_named(tmp_path):
    make_counts(tmp_path, {"a": 40, "b": 40, "rare": 2})
    run = run_for(tmp_path, val_fraction=0.1)
    images = load_images(run)
    assert set(images.validation.labels.tolist()) == {0, 1}
    (note,) = images.notes
    count = len(images.validation)
    assert note == f"none of the {count} validation images is of rare: too few for such a split"
    assert load_split(run, "val", images.classes).notes == images.notes
    assert load_split(run, "train", images.classes).notes == ()


@pytest.mark.parametrize("change", [{"val_fraction": 0.9}, {"val_fraction": 0.5, "train_size": 6}])
def test_a_class_that_a_split_leaves_without_training_images_is_refused(change, tmp_path):
    make_counts(tmp_path, {"a": 40, "b": 40, "rare": 4})
    run = run_for(tmp_path, **change)
    assert "training images is of rare: give a smaller --val-fraction" in refused(run)
    # A run of an earlier version can still be evaluated.
    assert "is of rare" in load_split(run, "train", ["a", "b", "rare"]).notes[-1]


@pytest.mark.parametrize(("part", "split"), [("train_size", "train"), ("val_size", "val")])
def test_a_class_that_a_size_leaves_out_of_a_split_folder_is_named(part, split, tmp_path):
    for name in ("train", "val"):
        make_counts(tmp_path / name, {"a": 40, "b": 40, "rare": 2})
    run = run_for(tmp_path, **{part: 6})
    if part == "train_size":
        assert "none of the 6 training images is of rare" in refused(run)
    else:
        assert load_images(run).notes == (
            "none of the 6 validation images is of rare: too few for such a split",
        )
    assert any("is of rare" in note for note in load_split(run, split, ["a", "b", "rare"]).notes)
